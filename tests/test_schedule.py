"""The learning rate's multiplier against the schedulers of torch.optim."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LRScheduler, OneCycleLR, StepLR

from fastflower.schedule import Schedule, multiplier, warm_up

LR = 0.7


def theirs(make: Callable[[torch.optim.Optimizer], LRScheduler], total_steps: int, every: int = 1) -> list[float]:
    """The rate of each optimizer step, as multiples of LR, when torch's scheduler steps after every `every` of them."""
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
    schedule: Schedule, total_steps: int, *, steps_per_epoch: int = 1, step_epochs: int = 1, gamma: float = 0.1
) -> list[float]:
    return [
        multiplier(
            schedule,
            step,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            step_epochs=step_epochs,
            gamma=gamma,
        )
        for step in range(total_steps)
    ]


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


def test_one_cycle_rises_from_a_25th_to_the_peak_and_falls_to_almost_nothing() -> None:
    rates = ours("one_cycle", 100)
    assert rates[0] == pytest.approx(1 / 25)
    assert rates[-1] == pytest.approx(1 / 250_000)
    assert rates.index(max(rates)) == 29
    assert max(rates) == pytest.approx(1)
    assert rates[:30] == sorted(rates[:30])
    assert rates[29:] == sorted(rates[29:], reverse=True)


@pytest.mark.parametrize(
    ("steps_per_epoch", "epochs", "gamma"), [(1, 40, 0.9), (7, 40, 0.9), (10, 4, 0.5), (3, 2, 0.1)]
)
def test_three_phase_is_exponential_lr_and_then_cosine_annealing_lr(
    steps_per_epoch: int, epochs: int, gamma: float
) -> None:
    found = ours("three_phase", steps_per_epoch * epochs, steps_per_epoch=steps_per_epoch, gamma=gamma)
    decay = theirs(lambda optimizer: ExponentialLR(optimizer, gamma), epochs)
    assert found[: len(found) // 2 : steps_per_epoch] == pytest.approx(decay[: epochs // 2], rel=1e-9)
    half = len(found) // 2
    cosine = theirs(lambda optimizer: CosineAnnealingLR(optimizer, T_max=half), half)
    assert found[half:] == pytest.approx([decay[epochs // 2] * rate for rate in cosine], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("epochs", [40, 41])
def test_three_phase_warms_up_falls_without_a_jump_and_does_not_rise_again(epochs: int) -> None:
    steps, warm = 500, 5 * 500
    falling = ours("three_phase", epochs * steps, steps_per_epoch=steps, gamma=0.9)
    rates = [rate * warm_up(step, warm) for step, rate in enumerate(falling)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[warm] == pytest.approx(0.9**5)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert max(abs(one - other) for one, other in pairwise(rates)) < 1.01 / warm
    assert max(rates[len(rates) // 2 :]) == pytest.approx(0.9 ** (epochs / 2), rel=1e-3)
    assert 0 < rates[-1] < 1e-6


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_three_phase_of_very_few_steps_falls_from_one(total_steps: int) -> None:
    rates = ours("three_phase", total_steps)
    assert rates[0] == 1
    assert rates == sorted(rates, reverse=True)
