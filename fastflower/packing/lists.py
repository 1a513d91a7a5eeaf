"""Lists of images beside a folder: train.txt and its like, of lines "PATH LABEL" or "CLASS/FILE"."""

import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

from fastflower.errors import FolderError


def lists_of(root: Path) -> dict[str, Path]:
    """The lists of a folder by split; train.txt makes it one with lists."""
    lists = {split: path for split in ("train", "val", "test") if (path := _file(root, f"{split}.txt"))}
    return lists if "train" in lists else {}


def _file(root: Path, name: str) -> Path | None:
    """root/meta/NAME, or without it root/NAME, where there is one."""
    return next((path for path in (root / "meta" / name, root / name) if path.is_file()), None)


def listed_classes(root: Path, lists: dict[str, Path]) -> list[str]:
    """Those of classes.txt, or without it the sorted first folders of the paths of train.txt."""
    file = _file(root, "classes.txt")
    if file is None:
        return sorted({path.partition("/")[0] for _, path, _ in _lines(lists["train"]) if "/" in path})
    lines = file.read_bytes().removeprefix(BOM_UTF8).splitlines()
    classes = [os.fsdecode(line).strip() for line in lines if line.strip()]
    if len(set(classes)) < len(classes):
        raise FolderError(f"{file}: names a class twice; one line a class, in the order of the labels.")
    return classes


def listed_files(root: Path, lists: dict[str, Path], classes: list[str]) -> Iterator[tuple[str, int, int]]:
    """(path, label, position of the split) of each line. Paths are below root/SPLIT or root."""
    ordered = _file(root, "classes.txt") is not None  # else a label is a class folder's place among the sorted ones
    labels = {name: label for label, name in enumerate(classes)}
    seen: set[int] = set()  # 64 bits of each path; paths themselves would not fit a million files
    for number, (split, file) in enumerate(lists.items()):
        for line, listed, written in _lines(file):
            where, first = f"{file}, line {line}", listed.partition("/")[0]
            if "\0" in listed:
                raise FolderError(f"{where}: holds a zero byte; save the list as UTF-8.")
            label = labels.get(first) if written is None else written
            if label is None:
                raise FolderError(f"{where}: {listed!r} has no label and lies in no class folder; write PATH LABEL.")
            if label >= len(classes):
                raise FolderError(f"{where}: label {label} is not one of the {len(classes)} classes; add classes.txt.")
            if not ordered and classes[label] != first:
                raise FolderError(
                    f"{where}: label {label} is not the place of {first!r} among the sorted class folders; add classes.txt."
                )
            # A name that is too long is one of nothing; Path.exists and Path.is_dir raise for it.
            path = f"{split}/{listed}" if os.path.exists(root / split / listed) else listed  # noqa: PTH110  (does not raise)
            if os.path.isdir(root / path):  # noqa: PTH112  (does not raise)
                raise FolderError(f"{where}: {path!r} is a folder; list its files.")
            if hash(path) in seen:
                raise FolderError(f"{where}: {path!r} is listed twice; remove one of the lines.")
            seen.add(hash(path))
            yield path, label, number


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
