"""What is asked of an executor (`Request`) and what a Loader yields (`Batch`)."""

import logging
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflower.augment import Draw
from fastflower.errors import DeviceError

_log = logging.getLogger("fastflower")


class Batch(NamedTuple):
    """Samples in the order of the epoch, all on the loader's device."""

    images: Tensor
    """(N, 3, H, W), an NCHW view of channels-last memory, in the loader's dtype; normalised unless that is uint8."""
    labels: Tensor
    """(N,) int64."""
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  (hides tuple.index, which has no use here)
    """(N,) int64: the samples' positions in the split's index, which key every random number."""


@dataclass(frozen=True, slots=True)
class Request:
    """One batch to make: which samples, and the numbers drawn for them."""

    step: int
    indices: NDArray[Any]
    """(N,) int64."""
    sizes: NDArray[Any]
    """(N, 2) int64: height and width of their photographs."""
    draw: Draw


class Executor(Protocol):
    """Moves the pixels."""

    def run(self, requests: Iterable[Request]) -> Generator[tuple[Request, Tensor]]:
        """Yield each request, in order, with its images; takes requests ahead, and cleans up when closed."""
        ...


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; None means CUDA where there is one, else the CPU, and says which in the log.

    Raises DeviceError for CUDA where there is none.
    """
    available = torch.cuda.is_available()
    if device is None:
        _log.info("device: %s (none was asked for)", "cuda" if available else "cpu")
    chosen = torch.device(device or ("cuda" if available else "cpu"))
    if chosen.type == "cuda" and not available:
        raise DeviceError(
            f"device={str(device)!r}: this machine, or this build of torch ({torch.__version__}), has no CUDA; "
            f"leave device out to use the CPU, or install an NVIDIA driver and a CUDA build of torch."
        )
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen
