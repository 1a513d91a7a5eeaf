"""Plans a pack from names and sizes, before any image is decoded, so that any worker can make any shard.

A plan is saved in the workspace: it is what a pack that was interrupted goes on with, and what workers read.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastflower.draws.order import epoch_order
from fastflower.errors import FolderError
from fastflower.files import write_atomically
from fastflower.packing.duplicates import Groups, identical
from fastflower.packing.folder import Folder
from fastflower.shards.manifest import PLAN, shard_name

_IGNORED = "ignored.json"


class Place(NamedTuple):
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

    found: Folder
    options: dict[str, Any]
    versions: dict[str, str]
    """Of the libraries on which the bytes depend."""
    groups: Groups
    order: NDArray[np.int64]
    """Numbers of images, shard after shard."""
    parts: tuple[Place, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        return self.found.splits if self.options["split_by"] == "folder" else ("train", "val")

    def conflicts(self) -> list[NDArray[np.int64]]:
        """Groups of identical images under different labels."""
        labels = self.found.files["label"]
        return [group for group in self.groups if len(np.unique(labels[group])) > 1]


def make_plan(
    found: Folder, options: dict[str, Any], versions: dict[str, str], mapped: Callable[..., Iterable[Any]] = map
) -> Plan:
    """The plan is a function of the folder and the options alone. mapped  like the builtin map, to read on many threads."""
    groups = identical(found, mapped)
    plan = Plan(found, options, versions, groups, np.zeros(0, np.int64), ())
    kept = np.ones(len(found), bool)
    if options["on_conflict"] == "drop":
        for group in plan.conflicts():
            kept[group] = False
    if options["split_by"] == "folder":
        split = found.files["split"]
    else:
        split = _validation(found, groups, kept, options).astype(np.int32)
    order: list[NDArray[np.int64]] = []
    parts: list[Place] = []
    for number, name in enumerate(plan.splits):
        for count, shard in enumerate(_shards(found, np.flatnonzero(kept & (split == number)), options)):
            start = parts[-1].stop if parts else 0
            parts.append(Place(name, shard_name(name, count), start, start + len(shard)))
            order.append(shard)
    train = found.files["label"][kept & (split == plan.splits.index("train"))]
    check_counts(
        found.classes, np.bincount(train, minlength=len(found.classes)), int((~kept).sum()), "under two labels"
    )
    return Plan(found, options, versions, groups, np.concatenate(order or [plan.order]), tuple(parts))


def check_counts(classes: tuple[str, ...], counts: Sequence[int] | NDArray[np.int64], left_out: int, why: str) -> None:
    """Every class must have something to learn from, or the split and the labels mean something else than was asked."""
    for name, count in zip(classes, counts, strict=True):
        if not count:
            told = f"class {name!r}: none of its images is left for training; add images, or remove the class folder."
            raise FolderError(f"{told} {left_out} files were {why} in all." if left_out else told)


def _validation(found: Folder, groups: Groups, kept: NDArray[np.bool_], options: dict[str, Any]) -> NDArray[np.bool_]:
    """Which images are for validation: of each class, or of all, the share asked for; groups are not divided."""
    classes = found.files["label"]
    left = np.bincount(classes[kept], minlength=len(found.classes))  # of each class, for training
    labels = classes if options["split_by"] == "class" else np.zeros(len(found), np.int32)
    wanted = _shares(np.bincount(labels[kept], minlength=1), options["val_fraction"], options["seed"])
    group_of = np.full(len(found), -1, np.int32)
    group_of[groups.members] = np.repeat(np.arange(len(groups.ends)), np.diff(groups.ends, prepend=0))
    val = np.zeros(len(found), bool)
    by_label = np.flatnonzero(kept)[np.argsort(labels[kept], kind="stable")]
    for label, numbers in enumerate(np.split(by_label, np.cumsum(np.bincount(labels[kept], minlength=1))[:-1])):
        taken = int(val[numbers].sum())  # with an identical image of another class
        # Epochs -1, -2 and -3 of the order function belong to packing: never the order of a training epoch.
        for position in epoch_order(len(numbers), seed=options["seed"], epoch=-1) if wanted[label] else ():
            if taken >= wanted[label]:
                break
            number = numbers[position]
            if not val[number]:
                group = numbers[position : position + 1]
                if group_of[number] >= 0:
                    end = groups.ends[group_of[number]]
                    start = groups.ends[group_of[number] - 1] if group_of[number] else 0
                    group = groups.members[start:end]
                touched, gone = np.unique(classes[group], return_counts=True)
                if (left[touched] > gone).all():  # something of every class stays for training
                    val[group] = True
                    left[touched] -= gone
                    taken += int((labels[group] == label).sum())
    return val


def _shares(counts: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """How many images of each class are for validation: the fraction of its count, rounded.

    Of a class with two images or more at least one, and one stays for training. Where rounding leaves the total off by more
    than an image, classes are rounded the other way, those nearest to it first; the seed decides among equally near ones.
    """
    exact = np.where(counts > 1, counts * fraction, 0)
    most = np.maximum(counts - 1, 0)
    low, high = (np.clip(end, np.minimum(most, fraction > 0), most) for end in (np.floor(exact), np.ceil(exact)))
    shares = np.clip(np.rint(exact), low, high)
    missing = float(exact.sum() - shares.sum())
    side = high if missing > 0 else low
    order = np.lexsort((epoch_order(len(counts), seed=seed, epoch=-3), np.round(np.abs(side - exact), 9)))
    if abs(missing) > 1 + 1e-9:
        changed = order[(shares != side)[order]][: round(abs(missing))]
        shares[changed] = side[changed]
    return shares.astype(np.int64)


def _shards(found: Folder, numbers: NDArray[np.int64], options: dict[str, Any]) -> list[NDArray[np.int64]]:
    """Shuffle, and cut into as few shards of about equal size as `shard_bytes` allows."""
    if not len(numbers):
        return []
    shuffled = numbers[epoch_order(len(numbers), seed=options["seed"], epoch=-2)]
    ends = np.cumsum(found.files["size"][shuffled].astype(np.int64))
    count = max(1, -(-int(ends[-1]) // options["shard_bytes"]))
    places = np.maximum(ends - 1, 0) * count // max(1, int(ends[-1]))  # images of no bytes may come first
    return np.split(shuffled, np.flatnonzero(np.diff(places)) + 1)


_ARRAYS = ("files", "paths", "order", "members", "ends")


def save_plan(plan: Plan, work: Path) -> None:
    """Write a plan into the workspace, plan.json last."""
    found, groups = plan.found, plan.groups
    for name, array in zip(_ARRAYS, (found.files, found.paths, plan.order, groups.members, groups.ends), strict=True):
        with (work / f"{name}.npy").open("wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
    content = {
        "root": str(found.root.absolute()),
        "classes": found.classes,
        "splits": found.splits,
        "options": plan.options,
        "versions": plan.versions,
        "parts": plan.parts,
    }
    write_atomically(work / _IGNORED, json.dumps(found.ignored).encode())
    write_atomically(work / PLAN, json.dumps(content).encode())


def load_plan(work: Path, *, whole: bool = False) -> Plan:
    """Read the plan of a workspace; the arrays are memory-mapped. whole  also what is ignored, which no part needs."""
    files, paths, order, members, ends = (np.load(work / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
    content = json.loads((work / PLAN).read_bytes())
    ignored = tuple((path, reason) for path, reason in json.loads((work / _IGNORED).read_bytes())) if whole else ()
    found = Folder(Path(content["root"]), tuple(content["classes"]), tuple(content["splits"]), files, paths, ignored)
    parts = tuple(Place(*part) for part in content["parts"])
    return Plan(found, content["options"], content["versions"], Groups(members, ends), order, parts)


def check_same(plan: Plan, found: Folder, options: dict[str, Any], versions: dict[str, str], work: Path) -> None:
    """Raise FolderError, naming what differs, when an interrupted plan is not for this folder with these options."""
    before, now = plan.options | plan.versions, options | versions
    for name in now:
        if before.get(name) != now[name]:
            raise FolderError(
                f"{work}: the pack that was interrupted here had {name} {before.get(name)!r}, not {now[name]!r}; "
                f"pack with the former to go on, or remove {work} to begin anew."
            )
    changed = _difference(plan.found, found)
    if changed is not None:
        raise FolderError(
            f"{found.root / changed[0]}: {changed[1]} since the pack into {work.parent} was interrupted; "
            f"undo that to go on, or remove {work} to begin anew."
        )


def _difference(before: Folder, now: Folder) -> tuple[str, str] | None:
    """The first file that differs, and how."""
    count = min(len(before), len(now))
    paths = np.flatnonzero(before.paths[: len(now.paths)] != now.paths[: len(before.paths)])
    rows = np.flatnonzero(before.files[:count] != now.files[:count])
    first = min(
        int(np.searchsorted(now.files["path_end"], paths[0], "right")) if len(paths) else count,
        int(rows[0]) if len(rows) else count,
    )
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
