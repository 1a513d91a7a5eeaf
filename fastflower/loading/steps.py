"""The order in which an epoch visits the samples of a split, and the samples of a rank in each step."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np

from fastflower.draws.augment import Augment
from fastflower.draws.order import Windows, balanced, num_steps, permute, step_positions
from fastflower.loading.batch import Integers
from fastflower.loading.request import Request
from fastflower.shards.manifest import Split

_DRAWN_TOGETHER = 1024  # samples: enough to outweigh the overhead of numpy calls

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


@dataclass(frozen=True)
class Steps:
    """The steps of an epoch on one rank. See `Loader` for the arguments."""

    order: Order
    batch_size: int
    rank: int
    world_size: int
    tail: Tail

    @cached_property
    def count(self) -> int:
        """Number of steps per epoch, over all ranks."""
        return num_steps(len(self.order.labels), self.batch_size * self.world_size, drop_tail=self.tail == "drop")

    @cached_property
    def here(self) -> int:
        """Number of steps on this rank. A rank that gets no sample of a kept tail has one fewer step."""
        last_is_empty = self.tail == "keep" and not len(self._positions(self.count - 1))
        return self.count - last_is_empty

    def indices(self, epoch: int, step: int) -> Integers:
        """Return the indices (N,) of this rank's samples in one step of an epoch."""
        return self.order.indices(self._positions(step), epoch)

    def requests(self, augment: Augment, sizes: Integers, epoch: int, start: int) -> Iterator[Request]:
        """Yield the requests of an epoch, starting at step `start`. sizes  (N, 2) of all samples.

        After the first step, the numbers of multiple steps are drawn together, which is three times as fast.
        """
        later = range(start + 1, self.here, max(1, _DRAWN_TOGETHER // self.batch_size))
        for first, end in pairwise([*range(start, min(start + 1, self.here)), *later, self.here]):
            positions = [self._positions(step) for step in range(first, end)]
            indices = self.order.indices(np.concatenate(positions), epoch)
            drawn = Request.drawn(augment, indices, sizes[indices], seed=self.order.seed, epoch=epoch, step=first)
            row = 0
            for step, count in enumerate(map(len, positions), first):
                yield drawn.take(step, slice(row, row + count))
                row += count

    def shards_ahead(self, epoch: int, step: int) -> list[str]:
        """Return the names of the shards that a step reads, followed by the shards of the next window."""
        shards = self.order.split.shards
        return [shards[number].name for number in self.order.windows.ahead(self._positions(step), epoch)]

    def _positions(self, step: int) -> Integers:
        ranks = {"rank": self.rank, "world_size": self.world_size}
        whole = self.batch_size * self.world_size
        return step_positions(step, len(self.order.labels), whole, **ranks, pad=self.tail == "pad")
