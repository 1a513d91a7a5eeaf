"""Matches the rows of lists and tables with the images of a folder."""

import logging
import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from fastflower.errors import FolderError
from fastflower.packing.finder import Finder, Found
from fastflower.packing.hidden import is_ignored, patterns_ignored
from fastflower.packing.labels import Labels, read_classes
from fastflower.packing.lists import Columns, Row, read_lines, rows, usual_columns
from fastflower.packing.names import split_in

_log = logging.getLogger("fastflower")

SPLITS = ("train", "val", "test")
_MOST_NAMES = 3  # missing images per message


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
        splits = [split_in(name.replace("trainval", "train")) for name in names]
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
        self._seen: set[int] = set()  # 64-bit hashes: a million paths would take too much memory
        self._missing: list[str] = []
        self._divides = labels is None  # or a row names a split
        self.unlabeled: list[str] = []
        """Paths of test images without a label."""

    def __len__(self) -> int:
        return len(self._seen)

    def __iter__(self) -> Iterator[tuple[str, int, str | None]]:
        for file, split in self._lists.items():
            find = partial(self._find, bases=self._bases(file, split))
            for row in self._rows(file, find):
                (path, listed), label = _chosen(row, find, self._missing)
                if is_ignored(f"{self._root}/{path}"):
                    continue
                self._check(row.where, path)
                self._divides |= row.split is not None
                if self._labels is None:
                    yield path, 0, _split_named(row.where, row.split or label) or split
                    continue
                place = _split_named(row.where, row.split) or split or self._tops.get(path.partition("/")[0])
                if label != "":
                    yield path, self._labels.add(label, listed, place, row.where), place
                elif place == "test":
                    self.unlabeled.append(path)
                else:
                    raise FolderError(f"{row.where}: {path!r} has no label; add it, or remove the line.")
        self._report()

    def _rows(self, file: Path, find: "partial[Found | None]") -> Iterator[Row]:
        first = next((text.strip() for _, text in read_lines(file)), "")
        single = first and not any(mark in first for mark in " \t,;{.")
        if not single or self._columns != Columns() or find(first):
            yield from rows(file, self._columns, partial(_exists, find), labels=self._labels is not None)
            return
        images = self._finder.flat()
        labels = list(read_lines(file))
        if len(images) != len(labels) or len({label for _, label in labels}) == len(labels):
            what = f"its {len(labels)} lines name no images, and are not one label for each of the {len(images)} images"
            raise FolderError(f"{file}: {what} in {self._root}; write one line 'PATH LABEL' per image.")
        for path, (line, label) in zip(images, labels, strict=True):
            yield Row(f"{file}, line {line}", [(path, label.strip())], None)

    def _find(self, path: str, bases: Sequence[str]) -> Found | None:
        return self._finder.find(path, bases)

    def _bases(self, file: Path, split: str | None) -> list[str]:
        inside = file.absolute().is_relative_to(self._root.absolute())
        beside = [str(file.absolute().parent.relative_to(self._root.absolute()))] if inside else []
        return [*([split] if split else []), *beside]

    def _check(self, where: str, path: str) -> None:
        if os.path.isdir(self._root / path):  # noqa: PTH112  (Path.is_dir raises if a name is too long)
            raise FolderError(f"{where}: {path!r} is a folder; list its files.")
        if hash(path) in self._seen:
            raise FolderError(f"{where}: {path!r} is listed twice; remove one of the lines.")
        self._seen.add(hash(path))

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
        if len(self._missing) == len(self._seen):
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


def _exists(find: "partial[Found | None]", path: str) -> bool:
    """Return whether a path names an image, or more than one."""
    try:
        return find(path) is not None
    except FolderError:
        return True


def _chosen(row: Row, find: "partial[Found | None]", missing: list[str]) -> tuple[Found, str | None]:
    """Return the reading of a row whose image exists. If none does, return the likeliest and record that it is missing."""
    try:
        for path, label in row.readings:
            if "\0" not in path and (found := find(path)):
                return found, label
    except FolderError as error:
        raise FolderError(f"{row.where}: {error}") from None
    path, label = row.readings[0]
    missing.append(f"{row.where.rpartition('/')[2]}: {path!r}")
    return Found(path, path), label


def _split_named(where: str, word: str | None) -> str | None:
    """Return the split that a word denotes. Raises FolderError if it is not the name of a split."""
    if word is None:
        return None
    split = split_in(word)
    if split is None:
        raise FolderError(f"{where}: {word!r} is not a split; write train, val or test.")
    return split


def tables_naming(root: Path) -> list[str]:
    """Return a line for each table in or beside a folder that names images of it, with the command that packs them."""
    lines: list[str] = []
    finder = Finder(root)
    tables = [*sorted(root.glob("*")), *sorted(root.glob("*/metadata.*")), *sorted(root.parent.glob("*"))]
    for table in tables if root.is_dir() else ():
        try:
            columns = usual_columns(table)
            paths = (row.readings[0][0] for row in rows(table, columns, finder.find)) if columns else ()
            count = sum(finder.find(path) is not None for path in paths)
        except (FolderError, OSError):  # it is not a table that names images
            continue
        if count:
            option = " --label-column COLUMN" if columns != Columns() else ""
            command = f"fastflower pack {shlex.quote(str(root))} --labels {shlex.quote(str(table))}{option}"
            lines.append(f"{table.name} names {count:,} of these images: {command}")
    return lines
