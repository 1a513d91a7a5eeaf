"""Finds the images of a folder: class folders as torchvision's ImageFolder reads them, splits of its own, or lists.

A million files must fit, so what is found stands in arrays, not in objects.
"""

import logging
import os
import stat
import struct
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import FolderError
from fastflower.files import blame_the_system

# ImageFolder's IMG_EXTENSIONS (torchvision/datasets/folder.py).
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Folders that stand for a split, in lower case, and its name.
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
_SPLITS |= {"test": "test", "testing": "test"}

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
    classes: tuple[str, ...]
    splits: tuple[str, ...]
    """Of its own: "train", "val", "test"; none where the images are still to be split."""
    files: NDArray[Any]
    """(N,) of FILE_DTYPE: those that have an image's name, or are listed."""
    paths: NDArray[np.uint8]
    """Their paths as bytes, one after another."""
    ignored: tuple[tuple[str, str], ...] = ()
    """(path, reason) of what else lies in class folders."""

    def path(self, number: int) -> str:
        """Of image 0 .. N-1, relative to the root, with forward slashes."""
        start = int(self.files["path_end"][number - 1]) if number else 0
        return os.fsdecode(self.paths[start : int(self.files["path_end"][number])].tobytes())

    def __len__(self) -> int:
        return len(self.files)


_FILE = struct.Struct("<QiiQq")  # a row of FILE_DTYPE


@dataclass(slots=True)
class _Found:
    """Collects images; 32 bytes and the path for each."""

    root: Path
    files: bytearray = field(default_factory=bytearray)
    paths: bytearray = field(default_factory=bytearray)
    ignored: list[tuple[str, str]] = field(default_factory=list)

    def add(self, path: str, label: int, split: int, named: bool = True) -> None:
        """Take a file for an image, or note why not. A link to nothing is taken: reading it fails, and that is reported."""
        try:
            found = os.stat(os.path.join(self.root, path))  # noqa: PTH116, PTH118  (pathlib takes three times as long)
        except OSError:
            size = mtime_ns = 0
        else:
            if stat.S_ISDIR(found.st_mode):
                return
            if not stat.S_ISREG(found.st_mode):
                self.ignored.append((path, "is a pipe, socket or device"))
                return
            size, mtime_ns = found.st_size, found.st_mtime_ns
        if not named:
            self.ignored.append((path, "is not named as an image"))
            return
        self.paths += os.fsencode(path)
        self.files += _FILE.pack(len(self.paths), label, split, size, mtime_ns)

    def folder(self, classes: list[str], splits: tuple[str, ...]) -> Folder:
        if len(classes) == 1:
            raise FolderError(
                f"{self.root}: has one class, {classes[0]!r}; a classifier needs at least two class folders."
            )
        files, paths = np.frombuffer(self.files, FILE_DTYPE), np.frombuffer(self.paths, np.uint8)
        return Folder(self.root, tuple(classes), splits, files, paths, tuple(self.ignored))


def scan(root: str | Path) -> Folder:
    """Read the names and sizes, not the contents, of the images of a folder. One of three layouts:

    `root`/CLASS/**, as ImageFolder reads it; `root`/train/CLASS/** (training) with val (valid, validation) or test (testing)
    beside it, in any case; or lists `root`/meta/train.txt and val.txt with lines "PATH LABEL", and classes.txt, in meta/ or
    directly in the root.

    Raises FolderError, naming file and line where there is one, for a folder that fits none of them, has only one class,
    or a class without images.
    """
    root = Path(root)
    try:
        return _scanned(root)
    except OSError as error:
        raise FolderError(f"{error.filename or root}: cannot be read ({error.strerror}); make it readable.") from error


def _scanned(root: Path) -> Folder:
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise FolderError(f"{root}: {what}; name a folder that holds one folder of images for each class.")
    if lists := _lists(root):
        return _listed(root, lists)
    tops = _subfolders(root)
    named = {top: _SPLITS[top.lower()] for top in tops if top.lower() in _SPLITS}
    parted = [top for top in tops if (top in named or len(tops) == 1) and _subfolders(root / top)]
    if "train" in named.values() and len(tops) > 1 and parted == list(named) == tops:
        return _split(root, named)
    if len(named) > 1 or (named and parted and len(tops) > 1):
        what = "are taken for classes; they are splits where each has class folders and stands beside splits only"
        logging.getLogger("fastflower").warning("%s: %s %s", root, ", ".join(tops), what)
    if len(parted) == len(tops) == 1:
        what = f"has one class, {tops[0]!r}; a classifier needs at least two class folders."
        raise FolderError(f"{root}: {what} If those in it are the classes, name {root / tops[0]}.")
    found = _Found(root)
    if not tops:
        raise FolderError(f"{root}: has no class folders; put the images of each class into a folder of its own.")
    for label, name in enumerate(tops):
        _add_class(found, name, label, 0, required=True)
    _note_strays(found, ".")
    return found.folder(tops, ())


def _subfolders(root: Path) -> list[str]:
    """Names of folders, sorted; hidden ones are no classes (ImageFolder takes .git or .cache for one)."""
    return sorted(entry.name for entry in os.scandir(root) if not entry.name.startswith(".") and _is_folder(entry))


def _split(root: Path, named: dict[str, str]) -> Folder:
    found = _Found(root)
    tops = sorted(named, key=lambda top: list(_SPLITS.values()).index(named[top]))
    splits = tuple(named[top] for top in tops)
    if len(set(splits)) < len(splits):
        raise FolderError(
            f"{root}: has two folders for the same split ({', '.join(tops)}); remove or join one of them."
        )
    train = root / tops[0]
    classes = _subfolders(train)
    for number, top in enumerate(tops):
        for name in _subfolders(root / top):
            if name not in classes:
                raise FolderError(
                    f"{root / top / name}: is no class of {train}; add the class there, or remove this folder."
                )
            _add_class(found, f"{top}/{name}", classes.index(name), number, required=number == 0)
    _note_strays(found, ".", *tops)
    return found.folder(classes, splits)


def _note_strays(found: _Found, *folders: str) -> None:
    """List images beside the class folders; a file of another kind may well stand there."""
    for folder in folders:
        for file in sorted(os.listdir(found.root / folder)):  # noqa: PTH208  (names alone fit in memory)
            path = os.path.normpath(f"{folder}/{file}")
            if file.lower().endswith(EXTENSIONS) and not (found.root / path).is_dir():
                found.ignored.append((path, "lies in no class folder"))


def _add_class(found: _Found, name: str, label: int, split: int, *, required: bool) -> None:
    """The files below root/name, sorted by folder, then by name, as ImageFolder has them; links are followed."""
    before = len(found.files)
    for parent in _walk(found, name):
        for file in sorted(os.listdir(found.root / parent)):  # noqa: PTH208  (names alone fit in memory)
            found.add(f"{parent}/{file}", label, split, named=file.lower().endswith(EXTENSIONS))
    if required and len(found.files) == before:
        raise FolderError(
            f"{found.root / name}: has no images ({', '.join(EXTENSIONS)}); add some, or remove the class folder."
        )


def images_in(root: Path) -> list[Path]:
    """Image files of a folder and of those below it, as those of a class are found."""
    found = _Found(root)
    _add_class(found, ".", 0, 0, required=False)
    ends = [0, *(row[0] for row in _FILE.iter_unpack(found.files))]
    return [root / os.fsdecode(bytes(found.paths[start:end])) for start, end in pairwise(ends)]


def _walk(found: _Found, name: str) -> list[str]:
    """Every folder at and below root/name that can be read, sorted; each once, so that links in a loop come to an end."""
    seen: set[tuple[int, int]] = set()
    folders: list[str] = []
    pending, linked = [name], list[str]()
    while pending or linked:
        path = pending.pop() if pending else linked.pop()  # links last: a folder counts where it really stands
        try:
            status = (found.root / path).stat()
            if (status.st_dev, status.st_ino) in seen:
                found.ignored.append((path, "is a link to a folder that was read already"))
                continue
            inside = [(entry.name, entry.is_symlink()) for entry in os.scandir(found.root / path) if _is_folder(entry)]
        except OSError as error:
            blame_the_system(error, found.root / path)
            found.ignored.append((path, f"is a folder that cannot be read ({error.strerror})"))
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.append(path)
        for entry, is_link in sorted(inside, reverse=True):
            (linked if is_link else pending).append(f"{path}/{entry}")
    return sorted(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _lists(root: Path) -> dict[str, Path]:
    """The lists of a folder by split; train.txt makes it one with lists."""
    found = {split: _first(root, f"{split}.txt") for split in ("train", "val", "test")}
    return {split: path for split, path in found.items() if path is not None} if found["train"] else {}


def _first(root: Path, name: str) -> Path | None:
    return next((path for path in (root / "meta" / name, root / name) if path.is_file()), None)


def _listed(root: Path, lists: dict[str, Path]) -> Folder:
    """Lines are "PATH LABEL" or, below class folders, "CLASS/FILE"; paths are below root/SPLIT or root."""
    found = _Found(root)
    named = _first(root, "classes.txt")
    if named is not None:
        lines = named.read_bytes().removeprefix(BOM_UTF8).splitlines()
        classes = [os.fsdecode(line).strip() for line in lines if line.strip()]
        if len(set(classes)) < len(classes):
            raise FolderError(f"{named}: names a class twice; one line a class, in the order of the labels.")
    else:
        classes = sorted({path.partition("/")[0] for _, path, _ in _lines(lists["train"]) if "/" in path})
    labels = {name: label for label, name in enumerate(classes)}
    seen: set[int] = set()  # 64 bits of each path; paths themselves would not fit a million files
    for number, (split, file) in enumerate(lists.items()):
        for line, listed, label in _lines(file):
            where, first = f"{file}, line {line}", listed.partition("/")[0]
            if "\0" in listed:
                raise FolderError(f"{where}: holds a zero byte; save the list as UTF-8.")
            known = labels.get(first) if label is None else label
            if known is None:
                raise FolderError(f"{where}: {listed!r} has no label and lies in no class folder; write PATH LABEL.")
            if known >= len(classes):
                raise FolderError(f"{where}: label {known} is not one of the {len(classes)} classes; add classes.txt.")
            if named is None and classes[known] != first:
                raise FolderError(
                    f"{where}: label {known} is not the place of {first!r} among the sorted class folders; add classes.txt."
                )
            # A name that is too long is one of nothing; Path.exists and Path.is_dir raise for it.
            path = f"{split}/{listed}" if os.path.exists(root / split / listed) else listed  # noqa: PTH110  (does not raise)
            if os.path.isdir(root / path):  # noqa: PTH112  (does not raise)
                raise FolderError(f"{where}: {path!r} is a folder; list its files.")
            if hash(path) in seen:
                raise FolderError(f"{where}: {path!r} is listed twice; remove one of the lines.")
            seen.add(hash(path))
            found.add(path, known, number)
    if not found.files:
        raise FolderError(f"{lists['train']}: lists no image; write lines PATH LABEL.")
    return found.folder(classes, tuple(lists))


def _lines(file: Path) -> Iterator[tuple[int, str, int | None]]:
    """(line number, path, label or None) of each line of a list that is not empty."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            text = os.fsdecode(raw.removeprefix(BOM_UTF8 if number == 1 else b"").rstrip(b"\r\n"))
            path, *label = text.rsplit(maxsplit=1) or [""]
            if label and label[0].isascii() and label[0].isdigit():
                yield number, path, int(label[0])
            elif path:
                yield number, text, None
