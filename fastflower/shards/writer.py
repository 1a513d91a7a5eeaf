"""Writes WebDataset tar shards and their DALI indexes."""

import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Sequence
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from fastflower.shards.manifest import INDEX_DTYPE, Shard, Split

BLOCK = 512  # bytes; tar's block size
# A member's header without name and size. With owner 0, mode 644 and time 0, the bytes depend only on the contents.
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_REST_SUM = sum(_HEADER[156:])
_ROW = struct.Struct("<IQIIiII")  # INDEX_DTYPE


class Samples:
    """Consecutive samples in tar format. Any thread can build them; ShardWriter.extend appends them.

    The bytes equal those of Python's tarfile in USTAR format, but tarfile takes six times as long.
    """

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.rows: list[tuple[int, ...]] = []
        """(offset, size, crc32, label, width, height) of each image."""
        self.members: list[list[tuple[str, int, int, str]]] = []
        """(extension, offset, size, name) of each sample's files."""
        self._bytes = 0

    def add(self, key: str, image: bytes, label: int, size: tuple[int, int], source: str, class_name: str) -> None:
        """Add KEY.cls, KEY.jpg and KEY.json. size  (height, width) of the decoded image. source  Original path of the image."""
        # timm looks for the path under "filename".
        # A name that is not valid UTF-8 contains surrogates; backslashreplace writes them as JSON escapes.
        note = json.dumps({"filename": source, "class": class_name}, ensure_ascii=False)
        files = (("cls", b"%d" % label), ("jpg", image), ("json", note.encode("utf-8", "backslashreplace")))
        members: list[tuple[str, int, int, str]] = []
        for extension, data in files:
            name = f"{key}.{extension}"
            offset = self._bytes + BLOCK
            padding = -len(data) % BLOCK
            self.pieces += (_header(name, len(data)), data, bytes(padding))
            self._bytes = offset + len(data) + padding
            members.append((extension, offset, len(data), name))
        self.members.append(members)
        self.rows.append((members[1][1], len(image), zlib.crc32(image), label, size[1], size[0]))


class ShardWriter:
    """Writes one tar and collects its indexes. The bytes depend only on the samples and their order."""

    def __init__(self, file: BinaryIO) -> None:
        self.samples = 0
        self._file = file
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._rows = bytearray()
        self._index = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # a tar ends with two empty blocks and is padded to records of 20 blocks
            self._write(bytes(-(self._bytes + 2 * BLOCK) % tarfile.RECORDSIZE + 2 * BLOCK))

    def extend(self, samples: Samples) -> None:
        """Append samples to the tar and its indexes."""
        start = self._bytes
        for offset, *row in samples.rows:
            self._rows += _ROW.pack(0, start + offset, *row)
        for members in samples.members:
            # DALI's index v1.2: extension, offset, size and name of each member (nvidia/dali/tools/wds2idx.py).
            line = [f"{extension} {start + offset} {size} {name}" for extension, offset, size, name in members]
            self._index += (" ".join(line) + "\n").encode()
        self._write(b"".join(samples.pieces))  # in one call, so that threads rarely wait for the GIL
        self.samples += len(samples.rows)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    @property
    def rows(self) -> NDArray[np.void]:
        """Rows of the index, (samples,) of INDEX_DTYPE. Their shard number is 0 until `index_rows` sets it."""
        return np.frombuffer(self._rows, INDEX_DTYPE)

    def dali_index_pieces(self) -> tuple[bytes, bytearray]:
        """Return the content of the .idx file in two pieces. Joining them would double the memory for a million small files."""
        return b"v1.2 %d\n" % self.samples, self._index

    def shard(self, name: str) -> Shard:
        """Return the manifest entry of the finished tar, which will be named `name`."""
        return Shard(name, self.samples, self._bytes, self._digest.hexdigest())


def _header(name: str, size: int) -> bytes:
    start = name.encode().ljust(100, b"\0") + _HEADER[100:124] + b"%011o\0" % size + _HEADER[136:148]
    return start + b"%06o\0 " % (sum(start) + 8 * ord(" ") + _REST_SUM) + _HEADER[156:]


def index_rows(shards: Sequence[NDArray[np.void]]) -> NDArray[np.void]:
    """Concatenate the index rows of a split's shards, and number the shards from 0."""
    rows = np.concatenate([np.zeros(0, INDEX_DTYPE), *shards])
    rows["shard"] = np.repeat(np.arange(len(shards)), [len(shard) for shard in shards])
    return rows


def split_of(shards: Sequence[Shard], rows: NDArray[np.void], num_classes: int) -> Split:
    """Return the manifest entry of a split with these shards and index rows."""
    counts = np.bincount(rows["label"], minlength=num_classes).tolist()
    return Split(len(rows), tuple(counts), tuple(shards), hashlib.sha256(npy(rows)).hexdigest())


def npy(array: NDArray[np.generic]) -> memoryview:
    """Return an array as the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getbuffer()
