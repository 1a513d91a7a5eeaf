"""Optimizers, compared with torch's; gradient accumulation and clipping."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from fastflower import Augment, Loader, Recipe
from fastflower.errors import ArgumentError
from fastflower.recipes.recipe import warm_up
from fastflower.training.run import Run, optimizer_of

SMALL = Recipe(
    weights=None, augment=Augment(size=32, resize=36), batch_size=16, epochs=2, precision="float32", momentum=0.5
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))


THEIRS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.01, momentum=0.5),
    "adam": lambda groups: torch.optim.Adam(groups, 0.01, betas=(0.5, 0.999)),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.01, betas=(0.5, 0.999)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_an_optimizer_equals_torchs_with_weight_decay_of_matrices_only(name: Any) -> None:
    recipe = replace(SMALL, optimizer=name, lr=0.01, weight_decay=0.1)
    ours, theirs = network(), network()
    named = dict(theirs.named_parameters())
    decaying = [named[key] for key in ("0.weight", "4.weight")]
    plain = [named[key] for key in ("0.bias", "2.weight", "2.bias", "4.bias")]
    expected = THEIRS[name]([{"params": decaying, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])
    found = optimizer_of(ours, recipe)
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
    for _ in range(5):
        for model, optimizer in ((ours, found), (theirs, expected)):
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_warm_up_equals_torchs_linear_lr(steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    scheduler = LinearLR(optimizer, start_factor=0.01, total_iters=steps)
    for step in range(steps + 3):
        assert warm_up(step, steps) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert warm_up(0, 0) == 1.0


def run(shards: Path, **changes: Any) -> Run:
    """Return a run in evaluation mode, so batch norms do not mix the samples of a batch."""
    made = Run(shards, replace(SMALL, **changes), Path("unused"), torch.device("cpu"), None)
    made.network.eval()
    return made


@pytest.fixture(scope="module")
def batch(shards: Path) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels, _ = next(iter(Loader(shards, batch_size=16, augment=SMALL.augment, device="cpu")))
    return images, labels


def test_accumulated_batches_equal_one_large_batch(shards: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = batch
    whole, parts = run(shards), run(shards, accumulate=4)
    before = [parameter.clone() for parameter in parts.network.parameters()]
    whole.step(images, labels)
    for number in range(4):
        piece = slice(4 * number, 4 * number + 4)
        parts.step(images[piece], labels[piece], 4, update=number == 3)
        if number < 3:
            assert all(torch.equal(one, other) for one, other in zip(parts.network.parameters(), before, strict=True))
    for one, other in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_an_epoch_updates_once_per_group_of_batches_including_the_last_smaller_one(shards: Path) -> None:
    made = run(shards, accumulate=3)
    updates: list[float] = []
    step = made.optimizer.step
    made.optimizer.step = lambda *_: updates.append(step())  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    seen: list[int] = []
    one = made.step

    def spy(images: Any, labels: Any, together: int = 1, *, update: bool = True) -> Any:
        seen.append(together)
        return one(images, labels, together, update=update)

    made.step = spy
    made.train_epoch(0)
    assert len(made.loader) == 7
    assert len(updates) == 3
    assert seen == [3, 3, 3, 3, 3, 3, 1]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_clipping_limits_the_update(
    shards: Path, batch: tuple[torch.Tensor, torch.Tensor], precision: Literal["float32", "float16"]
) -> None:
    """With a scaled loss, clipping applies to the unscaled gradients."""
    images, labels = batch[0][:4].to(getattr(torch, precision)), batch[1][:4]
    common: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "precision": precision}
    free, clipped = run(shards, **common), run(shards, **common, clip_norm=1e-3)
    lengths: list[float] = []
    for made in (free, clipped):
        before = torch.cat([parameter.detach().flatten().clone() for parameter in made.network.parameters()])
        made.step(images, labels)
        after = torch.cat([parameter.detach().flatten() for parameter in made.network.parameters()])
        lengths.append((after - before).norm().item())
    assert lengths[0] > 0.1
    assert lengths[1] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lion"}, "Recipe.optimizer must be one of sgd, adam, adamw, got 'lion'."),
        ({"clip_norm": 0.0}, "Recipe.clip_norm must be a number above 0, got 0.0."),
        ({"accumulate": 0}, "Recipe.accumulate must be an integer, at least 1, got 0."),
        ({"warmup_epochs": -1.0}, "Recipe.warmup_epochs must be a number, 0 or more, got -1.0."),
        (
            {"warmup_epochs": 1.0, "schedule": "one_cycle"},
            "Recipe.warmup_epochs must be 0 if schedule is one_cycle",
        ),
    ],
)
def test_invalid_optimizer_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        replace(SMALL, **changes)
