"""Running totals of an epoch, kept without waiting for the device."""

import torch
from torch import Tensor

from fastflower import distributed
from fastflower.models.checkpoint import EpochSoFar

_LATEST = 64  # steps checked for finite losses; a GPU lags behind the host by at most eight batches


class Tally:
    """Losses and number of correct predictions of one epoch on this rank.

    `state` restores an interrupted epoch and is the same on every rank; {} starts a new epoch. Losses on CUDA are copied
    to pinned memory asynchronously, so nothing waits for the device before the end of the epoch.
    """

    def __init__(self, steps: int, device: torch.device, state: EpochSoFar) -> None:
        self._before = state.get("losses", torch.zeros(0, dtype=torch.float64))
        self._before_correct = state.get("hits", 0)
        self.seconds = state.get("seconds", 0.0)
        self.waited = state.get("waited", 0.0)
        self.trained = state.get("trained", False)
        """Whether training for the epoch, including any model soup update, is finished and only validation is left."""
        self._losses = torch.zeros(steps - len(self._before), pin_memory=device.type == "cuda")
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._count = 0

    @property
    def steps(self) -> int:
        """Number of finished steps."""
        return len(self._before) + self._count

    def add(self, loss: Tensor, correct: Tensor) -> None:
        """Add a step's mean loss and number of correct predictions, both of shape (), on the device."""
        self._losses[self._count].copy_(loss, non_blocking=True)
        self._correct += correct
        self._count += 1

    def not_finite(self) -> int | None:
        """Return this rank's first recent step with a non-finite loss, or None. Ignores losses still being copied."""
        start = max(0, self._count - _LATEST)
        step = first_not_finite(self._losses[start : self._count])
        return None if step is None else len(self._before) + start + step

    def totals(self) -> tuple[Tensor, int]:
        """Return each step's mean loss, (steps,) float64, and the number of correct predictions, over all ranks.

        Waits for the device. All ranks must call this at the same step.
        """
        if self._correct.is_cuda:
            torch.cuda.synchronize(self._correct.device)
        losses = distributed.summed(self._losses[: self._count].double()) / distributed.world_size()
        correct = int(distributed.summed(self._correct.cpu()))
        return torch.cat([self._before, losses]), self._before_correct + correct

    def state(self) -> EpochSoFar:
        """Return the totals and this rank's seconds, for a checkpoint."""
        losses, correct = self.totals()
        return EpochSoFar(losses=losses, hits=correct, seconds=self.seconds, waited=self.waited, trained=self.trained)


def first_not_finite(losses: Tensor) -> int | None:
    """Return the first step with an inf or NaN loss in losses (steps,), or None."""
    steps = (~torch.isfinite(losses)).nonzero()
    return int(steps[0]) if len(steps) else None
