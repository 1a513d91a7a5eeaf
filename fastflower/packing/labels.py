"""Turns the labels of listed images into classes, once all of them are known."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import FolderError
from fastflower.packing.again import packing
from fastflower.packing.names import splits_named
from fastflower.packing.text import read_lines

_log = logging.getLogger("fastflower")

_NUMBER = re.compile(r"(\d+)(\.0*)?")  # pandas writes 3.0 if a column has gaps


class _Label(NamedTuple):
    text: str | None
    """As written. None: the class folder in the path."""
    parent: str
    """Folders in the listed path, or "" if the label does not depend on them."""
    split: str | None
    place: str = ""
    """Folders above the image, which may name a label that is a number."""


class Labels:
    """Collects the labels of listed images.

    classes  Names of all classes, in the order of labels that are numbers. None: the classes are the labels themselves.
    table  Whether the labels come from --labels, and so need not agree with the folders in the paths.
    """

    def __init__(self, classes: Sequence[str] | None, *, table: bool) -> None:
        self._given, self._table = classes, table
        self._numbers: dict[_Label, int] = {}
        self._where: list[str] = []  # of the first image with each label
        self._unlabeled = ""

    def add(self, text: str | None, listed: str, split: str | None, where: str, path: str = "") -> int:
        """Return a number for the label of an image, which `classes` later maps to its class.

        listed  The end of the path that the list gives. path  The image's path in the folder to pack.
        """
        if text is not None and not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text):
            raise FolderError(f"{where}: the label is not UTF-8; save the file as UTF-8.")
        depends = text is None or (self._given is None and not (self._table and _number(text) is None))
        place = path.rpartition("/")[0] if self._given is None and _number(text) is not None else ""
        label = _Label(text, listed.rpartition("/")[0] if depends else "", split, place)
        number = self._numbers.setdefault(label, len(self._numbers))
        if number == len(self._where):
            self._where.append(where)
            if text is None and not label.parent:
                self._unlabeled = f"{where}: {listed!r} has no label and is not in a class folder; write 'PATH LABEL'."
        return number

    def classes(self, *, drop_empty: bool = False) -> tuple[list[str], NDArray[np.int32], list[str]]:
        """Return the classes, for each number from `add` the position of its class, and the classes that are left out.

        drop_empty  Whether a class without training images is left out and gets the position -1. If not, it raises
        FolderError with the file and line, as does a label that is no class.
        """
        if self._unlabeled:
            raise FolderError(self._unlabeled)
        labels = list(self._numbers)
        folders = _class_folders(labels)
        train = [number for number, label in enumerate(labels) if label.split in (None, "train")]
        tops = sorted({folders[number] for number in train if folders[number]})
        numeric = all(_number(label.text) is not None for label in labels)
        named = self._named(labels) if numeric and self._given is None else {}
        by_position = self._given is None and not self._table and len(tops) > 1 and not named
        ordered = list(self._given or (tops if by_position else ()))
        first = self._first_number(labels, len(ordered))
        names: list[str] = []
        for label, folder, where in zip(labels, folders, self._where, strict=True):
            number = _number(label.text)
            if label.text is None:
                names.append(folder)
            elif number is None or not ordered:
                names.append(named.get(number, str(number)) if numeric and number is not None else label.text)
            elif not 0 <= number - first < len(ordered):
                what = f"label {number} must be less than the number of classes ({len(ordered)})"
                raise FolderError(f"{where}: {what}; correct it, or list every class in classes.txt.")
            else:
                names.append(ordered[number - first])
                if by_position and folder not in ("", names[-1]):
                    what = f"label {number} is not the position of {folder!r} among the sorted class folders"
                    raise FolderError(f"{where}: {what}; correct it, or add classes.txt.")
        numbers = {name: number for number, name in named.items()}
        used = {names[number] for number in train}
        classes = ordered or sorted(used, key=(numbers.__getitem__ if named else int) if numeric else None)
        if numeric and not named and not ordered:
            self._tell_digits(classes, {label.place.rpartition("/")[2] for label in labels})
        known = {name: position for position, name in enumerate(classes)}
        for name, where in zip(names, self._where, strict=True):
            if name not in known and not drop_empty:
                raise FolderError(f"{where}: {self._unknown(name, classes)}")
        unknown = sorted({*names} - known.keys())
        return classes, np.array([known.get(name, -1) for name in names], np.int32), unknown

    def _named(self, labels: Sequence[_Label]) -> dict[int, str]:
        """Return the class folder that goes with each number, or {} if a number or a folder has several.

        It is the outermost folder for which this holds, or that directly above the image.
        """
        numbers = [number for label in labels if (number := _number(label.text)) is not None]
        places = [label.place.split("/") for label in labels]
        for depth in (*range(min(map(len, places), default=0)), -1):
            pairs = {(number, place[depth]) for number, place in zip(numbers, places, strict=True)}
            named, folders = dict(pairs), {folder for _, folder in pairs}
            if len(pairs) == len(named) == len(folders) > 1 and "" not in folders:
                few = ", ".join(f"{number} is {named[number]!r}" for number in sorted(named)[:3])
                what = "the labels are numbers, named by the folders of their images"
                _log.info("%s: %s: %s", self._file(), what, few + (", ..." if len(named) > 3 else ""))
                return named
        return {}

    def _tell_digits(self, classes: Sequence[str], folders: set[str]) -> None:
        """Say that numbers are the names of the classes. folders  Names of those directly above the images."""
        matched = len(folders - splits_named(folders).keys()) <= 1  # no folders suggest other names
        what = f"classes are named {classes[0]} ... {classes[-1]}" + (
            "" if matched else ", which do not match the folders"
        )
        remedy = "to name them, list the names in label order in classes.txt, in the folder to pack"
        _log.log(logging.INFO if matched else logging.WARNING, "%s: %s; %s", self._file(), what, remedy)

    def _file(self) -> str:
        return self._where[0].rpartition(", ")[0]

    def _first_number(self, labels: Sequence[_Label], count: int) -> int:
        """Return whether labels count from 0 or 1. They count from 1 only if one of them equals the number of classes."""
        numbers = {number for label in labels if (number := _number(label.text)) is not None}
        if self._table and count and numbers and numbers.isdisjoint((0, count)):
            what = f"the labels are numbers from {min(numbers)} to {max(numbers)}, and there are {count} classes"
            rule = "it is not clear whether they count from 0 or 1; write the names of the classes"
            where = next(
                where for label, where in zip(labels, self._where, strict=True) if _number(label.text) is not None
            )
            raise FolderError(f"{where.rpartition(', ')[0]}: {what}, so {rule}.")
        return int(0 not in numbers and count in numbers)

    def _unknown(self, name: str, classes: Sequence[str]) -> str:
        """Return what is wrong with a label that is not a class, and what to do."""
        few = ", ".join(map(repr, classes[:3])) + (", ..." if len(classes) > 3 else "")
        if self._given is not None:
            return f"label {name!r} is not one of the classes ({few}); correct it, or add the class to classes.txt."
        if name.isdecimal() and not any(map(str.isdecimal, classes)):
            return f"label {name!r} is a number, but the classes are names ({few}); list them in label order in classes.txt."
        what = f"class {name!r} has no training image; correct the label, list an image for training, or leave it out"
        return f"{what}:\n  {packing({'drop_empty_classes': True})}"


def _class_folders(labels: Sequence[_Label]) -> list[str]:
    """Return the first folder in each path. A split's own name that begins every path is not a class: train/CLASS/FILE."""
    parts = [label.parent.split("/") for label in labels]
    if all(
        len(names) > 1 and label.split in splits_named(names[:1]).values()
        for names, label in zip(parts, labels, strict=True)
    ):
        parts = [names[1:] for names in parts]
    return [names[0] for names in parts]


def _number(text: str | None) -> int | None:
    match = _NUMBER.fullmatch(text or "")
    return int(match[1]) if match else None


def read_classes(file: Path) -> list[str]:
    """Return the class names in classes.txt, one per line. Lines may begin with their position: "0 rose" or "1 rose"."""
    lines = [text.strip() for _, text in read_lines(file)]
    for first in (0, 1):
        numbered = [re.fullmatch(rf"0*{number}[\s.:,;]+(\S.*)", line) for number, line in enumerate(lines, first)]
        if lines and all(numbered):
            lines = [match[1] for match in numbered if match]
    if len(set(lines)) < len(lines):
        raise FolderError(f"{file}: lists a class twice; write one line per class, in label order.")
    return lines
