"""Publishes a finished pack: writes its files, then renames them into place, the manifest last."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import FolderError, SampleError
from fastflower.files import sync, write_atomically
from fastflower.packing.duplicates import near_groups, nearest
from fastflower.packing.folder import EMPTY_CLASS, LEFT_OUT
from fastflower.packing.folds import assign_folds
from fastflower.packing.plan import Plan
from fastflower.packing.worker import MadeShard, new_label, read_image
from fastflower.shards.manifest import FILE, FOLDS, INFO, Folds, Manifest, Split, shard_name
from fastflower.shards.writer import index_rows, npy, split_of

_CONFLICT = "is identical to an image with another label"

Splits = dict[str, list[MadeShard]]
"""The finished shards of each split."""


def unpublish(plan: Plan, work: Path) -> None:
    """Move back into the workspace any files that a killed pack had already published."""
    try:
        moves = _moves(_with_images(plan, _made(plan, work)), work)
    except OSError:  # record missing: nothing is published yet; record damaged: its shard is made again
        return
    for source, target in moves:
        if target.exists() and not source.exists():
            target.replace(source)


def publish(plan: Plan, work: Path) -> Manifest:
    """Write every file into the workspace, then rename all or none of them into place, the manifest last."""
    made, out = _made(plan, work), work.parent
    splits = _with_images(plan, made)
    manifest = _make_manifest(plan, out, splits, made)
    moves = _moves(splits, work)
    folds: dict[str, memoryview] = {}
    if count := plan.options.folds:
        folds[FOLDS] = npy(_folds(plan, splits["train"], count))
        manifest = replace(manifest, folds=Folds(count, hashlib.sha256(folds[FOLDS]).hexdigest()))
    for name, data in chain(folds.items(), _files(plan, manifest, splits)):
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


def _made(plan: Plan, work: Path) -> list[MadeShard]:
    """Load the record of every shard. Raises OSError if one is missing or damaged."""
    return [MadeShard.load(work / f"{planned.name}.npz") for planned in plan.shards]


def _with_images(plan: Plan, made: list[MadeShard]) -> Splits:
    """Return the shards of each split, except empty shards, which DALI refuses to read."""
    splits: Splits = {split: [] for split in plan.splits}
    for planned, shard in zip(plan.shards, made, strict=True):
        if shard.entry.samples:
            splits[planned.split].append(shard)
    return splits


def _moves(splits: Splits, work: Path) -> list[tuple[Path, Path]]:
    """Return (source, target) for each tar and its DALI index."""
    return [
        ((work / shard.entry.name).with_suffix(ending), work.parent / f"{shard_name(split, number)}{ending}")
        for split, shards in splits.items()
        for number, shard in enumerate(shards)
        for ending in (".tar", ".idx")
    ]


def _make_manifest(plan: Plan, out: Path, splits: Splits, made: list[MadeShard]) -> Manifest:
    folder = plan.folder
    skipped = [item for shard in made for item in shard.skipped]
    skipped += [{"path": path, "reason": reason} for path, reason in folder.ignored]
    skipped += [{"path": folder.classes[label], "reason": EMPTY_CLASS} for label in plan.dropped]
    unplanned = _unplanned(plan)
    skipped += [{"path": folder.path(number), "reason": reason} for number, reason in unplanned.items()]
    images = np.zeros(len(folder), bool)  # those packed, or dropped for conflicting labels
    images[np.concatenate([shard.numbers for shard in made])] = True
    images[[number for number, reason in unplanned.items() if reason == _CONFLICT]] = True
    groups = [group[images[group]] for group in plan.groups]
    conflicts = [group for group in groups if len(np.unique(folder.files["label"][group])) > 1]
    described: dict[str, Split] = {}
    for split, shards in splits.items():
        entries = [replace(shard.entry, name=f"{shard_name(split, number)}.tar") for number, shard in enumerate(shards)]
        described[split] = split_of(entries, index_rows([shard.rows for shard in shards]), len(plan.classes))
    return Manifest(
        folder=out,
        classes=plan.classes,
        splits=described,
        options=plan.options.recorded(),
        skipped=tuple(sorted(skipped, key=itemgetter("path"))),
        warnings=tuple(sorted((item for shard in made for item in shard.warnings), key=itemgetter("path"))),
        duplicates=tuple(tuple(folder.path(number) for number in group) for group in groups if len(group) > 1),
        label_conflicts=tuple(tuple(folder.path(number) for number in group) for group in conflicts),
        near_duplicates=tuple(_near_duplicates(plan, splits)),
        source_bytes=sum(int(folder.files["size"][shard.numbers].sum()) for shard in made),
        packed_bytes=sum(int(shard.rows["size"].sum()) for shard in made),
        versions=plan.versions,
    )


def _folds(plan: Plan, train: list[MadeShard], count: int) -> NDArray[np.uint32]:
    """Return the fold of each training image, in the order of the index. Copies and near-duplicates share a fold."""
    labels = np.concatenate([shard.rows["label"] for shard in train]).astype(np.int64)
    groups = near_groups(np.concatenate([shard.hashes for shard in train]))
    folds = assign_folds(labels, groups, count)
    if (used := len(np.unique(folds))) < count:
        what = f"has too few images for {count} folds: only {used} would have images, because near-duplicates stay together"
        raise FolderError(f"{plan.folder.root}: {what}; pack with fewer folds, or add images.")
    return folds


def _unplanned(plan: Plan) -> dict[int, str]:
    """Return the images that are in no shard of the plan, with the reasons."""
    planned = np.zeros(len(plan.folder), bool)
    planned[plan.order] = True
    reasons = dict.fromkeys(np.flatnonzero(~planned).tolist(), LEFT_OUT)
    if plan.options.on_conflict == "drop":
        for group in plan.conflicts():
            try:
                read_image(plan, int(group[0]))
                reason = _CONFLICT
            except SampleError as error:  # not images, such as the same error page in place of many
                reason = str(error)
            reasons |= dict.fromkeys(group.tolist(), reason)
    return reasons


def _near_duplicates(plan: Plan, splits: Splits) -> Iterator[dict[str, object]]:
    """For each image outside "train", yield its closest near-duplicate in "train", if any, in the folder's order."""
    if "train" not in splits:
        return
    train_hashes = np.concatenate([shard.hashes for shard in splits["train"]])
    train_numbers = np.concatenate([shard.numbers for shard in splits["train"]])
    for split, shards in splits.items():
        if split == "train" or not shards:
            continue
        numbers = np.concatenate([shard.numbers for shard in shards])
        positions, distances = nearest(np.concatenate([shard.hashes for shard in shards]), train_hashes)
        near = np.flatnonzero(distances >= 0)
        for query in near[np.argsort(numbers[near])]:
            yield {
                "split": split,
                "path": plan.folder.path(int(numbers[query])),
                "train_path": plan.folder.path(int(train_numbers[positions[query]])),
                "distance": int(distances[query]),
            }


def _files(plan: Plan, manifest: Manifest, splits: Splits) -> Iterator[tuple[str, bytes | memoryview]]:
    """Yield (name, content) of all remaining files, the manifest last."""
    for split, shards in splits.items():
        yield f"{split}.index.npy", npy(index_rows([shard.rows for shard in shards]))
    if plan.options.lists:  # in the folder's order; `scan` can read these files
        folder, labels = plan.folder, plan.folder.files["label"]
        yield "classes.txt", "".join(f"{name}\n" for name in plan.classes).encode("utf-8", "surrogateescape")
        for split, shards in splits.items():
            numbers = np.sort(np.concatenate([np.zeros(0, np.int64), *(shard.numbers for shard in shards)]))
            lines = (f"{folder.path(number)} {new_label(int(labels[number]), plan.dropped)}\n" for number in numbers)
            yield f"meta/{split}.txt", b"".join(line.encode("utf-8", "surrogateescape") for line in lines)
    yield INFO, manifest.to_info().encode()
    yield FILE, manifest.to_json().encode("utf-8", "backslashreplace")
