"""Reads a folder's lists of images (train.txt, val.txt, test.txt) with lines "PATH LABEL" or "CLASS/FILE"."""

import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

from fastflower.errors import FolderError
from fastflower.packing.hidden import is_ignored


def lists_of(root: Path) -> dict[str, Path]:
    """Return the lists of a folder by split, or an empty dict if there is no train.txt."""
    lists = {split: path for split in ("train", "val", "test") if (path := _file(root, f"{split}.txt"))}
    return lists if "train" in lists else {}


def _file(root: Path, name: str) -> Path | None:
    """Return root/meta/NAME if it exists, else root/NAME, or None if neither exists."""
    return next(
        (path for path in (root / "meta" / name, root / name) if path.is_file() and not is_ignored(str(path))), None
    )


def listed_classes(root: Path, lists: dict[str, Path]) -> list[str]:
    """Return the classes in classes.txt. Without that file, return the sorted top folders of the paths in train.txt."""
    file = _file(root, "classes.txt")
    if file is None:
        return sorted({path.partition("/")[0] for _, path, _ in _lines(lists["train"]) if "/" in path})
    lines = file.read_bytes().removeprefix(BOM_UTF8).splitlines()
    classes = [os.fsdecode(line).strip() for line in lines if line.strip()]
    if len(set(classes)) < len(classes):
        raise FolderError(f"{file}: lists a class twice; write one line per class, in label order.")
    return classes


def listed_files(root: Path, lists: dict[str, Path], classes: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (path, label, position of the split) for each line. Listed paths are relative to root/SPLIT or the root.

    Raises FolderError, with file and line, if a line is invalid.
    """
    ordered = _file(root, "classes.txt") is not None  # else labels are positions in the sorted class folders
    labels = {name: label for label, name in enumerate(classes)}
    seen: set[int] = set()  # 64-bit hashes: a million paths would take too much memory
    for number, (split, file) in enumerate(lists.items()):
        for line, listed, written in _lines(file):
            where, first = f"{file}, line {line}", listed.partition("/")[0]
            if "\0" in listed:
                raise FolderError(f"{where}: contains a null byte; save the list as UTF-8.")
            label = labels.get(first) if written is None else written
            if label is None:
                raise FolderError(f"{where}: {listed!r} has no label and is not in a class folder; write 'PATH LABEL'.")
            if label >= len(classes):
                what = f"label {label} must be less than the number of classes ({len(classes)})"
                raise FolderError(f"{where}: {what}; correct it, or list every class in classes.txt.")
            if not ordered and classes[label] != first:
                what = f"label {label} is not the position of {first!r} among the sorted class folders"
                raise FolderError(f"{where}: {what}; correct it, or add classes.txt.")
            # Path.exists and Path.is_dir raise if a name is too long.
            path = f"{split}/{listed}" if os.path.exists(root / split / listed) else listed  # noqa: PTH110
            if os.path.isdir(root / path):  # noqa: PTH112
                raise FolderError(f"{where}: {path!r} is a folder; list its files.")
            if hash(path) in seen:
                raise FolderError(f"{where}: {path!r} is listed twice; remove one of the lines.")
            seen.add(hash(path))
            yield path, label, number


def _lines(file: Path) -> Iterator[tuple[int, str, int | None]]:
    """Yield (line number, path, label or None) for each non-empty line of a list."""
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            text = os.fsdecode(raw.removeprefix(BOM_UTF8 if number == 1 else b"").rstrip(b"\r\n"))
            path, *label = text.rsplit(maxsplit=1) or [""]
            if label and label[0].isascii() and label[0].isdigit():
                yield number, path, int(label[0])
            elif path:
                yield number, text, None
