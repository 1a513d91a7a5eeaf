"""Which samples a rank sees in each step of an epoch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastflower.draws.order import Windows, balanced, num_steps, permute, step_positions
from fastflower.shards.manifest import Split

Shuffle = bool | Literal["balanced"]
Tail = Literal["drop", "keep", "pad"]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of a rank, which are a function of (seed, epoch). `Loader` describes the arguments."""

    split: Split
    labels: NDArray[np.int64]
    """(N,) of the split's samples, in the index's order."""
    seed: int
    batch_size: int
    rank: int
    world_size: int
    shuffle: Shuffle
    window: int | None
    tail: Tail

    @property
    def global_batch_size(self) -> int:
        """Samples a step over all ranks."""
        return self.batch_size * self.world_size

    @property
    def of_all_ranks(self) -> int:
        """Steps in an epoch on the rank that has most."""
        return num_steps(len(self.labels), self.global_batch_size, drop_tail=self.tail == "drop")

    def __len__(self) -> int:
        steps = self.of_all_ranks
        return steps if self.tail != "keep" or len(self._positions(steps - 1)) else steps - 1

    def indices(self, epoch: int, steps: Sequence[int]) -> list[NDArray[np.int64]]:
        """Of each of these steps the samples, (N,): computed together, which takes less time."""
        positions = [self._positions(step) for step in steps]
        ends = np.cumsum([len(each) for each in positions])
        return np.split(self._indices(epoch, np.concatenate(positions)), ends[:-1])

    def _positions(self, step: int) -> NDArray[np.int64]:
        ranks = {"rank": self.rank, "world_size": self.world_size}
        return step_positions(step, len(self.labels), self.global_batch_size, **ranks, pad=self.tail == "pad")

    def _indices(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.shuffle and self.window is not None:
            return self._windows.indices(positions, epoch)
        if self.shuffle == "balanced":
            return balanced(positions, self._by_class, self.split.class_counts, seed=self.seed, epoch=epoch)
        return permute(positions, len(self.labels), seed=self.seed, epoch=epoch) if self.shuffle else positions

    def shards_ahead(self, epoch: int, step: int) -> list[int]:
        """The shards that the step reads, then those that come next."""
        return self._windows.ahead(self._positions(step), epoch)

    @cached_property
    def _windows(self) -> Windows:
        samples = [shard.samples for shard in self.split.shards]
        return Windows(samples, self.window or 1, seed=self.seed, shuffle=bool(self.shuffle))

    @cached_property
    def _by_class(self) -> NDArray[np.int64]:
        return np.argsort(self.labels, kind="stable")
