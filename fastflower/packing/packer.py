"""Packs a folder of images into shards.

The bytes on disk are a function of (input, options, seed). Work happens in OUT/.packing: the plan, a lock, and finished shards.
A pack that is interrupted goes on from there; at the end files are renamed into place, the manifest last.
"""

import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from fastflower.errors import ArgumentError, FolderError, require
from fastflower.machine import cores
from fastflower.packing.duplicates import Item, Result
from fastflower.packing.folder import Folder, scan
from fastflower.packing.plan import Options, Plan
from fastflower.packing.publishing import publish, withdraw
from fastflower.packing.remarks import remarks
from fastflower.packing.worker import STOP, make_shard, make_shard_elsewhere
from fastflower.packing.workspace import begun_plan, workspace
from fastflower.shards.manifest import FILE, PLAN, WORK, Manifest

_log = logging.getLogger("fastflower")


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

    Example:
        >>> manifest = pack("flowers", "packed", val_fraction=0.1)
        >>> manifest.classes
        ('daisy', 'dandelion', 'rose', 'sunflower', 'tulip')
        >>> {name: split.samples for name, split in manifest.splits.items()}
        {'train': 135, 'val': 15}
    """
    require(0 <= val_fraction < 1, "val_fraction", "0 or more and less than 1", val_fraction)
    options = Options(split_by, float(val_fraction), seed, shard_bytes, max_side, quality, on_bad, on_conflict, lists)
    require(workers is None or workers >= 1, "workers", "at least 1", workers)
    return _pack(Path(folder), Path(out), options, workers or cores(), executor)


def _pack(root: Path, out: Path, asked: Options, threads: int, executor: Executor | None) -> Manifest:
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(root)):  # Path.resolve raises at a link to itself
        raise FolderError(f"{out}: lies in {root}, where it would count as images; name another folder with --out.")
    folder = scan(root, anew=asked.split_by in ("class", "random"))
    options = _settled(asked, folder)
    interrupted = os.path.exists(out / WORK)  # noqa: PTH110  (does not raise)
    with workspace(out) as work, ThreadPoolExecutor(threads) as pool:
        if (out / FILE).exists():
            manifest = Manifest.load(out)
            files = sum(split.samples for split in manifest.splits.values()) + len(manifest.skipped)
            same = manifest.options == asdict(options) and manifest.classes == folder.classes
            if not interrupted or not same or files != len(folder) + len(folder.ignored):
                raise FolderError(f"{out}: holds a pack already; name another folder with --out, or remove this one.")
            (work / PLAN).unlink(missing_ok=True)  # it was killed when all that was left was to remove the workspace
            return manifest
        plan = begun_plan(folder, options, work, partial(_ahead, pool, 2 * threads))
        del folder  # the plan has the same, mapped from files
        try:
            withdraw(plan, work)
            _make_shards(plan, work, pool, threads, executor)
            manifest = publish(plan, work)
            for remark in remarks(manifest):
                _log.warning("%s: %s", manifest.folder, remark)
        except FolderError:  # lies in the images, so going on would not help
            (work / PLAN).unlink()
            raise
        (work / PLAN).unlink()
    return manifest


def _settled(options: Options, folder: Folder) -> Options:
    """With the split that suits the folder where none was asked for; its own has no fraction."""
    split_by = options.split_by or ("folder" if folder.splits else "class")
    if split_by == "folder" and not folder.splits:
        raise ArgumentError(f"split_by must be 'class' or 'random' for {folder.root}, which has no split of its own.")
    if options.lists and (line_break := re.search(rb"[\n\r]", folder.paths.data)):
        path = folder.root / folder.path(folder.image_at(line_break.start()))
        raise FolderError(f"{str(path)!r}: has a line break in its name; rename it, or pack without --lists.")
    return replace(options, split_by=split_by, val_fraction=None if split_by == "folder" else options.val_fraction)


def _ahead(
    pool: ThreadPoolExecutor, depth: int, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """As pool.map, with at most `depth` items begun that are not yet taken: memory does not grow with their number."""
    begun: deque[Future[Result]] = deque()
    for item in items:
        begun.append(pool.submit(function, item))
        if len(begun) >= depth:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _make_shards(plan: Plan, work: Path, pool: ThreadPoolExecutor, threads: int, executor: Executor | None) -> None:
    """Make the shards; stop at the first error. Nobody writes into the workspace any more when it returns or raises."""
    (work / STOP).unlink(missing_ok=True)  # of a pack that was interrupted
    begun: list[Future[int]] = []
    # Two makers: while one waits for the disk, the other keeps the pool busy.
    with tqdm(total=len(plan.order), desc="pack", unit="image", disable=None) as bar, ThreadPoolExecutor(2) as makers:
        mapped, token = partial(_ahead, pool, threads + 2), os.urandom(8)
        try:
            for number in range(len(plan.shards)):
                if executor:  # where it runs, the current folder may be another
                    task = executor.submit(make_shard_elsewhere, plan.folder.root, work.absolute(), number, token)
                else:
                    task = makers.submit(make_shard, plan, work, number, mapped, bar.update)
                begun.append(task)
            for future in as_completed(begun):
                count = future.result()
                if executor:
                    bar.update(count)
        except BaseException:
            if executor:
                (work / STOP).touch()
            for running in (makers, pool):  # so that it ends soon
                running.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            if executor:
                wait(begun)  # none is cancelled: dask calls so what runs on
