"""What `pack` accepts and refuses: layouts, file names, bad files and output folders."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kill_packer import checksums
from packs import NASTY, draw_image, drawn, exactly, images, nasty, paths, samples

from fastflower import Manifest, pack
from fastflower.errors import ArgumentError, FolderError
from fastflower.packing.folder import scan

SPLITS = ("train", "val")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return drawn(tmp_path / "small", a=7, b=10, c=13)


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    """14, 5 and 3 images in train/, val/ and test/. Two test images are also in train, with other names."""
    folder = drawn(tmp_path / "divided", **{"train/a": 5, "train/b": 7, "val/a": 2, "val/b": 3, "test/b": 3})
    for number in range(2):
        shutil.copy(folder / f"test/b/00{number}.jpg", folder / f"train/b/copy-{number}.jpg")
    return folder


def below(folder: Path, split: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in (folder / split).glob("*/*")}


@pytest.mark.parametrize("split_by", [None, "folder"])
def test_a_folders_own_split_is_kept(divided: Path, tmp_path: Path, split_by: Any) -> None:
    manifest = pack(divided, tmp_path / "out", split_by=split_by, seed=3)
    assert list(manifest.splits) == ["train", "val", "test"]
    assert manifest.classes == ("a", "b")
    assert {name: split.class_counts for name, split in manifest.splits.items()} == {
        "train": (5, 9), "val": (2, 3), "test": (0, 3)
    }  # fmt: skip
    for split in manifest.splits:
        found = list(samples(tmp_path / "out", split))
        assert {sample.path for sample in found} == below(divided, split)
        assert [sample.label for sample in found] == [int("/b/" in sample.path) for sample in found]
    assert (manifest.options["split_by"], manifest.options["val_fraction"]) == ("folder", None)
    assert manifest.duplicates == tuple((f"train/b/copy-{n}.jpg", f"test/b/00{n}.jpg") for n in range(2))
    assert manifest.near_duplicates == tuple(
        {"split": "test", "path": f"test/b/00{n}.jpg", "train_path": f"train/b/copy-{n}.jpg", "distance": 0}
        for n in range(2)
    )


def test_a_folder_with_a_split_can_be_split_again(divided: Path, tmp_path: Path) -> None:
    """All images are split again, and copies stay together."""
    every = below(divided, "train") | below(divided, "val") | below(divided, "test")
    for split_by in ("class", "random"):
        out = tmp_path / split_by
        manifest = pack(divided, out, split_by=split_by, val_fraction=0.5)
        assert list(manifest.splits) == ["train", "val"]
        train, val = paths(out, "train"), paths(out, "val")
        assert train | val == every
        assert len(train) + len(val) == len(every) == 22
        assert abs(len(val) - 11) <= 2
        assert [len({path in val for path in group}) for group in manifest.duplicates] == [1, 1]
        assert manifest.options["val_fraction"] == 0.5
        assert val & below(divided, "train")
        assert train & (below(divided, "val") | below(divided, "test"))
    counts = Manifest.load(tmp_path / "class").splits["val"].class_counts
    assert counts[0] == round(7 * 0.5)


def test_a_folder_without_a_split_cannot_keep_its_own(small: Path, tmp_path: Path) -> None:
    text = f"split_by must be 'class' or 'random' because {small} has no split of its own, got 'folder'."
    with pytest.raises(ArgumentError, match=exactly(text)):
        pack(small, tmp_path / "out", split_by="folder")
    assert not (tmp_path / "out").exists()


def test_the_split_and_labels_of_lists_are_kept(small: Path, tmp_path: Path) -> None:
    (small / "meta").mkdir()
    (small / "meta/train.txt").write_text("a/000.jpg 1\nb/001.jpg 0\nc/002.jpg 1\n")
    (small / "meta/val.txt").write_text("c/003.jpg 0\n")
    (small / "classes.txt").write_text("no\nyes\n")
    manifest = pack(small, tmp_path / "out")
    assert manifest.classes == ("no", "yes")
    found = {split: {(sample.path, sample.label) for sample in samples(tmp_path / "out", split)} for split in SPLITS}
    assert found == {"train": {("a/000.jpg", 1), ("b/001.jpg", 0), ("c/002.jpg", 1)}, "val": {("c/003.jpg", 0)}}
    assert manifest.options["split_by"] == "folder"


def lists_of(out: Path, folder: Path) -> None:
    """Copy the lists of a pack into a folder."""
    shutil.copy(out / "classes.txt", folder)
    shutil.copytree(out / "meta", folder / "meta")


@pytest.mark.parametrize("options", [{}, {"val_fraction": 0}, {"on_conflict": "drop", "split_by": "random"}])
def test_lists_written_by_pack_give_the_same_split_again(tmp_path: Path, options: dict[str, Any]) -> None:
    """The names contain spaces, end in numbers or are not UTF-8. Skipped images are not listed."""
    folder = drawn(tmp_path / "data", **{"a b": 9, "é 2": 8})
    names = [name for name in NASTY if "\n" not in name and len(name) < 100 and name[0] != "."]
    for number, name in enumerate(names):
        draw_image(5000 + number).save(folder / f"é 2/{name} 7.jpg", "JPEG")
    (folder / "a b/bad 1.jpg").write_bytes(b"text")
    shutil.copy(folder / "a b/000.jpg", folder / "é 2/conflict.jpg")
    first = pack(folder, tmp_path / "first", lists=True, **options)
    found = [[sample[2:] for sample in samples(tmp_path / "first", split)] for split in SPLITS]
    lists_of(tmp_path / "first", folder)
    second = pack(folder, tmp_path / "second", lists=True, seed=5)
    again = [[sample[2:] for sample in samples(tmp_path / "second", split)] for split in SPLITS]
    assert [set(group) for group in again] == [set(group) for group in found]
    assert second.classes == first.classes == ("a b", "é 2")
    assert len(first.skipped) == (3 if "on_conflict" in options else 1)
    assert second.skipped == ()
    for name in ("classes.txt", "meta/train.txt", "meta/val.txt"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    before = scan(folder)
    assert [before.path(number) for number in range(len(found[0]))] == sorted(path for _, _, path in found[0])


def test_lists_of_a_folder_with_a_split_contain_its_paths(divided: Path, tmp_path: Path) -> None:
    pack(divided, tmp_path / "out", lists=True)
    assert (tmp_path / "out/classes.txt").read_text() == "a\nb\n"
    for split in ("train", "val", "test"):
        lines = (tmp_path / f"out/meta/{split}.txt").read_text().splitlines()
        assert lines == [f"{path} {int('/b/' in path)}" for path in sorted(below(divided, split))]


@pytest.mark.filterwarnings("error")
def test_nasty_names_get_plain_unique_keys_and_are_all_packed(tmp_path: Path) -> None:
    """test_tar_shards.py tests that other readers find them all."""
    folder = nasty(tmp_path / "data")
    manifest = pack(folder, tmp_path / "out", val_fraction=0)
    assert manifest.skipped == ()
    found = list(samples(tmp_path / "out", "train"))
    assert {sample.path for sample in found} == images(scan(folder))
    assert len(found) == len({sample.key for sample in found}) == 2 * len(NASTY) + 6
    assert [sample.key for sample in found if not re.fullmatch(r"[0-9A-Za-z_-]+-[0-9a-f]{16}", sample.key)] == []
    kept = [sample for sample in found if sample.path.lower().endswith(".jpg")]
    assert [sample.path for sample in kept if sample.image != (folder / sample.path).read_bytes()] == []
    assert len(kept) == len(NASTY) + 6


def test_bad_files_are_skipped_with_a_reason_and_the_others_packed(small: Path, tmp_path: Path) -> None:
    good = images(scan(small))
    whole = (small / "a/000.jpg").read_bytes()
    (small / "a/half.jpg").write_bytes(whole[: len(whole) // 2])
    (small / "b/text.jpg").write_text("not an image")
    (small / "b/empty.png").write_bytes(b"")
    (small / "c/notes.txt").write_text("not named as one")
    (small / "c/gone.jpg").symlink_to(small / "nowhere")
    manifest = pack(small, tmp_path / "out")
    reasons = {item["path"]: item["reason"] for item in manifest.skipped}
    assert list(reasons) == sorted(reasons)
    assert "runcated" in reasons.pop("a/half.jpg")
    assert reasons == {
        "b/text.jpg": "is plain text, named .jpg",
        "b/empty.png": "is empty",
        "c/notes.txt": "has no image extension (.txt)",
        "c/gone.jpg": "No such file or directory",
    }
    assert paths(tmp_path / "out", "train") | paths(tmp_path / "out", "val") == good


def test_pipes_sockets_and_loops_of_links_are_skipped_without_hanging(small: Path, tmp_path: Path) -> None:
    """The pack runs in its own process, which can be stopped if it hangs."""
    good = images(scan(small))
    os.mkfifo(small / "a/pipe.jpg")
    os.mknod(small / "a/socket.png", stat.S_IFSOCK | 0o600)
    (small / "b/to-pipe.jpg").symlink_to(small / "a/pipe.jpg")
    (small / "b/itself.jpg").symlink_to("itself.jpg")
    (small / "c/deeper").mkdir()
    (small / "c/deeper/up").symlink_to("..")
    (small / "c/linked.jpg").symlink_to(small / "a/000.jpg")
    program = "import sys; from fastflower.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "pack", small, "--out", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    manifest = Manifest.load(tmp_path / "out")
    assert {item["path"]: item["reason"] for item in manifest.skipped} == {
        "a/pipe.jpg": "is a pipe, socket or device",
        "a/socket.png": "is a pipe, socket or device",
        "b/to-pipe.jpg": "is a pipe, socket or device",
        "b/itself.jpg": "Too many levels of symbolic links",
        "c/deeper/up": "links to a folder that was already read",
    }
    found = {sample.path: sample.image for split in SPLITS for sample in samples(tmp_path / "out", split)}
    assert found.keys() == good | {"c/linked.jpg"}
    assert found["c/linked.jpg"] == (small / "a/000.jpg").read_bytes()
    assert manifest.label_conflicts == (("a/000.jpg", "c/linked.jpg"),)


@pytest.mark.filterwarnings("error")
def test_shards_without_a_good_image_are_not_written(small: Path, tmp_path: Path) -> None:
    """There is one image per shard, and DALI refuses to read an empty shard."""
    for number in range(20):
        (small / f"a/bad-{number}.jpg").write_bytes(b"bad" * 300)
        (small / f"b/empty-{number}.jpg").write_bytes(b"")
    manifest = pack(small, tmp_path / "out", shard_bytes=1, val_fraction=0.5)
    for split, part in manifest.splits.items():
        assert [shard.samples for shard in part.shards] == [1] * part.samples
        assert [shard.name for shard in part.shards] == [f"{split}-{number:06d}.tar" for number in range(part.samples)]
        assert len(list(samples(tmp_path / "out", split))) == part.samples
    assert len(list((tmp_path / "out").glob("*.tar"))) == len(list((tmp_path / "out").glob("*.idx"))) == 30
    assert {path.read_text().splitlines()[0] for path in (tmp_path / "out").glob("*.idx")} == {"v1.2 1"}
    info = json.loads((tmp_path / "out/_info.json").read_text())["splits"]
    assert {name: split["num_samples"] for name, split in info.items()} == {
        name: split.samples for name, split in manifest.splits.items()
    }


def one_bad(folder: Path) -> str:
    (folder / "b/004.jpg").write_bytes(b"text")
    return f"{folder / 'b/004.jpg'}: is plain text, named .jpg"


def one_gone(folder: Path) -> str:
    (folder / "b/004.jpg").unlink()
    (folder / "b/004.jpg").symlink_to("nowhere")
    return f"{folder / 'b/004.jpg'}: No such file or directory"


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("spoil", [one_bad, one_gone])
def test_an_error_in_the_images_leaves_nothing_behind(
    small: Path, tmp_path: Path, spoil: Callable[[Path], str], kept: bool
) -> None:
    out = tmp_path / "out"
    if kept:  # other files in OUT stay
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    again = f"pack({str(small)!r}, {str(out)!r}, shard_bytes=5000)"
    rule = f"remove or replace it, or skip damaged images:\n  {again}"
    with pytest.raises(FolderError, match=exactly(f"{spoil(small)}; {rule}")):
        pack(small, out, on_bad="fail", shard_bytes=5000)
    assert ([path.name for path in out.iterdir()] if out.exists() else []) == ["notes.txt"] * kept
    assert out.exists() == kept


@pytest.mark.parametrize(
    ("where", "beside"),
    [("", "small-2"), ("out", "out"), ("a/out", "out"), ("../link", "link-2"), ("../small", "small-2")],
)
def test_out_inside_the_folder_is_refused(small: Path, tmp_path: Path, where: str, beside: str) -> None:
    (tmp_path / "link").symlink_to(small / "b")
    before = checksums(tmp_path)
    out = small / where
    what = f"is inside the folder to pack ({small}) and would become part of it"
    again = f"pack({str(small)!r}, '{tmp_path / beside}')"
    with pytest.raises(FolderError, match=exactly(f"{out}: {what}; choose another folder:\n  {again}")):
        pack(small, out)
    assert checksums(tmp_path) == before
    assert not (small / "out").exists()


def test_out_next_to_the_folder_may_start_with_its_name(small: Path) -> None:
    assert pack(small, f"{small}-packed").splits["train"].samples == 24


@pytest.mark.parametrize("name", ["other.tar", "other.idx", "other.npy", "_info.json", "classes.txt", "meta"])
def test_out_with_files_of_another_pack_is_refused(small: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    again = f"pack({str(small)!r}, '{out}-2', lists=True)"
    if name == "meta":
        (out / name).mkdir()
    else:
        (out / name).write_text("mine")
    text = f"{out}: already contains {name}; remove it, or choose another folder:\n  {again}"
    with pytest.raises(FolderError, match=exactly(text)):
        pack(small, out, lists=True)
    assert [path.name for path in out.iterdir()] == [name]
    if name in ("classes.txt", "meta"):
        pack(small, out)
        assert (out / name).is_dir() or (out / name).read_text() == "mine"


def test_a_pack_is_not_overwritten(small: Path, tmp_path: Path) -> None:
    pack(small, tmp_path / "out")
    before = checksums(tmp_path / "out")
    what = f"{tmp_path / 'out'}: already contains packed shards; remove them, or choose another folder"
    for seed in (0, 1):
        text = f"{what}:\n  pack({str(small)!r}, '{tmp_path / 'out'}-2', seed={seed})"
        with pytest.raises(FolderError, match=exactly(text)):
            pack(small, tmp_path / "out", seed=seed)
    assert checksums(tmp_path / "out") == before


def test_out_that_cannot_be_created_is_explained(small: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("mine")
    for out, reason in (
        (tmp_path / "file/out", "Not a directory"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / ("long" * 100), "File name too long"),
    ):
        text = f"{out}: cannot be written ({reason}); choose another folder as out (--out)."
        with pytest.raises(FolderError, match=exactly(text)):
            pack(small, out)


def test_lists_may_start_with_a_byte_order_mark(small: Path, tmp_path: Path) -> None:
    (small / "meta").mkdir()
    marked = {"classes.txt": "a\nb\nc\n", "meta/train.txt": "a/000.jpg 0\nb/000.jpg 1\nc/000.jpg 2\n"}
    for name, text in marked.items():
        (small / name).write_text(text, encoding="utf-8-sig")
    manifest = pack(small, tmp_path / "out")
    assert manifest.classes == ("a", "b", "c")
    assert paths(tmp_path / "out", "train") == {"a/000.jpg", "b/000.jpg", "c/000.jpg"}
    assert manifest.skipped == ()


def test_a_class_of_copies_of_one_image_stays_in_training(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=6, b=1)
    for number in range(4):
        shutil.copy(folder / "b/000.jpg", folder / f"b/copy-{number}.jpg")
    for seed in range(3):
        manifest = pack(folder, tmp_path / str(seed), val_fraction=0.4, seed=seed)
        assert manifest.splits["train"].class_counts[1] == 5
        assert manifest.splits["val"].class_counts[0] == 2


def test_lists_refuse_names_with_line_breaks(small: Path, tmp_path: Path) -> None:
    path, again = "b/two\nlines.jpg", f"pack({str(small)!r}, '{tmp_path / 'out'}')"
    draw_image(1).save(small / path)
    text = f"{str(small / path)!r}: has a line break in its name; rename it, or pack without lists:\n  {again}"
    with pytest.raises(FolderError, match=exactly(text)):
        pack(small, tmp_path / "out", lists=True)
    assert not (tmp_path / "out").exists()
    pack(small, tmp_path / "out")
    assert path in paths(tmp_path / "out", "train") | paths(tmp_path / "out", "val")


def test_a_file_of_more_than_a_gigabyte_is_not_read(small: Path, tmp_path: Path) -> None:
    with (small / "a/zeros.jpg").open("wb") as file:
        file.truncate((1 << 30) + 1)
    manifest = pack(small, tmp_path / "out")
    reason = "has 1073741825 bytes, more than the limit of 1073741824"
    assert manifest.skipped == ({"path": "a/zeros.jpg", "reason": reason},)


def test_formats_that_start_external_programs_are_not_images(small: Path, tmp_path: Path) -> None:
    draw_image(1).save(small / "a/script.jpg", "EPS")
    assert pack(small, tmp_path / "out").skipped == ({"path": "a/script.jpg", "reason": "is PostScript, named .jpg"},)
