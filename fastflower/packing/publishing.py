"""Finishes a pack: its files are written, then renamed into place, the manifest last."""

from collections.abc import Iterator
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from fastflower.files import sync, write_atomically
from fastflower.packing.duplicates import nearest
from fastflower.packing.plan import Plan, check_counts
from fastflower.packing.worker import Part
from fastflower.shards.manifest import FILE, INFO, Manifest, shard_name
from fastflower.shards.writer import index_rows, npy, split_of


def _made(plan: Plan, work: Path) -> list[Part]:
    """The record of each of the plan's parts. Raises OSError for one that is missing or damaged."""
    return [Part.load(work / f"{place.name}.npz") for place in plan.parts]


def _kept(plan: Plan, made: list[Part]) -> dict[str, list[tuple[str, Part]]]:
    """By split, (name in the workspace, part) of the parts with images, which alone get a number: DALI reads no empty shard."""
    kept: dict[str, list[tuple[str, Part]]] = {split: [] for split in plan.splits}
    for (split, name, *_), part in zip(plan.parts, made, strict=True):
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


def withdraw(plan: Plan, work: Path) -> None:
    """Take back what a pack that was killed while it published had in place already."""
    try:
        moves = _moves(_kept(plan, _made(plan, work)), work)
    except OSError:  # a record is missing: nothing is in place yet; or it is damaged: what is gone is made again
        return
    for source, target in moves:
        if target.exists() and not source.exists():
            target.replace(source)


def publish(plan: Plan, work: Path) -> Manifest:
    """Finish every file in the workspace, then rename them into place, the manifest last; all of them or none."""
    made, out = _made(plan, work), work.parent
    kept = _kept(plan, made)
    parts = {split: [part for _, part in group] for split, group in kept.items()}
    manifest = _described(plan, out, parts, made)
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
