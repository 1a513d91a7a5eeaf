"""Which samples a rank sees in each step of an epoch."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastflower.draws.order import Windows, balanced, num_steps, permute, step_positions
from fastflower.shards.manifest import Split

Shuffle = bool | Literal["balanced"]
Tail = Literal["drop", "keep", "pad"]


class Steps:
    """The steps of a rank, which are a function of (seed, epoch). `Loader` describes the arguments.

    labels  (N,) of the split's samples, in the index's order.
    """

    def __init__(
        self,
        split: Split,
        labels: NDArray[np.generic],
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        shuffle: Shuffle,
        window: int | None,
        tail: Tail,
    ) -> None:
        self.num_samples, self.global_batch_size = len(labels), batch_size * world_size
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._shuffle, self._window, self._tail = shuffle, window, tail
        self._class_samples = split.class_counts
        self._by_class = np.argsort(labels, kind="stable") if shuffle == "balanced" else None
        shard_samples = [shard.samples for shard in split.shards]
        self._windows = Windows(shard_samples, window or 1, seed=seed, shuffle=bool(shuffle))

    @property
    def of_all_ranks(self) -> int:
        """Steps in an epoch on the rank that has most."""
        return num_steps(self.num_samples, self.global_batch_size, drop_tail=self._tail == "drop")

    def __len__(self) -> int:
        steps = self.of_all_ranks
        return steps if self._tail != "keep" or len(self._positions(steps - 1)) else steps - 1

    def indices(self, epoch: int, steps: Sequence[int]) -> list[NDArray[np.int64]]:
        """Of each of these steps the samples, (N,): computed together, which takes less time."""
        positions = [self._positions(step) for step in steps]
        ends = np.cumsum([len(each) for each in positions])
        return np.split(self._indices(epoch, np.concatenate(positions)), ends[:-1])

    def _positions(self, step: int) -> NDArray[np.int64]:
        ranks = {"rank": self._rank, "world_size": self._world_size}
        return step_positions(step, self.num_samples, self.global_batch_size, **ranks, pad=self._tail == "pad")

    def _indices(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._shuffle and self._window is not None:
            return self._windows.indices(positions, epoch)
        if self._by_class is not None:
            return balanced(positions, self._by_class, self._class_samples, seed=self._seed, epoch=epoch)
        return permute(positions, self.num_samples, seed=self._seed, epoch=epoch) if self._shuffle else positions

    def shards_ahead(self, epoch: int, step: int) -> list[int]:
        """The shards that the step reads, then those that come next."""
        return self._windows.ahead(self._positions(step), epoch)
