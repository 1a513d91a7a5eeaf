"""Packs a folder of images into shards.

The bytes on disk depend only on input, options and seed. OUT/.packing holds the plan, a lock and the finished shards,
so an interrupted pack can resume. At the end, the files are renamed into place, the manifest last.
"""

import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from fastflower import progress
from fastflower.errors import MISFIT, ArgumentError, FolderError, fitted, integer, require
from fastflower.machine import cores
from fastflower.packing.advice import is_archive, is_file, refused
from fastflower.packing.again import packing
from fastflower.packing.archives import root_in, unpacked
from fastflower.packing.columns import Columns
from fastflower.packing.containers import packed_already
from fastflower.packing.duplicates import Item, Result
from fastflower.packing.folder import Folder, scan
from fastflower.packing.listing import Tables, with_neighbors
from fastflower.packing.lists import is_table
from fastflower.packing.lost_classes import LostClassError, without_lost_classes
from fastflower.packing.plan import Options, Plan
from fastflower.packing.publishing import publish, unpublish
from fastflower.packing.remarks import remarks, summary
from fastflower.packing.space import check_space
from fastflower.packing.worker import STOP, DamagedError, make_shard, make_shard_elsewhere
from fastflower.packing.workspace import load_or_make_plan, workspace
from fastflower.shards.manifest import FILE, PLAN, WORK, Manifest
from fastflower.suggestions import keywords

_log = logging.getLogger("fastflower")

_VAL_FRACTION = 0.2  # by default

accepting: ContextVar[Callable[[Folder], None]] = ContextVar("accepting", default=lambda _: None)
"""What may refuse a folder that was listed, before any image is read."""


@keywords
@progress.shown()
def pack(
    folder: str | Path,
    out: str | Path = "shards",
    *,
    labels: str | Path | Sequence[str | Path] = (),
    split: str | Path | Sequence[str | Path] = (),
    path_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    split_by: Literal["class", "random", "folder"] | None = None,
    val_fraction: float | None = None,
    test_fraction: float = 0.0,
    folds: int | None = None,
    seed: int = 0,
    shard_bytes: int = 64 << 20,
    max_side: int | None = None,
    quality: int | None = None,
    on_bad: Literal["skip", "fail"] = "skip",
    on_conflict: Literal["keep", "drop"] = "keep",
    lists: bool = False,
    ignore: Sequence[str] = (),
    drop_empty_classes: bool = False,
    as_split: Literal["val", "test"] | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
) -> Manifest:
    """Pack FOLDER, with one subfolder of images per class, into WebDataset shards in OUT.

    Every image is fully decoded to check it. JPEG files are copied bit for bit; other formats are transcoded to JPEG.
    Images with identical bytes stay in one split. The same folder, options and seed always give the same bytes. To
    resume an interrupted pack, repeat the call.

    Args:
        folder: The images, in one of three layouts: FOLDER/CLASS/** as torchvision's ImageFolder reads it;
            FOLDER/train/CLASS/** and FOLDER/val/CLASS/** (a folder named after a split is never a class); or the lists
            FOLDER/meta/train.txt, FOLDER/meta/val.txt and FOLDER/classes.txt. A val or test folder may be alone. Or a zip
            or tar archive of such a folder, which is unpacked in OUT while packing. Or a table or list of the images in
            its folder: data/train.csv is the folder data with labels="data/train.csv". If data/val.csv lies beside it, it is
            the val split, and data/test.csv the test split, unless you ask for another split.
        out: The folder to write. It must not be inside FOLDER or already contain packed shards.
        labels: A table (CSV, TSV or JSON lines) or list of images and their labels, or one file per split, such as
            train.csv and val.csv. The labels are names or numbers. A column of splits divides the images.
        split: A table or list of paths and splits ("train", "val", "test"), or one list of paths per split, named after
            it. Images that it does not name are skipped.
        path_column: The column of paths in these tables: its name or, from 1, its number. By default the column with a
            usual name, such as path, file_name, image or id.
        label_column: The column of labels. By default the column named label, class or category, or the only one left.
        split_column: The column of splits. By default the column named split, if any.
        split_by: "class" puts val_fraction of each class into the val split, but at least one image if the class has two
            or more. "random" takes val_fraction of all images together. "folder" keeps the folder's own split. The
            default is "folder" if the folder has a split, else "class".
        val_fraction: Fraction of images in the val split, at least 0 and below 1; by default 0.2. If split_by is "folder",
            it is the fraction of training images that a folder without a val split contributes to one; by default none. A
            fraction for a split that the folder has is an error.
        test_fraction: Fraction of images in a test split. If split_by is "folder", it is the fraction of training images that
            a folder without a test split contributes to one.
        folds: Divide the images into this many folds for cross-validation, at least 2, instead of drawing a val split. Each
            class is spread evenly over the folds; copies and near-duplicates share a fold. A test split stays a test
            split. A val split of the folder is divided together with train.
        seed: Random seed for the split and for the order of the images in the shards.
        shard_bytes: Target size of a shard in bytes. A shard's source images exceed it in total by less than one image.
            Transcoding can make the shard larger or smaller.
        max_side: Downscale images whose longer side exceeds this many pixels.
        quality: Transcode every image to JPEG with this quality, 1 to 95.
        on_bad: "skip" skips damaged images and lists them in the manifest, "fail" stops at the first one.
        on_conflict: What to do with identical images under different labels: "keep" packs and reports them, "drop" skips
            them.
        lists: Also write classes.txt, meta/train.txt and meta/val.txt, with lines "PATH LABEL".
        ignore: Patterns of files and folders to leave out, as in .gitignore: "raw" and "*_mask.png" match names at every
            depth, "train/raw" and "/raw" match paths relative to FOLDER, "raw/" matches only folders. Names that begin
            with a dot and names that systems add, such as Thumbs.db and @eaDir, are left out unless a list names them.
        drop_empty_classes: Leave out classes without a readable training image, with a warning, instead of raising an error.
            At least two classes must remain. The images of such a class in other splits are skipped.
        as_split: Put all images into this split, for example a test set that comes in a folder of its own. Only for a folder
            without splits. One class is enough.
        workers: Number of threads; by default one per core.
        executor: A concurrent.futures.Executor that makes the shards instead of threads, one shard per task. Its workers
            must see FOLDER and OUT under the same paths.

    Returns the manifest. Raises FolderError if the folder cannot be packed as it is or OUT cannot be written, and
    ArgumentError if an argument is invalid.

    Example:
        >>> manifest = pack("flowers", "packed", val_fraction=0.1)
        >>> manifest.classes
        ('daisy', 'dandelion', 'rose', 'sunflower', 'tulip')
        >>> {name: split.samples for name, split in manifest.splits.items()}
        {'train': 135, 'val': 15}
    """
    rule = "omitted with folds, because each fold is the val split in turn"
    require(folds is None or val_fraction is None, "val_fraction", rule, val_fraction)
    options = Options(
        split_by=split_by,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        folds=folds,
        seed=seed,
        shard_bytes=shard_bytes,
        max_side=max_side,
        quality=quality,
        on_bad=on_bad,
        on_conflict=on_conflict,
        lists=lists,
        ignore=cast("tuple[str, ...]", ignore),
        drop_empty_classes=drop_empty_classes,
        as_split=as_split,
    )
    share = 0.0 if options.folds else _VAL_FRACTION if options.val_fraction is None else options.val_fraction
    rule = "at least 0 and, added to val_fraction, less than 1"
    require(options.test_fraction < 1 - share, "test_fraction", rule, test_fraction)
    threads = cores() if workers is None else integer("workers", workers, 1)
    require(executor is None or hasattr(executor, "submit"), "executor", "a concurrent.futures.Executor", executor)
    root, target, tables_of_labels = _path("folder", folder), _path("out", out), _paths("labels", labels)
    require(as_split is None or not split, "as_split", "omitted with split, which divides the images", as_split)
    columns = _columns(path_column=path_column, label_column=label_column, split_column=split_column)
    if is_table(root):
        require(not tables_of_labels, "labels", f"omitted, because {root} is a table itself", labels)
        other = split or as_split or folds or test_fraction or split_by in ("class", "random")
        root, tables_of_labels = root.parent, with_neighbors(root, columns, divided=not other and val_fraction is None)
    tables = Tables(tables_of_labels, _paths("split", split), columns)
    progress.tell("pack", summary(manifest := _pack(root, tables, target, options, threads, executor)))
    return manifest


def _path(name: str, value: object) -> Path:
    require(isinstance(value, str | os.PathLike), name, "a path", value)
    return Path(cast("str", value))


def _paths(name: str, files: object) -> list[Path]:
    several = cast("Iterable[object]", files) if isinstance(files, Iterable) and not isinstance(files, str) else [files]
    return [_path(name, file) for file in several]


def _columns(**columns: str | int | None) -> Columns:
    for name, value in columns.items():
        require(fitted(str | int | None, value) is not MISFIT, name, "a column's name or, from 1, its number", value)
    return Columns(*(None if value is None else str(value) for value in columns.values()))


def _below(root: Path, files: Sequence[Path]) -> list[Path]:
    """Return files, those that exist only below `root` with their path there."""
    return [root / file if not file.exists() and (root / file).exists() else file for file in files]


def _pack(root: Path, tables: Tables, out: Path, asked: Options, threads: int, executor: Executor | None) -> Manifest:
    if any(root.glob("*.index.npy")) and (root / FILE).exists() and not tables.labels:
        raise FolderError(packed_already(root, root))
    if is_inside(out, root) and (not tables.labels or is_inside(root, out)):  # a table's images are named, so no matter
        what = f"is inside the folder to pack ({root}) and would become part of it"
        beside = os.path.normpath(root / os.pardir / (out.name or "shards"))
        raise FolderError(f"{out}: {what}; choose another folder:\n  {packing({'out': beside})}")
    if is_file(root) and (why := refused(root)):
        raise FolderError(f"{root}: {why}.")
    resplit, drop_empty = asked.split_by in ("class", "random"), asked.drop_empty_classes
    find = partial(scan, resplit=resplit, ignore=asked.ignore, drop_empty_classes=drop_empty, as_split=asked.as_split)
    folder = None if is_archive(root) else find(root, tables)
    options = _resolved(asked, folder) if folder else asked
    if folder and not os.path.exists(out / FILE):  # noqa: PTH110  (Path.exists can raise)
        check_space(root, folder, options, out)
    interrupted = os.path.exists(out / WORK)  # noqa: PTH110  (Path.exists can raise)
    with workspace(out) as work, ThreadPoolExecutor(threads) as pool, ExitStack() as stack:
        packed = (out / FILE).exists()
        if packed and not interrupted:
            raise _already_packed(out)
        if folder is None:
            used = bool(tables.labels or tables.split)
            content = stack.enter_context(unpacked(root, work, ignore=asked.ignore, tables=used))
            labels, split = (_below(root_in(work), files) for files in (tables.labels, tables.split))
            folder = find(content, tables._replace(labels=labels, split=split))
            options = _resolved(asked, folder)
            check_space(root, folder, options, out)
        if packed:
            manifest = _same(out, folder, options)
            (work / PLAN).unlink(missing_ok=True)  # the pack was killed before it removed the workspace
            return manifest
        plan = load_or_make_plan(folder, options, work, partial(_bounded_map, pool, 2 * threads))
        del folder  # saves memory: the plan memory-maps the same arrays
        try:
            unpublish(plan, work)
            _make_shards(plan, work, pool, threads, executor)
            plan = without_lost_classes(plan, work)
            manifest = publish(plan, work)
            for remark in remarks(manifest, {reason for _, reason in plan.folder.ignored}, plan.count("val")):
                _log.warning("%s: %s", manifest.folder, remark)
        except DamagedError as error:
            (work / PLAN).unlink()
            skip = f"remove or replace it, or skip damaged images:\n  {packing({'on_bad': None})}"
            raise FolderError(f"{error}; {skip}") from error
        except LostClassError:  # the plan and the shards remain
            raise
        except FolderError:  # the images are at fault, so resuming would not help
            (work / PLAN).unlink()
            raise
        (work / PLAN).unlink()
    return manifest


def _same(out: Path, folder: Folder, options: Options) -> Manifest:
    """Return the manifest of a finished pack. Raises FolderError if it is one of another folder, or has other options."""
    manifest = Manifest.load(out)
    files = sum(split.samples for split in manifest.splits.values()) + len(manifest.skipped)
    classes = tuple(name for name in folder.classes if name in manifest.classes)
    dropped = len(folder.classes) - len(classes)  # listed in manifest.skipped
    before: dict[str, Any] = {
        "ignore": [],
        "test_fraction": 0.0,
        "folds": None,
        "drop_empty_classes": False,
        "as_split": None,
        **manifest.options,
    }
    same = before == options.recorded() and manifest.classes == classes
    if not same or files != len(folder) + len(folder.ignored) + dropped:
        raise _already_packed(out)
    return manifest


def is_inside(path: Path, root: Path) -> bool:
    """Return whether a path is a folder, or inside it, whatever links lead there."""
    return Path(os.path.realpath(path)).is_relative_to(
        os.path.realpath(root)
    )  # Path.resolve raises for a link to itself


def _already_packed(out: Path) -> FolderError:
    return FolderError(
        f"{out}: already contains packed shards; remove them, or choose another folder:\n  {packing({'out': out})}"
    )


def _resolved(options: Options, folder: Folder) -> Options:
    """Resolve the defaults of split_by and val_fraction for a folder. val_fraction is None if no val split is to be drawn."""
    accepting.get()(folder)
    split_by = options.split_by or ("folder" if folder.splits else "class")
    if split_by == "folder" and not folder.splits:
        what = f"because {folder.root} has no split of its own, got 'folder'."
        raise ArgumentError(f"split_by must be 'class' or 'random' {what}")
    if options.lists and (line_break := re.search(rb"[\n\r]", folder.paths.data)):
        path = folder.root / folder.path(folder.image_at(line_break.start()))
        raise FolderError(
            f"{str(path)!r}: has a line break in its name; rename it, or pack without lists:\n  {packing({'lists': None})}"
        )
    if options.folds and split_by == "folder" and "val" in folder.splits:
        _log.warning("%s: its val split is divided into folds together with its train split", folder.root)
    fraction = options.val_fraction
    if split_by == "folder" and "train" not in folder.splits:
        given = {"val_fraction": fraction, "test_fraction": options.test_fraction, "folds": options.folds}
        for name, value in given.items():
            what = f"omitted, because {folder.root} has no images for training, only a {folder.splits[0]} split"
            require(not value, name, what, value)
    if split_by == "folder":
        for name, given in (("val", fraction is not None), ("test", options.test_fraction > 0)):
            if given and name in folder.splits:
                what = f"{name}_fraction cannot be used because {folder.root} has its own {name} split"
                remedy = f"leave it out, or draw all splits anew:\n  {packing({'split_by': 'class'})}"
                raise ArgumentError(f"{what}; {remedy}")
        fraction = fraction or None
    elif fraction is None and not options.folds:
        fraction = _VAL_FRACTION
    return replace(options, split_by=split_by, val_fraction=fraction)


def _bounded_map(
    pool: ThreadPoolExecutor, depth: int, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """Map like pool.map, but with at most `depth` pending results, to bound memory."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _make_shards(plan: Plan, work: Path, pool: ThreadPoolExecutor, threads: int, executor: Executor | None) -> None:
    """Make the shards; stop at the first error. When this returns or raises, nothing writes to the workspace anymore."""
    (work / STOP).unlink(missing_ok=True)  # left by an interrupted pack
    tasks: list[Future[int]] = []
    # Two threads write shards: while one waits for the disk, the other keeps the pool busy.
    with progress.bar(total=len(plan.order), desc="pack", unit="image") as bar, ThreadPoolExecutor(2) as writers:
        mapped, token = partial(_bounded_map, pool, threads + 2), os.urandom(8)
        try:
            for number in range(len(plan.shards)):
                if executor:  # its workers may have another working directory
                    task = executor.submit(make_shard_elsewhere, plan.folder.root, work.absolute(), number, token)
                else:
                    task = writers.submit(make_shard, plan, work, number, mapped, bar.update)
                tasks.append(task)
            for task in as_completed(tasks):
                count = task.result()
                if executor:
                    bar.update(count)
        except BaseException:
            if executor:
                (work / STOP).touch()
            for running in (writers, pool):  # stop early
                running.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            if executor:
                wait(tasks)  # do not cancel: dask reports a task as cancelled while it is still running
