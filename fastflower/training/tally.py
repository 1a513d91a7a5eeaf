"""What an epoch has come to so far: losses and hits that are read without waiting for the device, and when to stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastflower import distributed

_LOOKED_AT = 64  # steps: a loader lets a GPU lag behind by eight


class Tally:
    """Losses and hits of one epoch on this rank; `state` is what an interrupted epoch left, the same on every rank.

    The losses of a CUDA device are copied into pinned memory as they come, so that nothing waits for the device before the end.
    """

    def __init__(self, steps: int, device: torch.device, state: dict[str, Any] | None = None) -> None:
        self._before: Tensor = state["losses"] if state else torch.zeros(0, dtype=torch.float64)
        self._before_hits = int(state["hits"]) if state else 0
        self.seconds: float = state["seconds"] if state else 0.0
        self.waited: float = state["waited"] if state else 0.0
        self.trained: bool = bool(state and state.get("trained"))
        """Whether the epoch's training is over, and a soup has its share of it; what is left is to validate."""
        self._losses = torch.zeros(steps - len(self._before), pin_memory=device.type == "cuda")
        self._hits = torch.zeros((), dtype=torch.int64, device=device)
        self._count = 0

    @property
    def steps(self) -> int:
        """That are done."""
        return len(self._before) + self._count

    def add(self, loss: Tensor, hits: Tensor) -> None:
        """A step's mean loss and hits, (), on the device."""
        self._losses[self._count].copy_(loss, non_blocking=True)
        self._hits += hits
        self._count += 1

    def not_finite(self) -> int | None:
        """The first step whose loss is not finite, of this rank's latest ones as far as they have arrived."""
        start = max(0, self._count - _LOOKED_AT)
        step = first_not_finite(self._losses[start : self._count])
        return None if step is None else len(self._before) + start + step

    def state(self) -> dict[str, Any]:
        """Of all ranks together: each step's mean loss, (steps,) float64, the hits, and this rank's seconds.

        Waits for the device; all ranks must ask at the same step.
        """
        losses = torch.cat([self._before, self._mean_losses()])
        hits = int(distributed.summed(self._hits.cpu())) + self._before_hits
        state = {"seconds": self.seconds, "waited": self.waited, "trained": self.trained}
        return {"losses": losses, "hits": hits, **state}

    def _mean_losses(self) -> Tensor:
        if self._hits.is_cuda:
            torch.cuda.synchronize(self._hits.device)
        return distributed.summed(self._losses[: self._count].double()) / distributed.world_size()


def first_not_finite(losses: Tensor) -> int | None:
    """The first of them, (steps,), that is infinite or no number."""
    found = (~torch.isfinite(losses)).nonzero()
    return int(found[0]) if len(found) else None


@contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM ends nothing: what is yielded says whether it came. In threads other than the main one it never does."""
    asked: list[int] = []  # not an Event: its lock would wait for ever when a second signal comes while it is set
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: a handler in C
