"""Makes one shard of a plan, in the workspace, in any process that sees the folders."""

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
from fastflower.files import blame_the_system, write_atomically
from fastflower.packing.duplicates import MapLike
from fastflower.packing.plan import Plan, load_plan
from fastflower.shards.image import prepare
from fastflower.shards.manifest import Shard
from fastflower.shards.writer import Samples, ShardWriter

STOP = "stop"  # a file in the workspace: those that make shards are to end
_MAX_SLUG = 64  # characters: with the hash and an ending it fits the 100 bytes of a tar header's name
_CHUNK_BYTES = 1 << 20  # of images that a thread decodes in one go
_MAX_BYTES = 1 << 30  # of one image: more is no image, and several at a time would fill the memory
_SMALL = 1 << 12  # bytes: what every image counts for at least, for it takes memory besides its own
# np.load has Python parse what a file says of its array, which now and then fails in two threads at a time: SystemError,
# https://github.com/python/cpython/issues/106905, still so in 3.11.7.
_LOADING = threading.Lock()


@dataclass(frozen=True, slots=True)
class MadeShard:
    """A finished shard, as its record in the workspace tells it."""

    entry: Shard
    """What the manifest says of it, with its name in the workspace."""
    rows: NDArray[np.void]
    """Of INDEX_DTYPE, as if this were the split's first shard."""
    numbers: NDArray[np.int64]
    """Of its images in the folder."""
    hashes: NDArray[np.uint64]
    """Perceptual, of its images."""
    skipped: list[dict[str, str]]
    warnings: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    def save(self, path: Path) -> None:
        """Write the record, whole or not at all."""
        rest = {"shard": asdict(self.entry), "skipped": self.skipped, "warnings": self.warnings}
        data, text = io.BytesIO(), np.frombuffer(json.dumps(rest).encode(), np.uint8)
        np.savez(data, rows=self.rows, numbers=self.numbers, hashes=self.hashes, rest=text)
        write_atomically(path, data.getbuffer())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record. Raises OSError when it is missing or damaged."""
        try:
            # Given a path, np.load leaves a damaged file open.
            with _LOADING, path.open("rb") as file, np.load(file) as record:
                rest = json.loads(record["rest"].tobytes())
                arrays, warnings = (record["rows"], record["numbers"], record["hashes"]), rest.get("warnings", [])
                return cls(Shard(**rest["shard"]), *arrays, rest["skipped"], warnings)  # older records have no warnings
        except (EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
            raise OSError(f"{path} is damaged: {error}") from error


def make_shard(
    plan: Plan, work: Path, number: int, mapped: MapLike = map, advance: Callable[[int], object] = lambda _: None
) -> int:
    """Make one shard, unless it is there already: its tar, DALI's index and a record of both, which comes last.

    Can run in any process that sees the folders, also twice at a time. Ends early where the workspace holds STOP.
    advance  is told of images that are done. Returns the number of images.
    """
    if (work / STOP).exists():
        return 0
    _, name, start, stop = plan.shards[number]
    numbers = plan.order[start:stop]
    if _is_made(work, name):
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
                for planned, chunk in zip(chunks, mapped(partial(_prepared, plan), chunks), strict=True):
                    if (work / STOP).exists():
                        return 0
                    writer.extend(chunk.samples)
                    kept.append(np.array(chunk.numbers, np.int64))
                    hashes.append(np.array(chunk.hashes, np.uint64))
                    skipped += chunk.skipped
                    warnings += chunk.warnings
                    advance(len(planned))
            file.flush()
            os.fsync(file.fileno())
        attempt.replace(work / f"{name}.tar")
    finally:
        attempt.unlink(missing_ok=True)
    write_atomically(work / f"{name}.idx", *writer.dali_index_pieces())
    arrays = writer.rows, np.concatenate(kept), np.concatenate(hashes)
    MadeShard(writer.shard(f"{name}.tar"), *arrays, skipped, warnings).save(work / f"{name}.npz")
    return len(numbers)


def make_shard_elsewhere(root: Path, work: Path, number: int, token: bytes) -> int:
    """As `make_shard`, in a process of an executor, which reads the plan itself, once a pack.

    token  tells this pack from others: the executor may serve another one to the same folder later, and dask answers a
    call that it knows with what came of that one.
    """
    with _LOADING:
        plan = _loaded(root, work, token)
    return make_shard(plan, work, number)


@lru_cache(maxsize=1)
def _loaded(root: Path, work: Path, token: bytes) -> Plan:  # noqa: ARG001  (token: of which pack)
    return load_plan(work, root)


@dataclass(slots=True)
class _Chunk:
    """Some samples, with their images' numbers and perceptual hashes, what is odd about them, and what is left out."""

    samples: Samples = field(default_factory=Samples)
    numbers: list[int] = field(default_factory=list[int])
    hashes: list[int] = field(default_factory=list[int])
    skipped: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    warnings: list[dict[str, str]] = field(default_factory=list[dict[str, str]])


def _prepared(plan: Plan, numbers: NDArray[np.int64]) -> _Chunk:
    """Read and prove images. Raises FolderError for one that is bad where the options say so."""
    folder, options, chunk = plan.folder, plan.options, _Chunk()
    for number in numbers.tolist():
        path, odd = folder.path(number), list[str]()
        file, size, label = folder.root / path, int(folder.files["size"][number]), int(folder.files["label"][number])
        try:
            if size > _MAX_BYTES:
                raise SampleError(f"has {size} bytes, more than the limit of {_MAX_BYTES}")
            image = prepare(file.read_bytes(), max_side=options.max_side, quality=options.quality, warn=odd.append)
        except (OSError, SampleError) as error:
            blame_the_system(error, file)
            reason = str((isinstance(error, OSError) and error.strerror) or error)
            if options.on_bad == "fail":
                raise FolderError(f"{file}: {reason}; remove or replace it, or pack with --on-bad skip.") from error
            chunk.skipped.append({"path": path, "reason": reason})
            continue
        chunk.samples.add(key_of(path), image.encoded, label, image.size, path, folder.classes[label])
        chunk.numbers.append(number)
        chunk.hashes.append(image.hash)
        chunk.warnings += [{"path": path, "warning": text} for text in odd]
    return chunk


def _is_made(work: Path, name: str) -> bool:
    """Whether a shard is there, whole; also after a power cut."""
    try:
        entry = MadeShard.load(work / f"{name}.npz").entry
        with (work / f"{name}.tar").open("rb") as tar:
            return hashlib.file_digest(tar, "sha256").hexdigest() == entry.sha256 and (work / f"{name}.idx").exists()
    except OSError:
        return False


def key_of(path: str) -> str:
    """A sample's key: the readable part of its path and a hash of all of it, [0-9A-Za-z_-]+.

    DALI and webdataset lose samples, silently, whose keys hold other characters or a dot. 64 bits of hash: of a million
    names of which nothing is readable, two get the same key with a probability of 3e-8.
    """
    slug = re.sub(r"[^0-9A-Za-z_-]+", "_", path.rpartition(".")[0])[-_MAX_SLUG:]
    return f"{slug}-{hashlib.sha256(path.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
