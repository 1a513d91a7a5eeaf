"""A view of a pack with folds, in which one fold is the val split and the other folds are the train split."""

from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import ArgumentError, integer, require
from fastflower.shards.manifest import Manifest, Split, with_folds

_PARTS = ("train", "val")  # of the pack's train split


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class FoldView(Manifest):
    """A manifest whose "train" and "val" are parts of the pack's train split, and list only the shards that they need."""

    whole: Manifest
    """The pack's manifest."""
    fold: int

    @classmethod
    def of(cls, manifest: Manifest, fold: int) -> Self:
        """Return the view with this val fold. Raises ShardError if the index or the folds have changed."""
        entries = {entry.name: getattr(manifest, entry.name) for entry in fields(Manifest)}
        train, rows, val = manifest.splits["train"], manifest.index("train"), manifest.fold_numbers() == fold
        entries["splits"] = manifest.splits | {"train": _part(train, rows[~val]), "val": _part(train, rows[val])}
        return cls(**entries, whole=manifest, fold=fold)

    def identity(self, name: str) -> dict[str, object]:
        """Return what identifies the samples of a split."""
        if self.folds is None or name not in _PARTS:
            return self.whole.identity(name)
        return {**self.whole.identity("train"), "folds": self.folds.sha256[:16], "fold": self.fold}

    def index(self, name: str) -> NDArray[np.void]:
        """Return the rows of a split's samples, in the order of the pack's index, with its shards numbered anew."""
        if name not in _PARTS:
            return self.whole.index(name)
        val = self.whole.fold_numbers() == self.fold
        rows = self.whole.index("train")[val if name == "val" else ~val]
        rows["shard"] = np.unique(rows["shard"], return_inverse=True)[1]
        return rows


def _part(split: Split, rows: NDArray[np.void]) -> Split:
    """Return the description of the samples with these rows."""
    counts: list[int] = np.bincount(rows["label"], minlength=len(split.class_counts)).tolist()
    samples: list[int] = np.bincount(rows["shard"], minlength=len(split.shards)).tolist()
    shards = [replace(shard, samples=count) for shard, count in zip(split.shards, samples, strict=True) if count]
    return Split(len(rows), tuple(counts), tuple(shards))


def check_fold(manifest: Manifest, split: str, fold: int | None) -> int | None:
    """Return the fold as a plain integer. Raises ArgumentError unless the pack has it and the split consists of folds."""
    if fold is None:
        return None
    if manifest.folds is None:
        what = f"fold must be None, because these shards have no folds, got {fold!r}"
        raise ArgumentError(f"{what}; pack the images again, with folds:\n  {with_folds()}")
    last = manifest.folds.count - 1
    number = integer("fold", fold, 0, at_most=last, rule=f"from 0 to {last}")
    require(split in _PARTS, "fold", f"None with split {split!r}, which is not divided into folds", number)
    return number
