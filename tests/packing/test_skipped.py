"""Files that are no images: what is said of them, and of folders that hold nothing else."""

import gzip
import io
import logging
import re
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from packs import draw_image, drawn, exactly, interrupted, touch
from places import ROOT
from plans import write
from torchvision.datasets.folder import IMG_EXTENSIONS

from fastflower import pack
from fastflower.errors import FolderError, SampleError
from fastflower.models.checkpoint import Checkpoint
from fastflower.models.prediction import predict
from fastflower.packing import workspace
from fastflower.packing.folder import scan
from fastflower.packing.names import EXTENSIONS
from fastflower.packing.remarks import remarks
from fastflower.shards.manifest import Manifest

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/format.md").read_text(), re.DOTALL)
IDX = b"\0\0\x08\x03" + struct.pack(">III", 4, 28, 28) + np.arange(4 * 784).astype(np.uint8).tobytes()
LABELS = b"\0\0\x08\x01" + struct.pack(">I", 4) + bytes([0, 1, 0, 1])
MNIST = {
    f"MNIST/raw/{split}-{what}": data
    for split in ("train", "t10k")
    for what, data in (("images-idx3-ubyte", IDX), ("labels-idx1-ubyte", LABELS))
}
AS_FILES = 'save the images as files, one folder per class ("Images inside other files" in docs/format.md shows how)'
UNPACK = "and pass the folder that has one folder of images per class"


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("a/1.jpg", b"x")
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("a/1.jpg"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("files", "what", "remedy"),
    [
        ({"data/train-0.parquet": b"PAR1..", "data/train-1.parquet": b"PAR1.", "README.md": b"# x"},
         "'data/train-0.parquet' is Parquet, a table, as is 1 other file", AS_FILES),
        (MNIST, "'MNIST/raw/t10k-images-idx3-ubyte' is IDX, an array as in MNIST, as are 3 other files", AS_FILES),
        ({"x-ubyte.gz": gzip.compress(IDX)}, "'x-ubyte.gz' is IDX, an array as in MNIST, compressed by gzip", AS_FILES),
        ({"cifar/data_batch_1": b"\x80\x02}q\x01(", "cifar/readme.html": b"<html>"},
         "'cifar/data_batch_1' is a Python pickle", AS_FILES),
        ({"train/a.h5": b"\x89HDF\r\n\x1a\n", "val/a.h5": b"\x89HDF\r\n\x1a\n"},
         "'train/a.h5' is HDF5, arrays, as is 1 other file", AS_FILES),
        ({"flowers.zip": archive()}, "'flowers.zip' is a ZIP archive",
         f"pack it (fastflower pack FOLDER/flowers.zip), or unpack it (unzip FOLDER/flowers.zip -d FOLDER/flowers), {UNPACK}"),
        ({"102flowers.tgz": gzip.compress(tar())}, "'102flowers.tgz' is a tar archive, compressed by gzip",
         f"pack it (fastflower pack FOLDER/102flowers.tgz), or unpack it (mkdir FOLDER/102flowers && "
         f"tar -xf FOLDER/102flowers.tgz -C FOLDER/102flowers), {UNPACK}"),
        ({"flowers.7z": b"7z\xbc\xaf\x27\x1c"}, "'flowers.7z' is a 7z archive", f"unpack it, {UNPACK}"),
    ],
)  # fmt: skip
def test_a_folder_of_other_files_says_what_they_are(
    tmp_path: Path, files: dict[str, bytes], what: str, remedy: str
) -> None:
    unread = "" if "pack it (" in remedy else ", which fastflower does not read"
    text = f"{write(tmp_path, files)}: has no images: {what}{unread}; {remedy}.".replace("FOLDER", str(tmp_path))
    with pytest.raises(FolderError, match=exactly(text)):
        scan(tmp_path)


def test_predict_says_the_same_of_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {"a.parquet": b"PAR1"})
    with pytest.raises(
        SampleError, match=r"data: has no images: 'a\.parquet' is Parquet, a table, which fastflower does"
    ):
        predict(Mock(spec=Checkpoint), folder)


@pytest.mark.parametrize(
    "files", [{"1.jpg": b"x", "a.parquet": b"PAR1"}, {"notes.txt": b"x", "labels.json": b"{}"}, {}]
)
def test_images_or_nothing_to_name_leave_the_message(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(FolderError, match=r"has no class folders"):
        scan(write(tmp_path, files))


def test_the_page_saves_images_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "FOLDER", MNIST)
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[0], "docs/format.md", "exec"), {})
    folder = scan("images")
    assert (folder.classes, folder.splits, len(folder)) == (("0 - zero", "1 - one"), ("train", "val"), 8)


def test_the_page_saves_images_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is not installed here; this stands for a dataset with a class label."""

    class Rows(list[dict[str, Any]]):
        features = {"label": SimpleNamespace(names=["rose", "tulip"])}  # noqa: RUF012  (as datasets has it)

    rows = Rows({"image": draw_image(number), "label": number % 2} for number in range(4))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows))
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[1], "docs/format.md", "exec"), {})
    assert (scan("images").classes, len(scan("images"))) == (("rose", "tulip"), 4)


def test_the_page_saves_images_of_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "FOLDER").mkdir()
    images = np.stack([np.asarray(draw_image(number)) for number in range(4)])
    np.savez(tmp_path / "FOLDER/data.npz", images=images, labels=np.array([0, 1, 1, 0]))
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[2], "docs/format.md", "exec"), {})
    assert (scan("images").classes, len(scan("images"))) == (("0", "1"), 4)


def manifest(*reasons: str) -> Manifest:
    skipped = tuple({"path": f"a/{number}.jpg", "reason": reason} for number, reason in enumerate(reasons))
    options = {"val_fraction": 0}
    return Manifest(folder=Path("out"), classes=("a", "b"), splits={}, options=options, skipped=skipped)


def test_skipped_files_are_summarized_by_reason_damaged_ones_first() -> None:
    text, page = "has no image extension (.txt)", "is HTML, a web page, named .jpg"
    cut = [f"image file is truncated ({number} bytes not processed)" for number in (7, 12)]
    lost = "is a folder that cannot be read (Permission denied)"
    (told,) = remarks(manifest(*[text] * 6, *[page] * 5, *cut, lost), {text, lost})
    assert told.split("\n") == [
        "skipped 14 files; `skipped` in manifest.json lists all:",
        f"  {page}: 5 files (a/6.jpg, a/7.jpg, a/8.jpg and 2 others)",
        "  image file is truncated (N bytes not processed): a/11.jpg, a/12.jpg",
        f"  {lost}: a/13.jpg",
        f"  {text}: 6 files (a/0.jpg, a/1.jpg, a/2.jpg and 3 others)",
    ]


def test_only_twenty_reasons_are_told() -> None:
    (told,) = remarks(manifest(*(f"reason {chr(97 + number)}" for number in range(22)), "reason v"))
    assert told.count("\n") == 21
    assert told.endswith("\n  2 files for 2 other reasons")


def test_one_file_and_numbers_that_are_equal_stay_as_they_are() -> None:
    (told,) = remarks(manifest("declares 9 x 9 pixels, but has data for only 1.5% of them", "is damaged JPEG 2000"))
    assert told.split("\n")[1:] == [
        "  declares 9 x 9 pixels, but has data for only 1.5% of them: a/0.jpg",
        "  is damaged JPEG 2000: a/1.jpg",
    ]


def test_other_files_in_class_folders_are_listed_with_their_extension(tmp_path: Path) -> None:
    others = {"a/notes.txt": " (.txt)", "a/sub/x.XML": " (.xml)", "b/jpg": "", "b/x.jpg ": ""}
    found = scan(touch(tmp_path, "a/1.jpg", "b/1.jpg", *others))
    assert dict(found.ignored) == {path: f"has no image extension{which}" for path, which in others.items()}


def test_image_folders_own_extensions_are_accepted() -> None:
    assert EXTENSIONS[: len(IMG_EXTENSIONS)] == IMG_EXTENSIONS


def test_other_extensions_than_image_folders_are_packed(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=2, b=2)
    for kind, name in (("GIF", "x.gif"), ("AVIF", "x.avif"), ("JPEG", "x.JFIF"), ("JPEG2000", "x.jp2")):
        draw_image(7).save(folder / "b" / name, kind)
    made = pack(folder, tmp_path / "out", val_fraction=0)
    assert (made.skipped, made.splits["train"].class_counts) == ((), (2, 6))


@pytest.mark.parametrize("change", [("1.8.1", "not installed"), ("not installed", "1.8.1")])
def test_a_pack_resumes_only_with_the_same_pillow_heif(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str]
) -> None:
    def installed(version: str) -> Callable[[str], str]:
        return lambda name: version if name == "pillow-heif" else "1"

    folder, out = drawn(tmp_path / "data", a=2, b=2), tmp_path / "out"
    before, now = (None if version == "not installed" else version for version in change)
    monkeypatch.setattr(workspace, "version_of", installed(change[0]))
    interrupted(folder, out, shards=0)
    monkeypatch.setattr(workspace, "version_of", installed(change[1]))
    with pytest.raises(
        FolderError,
        match=re.escape(
            f"an interrupted pack with pillow-heif {before!r}, not {now!r}; {'use' if before else 'remove'} "
        ),
    ):
        pack(folder, out)


def test_the_summary_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = drawn(tmp_path / "data", a=2, b=2)
    (folder / "a/\x1b[2J\n.jpg").write_bytes(b"<html>")
    pack(folder, tmp_path / "out", val_fraction=0)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().split("\n") == [
        f"{tmp_path / 'out'}: skipped 1 file; `skipped` in manifest.json lists all:",
        "  is HTML, a web page, named .jpg: a/\\x1b[2J\\n.jpg",
    ]


H5, PARQUET = b"\x89HDF\r\n\x1a\n", b"PAR1.."


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"bird.zip": archive()}, "'bird.zip' is a ZIP archive; this is not read: unpack it if it belongs"),
        ({"bird.zip": archive(), "ant.tar.gz": gzip.compress(tar()), "ignored.zip": archive()},
         "'ant.tar.gz' is a tar archive, compressed by gzip, 'bird.zip' is a ZIP archive; these are not read: unpack them "
         "if they belong"),
        ({f"train-{n}.h5": H5 for n in range(5)} | {"0.parquet": PARQUET},
         "'0.parquet' is Parquet, a table, 'train-0.h5' is HDF5, arrays, 'train-1.h5' is HDF5, arrays, and 3 more files; "
         "these are not read: save their images as files if they belong"),
        ({"a.zip": archive(), "b.tar.gz": gzip.compress(tar())}, None),  # left after unpacking
        ({"notes.zip": b"# notes", "labels.csv.gz": gzip.compress(b"no table"), "x.npy": b"\x93NUMPY", "a/x.zip": archive()},
         None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["", "train/"])
def test_archives_beside_class_folders_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: dict[str, bytes], named: str | None, place: str
) -> None:
    images = [f"{split}{name}/1.jpg" for split in (["train/", "val/"] if place else [""]) for name in "ab"]
    root = touch(tmp_path / "data", *images)
    write(root, {place + name: data for name, data in files.items()})
    scan(root, ignore=["ignored.zip"] if "ignored.zip" in files else [])
    named = named and re.sub(r"'(?=\w+[-.])", f"'{place}", named)
    assert caplog.messages == ([f"{root}: {named} to this data set"] if named else [])
