"""A test set in a folder of its own: FOLDER/test alone, `as_split`, a table as the folder; and the space that a pack takes."""

import logging
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from kill_packer import checksums
from packs import draw_image, drawn, exactly

from fastflower import Manifest, pack
from fastflower.errors import ArgumentError, FolderError
from fastflower.shards.verification import verify


def counts(manifest: Manifest) -> dict[str, dict[str, int]]:
    return {
        name: dict(zip(manifest.classes, split.class_counts, strict=True)) for name, split in manifest.splits.items()
    }


@pytest.mark.parametrize(("top", "split"), [("test", "test"), ("Validation", "val"), ("test/images", "test")])
def test_a_split_other_than_train_may_be_alone(
    top: str, split: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawn(tmp_path / "data" / top, rose=3, tulip=4)
    manifest = pack(tmp_path / "data", tmp_path / "out")
    assert counts(manifest) == {split: {"rose": 3, "tulip": 4}}
    assert verify(tmp_path / "out") == []
    said = f"{tmp_path / 'out'}: has only a {split} split: evaluate on it; training needs a train split"
    assert caplog.messages == [said]


def test_as_split_puts_all_images_of_a_folder_into_one_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = pack(drawn(tmp_path / "data", rose=3), tmp_path / "out", as_split="test")
    assert (counts(manifest), manifest.options["as_split"]) == ({"test": {"rose": 3}}, "test")
    assert (caplog.messages, verify(tmp_path / "out")) == ([], [])


def test_as_split_accepts_a_folder_that_has_only_this_split(tmp_path: Path) -> None:
    drawn(tmp_path / "data" / "test", rose=3)
    assert counts(pack(tmp_path / "data", tmp_path / "out", as_split="test")) == {"test": {"rose": 3}}


def test_a_test_set_keeps_a_class_whose_images_are_damaged(tmp_path: Path) -> None:
    drawn(tmp_path / "data", rose=2, tulip=1)
    (tmp_path / "data/tulip/000.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    assert counts(pack(tmp_path / "data", tmp_path / "out", as_split="test")) == {"test": {"rose": 2, "tulip": 0}}


def test_a_test_set_needs_an_image_that_can_be_read(tmp_path: Path) -> None:
    drawn(tmp_path / "data", rose=1)
    (tmp_path / "data/rose/000.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    with pytest.raises(FolderError, match=r"^class 'rose': none of its 1 images can be read:"):
        pack(tmp_path / "data", tmp_path / "out", as_split="test")
    assert not (tmp_path / "out").exists()


def test_a_wrapper_is_no_class_of_a_test_set(tmp_path: Path) -> None:
    drawn(tmp_path / "data/test/flowers", rose=2, tulip=2)
    what = (
        f"{tmp_path / 'data/test'}: has one class, 'flowers'; a classifier needs at least two class folders. If they "
    )
    what += f"are in {tmp_path / 'data/test/flowers'}, pass that folder."
    with pytest.raises(FolderError, match=exactly(what)):
        pack(tmp_path / "data", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"as_split": "train"}, "as_split must be one of val, test, got 'train'."),
        (
            {"as_split": "test", "folds": 2},
            "as_split must be omitted with split_by, val_fraction, test_fraction and folds, which divide the images, "
            "got 'test'.",
        ),
        (
            {"as_split": "val", "split": "x.csv"},
            "as_split must be omitted with split, which divides the images, got 'val'.",
        ),
        (
            {"as_split": "val"},
            "as_split must be omitted, because ROOT has its own splits (test), got 'val'.",
        ),
        (
            {"val_fraction": 0.5},
            "val_fraction must be omitted, because ROOT has no images for training, only a test split, got 0.5.",
        ),
        (
            {"folds": 2},
            "folds must be omitted, because ROOT has no images for training, only a test split, got 2.",
        ),
    ],
)
def test_options_that_a_test_set_contradicts_are_refused(options: dict[str, Any], rule: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    drawn(root / "test", rose=3, tulip=4)
    with pytest.raises(ArgumentError, match=exactly(rule.replace("ROOT", str(root)))):
        pack(root, tmp_path / "out", **options)


@pytest.mark.parametrize("name", ["train.csv", "train.txt"])
def test_a_table_is_the_folder_with_its_labels(name: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(6):
        draw_image(number).save(root / f"{number}.jpg")
    (root / name).write_text("".join(f"{number}.jpg,{'ab'[number % 2]}\n" for number in range(6)))
    pack(root / name, tmp_path / "one")
    pack(root, tmp_path / "other", labels=root / name)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "other")
    rule = f"labels must be omitted, because {root / name} is a table itself, got 'x.csv'."
    with pytest.raises(ArgumentError, match=exactly(rule)):
        pack(root / name, tmp_path / "third", labels="x.csv")


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(count))


def test_too_little_space_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = drawn(tmp_path / "data", rose=3, tulip=3)
    kept = sum(path.stat().st_size for path in root.rglob("*.jpg")) + 6 * 2560
    free(monkeypatch, kept - 1)
    what = f"{tmp_path}: has {kept / 1000:.1f} kB free, but packing {root} takes {kept / 1000:.1f} kB; free up space, "
    with pytest.raises(FolderError, match=exactly(f"{what}or choose another folder as out (--out).")):
        pack(root, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    free(monkeypatch, kept)
    pack(root, tmp_path / "new" / "out")


@pytest.mark.parametrize("options", [{}, {"quality": 50}])
def test_only_files_that_are_kept_must_fit(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = drawn(tmp_path / "data", rose=2, tulip=2)
    for path in root.rglob("*.jpg"):
        (path if options else path.with_suffix(".bmp")).write_bytes(path.read_bytes() + bytes(10**5))
        if not options:
            path.unlink()
    free(monkeypatch, 4 * 2560)
    pack(root, tmp_path / "out", **options)


def test_the_space_of_an_archive_is_told_by_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    archive = shutil.make_archive(str(tmp_path / "data"), "zip", drawn(tmp_path / "data", rose=2, tulip=2))
    caplog.set_level(logging.INFO, "fastflower")
    pack(archive, tmp_path / "out")
    assert caplog.messages[0].startswith(f"{archive}: packing 4 images into {tmp_path / 'out'}, which takes up to ")


def test_the_least_and_most_space_hold_the_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The estimate for JPEG files is within a tenth of what they take, and never above it."""
    root = tmp_path / "data"
    for label in ("rose", "tulip"):
        (root / label).mkdir(parents=True)
        for number in range(20):
            draw_image(number + len(label), 100).save(root / label / f"{number}.jpg", quality=95)
    caplog.set_level(logging.INFO, "fastflower")
    pack(root, tmp_path / "out", val_fraction=0.0)
    taken = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    estimated = sum(path.stat().st_size for path in root.rglob("*.jpg")) + 40 * 2560
    assert 0.9 * taken < estimated <= taken
    said = f"{root}: packing 40 images into {tmp_path / 'out'}, which takes up to {estimated / 1000:.1f} kB of the "
    assert caplog.messages[0].startswith(said)
