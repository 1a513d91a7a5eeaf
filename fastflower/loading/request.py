"""What is asked of a backend: a `Request` for each batch."""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, Self

from numpy.typing import NDArray
from torch import Tensor

from fastflower.draws.augment import Augment
from fastflower.draws.draw import Draw
from fastflower.draws.geometry import Warp
from fastflower.errors import SampleError


@dataclass(frozen=True, slots=True)
class Request:
    """One batch to make: which samples, and the numbers drawn for them."""

    epoch: int
    step: int
    indices: NDArray[Any]
    """(N,) int64. A backend overwrites those of samples that it replaces."""
    draw: Draw
    warp: Warp
    """The draw's geometry, for photographs of their sizes."""
    augment: Augment
    """What was drawn from, and with which seed."""
    seed: int

    @classmethod
    def drawn(
        cls, augment: Augment, indices: NDArray[Any], sizes: NDArray[Any], *, seed: int, epoch: int, step: int
    ) -> Self:
        """The request for samples `indices`, (N,) int64, whose photographs have `sizes`, (N, 2) height and width."""
        draw = augment.draw(seed, epoch, indices, sizes)
        return cls(epoch, step, indices, draw, draw.warp(sizes, augment.fill), augment, seed)

    def of(self, indices: NDArray[Any], sizes: NDArray[Any]) -> "Request":
        """The same step, of other samples."""
        return Request.drawn(self.augment, indices, sizes, seed=self.seed, epoch=self.epoch, step=self.step)

    def take(self, step: int, rows: slice) -> "Request":
        """Some of the samples, as a step of its own."""
        draw, warp = self.draw.take(rows), self.warp.take(rows)
        return Request(self.epoch, step, self.indices[rows], draw, warp, self.augment, self.seed)


Replace = Callable[[Request, int, SampleError], Request]
"""(request, row, what is wrong with the sample there) to the request with another sample in that row, or raises the error."""


def refuse(_request: Request, _row: int, error: SampleError) -> Request:
    """Replace nothing."""
    raise error


class Backend(Protocol):
    """Moves the pixels."""

    def run(self, requests: Iterable[Request]) -> Generator[tuple[Request, Tensor]]:
        """Yield each request, in order, with its images; takes requests ahead, and cleans up when closed."""
        ...
