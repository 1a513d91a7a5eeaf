"""The learning rate's multiplier as a pure function of the step."""

from math import cos, pi
from typing import Literal

Schedule = Literal["constant", "step", "cosine", "one_cycle", "exponential_cosine", "three_phase"]

# torch's OneCycleLR: share of the steps spent rising, and the divisors of the first and the last rate.
_RISING, _FIRST, _LAST = 0.3, 25.0, 1e4
_WARM = 0.01  # where a warm-up starts, as torch's LinearLR(start_factor=0.01)


def multiplier(
    schedule: Schedule,
    step: int,
    *,
    total_steps: int,
    steps_per_epoch: int,
    step_epochs: int,
    gamma: float,
    warmup_epochs: float = 0.0,
) -> float:
    """What the recipe's lr is multiplied by in optimizer step `step`, 0 .. total_steps-1.

    "constant": 1. "step": gamma ** (epoch // step_epochs), torch's StepLR. "cosine": from 1 down to 0, torch's
    CosineAnnealingLR with T_max = total_steps, by steps. "one_cycle": up to 1 and down again, torch's OneCycleLR (cosine,
    two phases, Smith and Topin 2018). "exponential_cosine": 1 until the warm-up ends, then gamma to the power of the epochs
    since, fractions counted (torch's ExponentialLR, by steps), until half of the steps; then half a cosine from there to 0.
    "three_phase": the same, but the epochs of the warm-up count too, so that the peak is never reached; for checkpoints that
    were trained with it.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return gamma ** (step // steps_per_epoch // step_epochs)
    if schedule == "cosine":
        return (1 + cos(pi * step / total_steps)) / 2
    if schedule in ("exponential_cosine", "three_phase"):
        warm = warmup_epochs * steps_per_epoch if schedule == "exponential_cosine" else 0.0
        turn = max(warm, total_steps / 2)
        decayed = gamma ** (max(0.0, min(step, turn) - warm) / steps_per_epoch)
        return decayed if step <= turn else _cosine(decayed, 0.0, (step - turn) / (total_steps - turn))
    peak = _RISING * total_steps - 1
    first, last = 1 / _FIRST, 1 / (_FIRST * _LAST)
    if step <= peak:
        return _cosine(first, 1.0, step / peak)
    return _cosine(1.0, last, (step - peak) / max(1e-9, total_steps - 1 - peak))


def warm_up(step: int, warmup_steps: float) -> float:
    """The share of the scheduled rate in a linear warm-up: torch's LinearLR from 0.01 to 1 over `warmup_steps`."""
    return 1.0 if step >= warmup_steps else _WARM + (1 - _WARM) * step / warmup_steps


def _cosine(start: float, stop: float, share: float) -> float:
    return stop + (start - stop) * (1 + cos(pi * min(1.0, share))) / 2
