"""Makes one shard of a plan in the workspace. Runs in any process with access to the folders."""

import hashlib
import io
import json
import os
import re
import threading
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import FolderError, SampleError
from fastflower.files import blame_the_system, flush, write_atomically
from fastflower.packing.duplicates import MapLike
from fastflower.packing.plan import Plan, load_plan
from fastflower.shards.image import Prepared, prepare
from fastflower.shards.kinds import ANNEX
from fastflower.shards.manifest import Shard
from fastflower.shards.writer import Samples, ShardWriter

STOP = "stop"  # a file in the workspace that tells workers to stop
_MAX_SLUG = 64  # characters; with the hash and an extension, a key fits the 100 bytes for a name in a tar header
_CHUNK_BYTES = 1 << 20  # of images per task
_MAX_BYTES = 1 << 30  # per image; a larger file is unlikely to be an image, and a few at a time would exhaust memory
_SMALL = 1 << 12  # bytes; smaller images count as this size, because of their overhead in memory
# np.load parses a file's header with Python's parser, which can raise SystemError if two threads use it at once:
# https://github.com/python/cpython/issues/106905, not fixed in 3.11.7.
_LOADING = threading.Lock()


class DamagedError(FolderError):
    """Raised if an image is damaged and on_bad is "fail", without what to type, which only the process of `pack` knows."""


@dataclass(frozen=True, slots=True)
class MadeShard:
    """Record of a finished shard, saved in the workspace."""

    entry: Shard
    """The shard's entry in the manifest, but with its name in the workspace."""
    rows: NDArray[np.void]
    """(N,) index rows of INDEX_DTYPE, as if this were the split's first shard."""
    numbers: NDArray[np.int64]
    """(N,) indices of the images in the folder."""
    hashes: NDArray[np.uint64]
    """(N,) perceptual hashes."""
    skipped: list[dict[str, str]]
    warnings: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    dropped: tuple[int, ...] = ()
    """Labels of the plan's classes that are left out. The labels in the shard and in `rows` do not count them."""

    def save(self, path: Path) -> None:
        """Save the record atomically."""
        rest = {"shard": asdict(self.entry), "skipped": self.skipped, "warnings": self.warnings}
        rest |= {"dropped": self.dropped} if self.dropped else {}
        data, text = io.BytesIO(), np.frombuffer(json.dumps(rest).encode(), np.uint8)
        np.savez(data, rows=self.rows, numbers=self.numbers, hashes=self.hashes, rest=text)
        write_atomically(path, data.getbuffer())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load a record. Raises OSError if it is missing or damaged."""
        try:
            # If given a path, np.load leaves a damaged file open.
            with _LOADING, path.open("rb") as file, np.load(file) as record:
                rest = json.loads(record["rest"].tobytes())
                arrays, warnings = (record["rows"], record["numbers"], record["hashes"]), rest.get("warnings", [])
                dropped = tuple(rest.get("dropped", ()))  # older records have neither warnings nor dropped classes
                return cls(Shard(**rest["shard"]), *arrays, rest["skipped"], warnings, dropped)
        except (EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
            raise OSError(f"{path} is damaged: {error}") from error


def make_shard(
    plan: Plan, work: Path, number: int, mapped: MapLike = map, advance: Callable[[int], object] = lambda _: None
) -> int:
    """Make one shard unless it exists: its tar, its DALI index and, last, its record.

    Any process with access to the folders can call this, even while another process makes the same shard. Returns the
    number of images, or 0 if stopped early because the workspace contains STOP.

    advance  Called with the number of images just done.
    """
    if (work / STOP).exists():
        return 0
    _, name, start, stop = plan.shards[number]
    numbers = plan.order[start:stop]
    if _is_complete(work, name):
        advance(len(numbers))
        return len(numbers)
    sizes = np.cumsum(np.maximum(plan.folder.files["size"][numbers].astype(np.int64), _SMALL))
    chunks = np.split(numbers, np.flatnonzero(np.diff(sizes // _CHUNK_BYTES)) + 1)
    skipped, warnings = list[dict[str, str]](), list[dict[str, str]]()
    kept, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    attempt = work / f"{name}.{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}.part"
    try:
        with attempt.open("wb") as file:
            with ShardWriter(file) as writer:
                for planned, chunk in zip(chunks, mapped(partial(_prepare_chunk, plan), chunks), strict=True):
                    if (work / STOP).exists():
                        return 0
                    writer.extend(chunk.samples)
                    kept.append(np.array(chunk.numbers, np.int64))
                    hashes.append(np.array(chunk.hashes, np.uint64))
                    skipped += chunk.skipped
                    warnings += chunk.warnings
                    advance(len(planned))
            flush(file)
        attempt.replace(work / f"{name}.tar")
    finally:
        attempt.unlink(missing_ok=True)
    write_atomically(work / f"{name}.idx", *writer.dali_index_pieces())
    arrays = writer.rows, np.concatenate(kept), np.concatenate(hashes)
    MadeShard(writer.shard(f"{name}.tar"), *arrays, skipped, warnings, plan.dropped).save(work / f"{name}.npz")
    return len(numbers)


def make_shard_elsewhere(root: Path, work: Path, number: int, token: bytes) -> int:
    """Make one shard in a worker process of an executor. Each worker loads the plan once per pack.

    token  Bytes that are unique to the pack. Without them, a later pack into the same folder would get the cached plan,
    and dask would return the cached results of equal calls.
    """
    with _LOADING:
        plan = _load_plan_once(root, work, token)
    return make_shard(plan, work, number)


@lru_cache(maxsize=1)
def _load_plan_once(root: Path, work: Path, token: bytes) -> Plan:  # noqa: ARG001  (token is part of the cache key)
    return load_plan(work, root)


@dataclass(slots=True)
class _Chunk:
    """Samples of one task, with image numbers, perceptual hashes, skipped files and decoder warnings."""

    samples: Samples = field(default_factory=Samples)
    numbers: list[int] = field(default_factory=list[int])
    hashes: list[int] = field(default_factory=list[int])
    skipped: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    warnings: list[dict[str, str]] = field(default_factory=list[dict[str, str]])


def _prepare_chunk(plan: Plan, numbers: NDArray[np.int64]) -> _Chunk:
    """Read and check images. Raises DamagedError if an image is damaged and on_bad is "fail"."""
    folder, chunk = plan.folder, _Chunk()
    for number in numbers.tolist():
        path, label, warnings = folder.path(number), int(folder.files["label"][number]), list[str]()
        try:
            image = read_image(plan, number, warnings.append)
        except SampleError as error:
            chunk.skipped.append({"path": path, "reason": str(error)})
            continue
        new = new_label(label, plan.dropped)
        chunk.samples.add(key_of(path), image.encoded, new, image.size, path, folder.classes[label])
        chunk.numbers.append(number)
        chunk.hashes.append(image.hash)
        chunk.warnings += [{"path": path, "warning": text} for text in warnings]
    return chunk


def read_image(plan: Plan, number: int, warn: Callable[[str], object] = lambda _: None) -> Prepared:
    """Read and check one image. Raises SampleError with the reason, or DamagedError if on_bad is "fail"."""
    path, size, options = plan.folder.path(number), int(plan.folder.files["size"][number]), plan.options
    file = plan.folder.root / path
    try:
        if size > _MAX_BYTES:
            raise SampleError(f"has {size} bytes, more than the limit of {_MAX_BYTES}")
        return prepare(file.read_bytes(), max_side=options.max_side, quality=options.quality, warn=warn, name=path)
    except (OSError, SampleError) as error:
        blame_the_system(error, file)
        reason = str((isinstance(error, OSError) and error.strerror) or error)
        if isinstance(error, OSError) and ".git/annex/objects/" in os.path.realpath(file):  # a link without its content
            reason = ANNEX
        if options.on_bad == "fail":
            raise DamagedError(f"{file}: {reason}") from error
        raise SampleError(reason) from error


def new_label(label: int, dropped: tuple[int, ...]) -> int:
    """Return a class's label in the pack, which does not count the classes that are left out."""
    return label - sum(other < label for other in dropped)


def _is_complete(work: Path, name: str) -> bool:
    """Return whether a shard exists and is undamaged. A power failure may have damaged it."""
    try:
        entry = MadeShard.load(work / f"{name}.npz").entry
        with (work / f"{name}.tar").open("rb") as tar:
            return hashlib.file_digest(tar, "sha256").hexdigest() == entry.sha256 and (work / f"{name}.idx").exists()
    except OSError:
        return False


def key_of(path: str) -> str:
    """Return a sample's key, [0-9A-Za-z_-]+: a readable part of its path and a hash of the entire path.

    DALI and webdataset silently lose samples if a key contains other characters, such as dots. The hash has 64 bits: among
    a million keys that differ only in the hash, the probability of a collision is 3e-8.
    """
    slug = re.sub(r"[^0-9A-Za-z_-]+", "_", path.rpartition(".")[0])[-_MAX_SLUG:]
    return f"{slug}-{hashlib.sha256(path.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
