"""WebDataset tar shards: writing them with DALI's index beside, and reading single samples back by offset."""

import errno
import hashlib
import io
import json
import os
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from time import sleep
from typing import Any, ClassVar, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import SampleError, ShardError
from fastflower.files import blame_the_system
from fastflower.manifest import INDEX_DTYPE, Manifest, Shard, Split

_BLOCK = 512  # bytes: tar's unit
_MOST_OPEN = 256  # shards of all readers; systems allow a process 1,024 files, of which others need some
_TRIES = 20  # to open another, 10 ms apart: threads that close some of theirs open others
# A member's header without name and size: owner 0, mode 644, time 0, so that bytes depend on contents alone.
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_REST_SUM = sum(_HEADER[156:])
_ROW = struct.Struct("<IQIIiII")  # INDEX_DTYPE


class Writable(Protocol):
    """What a shard can be written to, such as a file opened in mode "wb"."""

    def write(self, data: bytes, /) -> object:
        """Take all of the bytes."""
        ...


class Samples:
    """Samples as they stand in a tar, one after another. Any thread can make them; ShardWriter.extend appends them.

    USTAR as Python's tarfile writes it, which takes six times as long.
    """

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.rows: list[tuple[int, ...]] = []
        """(offset, size, crc32, label, width, height) of each image."""
        self.members: list[list[tuple[str, int, int, str]]] = []
        """(ending, offset, size, name) of each sample's files."""
        self._bytes = 0

    def add(self, key: str, image: bytes, label: int, size: tuple[int, int], source: str, class_name: str) -> None:
        """Add KEY.cls, KEY.jpg and KEY.json. size  (height, width) of the decoded image; source  its original path."""
        # "filename" is the key under which timm looks for it.
        # A name that is no UTF-8 has surrogates, and backslashreplace writes them as JSON's own escapes.
        note = json.dumps({"filename": source, "class": class_name}, ensure_ascii=False)
        files = (("cls", b"%d" % label), ("jpg", image), ("json", note.encode("utf-8", "backslashreplace")))
        members: list[tuple[str, int, int, str]] = []
        for ending, data in files:
            name = f"{key}.{ending}"
            offset = self._bytes + _BLOCK
            padding = -len(data) % _BLOCK
            self.pieces += (_header(name, len(data)), data, bytes(padding))
            self._bytes = offset + len(data) + padding
            members.append((ending, offset, len(data), name))
        self.members.append(members)
        self.rows.append((members[1][1], len(image), zlib.crc32(image), label, size[1], size[0]))


class ShardWriter:
    """Writes one tar, and collects its indexes.

    The bytes depend on what is added and in which order, nothing else.
    """

    def __init__(self, file: Writable) -> None:
        self.samples = 0
        self._file = file
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._rows = bytearray()
        self._index = bytearray()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # tar ends with two empty blocks, in records of twenty
            self._write(bytes(-(self._bytes + 2 * _BLOCK) % tarfile.RECORDSIZE + 2 * _BLOCK))

    def extend(self, samples: Samples) -> None:
        """Append samples."""
        start = self._bytes
        for offset, *row in samples.rows:
            self._rows += _ROW.pack(0, start + offset, *row)
        for members in samples.members:
            # DALI's v1.2: extension, offset, size and name of each member (nvidia/dali/tools/wds2idx.py).
            line = [f"{ending} {start + offset} {size} {name}" for ending, offset, size, name in members]
            self._index += (" ".join(line) + "\n").encode()
        self._write(b"".join(samples.pieces))  # in one piece, so that threads seldom ask for Python's lock
        self.samples += len(samples.rows)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    @property
    def rows(self) -> NDArray[Any]:
        """(samples,) of INDEX_DTYPE, as if this were the split's first shard."""
        return np.frombuffer(self._rows, INDEX_DTYPE)

    def dali_index_pieces(self) -> tuple[bytes, bytearray]:
        """The content of the .idx file, in two pieces: of a million small files it would not fit the memory twice."""
        return b"v1.2 %d\n" % self.samples, self._index

    def shard(self, name: str) -> Shard:
        """The manifest's entry for the finished tar, which is to be called `name`."""
        return Shard(name, self.samples, self._bytes, self._digest.hexdigest())


def _header(name: str, size: int) -> bytes:
    start = name.encode().ljust(100, b"\0") + _HEADER[100:124] + b"%011o\0" % size + _HEADER[136:148]
    return start + b"%06o\0 " % (sum(start) + 8 * ord(" ") + _REST_SUM) + _HEADER[156:]


def index_rows(shards: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """The rows of a split from those of its shards, each as if it were the first."""
    rows = np.concatenate([np.zeros(0, INDEX_DTYPE), *shards])
    rows["shard"] = np.repeat(np.arange(len(shards)), [len(shard) for shard in shards])
    return rows


def split_of(shards: Sequence[tuple[Shard, NDArray[Any]]], num_classes: int) -> Split:
    """What the manifest says of a split with these shards, each with its rows."""
    rows = index_rows([rows for _, rows in shards])
    counts = np.bincount(rows["label"], minlength=num_classes).tolist()
    return Split(len(rows), tuple(counts), tuple(shard for shard, _ in shards), hashlib.sha256(npy(rows)).hexdigest())


def npy(rows: NDArray[Any]) -> memoryview:
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, rows)
    return file.getbuffer()


class ShardReader:
    """The samples of one split by index. Thread-safe; files are opened at first use, of all readers at most so many.

    They are read, not mapped: a mapped file that is cut short kills the process, and its pages count as the process's memory.

    strict  raise ShardError at construction when a shard is missing or has another size than the manifest says; else its
    samples, as far as they are damaged, raise SampleError.
    fetch  is called with the name of a shard before its file is opened, and has it there.
    """

    _open: ClassVar[dict[tuple[int, int], "_File"]] = {}  # by reader and shard

    def __init__(
        self, manifest: Manifest, split: str, *, strict: bool = True, fetch: Callable[[str], object] | None = None
    ) -> None:
        self._fetch = fetch
        self.index = manifest.index(split)
        self._paths = [manifest.folder / shard.name for shard in manifest.split(split).shards]
        for path, shard in zip(self._paths, manifest.split(split).shards if strict else (), strict=strict):
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes, the manifest says {shard.bytes}"
                raise ShardError(f"{path}: {found}; restore the shard from a copy, or pack again.")

    def encoded(self, index: int) -> bytes:
        """The image file's bytes of a sample. Raises SampleError when they are not those that were packed."""
        row = self.index[index]
        start = int(row["offset"])
        try:
            data = self._read(int(row["shard"]), start, int(row["size"]))
        except OSError as error:
            blame_the_system(error, self._paths[int(row["shard"])])
            raise SampleError(f"{self.where(index)}: its shard cannot be read ({error}).") from None
        if zlib.crc32(data) != row["crc32"]:
            raise SampleError(
                f"{self.where(index)}: its bytes have changed since it was packed (checksum mismatch); "
                f"restore the shard from a copy, or pack again."
            )
        return data

    def where(self, index: int) -> str:
        """Shard, key and original path of a sample, for messages; as much as the shard still tells."""
        row = self.index[index]
        shard, start = int(row["shard"]), int(row["offset"])
        place = str(self._paths[shard])
        try:
            header = self._read(shard, start - _BLOCK, _BLOCK)
            key = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name.rpartition(".")[0]
            return f"{place}: sample {key} ({self.path(index)})"
        except (OSError, tarfile.HeaderError, ValueError, KeyError):
            return f"{place}: sample {index}"

    def path(self, index: int) -> str:
        """The path, relative to the packed folder, that a sample's image had: from the .json behind it."""
        row = self.index[index]
        shard, header = int(row["shard"]), int(row["offset"]) + -(-int(row["size"]) // _BLOCK) * _BLOCK
        note = tarfile.TarInfo.frombuf(self._read(shard, header, _BLOCK), "utf-8", "replace")
        return json.loads(self._read(shard, header + _BLOCK, note.size))["filename"]

    def _read(self, shard: int, start: int, size: int) -> bytes:
        """Bytes of a shard; fewer where it ends before."""
        key = (id(self), shard)
        found = ShardReader._open.get(key)
        if found is None:
            if len(ShardReader._open) >= min(_MOST_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4):
                ShardReader._open.clear()
            found = ShardReader._open.setdefault(key, self._opened(shard))  # another thread may have been first
        return os.pread(found.number, size, start)

    def _opened(self, shard: int) -> "_File":
        path, refused = self._paths[shard], 0
        while True:
            if self._fetch is not None:
                self._fetch(path.name)
            try:
                return _File(path)
            except FileNotFoundError:
                if self._fetch is None:  # else another process needed the room
                    raise
            except OSError as error:
                refused += 1
                if error.errno not in (errno.EMFILE, errno.ENFILE) or refused == _TRIES:
                    raise
            if refused:
                ShardReader._open.clear()
                sleep(0.01)

    def keep(self, names: Collection[str]) -> None:
        """Close all other shards' files."""
        for key in list(ShardReader._open):
            if key[0] == id(self) and self._paths[key[1]].name not in names:
                ShardReader._open.pop(key, None)

    def __del__(self) -> None:
        self.keep(())


class Paths(Sequence[str]):
    """The path of every sample of a split, by index. Each is read from its shard when it is asked for: of ten million samples all
    would take a gigabyte, and minutes. A copy in another process, or by `copy.deepcopy`, is a tuple of all.
    """

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader.index)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        found = range(len(self))[index]
        return tuple(map(self._reader.path, found)) if isinstance(found, range) else self._reader.path(found)

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (tuple(self),)  # open files are none of another process


class _File:
    """An open file that is closed when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
