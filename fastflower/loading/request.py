"""What is asked of a backend: a `Request` for each batch."""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from fastflower.draws.augment import Augment
from fastflower.draws.draw import Draw
from fastflower.draws.geometry import Warp
from fastflower.loading.batch import Integers


@dataclass(frozen=True, slots=True)
class Request:
    """One batch to make: which samples, and the numbers drawn for them."""

    epoch: int
    step: int
    indices: Integers
    """(N,)."""
    draw: Draw
    warp: Warp
    """The draw's geometry, for images of their sizes."""
    augment: Augment
    """What was drawn from, and with which seed."""
    seed: int

    @classmethod
    def drawn(cls, augment: Augment, indices: Integers, sizes: Integers, *, seed: int, epoch: int, step: int) -> Self:
        """The request for samples `indices`, (N,), whose images have `sizes`, (N, 2) height and width."""
        draw = augment.draw(seed, epoch, indices, sizes)
        return cls(epoch, step, indices, draw, draw.warp(sizes, augment.fill), augment, seed)

    def take(self, step: int, rows: slice) -> "Request":
        """Some of the samples, as a step of its own. Its arrays are views of this one's."""
        draw, warp = self.draw.take(rows), self.warp.take(rows)
        return Request(self.epoch, step, self.indices[rows], draw, warp, self.augment, self.seed)

    def row(self, row: int) -> "Request":
        """One of the samples, as `take` gives it."""
        return self.take(self.step, slice(row, row + 1))

    def put(self, row: int, index: int, size: Integers) -> None:
        """Set another sample, whose image has `size`, (2,) height and width, into a row, with what is drawn for it."""
        indices = np.array([index])
        other = Request.drawn(self.augment, indices, size[None], seed=self.seed, epoch=self.epoch, step=self.step)
        self.indices[row] = index
        for mine, theirs in ((self.draw, other.draw), (self.warp, other.warp)):
            for field in fields(mine):
                values = getattr(mine, field.name)
                if isinstance(values, np.ndarray):
                    values[row] = getattr(theirs, field.name)[0]
