"""Decides which columns of a table hold paths, labels and splits."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from fastflower.errors import FolderError
from fastflower.packing.again import packing
from fastflower.packing.names import is_image, split_in

# Names of columns, in lower case and without punctuation, the likeliest first. Kaggle, Hugging Face, fastai and others use these.
_USUAL = {
    "path": (
        *("path", "paths", "filepath", "filepaths", "imagepath", "imgpath", "file", "filename", "filenames", "fname"),
        *("imagefile", "imagefilename", "imagename", "imgname", "image", "imageid", "imageindex", "img", "imgid", "fileid"),
        *("isicid", "idcode", "imageurl", "id"),
    ),
    "label": ("label", "labels", "class", "classname", "classid", "category", "categoryid", "target", "labelname", "classlabel"),
    "split": ("split", "subset", "partition", "set", "dataset", "phase", "usage"),
}  # fmt: skip
_SWITCHES = {
    "isvalid": ("train", "val"),
    "isval": ("train", "val"),
    "istest": ("train", "test"),
    "istrain": ("val", "train"),
}
_BOOLEAN = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "no": 0, "yes": 1}
_EMPTY = {"nan", "<na>"}  # as pandas writes missing values


class Columns(NamedTuple):
    """Names of a table's columns, or their numbers from 1. None: found by their names and contents."""

    path: str | None = None
    label: str | None = None
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """Positions of the columns of a table."""

    path: int
    labels: Sequence[int]
    """One column, or a column of zeros and ones for each class. Empty if the labels are the class folders in the paths."""
    names: Sequence[str]
    split: int | None
    words: Sequence[str] | None
    """Splits for false and true, if the column of splits is named like "is_valid"."""

    def read(self, where: str, cells: Sequence[str]) -> tuple[list[tuple[str, str | None]], str | None]:
        """Return the readings and the split of a row. Raises FolderError if its split or label is not readable."""
        split = None if self.split is None else cells[self.split]
        if split is not None and self.words:
            if split.lower() not in _BOOLEAN:
                raise FolderError(f"{where}: {self.names[self.split or 0]} must be true or false, got {split!r}.")
            split = self.words[_BOOLEAN[split.lower()]]
        path = re.sub(r"^(\d+)\.0$", r"\1", cells[self.path])  # pandas writes 1.0 for a number in a column with gaps
        return [(path, self._label(where, cells))], split

    def _label(self, where: str, cells: Sequence[str]) -> str | None:
        if not self.labels:
            return None
        if len(self.labels) == 1:
            label = cells[self.labels[0]]
            if label[:1] in ("[", "{"):
                raise FolderError(f"{where}: label must be a name or a number, got {label}.")
            return "" if label.lower() in _EMPTY else label
        ones = [self.names[place] for place in self.labels if _BOOLEAN.get(cells[place].lower())]
        if len(ones) != 1:
            what = f"has {len(ones)} labels; each image must have exactly one"
            raise FolderError(
                _choose(f"{where}: {what}; remove the row, or choose one column", "label", self.names[self.labels[0]])
            )
        return ones[0]


def is_usual(name: str, kind: str | None = None) -> bool:
    """Return whether a column has a common name. kind  "path", "label" or "split"; by default any of them."""
    kinds = [kind] if kind else list(_USUAL)
    return any(_normal(name) in _USUAL[known] for known in kinds) or (kind is None and _normal(name) in _SWITCHES)


def places_of(
    file: Path,
    names: Sequence[str],
    sample: Sequence[Sequence[str]],
    columns: Columns,
    exists: Callable[[str], bool],
    *,
    labels: bool | None,
    header: bool,
) -> Places:
    """Return the positions of a table's columns. Raises FolderError if the choice is not clear.

    names  Names of the columns, or their numbers. sample  Cells of the first rows. header  Whether the table names its
    columns. labels  As for `lists.rows`.
    """
    values = [[row[place] for row in sample if place < len(row)] for place in range(len(names))]
    asked = [_asked(file, names, name, kind) for kind, name in columns._asdict().items()]
    path = _path_column(file, names, values, asked, exists, header)
    split = asked[2] if asked[2] is not None else _split_column(names, values, {path, asked[1]}, header)
    words = _SWITCHES.get(_normal(names[split])) if split is not None else None
    rest = [
        place
        for place, name in enumerate(names)
        if place not in (path, split)
        and (name or not header)
        and (header or any(values[place]))
        and not re.fullmatch(r"(?i)unnamed: \d+", name)
    ]
    chosen = [asked[1]] if asked[1] is not None else _label_columns(file, names, values, rest, labels, header)
    return Places(path, chosen, names, split, words)


def _asked(file: Path, names: Sequence[str], name: str | None, kind: str) -> int | None:
    if name is None or name in names:
        return None if name is None else names.index(name)
    if name.isdecimal() and 1 <= int(name) <= len(names):
        return int(name) - 1
    (near,) = get_close_matches(name, names, 1, 0.0)
    raise FolderError(_choose(f"{file}: has no column {name!r}; choose one of {_listed(names)}", kind, near))


def _path_column(
    file: Path,
    names: Sequence[str],
    values: Sequence[Sequence[str]],
    asked: Sequence[int | None],
    exists: Callable[[str], bool],
    header: bool,
) -> int:
    """Return the column whose cells name images. Cells with an extension win over numbers, common column names over others."""
    if asked[0] is not None:
        return asked[0]
    usual = sorted((_rank(name), place) for place, name in enumerate(names) if header and is_usual(name, "path"))
    known = [place for _, place in usual]
    taken = [place for place, name in enumerate(names) if header and is_usual(name) and place not in known]
    free = [place for place in range(len(names)) if place not in (*taken, *asked[1:])]
    files = [place for place in free if any(map(is_image, values[place]))]  # others may be numbers by chance
    fits = [place for place in (files or free) if any(map(exists, values[place][:20]))]
    if len(fits) == 1 or (fits and not header):
        return fits[0]
    known = [place for place in known if place in (fits or files or free)]
    if not known and fits:
        fitting = [names[place] for place in fits]
        what = f"more than one column names images; choose one of {_listed(fitting)}"
        raise FolderError(_choose(f"{file}: {what}", "path", fitting[0]))
    if not known:
        what = f"has no column of paths; choose one of {_listed(names)}"
        raise FolderError(_choose(f"{file}: {what}", "path", names[0]))
    return known[0]


def _rank(name: str) -> int:
    return _USUAL["path"].index(_normal(name))


def _split_column(
    names: Sequence[str], values: Sequence[Sequence[str]], taken: set[int | None], header: bool
) -> int | None:
    """Return the column that has a common name for splits, or whose cells are all names of splits."""
    free = [place for place in range(len(names)) if place not in taken and any(values[place])]
    if header:
        for place in free:
            if is_usual(names[place], "split") or _normal(names[place]) in _SWITCHES:
                return place
    for place in free:
        labeled = header and is_usual(names[place], "label")
        if not labeled and all(cell and split_in(cell) for cell in values[place]) and len(free) > 1:
            return place
    return None


def _label_columns(
    file: Path,
    names: Sequence[str],
    values: Sequence[Sequence[str]],
    rest: Sequence[int],
    labels: bool | None,
    header: bool,
) -> list[int]:
    """Return the column of labels: the one with a common name, the only one left, or a column of zeros and ones per class."""
    usual = [place for place in rest if header and is_usual(names[place], "label")]
    if len(usual) > 1:
        pairs = set(zip(*(values[place] for place in usual), strict=False))
        if all(len({pair[number] for pair in pairs}) == len(pairs) for number in range(len(usual))):
            named = [place for place in usual if not all(re.fullmatch(r"[\d.]+", cell) for cell in values[place])]
            usual = (named or usual)[:1]
    if len(usual) == 1 or not rest or (labels is None and header):
        return usual[:1]
    if len(rest) == 1:
        return list(rest)
    if usual:
        known = [names[place] for place in usual]
        what = f"has more than one column of labels; choose one of {_listed(known)}"
        raise FolderError(_choose(f"{file}: {what}", "label", known[0]))
    if header and all(cell.lower() in _BOOLEAN for place in rest for cell in values[place]) and any(map(any, values)):
        return list(rest)
    if labels:
        known = [names[place] for place in rest]
        what = f"has no column named 'label' or 'class'; choose one of {_listed(known)}"
        raise FolderError(_choose(f"{file}: {what}", "label", known[0]))
    return []


def _choose(what: str, kind: str, name: str) -> str:
    """Return a message that ends with what to type to choose a column of a kind."""
    return f"{what}, for example:\n  {packing({f'{kind}_column': name})}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:20]))


def _normal(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())
