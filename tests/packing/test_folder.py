"""Finding images: the results match torchvision's ImageFolder."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packs import repeats, touch
from torchvision.datasets import ImageFolder

from fastflower.errors import FolderError
from fastflower.packing.folder import FILE_DTYPE, Folder, scan
from fastflower.packing.names import EXTENSIONS

ENDINGS = "(.jpg, .png and others)"
NO_EXTENSION = "has no image extension"
READ_ALREADY = "links to a folder that was already read"
STRAY = "is not in a class folder"
NO_FILE = "is a pipe, socket or device"


def paths(found: Folder) -> list[str]:
    return [found.path(number) for number in range(len(found))]


def images(found: Folder) -> list[tuple[str, int, int]]:
    """Return (path, label, split) of each image."""
    files = found.files
    return list(zip(paths(found), files["label"].tolist(), files["split"].tolist(), strict=True))


def same_as_image_folder(root: Path) -> Folder:
    found, oracle = scan(root), ImageFolder(root, is_valid_file=lambda path: path.lower().endswith(EXTENSIONS))
    assert list(found.classes) == oracle.classes
    assert [(str(root / path), label) for path, label, _ in images(found)] == oracle.samples
    assert (found.root, found.splits, found.files.dtype) == (root, (), FILE_DTYPE)
    assert not found.files["split"].any()
    return found


def refused(root: Path, text: str) -> None:
    with pytest.raises(FolderError, match=f"^{re.escape(text)}$"):
        scan(root)


def test_drawn_flowers_match_image_folder(flowers: Path) -> None:
    found = same_as_image_folder(flowers)
    assert len(found) == len(found.files) == 150
    assert found.ignored == ()
    assert images(scan(str(flowers))) == images(found)


def test_sizes_and_times_match_the_file_system(flowers: Path) -> None:
    found = scan(flowers)
    seen = [(flowers / path).stat() for path in paths(found)]
    expected = [(status.st_size, status.st_mtime_ns) for status in seen]
    assert found.files[["size", "mtime_ns"]].tolist() == expected


def test_a_file_of_five_gigabytes_and_one_from_before_1970_fit(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    os.truncate(tmp_path / "a/1.jpg", 5 << 30)
    os.utime(tmp_path / "b/1.jpg", ns=(0, -5_000_000_000))
    files = scan(tmp_path).files
    assert (files["size"][0], files["mtime_ns"][1]) == (5 << 30, -5_000_000_000)


def test_every_extension_is_accepted_in_any_case(tmp_path: Path) -> None:
    names = [f"a/{number}{ending}" for number, ending in enumerate(EXTENSIONS)]
    upper = [f"b/{number}{ending.upper()}" for number, ending in enumerate(EXTENSIONS)]
    touch(tmp_path, *names, *upper, "b/x.JpG")
    assert len(same_as_image_folder(tmp_path)) == 2 * len(EXTENSIONS) + 1


def test_nested_folders_are_in_image_folders_order(tmp_path: Path) -> None:
    nested = ["a/z.jpg", "a/b/c.jpg", "a/b/a/d.jpg", "a/b-c/e.jpg", "a/B/f.jpg", "b/10.png", "b/9.png"]
    assert len(same_as_image_folder(touch(tmp_path, *nested))) == len(nested)


def test_classes_sort_by_code_point_not_by_locale_or_number(tmp_path: Path) -> None:
    found = same_as_image_folder(touch(tmp_path, "b/1.jpg", "A/1.jpg", "a/1.jpg", "10/1.jpg", "9/1.jpg", "é/1.jpg"))
    assert found.classes == ("10", "9", "A", "a", "b", "é")


NAME = st.text("aB9 -.é", min_size=1, max_size=3).filter(lambda name: name[0] != ".")
FILE = st.builds(str.__add__, NAME, st.sampled_from([".jpg", ".PNG", ".txt", ""])).map(lambda name: {name: None})
TREE = st.recursive(FILE, lambda inside: st.dictionaries(NAME, inside, max_size=3), max_leaves=12)
CLASSES = st.dictionaries(NAME, TREE, max_size=4)


def ending_of(path: str) -> str:
    """Return the ending of a file that is no image, as the reason names it: what follows the last dot, if it is a word."""
    _, dot, ending = path.rpartition(".")
    return f" (.{ending.lower()})" if dot and ending.isascii() and ending.isalnum() else ""


def grow(root: Path, tree: dict[str, Any]) -> None:
    root.mkdir(exist_ok=True)
    for name, inside in tree.items():
        touch(root, name) if inside is None else grow(root / name, inside)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(tree=CLASSES)
@example(tree={"9": {"9.jpg": None}, "B": {"9.jpg": None}, "99": {"9": {"9.jpg": None}, "B": {"9.jpg": None}}})
@example(tree={"a": {"1.jpg": None, "z": {"1.txt": None}}, "B": {"a": {"2.PNG": None}, " a": {"1.jpg": None}}})
def test_any_tree_matches_image_folder(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        grow(root, tree)
        try:
            oracle = ImageFolder(root)
        except FileNotFoundError:  # no classes, or a class without images
            oracle = None
        if repeats(tree):
            message = "This layout is ambiguous"
            try:
                same_as_image_folder(root)
            except FolderError as error:  # test_layout.py tests the readings
                message = str(error)
            assert re.search(r"This layout is ambiguous|has (no class folders|one class|no images)", message)
        elif oracle is None or len(oracle.classes) == 1:
            with pytest.raises(FolderError, match=r"has (no class folders|one class|no images)"):
                scan(root)
        else:
            found = same_as_image_folder(root)
            files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
            assert dict(found.ignored) == {path: NO_EXTENSION + ending_of(path) for path in files - set(paths(found))}


NAMES = ["x" * 251 + ".jpg", "🌹 rose.jpg", "two\nlines.jpg", " .jpg", "a\\b'\".jpg", os.fsdecode(b"\xff\xfe.jpg")]


def test_strange_names_match_image_folder(tmp_path: Path) -> None:
    folders = ["🌹", os.fsdecode(b"not UTF-8 \xff"), "line\nbreak", "y" * 255]
    found = same_as_image_folder(touch(tmp_path, *(f"{folder}/{name}" for folder in folders for name in NAMES)))
    assert len(found) == len(folders) * len(NAMES)
    assert all((tmp_path / path).is_file() for path in paths(found))


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/one.jpg", "data/a/1.jpg", "data/b/1.jpg")
    (tmp_path / "data/a/link.jpg").symlink_to(tmp_path / "elsewhere/one.jpg")
    (tmp_path / "data/a/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere")
    found = same_as_image_folder(tmp_path / "data")
    assert paths(found) == ["a/1.jpg", "a/link.jpg", "a/folder/one.jpg", "b/1.jpg", "c/one.jpg"]
    assert set(found.files["size"]) == {1}


def test_broken_links_and_links_to_themselves_are_found_and_can_be_reported(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "a/gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a/itself.jpg").symlink_to(tmp_path / "a/itself.jpg")
    (tmp_path / "a/itself").symlink_to(tmp_path / "a/itself")
    found = same_as_image_folder(tmp_path)
    assert paths(found) == ["a/1.jpg", "a/gone.jpg", "a/itself.jpg", "b/1.jpg"]
    assert found.files["size"].tolist() == [1, 0, 0, 1]
    assert found.ignored == (("a/itself", NO_EXTENSION),)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")  # ImageFolder raises OSError for it
    assert images(scan(tmp_path)) == images(found)


@pytest.mark.parametrize(
    ("links", "read", "ignored"),
    [
        ({"a/x/up": "data/a", "a/x/self": "data/a/x"}, [], ["a/x/self", "a/x/up"]),
        ({"a/x/to_y": "data/a/y", "a/y/to_x": "data/a/x"}, [], ["a/x/to_y", "a/y/to_x"]),
        ({"a/0": "data/a/x"}, [], ["a/0"]),
        ({"a/one": "elsewhere", "a/two": "elsewhere"}, ["a/one/1.jpg"], ["a/two"]),
        ({"a/root": "data"}, ["a/root/b/1.jpg"], ["a/root/a"]),
    ],
)
def test_each_folder_of_a_class_is_read_once_at_its_real_path(
    tmp_path: Path, links: dict[str, str], read: list[str], ignored: list[str]
) -> None:
    touch(tmp_path, "elsewhere/1.jpg", "data/a/x/1.jpg", "data/a/y/1.jpg", "data/b/1.jpg")
    for path, target in links.items():
        (tmp_path / "data" / path).symlink_to(tmp_path / target)
    found = scan(tmp_path / "data")
    assert paths(found) == [*read, "a/x/1.jpg", "a/y/1.jpg", "b/1.jpg"]
    assert sorted(found.ignored) == [(path, READ_ALREADY) for path in ignored]


def test_ten_folders_that_all_link_to_each_other_are_read_quickly(tmp_path: Path) -> None:
    """ImageFolder would follow ten million paths."""
    names = [f"a/{number}/1.jpg" for number in range(10)]
    touch(tmp_path, *names, "b/1.jpg")
    for here in range(10):
        for there in range(10):
            (tmp_path / f"a/{here}/to_{there}").symlink_to(tmp_path / f"a/{there}")
    start = time.perf_counter()
    found = scan(tmp_path)
    assert time.perf_counter() - start < 2
    assert paths(found) == [*names, "b/1.jpg"]
    assert len(set(found.ignored)) == len(found.ignored) == 100


def test_pipes_sockets_and_devices_are_ignored_and_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(touch(tmp_path, "a/1.jpg", "b/1.jpg"))  # a socket's path is at most 108 bytes long
    os.mkfifo("a/pipe.jpg")
    os.mkfifo("a/pipe")
    Path("a/zero.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("b/socket.png")
        found = scan(tmp_path)
    assert paths(found) == ["a/1.jpg", "b/1.jpg"]
    assert [path for path, _ in found.ignored] == ["a/pipe", "a/pipe.jpg", "a/zero.jpg", "b/socket.png"]
    assert {reason for _, reason in found.ignored} == {NO_FILE}
    (tmp_path / "train.txt").write_text("a/1.jpg\na/pipe.jpg\nb/1.jpg\n")
    listed = scan(tmp_path)
    assert (paths(listed), listed.ignored) == (["a/1.jpg", "b/1.jpg"], (("a/pipe.jpg", NO_FILE),))


# Scans a folder as a user without special rights; root first becomes nobody.
SCAN = """
import json, os
from fastflower.errors import FolderError
from fastflower.packing.folder import scan
if os.getuid() == 0:
    try:
        os.setgroups([])
        os.setuid(65534)
    except OSError:
        raise SystemExit(77)
try:
    found = scan(".")
    print(json.dumps([[found.path(n), int(found.files["size"][n])] for n in range(len(found))] + [found.ignored]))
except FolderError as error:
    print(json.dumps(str(error)))
"""


def scanned_without_rights(root: Path) -> Any:
    """Scan in the current folder, because the folders above it may be unreadable."""
    root.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", SCAN], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("root may not become another user on this machine")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_unreadable_folders_are_ignored_and_unreadable_files_are_kept(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "a/file.jpg", "a/folder/1.jpg", "a/names/1.jpg", "b/1.jpg")
    (tmp_path / "a/file.jpg").chmod(0o000)
    (tmp_path / "a/folder").chmod(0o000)
    (tmp_path / "a/names").chmod(0o744)  # only names are readable
    files = [["a/1.jpg", 1], ["a/file.jpg", 1], ["a/names/1.jpg", 0], ["b/1.jpg", 1]]
    ignored = [["a/folder", "is a folder that cannot be read (Permission denied)"]]
    assert scanned_without_rights(tmp_path) == [*files, ignored]


@pytest.mark.parametrize("name", ["train", "train.txt"])
def test_an_unreadable_split_or_list_is_an_error(tmp_path: Path, name: str) -> None:
    touch(tmp_path, *([name] if name.endswith(".txt") else ["train/a/1.jpg", "val/a/1.jpg"]))
    (tmp_path / name).chmod(0o000)
    assert scanned_without_rights(tmp_path) == f"{name}: cannot be read (Permission denied); make it readable."


def test_files_next_to_class_folders_are_ignored_and_a_folder_is_not_an_image(tmp_path: Path) -> None:
    found = same_as_image_folder(touch(tmp_path, "a/1.jpg/2.jpg", "b.jpg/1.jpg", "cover.jpg", "labels.csv"))
    assert (paths(found), found.ignored) == (["a/1.jpg/2.jpg", "b.jpg/1.jpg"], (("cover.jpg", STRAY),))


def test_hidden_folders_are_not_classes(tmp_path: Path) -> None:
    """ImageFolder takes .git or .cache for a class."""
    plain = touch(tmp_path / "plain", "a/1.jpg", "b/1.jpg")
    hidden = touch(tmp_path / "hidden", "a/1.jpg", "b/1.jpg", ".cache/1.jpg", ".git/HEAD")
    assert scan(hidden).classes == tuple(ImageFolder(plain).classes)
    assert images(scan(hidden)) == images(scan(plain))


@pytest.mark.parametrize(("name", "split"), [("val", "val"), ("valid", "val"), ("validation", "val"), ("test", "test")])
def test_each_folder_of_a_split_is_read_as_image_folder_reads_it(tmp_path: Path, name: str, split: str) -> None:
    touch(tmp_path, "train/a/2.jpg", "train/a/b/1.jpg", "train/b/1.jpg", f"{name}/a/3.jpg", f"{name}/b/1.png", "0.jpg")
    samples = [(number, ImageFolder(tmp_path / top).samples) for number, top in enumerate(("train", name))]
    found = scan(touch(tmp_path, ".git/x/1.jpg", "train/.cache/1.jpg", "train/cover.jpg", f"{name}/b/notes.txt"))
    assert (found.classes, found.splits) == (("a", "b"), ("train", split))
    assert images(found) == [
        (str(Path(path).relative_to(tmp_path)), label, number) for number, group in samples for path, label in group
    ]
    assert found.ignored == (
        (f"{name}/b/notes.txt", f"{NO_EXTENSION} (.txt)"),
        ("0.jpg", STRAY),
        ("train/cover.jpg", STRAY),
    )


def test_a_class_may_be_missing_in_every_split_but_train(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/b/1.jpg", "validation/a/1.jpg", "validation/b/none.txt")
    found = scan(tmp_path)
    assert found.splits == ("train", "val", "test")
    expected = [("train/a/1.jpg", 0, 0), ("train/b/1.jpg", 1, 0), ("validation/a/1.jpg", 0, 1), ("test/b/1.jpg", 1, 2)]
    assert images(found) == expected


def test_names_that_only_start_like_a_split_are_classes(tmp_path: Path) -> None:
    names = ["a/1.jpg", "b/1.jpg", "val.txt", "classes.txt", "meta/train.txt/1.jpg", "trains/1.jpg", "test tube/1.jpg"]
    same_as_image_folder(touch(tmp_path, *names))


TWO = ["train/a/1.jpg", "train/b/1.jpg"]
REMEDY = (
    "put the images of each class into a folder of its own. Images without labels are for fastflower predict, or for "
    "Loader.from_files and a network of your own. To pass a table of labels"
)
NO_CLASSES = f"{{root}}: has no class folders; {REMEDY}:\n  pack('{{root}}', labels=['FILE'])"
ONE_CLASS = "{root}: has one class, 'a'; a classifier needs at least two class folders."
NO_IMAGES = f": has no images {ENDINGS}; add some, or remove the class folder."
DROP = "\n  pack(folder, drop_empty_classes=True)"
CAN_DROP = NO_IMAGES.replace("remove the class folder.", f"leave out such classes:{DROP}")
NO_CLASS = f"{{root}}/val/c: is not a class in {{root}}/train; add the class there, or leave it out:{DROP}"
MISFITS = [
    ([], NO_CLASSES),
    (["1.jpg", ".git/1.jpg"], NO_CLASSES),
    (["a/1.jpg"], ONE_CLASS),
    (["train/a/1.jpg", "val/a/1.jpg"], ONE_CLASS),
    (["a/1.jpg", "b/notes.txt"], "{root}/b" + NO_IMAGES),
    ([*TWO, "val/a/1.jpg", "train/c/d/e"], "{root}/train/c" + CAN_DROP),
    ([*TWO, "val/c/1.jpg"], NO_CLASS),
]


@pytest.mark.parametrize(("names", "text"), MISFITS)
def test_a_folder_that_fits_no_layout_is_refused(tmp_path: Path, names: list[str], text: str) -> None:
    refused(touch(tmp_path, *names), text.replace("{root}", str(tmp_path)))


def test_a_missing_folder_or_a_file_is_refused(tmp_path: Path) -> None:
    remedy = "pass a folder that contains one folder of images per class, or a zip or tar archive of one."
    refused(tmp_path / "no", f"{tmp_path / 'no'}: does not exist; {remedy}")
    refused(touch(tmp_path, "1.jpg") / "1.jpg", f"{tmp_path / '1.jpg'}: is one image; {remedy}")
