"""Lines of lists in detail: paths with spaces, labels as positions, missing images, errors with file and line."""

import os
import re
from pathlib import Path

import pytest
from listed import rows_of, write
from packs import touch

from fastflower.errors import FolderError
from fastflower.packing.folder import scan

NOT_UTF8 = os.fsdecode(b"\xff\xfe.jpg")


def refused(root: Path, text: str) -> None:
    with pytest.raises(FolderError, match=f"^{re.escape(text)}$"):
        scan(root)


@pytest.mark.parametrize("place", ["", "meta/"])
@pytest.mark.parametrize("classes", ["classes.txt", "meta/classes.txt"])
def test_lists_may_be_in_meta_or_in_the_root(tmp_path: Path, place: str, classes: str) -> None:
    """Labels are positions in classes.txt, which need not be sorted. The last word of a line is the label."""
    train, val = "y 1 .jpg 1\r\n\r\n \t \nx.jpg 0 \nz.jpg 2 00001", "a/é.jpg \t 1\n" + NOT_UTF8 + " 0\n"
    lists = {f"{place}train.txt": train, f"{place}val.txt": val, classes: "second name \r\n\r\nfirst"}
    found = scan(touch(write(tmp_path, lists), "x.jpg", f"train/{NOT_UTF8}", f"val/{NOT_UTF8}", "a/é.jpg"))
    assert (found.classes, found.splits) == (("second name", "first"), ("train", "val"))
    expected = [("y 1 .jpg", 1, 0), ("x.jpg", 0, 0), ("z.jpg 2", 1, 0), ("a/é.jpg", 1, 1), (f"val/{NOT_UTF8}", 0, 1)]
    assert rows_of(found) == expected
    assert found.files["size"].tolist() == [0, 1, 0, 1, 1]  # missing files are kept, so that they are reported


@pytest.mark.parametrize("labels", [("", ""), (" 0", " 1")])
def test_without_classes_txt_the_class_folders_in_train_txt_are_the_classes(
    tmp_path: Path, labels: tuple[str, str]
) -> None:
    a, b = labels
    train, long = f"b/x y.jpg{b}\na/1 2.jpg{a}\r\n", "b/" + "x" * 300 + ".jpg"
    touch(tmp_path, "b/0.jpg", "a/1 2.jpg", "test/b/0.jpg")  # next to it, a name of more than 255 bytes is an error
    found = scan(write(tmp_path, {"train.txt": train, "test.txt": f"{long}{b}\nb/c/1.jpg{b}"}))
    assert (found.classes, found.splits) == (("a", "b"), ("train", "test"))
    assert rows_of(found) == [("b/x y.jpg", 1, 0), ("a/1 2.jpg", 0, 0), (long, 1, 1), ("b/c/1.jpg", 1, 1)]


AB = "a/1.jpg 0\nb/1.jpg 1\n"
NO_LABEL = "has no label and is not in a class folder; write 'PATH LABEL'."
TOO_LARGE = "label 2 must be less than the number of classes (2); correct it, or list every class in classes.txt."
POSITION = "among the sorted class folders; correct it, or add classes.txt."
LISTS = [
    ({"train.txt": AB + "3.jpg", "classes.txt": "a\nb"}, f"train.txt, line 3: '3.jpg' {NO_LABEL}"),
    (
        {"train.txt": AB + "c.jpg -1", "classes.txt": "a\nb"},
        "train.txt, line 3: label '-1' is not one of the classes ('a', 'b'); correct it, or add the class to classes.txt.",
    ),
    (
        {"train.txt": AB, "val.txt": "\nc/1.jpg"},
        "val.txt, line 2: class 'c' has no training image; correct the label, list an image for training, or leave it out:"
        "\n  pack(folder, drop_empty_classes=True)",
    ),
    ({"train.txt": AB + "\na/2 2"}, f"train.txt, line 4: {TOO_LARGE}"),
    ({"train.txt": AB, "val.txt": "b/2.jpg 0"}, f"val.txt, line 1: label 0 is not the position of 'b' {POSITION}"),
    ({"train.txt": AB + "a/2.jpg 1"}, f"train.txt, line 3: label 1 is not the position of 'a' {POSITION}"),
    ({"train.txt": AB + "a 0", "classes.txt": "a\nb"}, "train.txt, line 3: 'a' is a folder; list its files."),
    ({"train.txt": AB, "val.txt": "b 1"}, "val.txt, line 1: 'val/b' is a folder; list its files."),
    (
        {"train.txt": AB + "a/1.jpg 1", "classes.txt": "a\nb"},
        "train.txt, line 3: 'a/1.jpg' is listed twice; remove one of the lines.",
    ),
    ({"train.txt": AB, "val.txt": AB}, "val.txt, line 1: 'a/1.jpg' is listed twice; remove one of the lines."),
    ({"train.txt": "\n \r\n", "val.txt": ""}, "train.txt: lists no images; write one line 'PATH LABEL' per image."),
    ({"train.txt": AB + "a/\0.jpg"}, "train.txt, line 3: contains a null byte; save the file as UTF-8."),
    (
        {"train.txt": AB, "meta/classes.txt": "a\nb\n\na "},
        "meta/classes.txt: lists a class twice; write one line per class, in label order.",
    ),
]


@pytest.mark.parametrize(("lists", "text"), LISTS)
def test_an_error_in_a_list_gives_file_and_line(tmp_path: Path, lists: dict[str, str], text: str) -> None:
    refused(write(touch(tmp_path, "a/1.jpg", "b/1.jpg", "val/b/1.jpg"), lists), f"{tmp_path}/{text}")
