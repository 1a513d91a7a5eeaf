"""Finding photographs: torchvision's ImageFolder is the oracle."""

import re
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from fastflower.errors import FolderError
from fastflower.folder import EXTENSIONS, Folder, scan

ENDINGS = "(.jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp)"


def touch(root: Path, *names: str) -> Path:
    """Files of one byte: neither side opens a photograph to find it."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def same_as_image_folder(root: Path) -> Folder:
    found, oracle = scan(root), ImageFolder(root)
    assert list(found.classes) == oracle.classes
    assert {name: label for label, name in enumerate(found.classes)} == oracle.class_to_idx
    assert [(str(root / photo.path), photo.label) for photo in found.photos] == oracle.samples
    return found


def test_drawn_flowers_are_found_as_image_folder_finds_them(flowers: Path) -> None:
    found = same_as_image_folder(flowers)
    assert len(found.photos) == 150
    assert all(photo.size_bytes == (flowers / photo.path).stat().st_size for photo in found.photos)
    assert found.ignored == ()


def test_every_extension_counts_in_any_case(tmp_path: Path) -> None:
    names = [f"a/{number}{ending}" for number, ending in enumerate(EXTENSIONS)]
    upper = [f"b/{number}{ending.upper()}" for number, ending in enumerate(EXTENSIONS)]
    found = same_as_image_folder(touch(tmp_path, *names, *upper, "b/x.JpG", "b/.hidden.png", "b/.jpg"))
    assert len(found.photos) == 2 * len(EXTENSIONS) + 3


def test_nested_folders_stand_in_image_folders_order(tmp_path: Path) -> None:
    nested = ["a/z.jpg", "a/b/c.jpg", "a/b/a/d.jpg", "a/b-c/e.jpg", "a/B/f.jpg", "a/.h/g.jpg", "b/10.png", "b/9.png"]
    assert len(same_as_image_folder(touch(tmp_path, *nested)).photos) == len(nested)


def test_classes_sort_by_code_point_not_by_locale_or_number(tmp_path: Path) -> None:
    found = same_as_image_folder(touch(tmp_path, "b/1.jpg", "A/1.jpg", "a/1.jpg", "10/1.jpg", "9/1.jpg", "é/1.jpg"))
    assert found.classes == ("10", "9", "A", "a", "b", "é")


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/one.jpg", "data/a/1.jpg", "data/b/1.jpg")
    (tmp_path / "data/a/link.jpg").symlink_to(tmp_path / "elsewhere/one.jpg")
    (tmp_path / "data/a/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere")
    found = same_as_image_folder(tmp_path / "data")
    assert [photo.path for photo in found.photos if photo.label != 1] == [
        "a/1.jpg",
        "a/link.jpg",
        "a/folder/one.jpg",
        "c/one.jpg",
    ]


def test_a_link_to_nothing_is_found_so_that_it_can_be_reported(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "a/gone.jpg").symlink_to(tmp_path / "nowhere")
    found = same_as_image_folder(tmp_path)
    assert ("a/gone.jpg", 0) in [(photo.path, photo.size_bytes) for photo in found.photos]


def test_other_files_in_class_folders_are_listed_as_ignored(tmp_path: Path) -> None:
    found = same_as_image_folder(touch(tmp_path, "a/1.jpg", "a/notes.txt", "a/sub/x.gif", "b/1.jpg", "b/jpg"))
    assert found.ignored == ("a/notes.txt", "a/sub/x.gif", "b/jpg")


def test_files_beside_the_class_folders_do_not_count(tmp_path: Path) -> None:
    found = same_as_image_folder(touch(tmp_path, "a/1.jpg", "b/1.jpg", "cover.jpg", "labels.csv"))
    assert [photo.path for photo in found.photos] == ["a/1.jpg", "b/1.jpg"]
    assert found.ignored == ()


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    """The one thing that ImageFolder does otherwise: it takes .git or .cache for a class."""
    plain = touch(tmp_path / "plain", "a/1.jpg", "b/1.jpg")
    hidden = touch(tmp_path / "hidden", "a/1.jpg", "b/1.jpg", ".cache/1.jpg", ".git/HEAD")
    assert scan(hidden).classes == tuple(ImageFolder(plain).classes)
    assert scan(hidden).photos == scan(plain).photos


def test_a_path_may_be_text(flowers: Path) -> None:
    assert scan(str(flowers)) == scan(flowers)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    text = f"{tmp_path / 'no'}: does not exist; name a folder that holds one folder of images for each class."
    with pytest.raises(FolderError, match=f"^{re.escape(text)}$"):
        scan(tmp_path / "no")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = touch(tmp_path, "photo.jpg") / "photo.jpg"
    text = f"{file}: is a file; name a folder that holds one folder of images for each class."
    with pytest.raises(FolderError, match=f"^{re.escape(text)}$"):
        scan(file)


@pytest.mark.parametrize("names", [(), ("1.jpg", "2.jpg"), (".git/1.jpg",)])
def test_a_folder_without_class_folders_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    touch(tmp_path, *names)
    text = f"{tmp_path}: has no class folders; put the images of each class into a folder of its own."
    with pytest.raises(FolderError, match=f"^{re.escape(text)}$"):
        scan(tmp_path)


def test_one_class_is_refused(tmp_path: Path) -> None:
    text = f"{tmp_path}: has one class, 'rose'; a classifier needs at least two class folders."
    with pytest.raises(FolderError, match=f"^{re.escape(text)}$"):
        scan(touch(tmp_path, "rose/1.jpg"))


def test_a_class_without_images_is_refused_by_both(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/notes.txt")
    with pytest.raises(FileNotFoundError, match="classes b"):
        ImageFolder(tmp_path)
    text = f"{tmp_path / 'b'}: has no images {ENDINGS}; add some, or remove the class folder."
    with pytest.raises(FolderError, match=f"^{re.escape(text)}$"):
        scan(tmp_path)
