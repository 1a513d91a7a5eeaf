"""Leaves out classes of which no training image can be read, without decoding the other images again."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastflower.errors import FolderError
from fastflower.files import write_atomically
from fastflower.packing.again import once_more, packing
from fastflower.packing.folder import LEFT_OUT
from fastflower.packing.plan import Plan
from fastflower.packing.remarks import counted, printable
from fastflower.packing.worker import MadeShard, key_of, new_label
from fastflower.shards.writer import Samples, ShardWriter

_MOST_NAMES = 3


class LostClassError(FolderError):
    """Raised if a class has lost all its training images. The finished shards stay, so that a pack without it can resume."""


def without_lost_classes(plan: Plan, work: Path) -> Plan:
    """Return the plan with all classes without training images as dropped. Rewrites finished shards that have other labels.

    A pack without a train split keeps all classes, unless none of its images can be read.

    Raises LostClassError, which names files and reasons, if options.drop_empty_classes is False. Raises FolderError if
    fewer than two classes would be left.
    """
    made = [MadeShard.load(work / f"{planned.name}.npz") for planned in plan.shards]
    labels, classes = plan.folder.files["label"], plan.folder.classes
    counts = np.zeros(len(classes), np.int64)
    for planned, shard in zip(plan.shards, made, strict=True):
        if planned.split == plan.splits[0]:
            counts += np.bincount(labels[shard.numbers], minlength=len(classes))
    if "train" not in plan.splits and counts.any():
        return plan
    lost: tuple[int, ...] = tuple(np.flatnonzero(counts == 0).tolist())
    new = [label for label in lost if label not in plan.dropped]
    left = len(classes) - len(lost)
    if new and left < 2:
        rule = f"A classifier needs at least two classes, but only {left} would be left: replace these files."
        raise FolderError(f"{_unreadable(plan, made, new)}\n{rule}")
    if new and not plan.options.drop_empty_classes:
        text = _unreadable(plan, made, new)
        mend = "Run pip install pillow-heif" if "pip install pillow-heif" in text else "Replace the files"
        mend += " or choose another seed" if "another seed" in text else ""
        resume = (
            f"Or leave out such classes, which keeps the finished shards:\n  {packing({'drop_empty_classes': True})}"
        )
        raise LostClassError(f"{text}\n{mend}, remove {work}, and pack again. {resume}")
    for planned, shard in zip(plan.shards, made, strict=True):
        if shard.dropped not in (plan.dropped, lost):  # a file could not be read before, but now it can
            (work / f"{planned.name}.npz").unlink()
            what = "images can be read that could not be read before"
            raise LostClassError(f"{plan.folder.root}: {what}; to resume:\n  {once_more()}")
        if shard.dropped != lost:
            _rewrite(plan, work, planned.name, shard, lost)
    return replace(plan, dropped=lost)


def _unreadable(plan: Plan, made: Sequence[MadeShard], lost: Sequence[int]) -> str:
    """Name the first lost class, with its first files and reasons, and the other lost classes, one per line."""
    folder, label = plan.folder, lost[0]
    planned = [plan.order[start:stop] for split, _, start, stop in plan.shards if split == plan.splits[0]]
    numbers = np.sort(np.concatenate(planned))
    numbers = numbers[folder.files["label"][numbers] == label]
    reasons = {item["path"]: item["reason"] for shard in made for item in shard.skipped}
    paths = [folder.path(number) for number in numbers[:_MOST_NAMES].tolist()]
    first = f"class {folder.classes[label]!r}: none of its {len(numbers)} training images can be read:"
    lines = [first if "train" in plan.splits else first.replace("training ", "")]
    lines += [printable(f"{path}: {reasons.get(path, '')}") for path in paths]
    if len(numbers) > len(paths):
        lines.append(f"and {counted(len(numbers) - len(paths), 'other')}")
    own = folder.splits if plan.options.split_by == "folder" else ()
    for name in plan.splits:
        shards = [shard for planned, shard in zip(plan.shards, made, strict=True) if planned.split == name]
        count = sum(int((folder.files["label"][shard.numbers] == label).sum()) for shard in shards)
        if count and name not in own:
            what = "image that can be read was" if count == 1 else "images that can be read were"
            lines.append(f"{count} {what} drawn for the {name} split; another seed may draw others")
    if len(lost) > 1:
        also = ", ".join(repr(folder.classes[other]) for other in lost[1 : 1 + _MOST_NAMES])
        lines.append(f"The same is true of {also}{' and others' if len(lost) > 1 + _MOST_NAMES else ''}.")
    return "\n  ".join(lines)


def _rewrite(plan: Plan, work: Path, name: str, shard: MadeShard, lost: tuple[int, ...]) -> None:
    """Copy a finished shard without the lost classes, with the labels of the rest. The record is written last."""
    folder, labels = plan.folder, plan.folder.files["label"][shard.numbers]
    gone = np.isin(labels, lost)
    attempt = work / f"{name}.rewritten.part"
    with (work / f"{name}.tar").open("rb") as source, attempt.open("wb") as file:
        with ShardWriter(file) as writer:
            for place in np.flatnonzero(~gone).tolist():
                row, label, path = shard.rows[place], int(labels[place]), folder.path(int(shard.numbers[place]))
                source.seek(int(row["offset"]))
                samples, image = Samples(), source.read(int(row["size"]))
                size = int(row["height"]), int(row["width"])
                samples.add(key_of(path), image, new_label(label, lost), size, path, folder.classes[label])
                writer.extend(samples)
        file.flush()
        os.fsync(file.fileno())
    attempt.replace(work / f"{name}.tar")
    write_atomically(work / f"{name}.idx", *writer.dali_index_pieces())
    paths = {folder.path(int(number)) for number in shard.numbers[gone]}
    MadeShard(
        entry=writer.shard(f"{name}.tar"),
        rows=writer.rows,
        numbers=shard.numbers[~gone],
        hashes=shard.hashes[~gone],
        skipped=[*shard.skipped, *({"path": path, "reason": LEFT_OUT} for path in sorted(paths))],
        warnings=[item for item in shard.warnings if item["path"] not in paths],
        dropped=lost,
    ).save(work / f"{name}.npz")
