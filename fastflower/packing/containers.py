"""Names what a folder holds instead of images, or besides, such as Parquet files or archives with images inside."""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fastflower.packing.advice import AS_FILES, SHARD, advice, is_shard, loop, refused
from fastflower.packing.hidden import entries, is_hidden
from fastflower.packing.layout import subfolders
from fastflower.packing.names import EXTENSIONS, splits_named
from fastflower.shards.kinds import kind_of
from fastflower.shards.manifest import FILE

_MOST_READ = 1000  # files
_MOST_UNREAD = 20  # files
_MOST_NAMES = 3
# Not .npy, .mat and the like, which often hold labels or features.
_CONTAINERS = re.compile(
    r"\.(zip|tar|tgz|tbz2?|txz|gz|bz2|xz|zst|7z|rar|parquet|arrow|tfrecords?|h5|hdf5)([-.]\w+)*$", re.IGNORECASE
)
_NOTES = ("text", "HTML", "XML", "JSON", "SVG", "pointer", "fork", "PDF")  # next to the data, but not the data


def instead_of_images(root: Path) -> str | None:
    """Return an error message for a folder without images, or None if there are images, or nothing that can be named."""
    if any(root.glob("checkpoint-*.pt")):
        return f"{root}: is the folder of a run, not of images; pass the shards or images (fastflower train SHARDS)."
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
                if kind and _is_data(kind):
                    found.setdefault(kind, []).append(str(path.relative_to(root)))
    if not found:
        return None
    kind, paths = max(found.items(), key=lambda item: len(item[1]))
    others = {1: "", 2: ", as is 1 other file"}.get(len(paths), f", as are {len(paths) - 1} other files")
    unread = ", which fastflower does not read"
    remedy = AS_FILES
    if "archive" in kind and "NumPy" not in kind:
        first = root / paths[0]
        if is_shard(first):
            if (first.parent / FILE).exists():
                return packed_already(root, first.parent)
            return f"{root}: {paths[0]!r} {SHARD}."
        if (why := refused(first)) and "is one part" in why:
            return f"{root}: has no images: {paths[0]!r} {why}."
        advised = advice(first)
        if advised and len(paths) > 1:
            command = loop([root / path for path in paths])
            advised = f"unpack all of them ({command})" if command else "unpack all of them"
        unread = "" if advised else unread
        remedy = f"{advised or 'unpack it'}, and pass the folder that has one folder of images per class"
    return f"{root}: has no images: {paths[0]!r} {kind}{others}{unread}; {remedy}."


def packed_already(root: Path, shards: Path) -> str:
    """Return the error message for a folder that is one of shards, or has them inside."""
    path = shlex.quote(str(shards))
    what = "is packed already" if root == shards else f"is packed already, in {shards}"
    return f"{root}: {what}; train on it: fastflower train {path}; or score a checkpoint: fastflower evaluate CHECKPOINT {path}."


def _is_data(kind: str) -> bool:
    return not any(note in kind for note in _NOTES)


def unread(root: Path) -> Iterator[str]:
    """Yield a remark about the archives and data files directly in a folder or in its split folders, if any.

    An archive next to a folder of its name has been unpacked.
    """
    paths: list[Path] = []
    for parent in (root, *(root / top for top in splits_named(subfolders(root)))):
        names = {entry.name for entry in entries(parent)}
        wholes = {name: _CONTAINERS.sub("", name) for name in sorted(names)}
        paths += [parent / name for name, whole in wholes.items() if whole not in names]
    kinds: dict[str, str] = {}
    for path in [path for path in paths if path.is_file()][:_MOST_UNREAD]:
        with suppress(OSError), path.open("rb") as opened:
            kind = kind_of(opened.read(1024))
            if kind and _is_data(kind):
                kinds[str(path.relative_to(root))] = kind
    if not kinds:
        return
    named = ", ".join(f"{name!r} {kind}" for name, kind in list(kinds.items())[:_MOST_NAMES])
    more = f", and {len(kinds) - _MOST_NAMES} more files" if len(kinds) > _MOST_NAMES else ""
    archives = all("archive" in kind for kind in kinds.values())
    it, its, this = ("it", "its", "this is") if len(kinds) == 1 else ("them", "their", "these are")
    remedy = f"unpack {it}" if archives else f"save {its} images as files"
    yield f"{named}{more}; {this} not read: {remedy} if {'it belongs' if len(kinds) == 1 else 'they belong'} to this data set"
