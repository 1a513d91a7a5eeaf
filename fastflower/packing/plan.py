"""Plans a pack from names and sizes, before any image is decoded, so that any worker can make any shard.

A plan is saved in the workspace: it is what a pack that was interrupted goes on with, and what workers read.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastflower.draws.order import epoch_order
from fastflower.errors import FolderError, make_plain, require
from fastflower.files import write_atomically
from fastflower.packing.duplicates import Groups, MapLike, identical
from fastflower.packing.folder import Folder
from fastflower.shards.manifest import PLAN, shard_name
from fastflower.shards.writer import npy

_IGNORED = "ignored.json"


@dataclass(frozen=True, slots=True)
class Options:
    """What `pack` is asked for, as the manifest tells it. Raises ArgumentError for a value outside its rule."""

    split_by: Literal["class", "random", "folder"] | None
    """None, before the folder is read, for what suits it."""
    val_fraction: float | None
    """None where the folder's own split is kept."""
    seed: int
    shard_bytes: int
    max_side: int | None
    quality: int | None
    on_bad: Literal["skip", "fail"]
    on_conflict: Literal["keep", "drop"]
    lists: bool

    def __post_init__(self) -> None:
        splits = (None, "class", "random", "folder")
        require(self.split_by in splits, "split_by", "'class', 'random' or 'folder'", self.split_by)
        for name in ("seed", "shard_bytes", "max_side", "quality"):
            value = getattr(self, name)
            empty = value is None and name in ("max_side", "quality")
            require(empty or isinstance(value, Integral), name, "a whole number", value)
        require(self.shard_bytes >= 1, "shard_bytes", "at least 1", self.shard_bytes)
        require(self.max_side is None or self.max_side >= 1, "max_side", "at least 1 pixel", self.max_side)
        require(self.quality is None or 1 <= self.quality <= 95, "quality", "1 .. 95", self.quality)
        require(self.on_bad in ("skip", "fail"), "on_bad", "'skip' or 'fail'", self.on_bad)
        require(self.on_conflict in ("keep", "drop"), "on_conflict", "'keep' or 'drop'", self.on_conflict)
        make_plain(self)  # JSON does not know numpy's numbers


class PlannedShard(NamedTuple):
    """A shard to make."""

    split: str
    name: str
    """In the workspace; where no image of a shard decodes, those after it are renumbered."""
    start: int
    stop: int
    """Its images, in order, are Plan.order[start:stop]."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Which image goes into which shard of which split, in order."""

    folder: Folder
    options: Options
    versions: dict[str, str]
    """Of the libraries on which the bytes depend."""
    groups: Groups
    order: NDArray[np.int64]
    """Numbers of images, shard after shard."""
    shards: tuple[PlannedShard, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        return self.folder.splits if self.options.split_by == "folder" else ("train", "val")

    def conflicts(self) -> list[NDArray[np.int64]]:
        """Groups of identical images under different labels."""
        labels = self.folder.files["label"]
        return [group for group in self.groups if len(np.unique(labels[group])) > 1]


def make_plan(folder: Folder, options: Options, versions: dict[str, str], mapped: MapLike = map) -> Plan:
    """The plan is a function of the folder and the options alone."""
    plan = Plan(folder, options, versions, identical(folder, mapped), np.zeros(0, np.int64), ())
    kept = np.ones(len(folder), bool)
    if options.on_conflict == "drop":
        for group in plan.conflicts():
            kept[group] = False
    own = options.split_by == "folder"
    split = folder.files["split"] if own else _drawn_for_validation(plan, kept).astype(np.int32)
    order: list[NDArray[np.int64]] = []
    shards: list[PlannedShard] = []
    stop = 0
    for number, name in enumerate(plan.splits):
        for count, images in enumerate(_cut(folder, np.flatnonzero(kept & (split == number)), options)):
            start, stop = stop, stop + len(images)
            shards.append(PlannedShard(name, shard_name(name, count), start, stop))
            order.append(images)
    train = folder.files["label"][kept & (split == plan.splits.index("train"))]
    counts = np.bincount(train, minlength=len(folder.classes))
    check_counts(folder.classes, counts, int((~kept).sum()), "under two labels")
    return replace(plan, order=np.concatenate(order or [plan.order]), shards=tuple(shards))


def check_counts(classes: tuple[str, ...], counts: Sequence[int] | NDArray[np.int64], left_out: int, why: str) -> None:
    """Every class must have something to learn from, or the split and the labels mean something else than was asked."""
    for name, count in zip(classes, counts, strict=True):
        if not count:
            what = f"class {name!r}: none of its images is left for training; add images, or remove the class folder."
            raise FolderError(f"{what} {left_out} files were {why} in all." if left_out else what)


def _drawn_for_validation(plan: Plan, kept: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which images are for validation: of each class, or of all, the share asked for; groups are not divided."""
    labels, seed = plan.folder.files["label"], plan.options.seed
    pools = labels if plan.options.split_by == "class" else np.zeros_like(labels)  # a share is taken of each pool
    sizes = np.bincount(pools[kept], minlength=1)
    shares = _shares(sizes, plan.options.val_fraction or 0.0, seed)
    left = np.bincount(labels[kept], minlength=len(plan.folder.classes))  # so many of each class, for training
    group_of = {number: group for group in plan.groups for number in group.tolist()}
    val = np.zeros(len(kept), bool)
    by_pool = np.flatnonzero(kept)[np.argsort(pools[kept], kind="stable")]
    for pool, (share, images) in enumerate(zip(shares, np.split(by_pool, np.cumsum(sizes)[:-1]), strict=True)):
        taken = int(val[images].sum())  # with an identical image of another pool
        if taken >= share:
            continue
        # Epochs -1, -2 and -3 of the order function belong to packing: never the order of a training epoch.
        for image in images[epoch_order(len(images), seed=seed, epoch=-1)]:
            if val[image]:
                continue
            group = group_of.get(image, np.array([image]))
            classes, counts = np.unique(labels[group], return_counts=True)
            if (left[classes] <= counts).any():  # nothing of a class would stay for training
                continue
            val[group] = True
            left[classes] -= counts
            taken += int((pools[group] == pool).sum())
            if taken >= share:
                break
    return val


def _shares(counts: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """How many images of each class are for validation: the fraction of its count, rounded.

    Of a class with two images or more at least one, and one stays for training. Where rounding leaves the total off by more
    than an image, classes are rounded the other way, those nearest to it first; the seed decides among equally near ones.
    """
    exact = np.where(counts > 1, counts * fraction, 0)
    most = np.maximum(counts - 1, 0)
    least = np.minimum(most, fraction > 0)
    low, high = np.clip(np.floor(exact), least, most), np.clip(np.ceil(exact), least, most)
    shares = np.clip(np.rint(exact), low, high)
    missing = float(exact.sum() - shares.sum())
    if abs(missing) > 1 + 1e-9:
        other = high if missing > 0 else low
        order = np.lexsort((epoch_order(len(counts), seed=seed, epoch=-3), np.round(np.abs(other - exact), 9)))
        changed = order[(shares != other)[order]][: round(abs(missing))]
        shares[changed] = other[changed]
    return shares.astype(np.int64)


def _cut(folder: Folder, images: NDArray[np.int64], options: Options) -> list[NDArray[np.int64]]:
    """Shuffle, and cut into as few shards of about equal size as `shard_bytes` allows."""
    if not len(images):
        return []
    shuffled = images[epoch_order(len(images), seed=options.seed, epoch=-2)]
    ends = np.cumsum(folder.files["size"][shuffled].astype(np.int64))
    total = int(ends[-1])
    count = max(1, -(-total // options.shard_bytes))
    shard = np.maximum(ends - 1, 0) * count // max(1, total)  # of each image; images of no bytes may come first
    return np.split(shuffled, np.flatnonzero(np.diff(shard)) + 1)


_ARRAYS = ("files", "paths", "order", "members", "ends")


def save_plan(plan: Plan, work: Path) -> None:
    """Write a plan into the workspace, plan.json last."""
    folder, groups = plan.folder, plan.groups
    arrays = (folder.files, folder.paths, plan.order, groups.members, groups.ends)
    for name, array in zip(_ARRAYS, arrays, strict=True):
        write_atomically(work / f"{name}.npy", npy(array))
    content = {
        "classes": folder.classes,
        "splits": folder.splits,
        "options": asdict(plan.options),
        "versions": plan.versions,
        "parts": plan.shards,  # as former versions have it, whose interrupted packs go on
    }
    write_atomically(work / _IGNORED, json.dumps(folder.ignored).encode())
    write_atomically(work / PLAN, json.dumps(content).encode())


def load_plan(work: Path, root: Path, *, whole: bool = False) -> Plan:
    """Read a plan, for a folder that may have moved; arrays are memory-mapped. whole  also what is ignored: no shard needs it."""
    files, paths, order, members, ends = (np.load(work / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
    content = json.loads((work / PLAN).read_bytes())
    ignored = tuple((path, reason) for path, reason in json.loads((work / _IGNORED).read_bytes())) if whole else ()
    folder = Folder(root, tuple(content["classes"]), tuple(content["splits"]), files, paths, ignored)
    shards = tuple(PlannedShard(*shard) for shard in content["parts"])
    try:
        options = Options(**content["options"])
    except TypeError:
        what = "the pack that was interrupted here is of a fastflower with other options"
        raise FolderError(f"{work}: {what}; remove {work} to begin anew, or go on with that version.") from None
    return Plan(folder, options, content["versions"], Groups(members, ends), order, shards)


def check_same(plan: Plan, folder: Folder, options: Options, versions: dict[str, str], work: Path) -> None:
    """Raise FolderError, naming what differs, when an interrupted plan is not for this folder with these options."""
    before, now = {**asdict(plan.options), **plan.versions}, {**asdict(options), **versions}
    for name in now:
        if before.get(name) != now[name]:
            had = f"had {name} {before.get(name)!r}, not {now[name]!r}; pack with the former to go on"
            raise FolderError(f"{work}: the pack that was interrupted here {had}, or remove {work} to begin anew.")
    if changed := _difference(plan.folder, folder):
        what = f"{changed[1]} since the pack into {work.parent} was interrupted; undo that to go on"
        raise FolderError(f"{folder.root / changed[0]}: {what}, or remove {work} to begin anew.")


def _difference(before: Folder, now: Folder) -> tuple[str, str] | None:
    """The first file that differs, and what has become of it."""
    count = min(len(before), len(now))
    rows = np.flatnonzero(before.files[:count] != now.files[:count])
    letters = np.flatnonzero(before.paths[: len(now.paths)] != now.paths[: len(before.paths)])
    first = int(rows[0]) if len(rows) else count
    if len(letters):
        first = min(first, now.image_at(int(letters[0])))
    old = before.path(first) if first < len(before) else None
    new = now.path(first) if first < len(now) else None
    if new is not None and new == old:
        return new, "has changed"
    if old is not None and all(now.path(number) != old for number in range(first, len(now))):
        return old, "is gone"
    if new is not None:
        return new, "was added"
    others = sorted(set(before.ignored) ^ set(now.ignored))
    if others:
        return others[0][0], "was added, changed or removed"
    if (before.classes, before.splits) != (now.classes, now.splits):
        return "", "has other classes or splits"
    return None
