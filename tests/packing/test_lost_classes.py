"""Classes without a training image: an error that keeps the finished shards, or a pack without them."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_packer import checksums
from packs import BEFORE_CLEARING, BEFORE_MANIFEST, draw_image, drawn, exactly, interrupted, killed, paths, samples

from fastflower import Manifest, pack
from fastflower.errors import ArgumentError, FolderError
from fastflower.packing import lost_classes, worker
from fastflower.packing.folder import scan
from fastflower.packing.lost_classes import LostClassError
from fastflower.shards.verification import verify

PAGE = b"<!DOCTYPE html><html>404 Not Found</html>"
OPTIONS: dict[str, Any] = {"shard_bytes": 4000, "lists": True}
NO_EXTENSIONS = r"b: has no images \(\.jpg, \.png and others\); add some, or "


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    """Three classes. The five images of class b are error pages."""
    folder = drawn(tmp_path / "data", a=6, b=5, c=6)
    for number in range(5):
        (folder / f"b/00{number}.jpg").write_bytes(PAGE + b" " * number)
    return folder


@pytest.fixture
def failed(lost: Path, tmp_path: Path) -> Path:
    """OUT after a pack that stopped for class b."""
    with pytest.raises(LostClassError):
        pack(lost, tmp_path / "out", **OPTIONS)
    return tmp_path / "out"


def consistent(folder: Path, out: Path, classes: tuple[str, ...]) -> Manifest:
    """Check that labels in tars, indexes, counts and lists agree with the class folders, and return the manifest."""
    manifest = Manifest.load(out)
    assert manifest.classes == classes
    assert verify(out) == []
    for name, split in manifest.splits.items():
        found = list(samples(out, name))
        expected = [classes.index(sample.path.split("/")[-2]) for sample in found]
        assert [sample.label for sample in found] == expected
        assert (manifest.index(name)["label"] == expected).all() if found else split.samples == 0
        assert list(split.class_counts) == np.bincount(expected, minlength=len(classes)).tolist()
        if (out / "meta").exists():
            lines = dict(line.rsplit(" ", 1) for line in (out / f"meta/{name}.txt").read_text().splitlines())
            assert lines == {sample.path: str(sample.label) for sample in found}
            assert (out / "classes.txt").read_text().split() == list(classes)
    assert all(manifest.splits["train"].class_counts)
    listed = {item["path"] for item in manifest.skipped if item["reason"] != "is a class without training images"}
    found = set[str]().union(*(paths(out, name) for name in manifest.splits))
    assert not listed & found
    assert listed | found == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return manifest


def test_a_lost_class_is_named_with_files_and_reasons_and_the_shards_are_kept(lost: Path, tmp_path: Path) -> None:
    page, given = "is HTML, a web page, named .jpg", ", ".join(f"{name}={value!r}" for name, value in OPTIONS.items())
    with pytest.raises(FolderError) as caught:
        pack(lost, tmp_path / "out", **OPTIONS)
    some = [path for path in (f"b/00{number}.jpg" for number in range(5)) if path in str(caught.value)]
    assert len(some) == 3
    assert str(caught.value).split("\n") == [
        "class 'b': none of its 4 training images can be read:",
        *(f"  {path}: {page}" for path in some),
        "  and 1 other",
        f"Replace the files, remove {tmp_path / 'out/.packing'}, and pack again. Or leave out such classes, which keeps the "
        "finished shards:",
        f"  pack({str(lost)!r}, '{tmp_path / 'out'}', {given}, drop_empty_classes=True)",
    ]
    work = tmp_path / "out/.packing"
    assert {path.suffix for path in work.iterdir()} >= {".json", ".tar", ".npz", ".idx"}
    assert not (tmp_path / "out/manifest.json").exists()


def test_the_same_command_that_drops_classes_decodes_nothing_again(
    lost: Path, failed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "prepare", lambda *_, **__: pytest.fail("an image was decoded"))
    pack(lost, failed, drop_empty_classes=True, **OPTIONS)
    manifest = consistent(lost, failed, ("a", "c"))
    assert manifest.options["drop_empty_classes"] is True
    assert {item["path"]: item["reason"] for item in manifest.skipped} == {
        **{f"b/00{number}.jpg": "is HTML, a web page, named .jpg" for number in range(5)},
        "b": "is a class without training images",
    }
    assert caplog.messages[0] == f"{failed}: left out 1 class without training images: 'b'"
    assert "skipped 5 files" in caplog.messages[1]
    assert not (failed / ".packing").exists()


def test_a_pack_that_drops_classes_at_once_gives_the_same_bytes(lost: Path, failed: Path, tmp_path: Path) -> None:
    pack(lost, failed, drop_empty_classes=True, **OPTIONS)
    pack(lost, tmp_path / "at once", drop_empty_classes=True, **OPTIONS)
    assert checksums(tmp_path / "at once") == checksums(failed)


REWRITING = "event == 'os.rename' and paths[0].endswith('.rewritten.part')"


@pytest.mark.parametrize("stop", [REWRITING, BEFORE_MANIFEST, BEFORE_CLEARING])
def test_a_killed_pack_without_lost_classes_resumes(lost: Path, tmp_path: Path, stop: str) -> None:
    out, options = tmp_path / "out", {**OPTIONS, "drop_empty_classes": True}
    killed(lost, out, stop, **options)
    pack(lost, out, **options)
    pack(lost, tmp_path / "expected", **options)
    assert checksums(out) == checksums(tmp_path / "expected")


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_pack_that_stops_while_it_rewrites_shards_resumes(
    lost: Path, failed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    real, done = lost_classes._rewrite, list[str]()  # pyright: ignore[reportPrivateUsage]

    def stopping(*args: Any) -> None:
        if len(done) == shards:
            raise KeyboardInterrupt
        real(*args)
        done.append(args[2])

    with monkeypatch.context() as patch:
        patch.setattr(lost_classes, "_rewrite", stopping)
        with pytest.raises(KeyboardInterrupt):
            pack(lost, failed, drop_empty_classes=True, **OPTIONS)
    with pytest.raises(LostClassError, match=r"^class 'b': none of its 4 training images can be read"):
        pack(lost, failed, **OPTIONS)
    pack(lost, failed, drop_empty_classes=True, **OPTIONS)
    consistent(lost, failed, ("a", "c"))
    pack(lost, tmp_path / "expected", drop_empty_classes=True, **OPTIONS)
    assert checksums(failed) == checksums(tmp_path / "expected")


def test_the_option_cannot_be_taken_back(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=4, b=4)
    out = interrupted(folder, tmp_path / "out", shards=0, drop_empty_classes=True)
    what = "holds an interrupted pack with drop_empty_classes True, not False; use drop_empty_classes True to resume"
    with pytest.raises(FolderError, match=what):
        pack(folder, out)


def test_an_interrupted_pack_of_an_older_version_resumes(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=4, b=4)
    out = interrupted(folder, tmp_path / "out", shards=1, shard_bytes=4000)
    plan = out / ".packing/plan.json"
    content = json.loads(plan.read_text())
    del content["dropped"], content["options"]["drop_empty_classes"]
    plan.write_text(json.dumps(content))
    pack(folder, out, shard_bytes=4000)
    pack(folder, tmp_path / "expected", shard_bytes=4000)
    assert checksums(out) == checksums(tmp_path / "expected")


def test_mended_files_are_not_mixed_with_the_kept_shards(lost: Path, failed: Path) -> None:
    draw_image(5).save(lost / "b/000.jpg")
    text = f"{lost / 'b/000.jpg'}: has been changed since the pack into {failed} was interrupted; "
    with pytest.raises(
        FolderError, match=exactly(f"{text}undo this change to resume, or remove {failed / '.packing'} to start over.")
    ):
        pack(lost, failed, **OPTIONS)
    shutil.rmtree(failed / ".packing")
    pack(lost, failed, **OPTIONS)
    consistent(lost, failed, ("a", "b", "c"))


def test_images_that_become_readable_in_between_are_not_lost(
    lost: Path, failed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Size and time of a file stay the same if only its permissions change."""
    with monkeypatch.context() as patch:
        patch.setattr("fastflower.packing.packer.publish", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            pack(lost, failed, drop_empty_classes=True, **OPTIONS)
    whole = (lost / "a/000.jpg").read_bytes()
    for record in (failed / ".packing").glob("train-*.npz"):
        record.unlink()
    with monkeypatch.context() as patch:
        real = worker.prepare
        patch.setattr(
            worker, "prepare", lambda data, **options: real(whole if data.startswith(PAGE) else data, **options)
        )
        with pytest.raises(LostClassError, match=r"data: images can be read that could not be read before; to resume"):
            pack(lost, failed, drop_empty_classes=True, **OPTIONS)
        pack(lost, failed, drop_empty_classes=True, **OPTIONS)
    assert Manifest.load(failed).classes == ("a", "b", "c")
    assert verify(failed) == []


def test_fewer_than_two_classes_are_refused_and_nothing_is_kept(lost: Path, tmp_path: Path) -> None:
    for path in (lost / "c").iterdir():
        path.write_bytes(b"")
    for drop in (False, True):
        with pytest.raises(FolderError) as caught:
            pack(lost, tmp_path / "out", drop_empty_classes=drop)
        assert str(caught.value).startswith("class 'b': none of its 4 training images can be read:\n  b/")
        rule = "A classifier needs at least two classes, but only 1 would be left: replace these files."
        assert str(caught.value).endswith(f"\n  The same is true of 'c'.\n{rule}")
        assert not (tmp_path / "out").exists()


def test_empty_class_folders_are_left_out(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=4, c=4, e=4)
    for name in ("b", "d"):
        (folder / name).mkdir()
    (folder / "d/notes.txt").write_text("none")
    with pytest.raises(
        FolderError, match=NO_EXTENSIONS + r"leave out such classes:\n  pack\(.*, drop_empty_classes=True\)$"
    ):
        pack(folder, tmp_path / "out")
    manifest = pack(folder, tmp_path / "out", drop_empty_classes=True, **OPTIONS)
    assert [item["path"] for item in manifest.skipped] == ["b", "d", "d/notes.txt"]
    consistent(folder, tmp_path / "out", ("a", "c", "e"))
    plain = drawn(tmp_path / "plain", a=4, c=4, e=4)
    for path in plain.glob("*/*"):
        shutil.copy(folder / path.relative_to(plain), path)
    pack(plain, tmp_path / "expected", drop_empty_classes=True, **OPTIONS)
    for path in (tmp_path / "expected").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_one_class_folder_with_images_is_not_enough(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=4)
    (folder / "b").mkdir()
    for drop in (False, True):
        with pytest.raises(FolderError, match=NO_EXTENSIONS + r"remove the class folder\.$"):
            scan(folder, drop_empty_classes=drop)


def test_classes_without_training_images_in_other_splits_are_skipped(tmp_path: Path) -> None:
    counts = {"train/a": 2, "train/c": 2, "train/e": 2, "val/a": 1, "val/b": 2, "val/d": 1, "val/e": 1}
    folder = drawn(tmp_path / "data", **counts)
    (folder / "train/d").mkdir()
    (folder / "train/d/1.jpg").write_bytes(b"x")
    remedy = (
        f"add the class there, or leave it out:\n  pack({str(folder)!r}, '{tmp_path / 'out'}', drop_empty_classes=True)"
    )
    with pytest.raises(
        FolderError, match=exactly(f"{folder / 'val/b'}: is not a class in {folder / 'train'}; {remedy}")
    ):
        pack(folder, tmp_path / "out")
    (folder / "train/d/1.jpg").unlink()
    manifest = pack(folder, tmp_path / "out", drop_empty_classes=True, **OPTIONS)
    reason = "is in a class without training images"
    assert {item["path"]: item["reason"] for item in manifest.skipped} == {
        **dict.fromkeys(("val/b/000.jpg", "val/b/001.jpg", "val/d/000.jpg"), reason),
        **dict.fromkeys("bd", "is a class without training images"),
    }
    consistent(folder, tmp_path / "out", ("a", "c", "e"))


def test_good_images_of_a_lost_class_in_other_splits_are_skipped(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", **{"train/a": 3, "train/b": 2, "train/c": 3, "val/a": 2, "val/b": 4, "val/c": 2})
    for path in (folder / "train/b").iterdir():
        path.write_bytes(PAGE)
    manifest = pack(folder, tmp_path / "out", drop_empty_classes=True, **OPTIONS)
    reasons = {item["path"]: item["reason"] for item in manifest.skipped}
    assert {reasons[f"val/b/00{number}.jpg"] for number in range(4)} == {"is in a class without training images"}
    consistent(folder, tmp_path / "out", ("a", "c"))


def test_a_class_that_is_only_in_classes_txt_is_left_out(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=2, c=2)
    (folder / "classes.txt").write_text("a\nb\nc\n")
    (folder / "train.txt").write_text("a/000.jpg 0\nc/000.jpg 2\n")
    manifest = pack(folder, tmp_path / "out", drop_empty_classes=True)
    assert (manifest.classes, manifest.splits["train"].class_counts) == (("a", "c"), (1, 1))
    with ThreadPoolExecutor(1) as executor:
        pack(folder, tmp_path / "elsewhere", drop_empty_classes=True, executor=executor)
    assert checksums(tmp_path / "elsewhere") == checksums(tmp_path / "out")
    assert manifest.skipped == ({"path": "b", "reason": "is a class without training images"},)


def test_classes_that_lose_all_images_to_conflicts_are_left_out(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=3, b=1, c=3)
    shutil.copy(folder / "b/000.jpg", folder / "c/copy.jpg")
    manifest = pack(folder, tmp_path / "out", drop_empty_classes=True, on_conflict="drop", **OPTIONS)
    assert manifest.label_conflicts == (("b/000.jpg", "c/copy.jpg"),)
    consistent(folder, tmp_path / "out", ("a", "c"))


def test_the_option_must_be_a_truth_value(lost: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^drop_empty_classes must be True or False, got 'no'\.$"):
        pack(lost, tmp_path / "out", drop_empty_classes="no")  # pyright: ignore[reportArgumentType]


def test_without_empty_classes_the_option_changes_nothing_but_itself(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=5, b=4)
    pack(folder, tmp_path / "one")
    pack(folder, tmp_path / "two", drop_empty_classes=True)
    one, two = (checksums(tmp_path / name) for name in ("one", "two"))
    assert {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)} == {"manifest.json"}


@pytest.mark.parametrize("on_conflict", ["keep", "drop"])
@pytest.mark.parametrize("content", [b"", PAGE, b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(99)])
def test_the_same_file_that_is_no_image_under_two_labels_is_no_conflict(
    tmp_path: Path, content: bytes, on_conflict: Any
) -> None:
    folder = drawn(tmp_path / "data", a=4, b=4)
    shutil.copy(folder / "a/000.jpg", folder / "b/copy.jpg")
    shutil.copy(folder / "a/001.jpg", folder / "a/copy.jpg")
    bad = [f"{name}/bad{number}.jpg" for name in ("a", "b") for number in range(3)]
    for path in bad:
        (folder / path).write_bytes(content)
    manifest = pack(folder, tmp_path / "out", on_conflict=on_conflict)
    assert manifest.label_conflicts == (("a/000.jpg", "b/copy.jpg"),)
    assert manifest.duplicates == (("a/000.jpg", "b/copy.jpg"), ("a/001.jpg", "a/copy.jpg"))
    reasons = {item["path"]: item["reason"] for item in manifest.skipped}
    assert reasons.keys() == {*bad, *(["a/000.jpg", "b/copy.jpg"] if on_conflict == "drop" else [])}
    assert len({reasons[path] for path in bad}) == 1
    assert "identical" not in reasons[bad[0]]


@pytest.mark.parametrize("on_conflict", ["keep", "drop"])
def test_on_bad_fail_names_such_a_file(tmp_path: Path, on_conflict: Any) -> None:
    folder = drawn(tmp_path / "data", a=4, b=4)
    for name in ("a", "b"):
        (folder / name / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(FolderError, match=r"bad\.jpg: is plain text, named \.jpg; remove or replace it, or skip"):
        pack(folder, tmp_path / "out", on_bad="fail", on_conflict=on_conflict)
    assert not (tmp_path / "out").exists()


def test_pages_do_not_take_the_place_of_validation_images(tmp_path: Path) -> None:
    """The same page many times would be one group that stays together."""
    folder = drawn(tmp_path / "data", a=20, b=20)
    for name in ("a", "b"):
        for number in range(10):
            (folder / name / f"page{number}.jpg").write_bytes(PAGE)
    for seed in range(3):
        counts = pack(folder, tmp_path / str(seed), seed=seed, val_fraction=0.3).splits["val"].class_counts
        assert min(counts) >= 3


def test_a_link_to_content_that_git_annex_has_not_fetched_says_so(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=2, b=2)
    (folder / "a/annexed.jpg").symlink_to("../.git/annex/objects/zX/9w/SHA256E-s9--4d7a.jpg/SHA256E-s9--4d7a.jpg")
    (skipped,) = pack(folder, tmp_path / "out").skipped
    assert skipped == {"path": "a/annexed.jpg", "reason": "is a git-annex pointer (run git annex get)"}


@pytest.mark.parametrize("table", [False, True])
def test_a_class_in_val_only_is_named_like_others(
    tmp_path: Path, table: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder, labels = drawn(tmp_path / "data", **{"train/a": 2, "train/c": 2, "val/a": 1, "val/b": 2}), list[Path]()
    if table:
        rows = [f"{path.relative_to(folder)},{path.parts[-2]},{path.parts[-3]}\n" for path in folder.glob("*/*/*")]
        labels = [tmp_path / "t.csv"]
        labels[0].write_text("image,label,split\n" + "".join(rows))
    manifest = pack(folder, tmp_path / "out", drop_empty_classes=True, labels=labels)
    assert {"path": "b", "reason": "is a class without training images"} in manifest.skipped
    assert f"{tmp_path / 'out'}: left out 1 class without training images: 'b'" in caplog.messages


def test_images_without_an_extension_are_named_with_the_command_that_packs_them(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=2, b=2)
    for path in folder.glob("*/*"):
        path.rename(path.with_suffix(".bak"))
    with pytest.raises(FolderError) as caught:
        scan(folder, ignore=["none"])
    text, _, command = str(caught.value).partition("such files: ")
    assert text.startswith(f"{folder}: a/000.bak is ")
    assert text.endswith(" without an image extension; a list can name ")
    assert command.endswith(f" > train.txt) && fastflower pack {folder} --ignore none --split-by class")
    subprocess.run(["bash", "-c", command.partition(" && fastflower")[0]], check=True)
    assert len(scan(folder)) == 4


def test_a_class_emptied_by_ignore_says_so(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=2, b=2, c=2)
    what = f"{folder / 'b'}: has no images (.jpg, .png and others) besides those that are ignored; add some, or "
    with pytest.raises(
        FolderError, match=exactly(f"{what}leave out such classes:\n  pack(folder, drop_empty_classes=True)")
    ):
        scan(folder, ignore=["b/*"])


def test_a_class_lost_for_want_of_heic_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    folder, out = drawn(tmp_path / "data", a=2, b=1, c=2), tmp_path / "out"
    (folder / "b/000.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(LostClassError) as caught:
        pack(folder, out)
    assert f"\nRun pip install pillow-heif, remove {out / '.packing'}, and pack again. Or leave" in str(caught.value)
