"""How much disk space a pack takes, and whether there is enough."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import FolderError
from fastflower.packing.folder import Folder
from fastflower.packing.plan import Options
from fastflower.shards.manifest import WORK

_log = logging.getLogger("fastflower")

_BESIDES = 2560  # bytes of a sample in a tar besides its image, at least: three headers, label, JSON, padding


def check_space(source: Path, folder: Folder, options: Options, out: Path) -> None:
    """Log how much space a pack of a folder or archive will take. Raises FolderError if it cannot fit into what is free.

    Images that will be transcoded may shrink to any size, so only JPEG files that are kept must fit for certain.
    """
    sizes, frames = folder.files["size"].astype(np.int64), _BESIDES * len(folder)
    kept = 0 if options.max_side or options.quality else int(sizes[_are_jpeg(folder)].sum())
    above = next(place for place in (out, *out.absolute().parents) if os.path.exists(place))  # noqa: PTH110  (Path.exists can raise)
    # Shards that a pack made before it was interrupted.
    made = sum(path.stat().st_size for path in (*out.glob("*.tar"), *(out / WORK).glob("*.tar"))) if above == out else 0
    free = shutil.disk_usage(above).free
    if (least := kept + frames - made) > free:
        what = f"has {readable(free)} free, but packing {source} takes {readable(least)}"
        raise FolderError(f"{above}: {what}; free up space, or choose another folder as out (--out).")
    most = readable(max(int(sizes.sum()) + frames - made, 0))
    what = "packing %d images into %s, which takes up to %s of the %s that are free"
    _log.info(f"%s: {what}", source, len(folder), out, most, readable(free))


def _are_jpeg(folder: Folder) -> NDArray[np.bool_]:
    """Return whether each path ends with .jpg or .jpeg, (N,) bool."""
    places = folder.files["path_end"].astype(np.int64)[:, None] + np.arange(-4, 0)
    ends = folder.paths[np.maximum(places, 0)] | 0x20  # lower case
    return np.logical_or.reduce([(ends == np.frombuffer(end, np.uint8)).all(axis=1) for end in (b".jpg", b"jpeg")])


def bytes_in(folder: Path) -> int:
    """Return the total size of the files in a folder and in those below it."""
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def readable(size: int) -> str:
    """Return a number of bytes in the unit that people use: "1.5 GB"."""
    number, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.{0 if unit == 'bytes' else 1}f} {unit}"
