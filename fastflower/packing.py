"""Packs a folder of images into shards.

The bytes on disk are a function of (input, options, seed). Work happens in OUT/.packing: the plan, a lock, and finished parts.
A pack that is interrupted goes on from there; at the end files are renamed into place, the manifest last.
"""

import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from numbers import Integral
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import PIL
from tqdm import tqdm

from fastflower.duplicates import nearest
from fastflower.errors import ArgumentError, FolderError, HeldError, require
from fastflower.files import blame_the_system, locked, sync, write_atomically
from fastflower.folder import Folder, scan
from fastflower.machine import cores, version_of
from fastflower.part import STOP, Part, make_part
from fastflower.planning import Plan, check_counts, check_same, load_plan, make_plan, save_plan
from fastflower.remarks import remarks
from fastflower.shards.manifest import FILE, INFO, PLAN, WORK, Manifest, shard_name
from fastflower.shards.writer import index_rows, npy, split_of

_log = logging.getLogger("fastflower")

_ENDINGS = (".tar", ".idx", ".npy")
_LISTS = ("classes.txt", "meta")


def pack(
    folder: str | Path,
    out: str | Path = "shards",
    *,
    split_by: Literal["class", "random", "folder"] | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    shard_bytes: int = 64 << 20,
    max_side: int | None = None,
    quality: int | None = None,
    on_bad: Literal["skip", "fail"] = "skip",
    on_conflict: Literal["keep", "drop"] = "keep",
    lists: bool = False,
    workers: int | None = None,
    executor: Executor | None = None,
) -> Manifest:
    """Pack FOLDER, one folder of images a class, into WebDataset shards in OUT.

    Every image is decoded in full; JPEG files are copied bit for bit, everything else is transcoded to JPEG. Images with
    identical bytes stay in one split. The same folder, options and seed give the same bytes. When it is interrupted, the
    same call goes on where it stopped.

    Args:
        folder: The folder: FOLDER/CLASS/** as torchvision's ImageFolder reads it, FOLDER/train/CLASS and FOLDER/val/CLASS
            (a folder named as a split is never a class), or lists FOLDER/meta/train.txt, FOLDER/meta/val.txt and
            FOLDER/classes.txt.
        out: The folder to write; must not hold a pack already, nor lie in FOLDER.
        split_by: "class" takes val_fraction of every class, at least one image of two, "random" of all images together,
            "folder" keeps the folder's own split. By default the folder's own where it has one, else by class.
        val_fraction: The share of the images that goes into split "val", 0 to less than 1; not used with the folder's own.
        seed: Of the split and of the order in the shards.
        shard_bytes: Of image files in a shard, as they are in FOLDER; exceeded by less than one. Where images are transcoded
            a shard may become larger or smaller.
        max_side: Pixels; reduces images whose longer side is longer.
        quality: JPEG quality, 1 to 95; transcodes every image.
        on_bad: "skip" lists images that do not decode in the manifest, "fail" stops at one.
        on_conflict: "drop" leaves out identical images that stand under different labels; "keep" reports them.
        lists: Also write classes.txt, meta/train.txt and meta/val.txt, with lines "PATH LABEL".
        workers: Threads; all cores by default.
        executor: Any concurrent.futures.Executor to make the shards, one a task, in place of threads; what it runs on must
            see FOLDER and OUT under the same paths.

    Returns the manifest. Raises FolderError when the folder cannot be packed as it stands or OUT cannot be written,
    ArgumentError for an argument outside its rule.
    """
    require(split_by in (None, "class", "random", "folder"), "split_by", "'class', 'random' or 'folder'", split_by)
    for name, value in {"seed": seed, "shard_bytes": shard_bytes, "max_side": max_side, "quality": quality}.items():
        empty = value is None and name in ("max_side", "quality")
        require(empty or isinstance(value, Integral), name, "a whole number", value)
    require(0 <= val_fraction < 1, "val_fraction", "0 or more and less than 1", val_fraction)
    require(shard_bytes >= 1, "shard_bytes", "at least 1", shard_bytes)
    require(max_side is None or max_side >= 1, "max_side", "at least 1 pixel", max_side)
    require(quality is None or 1 <= quality <= 95, "quality", "1 .. 95", quality)
    require(on_bad in ("skip", "fail"), "on_bad", "'skip' or 'fail'", on_bad)
    require(on_conflict in ("keep", "drop"), "on_conflict", "'keep' or 'drop'", on_conflict)
    require(workers is None or workers >= 1, "workers", "at least 1", workers)
    folder, out = Path(folder), Path(out)
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):  # Path.resolve raises at a link to itself
        raise FolderError(f"{out}: lies in {folder}, where it would count as images; name another folder with --out.")
    found = scan(folder, anew=split_by in ("class", "random"))
    split_by = split_by or ("folder" if found.splits else "class")
    if split_by == "folder" and not found.splits:
        raise ArgumentError(f"split_by must be 'class' or 'random' for {folder}, which has no split of its own.")
    if lists:
        _check_names(found)
    options: dict[str, Any] = {
        "split_by": split_by,
        "val_fraction": None if split_by == "folder" else float(val_fraction),  # numpy's are no JSON
        "seed": int(seed),
        "shard_bytes": int(shard_bytes),
        "max_side": max_side and int(max_side),
        "quality": quality and int(quality),
        "on_bad": on_bad,
        "on_conflict": on_conflict,
        "lists": lists,
    }
    threads = workers or cores()
    killed = _exists(out / WORK)
    with _workspace(out) as work, ThreadPoolExecutor(threads) as pool:
        if (out / FILE).exists():
            manifest = Manifest.load(out)
            files = sum(split.samples for split in manifest.splits.values()) + len(manifest.skipped)
            same = manifest.options == options and manifest.classes == found.classes
            if not killed or not same or files != len(found) + len(found.ignored):
                raise FolderError(f"{out}: holds a pack already; name another folder with --out, or remove this one.")
            (work / PLAN).unlink(missing_ok=True)  # it was killed when all that was left was to remove the workspace
            return manifest
        plan = _begun(found, options, work, partial(_ahead, pool, 2 * threads))
        del found  # the plan has the same, mapped from files
        try:
            _withdraw(plan, work)
            _run(plan, work, pool, threads, executor)
            manifest = _publish(plan, work)
            for remark in remarks(manifest):
                _log.warning("%s: %s", manifest.folder, remark)
        except FolderError:  # lies in the images, so going on would not help
            (work / PLAN).unlink()
            raise
        (work / PLAN).unlink()
    return manifest


def _check_names(found: Folder) -> None:
    breaks = np.flatnonzero((found.paths == ord("\n")) | (found.paths == ord("\r")))
    if len(breaks):
        path = found.path(int(np.searchsorted(found.files["path_end"], breaks[0], "right")))
        raise FolderError(
            f"{str(found.root / path)!r}: has a line break in its name; rename it, or pack without --lists."
        )


@contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """OUT/.packing, locked against a second pack. It stays while it holds a plan to go on with; OUT goes if it is empty."""
    work = out / WORK
    try:
        with locked(work / "lock"):
            try:
                yield work
            finally:
                if not (work / PLAN).exists():
                    shutil.rmtree(work, ignore_errors=True)  # NFS keeps files that are open; what stays is no plan
                    with suppress(OSError):  # not empty, a link, or where a disk is mounted
                        out.rmdir()
    except HeldError as error:
        what = f"another pack is writing here ({error}); wait for it, or name another folder with --out."
        raise FolderError(f"{out}: {what}") from None
    except (OSError, BrokenExecutor, MemoryError) as error:  # images that cannot be read are skipped: not about them
        blame_the_system(error, out)
        if isinstance(error, MemoryError):
            what = "is not finished: memory ran out; pack with fewer workers (--workers 1)."
        elif isinstance(error, OSError):
            what = f"cannot be written ({error.strerror or error}); make room, or name another folder with --out."
        else:
            what = f"a worker died ({error}); pack with fewer workers where memory ran out."
        again = " The same command goes on where this one stopped." if _exists(work / PLAN) else ""
        raise FolderError(f"{out}: {what}{again}") from error


def _exists(path: Path) -> bool:
    """Also where the question is an error, such as a name that is too long; Path.exists raises it."""
    return os.path.exists(path)  # noqa: PTH110  (which does not raise)


def _begun(found: Folder, options: dict[str, Any], work: Path, mapped: Callable[..., Iterable[Any]]) -> Plan:
    """The plan of the pack that was interrupted here, or a new one; saved, and read from the workspace in both cases."""
    out = work.parent
    versions = {"fastflower": version_of("fastflower"), "pillow": PIL.__version__, "opencv": cv2.__version__}
    if not (work / PLAN).exists():
        names = [INFO, *_LISTS] if options["lists"] else [INFO]
        taken = [path.name for path in sorted(out.iterdir()) if path.name in names or path.suffix in _ENDINGS]
        if taken:
            raise FolderError(f"{out}: holds {taken[0]} already; name another folder with --out, or remove this one.")
        save_plan(make_plan(found, options, versions, mapped), work)
    plan = load_plan(work, whole=True)
    check_same(plan, found, options, versions, work)
    return replace(plan, found=replace(plan.found, root=found.root))  # it may have moved


def _ahead(pool: ThreadPoolExecutor, depth: int, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """As pool.map, with at most `depth` items begun that are not yet taken: memory does not grow with their number."""
    begun: deque[Future[Any]] = deque()
    for item in items:
        begun.append(pool.submit(function, item))
        if len(begun) >= depth:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _run(plan: Plan, work: Path, pool: ThreadPoolExecutor, threads: int, executor: Executor | None) -> None:
    """Make the parts; stop at the first error."""
    work = work.absolute()  # elsewhere the current folder may be another
    root = plan.found.root.absolute()
    (work / STOP).unlink(missing_ok=True)
    token = os.urandom(8)
    makers = executor or ThreadPoolExecutor(2)  # while one waits for the disk, the other keeps the pool busy
    with tqdm(total=len(plan.order), desc="pack", unit="image", disable=None) as bar:
        begun: list[Future[int]] = []
        try:
            for number in range(len(plan.parts)):
                if executor:  # it may run elsewhere: there the bar moves a shard at a time
                    begun.append(makers.submit(make_part, root, work, number, token=token))
                else:
                    mapped = partial(_ahead, pool, threads + 2)
                    begun.append(makers.submit(make_part, root, work, number, mapped, bar.update))
            for future in as_completed(begun):
                count = future.result()
                if executor:
                    bar.update(count)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # so that those that run end soon
            if executor:
                (work / STOP).touch()
            raise
        finally:  # They still write into the workspace. An executor's are not cancelled: dask calls so what runs on.
            wait([future for future in begun if executor or not future.cancel()])
            if executor is None:
                makers.shutdown()


def _kept(plan: Plan, work: Path) -> dict[str, list[tuple[str, Part]]]:
    """By split, (name in the workspace, part) of the parts with images, which alone get a number: DALI reads no empty shard."""
    kept: dict[str, list[tuple[str, Part]]] = {split: [] for split in plan.splits}
    for split, name, *_ in plan.parts:
        part = Part.load(work / f"{name}.npz")
        if part.shard.samples:
            shard = replace(part.shard, name=f"{shard_name(split, len(kept[split]))}.tar")
            kept[split].append((name, replace(part, shard=shard)))
    return kept


def _moves(kept: dict[str, list[tuple[str, Part]]], work: Path) -> list[tuple[Path, Path]]:
    """(from, to) of tars and DALI's indexes."""
    return [
        (work / f"{name}{ending}", (work.parent / part.shard.name).with_suffix(ending))
        for parts in kept.values()
        for name, part in parts
        for ending in (".tar", ".idx")
    ]


def _withdraw(plan: Plan, work: Path) -> None:
    """Take back what a pack that was killed while it published had in place already."""
    try:
        moves = _moves(_kept(plan, work), work)
    except OSError:  # a record is missing: nothing is in place yet; or it is damaged: what is gone is made again
        return
    for source, target in moves:
        if target.exists() and not source.exists():
            target.replace(source)


def _publish(plan: Plan, work: Path) -> Manifest:
    """Finish every file in the workspace, then rename them into place, the manifest last; all of them or none."""
    kept, out = _kept(plan, work), work.parent
    parts = {split: [part for _, part in group] for split, group in kept.items()}
    manifest = _described(plan, out, parts, [Part.load(work / f"{part.name}.npz") for part in plan.parts])
    moves = _moves(kept, work)
    for name, data in _files(plan, manifest, parts):
        (work / name).parent.mkdir(exist_ok=True)
        write_atomically(work / name, data)
        moves.append((work / name, out / name))
    placed: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            if target.name == FILE:
                sync(out)
            target.parent.mkdir(exist_ok=True)
            source.replace(target)
            placed.append((source, target))
        sync(out)
    except OSError:
        for source, target in placed:
            target.replace(source)
        raise
    return manifest


def _files(plan: Plan, manifest: Manifest, parts: dict[str, list[Part]]) -> Iterator[tuple[str, bytes | memoryview]]:
    """(name, content) of what stands beside the tars, the manifest last."""
    for split, group in parts.items():
        yield f"{split}.index.npy", npy(index_rows([part.rows for part in group]))
    if plan.options["lists"]:
        yield from _lists(plan, parts).items()
    yield INFO, manifest.to_info().encode()
    yield FILE, manifest.to_json().encode("utf-8", "backslashreplace")


def _lists(plan: Plan, parts: dict[str, list[Part]]) -> dict[str, bytes]:
    """classes.txt and a list for each split, in the folder's order; scan reads them."""
    lists = {"classes.txt": "".join(f"{name}\n" for name in plan.found.classes).encode("utf-8", "surrogateescape")}
    labels = plan.found.files["label"]
    for split, group in parts.items():
        numbers = np.sort(np.concatenate([np.zeros(0, np.int64), *(part.numbers for part in group)]))
        lines = (f"{plan.found.path(number)} {labels[number]}\n" for number in numbers)
        lists[f"meta/{split}.txt"] = b"".join(line.encode("utf-8", "surrogateescape") for line in lines)
    return lists


def _described(plan: Plan, out: Path, parts: dict[str, list[Part]], made: list[Part]) -> Manifest:
    found, conflicts = plan.found, plan.conflicts()
    dropped = [number for group in conflicts for number in group] if plan.options["on_conflict"] == "drop" else []
    left_out = [item for part in made for item in part.skipped]
    left_out += [{"path": path, "reason": reason} for path, reason in found.ignored]
    left_out += [{"path": found.path(number), "reason": "stands under two labels"} for number in dropped]
    splits = {
        split: split_of([(part.shard, part.rows) for part in group], len(found.classes))
        for split, group in parts.items()
    }
    check_counts(found.classes, splits["train"].class_counts, len(left_out), "skipped")
    every = [part for group in parts.values() for part in group]
    return Manifest(
        folder=out,
        classes=found.classes,
        splits=splits,
        options=plan.options,
        skipped=tuple(sorted(left_out, key=itemgetter("path"))),
        warnings=tuple(sorted((item for part in made for item in part.warnings), key=itemgetter("path"))),
        duplicates=tuple(tuple(found.path(number) for number in group) for group in plan.groups),
        label_conflicts=tuple(tuple(found.path(number) for number in group) for group in conflicts),
        near_duplicates=tuple(_near_duplicates(plan, parts)),
        source_bytes=sum(int(found.files["size"][part.numbers].sum()) for part in every),
        packed_bytes=sum(int(part.rows["size"].sum()) for part in every),
        versions=plan.versions,
    )


def _near_duplicates(plan: Plan, parts: dict[str, list[Part]]) -> Iterator[dict[str, Any]]:
    """For each image of the other splits the one most like it in "train", where there is one; in the order of their paths."""
    train = parts["train"]
    hashes = np.concatenate([part.hashes for part in train])
    numbers = np.concatenate([part.numbers for part in train])
    for split, group in parts.items():
        if split != "train" and group:
            mine = np.concatenate([part.numbers for part in group])
            positions, distances = nearest(np.concatenate([part.hashes for part in group]), hashes)
            near = np.flatnonzero(distances >= 0)
            for place in near[np.argsort(mine[near])]:
                yield {
                    "split": split,
                    "path": plan.found.path(int(mine[place])),
                    "train_path": plan.found.path(int(numbers[positions[place]])),
                    "distance": int(distances[place]),
                }
