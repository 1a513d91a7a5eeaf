"""Which folders are classes and which are splits, in common layouts. Errors for ambiguous ones offer commands that work."""

import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from packs import exactly, touch

from fastflower.errors import FolderError
from fastflower.packing.folder import Folder, scan
from fastflower.packing.listing import Tables
from fastflower.packing.names import splits_named

TRAIN = ["train/a/1.jpg", "train/b/1.jpg"]
VAL = ["val/a/2.jpg", "val/b/2.jpg"]


def images(found: Folder) -> list[str]:
    return [found.path(number) for number in range(len(found))]


def readings(root: Path, *, resplit: bool = False) -> dict[str, str]:
    """Return the command for each reading in the error for a folder. Names in these tests contain no colons."""
    with pytest.raises(FolderError, match=r"This layout is ambiguous; choose one:\n") as caught:
        scan(root, resplit=resplit)
    _, *lines = str(caught.value).split("\n  ")
    return dict(line.split(": ", 1) for line in lines)


def run_command(command: str, root: Path) -> Folder:
    """Run a command with a fake `fastflower` that prints its arguments, and scan the folder that it would pack."""
    program = root.parent / "bin/fastflower"
    program.parent.mkdir(exist_ok=True)
    program.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    program.chmod(0o755)
    shell = ["bash", "-c", f"PATH={program.parent}:$PATH; {command}"]
    printed = subprocess.run(shell, capture_output=True, check=True).stdout
    verb, folder, *rest = map(os.fsdecode, printed.split(b"\0")[:-1])
    assert verb == "pack"
    ignore = [value for flag, value in pairwise(rest) if flag == "--ignore"]
    return scan(folder, resplit="--split-by" in rest, ignore=ignore)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(
            (name, "train")
            for name in ("train", "TRAIN", "Training", "training_set", "train-images", "trainset", "Train 2")
        ),
        *(
            (name, "val")
            for name in ("val", "Valid", "validation", "VAL", "dev", "val2017", "valid_data", "ValidationSet")
        ),
        *(
            (name, "test")
            for name in ("test", "Testing", "test_set", "test1", "testset", "eval", "evaluation", "TestData")
        ),
    ],
)
def test_these_names_are_splits(name: str, split: str) -> None:
    assert splits_named([name]) == {name: split}


@pytest.mark.parametrize("name", ["trains", "test tube", "flowers_train", "validity", "contest", "étest", "1"])
def test_these_names_are_classes(name: str) -> None:
    assert splits_named([name]) == {}


def test_a_common_prefix_of_split_folders_is_ignored() -> None:
    names = ["flowers_val", "flowers_train", "test tube", "train track"]
    assert splits_named(names) == {"flowers_train": "train", "flowers_val": "val"}
    assert list(splits_named(["seg_test", "seg_pred", "seg_train"])) == ["seg_train", "seg_test"]


LAID_OUT = {
    "valid": ([*TRAIN, "valid/a/2.jpg", "valid/b/2.jpg"], ("train", "val"), 4),
    "Train and Test": (["Train/a/1.jpg", "Train/b/1.jpg", "Test/a/1.jpg"], ("train", "test"), 3),
    "names with set": (["training_set/a/1.jpg", "training_set/b/1.jpg", "test_set/a/1.jpg"], ("train", "test"), 3),
    "splits in folders of the same names": (
        ["seg_train/seg_train/a/1.jpg", "seg_train/seg_train/b/1.jpg", "seg_test/seg_test/a/1.jpg"],
        ("train", "test"),
        3,
    ),
    "splits with images folders": (
        ["train/images/a/1.jpg", "train/images/b/1.jpg", "val/images/a/1.jpg"],
        ("train", "val"),
        3,
    ),
    "an empty test": ([*TRAIN, *VAL, "test/"], ("train", "val"), 4),
    "other folders without images": ([*TRAIN, *VAL, "labels/a/1.txt", "notebooks/x.py"], ("train", "val"), 4),
    "macOS metadata next to splits": ([*TRAIN, *VAL, "__MACOSX/train/a/._1.jpg"], ("train", "val"), 4),
    "macOS metadata next to classes": (["a/1.jpg", "b/1.jpg", "__MACOSX/a/._1.jpg"], (), 2),
    "images of each class by camera": ([f"{name}/{side}/1.jpg" for name in "abc" for side in ("left", "right")], (), 6),
    "each class in a folder of the same name": (["a/a/1.jpg", "b/b/1.jpg"], (), 2),
    "thumbnails added by a system": (["a/1.jpg", "a/@eaDir/1.jpg/small.jpg", "b/x/1.jpg", "b/x/@eaDir/2.jpg"], (), 2),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_an_unambiguous_layout_is_accepted(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    files, splits, count = LAID_OUT[name]
    found = scan(touch(tmp_path, *files))
    assert (found.splits, len(found)) == (splits, count)
    assert set(found.classes) == ({"a", "b", "c"} if count == 6 else {"a", "b"})
    assert len(caplog.messages) == ("camera" in name)
    assert not [path for path, _ in found.ignored if "__MACOSX" in path or "@eaDir" in path]


@pytest.mark.parametrize(
    "classes", [("0", "1"), ("1_", "2-3"), ("00", "7"), ("train", "car"), ("猫", "犬"), ("all", "red")]
)
def test_class_folders_of_splits_may_have_any_name(tmp_path: Path, classes: tuple[str, ...]) -> None:
    found = scan(touch(tmp_path, *(f"{top}/{name}/1.jpg" for top in ("train", "val", "test") for name in classes)))
    assert (found.classes, found.splits) == (tuple(sorted(classes)), ("train", "val", "test"))


def test_splits_without_any_image_are_refused(tmp_path: Path) -> None:
    rule = f"has no images in 'train', 'val'; put the images of each class into {tmp_path / 'train'}/CLASS."
    with pytest.raises(FolderError, match=exactly(f"{tmp_path}: {rule}")):
        scan(touch(tmp_path, "train/a/", "val/"))


@pytest.mark.parametrize("below", ["", "unknown/", "test/", "images/"])
@pytest.mark.parametrize("top", ["test", "to predict", "seg_pred"])
@pytest.mark.parametrize("val", [VAL, []])
def test_images_to_classify_are_skipped_with_a_warning(
    tmp_path: Path, val: list[str], top: str, below: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without any other split, the val split is drawn from train."""
    below = below.replace("test/", f"{top}/")
    root = touch(tmp_path, *TRAIN, *val, f"{top}/{below}1.jpg", f"{top}/{below}2.jpg")
    if not val and top != "test":
        touch(root, "test/1.jpg")
    found = scan(root)
    assert (found.classes, found.splits, len(found)) == (("a", "b"), ("train", "val") if val else (), 4 if val else 2)
    skipped = tuple((f"{top}/{below}{number}.jpg", "is not in a class folder") for number in (1, 2))
    assert set(found.ignored) >= set(skipped)
    what = "has no class folders, so its unlabeled images are skipped; classify them with `fastflower predict`"
    assert f"{root / top}: {what}" in caplog.messages
    assert len(caplog.messages) == len({path.partition("/")[0] for path, _ in found.ignored})


def test_folders_that_each_class_has_may_be_the_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Medical images often lie in folders of patients."""
    root = touch(
        tmp_path / "data", *(f"{name}/{kind}/{name}.jpg" for name in ("p1", "p2", "p3") for kind in ("ill", "well"))
    )
    assert scan(root).classes == ("p1", "p2", "p3")
    said, command = caplog.messages[0].split("; if these are the classes: ")
    assert said == f"{root}: each class has the folders 'ill', 'well'"
    labels, _, rest = command.partition(" && fastflower pack ")
    subprocess.run(["bash", "-c", labels], cwd=tmp_path, check=True)
    assert rest == f"{root} --labels labels.csv --out shards-2"
    assert scan(root, Tables([tmp_path / "labels.csv"])).classes == ("ill", "well")


def test_images_named_like_masks_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scan(touch(tmp_path, "a/1.png", "a/1_mask.png", "b/1.png", "b/1_mask.png", "b/1_mask_1.png"))
    assert caplog.messages == [
        f"{tmp_path}: 3 images have names like masks; to leave them out:\n  pack(folder, 'shards-2', ignore=['*_mask*'])"
    ]


@pytest.mark.parametrize(
    "names", [("part_1", "part_2"), ("HAM_images_part_1", "HAM_images_part_2"), ("fold1", "fold2")]
)
def test_parts_of_one_data_set_are_not_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    """Skin lesions (HAM10000) come so, with a table of labels."""
    root = touch(tmp_path / "data", *(f"{name}/{number}.jpg" for number, name in enumerate(names)))
    table, classes = readings(root).values()
    assert table.endswith(f"or pass a table: fastflower pack {root} --labels FILE")
    assert run_command(classes, root).classes == names


AMBIGUOUS = {
    "a flat val": ([*TRAIN, "val/1.jpg"], [(("a", "b"), (), 2), None]),
    "a flat val and test": ([*TRAIN, "val/1.jpg", "test/1.jpg"], [(("a", "b"), (), 2), None]),
    "a flat val, a test": (
        [*TRAIN, "val/1.jpg", "test/a/1.jpg"],
        [(("a", "b"), (), 2), (("a", "b"), ("train", "test"), 3), None],
    ),
    "tiny-imagenet": (
        ["train/a/images/1.jpg", "train/b/images/1.jpg", "val/images/1.jpg", "test/images/1.jpg"],
        [(("a", "b"), (), 2), None],
    ),
    "an empty val": ([*TRAIN, "val/"], [(("a", "b"), (), 2)]),
    "flat splits": (["train/1.jpg", "val/1.jpg"], [None, (("train", "val"), ("train",), 2)]),
    "no train": (
        [*VAL, "test/a/1.jpg", "test/b/1.jpg"],
        [(("a", "b"), (), 2), (("a", "b"), (), 2), None, (("test", "val"), ("train",), 4)],
    ),
    "images next to splits": (
        [*TRAIN, *VAL, "images/1.jpg"],
        [(("a", "b"), ("train", "val"), 4), *2 * [(("a", "b"), (), 2)], (("images", "train", "val"), ("train",), 5)],
    ),
    "a second copy of the splits": (
        [*TRAIN, *VAL, *(f"xray/{name}" for name in (*TRAIN, *VAL))],
        [
            (("a", "b"), ("train", "val"), 4),
            *2 * [(("a", "b"), (), 2)],
            (("a", "b"), ("train", "val"), 4),
            (("train", "val", "xray"), ("train",), 8),
        ],
    ),
    "test next to classes": (
        ["a/1.jpg", "b b/1.jpg", "test/1.jpg"],
        [(("a", "b b"), (), 2), (("a", "b b", "test"), ("train",), 3)],
    ),
    "splits in a generic folder, next to another folder": (
        [*(f"images/{name}" for name in (*TRAIN, *VAL)), "parts/1.jpg"],
        [(("a", "b"), ("train", "val"), 4), (("images", "parts"), ("train",), 5)],
    ),
    "valid and invalid": (["valid/1.jpg", "invalid/1.jpg"], [(("invalid", "valid"), ("train",), 2)]),
    "a class named train": (
        ["train/1.jpg", "car/1.jpg", "bus's/1.jpg"],
        [(("bus's", "car"), (), 2), (("bus's", "car", "train"), ("train",), 3)],
    ),
    "a second copy of the classes": (
        [f"{top}{name}/1.jpg" for top in ("", "flowers/") for name in ("daisy", "rose", "tulip")],
        [*2 * [(("daisy", "rose", "tulip"), (), 3)], (("daisy", "flowers", "rose", "tulip"), ("train",), 6)],
    ),
    "the same classes in each folder": (
        [f"{top}/{name}/1.jpg" for top in ("color", "gray scale") for name in "abc"],
        [*2 * [(("a", "b", "c"), (), 3)], (("color", "gray scale"), ("train",), 6)],
    ),
    "folds": (
        [f"fold_{fold}/{name}/1.jpg" for fold in range(1, 4) for name in "ab"],
        [*3 * [(("a", "b"), (), 2)], (("fold_1", "fold_2", "fold_3"), ("train",), 6)],
    ),
    "numbered folds": (
        [f"{fold}/{name}/1.jpg" for fold in range(1, 4) for name in "ab"],
        [*3 * [(("a", "b"), (), 2)], (("1", "2", "3"), ("train",), 6)],
    ),
    "a second copy of the classes, in a wrapper": (
        [f"{top}/{name}/1.jpg" for top in ("data/natural", "natural") for name in "ab"],
        [*2 * [(("a", "b"), (), 2)], (("data", "natural"), ("train",), 4)],
    ),
    "splits in a folder, next to the classes": (
        [f"{top}/{name}/1.jpg" for top in ("cast/cast/train", "cast/cast/test", "large/large") for name in "ab"],
        [(("a", "b"), ("train", "test"), 4), (("cast", "large"), (), 6)],
    ),
    "images and masks": (
        ["images/1.jpg", "annotations/masks/1.png"],
        [None, (("annotations", "images"), ("train",), 2)],
    ),
    "images of classes and their parts": (
        ["images/a/1.jpg", "images/b/1.jpg", "parts/1.jpg"],
        [(("a", "b"), (), 2), None, (("images", "parts"), ("train",), 3)],
    ),
    "classes and unlabeled images": (
        ["a/1.jpg", "b/1.jpg", "unlabeled/1.jpg"],
        [(("a", "b"), (), 2), None, (("a", "b", "unlabeled"), ("train",), 3)],
    ),
    "images and masks in splits": (
        [f"{top}/{name}/1.jpg" for top in ("train", "val") for name in ("images", "masks")],
        [None, (("images", "masks"), ("train",), 2)],
    ),
    "images and labels in splits": (
        [f"{top}/{name}" for top in ("train", "val") for name in ("images/1.jpg", "labels/1.txt")],
        [None, (("images", "labels"), ("train",), 2)],
    ),
    "names that are not UTF-8": (
        [*TRAIN, *VAL, "caf\udce9 'n\\o'/1.jpg"],
        [
            (("a", "b"), ("train", "val"), 4),
            *2 * [(("a", "b"), (), 2)],
            (("caf\udce9 'n\\o'", "train", "val"), ("train",), 5),
        ],
    ),
    "images and masks of each class": (
        [f"{name}/{kind}/1.png" for name in ("a", "b b", "c") for kind in ("images", "masks")],
        [(("a", "b b", "c"), ("train",), 3), (("a", "b b", "c"), ("train",), 6)],
    ),
    "masks of the splits": (
        [f"{split}_{kind}/{name}/1.png" for split in ("train", "val") for kind in ("images", "masks") for name in "ab"],
        [
            *2 * [(("a", "b"), ("train", "val"), 4)],
            (("train_images", "train_masks", "val_images", "val_masks"), ("train",), 8),
        ],
    ),
    "splits with classes and unlabeled images": (
        [*TRAIN, *VAL, "train/unlabeled/1.jpg", "val/unlabeled/1.jpg"],
        [(("a", "b"), ("train", "val"), 4), None, (("a", "b", "unlabeled"), ("train",), 3)],
    ),
    "other splits next to train": (
        [f"{top}/{name}/1.jpg" for top in ("train", "public", "private") for name in "ab"],
        [*3 * [(("a", "b"), (), 2)], (("private", "public", "train"), ("train",), 6)],
    ),
    "test classes that are missing in train": (
        ["train/good/1.jpg", "test/good/1.jpg", "test/bad/1.jpg", "masks/bad/1.jpg"],
        [(("bad", "good"), (), 2), (("masks", "test", "train"), ("train",), 4)],
    ),
    "two folders for one split": (
        [*TRAIN, *VAL, "valid/a/3.jpg"],
        [
            (("a", "b"), ("train", "val"), 4),
            (("a", "b"), ("train", "val"), 3),
            (("train", "val", "valid"), ("train",), 5),
        ],
    ),
    "classes in the names of splits": (
        [f"{name}/1.jpg" for name in ("trainA", "trainB", "testA", "test B")],
        [(("a", "b"), ("train", "test"), 4), (("test B", "testA", "trainA", "trainB"), ("train",), 4)],
    ),
    "classes before the names of splits": (
        [f"{name}/1.jpg" for name in ("cat's_train", "dogs_train", "cat's_val", "dogs_val")],
        [
            (("cat-s", "dogs"), ("train", "val"), 4),
            (("cat's_train", "cat's_val", "dogs_train", "dogs_val"), ("train",), 4),
        ],
    ),
    "splits inside classes": (
        ["rose/train/1.jpg", "rose/test/1.jpg", "red rose/train/1.jpg", "red rose/test/2.jpg"],
        [(("red rose", "rose"), ("train", "test"), 4), (("red rose", "rose"), (), 4)],
    ),
}


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_ambiguous_layout_lists_its_readings_and_each_command_works(tmp_path: Path, name: str, number: int) -> None:
    files, outcomes = AMBIGUOUS[name]
    if number >= len(outcomes):
        return
    root = touch(tmp_path / "my data", *files)
    offered = readings(root)
    assert len(offered) == len(outcomes)
    command, outcome = list(offered.values())[number], outcomes[number]
    if outcome is None:
        assert re.match(r"put them into .*/CLASS, or pass a table: fastflower pack .* --labels FILE$", command)
    else:
        found = run_command(command, root)
        assert (found.classes, found.splits, len(found)) == outcome


def test_the_text_of_an_ambiguous_layout(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "images/1.jpg")
    pack = f"fastflower pack {tmp_path}"
    lines = [
        f"{tmp_path}: has folders named after splits ('train', 'val') next to other folders of images ('images'). "
        f"This layout is ambiguous; choose one:",
        f"to use 'train', 'val' as splits and skip 'images': {pack} --ignore /images",
        f"to use the folders in 'train' as classes: {pack}/train",
        f"to use 'train', 'val', 'images' as classes: (cd {tmp_path} && find -L train val images -type f "
        f"-not -path '*/.*' -not -path '*/@eaDir/*' > train.txt) && {pack} --split-by class",
    ]
    with pytest.raises(FolderError, match=exactly("\n  ".join(lines))):
        scan(root)


def test_the_text_for_a_generic_folder_and_for_a_duplicate_split(tmp_path: Path) -> None:
    for root, what, names in (
        (
            tmp_path / "a",
            "has other folders next to 'images', which may hold images of any class.",
            ["images/1.jpg", "a/1.jpg"],
        ),
        (
            tmp_path / "b",
            "has more than one folder for the same split ('val', 'valid').",
            [*TRAIN, *VAL, "valid/a/1.jpg"],
        ),
    ):
        with pytest.raises(
            FolderError, match="^" + re.escape(f"{root}: {what} This layout is ambiguous; choose one:\n")
        ):
            scan(touch(root, *names))


def test_splits_inside_classes_are_allowed_for_a_new_split(tmp_path: Path) -> None:
    found = scan(touch(tmp_path, "a/train/1.jpg", "a/test/2.jpg", "b/1.jpg"), resplit=True)
    assert images(found) == ["a/test/2.jpg", "a/train/1.jpg", "b/1.jpg"]


@pytest.mark.parametrize(
    ("files", "deepest"),
    [
        (["archive/data/train/a/1.jpg", "archive/data/train/b/1.jpg", "archive/data/test/a/1.jpg"], "archive/data"),
        (["flowers/flowers/a/1.jpg", "flowers/flowers/b/1.jpg"], "flowers/flowers"),
        (["images/a/1.jpg", "images/b/1.jpg", "labels/a/1.txt"], "images"),
        (["images/train/1.jpg", "images/val/1.jpg", "labels/train/1.txt", "labels/val/1.txt"], "images"),
        (["flowers/a/1.jpg", "flowers/b/1.jpg", "__MACOSX/flowers/a/._1.jpg"], "flowers"),
        (["train/a/1.jpg", "train/b/1.jpg"], "train"),
    ],
)
def test_the_folder_inside_wrappers_is_named(tmp_path: Path, files: list[str], deepest: str) -> None:
    what = f"has one class, {files[0].partition('/')[0]!r}; a classifier needs at least two class folders."
    with pytest.raises(
        FolderError,
        match=exactly(f"{tmp_path}: {what} If they are in {tmp_path / deepest}, pass that folder."),
    ):
        scan(touch(tmp_path, *files))
