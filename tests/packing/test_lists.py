"""Lists: every spelling that has one meaning is read; the others are refused with file and line."""

import logging
from pathlib import Path

import pytest
from listed import AB, FLAT, labeled, tables, write
from packs import exactly, touch

from fastflower.errors import FolderError
from fastflower.packing.folder import scan
from fastflower.packing.listing import Tables

NESTED = ["a/1.jpg", "b/2.jpg"]
IN_AB = {"a/1.jpg": "a", "b/2.jpg": "b"}

LISTS = {
    "labels from 1": (NESTED, "a/1.jpg 1\nb/2.jpg 2", "a\nb", IN_AB),
    "labels from 1 without classes.txt": (NESTED, "a/1.jpg 1\nb/2.jpg 2", None, IN_AB),
    "names as labels": (FLAT, "1.jpg a\n2.jpg b", None, AB),
    "names of several words": (FLAT, "1.jpg red rose\n2.jpg\ttulip", None, {"1.jpg": "red rose", "2.jpg": "tulip"}),
    "names that classes.txt orders": (FLAT, "1.jpg a\n2.jpg b", "b\na", AB),
    "numbers alone": (FLAT, "1.jpg 10\n2.jpg 9", None, {"1.jpg": "10", "2.jpg": "9"}),
    "numbers and classes.txt": (FLAT, "1.jpg 0\n2.jpg 1", "a\nb", AB),
    "numbered classes": (FLAT, "1.jpg 0\n2.jpg 1", "0 a\n1 b", AB),
    "numbered classes from 1": (FLAT, "1.jpg 1\n2.jpg 2", "1 a\n2 b", AB),
    "no extension": (NESTED, "a/1\nb/2", None, IN_AB),
    "no extension, and names that end in numbers": (
        FLAT,
        "1 Cessna 172\n2 707-320",
        None,
        {"1.jpg": "Cessna 172", "2.jpg": "707-320"},
    ),
    "no extension, in a folder of images": (
        ["images/a/1.jpg", "images/b/2.jpg"],
        "a/1\nb/2",
        None,
        {"images/a/1.jpg": "a", "images/b/2.jpg": "b"},
    ),
    "extension in another case": (["a/1.JPG", "b/2.jpg"], "a/1.jpg\nb/2.jpg", None, {"a/1.JPG": "a", "b/2.jpg": "b"}),
    "absolute paths": (NESTED, "{root}/a/1.jpg 0\n{root}/b/2.jpg 1", None, IN_AB),
    "absolute paths of another machine": (NESTED, "/home/me/data/a/1.jpg 0\n/home/me/data/b/2.jpg 1", None, IN_AB),
    "absolute paths of a flat folder": (FLAT, "/home/me/data/1.jpg a\n/home/me/data/2.jpg b", None, AB),
    "paths from the folder's parent": (NESTED, "data/a/1.jpg\ndata/b/2.jpg", None, IN_AB),
    "paths that begin with ./": (NESTED, "./a/1.jpg\n./b/2.jpg", None, IN_AB),
    "backslashes": (NESTED, "a\\1.jpg 0\nb\\2.jpg 1", None, IN_AB),
    "a drive": (NESTED, "C:\\data\\a\\1.jpg 0\nC:\\data\\b\\2.jpg 1", None, IN_AB),
    "UTF-16": (NESTED, "a/1.jpg 0\nb/2.jpg 1".encode("utf-16"), None, IN_AB),
    "UTF-16 without a mark": (NESTED, "a/1.jpg 0\nb/2.jpg 1".encode("utf-16-le"), None, IN_AB),
    "CRLF and a mark": (NESTED, "a/1.jpg 0\r\nb/2.jpg 1\r\n".encode("utf-8-sig"), None, IN_AB),
    "a header": (FLAT, "path label\n1.jpg a\n2.jpg b", None, AB),
    "labels first": (FLAT, "0 1.jpg\n1 2.jpg", "a\nb", AB),
    "commas": (FLAT, "1.jpg,a\n2.jpg, b", None, AB),
    "commas and a header": (FLAT, "filename,class\n1.jpg,a\n2.jpg,b", None, AB),
    "tabs": (FLAT, "1.jpg\t0\n2.jpg\t1", "a\nb", AB),
    "the split's folder in the path": (
        ["train/a/1.jpg", "train/b/2.jpg"],
        "train/a/1.jpg\ntrain/b/2.jpg",
        None,
        {"train/a/1.jpg": "a", "train/b/2.jpg": "b"},
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_read_in_any_spelling_that_has_one_meaning(tmp_path: Path, name: str) -> None:
    files, text, classes, expected = LISTS[name]
    root = touch(tmp_path / "data", *files)
    text = text.replace("{root}", str(root)) if isinstance(text, str) else text
    write(root, {"train.txt": text} | ({} if classes is None else {"meta/classes.txt": classes}))
    found = scan(root)
    assert labeled(found) == {path: f"{label} train" for path, label in expected.items()}
    ordered = "classes.txt" not in name and not name.startswith("number")
    assert found.classes == (tuple(sorted(set(expected.values()))) if ordered else found.classes)
    if name == "names that classes.txt orders":
        assert found.classes == ("b", "a")
    if name == "numbers alone":
        assert found.classes == ("9", "10")


def test_food_101_is_read_as_it_lies(tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"images/{name}/{number}.jpg" for name in ("apple_pie", "waffles") for number in (11, 22)))
    lists = {f"meta/{split}.txt": f"apple_pie/{n}\nwaffles/{n}\n" for split, n in (("train", 11), ("test", 22))}
    found = scan(
        write(root, {**lists, "meta/classes.txt": "apple_pie\nwaffles\n", "meta/labels.txt": "Apple pie\nWaffles"})
    )
    assert labeled(found) == {
        f"images/{name}/{number}.jpg": f"{name} {split}"
        for name in ("apple_pie", "waffles")
        for split, number in (("train", 11), ("test", 22))
    }


REFUSED = {
    "a label that is no class": (
        FLAT,
        "1.jpg a\n2.jpg c",
        "a\nb",
        "train.txt, line 2: label 'c' is not one of the classes ('a', 'b'); correct it, or add the class to classes.txt.",
    ),
    "a number that is no position": (
        FLAT,
        "1.jpg 0\n2.jpg 7",
        "a\nb",
        "train.txt, line 2: label 7 must be less than the number of classes (2); correct it, or list every class in classes.txt.",
    ),
    "no label": (
        ["1.jpg", "2.jpg"],
        "1.jpg\n2.jpg",
        None,
        "train.txt, line 1: '1.jpg' has no label and is not in a class folder; write 'PATH LABEL'.",
    ),
    "a name that fits two images": (
        ["x/1.jpg", "y/1.jpg"],
        "1.jpg a",
        None,
        "train.txt, line 1: '1.jpg' matches more than one image ('x/1.jpg', 'y/1.jpg'); write its path relative to {root}.",
    ),
    "half a character": (
        FLAT,
        "1.jpg a\n2.jpg b".encode("utf-16")[:-1],
        None,
        "train.txt: is not valid UTF-16; save it as UTF-8.",
    ),
    "a note": (
        ["a/1.jpg", "b/2.jpg"],
        "I trained this on Monday.\nIt took 20 minutes.",
        None,
        "train.txt: none of its 2 lines names an image in {root} (train.txt, line 1: 'I trained this on Monday.'); correct "
        "the paths, or pass the folder that they start from; if {root}/train.txt is not a list of images, rename it.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_list_without_one_meaning_is_refused(tmp_path: Path, name: str) -> None:
    files, text, classes, message = REFUSED[name]
    root = touch(tmp_path / "data", *files)
    write(root, {"train.txt": text} | ({} if classes is None else {"classes.txt": classes}))
    with pytest.raises(FolderError, match=exactly(f"{root}/{message.replace('{root}', str(root))}")):
        scan(root)


def test_a_val_list_without_class_folders_uses_the_numbers_of_train(tmp_path: Path) -> None:
    """OpenMMLab and Caffe list ImageNet so."""
    root = touch(tmp_path, "train/n1/1.jpg", "train/n2/1.jpg", "val/v1.jpg", "val/v2.jpg")
    write(root, {"meta/train.txt": "n1/1.jpg 0\nn2/1.jpg 1\n", "meta/val.txt": "v1.jpg 1\nv2.jpg 0\n"})
    expected = {"train/n1/1.jpg": "n1 train", "train/n2/1.jpg": "n2 train"}
    assert labeled(scan(root)) == {**expected, "val/v1.jpg": "n2 val", "val/v2.jpg": "n1 val"}


def test_images_that_no_list_names_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(touch(tmp_path, *NESTED, "c/1.jpg", "a/9.jpg"), {"train.txt": "a/1.jpg\nb/2.jpg\n"})
    assert len(scan(root)) == 2
    assert caplog.messages == [f"2 images in {root} are not in {root}/train.txt and are skipped"]


def test_a_missing_image_with_a_name_as_label_makes_no_class(tmp_path: Path) -> None:
    root = write(touch(tmp_path, *FLAT), {"train.txt": "1.jpg a\n2.jpg b\nx/9.jpg a\n"})
    assert labeled(scan(root)) == {"1.jpg": "a train", "2.jpg": "b train", "x/9.jpg": "a train"}


def test_many_images_of_one_name_are_found_quickly(tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"images/v{number}/frame.jpg" for number in range(300)))
    write(
        root, {"train.txt": "".join(f"v{number}/frame {number % 2}\n" for number in range(300)), "classes.txt": "a\nb"}
    )
    assert len(scan(root)) == 300


def test_missing_images_are_named_before_anything_is_decoded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(
        touch(tmp_path, *NESTED), {"train.txt": "a/1.jpg 0\nb/2.jpg 1\n" + "".join(f"b/{n} 1\n" for n in "6789")}
    )
    assert len(scan(root)) == 6
    names = "; ".join(f"train.txt, line {line}: 'b/{line + 3}'" for line in (3, 4, 5))
    assert caplog.messages == [f"{root}/train.txt: 4 of 6 listed images do not exist: {names}; ..."]


def test_an_image_of_another_split_is_not_meant(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = touch(tmp_path, "train/1.jpg", "train/2.jpg", "train/7.jpg", "val/3.jpg")
    write(root, {"train.txt": "1.jpg a\n2.jpg b\n", "val.txt": "3.jpg a\n7.jpg b\n"})
    assert "train/7.jpg" not in labeled(scan(root))
    assert caplog.messages[0].endswith("1 of 4 listed images do not exist: val.txt, line 2: '7.jpg'")


def test_a_line_without_a_path_is_refused(tmp_path: Path) -> None:
    root = write(touch(tmp_path, *FLAT), {"t.jsonl": '{"image": "1.jpg", "label": "a"}\n{"label": "b"}\n'})
    with pytest.raises(FolderError, match=exactly(f"{root}/t.jsonl, line 2: has no path; add it, or remove the line.")):
        scan(root, tables(root, "t.jsonl"))


@pytest.mark.parametrize("name", ["t.txt", "t.csv"])
def test_a_missing_image_in_the_first_line_is_not_taken_for_a_header(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = "1 0\n2 1\n3 0\n" if name == "t.txt" else "1,0\n2,1\n3,0\n"
    root = write(touch(tmp_path, "2.jpg", "3.jpg"), {name: text})
    assert labeled(scan(root, tables(root, name)))["2.jpg"] == "1"
    assert caplog.messages == [f"{root}/{name}: 1 of 3 listed images do not exist: {name}, line 1: '1'"]


def test_the_same_lines_give_the_same_classes_in_the_folder_and_as_tables(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastflower")
    names = [f"{name}/{number}.jpg" for name in ("daisy", "rose", "tulip") for number in range(3)]
    lines = {"train.txt": "", "val.txt": ""}
    for name in names:
        label = ("daisy", "rose", "tulip").index(name.partition("/")[0])
        lines["val.txt" if "/2" in name else "train.txt"] += f"{name} {label}\n"
    outside = write(tmp_path / "lists", lines)
    found = scan(touch(tmp_path / "data", *names), Tables([outside / "train.txt", outside / "val.txt"]))
    what = "the labels are numbers, named by the folders of their images: 0 is 'daisy', 1 is 'rose', 2 is 'tulip'"
    assert caplog.messages == [f"{outside / 'train.txt'}: {what}"]
    inside = scan(write(tmp_path / "data", lines))
    assert found.classes == inside.classes == ("daisy", "rose", "tulip")
    assert labeled(found) == labeled(inside)


@pytest.mark.parametrize(
    ("lines", "classes", "warned"),
    [
        ("a/1.jpg 2\nb/1.jpg 1\n", ("b", "a"), False),  # in the order of the numbers
        ("a/1.jpg 0\nb/1.jpg 0\nb/2.jpg 1\n", ("0", "1"), True),
        ("a/1.jpg 0\na/2.jpg 1\nb/1.jpg 2\n", ("0", "1", "2"), True),
        ("a/1.jpg 0\na/2.jpg 1\n", ("0", "1"), False),  # one folder says nothing about classes
        ("1.jpg 0\n2.jpg 1\n", ("0", "1"), False),
    ],
)
def test_numbers_that_do_not_match_the_folders_stay_numbers(
    lines: str, classes: tuple[str, ...], warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path / "data", *[line.split()[0] for line in lines.splitlines()])
    table = write(tmp_path, {"list.txt": lines}) / "list.txt"
    caplog.set_level(logging.INFO, "fastflower")
    assert scan(tmp_path / "data", Tables([table])).classes == classes
    rule = ", which do not match the folders" * warned
    remedy = "to name them, list the names in label order in classes.txt, in the folder to pack"
    named = f"{table}: classes are named {classes[0]} ... {classes[-1]}{rule}; {remedy}"
    assert [(record.levelname, record.message) for record in caplog.records if record.message == named] == (
        [("WARNING" if warned else "INFO", named)] if classes[0] == "0" else []
    )


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("place", "folders"),
    [
        ("flowers/", ""),  # the list is above the folder of the classes
        ("a/images/", ""),
        ("flowers/", "/monday"),  # classes have folders
        ("flowers/train/", ""),
    ],
)
def test_folders_name_the_classes_however_deep_they_are(
    tmp_path: Path, place: str, folders: str, inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Numbers count against the alphabet, so that positions among sorted folders would be wrong."""
    names = ("tulip", "rose", "daisy")
    paths = {f"{place}{name}{folders}/{copy}{name}.jpg": label for label, name in enumerate(names) for copy in "xyz"}
    if folders:  # no other folder goes with one number
        paths |= {f"{place}{name}/sunday/{name}.jpg": label for label, name in enumerate(names)}
    text = "".join(f"{path} {label}\n" for path, label in paths.items())
    root = touch(tmp_path / "data", *paths)
    table = write(root if inside else tmp_path, {"train.txt": text}) / "train.txt"
    caplog.set_level(logging.INFO, "fastflower")
    found = scan(root) if inside else scan(root, Tables([table]))
    assert found.classes == names
    assert labeled(found) == {path: names[label] + " train" * inside for path, label in paths.items()}
    what = "the labels are numbers, named by the folders of their images: 0 is 'tulip', 1 is 'rose', 2 is 'daisy'"
    assert caplog.messages == [f"{table}: {what}"]


def test_folders_name_the_classes_of_a_list_of_names_alone(tmp_path: Path) -> None:
    touch(tmp_path, "images/rose/1.jpg", "images/daisy/2.jpg", "images/daisy/3.jpg")
    table = write(tmp_path, {"list.csv": "image,label\n1.jpg,0\n2.jpg,1\n3.jpg,1\n"}) / "list.csv"
    assert scan(tmp_path, Tables([table])).classes == ("rose", "daisy")
