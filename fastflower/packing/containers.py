"""Names what a folder without images holds instead, such as Parquet or HDF5 files with images inside."""

import os
from contextlib import suppress
from pathlib import Path

from fastflower.packing.advice import advice
from fastflower.packing.hidden import is_hidden
from fastflower.packing.names import EXTENSIONS
from fastflower.shards.kinds import kind_of

_MOST_READ = 1000  # files
_NOTES = ("text", "HTML", "XML", "JSON", "SVG", "pointer", "fork", "PDF")  # next to the data, but not the data


def instead_of_images(root: Path) -> str | None:
    """Return an error message for a folder without images, or None if there are images, or nothing that can be named."""
    found: dict[str, list[str]] = {}
    read = 0
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(folder for folder in folders if not is_hidden(folder))
        for file in sorted(files):
            if is_hidden(file):
                continue
            if file.lower().endswith(EXTENSIONS):
                return None
            path = Path(parent, file)
            read += path.is_file()
            if read > _MOST_READ or not path.is_file():
                continue
            with suppress(OSError), path.open("rb") as opened:
                kind = kind_of(opened.read(1024))
                if kind and not any(note in kind for note in _NOTES):
                    found.setdefault(kind, []).append(str(path.relative_to(root)))
    if not found:
        return None
    kind, paths = max(found.items(), key=lambda item: len(item[1]))
    others = {1: "", 2: ", as is 1 other file"}.get(len(paths), f", as are {len(paths) - 1} other files")
    unread = ", which fastflower does not read"
    remedy = 'save the images as files, one folder per class ("Images inside other files" in docs/format.md shows how)'
    if "archive" in kind and "NumPy" not in kind:
        advised = advice(root / paths[0])
        unread = "" if advised else unread
        remedy = f"{advised or 'unpack it'}, and pass the folder that has one folder of images per class"
    return f"{root}: has no images: {paths[0]!r} {kind}{others}{unread}; {remedy}."
