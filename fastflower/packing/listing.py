"""Matches the rows of lists and tables with the images of a folder."""

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import ArgumentError, FolderError
from fastflower.packing import layout
from fastflower.packing.again import packing, quoted, with_data
from fastflower.packing.columns import Columns
from fastflower.packing.containers import unread
from fastflower.packing.finder import Finder, Found
from fastflower.packing.hidden import is_ignored, patterns_ignored
from fastflower.packing.labels import Labels, read_classes
from fastflower.packing.lists import LISTS, Row, neighbors, rows, usual_table
from fastflower.packing.names import is_image, split_in
from fastflower.packing.text import read_lines
from fastflower.suggestions import command_typed

_log = logging.getLogger("fastflower")

SPLITS = ("train", "val", "test")
_MOST_NAMES = 3  # missing images per message
_PLACES = ("annotations", "splits", "split", "lists", "labels", "ImageSets/Main")  # where lists lie beside images
_MOST_ROWS = 100_000  # counted of a table beside the images
_FEW_ROWS = 50  # that decide whether it names these images


class Tables(NamedTuple):
    """Files that name the images of a folder."""

    labels: Sequence[Path] = ()
    """Tables or lists of images and labels."""
    split: Sequence[Path] = ()
    """Tables or lists that assign images to splits."""
    columns: Columns = Columns()


class OwnSplitError(ArgumentError):
    """Raised if all images are to be in one split, but the folder has splits of its own."""


def lists_of(root: Path) -> dict[Path, str | None]:
    """Return the lists of a folder with their splits, or an empty dict if there is no train.txt."""
    files = {path: split for split in SPLITS if (path := _file(root, f"{split}.txt"))}
    return dict(files) if "train" in files.values() else {}


def classes_of(root: Path) -> list[str] | None:
    """Return the classes in classes.txt, or None if a folder has no such file."""
    file = _file(root, "classes.txt")
    return None if file is None else read_classes(file)


def _file(root: Path, name: str) -> Path | None:
    """Return root/meta/NAME if it exists, else root/NAME, or None if neither exists."""
    paths = (root / "meta" / name, root / name)
    return next((path for path in paths if path.is_file() and not is_ignored(str(path))), None)


def splits_of(root: Path, files: Sequence[Path], option: str) -> dict[Path, str | None]:
    """Map files passed to an option to the splits that they are named after (train.csv) or in (train/metadata.csv).

    A file that does not exist may be in the folder to pack.
    """
    files = [file if file.exists() or not (root / file).exists() else root / file for file in files]
    for file in files:
        if not file.is_file():
            raise FolderError(f"{file}: is not a file; pass a list or a table (CSV, TSV, JSON lines) with {option}.")
    if len(files) == 1:
        return {files[0]: None}
    for names in ([file.stem for file in files], [file.parent.name for file in files]):
        splits = [split_in(name) for name in names]
        if None not in splits and len(set(splits)) == len(files):
            return dict(sorted(zip(files, splits, strict=True), key=lambda item: SPLITS.index(item[1] or "")))
    what = "several files must be named after their splits, such as train.csv and val.csv"
    raise FolderError(
        f"{option} {', '.join(map(str, files))}: {what}; rename them, or write one table with a column 'split'."
    )


class Listing:
    """Images that lists or tables name: yields (path, number of the label, split or None) for each.

    lists  Files, with the split that each is for. labels  Numbers the labels. None: the files name splits, not labels.
    tops  Splits by the names of the subfolders that stand for them.
    """

    def __init__(
        self,
        root: Path,
        lists: Mapping[Path, str | None],
        columns: Columns,
        finder: Finder,
        labels: Labels | None,
        tops: Mapping[str, str] | None = None,
    ) -> None:
        self._root, self._lists, self._columns = root, lists, columns
        self._finder, self._labels, self._tops = finder, labels, tops or {}
        self._seen: dict[int, int] = {}  # numbers of labels by the hash of the path; paths would take too much memory
        self._images = 0
        self._missing: list[str] = []
        self._divides = labels is None  # or a row names a split
        self.unlabeled: list[str] = []
        """Paths of test images without a label."""

    def __len__(self) -> int:
        """Return the number of images, without missing ones."""
        return self._images

    def __iter__(self) -> Iterator[tuple[str, int, str | None]]:
        yield from self.quietly()
        self._report()

    def quietly(self) -> Iterator[tuple[str, int, str | None]]:
        """Yield the images without a word about missing ones."""
        for file, split in self._lists.items():
            alone = split or split_in(file.stem)  # whose folder to prefer
            find = partial(self._finder.find, bases=self._bases(file, split))
            for row in self._rows(file, split, find):
                named, missing = _split_named(row.where, row.split), len(self._missing)
                (path, listed), label = self._chosen(
                    row, partial(find, split=named or alone, strict=bool(named or split))
                )
                if is_ignored(f"{self._root}/{path}"):
                    continue
                self._divides |= row.split is not None
                if self._labels is None:
                    place = named or split or _split_named(row.where, label)
                    number = SPLITS.index(place) if place else -1
                else:
                    place = named or split or self._tops.get(path.partition("/")[0])
                    unlabeled = label == "" or (label is None and place == "test" and "/" not in listed)
                    if unlabeled and place != "test":
                        raise FolderError(f"{row.where}: {path!r} has no label; add it, or remove the line.")
                    number = -1 if unlabeled else self._labels.add(label, listed, place, row.where, path)
                if self._is_new(row.where, path, number):
                    self._images += missing == len(self._missing)
                    if self._labels is not None and number < 0:
                        self.unlabeled.append(path)
                    else:
                        yield path, max(number, 0), place

    def _rows(self, file: Path, split: str | None, find: "partial[Found | None]") -> Iterator[Row]:
        first = next((text.strip() for _, text in read_lines(file)), "")
        labels = list(read_lines(file)) if first and not re.search(r"[\s,;{\[.]", first) and not find(first) else []
        if not labels or split == "test" or self._columns != Columns() or self._labels is None:
            needed = None if split == "test" else self._labels is not None
            yield from rows(file, self._columns, partial(_exists, find), labels=needed)
            return
        images = self._finder.flat()
        if len(images) != len(labels) or len({label for _, label in labels}) == len(labels):
            what = f"its {len(labels)} lines name no images, and are not one label for each of the {len(images)} images"
            raise FolderError(f"{file}: {what} in {self._root}; write one line 'PATH LABEL' per image.")
        if images != sorted(images, key=_natural):
            what = "has one label per line, but the images have another order by name than by number (1, 10, 2)"
            raise FolderError(f"{file}: {what}; write lines 'PATH LABEL'.")
        for path, (line, label) in zip(images, labels, strict=True):
            yield Row(f"{file}, line {line}", [(path, label.strip())], None)

    def _bases(self, file: Path, split: str | None) -> list[str]:
        inside = file.absolute().is_relative_to(self._root.absolute())
        beside = [str(file.absolute().parent.relative_to(self._root.absolute()))] if inside else []
        return [*([split] if split else []), *beside]

    def _chosen(self, row: Row, find: "partial[Found | None]") -> tuple[Found, str | None]:
        """Return the reading of a row whose image exists. If none does, return the likeliest and record that it is missing."""
        readings: list[tuple[str, str | None]] = []
        try:
            for path, label in row.readings:
                readings.append((path, label))
                if "\0" not in path and (found := find(path)):
                    return found, label
        except FolderError as error:
            raise FolderError(f"{row.where}: {error}") from None
        whole = next((path for path, label in readings if label is None), "")
        likely = (reading for reading in readings if reading[1] and (is_image(reading[0]) or reading[1].isdecimal()))
        path, label = (whole, None) if is_image(whole) else next(likely, readings[0])
        self._missing.append(f"{row.where.rpartition('/')[2]}: {path!r}")
        return Found(path, path), label

    def _is_new(self, where: str, path: str, number: int) -> bool:
        """Return whether a path is listed for the first time. Raises FolderError if it is a folder or has two labels."""
        if path in ("", "."):
            raise FolderError(f"{where}: has no path; add it, or remove the line.")
        if os.path.isdir(f"{self._root}/{path}"):  # noqa: PTH112  (Path.is_dir raises if a name is too long)
            raise FolderError(f"{where}: {path!r} is a folder; list its files.")
        new = hash(path) not in self._seen
        if self._seen.setdefault(hash(path), number) != number:
            raise FolderError(f"{where}: {path!r} is listed twice; remove one of the lines.")
        return new

    def ordered(self, splits: Collection[str]) -> tuple[str, ...]:
        """Return the names of splits, train first, or () if the images are not yet split.

        splits  The splits of all images; "" if an image has none.
        """
        files = ", ".join(map(str, self._lists))
        names = tuple(name for name in SPLITS if name in splits or name in self._lists.values())
        if not names or (len(names) == len(splits) == 1 and not any(self._lists.values()) and not self._divides):
            return ()
        if "" in splits:
            raise FolderError(f"{files}: some images are in no split; add a column 'split' with train, val or test.")
        if "train" not in names:
            raise FolderError(f"{files}: names images only for {', '.join(names)}; add those of the train split.")
        return names

    def _report(self) -> None:
        """Name missing images before anything is decoded. Raises FolderError if there is no image at all."""
        files = ", ".join(map(str, self._lists))
        if not self._seen:
            raise FolderError(f"{next(iter(self._lists))}: lists no images; write one line 'PATH LABEL' per image.")
        few = "; ".join(self._missing[:_MOST_NAMES]) + ("; ..." if len(self._missing) > _MOST_NAMES else "")
        if not self._images:
            names = "; ".join(self._missing[:1])
            what = f"none of its {len(self._seen)} lines names an image in {self._root} ({names})"
            remedy = "correct the paths, or pass the folder that they start from"
            if all(file.name == f"{split}.txt" for file, split in self._lists.items()):
                remedy += f"; if {files} is not a list of images, rename it"
            raise FolderError(f"{files}: {what}; {remedy}.")
        if self._missing:
            count = len(self._missing)
            what = "do not exist" + (" or are ignored" if patterns_ignored() else "")
            _log.warning("%s: %d of %d listed images %s: %s", files, count, len(self._seen), what, few)
        if self.unlabeled:
            what = "test images without a label are skipped; classify them with `fastflower predict`"
            _log.warning("%s: %d %s", files, len(self.unlabeled), what)


def _exists(find: Callable[[str], Found | None], path: str) -> bool:
    """Return whether a path names an image, or more than one."""
    try:
        return find(path) is not None
    except FolderError:
        return True


def _natural(path: str) -> list[str | int]:
    """Return a key that sorts "2.jpg" before "10.jpg"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def _split_named(where: str, word: str | None) -> str | None:
    """Return the split that a word denotes. Raises FolderError if it is not the name of a split."""
    if word is None:
        return None
    split = split_in(word)
    if split is None:
        raise FolderError(f"{where}: {word!r} is not a split; write train, val or test.")
    return split


def with_neighbors(table: Path, columns: Columns, *, divided: bool) -> list[Path]:
    """Return a list or table, and those for other splits beside it that name labeled images, or warn that they are not read.

    divided  Whether the images keep the split that the files give.
    """
    found, finder = neighbors(table), Finder(table.parent)
    usable = [file for file in found if _names_labeled(file, columns, finder)]
    if not found or usable[:1] != found[:1]:
        for other in found[:1]:
            _log.warning("%s: %s is not read, because it names no images of this folder with labels", table, other)
        return [table]
    files = [table, *usable]
    if divided:
        what = " and ".join(f"{file.name} (its {split_in(file.stem)} split)" for file in usable)
        _log.info("%s: is packed together with %s", table, what)
        return files
    other = dict.fromkeys(("split_by", "val_fraction", "test_fraction", "folds", "as_split"))
    command = packing({"labels": files, **other}, source=table.parent, goes_on=True)
    others = " and ".join(map(str, usable))
    _log.warning("%s: %s %s not read; to pack all:\n  %s", table, others, "are" if usable[1:] else "is", command)
    return [table]


def _names_labeled(file: Path, columns: Columns, finder: Finder) -> bool:
    find = partial(_exists, partial(finder.find, split=split_in(file.stem)))
    with suppress(FolderError, OSError):
        sample = islice(rows(file, columns, find), _FEW_ROWS)
        return any(find(path) for row in sample for path, _ in row.readings)
    return False


def tables_naming(root: Path) -> list[str]:
    """Return a line for each table or list in or beside a folder that names images of it, with the command that packs them."""
    finder = Finder(root)
    places = [root, *(root / name for name in _PLACES), *root.glob("*/metadata.*"), root.parent]
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.glob("*")))]
    counts: dict[Path, int] = {}
    options: dict[Path, dict[str, object]] = {}
    for file in files if root.is_dir() else ():
        with suppress(FolderError, OSError):  # it is not a table that names images
            find = partial(_exists, partial(finder.find, split=split_in(file.stem)))
            if not _lists_splits(file) and not usual_table(file):
                continue
            sample = list(islice(rows(file, Columns(), find, labels=None), _FEW_ROWS))
            if not any(find(path) for row in sample for path, _ in row.readings):
                continue
            options[file] = {"labels": [file]}
            try:
                next(rows(file, Columns(), find))
            except FolderError:  # it has several columns that may be labels
                options[file]["label_column"] = "COLUMN"
            named = islice(rows(file, Columns(), find, labels=None), _MOST_ROWS)
            counts[file] = sum(any(find(path) for path, _ in row.readings) for row in named)
    splits = [split_in(file.stem) for file in counts]
    if "train" in splits and None not in splits and len(set(splits)) == len(splits) > 1:
        what = f"{' and '.join(file.name for file in counts)} name {sum(counts.values()):,} of these images"
        return [f"{what}: {packing({'labels': [*counts]}, source=root, shell=True)}"]
    return [
        f"{file.name} names {count:,}{' or more' if count == _MOST_ROWS else ''} of these images: "
        f"{_with_table(root, options[file], file)}"
        for file, count in sorted(counts.items(), key=lambda item: -item[1])
    ]


def _with_table(root: Path, options: dict[str, object], file: Path) -> str:
    """Return what to type to use a table. All commands but `pack` take one in place of its folder, but no options."""
    alone = command_typed() not in ("", "pack") and file.parent == root and len(options) == 1
    return with_data(file) if alone else packing(options, source=root, shell=True)


def _lists_splits(file: Path) -> bool:
    """Return whether a file is named like a list of a split: train_list.txt, val.lst."""
    return file.suffix.lower() in LISTS and split_in(file.stem) is not None and file.is_file()


def _unused(root: Path) -> Iterator[str]:
    """Yield a remark for each table or list in a folder that names images of its class folders, but is not used."""
    finder = Finder(root)
    find = partial(_exists, finder.find)
    for file in sorted(root.glob("*")):
        with suppress(FolderError, OSError):
            if _lists_splits(file) or usual_table(file):
                sample = list(islice(rows(file, Columns(), find, labels=None), _FEW_ROWS))
                named = sum(any(find(path) for path, _ in row.readings) for row in sample)
                if named and 2 * named >= len(sample):
                    option = {"split" if split_in(file.stem) else "labels": [file]}
                    what = f"{file.name} names images of this folder, but is not used; to use it"
                    yield f"{what}:\n  {packing(option, goes_on=True)}"


def warn_of_other_readings(root: Path, classes: Sequence[str], paths: NDArray[np.uint8]) -> None:
    """Warn about files and folders that suggest other labels or splits than those of the class folders.

    paths  Paths of the images as concatenated bytes.
    """
    for remark in (*_unused(root), *unread(root)):
        _log.warning("%s: %s", root, remark)
    if masks := len(re.findall(rb"[^/]_mask(?:_\d+)?\.(?:png|jpg|bmp|tif)", paths.data)):
        what = "images have names like masks; to leave them out"
        _log.warning("%s: %d %s:\n  %s", root, masks, what, packing({"ignore": ["*_mask*"]}, goes_on=True))
    plain = all((root / name).is_dir() for name in classes)
    shared = layout.shared_folders(root, classes) if plain else []
    if len(shared) > 1:
        command = (
            f"(cd {quoted(root)} && find -L */ -type f | sed -E 's|^[^/]+/([^/]+)/.*|&,\\1|') > labels.csv && "
            f"{packing({'labels': ['labels.csv']}, source=root, shell=True, goes_on=True)}"
        )
        what = f"each class has the folders {', '.join(map(repr, shared[:6]))}; if these are the classes: {command}"
        _log.warning("%s: %s", root, what)
