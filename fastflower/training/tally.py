"""What an epoch has come to so far: losses and hits that are read without waiting for the device, and when to stop."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastflower import distributed
from fastflower.models.checkpoint import EpochSoFar

_LATEST = 64  # steps that are looked at: a loader lets a GPU lag behind by eight


class Tally:
    """Losses and hits of one epoch on this rank; `state` is what an interrupted epoch left, the same on every rank, or {}.

    The losses of a CUDA device are copied into pinned memory as they come, so that nothing waits for the device before the end.
    """

    def __init__(self, steps: int, device: torch.device, state: EpochSoFar) -> None:
        self._before = state.get("losses", torch.zeros(0, dtype=torch.float64))
        self._before_correct = state.get("hits", 0)
        self.seconds = state.get("seconds", 0.0)
        self.waited = state.get("waited", 0.0)
        self.trained = state.get("trained", False)
        """Whether the epoch's training is over, and a soup has its share of it; what is left is to validate."""
        self._losses = torch.zeros(steps - len(self._before), pin_memory=device.type == "cuda")
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._count = 0

    @property
    def steps(self) -> int:
        """That are done."""
        return len(self._before) + self._count

    def add(self, loss: Tensor, correct: Tensor) -> None:
        """A step's mean loss and hits, (), on the device."""
        self._losses[self._count].copy_(loss, non_blocking=True)
        self._correct += correct
        self._count += 1

    def not_finite(self) -> int | None:
        """The first step whose loss is not finite, of this rank's latest ones as far as they have arrived."""
        start = max(0, self._count - _LATEST)
        step = first_not_finite(self._losses[start : self._count])
        return None if step is None else len(self._before) + start + step

    def totals(self) -> tuple[Tensor, int]:
        """Of all ranks together: each step's mean loss, (steps,) float64, and the hits.

        Waits for the device; all ranks must ask at the same step.
        """
        if self._correct.is_cuda:
            torch.cuda.synchronize(self._correct.device)
        losses = distributed.summed(self._losses[: self._count].double()) / distributed.world_size()
        correct = int(distributed.summed(self._correct.cpu()))
        return torch.cat([self._before, losses]), self._before_correct + correct

    def state(self) -> EpochSoFar:
        """The totals and this rank's seconds, for a checkpoint."""
        losses, correct = self.totals()
        return EpochSoFar(losses=losses, hits=correct, seconds=self.seconds, waited=self.waited, trained=self.trained)


def first_not_finite(losses: Tensor) -> int | None:
    """The first of them, (steps,), that is infinite or no number."""
    steps = (~torch.isfinite(losses)).nonzero()
    return int(steps[0]) if len(steps) else None


@contextmanager
def preemption() -> Generator[Callable[[], bool]]:
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
