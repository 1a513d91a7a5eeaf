"""Finds the images of a folder in class folders (like torchvision's ImageFolder), in split folders or in lists.

Stores files in arrays instead of objects, so that a million of them fit in memory.
"""

import logging
import os
import re
import stat
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import FolderError
from fastflower.files import blame_the_system
from fastflower.packing import layout
from fastflower.packing.again import packing
from fastflower.packing.columns import Columns
from fastflower.packing.containers import instead_of_images
from fastflower.packing.finder import Finder
from fastflower.packing.hidden import entries, ignoring, is_hidden, is_ignored
from fastflower.packing.labels import Labels
from fastflower.packing.listing import (
    SPLITS,
    Listing,
    OwnSplitError,
    Tables,
    classes_of,
    lists_of,
    splits_of,
    tables_naming,
    warn_of_other_readings,
)
from fastflower.packing.missing import no_class_folders, no_images
from fastflower.packing.names import is_image, plain_name, splits_named

_log = logging.getLogger("fastflower")

EMPTY_CLASS, LEFT_OUT = "is a class without training images", "is in a class without training images"

FILE_DTYPE = np.dtype(
    [
        ("path_end", "<u8"),  # in Folder.paths; the next path starts there
        ("label", "<i4"),
        ("split", "<i4"),  # position in Folder.splits; 0 if there are no splits
        ("size", "<u8"),  # bytes; 0 for a broken link
        ("mtime_ns", "<i8"),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Folder:
    """Classes and images of a folder, in the order of ImageFolder or of the lists."""

    root: Path
    """Folder that the paths are relative to."""
    classes: tuple[str, ...]
    splits: tuple[str, ...]
    """Names of the folder's own splits ("train", "val", "test"). Empty if the images are not yet split."""
    files: NDArray[np.void]
    """(N,) of FILE_DTYPE: files with an image extension, or listed files."""
    paths: NDArray[np.uint8]
    """Paths of the files as concatenated bytes."""
    ignored: tuple[tuple[str, str], ...] = ()
    """(path, reason) of each ignored file or folder."""

    def path(self, number: int) -> str:
        """Return the path of image `number` (0 .. N-1), relative to the root, with forward slashes."""
        start = int(self.files["path_end"][number - 1]) if number else 0
        return os.fsdecode(self.paths[start : int(self.files["path_end"][number])].tobytes())

    def image_at(self, position: int) -> int:
        """Return the number of the image whose path includes byte `position` of `paths`."""
        return int(np.searchsorted(self.files["path_end"], np.uint64(position), "right"))

    def __len__(self) -> int:
        return len(self.files)


_FILE = struct.Struct("<QiiQq")  # a row of FILE_DTYPE


@dataclass(slots=True)
class _Collector:
    """Collects the images of a folder. Each takes 32 bytes plus its path."""

    root: Path
    files: bytearray = field(default_factory=bytearray)
    paths: bytearray = field(default_factory=bytearray)
    ignored: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    hidden: int = 0
    """Number of hidden files."""

    def add(self, path: str, label: int, split: int, named: bool = True) -> None:
        """Add an image, or record why a file is ignored. A broken link is added, so that it is later reported as unreadable."""
        if is_ignored(f"{self.root}/{path}"):
            return
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
            suffix = re.search(r"\.\w{1,12}$", path, re.ASCII)
            self.ignored.append(
                (path, sys.intern(f"has no image extension{f' ({suffix[0].lower()})' if suffix else ''}"))
            )
            return
        self.paths += os.fsencode(path)
        self.files += _FILE.pack(len(self.paths), label, split, size, mtime_ns)

    def add_class(self, name: str, label: int, split: int) -> bool:
        """Add the files under root/name in ImageFolder's order: by folder, then name. Return whether there are any images."""
        before = len(self.files)
        for parent in self._folders(name):
            hidden = 0
            for file in sorted(os.listdir(self.root / parent)):  # noqa: PTH208  (names take less memory than paths)
                named = is_image(file)
                if not is_hidden(file):
                    self.add(f"{parent}/{file}", label, split, named=named)
                elif not is_ignored(f"{self.root}/{parent}/{file}"):
                    self.hidden += 1
                    hidden += named and not file.startswith("._")  # macOS adds such a file to each file
            if hidden:
                self.ignored.append((parent, f"holds hidden images ({hidden})"))
        return len(self.files) > before

    def _folders(self, name: str) -> list[str]:
        """Return root/name and all readable folders below it, sorted. Each appears once, even if links form a cycle."""
        seen: set[tuple[int, int]] = set()
        folders: list[str] = []
        pending, linked = [name], list[str]()
        while pending or linked:
            path = pending.pop() if pending else linked.pop()  # links last, to prefer a folder's real path
            try:
                status = (self.root / path).stat()
                if (status.st_dev, status.st_ino) in seen:
                    self.ignored.append((path, "links to a folder that was already read"))
                    continue
                below = [entry for entry in entries(self.root / path) if layout.is_folder(entry)]
            except OSError as error:
                blame_the_system(error, self.root / path)
                self.ignored.append((path, f"is a folder that cannot be read ({error.strerror})"))
                continue
            seen.add((status.st_dev, status.st_ino))
            folders.append(path)
            for entry in sorted(below, key=attrgetter("name"), reverse=True):
                (linked if entry.is_symlink() else pending).append(f"{path}/{entry.name}")
        return sorted(folders)

    def ignore_unlabeled(self, top: str) -> None:
        """Record the images of a split without class folders as ignored, and warn about them."""
        before = len(self.ignored)
        for parent in self._folders(top):
            self.ignore_strays(parent)
        if len(self.ignored) > before:
            what = "has no class folders, so its unlabeled images are skipped; classify them with `fastflower predict`"
            _log.warning("%s: %s", self.root / top, what)
        else:
            self.ignored.append((top, "is a folder without images"))

    def ignore_class(self, name: str) -> None:
        """Record the images of a class as ignored that has none for training."""
        for parent in self._folders(name):
            for file in sorted(entry.name for entry in entries(self.root / parent) if not layout.is_folder(entry)):
                if is_image(file):
                    self.ignored.append((f"{parent}/{file}", LEFT_OUT))

    def ignore_strays(self, folder: str) -> None:
        """Record images next to the class folders as ignored. Other files there are normal and not recorded."""
        for file in sorted(entry.name for entry in entries(self.root / folder)):
            path = os.path.normpath(f"{folder}/{file}")
            if is_image(file) and not (self.root / path).is_dir():
                self.ignored.append((path, "is not in a class folder"))

    def folder(self, classes: list[str], splits: tuple[str, ...]) -> Folder:
        """Return the collected images as a Folder."""
        files, paths = np.frombuffer(self.files, FILE_DTYPE), np.frombuffer(self.paths, np.uint8)
        return Folder(self.root, tuple(classes), splits, files, paths, tuple(self.ignored))


def scan(
    root: str | Path,
    tables: Tables | None = None,
    *,
    resplit: bool = False,
    ignore: Sequence[str] = (),
    drop_empty_classes: bool = False,
    as_split: str | None = None,
) -> Folder:
    """Find the images of a folder by name, without reading them. Without a table of labels, it has one of three layouts:

    - `root`/CLASS/**, as ImageFolder reads it;
    - `root`/train/CLASS/**, next to folders named after other splits, or one of those alone; a folder named after a split
      is never a class;
    - the lists train.txt and val.txt with lines "PATH LABEL", and classes.txt; each is in `root`/meta or in `root`.

    resplit  Whether the caller draws a new split from all images. If so, class folders may contain split folders.
    ignore  Patterns of files and folders to leave out, as for `pack`. Hidden and system names are images only in a list.
    drop_empty_classes  Whether class folders may have no images, or be in val or test only.
    as_split  The split that all images belong to. Raises OwnSplitError if the folder has splits of its own.

    Raises FolderError, with file and line if possible, if the folder fits none of these layouts or more than one, has
    only one class to train on, or has a class without images.
    """
    root, tables = Path(root), tables or Tables()
    try:
        with ignoring(root, ignore):
            folder = _scan(root, resplit or bool(tables.split), tables, drop_empty_classes)
            if tables.split:
                folder = _divided(folder, tables)
            if as_split and folder.splits not in ((), (as_split,)):
                what = f"omitted, because {root} has its own splits ({', '.join(folder.splits)})"
                raise OwnSplitError(f"as_split must be {what}, got {as_split!r}.")
            if as_split:
                folder = replace(folder, splits=(as_split,))
            if len(folder.classes) == 1 and "train" in (folder.splits or ("train",)):
                only = folder.classes[0]
                raise FolderError(f"{root}: has one class, {only!r}; a classifier needs at least two class folders.")
            if not (tables.split or tables.labels or lists_of(root)):
                warn_of_other_readings(root, folder.classes, folder.paths)
    except OSError as error:
        blame_the_system(error, error.filename or root)
        raise FolderError(f"{error.filename or root}: cannot be read ({error.strerror}); make it readable.") from error
    except FolderError as error:
        if instead := instead_of_images(root):
            raise FolderError(instead) from error
        lines = [] if tables.labels or tables.split or lists_of(root) else tables_naming(root)
        head, *rest = str(error).split("\n  ")
        first, last = (lines, []) if head.endswith("choose one:") else ([], lines)  # the likeliest reading
        raise FolderError("\n  ".join([head, *first, *rest, *last])) from error
    return folder


def _scan(root: Path, resplit: bool, tables: Tables, drop_empty: bool) -> Folder:
    if not root.is_dir():
        kind = "is one image" if is_image(root.name) else "is a file"
        what = kind if root.exists() else "does not exist"
        rule = "pass a folder that contains one folder of images per class, or a zip or tar archive of one"
        raise FolderError(f"{root}: {what}; {rule}.")
    if tables.labels:
        return _scan_lists(
            root, splits_of(root, tables.labels, "--labels"), tables.columns, table=True, drop_empty=drop_empty
        )
    if lists := lists_of(root):
        return _scan_lists(root, lists, Columns(), table=False, drop_empty=drop_empty)
    tops = layout.subfolders(root)
    if not tops:
        raise no_class_folders(root)
    named = splits_named(tops)
    if layout.are_splits(root, tops, named):
        places = layout.places_of_splits(root, named, tops)
        return _scan_splits(root, named, *places, drop_empty=drop_empty)
    layout.check_classes(root, tops, resplit)
    return _scan_classes(root, tops, drop_empty)


def _scan_lists(
    root: Path, lists: Mapping[Path, str | None], columns: Columns, *, table: bool, drop_empty: bool
) -> Folder:
    """Scan the images that lists or tables name. table  Whether they were passed as --labels.

    A table may label only the images of splits without class folders. The other splits are then read as class folders.
    """
    collector, classes = _Collector(root), classes_of(root)
    tops = splits_named(layout.subfolders(root))
    bases, bare = layout.partly_labeled(root, tops) if table else ({}, [])
    if bases and any(
        path.partition("/")[0] in bases
        for path, *_ in Listing(root, lists, columns, Finder(root, bare), Labels(classes, table=table), tops).quietly()
    ):
        bases, bare = {}, []  # the table labels all splits
    labels = Labels(classes, table=table)
    for top, base in bases.items():
        for name in layout.subfolders(root / base):
            number = labels.add(None, f"{name}/", tops[top], str(root / base / name))
            collector.add_class(f"{base}/{name}", number, SPLITS.index(tops[top]))
    finder = Finder(root, bare or (".",))
    listing, places = Listing(root, lists, columns, finder, labels, tops), {tops[top] for top in bases}
    for path, label, split in listing:
        collector.add(path, label, SPLITS.index(split) if split else 0)
        places.add(split or "")
    for path in listing.unlabeled:
        collector.ignored.append((path, "has no label"))
    if (unlisted := finder.count() - len(listing)) > 0:
        what = "images in %s are not in %s and are skipped"
        _log.warning(f"%d {what}", unlisted, root, ", ".join(map(str, lists)))
    splits = listing.ordered(places)
    if not collector.files:
        raise FolderError(f"{', '.join(map(str, lists))}: names only test images without a label; add training images.")
    order, codes = np.zeros(len(SPLITS), np.int32), [SPLITS.index(name) for name in splits]
    order[codes] = np.arange(len(splits))
    names, numbers, unknown = labels.classes(drop_empty=drop_empty)
    collector.ignored += [(name, EMPTY_CLASS) for name in unknown]
    folder = collector.folder(names, splits)
    folder.files["label"] = numbers[folder.files["label"]]
    folder.files["split"] = order[folder.files["split"]] if splits else 0
    return _selected(folder, folder.files["label"] >= 0, "has no training image in its class")


def _selected(folder: Folder, kept: NDArray[np.bool_], reason: str) -> Folder:
    """Return a folder with some of its images. The others are ignored for the given reason."""
    lengths = np.diff(folder.files["path_end"].astype(np.int64), prepend=0)
    files, paths = folder.files[kept], folder.paths[np.repeat(kept, lengths)]
    files["path_end"] = np.cumsum(lengths[kept])
    ignored = [(folder.path(number), reason) for number in np.flatnonzero(~kept).tolist()]
    return replace(folder, files=files, paths=paths, ignored=(*folder.ignored, *ignored))


def _divided(folder: Folder, tables: Tables) -> Folder:
    """Return a folder with the split that lists or tables give. Images that they do not name are ignored."""
    files = splits_of(folder.root, tables.split, "--split")
    columns = Columns(split=tables.columns.split) if tables.labels else tables.columns
    listing = Listing(folder.root, files, columns, Finder(folder.root), None)
    split_of = {path: split or "" for path, _, split in listing}
    splits = listing.ordered(set(split_of.values()))
    chosen = (split_of.get(folder.path(number)) for number in range(len(folder)))
    places = np.fromiter((splits.index(split) if split else -1 for split in chosen), np.int32, len(folder))
    names = ", ".join(file.name for file in files)
    divided = _selected(folder, places >= 0, f"is not in {names}")
    divided.files["split"] = places[places >= 0]
    return replace(divided, splits=splits)


def _scan_classes(root: Path, tops: list[str], drop_empty: bool) -> Folder:
    collector = _Collector(root)
    empty = [name for label, name in enumerate(tops) if not collector.add_class(name, label, 0)]
    if len(empty) == len(tops) - 1:
        layout.refuse_wrapper(root, *(top for top in tops if top not in empty))
    enough = len(tops) - len(empty) >= 2
    if empty and not (drop_empty and enough):
        raise no_images(root, empty[0], enough)
    collector.ignore_strays(".")
    return collector.folder(tops, ())


def _scan_splits(
    root: Path, named: dict[str, str], bases: dict[str, str], unlabeled: list[str], *, drop_empty: bool
) -> Folder:
    """Scan the splits. bases  Parent of the class folders of each labeled split, train first."""
    collector = _Collector(root)
    train, *_ = bases.values()
    classes, unknown = layout.subfolders(root / train), set[str]()
    if len(classes) == 1:
        layout.refuse_wrapper(root / train, classes[0])
    for number, base in enumerate(bases.values()):
        for name in layout.subfolders(root / base):
            place = root / base / name
            if name not in classes and drop_empty:
                collector.ignore_class(f"{base}/{name}")
                unknown.add(name)
                continue
            if name not in classes:
                what = f"is not a class in {root / train}"
                if plain_name(name) and (
                    similar := [known for known in classes if plain_name(known) == plain_name(name)]
                ):
                    what += f", but differs from {similar[0]!r} only in case, spaces, punctuation or Unicode form; rename it"
                    raise FolderError(f"{place}: {what}.")
                remedy = f"add the class there, or leave it out:\n  {packing({'drop_empty_classes': True})}"
                raise FolderError(f"{place}: {what}; {remedy}")
            full = collector.add_class(f"{base}/{name}", classes.index(name), number)
            if not full and base == train and not drop_empty:
                raise no_images(root, f"{base}/{name}", len(classes) > 2)
    collector.ignored += [(name, EMPTY_CLASS) for name in sorted(unknown)]
    for folder in (".", *bases.values()):
        collector.ignore_strays(folder)
    for top in sorted({*named, *unlabeled} - bases.keys()):
        collector.ignore_unlabeled(top)
    splits = tuple(named[top] for top in bases)
    return collector.folder(classes, () if splits == ("train",) else splits)


def images_in(root: Path) -> Folder:
    """Find the images in a folder and all folders below it, in ImageFolder's order. `ignored` has all other files."""
    collector = _Collector(root)
    collector.add_class(".", 0, 0)
    collector.ignored = [item for item in collector.ignored if not item[1].startswith("holds hidden images")]
    collector.ignored += [(".", "is hidden or added by a system")] * collector.hidden
    return collector.folder([], ())
