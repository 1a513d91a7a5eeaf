"""The order in which an epoch visits the samples of a split."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from fastflower.draws.order import Windows, balanced, permute
from fastflower.loading.batch import Integers
from fastflower.shards.manifest import Split

Shuffle = bool | Literal["balanced"]
Tail = Literal["drop", "keep", "pad"]


@dataclass(frozen=True)
class Order:
    """Order of the samples in each epoch, determined by (seed, epoch). See `Loader` for the arguments."""

    split: Split
    labels: Integers
    """(N,) labels of the split's samples, in index order."""
    seed: int
    shuffle: Shuffle
    window: int | None

    def indices(self, positions: Integers, epoch: int) -> Integers:
        """Return the indices (N,) of the samples at `positions` (N,) in the order of `epoch`."""
        if self.shuffle and self.window is not None:
            return self.windows.indices(positions, epoch)
        if self.shuffle == "balanced":
            return balanced(positions, self._by_class, self.split.class_counts, seed=self.seed, epoch=epoch)
        return permute(positions, len(self.labels), seed=self.seed, epoch=epoch) if self.shuffle else positions

    @cached_property
    def windows(self) -> Windows:
        """Order of the shards, grouped into windows of shards that are read together."""
        samples = [shard.samples for shard in self.split.shards]
        return Windows(samples, self.window or 1, seed=self.seed, shuffle=bool(self.shuffle))

    @cached_property
    def _by_class(self) -> Integers:
        return np.argsort(self.labels, kind="stable")
