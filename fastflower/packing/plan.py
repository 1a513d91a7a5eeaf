"""Plans a pack from file names and sizes, before any image is decoded, so that any worker can make any shard.

The plan is saved in the workspace. Workers read it there, and an interrupted pack resumes from it.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastflower.draws.order import epoch_order
from fastflower.errors import FolderError, Rules, check_fields, require
from fastflower.files import load_array, write_atomically
from fastflower.packing.again import packing
from fastflower.packing.duplicates import Groups, MapLike, identical
from fastflower.packing.folder import Folder
from fastflower.packing.listing import SPLITS
from fastflower.shards.manifest import PLAN, shard_name
from fastflower.shards.writer import npy

_IGNORED = "ignored.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of `pack`, as the manifest records them. Raises ArgumentError if a value is invalid."""

    split_by: Literal["class", "random", "folder"] | None
    """None for the default, which depends on the folder."""
    val_fraction: float | None
    """None if the folder's own split is kept, or with folds."""
    seed: int
    shard_bytes: int
    max_side: int | None
    quality: int | None
    on_bad: Literal["skip", "fail"]
    on_conflict: Literal["keep", "drop"]
    lists: bool
    ignore: tuple[str, ...] = ()
    test_fraction: float = 0.0
    folds: int | None = None
    drop_empty_classes: bool = False
    as_split: Literal["val", "test"] | None = None
    """The last five are not options of older versions."""

    def __post_init__(self) -> None:
        check_fields(self, _RULES, owner="")
        for pattern in self.ignore:
            named = bool(pattern.strip("./")) and not pattern.startswith("!")
            require(named, "ignore", "names or paths without a leading !", pattern)
        stratified = self.folds is None or self.split_by != "random"
        require(stratified, "split_by", "'class' or 'folder' with folds, which are stratified", self.split_by)
        divided = self.split_by or self.val_fraction is not None or self.test_fraction or self.folds
        rule = "omitted with split_by, val_fraction, test_fraction and folds, which divide the images"
        require(self.as_split is None or self.split_by == "folder" or not divided, "as_split", rule, self.as_split)

    def recorded(self) -> dict[str, Any]:
        """Return the options as JSON holds them."""
        return json.loads(json.dumps(asdict(self)))


_RULES: Rules = {
    "val_fraction": ("a number, at least 0 and less than 1", lambda share: 0 <= share < 1),
    "test_fraction": ("a number, at least 0 and less than 1", lambda share: 0 <= share < 1),
    "shard_bytes": ("an integer, at least 1", lambda size: size >= 1),
    "max_side": ("an integer, at least 1 pixel", lambda side: side >= 1),
    "quality": ("an integer from 1 to 95", lambda quality: 1 <= quality <= 95),
    "folds": ("an integer, at least 2", lambda count: count >= 2),
    "ignore": ("a list of patterns", lambda _: True),
}


class PlannedShard(NamedTuple):
    """One shard of a plan, with the images Plan.order[start:stop]."""

    split: str
    name: str
    """Name in the workspace. Shards after an empty one are renumbered when they are published."""
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Assignment of images to shards and splits, in order."""

    folder: Folder
    options: Options
    versions: dict[str, str]
    """Versions of the libraries that determine the bytes."""
    groups: Groups
    order: NDArray[np.int64]
    """Image numbers, shard by shard."""
    shards: tuple[PlannedShard, ...]
    dropped: tuple[int, ...] = ()
    """Labels of classes without training images, which are left out."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the pack."""
        return tuple(name for label, name in enumerate(self.folder.classes) if label not in self.dropped)

    @property
    def splits(self) -> tuple[str, ...]:
        splits = {*(self.folder.splits if self.options.split_by == "folder" else ("train", "val"))}
        splits |= {"val"} if self.options.val_fraction else set()
        splits |= {"test"} if self.options.test_fraction else set()
        splits -= {"val"} if self.options.folds else set()
        return tuple(name for name in SPLITS if name in splits)

    def count(self, split: str) -> int:
        """Return the number of images that are planned for a split, without those of dropped classes."""
        planned = [self.order[shard.start : shard.stop] for shard in self.shards if shard.split == split]
        return sum(int((~np.isin(self.folder.files["label"][images], self.dropped)).sum()) for images in planned)

    def conflicts(self) -> list[NDArray[np.int64]]:
        """Return the groups of identical images with different labels."""
        labels = self.folder.files["label"]
        return [group for group in self.groups if len(np.unique(labels[group])) > 1]


def make_plan(folder: Folder, options: Options, versions: dict[str, str], mapped: MapLike = map) -> Plan:
    """Plan a pack. The result depends only on the folder and the options.

    Raises FolderError if a class has no training images, unless such classes are to be left out.
    """
    plan = Plan(folder, options, versions, identical(folder, mapped), np.zeros(0, np.int64), ())
    kept = np.ones(len(folder), bool)
    if options.on_conflict == "drop":
        for group in plan.conflicts():
            kept[group] = False
    own = options.split_by == "folder"
    drawn = folder.files["split"] if own else _draw_splits(plan, kept)
    names = folder.splits if own else SPLITS
    # With folds, the images of the folder's val split are in train.
    split = np.array([plan.splits.index(name if name in plan.splits else "train") for name in names])[drawn]
    if own and (options.val_fraction or options.test_fraction):
        place = _draw_splits(plan, kept & (split == 0))
        for name in set(plan.splits) - {"train", *folder.splits}:
            split[place == SPLITS.index(name)] = plan.splits.index(name)
    train = folder.files["label"][kept & (split == 0)]  # or of the only split
    counts = np.bincount(train, minlength=len(folder.classes))
    dropped = _empty_classes(folder, counts, int((~kept).sum()), options) if "train" in plan.splits else ()
    kept &= ~np.isin(folder.files["label"], dropped)
    rule = f"at most {counts.max()}, the number of images of the largest class"
    require(options.folds is None or options.folds <= counts.max(), "folds", rule, options.folds)
    order: list[NDArray[np.int64]] = []
    shards: list[PlannedShard] = []
    stop = 0
    for number, name in enumerate(plan.splits):
        for count, images in enumerate(_cut(folder, np.flatnonzero(kept & (split == number)), options)):
            start, stop = stop, stop + len(images)
            shards.append(PlannedShard(name, shard_name(name, count), start, stop))
            order.append(images)
    return replace(plan, order=np.concatenate(order or [plan.order]), shards=tuple(shards), dropped=dropped)


def _empty_classes(folder: Folder, counts: NDArray[np.int64], conflicts: int, options: Options) -> tuple[int, ...]:
    """Return the labels of classes without training images. Raises FolderError unless the options leave them out.

    conflicts  Number of images that were dropped for conflicting labels.
    """
    empty: list[int] = np.flatnonzero(counts == 0).tolist()
    if not empty:
        return ()
    why = f" (files dropped for conflicting labels in total: {conflicts})" if conflicts else ""
    what = f"class {folder.classes[empty[0]]!r}: has no images left for training{why}"
    if len(folder.classes) - len(empty) < 2:
        raise FolderError(f"{what}; add images, because a classifier needs at least two classes.")
    if not options.drop_empty_classes:
        raise FolderError(f"{what}; add images, or leave out such classes:\n  {packing({'drop_empty_classes': True})}")
    return tuple(empty)


def _draw_splits(plan: Plan, kept: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Draw val_fraction and test_fraction of each class, or of all images, without dividing groups.

    Returns (N,) positions in SPLITS.
    """
    labels, options = plan.folder.files["label"], plan.options
    pools = np.zeros_like(labels) if options.split_by == "random" else labels  # a share is taken from each pool
    sizes = np.bincount(pools[kept], minlength=1)
    left = np.bincount(labels[kept], minlength=len(plan.folder.classes))  # training images left in each class
    group_of = {number: group for group in plan.groups for number in group.tolist()}
    split = np.zeros(len(kept), np.int32)
    by_pool = np.flatnonzero(kept)[np.argsort(pools[kept], kind="stable")]
    for place, fraction in enumerate((options.val_fraction or 0.0, options.test_fraction), 1):
        shares = _shares(sizes, fraction, options.seed)
        for pool, (share, images) in enumerate(zip(shares, np.split(by_pool, np.cumsum(sizes)[:-1]), strict=True)):
            taken = int((split[images] == place).sum())  # taken along with identical images of other pools
            if taken >= share:
                continue
            # Packing uses epochs -1, -2 and -3 of the order function, so its orders never equal those of a training epoch.
            for image in images[epoch_order(len(images), seed=options.seed, epoch=-1)]:
                if split[image]:
                    continue
                group = group_of.get(image, np.array([image]))
                group = group[kept[group]]
                classes, counts = np.unique(labels[group], return_counts=True)
                if (left[classes] <= counts).any():  # a class would have no training images left
                    continue
                split[group] = place
                left[classes] -= counts
                taken += int((pools[group] == pool).sum())
                if taken >= share:
                    break
    return split


def _shares(counts: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Return the number of validation images per class: the class's image count times the fraction, rounded.

    A class with two or more images contributes at least one and keeps at least one. If the rounded total is off by
    more than one image, the numbers closest to .5 are rounded the other way. The seed breaks ties.
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
    """Shuffle images and divide them into shards of about equal size, as few as `shard_bytes` allows."""
    if not len(images):
        return []
    shuffled = images[epoch_order(len(images), seed=options.seed, epoch=-2)]
    ends = np.cumsum(folder.files["size"][shuffled].astype(np.int64))
    total = int(ends[-1])
    count = max(1, -(-total // options.shard_bytes))
    shard = np.maximum(ends - 1, 0) * count // max(1, total)  # shard of each image; empty files may come first
    return np.split(shuffled, np.flatnonzero(np.diff(shard)) + 1)


_ARRAYS = ("files", "paths", "order", "members", "ends")


def save_plan(plan: Plan, work: Path) -> None:
    """Save a plan to the workspace, plan.json last."""
    folder, groups = plan.folder, plan.groups
    arrays = (folder.files, folder.paths, plan.order, groups.members, groups.ends)
    for name, array in zip(_ARRAYS, arrays, strict=True):
        write_atomically(work / f"{name}.npy", npy(array))
    content = {
        "classes": folder.classes,
        "splits": folder.splits,
        "options": asdict(plan.options),
        "versions": plan.versions,
        "parts": plan.shards,  # the key that older versions use
        "dropped": plan.dropped,
    }
    write_atomically(work / _IGNORED, json.dumps(folder.ignored).encode())
    write_atomically(work / PLAN, json.dumps(content).encode())


def load_plan(work: Path, root: Path, *, whole: bool = False) -> Plan:
    """Load a plan with memory-mapped arrays, for a folder that may have moved to `root`.

    whole  Whether to also load the list of ignored files, which is not needed to make shards.
    """
    files, paths, order, members, ends = (load_array(work / f"{name}.npy") for name in _ARRAYS)
    content = json.loads((work / PLAN).read_bytes())
    ignored = tuple((path, reason) for path, reason in json.loads((work / _IGNORED).read_bytes())) if whole else ()
    folder = Folder(root, tuple(content["classes"]), tuple(content["splits"]), files, paths, ignored)
    shards = tuple(PlannedShard(*shard) for shard in content["parts"])
    try:
        options = Options(**content["options"])
    except TypeError:
        what = "holds an interrupted pack from a fastflower version with other options"
        raise FolderError(f"{work}: {what}; resume with that version, or remove {work} to start over.") from None
    dropped = tuple(content.get("dropped", ()))  # not in the plans of older versions
    return Plan(folder, options, content["versions"], Groups(members, ends), order, shards, dropped)


def check_same(plan: Plan, folder: Folder, options: Options, versions: dict[str, str], work: Path) -> None:
    """Raise FolderError, naming the difference, if files, options or versions have changed since the pack was interrupted."""
    before, now = {**asdict(plan.options), **plan.versions}, {**asdict(options), **versions}
    if options.drop_empty_classes:  # may be added when a class turns out to be empty
        before["drop_empty_classes"] = True
    for name in ("folds", *(before | now)):  # val_fraction depends on folds
        if before.get(name) != now.get(name):
            what = f"holds an interrupted pack with {name} {before.get(name)!r}, not {now.get(name)!r}"
            absent = name in versions and before.get(name) is None  # a package that was not installed
            remedy = "" if absent else f"use {name} {before.get(name)!r} to resume, or "
            raise FolderError(f"{work}: {what}; {remedy}remove {work} to start over.")
    if changed := _difference(plan.folder, folder):
        what = f"{changed[1]} since the pack into {work.parent} was interrupted"
        raise FolderError(
            f"{folder.root / changed[0]}: {what}; undo this change to resume, or remove {work} to start over."
        )


def _difference(before: Folder, now: Folder) -> tuple[str, str] | None:
    """Return the first file that differs and how it differs, or None if nothing differs."""
    count = min(len(before), len(now))
    rows = np.flatnonzero(before.files[:count] != now.files[:count])
    path_bytes = np.flatnonzero(before.paths[: len(now.paths)] != now.paths[: len(before.paths)])
    first = int(rows[0]) if len(rows) else count
    if len(path_bytes):
        first = min(first, now.image_at(int(path_bytes[0])))
    old = before.path(first) if first < len(before) else None
    new = now.path(first) if first < len(now) else None
    if new is not None and new == old:
        same = all(before.files[first][name] == now.files[first][name] for name in ("size", "mtime_ns"))
        return new, "has been given another label or split" if same else "has been changed"
    if old is not None and all(now.path(number) != old for number in range(first, len(now))):
        return old, "has been removed"
    if new is not None:
        return new, "has been added"
    # Compare paths only, because another version may word the reasons differently.
    others = sorted({path for path, _ in before.ignored} ^ {path for path, _ in now.ignored})
    if others:
        return others[0], "has been added or removed"
    if (before.classes, before.splits) != (now.classes, now.splits):
        return "", "classes or splits have been changed"
    return None
