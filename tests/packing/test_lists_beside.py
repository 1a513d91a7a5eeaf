"""A list or table of training images that is passed alone is packed with those for val and test beside it."""

import logging
from pathlib import Path
from typing import Any

import pytest
from kill_packer import checksums
from packs import drawn

from fastflower import Manifest, pack
from fastflower.errors import FolderError
from fastflower.packing.source import shards_of


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """Two classes of six images: four in train.txt, one each in val.txt and test.txt."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "fastflower")
    drawn(tmp_path / "data", rose=6, tulip=6)
    for split, numbers in (("train", range(4)), ("val", [4]), ("test", [5])):
        lines = (f"{name}/{number:03d}.jpg" for name in ("rose", "tulip") for number in numbers)
        Path(f"data/{split}.txt").write_text("\n".join(lines))
    return Path("data")


def counts(manifest: Manifest) -> dict[str, int]:
    return {name: split.samples for name, split in manifest.splits.items()}


def test_lists_beside_are_the_other_splits(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = pack(data / "train.txt", "shards")
    assert counts(manifest) == {"train": 8, "val": 2, "test": 2}
    told = "data/train.txt: is packed together with val.txt (its val split) and test.txt (its test split)"
    assert caplog.messages.count(told) == 1
    assert not any("not read" in text for text in caplog.messages)
    pack(data, "whole", labels=[data / f"{split}.txt" for split in ("train", "val", "test")])
    assert checksums(Path("shards")) == checksums(Path("whole"))


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_words_for_val_count(name: str, data: Path) -> None:
    (data / "val.txt").rename(data / f"{name}.txt")
    (data / "test.txt").unlink()
    assert counts(pack(data / "train.txt", "shards")) == {"train": 8, "val": 2}


def test_a_test_list_alone_leaves_a_val_split_to_be_drawn(data: Path) -> None:
    (data / "val.txt").unlink()
    assert counts(pack(data / "train.txt", "shards")) == {"train": 6, "val": 2}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"val_fraction": 0.5}, {"train": 4, "val": 4}),
        ({"split_by": "class"}, {"train": 6, "val": 2}),
        ({"as_split": "test"}, {"test": 8}),
        ({"folds": 2}, {"train": 8}),
    ],
)
def test_another_split_that_is_asked_for_is_taken_from_the_list_alone(
    options: dict[str, Any], expected: dict[str, int], data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert counts(pack(data / "train.txt", "shards", **options)) == expected
    (told,) = [text for text in caplog.messages if "not read" in text]
    told, _, command = told.partition("; to pack all:\n  ")
    assert told == "data/train.txt: data/val.txt and data/test.txt are not read"
    assert command == "pack('data', 'shards-2', labels=['data/train.txt', 'data/val.txt', 'data/test.txt'])"
    assert eval(command, {"pack": pack}) == Manifest.load("shards-2")
    assert counts(Manifest.load("shards-2")) == {"train": 8, "val": 2, "test": 2}


@pytest.mark.parametrize("content", ["", "no/such.jpg\n", "a word\n", "1\n2\n"])
def test_a_file_that_names_no_images_is_not_read(content: str, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    (data / "val.txt").write_text(content)
    assert counts(pack(data / "train.txt", "shards")) == {"train": 6, "val": 2}
    what = "data/val.txt is not read, because it names no images of this folder with labels"
    assert f"data/train.txt: {what}" in caplog.messages


def test_a_table_of_test_images_without_labels_is_left_out(data: Path) -> None:
    for split in ("train", "val", "test"):
        lines = [f"{path},{path[0]}" for path in (data / f"{split}.txt").read_text().split()]
        lines = [f"{line.partition(',')[0]},40,40" for line in lines] if split == "test" else lines
        header = "file,width,height" if split == "test" else "file,class"
        (data / f"{split}.csv").write_text("\n".join([header, *lines]))
    assert counts(pack(data / "train.csv", "shards")) == {"train": 8, "val": 2}


def test_what_lies_beside_decides_whether_it_is_packed_again(data: Path) -> None:
    first = shards_of(data / "train.txt", Path("packs"))
    assert counts(Manifest.load(str(first))) == {"train": 8, "val": 2, "test": 2}
    assert shards_of(data / "train.txt", Path("packs")) == first
    (data / "val.txt").write_text("rose/004.jpg")
    assert counts(Manifest.load(str(shards_of(data / "train.txt", Path("packs"))))) == {"train": 8, "val": 1, "test": 2}


def test_an_image_in_two_lists_is_refused(data: Path) -> None:
    (data / "val.txt").write_text("rose/000.jpg\ntulip/004.jpg\n")
    with pytest.raises(
        FolderError, match=r"val\.txt, line 1: 'rose/000\.jpg' is listed twice; remove one of the lines"
    ):
        pack(data / "train.txt", "shards")
