"""Helpers for tests of interrupted and distributed training: a tiny run, ways to interrupt it, comparing two runs."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import ResNet

from fastflower import Augment, Checkpoint, Recipe, train
from fastflower.reporting import figures, report

DIE = Path(__file__).with_name("train_and_die.py")
LAST, BEST = "checkpoint-last.pt", "checkpoint-best.pt"
RECIPE = Recipe(
    weights=None,
    augment=Augment(size=32, resize=36, crop=(0.5, 1.0), flip=0.5),
    epochs=2,
    batch_size=24,
    lr=0.01,
    schedule="one_cycle",
    precision="float32",
)
"""Two epochs of five steps on the 120 drawn images."""

CLOCK = {"images_per_second", "train_seconds", "wait_seconds", "val_seconds"}


def flags(recipe: Recipe) -> list[str]:
    """Return the command-line flags for a recipe."""
    return [*_flags(recipe, Recipe(), "--"), *_flags(recipe.augment, Recipe().augment, "--augment.")]


def _flags(value: Any, default: Any, prefix: str) -> list[str]:
    found: list[str] = []
    for entry in fields(value):
        wanted = getattr(value, entry.name)
        if wanted != getattr(default, entry.name) and entry.name != "augment":
            found.append(prefix + entry.name.replace("_", "-"))
            found += map(str, wanted if isinstance(wanted, tuple) else [wanted])
    return found


def timeless(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the rows without the columns that depend on time."""
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in history]


def written_history(folder: Path) -> list[dict[str, float]]:
    with (folder / "history.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def assert_same_run(one: Path, other: Path) -> None:
    """Check that both finished with the same history and, bit for bit, the same weights and optimizer state."""
    for name in (LAST, BEST):
        left, right = Checkpoint.load(one / name), Checkpoint.load(other / name)
        assert timeless(left.history) == timeless(right.history)
        assert (left.epoch, left.tally) == (right.epoch, {})
        for part in ("model", "trained", "optimizer", "scaler"):
            assert_same(getattr(left, part), getattr(right, part))
    assert timeless(written_history(one)) == timeless(written_history(other))
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}


def assert_same(one: Any, other: Any) -> None:
    """Check that values are equal and tensors are bitwise equal."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def place(out: Path) -> tuple[int, int]:
    """Return (finished epochs, steps of the next one) from the last checkpoint."""
    last = Checkpoint.load(out / LAST)
    return last.epoch, last.step


def narrow_resnets(patch: pytest.MonkeyPatch) -> None:
    """Give ResNets a quarter of the channels: the same layers, steps in a fifteenth of the time.

    Not fewer than 16, the floats of an AVX-512 register: with 8, torch 2.14's convolutions wrote beyond their memory.
    """
    make, layer = ResNet.__init__, ResNet._make_layer

    def narrow_layer(self: ResNet, block: Any, planes: int, *arguments: Any, **options: Any) -> Any:
        if planes == 64:  # the first stage follows the stem
            self.inplanes = 16
            self.conv1 = nn.Conv2d(3, 16, kernel_size=7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
        return layer(self, block, planes // 4, *arguments, **options)

    def narrow_make(self: ResNet, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        self.fc = nn.Linear(self.fc.in_features // 4, self.fc.out_features)

    patch.setattr(ResNet, "_make_layer", narrow_layer)
    patch.setattr(ResNet, "__init__", narrow_make)


def no_drawing(patch: pytest.MonkeyPatch) -> None:
    """Write empty figures and thumbnails."""
    patch.setattr(figures, "png", lambda _: b"")
    for name in ("curves", "confusion"):
        patch.setattr(report, name, lambda _: b"")
    patch.setattr(report, "thumbnail", lambda _: "")


def small(_backbone: str, num_classes: int, **_: Any) -> nn.Module:
    """Build a tiny network with every kind of state that an interruption could lose, including dropout."""
    model = nn.Sequential()
    layers = (nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(4))
    model.add_module("features", nn.Sequential(*layers))
    model.add_module("classifier", nn.Sequential(nn.Flatten(), nn.Linear(256, num_classes)))
    return model


class KilledError(Exception):
    """Simulates a kill."""


def kill() -> None:
    raise KilledError("killed")


def before_call(place: Any, name: str, number: int, act: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Call `act` before call number `number`, counted from 1, of the function `name`."""
    function, calls = getattr(place, name), count(1)

    def acting(*values: Any, **options: Any) -> Any:
        if next(calls) == number:
            act()
        return function(*values, **options)

    patch.setattr(place, name, acting)


def killed(shards: Path, recipe: Recipe, out: Path, moment: tuple[Any, str, int], **options: Any) -> None:
    """Train or resume until a given call of a function, then simulate a kill."""
    with pytest.MonkeyPatch.context() as patch:
        before_call(*moment, kill, patch)
        with pytest.raises(KilledError, match="killed"):
            train(shards, recipe, out=out, resume=True, device="cpu", **options)


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def arguments(recipe: Recipe, shards: Path, out: Path) -> list[str]:
    """Return the command line of a run that saves a checkpoint every second step, or resumes."""
    options = ["--resume", "--save-steps", "2", "--device", "cpu"]
    return ["train", str(shards), "--out", str(out), *options, *flags(recipe)]


def child(*moment: str, recipe: Recipe, shards: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Run `fastflower train` in a process of its own; `moment` is as in train_and_die.py."""
    command = [sys.executable, DIE, *moment, *arguments(recipe, shards, out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # The timeout only ends a hang; a child takes seconds.
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
