"""Folders with lists or tables."""

from pathlib import Path

from packs import touch

from fastflower.packing.columns import Columns
from fastflower.packing.folder import Folder, Tables

FLAT = ["1.jpg", "2.jpg"]
AB = {"1.jpg": "a", "2.jpg": "b"}


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, text in files.items():
        touch(root, name).joinpath(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def labeled(found: Folder) -> dict[str, str]:
    """Return the class of each image, and the split if there is one: "a" or "a val"."""
    return {
        found.path(number): " ".join([found.classes[row["label"]], *found.splits[row["split"] :][:1]])
        for number, row in enumerate(found.files)
    }


def tables(root: Path, *names: str, split: str = "", **columns: str) -> Tables:
    return Tables([root / name for name in names], [root / split] if split else [], Columns(**columns))
