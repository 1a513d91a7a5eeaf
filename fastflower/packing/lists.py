"""Reads files that name images: lists with lines "PATH LABEL" or "CLASS/FILE", and tables (CSV, TSV, JSON lines)."""

import csv
import json
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from fastflower.errors import FolderError

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
_JSON = (".jsonl", ".ndjson")

# Names of columns, in lower case and without punctuation, the likeliest first. Kaggle, Hugging Face and torchvision use these.
_PATHS = (
    *("path", "filepath", "imagepath", "imgpath", "file", "filename", "imagefile", "imagefilename", "imagename", "imgname"),
    *("image", "imageid", "img", "imgid", "idcode", "id"),
)  # fmt: skip
_LABELS = ("label", "labels", "class", "classname", "classid", "category", "categoryid", "target")
_SPLITS = ("split", "subset", "partition")

_NUMBERED = re.compile(r"(.*[^\s,;])[\s,;]+(\d+)\s*")
_AFTER_EXTENSION = re.compile(r"(.*\.(?:jpe?g|png|ppm|bmp|pgm|tiff?|webp|gif))[\s,;]+(\S.*)", re.IGNORECASE)
_FIRST_WORD = re.compile(r"([^\s,;]+)[\s,;]+(\S.*)")


class Columns(NamedTuple):
    """Names of a table's columns, or their numbers from 1. None: known by their usual names."""

    path: str | None = None
    label: str | None = None
    split: str | None = None


class Row(NamedTuple):
    """One image of a list or table."""

    where: str
    """For messages: file and line."""
    readings: Sequence[tuple[str, str | None]]
    """Possible pairs of path and label, the likeliest first. A label of None is the class folder in the path."""
    split: str | None


Exists = Callable[[str], object]
"""Returns a true value for a path that names an image."""


def rows(file: Path, columns: Columns, exists: Exists, *, labels: bool = True) -> Iterator[Row]:
    """Yield the rows of a list or table. Raises FolderError, with file and line, if one cannot be read.

    labels  Whether a table must have a column of labels.
    """
    if file.suffix.lower() in _JSON:
        yield from _json_rows(file, columns, labels)
        return
    first = next((text for _, text in read_lines(file)), "")
    delimiter = next((mark for mark in "\t,;" if mark in first), None)
    cells = _cells(first, delimiter)
    if len(cells) > 1 and any(_known(cell) or cell in columns for cell in cells) and not any(map(exists, cells)):
        yield from _table_rows(file, delimiter, _places(file, cells, columns, labels), header=True)
    elif columns.path or columns.label or (delimiter and file.suffix.lower() in TABLES):
        path = next((str(number) for number, cell in enumerate(cells, 1) if exists(cell)), "1")
        names = list(map(str, range(1, len(cells) + 1)))
        places = _places(file, names, columns._replace(path=columns.path or path), labels)
        yield from _table_rows(file, delimiter, places, header=False)
    else:
        for line, text in read_lines(file):
            yield Row(f"{file}, line {line}", list(_readings(text)), None)


def usual_columns(file: Path) -> Columns | None:
    """Return the columns of a table with a column of paths, or None if the file is no such table.

    If no column has a usual name for labels, the label column is the last one.
    """
    if file.suffix.lower() not in TABLES or not file.is_file():
        return None
    _, first = next(read_lines(file), (0, ""))
    if file.suffix.lower() in _JSON:
        names = list(_record(str(file), first))
    else:
        names = _cells(first, next((mark for mark in "\t,;" if mark in first), None))
    if not any(_normal(name) in _PATHS for name in names):
        return None
    usual = len(names) == 2 or sum(_normal(name) in _LABELS for name in names) == 1
    return Columns() if usual else Columns(label=names[-1])


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of each line that is not blank. Reads UTF-8 and UTF-16; keeps other bytes as paths do."""
    try:
        with file.open(encoding=_encoding(file), errors="surrogateescape") as stream:
            for number, line in enumerate(stream, 1):
                if "\0" in line:
                    raise FolderError(f"{file}, line {number}: contains a null byte; save the file as UTF-8.")
                if not line.isspace():
                    yield number, line.rstrip("\r\n")
    except UnicodeError:
        raise FolderError(f"{file}: is not valid UTF-16; save it as UTF-8.") from None


def _encoding(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(4)
    if start[:2] in (BOM_UTF16_LE, BOM_UTF16_BE):
        return "utf-16"
    without_bom = {b"\0": "utf-16-be"}.get(start[:1]) or {b"\0": "utf-16-le"}.get(start[1:2])
    return without_bom or "utf-8-sig"


def _readings(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield the ways to divide a line of a list into path and label: the file system tells which one is meant."""
    if match := _NUMBERED.fullmatch(text):
        yield match[1], match[2]
    yield text, None
    text = text.strip()
    yield text, None
    for pattern in (_AFTER_EXTENSION, _FIRST_WORD):
        if match := pattern.fullmatch(text):
            yield match[1], match[2]


def _cells(text: str, delimiter: str | None) -> list[str]:
    return (
        text.split() if delimiter is None else [cell.strip() for cell in next(csv.reader([text], delimiter=delimiter))]
    )


def _table_rows(file: Path, delimiter: str | None, places: Sequence[int | None], header: bool) -> Iterator[Row]:
    """Yield the rows of a table. places  Positions of the columns of paths, labels and splits."""
    with file.open(encoding=_encoding(file), errors="surrogateescape", newline="" if delimiter else None) as stream:
        reader = csv.reader(stream, delimiter=delimiter) if delimiter else (line.split() for line in stream)
        try:
            for number, cells in enumerate(reader, 1):
                if not any(map(str.strip, cells)) or (header and number == 1):
                    continue
                where = f"{file}, line {getattr(reader, 'line_num', number)}"
                if len(cells) <= max(place or 0 for place in places):
                    raise FolderError(f"{where}: has {len(cells)} columns, fewer than the first line; correct it.")
                path, label, split = (None if place is None else cells[place].strip() for place in places)
                yield Row(where, [(path or "", label)], split)
        except csv.Error as error:
            raise FolderError(
                f"{file}, line {getattr(reader, 'line_num', 0)}: is not CSV ({error}); correct it."
            ) from None


def _json_rows(file: Path, columns: Columns, labels: bool) -> Iterator[Row]:
    places = None
    for number, text in read_lines(file):
        where = f"{file}, line {number}"
        record = _record(where, text)
        if places is None:
            names = list(record)
            places = [None if place is None else names[place] for place in _places(file, names, columns, labels)]
        path, label, split = (None if name is None else _text(record.get(name)) for name in places)
        yield Row(where, [(path or "", label)], split)


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _record(where: str, text: str) -> dict[str, object]:
    try:
        record: object = json.loads(text)
    except ValueError as error:
        raise FolderError(f"{where}: is not JSON ({error}); write one object per line.") from None
    if not isinstance(record, dict):
        raise FolderError(f"{where}: is not a JSON object; write one object per line.")
    return {str(name): value for name, value in cast(dict[object, object], record).items()}


def _places(file: Path, names: Sequence[str], columns: Columns, labels: bool) -> tuple[int, int | None, int | None]:
    """Return the positions of the columns of paths, labels and splits. A table without labels has class folders in its paths."""
    path = _place(file, names, columns.path, _PATHS, "path")
    split = _place(file, names, columns.split, _SPLITS, "split")
    label = _place(file, names, columns.label, _LABELS, "label")
    if path is None:
        known = ", ".join(map(repr, names[:20]))
        raise FolderError(f"{file}: has no column of paths among {known}; name it with --path-column.")
    rest = [place for place in range(len(names)) if place not in (path, split)]
    if label is None and rest and (labels or len(rest) == 1):
        if len(rest) > 1:
            known = ", ".join(repr(names[place]) for place in rest[:20])
            raise FolderError(
                f"{file}: has no column named 'label' or 'class'; choose one with --label-column: {known}."
            )
        label = rest[0]
    return path, label, split


def _place(file: Path, names: Sequence[str], asked: str | None, known: Sequence[str], kind: str) -> int | None:
    """Return the position of the column `asked`, or of the one with a usual name, or None if there is none."""
    if asked is not None:
        if asked in names:
            return names.index(asked)
        if asked.isdecimal() and 1 <= int(asked) <= len(names):
            return int(asked) - 1
        choices = ", ".join(map(repr, names[:20]))
        raise FolderError(f"{file}: has no column {asked!r}; choose --{kind}-column from {choices}.")
    places = sorted((known.index(name), place) for place, name in enumerate(map(_normal, names)) if name in known)
    if kind == "label" and len(places) > 1:
        choices = ", ".join(repr(names[place]) for _, place in places)
        raise FolderError(f"{file}: has more than one column of labels; choose one with --label-column: {choices}.")
    return places[0][1] if places else None


def _normal(name: object) -> str:
    return re.sub(r"[\W_]", "", str(name).lower())


def _known(name: str) -> bool:
    return _normal(name) in (*_PATHS, *_LABELS, *_SPLITS)
