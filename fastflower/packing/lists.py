"""Reads files that name images: lists with lines "PATH LABEL" or "CLASS/FILE", and tables (CSV, TSV, JSON)."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from fastflower.errors import FolderError
from fastflower.packing.advice import is_file
from fastflower.packing.again import packing
from fastflower.packing.columns import Columns, Places, is_usual, places_of
from fastflower.packing.names import is_image, split_in
from fastflower.packing.text import encoding_of, read_lines, read_records

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
LISTS = (".txt", ".lst")
_SAMPLE = 100  # lines that decide how a file is read
_MOST_JSON = 1 << 26  # bytes of a JSON file that is read whole only to see whether it is a table

_NUMBERED = re.compile(r"(.*[^\s,;])[\s,;]+(\d+)\s*")
_AFTER_EXTENSION = re.compile(r"(.*\.(?:jpe?g|png|ppm|bmp|pgm|tiff?|webp|gif))[\s,;]+(\S.*)", re.IGNORECASE)
_BEFORE_IMAGE = re.compile(r"([^\s,;]+)[\s,;]+(\S.*\.(?:jpe?g|png|ppm|bmp|pgm|tiff?|webp|gif))", re.IGNORECASE)
_FIRST_WORD = re.compile(r"([^\s,;]+)[\s,;]+(\S.*)")

Exists = Callable[[str], bool]
"""Returns whether a path names an image."""


def is_table(path: Path) -> bool:
    """Return whether a path is a file that is named like a table or list."""
    return is_file(path) and path.name.lower().endswith((*TABLES, *LISTS))


def neighbors(table: Path) -> list[Path]:
    """Return the files beside a list or table of the train split that are named like it for val, and for test if val has one."""
    if split_in(table.stem) != "train":
        return []
    found: list[Path] = []
    for words in (("val", "valid", "validation"), ("test",)):
        files = [table.with_name(re.sub("train", word, table.name, flags=re.IGNORECASE)) for word in words]
        found += [file for file in files if file != table and is_file(file)][:1]
    return found if any(split_in(file.stem) == "val" for file in found) else []


class Row(NamedTuple):
    """One image of a list or table."""

    where: str
    """For messages: file and line."""
    readings: Iterable[tuple[str, str | None]]
    """Possible pairs of path and label, the likeliest first; to be read once. A label of None is the class folder in the path."""
    split: str | None


def rows(file: Path, columns: Columns, exists: Exists, *, labels: bool | None = True) -> Iterator[Row]:
    """Yield the rows of a list or table. Raises FolderError, with file and line, if one cannot be read.

    labels  Whether a table must have a column of labels. None: only a column with a common name holds labels.
    """
    if (records := read_records(file)) is not None:
        yield from _records(file, records, columns, exists, labels)
        return
    head = list(islice(read_lines(file), _SAMPLE))
    while head and _is_comment(head[0][1]):
        head = head[1:]
    if not head:
        return
    delimiter = _delimiter(file, head, columns, exists)
    cells = [_cells(text, delimiter) for _, text in head]
    header = not any(map(exists, cells[0])) and _is_header(cells, columns, exists)
    tabular = delimiter or columns != Columns() or (header and any(map(is_usual, cells[0])))
    if tabular or _divides(head, exists):
        names = cells[0] if header else [str(number) for number in range(1, len(cells[0]) + 1)]
        places = places_of(file, names, cells[header:], columns, exists, labels=labels, header=header)
        yield from _table(file, delimiter, places, head[0][0] + header, len(names))
        return
    _check_list(file, head, exists)
    for line, text in read_lines(file):
        if line >= head[0][0] + header:
            yield Row(f"{file}, line {line}", _readings(text), None)


def _is_comment(text: str) -> bool:
    """Return whether a line at the start of a file is a comment and not a header: "# labels", "sep=;"."""
    words = re.split(r"[\s,;]+", text)
    return text.startswith("sep=") or (text.startswith("#") and not any(is_usual(word, "path") for word in words))


def _delimiter(file: Path, head: Sequence[tuple[int, str]], columns: Columns, exists: Exists) -> str | None:
    """Return the mark between the columns of a table, or None if the columns of a table are words, or the file is a list."""
    for mark in "\t;,":
        share = sum(mark in text for _, text in head) / len(head)
        first = _cells(head[0][1], mark)
        known = len(first) > 1 and any(is_usual(cell) or cell in columns for cell in first)
        table = known or file.suffix.lower() in TABLES
        if (table and share > 0.5) or (
            share == 1 and any(exists(cell) for _, text in head for cell in _cells(text, mark))
        ):
            return mark
    return None


def _cells(text: str, delimiter: str | None) -> list[str]:
    if delimiter is None:
        return text.split()
    try:
        return [cell.strip() for cell in next(csv.reader([text], delimiter=delimiter, skipinitialspace=True))]
    except csv.Error:  # the line is reported when the table is read
        return text.split(delimiter)


def _is_header(cells: Sequence[Sequence[str]], columns: Columns, exists: Exists) -> bool:
    """Return whether the first line names columns: by usual names, or because only the next lines name images."""
    first, *rest = cells
    if any(is_usual(cell) or cell in columns for cell in first):
        return True
    row = any(is_image(cell) or cell.isdecimal() or "/" in cell for cell in first)  # of an image that is missing
    return len(first) > 1 and not row and any(exists(cell) for row in rest[:10] for cell in row)


def _divides(head: Sequence[tuple[int, str]], exists: Exists) -> bool:
    """Return whether a list has words in columns, the last of which are splits: PATH LABEL SPLIT."""
    words = [text.split() for _, text in head]
    return len(words[0]) > 2 and all(
        len(row) == len(words[0]) and split_in(row[-1]) is not None and exists(row[0]) for row in words
    )


def _check_list(file: Path, head: Sequence[tuple[int, str]], exists: Exists) -> None:
    """Raise FolderError if the lines of a list have a column of numbers besides the label, such as PATH 1 1 2."""
    labels = [next((label for path, label in _readings(text) if exists(path)), None) for _, text in head]
    words = [(label or "").split() for label in labels]
    if len(words[0]) > 1 and all(len(row) == len(words[0]) for row in words):
        numbers = [all(re.fullmatch(r"[\d.,+-]+", row[place]) for row in words) for place in range(len(words[0]))]
        if any(numbers):
            count = len(words[0]) + 1
            what = f"has {count} columns; choose that of the labels, 2 to {count}, for example"
            raise FolderError(f"{file}: {what}:\n  {packing({'label_column': '2'})}")


def _readings(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield the ways to divide a line of a list into path and label: the file system tells which one is meant."""
    if match := _NUMBERED.fullmatch(text):
        yield match[1], match[2]
    yield text, None
    text = text.strip()
    yield text, None
    if match := _AFTER_EXTENSION.fullmatch(text):
        yield match[1], match[2].strip()
    if match := _BEFORE_IMAGE.fullmatch(text):
        yield match[2], match[1]
    if match := _FIRST_WORD.fullmatch(text):
        yield match[1], match[2].strip()


def _table(file: Path, delimiter: str | None, places: Places, start: int, width: int) -> Iterator[Row]:
    """Yield the rows of a table from line `start`. width  Number of columns."""
    with file.open(encoding=encoding_of(file), errors="surrogateescape", newline="" if delimiter else None) as stream:
        if delimiter:
            reader = csv.reader(stream, delimiter=delimiter, skipinitialspace=True)
            numbered: Iterable[tuple[int, list[str]]] = ((reader.line_num, cells) for cells in reader)
        else:
            numbered = enumerate((line.split() for line in stream), 1)
        before = 0
        try:
            for line, cells in numbered:
                where, before = f"{file}, line {before + 1}", line
                if line < start or not any(map(str.strip, cells)):
                    continue
                if any("\n" in cell for cell in cells):
                    raise FolderError(f"{where}: has a quote that is not closed on this line; remove it, or close it.")
                if len(cells) < width or any(cell.strip() for cell in cells[width:]):
                    what = f"has {len(cells)} columns, but the first line has {width}"
                    raise FolderError(
                        f"{where}: {what}; correct it, or quote cells that contain {delimiter or 'spaces'!r}."
                    )
                yield Row(where, *places.read(where, [cell.strip() for cell in cells]))
        except csv.Error as error:
            raise FolderError(f"{file}, line {before + 1}: is not CSV ({error}); correct it.") from None


def _records(
    file: Path, records: Iterator[tuple[int, dict[str, str]]], columns: Columns, exists: Exists, labels: bool | None
) -> Iterator[Row]:
    sample = list(islice(records, _SAMPLE))
    names = list(dict.fromkeys(name for _, record in sample for name in record))
    cells = [[record.get(name, "") for name in names] for _, record in sample]
    places = places_of(file, names, cells, columns, exists, labels=labels, header=True)
    for line, record in chain(sample, records):
        where = f"{file}, line {line}"
        yield Row(where, *places.read(where, [record.get(name, "") for name in names]))


def usual_table(file: Path) -> bool:
    """Return whether a file is a table with a column of paths, by its names."""
    if file.suffix.lower() not in TABLES or "submission" in file.stem.lower() or not file.is_file():
        return False
    if file.suffix.lower() == ".json" and file.stat().st_size > _MOST_JSON:
        return False
    if (records := read_records(file)) is not None:
        return any(is_usual(name, "path") for _, record in islice(records, 1) for name in record)
    first = next((text for _, text in read_lines(file) if not _is_comment(text)), "")
    return any(is_usual(cell, "path") for mark in "\t;," if mark in first for cell in _cells(first, mark))
