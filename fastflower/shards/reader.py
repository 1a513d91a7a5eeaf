"""Reads individual samples from WebDataset tar shards by offset."""

import errno
import json
import os
import resource
import tarfile
import zlib
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import ClassVar, SupportsIndex, overload

from fastflower.errors import SampleError, ShardError
from fastflower.files import blame_the_system
from fastflower.shards.manifest import Manifest
from fastflower.shards.writer import BLOCK

_MOST_OPEN = 256  # shards over all readers; systems often allow 1,024 open files per process, shared with other code
_RESTORE = "restore the shard from a backup, or run fastflower pack again."
_ATTEMPTS = 20  # to open a file, 10 ms apart; other threads may take the freed file descriptors


class ShardReader:
    """Reads the samples of one split by index. Thread-safe.

    Opens files on first use and limits the number of open files over all readers.
    Reads files instead of memory-mapping them: truncating a mapped file kills the process, and mapped pages count as its memory.

    strict  Whether to raise ShardError at construction if a shard is missing or its size differs from the manifest. If not,
    a damaged sample raises SampleError when it is read.
    fetch  Called with a shard's name before the file is opened, to ensure that the file exists.
    """

    _open: ClassVar[dict[tuple[int, int], "_File"]] = {}  # keyed by reader id and shard number

    def __init__(
        self, manifest: Manifest, split: str, *, strict: bool = True, fetch: Callable[[str], object] | None = None
    ) -> None:
        self._fetch = fetch
        self.split = split
        self.index = manifest.index(split)
        self._paths = [manifest.folder / shard.name for shard in manifest.split(split).shards]
        for path, shard in zip(self._paths, manifest.split(split).shards if strict else (), strict=strict):
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                problem = "is missing" if size is None else f"has {size} bytes, but the manifest says {shard.bytes}"
                raise ShardError(f"{path}: {problem}; {_RESTORE}")

    def encoded(self, index: int) -> bytes:
        """Return the bytes of a sample's image file. Raises SampleError if they have changed since they were packed."""
        row = self.index[index]
        start = int(row["offset"])
        try:
            data = self._read(int(row["shard"]), start, int(row["size"]))
        except OSError as error:
            blame_the_system(error, self._paths[int(row["shard"])])
            raise SampleError(f"{self.where(index)}: its shard cannot be read ({error}); {_RESTORE}") from None
        if zlib.crc32(data) != row["crc32"]:
            changed = "its bytes have changed since it was packed (checksum mismatch)"
            raise SampleError(f"{self.where(index)}: {changed}; {_RESTORE}")
        return data

    def where(self, index: int) -> str:
        """Describe a sample for messages: its shard, key and original path, or its index if the shard cannot be read."""
        row = self.index[index]
        shard, start = int(row["shard"]), int(row["offset"])
        place = str(self._paths[shard])
        try:
            header = self._read(shard, start - BLOCK, BLOCK)
            key = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name.rpartition(".")[0]
            return f"{place}: sample {key} ({self.path(index)})"
        except (OSError, tarfile.HeaderError, ValueError, KeyError):
            return f"{place}: sample {index}"

    def path(self, index: int) -> str:
        """Return the image's original path, relative to the packed folder, from the .json file that follows the image."""
        row = self.index[index]
        shard, header = int(row["shard"]), int(row["offset"]) + -(-int(row["size"]) // BLOCK) * BLOCK
        note = tarfile.TarInfo.frombuf(self._read(shard, header, BLOCK), "utf-8", "replace")
        return json.loads(self._read(shard, header + BLOCK, note.size))["filename"]

    def _read(self, shard: int, start: int, size: int) -> bytes:
        """Return `size` bytes of a shard from offset `start`, or fewer if the shard ends early."""
        key = (id(self), shard)
        file = ShardReader._open.get(key)
        if file is None:
            if len(ShardReader._open) >= min(_MOST_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4):
                ShardReader._open.clear()
            file = ShardReader._open.setdefault(key, self._open_shard(shard))  # another thread may have opened it
        return os.pread(file.number, size, start)

    def _open_shard(self, shard: int) -> "_File":
        path = self._paths[shard]
        while self._fetch is not None:
            self._fetch(path.name)
            with suppress(FileNotFoundError):  # another process evicted the shard
                return self._open_in_attempts(path)
        return self._open_in_attempts(path)

    @classmethod
    def _open_in_attempts(cls, path: Path) -> "_File":
        """Open a file. If no file descriptors are left, close all open shards and try again."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return _File(path)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
            cls._open.clear()
            sleep(0.01)
        return _File(path)

    def close_all_but(self, names: Collection[str]) -> None:
        """Close the files of all shards of this reader except these."""
        for key in list(ShardReader._open):
            if key[0] == id(self) and self._paths[key[1]].name not in names:
                ShardReader._open.pop(key, None)

    def __del__(self) -> None:
        self.close_all_but(())


class Paths(Sequence[str]):
    """The original path of every sample of a split, by index.

    Each path is read from its shard on access: the paths of ten million samples would take a gigabyte, and minutes to read.
    Pickling and `copy.deepcopy` produce a tuple of all paths.
    """

    def __init__(self, count: int, path: Callable[[int], str]) -> None:
        self._count, self._path = count, path

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(map(self._path, range(len(self))[index]))
        return self._path(range(len(self))[index])

    def __reduce__(self) -> tuple[type[tuple[str, ...]], tuple[tuple[str, ...]]]:
        return tuple, (tuple(self),)  # open files cannot be pickled


class _File:
    """An open file that closes itself when it is no longer used."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        with suppress(AttributeError):  # opening the file failed
            os.close(self.number)
