"""Packs a folder of class folders into shards.

Everything is planned from names and sizes first, so any worker can make any shard, and the bytes on disk are a function
of (input, options, seed). Work happens in OUT/.packing; files are renamed into place at the end, the manifest last.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from fastflower.errors import ArgumentError, FolderError, SampleError
from fastflower.folder import Folder, Photo, scan
from fastflower.image import prepare
from fastflower.manifest import FILE, Manifest, Shard, Split, write_atomically
from fastflower.order import epoch_order
from fastflower.shard import ShardWriter, describe, index_rows

_WORK = ".packing"
_MAX_SLUG = 64  # characters: with the hash and an ending it fits the 100 bytes of a tar header's name


def pack(
    folder: str | Path,
    out: str | Path = "shards",
    *,
    split_by: Literal["class", "random"] = "class",
    val_fraction: float = 0.2,
    seed: int = 0,
    shard_bytes: int = 64 << 20,
    max_side: int | None = None,
    quality: int | None = None,
    on_bad: Literal["skip", "fail"] = "skip",
    on_conflict: Literal["keep", "drop"] = "keep",
    workers: int | None = None,
    executor: Executor | None = None,
) -> Manifest:
    """Pack FOLDER, one folder of images a class, into WebDataset shards in OUT.

    Every image is decoded in full; JPEG files are copied bit for bit, everything else is transcoded to JPEG. Images with
    identical bytes stay in one split. The same folder, options and seed give the same bytes.

    Args:
        folder: The folder of class folders, read as torchvision's ImageFolder reads it.
        out: The folder to write; must not hold a pack already.
        split_by: "class" takes val_fraction of every class, "random" of all images together.
        val_fraction: The share of the images that goes into split "val", 0 to less than 1.
        seed: Of the split and of the order in the shards.
        shard_bytes: The most bytes of images in a shard.
        max_side: Pixels; reduces images whose longer side is longer.
        quality: JPEG quality, 1 to 95; transcodes every image.
        on_bad: "skip" lists images that do not decode in the manifest, "fail" stops at one.
        on_conflict: "drop" leaves out identical images that stand under different labels; "keep" reports them.
        workers: Threads; all cores by default.
        executor: Any concurrent.futures.Executor to make the shards, one a task, instead of threads.

    Returns the manifest. Raises FolderError when the folder cannot be packed as it stands, ArgumentError for an argument
    outside its rule.
    """
    _check_arguments(split_by, val_fraction, shard_bytes, max_side, quality, on_bad, on_conflict, workers)
    found, out = scan(folder), Path(out)
    if (out / FILE).exists():
        raise FolderError(f"{out}: holds a pack already; name another folder with --out, or remove this one.")
    with _workspace(out) as work:
        groups = _identical(found)
        conflicts = [group for group in groups if len({found.photos[number].label for number in group}) > 1]
        dropped = {number for group in conflicts for number in group} if on_conflict == "drop" else set[int]()
        plan = _plan(found, groups, dropped, split_by, val_fraction, seed, shard_bytes)
        tasks = {
            name: [
                _Task(found.root, work / _shard_name(name, number), photos, max_side, quality, on_bad)
                for number, photos in enumerate(shards)
            ]
            for name, shards in plan.items()
        }
        made = _run([task for group in tasks.values() for task in group], workers, executor)
        results = {name: _numbered(name, [made[task.out] for task in group], work) for name, group in tasks.items()}
        skipped = [item for result in made.values() for item in result.skipped]
        skipped += [{"path": path, "reason": "is not named as an image"} for path in found.ignored]
        skipped += [{"path": found.photos[n].path, "reason": "stands under two labels"} for n in dropped]
        manifest = Manifest(
            folder=out,
            classes=found.classes,
            splits={name: _split(group, len(found.classes)) for name, group in results.items()},
            options={
                "split_by": split_by,
                "val_fraction": val_fraction,
                "seed": seed,
                "shard_bytes": shard_bytes,
                "max_side": max_side,
                "quality": quality,
                "on_bad": on_bad,
                "on_conflict": on_conflict,
            },
            skipped=tuple(sorted(skipped, key=lambda item: item["path"])),
            duplicates=tuple(tuple(found.photos[n].path for n in group) for group in groups),
            label_conflicts=tuple(tuple(found.photos[n].path for n in group) for group in conflicts),
            versions={"fastflower": version("fastflower")},
        )
        _check_result(manifest)
        _publish(manifest, results, work)
    return manifest


def _check_arguments(
    split_by: str,
    val_fraction: float,
    shard_bytes: int,
    max_side: int | None,
    quality: int | None,
    on_bad: str,
    on_conflict: str,
    workers: int | None,
) -> None:
    rules = [
        ("split_by", split_by, split_by in ("class", "random"), "'class' or 'random'"),
        ("val_fraction", val_fraction, 0 <= val_fraction < 1, "0 or more and less than 1"),
        ("shard_bytes", shard_bytes, shard_bytes >= 1, "at least 1"),
        ("max_side", max_side, max_side is None or max_side >= 1, "at least 1 pixel"),
        ("quality", quality, quality is None or 1 <= quality <= 95, "1 .. 95"),
        ("on_bad", on_bad, on_bad in ("skip", "fail"), "'skip' or 'fail'"),
        ("on_conflict", on_conflict, on_conflict in ("keep", "drop"), "'keep' or 'drop'"),
        ("workers", workers, workers is None or workers >= 1, "at least 1"),
    ]
    for name, value, holds, rule in rules:
        if not holds:
            raise ArgumentError(f"{name} must be {rule}, got {value!r}.")


@contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """OUT/.packing, locked against a second pack, removed at the end whatever happens; OUT too if it holds nothing else."""
    work = out / _WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FolderError(
                    f"{out}: another pack is writing here; wait for it, or name another folder with --out."
                ) from None
            try:
                yield work
            finally:
                shutil.rmtree(work)
                if not any(out.iterdir()):
                    out.rmdir()
    except OSError as error:  # images that cannot be read are skipped, so it is about writing
        reason = error.strerror or error
        raise FolderError(
            f"{out}: cannot be written ({reason}); make room, or name another folder with --out."
        ) from error


def _identical(found: Folder) -> list[tuple[int, ...]]:
    """Groups of photographs with the same bytes, by position in `found.photos`; only files of equal size are read."""
    by_size: defaultdict[int, list[int]] = defaultdict(list)
    for number, photo in enumerate(found.photos):
        by_size[photo.size_bytes].append(number)
    by_hash: defaultdict[bytes, list[int]] = defaultdict(list)
    for numbers in by_size.values():
        for number in numbers if len(numbers) > 1 else ():
            try:
                with (found.root / found.photos[number].path).open("rb") as file:
                    by_hash[hashlib.file_digest(file, "sha256").digest()].append(number)
            except OSError:
                continue  # will be listed as skipped when its shard is made
    return sorted(tuple(group) for group in by_hash.values() if len(group) > 1)


def _plan(
    found: Folder,
    groups: Sequence[tuple[int, ...]],
    dropped: set[int],
    split_by: str,
    val_fraction: float,
    seed: int,
    shard_bytes: int,
) -> dict[str, list[list[Photo]]]:
    """Which photograph goes into which shard of which split, in order."""
    group_of = {number: group for group in groups for number in group}
    strata: defaultdict[int, list[int]] = defaultdict(list)
    for number, photo in enumerate(found.photos):
        if number not in dropped:
            strata[photo.label if split_by == "class" else 0].append(number)
    val: set[int] = set()
    for numbers in strata.values():
        wanted = round(len(numbers) * val_fraction)
        taken = sum(number in val for number in numbers)  # with an identical image of another class
        # Epochs -1 and -2 of the order function belong to packing: never the order of a training epoch.
        for position in epoch_order(len(numbers), seed=seed, epoch=-1):
            if taken >= wanted:
                break
            number = numbers[position]
            if number not in val:
                group = set(group_of.get(number, (number,))) - dropped
                val |= group
                taken += len(group.intersection(numbers)) if len(group) > 1 else 1
    kept = [number for numbers in strata.values() for number in numbers]
    plan = {"train": [n for n in kept if n not in val], "val": [n for n in kept if n in val]}
    return {
        name: list(_shards([found.photos[n] for n in sorted(numbers)], seed, shard_bytes))
        for name, numbers in plan.items()
    }


def _shards(photos: list[Photo], seed: int, shard_bytes: int) -> Iterator[list[Photo]]:
    """Shuffle, and cut into as few shards of about equal size as `shard_bytes` allows."""
    if not photos:
        return
    shuffled = [photos[position] for position in epoch_order(len(photos), seed=seed, epoch=-2)]
    ends = np.cumsum([photo.size_bytes for photo in shuffled])
    count = max(1, -(-int(ends[-1]) // shard_bytes))
    numbers = np.minimum((ends - 1) * count // max(1, int(ends[-1])), count - 1)
    for number in np.unique(numbers):
        yield [shuffled[position] for position in np.flatnonzero(numbers == number)]


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


@dataclass(frozen=True, slots=True)
class _Task:
    """One shard to make; can be sent to another process."""

    root: Path
    out: Path
    photos: list[Photo]
    max_side: int | None
    quality: int | None
    on_bad: str


@dataclass(frozen=True, slots=True)
class _Made:
    shard: Shard
    rows: list[tuple[int, ...]]
    skipped: list[dict[str, str]]


def _make(task: _Task, advance: Callable[[], object] = lambda: None) -> _Made:
    """Write one shard and its DALI index into the workspace."""
    skipped: list[dict[str, str]] = []
    with ShardWriter(task.out) as writer:
        for photo in task.photos:
            try:
                data = (task.root / photo.path).read_bytes()
                image, size = prepare(data, max_side=task.max_side, quality=task.quality)
            except (OSError, SampleError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                if task.on_bad == "fail":
                    remedy = "remove or replace it, or pack with --on-bad skip."
                    raise FolderError(f"{task.root / photo.path}: {reason}; {remedy}") from error
                skipped.append({"path": photo.path, "reason": str(reason)})
            else:
                writer.add(key_of(photo.path), image, photo.label, size, photo.path)
            advance()
    task.out.with_suffix(".idx").write_text(writer.dali_index())
    return _Made(describe(task.out, task.out.name, len(writer.rows)), writer.rows, skipped)


def key_of(path: str) -> str:
    """A sample's key: the readable part of its path and a hash of all of it, [0-9A-Za-z_-]+.

    DALI and webdataset lose samples, silently, whose keys hold other characters or a dot.
    """
    slug = re.sub(r"[^0-9A-Za-z_-]+", "_", path.rpartition(".")[0])[-_MAX_SLUG:]
    return f"{slug}-{hashlib.sha256(path.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _run(tasks: list[_Task], workers: int | None, executor: Executor | None) -> dict[Path, _Made]:
    """Make the shards, largest first; stop at the first error."""
    total = sum(len(task.photos) for task in tasks)
    tasks = sorted(tasks, key=lambda task: -sum(photo.size_bytes for photo in task.photos))
    pool = executor or ThreadPoolExecutor(workers or os.cpu_count())
    with tqdm(total=total, desc="pack", unit="image", disable=None) as bar:
        futures: dict[Future[_Made], _Task] = {}
        try:
            for task in tasks:
                # A foreign executor may run elsewhere: there the bar moves a shard at a time.
                submitted = pool.submit(_make, task) if executor else pool.submit(_make, task, bar.update)
                futures[submitted] = task
            made: dict[Path, _Made] = {}
            for future in as_completed(futures):
                made[futures[future].out] = future.result()
                if executor:
                    bar.update(len(futures[future].photos))
            return made
        finally:
            wait([future for future in futures if not future.cancel()])  # those that run still write into the workspace
            if executor is None:
                pool.shutdown(wait=True)


def _numbered(split: str, group: list[_Made], work: Path) -> list[_Made]:
    """Leave out shards of which no image decoded (DALI reads no empty shard), and number the others without a gap."""
    kept: list[_Made] = []
    for made in group:
        if made.rows:
            shard = replace(made.shard, name=_shard_name(split, len(kept)))
            for ending in (".tar", ".idx"):
                (work / made.shard.name).with_suffix(ending).replace((work / shard.name).with_suffix(ending))
            kept.append(replace(made, shard=shard))
    return kept


def _split(results: list[_Made], num_classes: int) -> Split:
    counts = Counter(row[3] for result in results for row in result.rows)
    shards = tuple(result.shard for result in results)
    return Split(sum(counts.values()), tuple(counts[label] for label in range(num_classes)), shards)


def _check_result(manifest: Manifest) -> None:
    """Every class must have something to learn from, or the split and the labels mean something else than was asked."""
    for label, name in enumerate(manifest.classes):
        if not manifest.splits["train"].class_counts[label]:
            raise FolderError(
                f"class {name!r}: none of its images is left for training; add images, or remove the class folder. "
                f"{len(manifest.skipped)} files were skipped in all."
            )


def _publish(manifest: Manifest, results: dict[str, list[_Made]], work: Path) -> None:
    """Finish every file in the workspace, then rename them into place, the manifest last; all of them or none."""
    parts: list[str] = []
    info: dict[str, object] = {}
    for name, group in results.items():
        parts += [made.shard.name for made in group]
        parts += [str(Path(made.shard.name).with_suffix(".idx")) for made in group]
        parts.append(f"{name}.index.npy")
        rows = io.BytesIO()
        np.save(rows, index_rows([made.rows for made in group]))
        write_atomically(work / parts[-1], rows.getvalue())
        info[name] = {
            "name": name,
            "num_samples": manifest.splits[name].samples,
            "filenames": [made.shard.name for made in group],
            "shard_lengths": [made.shard.samples for made in group],
        }
    parts += ["_info.json", FILE]  # the former is what timm's ReaderWds reads
    write_atomically(work / "_info.json", (json.dumps({"splits": info}, indent=1) + "\n").encode())
    write_atomically(work / FILE, manifest.to_json().encode("utf-8", "backslashreplace"))  # see ShardWriter.add
    placed: list[Path] = []
    try:
        for part in parts:
            placed.append((work / part).replace(manifest.folder / part))
    except OSError:
        for path in placed:
            path.unlink()
        raise
