"""WebDataset tar shards: writing them with DALI's index beside, and reading single samples back by offset."""

import hashlib
import io
import json
import mmap
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import SampleError, ShardError
from fastflower.manifest import INDEX_DTYPE, Manifest, Shard

_BLOCK = 512  # bytes: tar's unit


@dataclass(slots=True)
class ShardWriter:
    """Writes one tar and its DALI index; the bytes depend on what is added and in which order, nothing else."""

    path: Path
    rows: list[tuple[int, ...]] = field(default_factory=list)
    _file: Any = None
    _tar: Any = None
    _index: list[str] = field(default_factory=list)

    def __enter__(self) -> "ShardWriter":
        self._file = self.path.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def add(self, key: str, image: bytes, label: int, size: tuple[int, int], source: str) -> None:
        """Add KEY.cls, KEY.jpg and KEY.json. size  (height, width) of the decoded image; source  its original path."""
        # "filename" is the key under which timm looks for it.
        # A name that is no UTF-8 has surrogates, and backslashreplace writes them as JSON's own escapes.
        note = json.dumps({"filename": source}, ensure_ascii=False).encode("utf-8", "backslashreplace")
        offsets = {
            ending: self._member(f"{key}.{ending}", data)
            for ending, data in (("cls", str(label).encode()), ("jpg", image), ("json", note))
        }
        height, width = size
        self.rows.append((offsets["jpg"], len(image), zlib.crc32(image), label, width, height))
        sizes = {"cls": len(str(label)), "jpg": len(image), "json": len(note)}
        # DALI's v1.2: extension, offset, size and name of each member (nvidia/dali/tools/wds2idx.py).
        self._index.append(" ".join(f"{end} {offset} {sizes[end]} {key}.{end}" for end, offset in offsets.items()))

    def _member(self, name: str, data: bytes) -> int:
        """Append a file; its owner, mode and time are constant. Returns where its bytes start."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        padded = -(-len(data) // _BLOCK) * _BLOCK
        return self._tar.offset - padded

    def dali_index(self) -> str:
        """The text of the .idx file."""
        return "\n".join([f"v1.2 {len(self._index)}", *self._index]) + "\n"


def describe(path: Path, name: str, samples: int) -> Shard:
    """The manifest's entry for a finished tar, which is to be called `name`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(name=name, samples=samples, bytes=path.stat().st_size, sha256=digest)


def index_rows(shards: Sequence[Sequence[tuple[int, ...]]]) -> NDArray[Any]:
    """The rows that writers collected, one list a shard, as an array of INDEX_DTYPE."""
    rows = [(number, *row) for number, shard in enumerate(shards) for row in shard]
    return np.array(rows, INDEX_DTYPE)


class ShardReader:
    """The samples of one split by index. Thread-safe; files are mapped into memory, opened at first use.

    Raises ShardError at construction when a shard is missing or has another size than the manifest says.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        self.index = manifest.index(split)
        self._paths = [manifest.folder / shard.name for shard in manifest.split(split).shards]
        self._maps: dict[int, mmap.mmap] = {}
        for path, shard in zip(self._paths, manifest.split(split).shards, strict=True):
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes, the manifest says {shard.bytes}"
                raise ShardError(f"{path}: {found}; restore the shard from a copy, or pack again.")

    def encoded(self, index: int) -> memoryview:
        """The image file's bytes of a sample. Raises SampleError when they are not those that were packed."""
        row = self.index[index]
        start = int(row["offset"])
        data = memoryview(self._map(int(row["shard"])))[start : start + int(row["size"])]
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
            header = self._map(shard)[start - _BLOCK : start]
            key = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name.rpartition(".")[0]
            return f"{place}: sample {key} ({self.path(index)})"
        except (tarfile.HeaderError, ValueError, KeyError):
            return f"{place}: sample {index}"

    def path(self, index: int) -> str:
        """The path, relative to the packed folder, that a sample's image had: from the .json behind it."""
        row = self.index[index]
        data = self._map(int(row["shard"]))
        header = int(row["offset"]) + -(-int(row["size"]) // _BLOCK) * _BLOCK
        note = tarfile.TarInfo.frombuf(data[header : header + _BLOCK], "utf-8", "replace")
        return json.loads(data[header + _BLOCK : header + _BLOCK + note.size])["filename"]

    def _map(self, shard: int) -> mmap.mmap:
        found = self._maps.get(shard)
        if found is None:
            with self._paths[shard].open("rb") as file:
                found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            found = self._maps.setdefault(shard, found)  # another thread may have been first
        return found
