"""Finds the images that a list or table names in a folder, however their paths are written."""

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from fastflower.errors import FolderError
from fastflower.packing import layout
from fastflower.packing.hidden import entries, is_run_or_pack
from fastflower.packing.names import is_image, split_in

_FEW = 8  # candidates to compare with a path


class Found(NamedTuple):
    """An image in the folder, as named by a list."""

    path: str
    """Relative to the folder."""
    listed: str
    """The end of the path that the list gives: CLASS/FILE in most lists."""


class Finder:
    """Finds listed images in a folder.

    A listed path is relative to one of `bases` or to the folder. If there is no such file, folders are removed from its
    start, because lists hold absolute paths and paths from other machines. If that fails too, the path means the only image
    in the folder whose path ends with it, with or without its extension.

    tops  Subfolders to search for such an end, "." for the whole folder.
    """

    def __init__(self, root: Path, tops: Sequence[str] = (".",)) -> None:
        self._root, self._tops = root, tops
        self._name = os.path.basename(os.path.abspath(root))  # noqa: PTH100, PTH119  (root may be "." or "..")
        self._by_stem: dict[str, list[str]] | None = None
        self._by_pair: dict[str, list[str]] | None = None

    def find(
        self, listed: str, bases: Sequence[str] = (), split: str | None = None, *, strict: bool = False
    ) -> Found | None:
        """Return the image, or None. Raises FolderError if more than one image fits.

        split  The split that the image belongs to: among several images, the one in this split's folder is meant.
        strict  Whether no image in the folder of another split can be meant.
        """
        listed = re.sub(r"^\w+://[^/]*(?=/)|[?#].*$", "", listed) if "://" in listed else listed.removeprefix("./")
        if not listed:
            return None
        for base in (*bases, "."):
            if self._exists(base, listed):
                path = self._relative(listed) if listed.startswith("/") else _joined(base, listed)
                return Found(path, path if listed.startswith("/") else listed)
        names = _split(listed)
        outside = names[0] != listed.split("/", 1)[0]  # it starts with "/", "./", a drive or backslashes
        first = 0 if outside else 1
        for start in range(first, len(names)):
            alone = start == len(names) - 1 and start > 0
            if alone and not (outside or names[start - 1] == self._name):
                break  # the file's name alone may belong to another folder's image
            end = "/".join(names[start:])
            for base in (*bases, "."):
                if self._exists(base, end):
                    return Found(_joined(base, end), end)
        return self._find_by_end(listed, names, split, strict)

    def flat(self) -> list[str]:
        """Return the paths of all images, sorted."""
        return sorted(path for paths in self._index().values() for path in paths if is_image(path))

    def count(self) -> int:
        """Return the number of images."""
        return sum(map(is_image, self._walk()))

    def _exists(self, base: str, listed: str) -> bool:
        # pathlib would take half the time of reading a list.
        path = listed if listed.startswith("/") else f"{self._root}/{base}/{listed}"
        return os.path.exists(path) and self._inside(listed)  # noqa: PTH110  (Path.exists may raise)

    def _inside(self, listed: str) -> bool:
        """Return whether a path lies in the folder. A relative path does unless it contains `..`."""
        if listed.startswith("/"):
            return Path(listed).is_relative_to(self._root.absolute())
        return ".." not in listed.split("/")

    def _relative(self, listed: str) -> str:
        return Path(listed).relative_to(self._root.absolute()).as_posix()

    def _find_by_end(self, listed: str, names: Sequence[str], split: str | None, strict: bool) -> Found | None:
        end = unicodedata.normalize("NFC", "/".join(names))
        candidates = self._index().get(_stem(unicodedata.normalize("NFC", names[-1])), [])
        if len(candidates) > _FEW and len(names) > 1:
            candidates = self._pairs().get(_stem("/".join(end.split("/")[-2:])), [])
        stem = f"/{_stem(end)}"
        fitting = [path for path in candidates if f"/{_stem(unicodedata.normalize('NFC', path))}".endswith(stem)]
        for wanted in (str, str.lower):  # an extension in another case, or another extension
            exact = [path for path in fitting if wanted(path).endswith(wanted(end))]
            fitting = exact or fitting
        if split and (strict or len(fitting) > 1):
            splits = {path: split_in(path.partition("/")[0]) if "/" in path else None for path in fitting}
            fitting = [path for path in fitting if splits[path] == split] or (
                [path for path in fitting if splits[path] is None] if strict else fitting
            )
        if len(fitting) > 1:
            few = ", ".join(map(repr, sorted(fitting)[:3]))
            raise FolderError(
                f"{listed!r} matches more than one image ({few}); write its path relative to {self._root}."
            )
        return Found(fitting[0], end) if fitting else None

    def _pairs(self) -> dict[str, list[str]]:
        """Return the paths of all files by their last folder and name, without image extension."""
        if self._by_pair is None:
            self._by_pair = {}
            for path in chain.from_iterable(self._index().values()):
                pair = "/".join(unicodedata.normalize("NFC", path).split("/")[-2:])
                self._by_pair.setdefault(_stem(pair), []).append(path)
        return self._by_pair

    def _index(self) -> dict[str, list[str]]:
        """Return the paths of all files by file name without image extension. Reads the folder once, when first needed."""
        if self._by_stem is None:
            self._by_stem = {}
            for path in self._walk():
                name = unicodedata.normalize("NFC", path.rpartition("/")[2])
                self._by_stem.setdefault(_stem(name), []).append(path)
        return self._by_stem

    def _walk(self) -> Iterator[str]:
        pending = list(self._tops)
        while pending:
            folder = pending.pop()
            try:
                for entry in entries(self._root / folder):
                    path = _joined(folder, entry.name)
                    if not layout.is_folder(entry):
                        yield path
                    elif not entry.is_symlink() and not is_run_or_pack(entry.path):
                        pending.append(path)
            except OSError:  # unreadable; its images are reported as missing
                continue


def _split(listed: str) -> list[str]:
    """Return the names in a path with forward or backward slashes, without a drive letter, "." and ".."."""
    listed = re.sub(r"^[A-Za-z]:(?=[\\/])", "", listed)
    parts = re.split(r"[\\/]", listed) if "\\" in listed else listed.split("/")
    return [name for name in parts if name not in ("", ".", "..")] or [listed]


def _joined(base: str, path: str) -> str:
    return os.path.normpath(path if base == "." else f"{base}/{path}")


def _stem(name: str) -> str:
    return name.rpartition(".")[0] if is_image(name) else name
