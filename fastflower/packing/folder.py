"""Finds the images of a folder: class folders as torchvision's ImageFolder reads them, splits of its own, or lists.

A million files must fit, so they stand in arrays, not in objects.
"""

import logging
import os
import stat
import struct
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import FolderError
from fastflower.files import blame_the_system
from fastflower.packing import layout
from fastflower.packing.lists import listed_classes, listed_files, lists_of

FILE_DTYPE = np.dtype(
    [
        ("path_end", "<u8"),  # in Folder.paths; the next path begins there
        ("label", "<i4"),
        ("split", "<i4"),  # position in Folder.splits; 0 where it has none
        ("size", "<u8"),  # bytes; 0 for a link to nothing
        ("mtime_ns", "<i8"),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Folder:
    """The classes and images of a folder, in ImageFolder's order or that of its lists."""

    root: Path
    """What paths are relative to."""
    classes: tuple[str, ...]
    splits: tuple[str, ...]
    """Of its own: "train", "val", "test"; none where the images are still to be split."""
    files: NDArray[np.void]
    """(N,) of FILE_DTYPE: those that have an image's name, or are listed."""
    paths: NDArray[np.uint8]
    """Their paths as bytes, one after another."""
    ignored: tuple[tuple[str, str], ...] = ()
    """(path, reason) of what else lies in class folders."""

    def path(self, number: int) -> str:
        """Of image 0 .. N-1, relative to the root, with forward slashes."""
        start = int(self.files["path_end"][number - 1]) if number else 0
        return os.fsdecode(self.paths[start : int(self.files["path_end"][number])].tobytes())

    def image_at(self, place: int) -> int:
        """The image to whose path a byte of `paths` belongs."""
        return int(np.searchsorted(self.files["path_end"], np.uint64(place), "right"))

    def __len__(self) -> int:
        return len(self.files)


_FILE = struct.Struct("<QiiQq")  # a row of FILE_DTYPE


@dataclass(slots=True)
class _Collector:
    """Collects the images of a folder: 32 bytes and the path for each."""

    root: Path
    files: bytearray = field(default_factory=bytearray)
    paths: bytearray = field(default_factory=bytearray)
    ignored: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def add(self, path: str, label: int, split: int, named: bool = True) -> None:
        """Take a file for an image, or note why not. A link to nothing is taken: reading it fails, and that is reported."""
        try:
            status = os.stat(os.path.join(self.root, path))  # noqa: PTH116, PTH118  (pathlib takes three times as long)
        except OSError:
            size = mtime_ns = 0
        else:
            if stat.S_ISDIR(status.st_mode):
                return
            if not stat.S_ISREG(status.st_mode):
                self.ignored.append((path, "is a pipe, socket or device"))
                return
            size, mtime_ns = status.st_size, status.st_mtime_ns
        if not named:
            self.ignored.append((path, "is not named as an image"))
            return
        self.paths += os.fsencode(path)
        self.files += _FILE.pack(len(self.paths), label, split, size, mtime_ns)

    def add_class(self, name: str, label: int, split: int) -> bool:
        """Add the files below root/name, sorted by folder, then by name, as ImageFolder has them. Whether there are images."""
        before = len(self.files)
        for parent in self._folders(name):
            for file in sorted(os.listdir(self.root / parent)):  # noqa: PTH208  (names alone fit in memory)
                self.add(f"{parent}/{file}", label, split, named=file.lower().endswith(layout.EXTENSIONS))
        return len(self.files) > before

    def _folders(self, name: str) -> list[str]:
        """Every folder at and below root/name that can be read, sorted; each once, so that links in a loop come to an end."""
        seen: set[tuple[int, int]] = set()
        folders: list[str] = []
        pending, linked = [name], list[str]()
        while pending or linked:
            path = pending.pop() if pending else linked.pop()  # links last: a folder counts where it really stands
            try:
                status = (self.root / path).stat()
                if (status.st_dev, status.st_ino) in seen:
                    self.ignored.append((path, "is a link to a folder that was read already"))
                    continue
                entries = [entry for entry in os.scandir(self.root / path) if layout.is_folder(entry)]
            except OSError as error:
                blame_the_system(error, self.root / path)
                self.ignored.append((path, f"is a folder that cannot be read ({error.strerror})"))
                continue
            seen.add((status.st_dev, status.st_ino))
            folders.append(path)
            for entry in sorted(entries, key=attrgetter("name"), reverse=True):
                if entry.name in layout.NO_CLASSES:
                    self.ignored.append((f"{path}/{entry.name}", "is what a system adds"))
                else:
                    (linked if entry.is_symlink() else pending).append(f"{path}/{entry.name}")
        return sorted(folders)

    def leave_out(self, top: str) -> None:
        """List the images of a split that has no class folders; they are for `predict`."""
        before = len(self.ignored)
        for parent in self._folders(top):
            self.note_strays(parent)
        if len(self.ignored) > before:
            what = "has no class folders, so its images have no labels and are left out; predict classifies them"
            logging.getLogger("fastflower").warning("%s: %s", self.root / top, what)
        else:
            self.ignored.append((top, "is a folder without images"))

    def note_strays(self, folder: str) -> None:
        """List images beside the class folders; a file of another kind may well stand there."""
        for file in sorted(os.listdir(self.root / folder)):  # noqa: PTH208  (names alone fit in memory)
            path = os.path.normpath(f"{folder}/{file}")
            if file.lower().endswith(layout.EXTENSIONS) and not (self.root / path).is_dir():
                self.ignored.append((path, "lies in no class folder"))
            elif file in layout.NO_CLASSES:
                self.ignored.append((path, "is what a system adds"))

    def folder(self, classes: list[str], splits: tuple[str, ...]) -> Folder:
        """All that was collected."""
        files, paths = np.frombuffer(self.files, FILE_DTYPE), np.frombuffer(self.paths, np.uint8)
        return Folder(self.root, tuple(classes), splits, files, paths, tuple(self.ignored))


def scan(root: str | Path, *, anew: bool = False) -> Folder:
    """Read the names and sizes, not the contents, of the images of a folder. One of three layouts:

    `root`/CLASS/**, as ImageFolder reads it; `root`/train/CLASS/** with folders named as other splits beside it; or lists
    `root`/meta/train.txt and val.txt with lines "PATH LABEL", and classes.txt, in meta/ or directly in the root.

    A folder named as a split is no class. anew  the caller draws a split of all images, so splits below classes do not count.
    Raises FolderError, naming file and line where there is one, for a folder that fits none of them or several, has only one
    class, or a class without images.
    """
    root = Path(root)
    try:
        folder = _scanned(root, anew)
    except OSError as error:
        blame_the_system(error, error.filename or root)
        raise FolderError(f"{error.filename or root}: cannot be read ({error.strerror}); make it readable.") from error
    if len(folder.classes) == 1:
        only = folder.classes[0]
        raise FolderError(f"{root}: has one class, {only!r}; a classifier needs at least two class folders.")
    return folder


def _scanned(root: Path, anew: bool) -> Folder:
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise FolderError(f"{root}: {what}; name a folder that holds one folder of images for each class.")
    if lists := lists_of(root):
        return _of_lists(root, lists)
    tops = layout.subfolders(root)
    if not tops:
        raise FolderError(f"{root}: has no class folders; put the images of each class into a folder of its own.")
    if len(tops) > 1 and (named := layout.splits_named(tops)):
        return _of_splits(root, named, layout.places_of_splits(root, named, tops))
    layout.check_classes(root, tops, anew)
    return _of_classes(root, tops)


def _of_lists(root: Path, lists: dict[str, Path]) -> Folder:
    collector, classes = _Collector(root), listed_classes(root, lists)
    for path, label, split in listed_files(root, lists, classes):
        collector.add(path, label, split)
    if not collector.files:
        raise FolderError(f"{lists['train']}: lists no image; write lines PATH LABEL.")
    return collector.folder(classes, tuple(lists))


def _of_classes(root: Path, tops: list[str]) -> Folder:
    collector = _Collector(root)
    empty = [name for label, name in enumerate(tops) if not collector.add_class(name, label, 0)]
    if len(empty) == len(tops) - 1:
        layout.refuse_wrapper(root, *(top for top in tops if top not in empty))
    if empty:
        raise _no_images(root / empty[0])
    collector.note_strays(".")
    return collector.folder(tops, ())


def _of_splits(root: Path, named: dict[str, str], bases: dict[str, str]) -> Folder:
    """bases  where the class folders of each labeled split stand, training first."""
    collector = _Collector(root)
    train, *_ = bases.values()
    classes = layout.subfolders(root / train)
    for number, base in enumerate(bases.values()):
        for name in layout.subfolders(root / base):
            place, ours = root / base / name, root / train
            if name not in classes:
                raise FolderError(f"{place}: is no class of {ours}; add the class there, or remove this folder.")
            if not collector.add_class(f"{base}/{name}", classes.index(name), number) and base == train:
                raise _no_images(place)
    for folder in (".", *bases.values()):
        collector.note_strays(folder)
    for top in named:
        if top not in bases:
            collector.leave_out(top)
    return collector.folder(classes, tuple(named[top] for top in bases))


def _no_images(folder: Path) -> FolderError:
    named = ", ".join(layout.EXTENSIONS)
    return FolderError(f"{folder}: has no images ({named}); add some, or remove the class folder.")


def images_in(root: Path) -> list[Path]:
    """Image files of a folder and of those below it, as those of a class are found."""
    collector = _Collector(root)
    collector.add_class(".", 0, 0)
    folder = collector.folder([], ())
    return [root / folder.path(number) for number in range(len(folder))]
