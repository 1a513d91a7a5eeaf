"""Makes one shard of a plan, in any process that sees the folders: a part, until it is renamed into place."""

import hashlib
import io
import json
import os
import re
import threading
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import FolderError, SampleError
from fastflower.files import blame_the_system, write_atomically
from fastflower.packing.plan import Plan, load_plan
from fastflower.shards.image import prepare
from fastflower.shards.manifest import Shard
from fastflower.shards.writer import Samples, ShardWriter

STOP = "stop"  # a file in the workspace: those that make parts are to end
_MAX_SLUG = 64  # characters: with the hash and an ending it fits the 100 bytes of a tar header's name
_CHUNK_BYTES = 1 << 20  # of images that a thread decodes in one go
_MAX_BYTES = 1 << 30  # of one image: more is no photograph, and several at a time would fill the memory
_SMALL = 1 << 12  # bytes: what every image counts for at least, for it takes memory besides its own
# np.load has Python parse what a file says of its array, which now and then fails in two threads at a time: SystemError,
# https://github.com/python/cpython/issues/106905, still so in 3.11.7.
_LOADING = threading.Lock()


_REST = ("shard", "skipped", "warnings")  # of a part, besides its arrays


@dataclass(frozen=True, slots=True)
class Part:
    """A finished part, as its record in the workspace tells it."""

    shard: Shard
    rows: NDArray[Any]
    numbers: NDArray[np.int64]
    """Of its images in the folder."""
    hashes: NDArray[np.uint64]
    skipped: list[dict[str, str]]
    warnings: list[dict[str, str]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the record, whole or not at all."""
        rest = json.dumps({name: getattr(self, name) for name in _REST}, default=asdict).encode()
        data = io.BytesIO()
        np.savez(data, rows=self.rows, numbers=self.numbers, hashes=self.hashes, rest=np.frombuffer(rest, np.uint8))
        write_atomically(path, data.getbuffer())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record. Raises OSError when it is missing or damaged."""
        try:
            # Given a path, np.load leaves a damaged file open.
            with _LOADING, path.open("rb") as file, np.load(file) as record:
                rest = json.loads(record["rest"].tobytes())
                told = rest["skipped"], rest.get("warnings", [])  # the latter is not in records of older versions
                return cls(Shard(**rest["shard"]), record["rows"], record["numbers"], record["hashes"], *told)
        except (EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
            raise OSError(f"{path} is damaged: {error}") from error


def make_part(
    root: Path,
    work: Path,
    number: int,
    mapped: Callable[..., Iterable[Any]] = map,
    advance: Callable[[int], object] = lambda _: None,
    token: object = None,  # noqa: ARG001  (only has to differ between calls)
) -> int:
    """Make one part, unless it is there already: its tar, DALI's index and a record of both, which comes last.

    Can run in any process that sees the folders, also twice at a time. Ends early where the workspace holds STOP.
    token  tells this call from others: dask answers a call that it knows with what came of that one.
    Returns the number of images.
    """
    if (work / STOP).exists():
        return 0
    with _LOADING:
        plan = load_plan(work)
    name, numbers = plan.parts[number].name, plan.order[plan.parts[number].start : plan.parts[number].stop]
    if _is_made(work, name):
        advance(len(numbers))
        return len(numbers)
    sizes = np.cumsum(np.maximum(plan.found.files["size"][numbers].astype(np.int64), _SMALL))
    chunks = np.split(numbers, np.flatnonzero(np.diff(sizes // _CHUNK_BYTES)) + 1)
    skipped, warnings = list[dict[str, str]](), list[dict[str, str]]()
    kept, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    attempt = work / f"{name}.{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}.part"
    try:
        with attempt.open("wb") as file:
            with ShardWriter(file) as writer:
                for chunk, made in zip(chunks, mapped(partial(_prepared, root, plan), chunks), strict=True):
                    if (work / STOP).exists():
                        return 0
                    writer.extend(made.samples)
                    kept.append(np.array(made.numbers, np.int64))
                    hashes.append(np.array(made.hashes, np.uint64))
                    skipped += made.skipped
                    warnings += made.warnings
                    advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        attempt.replace(work / f"{name}.tar")
    finally:
        attempt.unlink(missing_ok=True)
    write_atomically(work / f"{name}.idx", *writer.dali_index_pieces())
    shard = writer.shard(f"{name}.tar")
    arrays = (writer.rows, np.concatenate(kept), np.concatenate(hashes))
    Part(shard, *arrays, skipped, warnings).save(work / f"{name}.npz")
    return len(numbers)


@dataclass(slots=True)
class _Chunk:
    """Some samples, with their images' numbers and perceptual hashes, what is odd about them, and what is left out."""

    samples: Samples = field(default_factory=Samples)
    numbers: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    warnings: list[dict[str, str]] = field(default_factory=list)


def _prepared(root: Path, plan: Plan, numbers: NDArray[np.int64]) -> _Chunk:
    """Read and prove images. Raises FolderError for one that is bad where the options say so."""
    found, made = plan.found, _Chunk()
    max_side, quality = plan.options["max_side"], plan.options["quality"]
    for number in numbers.tolist():
        path, told = found.path(number), list[str]()
        try:
            if found.files["size"][number] > _MAX_BYTES:
                raise SampleError(f"has {found.files['size'][number]} bytes, more than the limit of {_MAX_BYTES}")
            image = prepare((root / path).read_bytes(), max_side=max_side, quality=quality, warn=told.append)
        except (OSError, SampleError) as error:
            blame_the_system(error, root / path)
            reason = str((isinstance(error, OSError) and error.strerror) or error)
            if plan.options["on_bad"] == "fail":
                remedy = "remove or replace it, or pack with --on-bad skip."
                raise FolderError(f"{root / path}: {reason}; {remedy}") from error
            made.skipped.append({"path": path, "reason": reason})
            continue
        label = int(found.files["label"][number])
        made.samples.add(key_of(path), image.encoded, label, image.size, path, found.classes[label])
        made.numbers.append(number)
        made.hashes.append(image.hash)
        made.warnings += [{"path": path, "warning": text} for text in told]
    return made


def _is_made(work: Path, name: str) -> bool:
    """Whether a part is there, whole; also after a power cut."""
    try:
        shard = Part.load(work / f"{name}.npz").shard
        with (work / f"{name}.tar").open("rb") as tar:
            return hashlib.file_digest(tar, "sha256").hexdigest() == shard.sha256 and (work / f"{name}.idx").exists()
    except OSError:
        return False


def key_of(path: str) -> str:
    """A sample's key: the readable part of its path and a hash of all of it, [0-9A-Za-z_-]+.

    DALI and webdataset lose samples, silently, whose keys hold other characters or a dot. 64 bits of hash: of a million
    names of which nothing is readable, two get the same key with a probability of 3e-8.
    """
    slug = re.sub(r"[^0-9A-Za-z_-]+", "_", path.rpartition(".")[0])[-_MAX_SLUG:]
    return f"{slug}-{hashlib.sha256(path.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
