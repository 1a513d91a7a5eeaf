"""Folders with lists or tables."""

import os
from collections.abc import Mapping
from pathlib import Path

from packs import touch

from fastflower.packing.columns import Columns
from fastflower.packing.folder import Folder
from fastflower.packing.listing import Tables

FLAT = ["1.jpg", "2.jpg"]
AB = {"1.jpg": "a", "2.jpg": "b"}


def write(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, text in files.items():
        touch(root, name).joinpath(name).write_bytes(text if isinstance(text, bytes) else os.fsencode(text))
    return root


def labeled(found: Folder) -> dict[str, str]:
    """Return the class of each image, and the split if there is one: "a" or "a val"."""
    return {
        found.path(number): " ".join([found.classes[row["label"]], *found.splits[row["split"] :][:1]])
        for number, row in enumerate(found.files)
    }


def tables(root: Path, *names: str, split: str = "", **columns: str) -> Tables:
    return Tables([root / name for name in names], [root / split] if split else [], Columns(**columns))


def rows_of(found: Folder) -> list[tuple[str, int, int]]:
    """Return path, label and split of each image."""
    paths = [found.path(number) for number in range(len(found))]
    return list(zip(paths, found.files["label"].tolist(), found.files["split"].tolist(), strict=True))
