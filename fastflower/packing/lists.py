"""Lists of images beside a folder: train.txt and its like, of lines "PATH LABEL" or "CLASS/FILE"."""

import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

from fastflower.errors import FolderError


def lists_of(root: Path) -> dict[str, Path]:
    """The lists of a folder by split; train.txt makes it one with lists."""
    found = {split: _first(root, f"{split}.txt") for split in ("train", "val", "test")}
    return {split: path for split, path in found.items() if path is not None} if found["train"] else {}


def _first(root: Path, name: str) -> Path | None:
    return next((path for path in (root / "meta" / name, root / name) if path.is_file()), None)


def listed_classes(root: Path, lists: dict[str, Path]) -> list[str]:
    """Those of classes.txt, or without it the sorted first folders of the paths of train.txt."""
    named = _first(root, "classes.txt")
    if named is None:
        return sorted({path.partition("/")[0] for _, path, _ in _lines(lists["train"]) if "/" in path})
    lines = named.read_bytes().removeprefix(BOM_UTF8).splitlines()
    classes = [os.fsdecode(line).strip() for line in lines if line.strip()]
    if len(set(classes)) < len(classes):
        raise FolderError(f"{named}: names a class twice; one line a class, in the order of the labels.")
    return classes


def listed_files(root: Path, lists: dict[str, Path], classes: list[str]) -> Iterator[tuple[str, int, int]]:
    """(path, label, position of the split) of each line. Paths are below root/SPLIT or root."""
    named = _first(root, "classes.txt")
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
            yield path, known, number


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
