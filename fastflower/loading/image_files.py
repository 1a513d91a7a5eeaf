"""Image files without labels, read in place."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import cast

import numpy as np

from fastflower import progress
from fastflower.errors import ArgumentError, SampleError
from fastflower.files import blame_the_system
from fastflower.machine import cores
from fastflower.packing.containers import instead_of_images
from fastflower.packing.folder import images_in
from fastflower.packing.names import EXTENSIONS
from fastflower.shards.image import Prepared, prepare, read_size
from fastflower.shards.manifest import INDEX_DTYPE, Manifest, Shard, Split

_log = logging.getLogger("fastflower")

SPLIT = "files"
NO_LABEL = -1


class ImageFiles:
    """Image files, with the interface of a ShardReader. Thread-safe.

    Reads only headers at construction, for the sizes of the images. A file that `pack` would transcode is transcoded each
    time it is read, so the pixels are those of a pack.

    paths   The files, in the order of the index.
    strict  Whether to raise SampleError at construction if a size cannot be read. If not, reading the file raises it.
    """

    split = ""

    def __init__(self, paths: Sequence[Path], *, strict: bool = True) -> None:
        self._paths = tuple(map(str, paths))
        self._warned = set[str]()
        self.index = np.zeros(len(paths), INDEX_DTYPE)
        self.index["label"] = NO_LABEL
        with ThreadPoolExecutor(cores() + 1) as pool:
            sizes = pool.map(partial(_size, strict=strict), self._paths)
            bar = progress.bar(sizes, desc="sizes", unit="image", total=len(paths))
            self.index["height"], self.index["width"] = np.array(list(bar)).T

    def __str__(self) -> str:
        """Return the path of the first file, and the number of the others."""
        return f"{self._paths[0]} and {len(self._paths) - 1} others"

    @property
    def manifest(self) -> Manifest:
        """A manifest without classes, with one split. Its checksum is that of the paths and sizes."""
        digest = hashlib.sha256("\0".join(self._paths).encode("utf-8", "surrogateescape") + self.index.tobytes())
        split = Split(len(self._paths), (), (Shard("", len(self._paths), 0, digest.hexdigest()),))
        return Manifest(folder=Path(), classes=(), splits={SPLIT: split}, options={})

    def encoded(self, index: int) -> bytes:
        """Return the JPEG file that `pack` would write. Raises SampleError if `pack` would skip the image."""
        path = self._paths[index]
        prepared = _prepared(path, partial(self._warn, path))
        height, width = self.index["height"][index], self.index["width"][index]
        if prepared.size != (height, width):
            has = f"has {prepared.size[1]} x {prepared.size[0]} pixels, but had {width} x {height} when the loader was created"
            raise SampleError(f"{path}: {has}; create the loader again.")
        return prepared.encoded

    def path(self, index: int) -> str:
        """Return the path of a file."""
        return self._paths[index]

    where = path

    def close_all_but(self, names: Collection[str]) -> None:
        """Do nothing: no file stays open after it is read."""

    def _warn(self, path: str, message: str) -> None:
        if path not in self._warned:  # once, not in every epoch
            self._warned.add(path)
            _log.warning("%s: %s", path, message)


def find_images(images: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return image files in the order given. A folder stands for all images in it and its subfolders, sorted by path.

    Raises ArgumentError if there are none, or for what is no path, and SampleError for a folder without images.
    """
    several = hasattr(images, "__iter__") and not isinstance(images, (str, Path))
    entries = list(cast("Iterable[object]", images)) if several else [images]
    paths: list[Path] = []
    for entry in entries:
        if not isinstance(entry, (str, Path)):
            rule = "a path of an image file or folder, or a list of them"
            raise ArgumentError(f"images must be {rule}, got an object of type {type(entry).__name__}.")
        path = Path(entry)
        if path.is_dir():
            paths += images_below(path)
        elif set("*?[") & set(str(path)) and not path.exists():
            root, pattern = path.anchor and repr(path.anchor), str(path.relative_to(path.anchor))
            found = f"sorted(Path({root}).glob({pattern!r}))"
            raise ArgumentError(f"images: no file is called {path}, and patterns are not expanded; pass {found}.")
        else:
            paths.append(path)
    if not paths:
        raise ArgumentError("images must name at least one image file or folder, got none.")
    return paths


def images_below(folder: Path) -> list[Path]:
    """Return the images in a folder and its subfolders, sorted by path, and log what is left out.

    Raises SampleError if there are none.
    """
    found = images_in(folder)
    if not len(found):
        known = ", ".join(EXTENSIONS)
        what = f"{folder}: holds no images ({known}); pass image files or another folder."
        raise SampleError(instead_of_images(folder) or what)
    if found.ignored:
        reasons = Counter(reason for _, reason in found.ignored)
        hidden = all("hidden" in reason for reason in reasons)  # such as .DS_Store, which nobody would miss
        each = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        level = logging.INFO if hidden else logging.WARNING
        _log.log(level, "%s: left out %d that are no images (%s)", folder, len(found.ignored), each)
    return sorted(folder / found.path(number) for number in range(len(found)))


def _size(path: str, *, strict: bool) -> tuple[int, int]:
    try:
        return read_size(_file(path))
    except (OSError, SampleError) as error:
        unusable = _unusable(path, error)
    if strict:
        raise unusable
    return 1, 1  # reading the file raises it


def _prepared(path: str, warn: Callable[[str], object]) -> Prepared:
    try:
        return prepare(_file(path).read_bytes(), max_side=None, quality=None, warn=warn, name=Path(path).name)
    except (OSError, SampleError) as error:
        raise _unusable(path, error) from None


def _file(path: str) -> Path:
    file = Path(path)
    if not S_ISREG(file.stat().st_mode):  # reading a pipe or a device may never end
        raise SampleError("is not a regular file")
    return file


def _unusable(path: str, error: OSError | SampleError) -> SampleError:
    blame_the_system(error, path)
    what = f"{path}: {error.reason if isinstance(error, SampleError) else error.strerror or error}"
    return SampleError(f"{what}; pass image files or folders, or on_bad='skip'.", reason=what)
