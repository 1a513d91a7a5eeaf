"""What is asked of an executor (`Request`) and what a Loader yields (`Batch`)."""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflower.draws.augment import Augment
from fastflower.draws.draw import Draw, Mix
from fastflower.draws.geometry import Warp
from fastflower.errors import SampleError

Pixels = NDArray[np.uint8]
SPENT = ("read", "decode", "augment", "wait", "consume")
"""On what a loader's clock says that time went."""


class Batch(NamedTuple):
    """Samples in the order of the epoch, all on the loader's device."""

    images: Tensor
    """(N, 3, H, W), an NCHW view of channels-last memory, in the loader's dtype; normalised unless that is uint8."""
    labels: Tensor
    """(N,) int64; where the augment mixes images (N, classes) float32, the share of each class."""
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  (hides tuple.index, which has no use here)
    """(N,) int64: the samples' positions in the split's index, which key every random number."""


@dataclass(frozen=True, slots=True)
class Request:
    """One batch to make: which samples, and the numbers drawn for them."""

    epoch: int
    step: int
    indices: NDArray[Any]
    """(N,) int64. An executor overwrites those of samples that it replaces."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Where a loader's time went. Reading, decoding and augmenting are sums over threads: not what a GPU or DALI does."""

    images: int
    workers: int
    replaced: int
    """Damaged samples that another stood in for."""
    read_seconds: float
    """Reading and checking checksums."""
    decode_seconds: float
    augment_seconds: float
    wait_seconds: float
    """In which the consumer waited for a batch."""
    consume_seconds: float
    """In which the consumer used a batch while the loader worked ahead."""

    def __str__(self) -> str:
        """The sums, and a sentence that says what holds the job back and what to do."""
        count = max(1, self.images)
        spent = {name: getattr(self, f"{name}_seconds") for name in SPENT}
        lines = [
            f"{name:8} {seconds:8.2f} s {1000 * seconds / count:8.3f} ms an image" for name, seconds in spent.items()
        ]
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """One sentence."""
        total = self.wait_seconds + self.consume_seconds
        if not self.images or not total:
            return "nothing was fed yet: iterate first."
        share = self.wait_seconds / total
        if share < 0.05:
            return f"the consumer holds the job back: it waited for data {share:.0%} of the time; speed up the training step."
        waited = f"feeding holds the job back: the consumer waited {share:.0%} of the time"
        if not self.augment_seconds:
            return f"{waited}; what a GPU or DALI does is not told apart; add cores (workers), or pack smaller images (max_side)."
        work = {"reading": self.read_seconds, "decoding": self.decode_seconds, "augmenting": self.augment_seconds}
        slowest = max(work, key=lambda name: work[name])
        advice = {
            "reading": "put the shards on a faster disk, or into RAM",
            "decoding": "later epochs need none if photographs are kept (cache); else pack smaller ones (max_side) or add cores",
            "augmenting": "add cores (workers), or augment less: hue costs most",
        }[slowest]
        return f"{waited}, most of it for {slowest}; {advice}."


class Clock:
    """Seconds spent, by what they were spent on. Thread-safe."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = Lock()

    def add(self, what: str, seconds: float) -> None:
        """Add to one of the sums."""
        with self._lock:
            self._seconds[what] = self._seconds.get(what, 0.0) + seconds

    def __getitem__(self, what: str) -> float:
        return self._seconds.get(what, 0.0)


Replace = Callable[[Request, int, SampleError], Request]
"""(request, row, what is wrong with the sample there) to the request with another sample in that row, or raises the error."""


def refuse(_request: Request, _row: int, error: SampleError) -> Request:
    """Replace nothing."""
    raise error


class Executor(Protocol):
    """Moves the pixels."""

    def run(self, requests: Iterable[Request]) -> Generator[tuple[Request, Tensor]]:
        """Yield each request, in order, with its images; takes requests ahead, and cleans up when closed."""
        ...


def mixed(
    images: Tensor, labels: Tensor, mix: Mix, num_classes: int, put: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W), float, and labels (N,), mixed with those of the other in the pair; labels become (N, K) float32.

    put  brings a tensor of the host to where they are, without waiting for a GPU.
    """
    partner = torch.arange(len(labels), device=labels.device) ^ 1
    numbers = np.repeat(np.stack([mix.share, np.where(mix.cut, 1.0, mix.share)]), 2, axis=1).astype(np.float32)
    share, blend = put(torch.from_numpy(numbers))[:, :, None]
    classes = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()  # one_hot waits for a GPU
    out = torch.lerp(images[partner], images, blend[:, :, None, None].to(images.dtype))
    for pair, (top, left, height, width) in enumerate(mix.box.tolist()):
        if height and width:
            place = (slice(None), slice(top, top + height), slice(left, left + width))
            out[2 * pair][place], out[2 * pair + 1][place] = images[2 * pair + 1][place], images[2 * pair][place]
    return out.contiguous(memory_format=torch.channels_last), torch.lerp(classes[partner], classes, share)


def storage(dtype: torch.dtype) -> Any:
    """The numpy dtype that stores `dtype`; numpy has no bfloat16, so its bits travel as uint16."""
    return {torch.uint8: np.uint8, torch.float32: np.float32}.get(dtype, np.uint16)


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """The same memory in that dtype."""
    return tensor.numpy() if tensor.dtype in (torch.float32, torch.uint8) else tensor.view(torch.uint16).numpy()
