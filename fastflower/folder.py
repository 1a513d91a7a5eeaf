"""Finds the photographs of a folder of class folders, as torchvision's ImageFolder does."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastflower.errors import FolderError

# ImageFolder's IMG_EXTENSIONS (torchvision/datasets/folder.py).
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, slots=True)
class Photo:
    """A file that has an image's name."""

    path: str
    """Relative to the folder, with forward slashes: CLASS/..."""
    label: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Folder:
    """The classes and photographs of a folder, in ImageFolder's order."""

    root: Path
    classes: tuple[str, ...]
    photos: tuple[Photo, ...]
    ignored: tuple[str, ...]
    """Files in class folders whose names are no image's, relative to the folder."""


def scan(root: str | Path) -> Folder:
    """Read the names and sizes, not the contents, of `root`/CLASS/**.

    Raises FolderError when the folder is missing, has no class folders, only one, or one without photographs.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise FolderError(f"{root}: {what}; name a folder that holds one folder of images for each class.")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise FolderError(f"{root}: has no class folders; put the images of each class into a folder of its own.")
    photos: list[Photo] = []
    ignored: list[str] = []
    for label, name in enumerate(classes):
        found = len(photos)
        for path, size in _files(root, name):
            if path.lower().endswith(EXTENSIONS):
                photos.append(Photo(path, label, size))
            else:
                ignored.append(path)
        if len(photos) == found:
            raise FolderError(
                f"{root / name}: has no images ({', '.join(EXTENSIONS)}); add some, or remove the class folder."
            )
    if len(classes) == 1:
        raise FolderError(f"{root}: has one class, {classes[0]!r}; a classifier needs at least two class folders.")
    return Folder(root, tuple(classes), tuple(photos), tuple(ignored))


def _files(root: Path, name: str) -> Iterator[tuple[str, int]]:
    """(path relative to root, bytes) of every file below root/name, sorted by folder, then by name; links are followed.

    A link to nothing counts as a file of 0 bytes: reading it fails, and it is listed as skipped.
    """
    for parent, _, names in sorted(os.walk(root / name, followlinks=True)):
        for file in sorted(names):
            path = Path(parent, file)
            if path.is_file() or not path.exists():
                yield path.relative_to(root).as_posix(), path.stat().st_size if path.exists() else 0
