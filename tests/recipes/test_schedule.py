"""The learning rate multiplier compared with the schedulers of torch.optim."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LRScheduler, OneCycleLR, StepLR

from fastflower.recipes.recipe import Recipe, Schedule, warm_up

LR = 0.7


def theirs(make: Callable[[torch.optim.Optimizer], LRScheduler], total_steps: int, every: int = 1) -> list[float]:
    """Return the learning rate of each step, as a multiple of LR. torch's scheduler steps every `every` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR, momentum=0.9)
    scheduler = make(optimizer)
    rates: list[float] = []
    for step in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"] / LR)
        optimizer.step()
        if (step + 1) % every == 0 and step + 1 < total_steps:
            scheduler.step()
    return rates


def ours(
    schedule: Schedule,
    total_steps: int,
    *,
    steps_per_epoch: int = 1,
    step_epochs: int = 1,
    gamma: float = 0.1,
    warm: float = 0,
) -> list[float]:
    epochs = total_steps // steps_per_epoch
    recipe = Recipe(schedule=schedule, epochs=epochs, step_epochs=step_epochs, gamma=gamma, warmup_epochs=warm)
    return [recipe.multiplier(step, steps_per_epoch) for step in range(total_steps)]


@pytest.mark.parametrize(
    ("steps_per_epoch", "epochs", "step_epochs", "gamma"),
    [(1, 20, 7, 0.1), (13, 15, 7, 0.1), (5, 9, 1, 0.5), (7, 4, 10, 0.1), (3, 8, 2, 1.5)],
)
def test_step_is_step_lr(steps_per_epoch: int, epochs: int, step_epochs: int, gamma: float) -> None:
    total = steps_per_epoch * epochs
    expected = theirs(lambda optimizer: StepLR(optimizer, step_epochs, gamma), total, every=steps_per_epoch)
    found = ours("step", total, steps_per_epoch=steps_per_epoch, step_epochs=step_epochs, gamma=gamma)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 10, 97, 1000])
def test_cosine_is_cosine_annealing_lr(total_steps: int) -> None:
    expected = theirs(lambda optimizer: CosineAnnealingLR(optimizer, T_max=total_steps), total_steps)
    assert ours("cosine", total_steps) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("total_steps", [1, 2, 3, 4, 5, 7, 10, 11, 20, 97, 1000])
def test_one_cycle_is_one_cycle_lr(total_steps: int) -> None:
    expected = theirs(lambda optimizer: OneCycleLR(optimizer, max_lr=LR, total_steps=total_steps), total_steps)
    assert ours("one_cycle", total_steps) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("total_steps", [1, 50])
def test_constant_is_one(total_steps: int) -> None:
    assert ours("constant", total_steps) == [1.0] * total_steps


def test_one_cycle_rises_from_a_25th_to_the_peak_and_falls_to_almost_zero() -> None:
    rates = ours("one_cycle", 100)
    assert rates[0] == pytest.approx(1 / 25)
    assert rates[-1] == pytest.approx(1 / 250_000)
    assert rates.index(max(rates)) == 29
    assert max(rates) == pytest.approx(1)
    assert rates[:30] == sorted(rates[:30])
    assert rates[29:] == sorted(rates[29:], reverse=True)


@pytest.mark.parametrize("warm", [0, 1, 2.5])
@pytest.mark.parametrize(
    ("steps_per_epoch", "epochs", "gamma"), [(1, 40, 0.9), (4, 40, 0.9), (10, 10, 0.5), (2, 6, 0.1)]
)
def test_exponential_cosine_is_exponential_lr_and_then_cosine_annealing_lr(
    steps_per_epoch: int, epochs: int, gamma: float, warm: float
) -> None:
    found = ours(
        "exponential_cosine", steps_per_epoch * epochs, steps_per_epoch=steps_per_epoch, gamma=gamma, warm=warm
    )
    half, begin = len(found) // 2, round(warm * steps_per_epoch)
    decay = theirs(lambda optimizer: ExponentialLR(optimizer, gamma), epochs)
    assert found[:begin] == [1] * begin
    if begin == warm * steps_per_epoch:
        assert found[begin:half:steps_per_epoch] == pytest.approx(
            decay[: len(found[begin:half:steps_per_epoch])], rel=1e-9
        )
    cosine = theirs(lambda optimizer: CosineAnnealingLR(optimizer, T_max=half), half)
    reached = gamma ** (epochs / 2 - warm)
    assert found[half:] == pytest.approx([reached * rate for rate in cosine], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("warm", [0, 5])
def test_three_phase_stays_what_checkpoints_were_trained_with(warm: float) -> None:
    """Its decay starts at the first step, even during the warm-up."""
    found = ours("three_phase", 400, steps_per_epoch=10, gamma=0.9, warm=warm)
    cosine = [(1 + math.cos(math.pi * share)) / 2 for share in (0.25, 0.5, 0.75)]
    assert found[:200:50] == pytest.approx([0.9**epoch for epoch in (0, 5, 10, 15)])
    assert found[200::50] == pytest.approx([0.9**20 * share for share in (1, *cosine)])


@pytest.mark.parametrize(
    ("epochs", "warm"), [(40, 10), (41, 10), (40, 5), (40, 30), (12, 10), (40, 40), (1, 10), (3, 0.5)]
)
def test_exponential_cosine_warms_up_falls_without_a_jump_and_does_not_rise_again(epochs: int, warm: float) -> None:
    """This holds even if the warm-up takes more than half of the epochs, or more than all."""
    steps = 500
    falling = ours("exponential_cosine", epochs * steps, steps_per_epoch=steps, gamma=0.9, warm=warm)
    rates = [rate * warm_up(step, warm * steps) for step, rate in enumerate(falling)]
    peak = round(warm * steps)
    assert rates[0] == pytest.approx(0.01)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(abs(one - other) for one, other in pairwise(rates)) < 4 / (
        steps * min(warm, epochs - warm if warm < epochs else warm)
    )
    assert min(rates) >= 0
    if warm < epochs:
        assert max(rates) == rates[peak] == 1
        assert rates[-1] < 1e-4


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_exponential_cosine_of_very_few_steps_falls_from_one(total_steps: int) -> None:
    rates = ours("exponential_cosine", total_steps)
    assert rates[0] == 1
    assert rates == sorted(rates, reverse=True)
