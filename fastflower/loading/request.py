"""The `Request` for one batch, which a backend renders."""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from fastflower.draws.augment import Augment
from fastflower.draws.draw import Draw
from fastflower.draws.geometry import Warp
from fastflower.loading.batch import Integers


@dataclass(frozen=True, slots=True)
class Request:
    """The samples of one batch and the numbers drawn for them."""

    epoch: int
    step: int
    indices: Integers
    """(N,) indices of the samples."""
    draw: Draw
    warp: Warp
    """Warps computed from the draw and the sizes of the images."""
    augment: Augment
    """Distribution from which the numbers were drawn."""
    seed: int

    @classmethod
    def drawn(cls, augment: Augment, indices: Integers, sizes: Integers, *, seed: int, epoch: int, step: int) -> Self:
        """Return a request with numbers drawn for the samples at `indices` (N,). sizes  (N, 2) height and width of the images."""
        draw = augment.draw(seed, epoch, indices, sizes)
        return cls(epoch, step, indices, draw, draw.warp(augment.fill, augment.padding_mode), augment, seed)

    def take(self, step: int, rows: slice) -> "Request":
        """Return a request for the samples in `rows`, with step number `step`. Its arrays are views of this request's arrays."""
        draw, warp = self.draw.take(rows), self.warp.take(rows)
        return Request(self.epoch, step, self.indices[rows], draw, warp, self.augment, self.seed)

    def row(self, row: int) -> "Request":
        """Return a request for the sample in `row`, like `take`."""
        return self.take(self.step, slice(row, row + 1))

    def put(self, row: int, index: int, size: Integers) -> None:
        """Replace the sample in `row` with the one at `index`, and redraw. size  (2,) height and width of the new image."""
        indices = np.array([index])
        other = Request.drawn(self.augment, indices, size[None], seed=self.seed, epoch=self.epoch, step=self.step)
        self.indices[row] = index
        for mine, theirs in ((self.draw, other.draw), (self.warp, other.warp)):
            for field in fields(mine):
                values = getattr(mine, field.name)
                if isinstance(values, np.ndarray):
                    values[row] = getattr(theirs, field.name)[0]
