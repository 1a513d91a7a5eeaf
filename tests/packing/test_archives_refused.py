"""Files that cannot be packed: what they are, and the command that helps."""

import io
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from packs import drawn, exactly

from fastflower import pack
from fastflower.errors import FolderError
from fastflower.packing.advice import AS_FILES, SHARD, refused

H5, ZST, SEVEN, RAR = b"\x89HDF\r\n\x1a\n", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07"
JOIN = "is one part of several; join them (cat DIR/x.{0} > DIR/x.{1}) and pack DIR/x.{1}"


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("x.7z", SEVEN, "is a 7z archive; unpack it (7z x DIR/x.7z -oDIR/x) and pass the folder"),
        ("x", SEVEN, "is a 7z archive; unpack it (7z x DIR/x -oDIR/x-unpacked) and pass the folder"),
        ("x.rar", RAR, "is a RAR archive; unpack it (unrar x DIR/x.rar DIR/x/) and pass the folder"),
        ("x.tar.zst", ZST, "is a Zstandard archive; unpack it (mkdir DIR/x && "
         "tar --zstd -xf DIR/x.tar.zst -C DIR/x) and pass the folder"),
        ("x.zst", ZST, "is a Zstandard archive; unpack it (zstd -d DIR/x.zst) and pass the folder"),
        ("x.zip", b"<!doctype html><p>", "is HTML, a web page, not an archive; get it again"),
        ("x.tgz", b'{"error": 404}', "is JSON, not an archive; get it again"),
        ("x.zip", b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer (run git lfs pull), not an archive"),
        ("x.zip", b"", "is empty; get it again"),
        ("x.tar", bytes(10240), "begins with 1024 zero bytes, so it is no archive; get it again"),
        ("x.h5", H5, f"is HDF5, arrays, which fastflower does not read; {AS_FILES}"),
        ("x.parquet", b"PAR1..", f"is Parquet, a table, which fastflower does not read; {AS_FILES}"),
        ("x.npy", b"\x93NUMPY", f"is a NumPy array, which fastflower does not read; {AS_FILES}"),
        ("x.mp4", b"\0\0\0\x18ftypmp42", f"is a video or sound (MP4 or MOV), which fastflower does not read; {AS_FILES}"),
        ("x.pdf", b"%PDF-1.4", f"is a PDF document, which fastflower does not read; {AS_FILES}"),
        ("x.zip.001", b"PK\3\4", JOIN.format("zip????", "zip")),
        ("x.tar.gz.partab", b"anything", JOIN.format("tar.gz???????", "tar.gz")),
        ("x.tgzaa", b"\x1f\x8b\x08", JOIN.format("tgz??", "tgz")),
        ("x.z01", b"PK\7\x08", "is one part of several; join them (zip -s 0 DIR/x.zip --out DIR/x-whole.zip) "
         "and pack DIR/x-whole.zip"),
        ("x.txt", b"some text", None),
        ("x.tar.xz", b"\xfd7zXZ\0", None),
        ("x.jpg", b"\xff\xd8\xff", None),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_packed_is_named_with_the_remedy(
    tmp_path: Path, name: str, data: bytes, text: str | None
) -> None:
    (tmp_path / name).write_bytes(data)
    assert refused(tmp_path / name) == (text and text.replace("DIR", str(tmp_path)))
    if text:
        with pytest.raises(FolderError, match=exactly(f"{tmp_path / name}: {refused(tmp_path / name)}.")):
            pack(tmp_path / name, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_parts_are_joined_by_the_command(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"x.tar.gz.parta{'abc'[number]}").write_bytes(bytes([number]))
    said = refused(tmp_path / "x.tar.gz.partab") or ""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/x.zip.001").write_bytes(b"PK\3\4")
    of_folder = (JOIN.format("zip????", "zip") + ".").replace("DIR", f"{tmp_path}/parts")
    with pytest.raises(FolderError, match=exactly(f"{tmp_path}/parts: has no images: 'x.zip.001' {of_folder}")):
        pack(tmp_path / "parts", tmp_path / "out")
    subprocess.run(["bash", "-c", said[said.index("(") + 1 : said.index(")")]], check=True)
    assert (tmp_path / "x.tar.gz").read_bytes() == b"\0\1\2"


def test_an_unreadable_file_is_to_be_made_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.zip").touch()
    monkeypatch.setattr(Path, "open", denied)
    assert refused(tmp_path / "x.zip") == "cannot be read (Permission denied); make it readable"


def test_an_unknown_compression_names_the_command(tmp_path: Path) -> None:
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("a/1.jpg", b"x")
    data = bytearray(archive.read_bytes())
    for start, offset in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        struct.pack_into("<H", data, data.index(start) + offset, 9)  # Deflate64
    archive.write_bytes(data)
    what = "'a/1.jpg' uses a compression that Python cannot read; type: "
    command = f"unzip {archive} -d {tmp_path / 'x'} && fastflower pack {tmp_path / 'x'}"
    with pytest.raises(FolderError, match=exactly(f"{archive}: {what}{command}")):
        pack(archive, tmp_path / "out")


def shard() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("1.jpg", "1.cls"):
            tar.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def test_shards_are_not_packed_again(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").write_bytes(shard())
    assert refused(tmp_path / "train-0.tar") == SHARD
    with pytest.raises(FolderError, match=exactly(f"{tmp_path}: 'train-0.tar' {SHARD}.")):
        pack(tmp_path, tmp_path.parent / "out")
    folder, out = drawn(tmp_path / "data", a=2, b=2), tmp_path / "packed"
    pack(folder, out)
    remedy = f"train on it: fastflower train {out}; or score a checkpoint: fastflower evaluate CHECKPOINT {out}."
    for again in (tmp_path / "again", out):
        with pytest.raises(FolderError, match=exactly(f"{out}: is packed already; {remedy}")):
            pack(out, again)
    assert refused(next(out.glob("*.tar"))) == SHARD
    (tmp_path / "outer").mkdir()
    inside = out.rename(tmp_path / "outer" / "packed")
    with pytest.raises(
        FolderError, match=f"outer: is packed already, in {inside}; train on it: fastflower train {inside};"
    ):
        pack(tmp_path / "outer", tmp_path / "again")


def test_one_image_and_the_folder_of_a_run_are_no_folder_of_images(tmp_path: Path) -> None:
    drawn(tmp_path / "data", a=1)
    image, run = tmp_path / "data/a/000.jpg", tmp_path / "run"
    with pytest.raises(
        FolderError, match=f"{image}: is one image; pass a folder that contains one folder of images per class"
    ):
        pack(image, tmp_path / "out")
    run.mkdir()
    (run / "checkpoint-best.pt").touch()
    (run / "tensorboard").mkdir()
    what = "is the folder of a run, not of images; pass the shards or images (fastflower train SHARDS)."
    with pytest.raises(FolderError, match=exactly(f"{run}: {what}")):
        pack(run, tmp_path / "out")


def test_several_tars_are_unpacked_by_one_loop(tmp_path: Path) -> None:
    for name in ("a b", "c"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(FolderError) as caught:
        pack(tmp_path, tmp_path.parent / "out")
    said = str(caught.value)
    subprocess.run(["bash", "-c", said[said.index("(") + 1 : said.rindex(")")]], check=True)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")} == {"a b/1.txt", "c/1.txt"}


@pytest.mark.parametrize("prefix", ["", "w/"])
def test_a_table_in_an_archive_is_offered_with_the_archive(tmp_path: Path, prefix: str) -> None:
    folder = drawn(tmp_path / "data", images=4)
    archive = tmp_path / "my x.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for file in folder.rglob("*.jpg"):
            opened.write(file, prefix + str(file.relative_to(folder)))
        rows = [f"images/{number:03}.jpg,{'xy'[number % 2]}\n" for number in range(4)]
        opened.writestr(f"{prefix}my train.csv", "path,label\n" + "".join(rows))
    with pytest.raises(FolderError) as caught:
        pack(archive, tmp_path / "out")
    command = f"fastflower pack '{archive}' --out {tmp_path / 'out'} --labels '{prefix}my train.csv'"
    assert str(caught.value).endswith(f"my train.csv names 4 of these images: {command}")
    assert str(caught.value).startswith(f"{archive}: has one class, 'images'; a classifier needs")
    assert "unpack" not in str(caught.value)
    assert pack(archive, tmp_path / "out", labels=f"{prefix}my train.csv").classes == ("x", "y")
