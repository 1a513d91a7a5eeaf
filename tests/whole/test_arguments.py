"""Arguments of the public functions that have another type or are out of range: an error that names the argument and its rule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastflower import Checkpoint, Recipe, evaluate, train
from fastflower.errors import ArgumentError
from fastflower.reporting.preview import preview
from fastflower.shards.verification import verify
from fastflower.training.diagnosis import diagnose

SAVED = Checkpoint(recipe=Recipe(), classes=("a", "b"), model={"weight": torch.zeros(1)}, epoch=1)
RECIPE = "a Recipe, or the name of one, for example 'finetune'"
DEVICE = "cpu, cuda or cuda:NUMBER"


@pytest.mark.parametrize(
    ("call", "name", "value", "rule"),
    [
        (train, "recipe", {"epochs": 3}, "a Recipe, or the name of one, for example Recipe(epochs=3)"),
        (train, "recipe", {"epochs": "3"}, RECIPE),
        (train, "recipe", "zzz", RECIPE),
        (train, "save_steps", 1.5, "an integer, at least 1"),
        (train, "save_steps", True, "an integer, at least 1"),
        (train, "resume", "no", "True or False"),
        (train, "device", "", DEVICE),
        (diagnose, "recipe", {}, RECIPE),
        (diagnose, "seconds", "5", "a number above 0"),
        (diagnose, "seconds", float("inf"), "a number above 0"),
        (diagnose, "device", "gpu", DEVICE),
        (preview, "recipe", [], RECIPE),
        (preview, "images", 2.0, "an integer from 1 to 100"),
        (preview, "images", 101, "an integer from 1 to 100"),
        (preview, "draws", "6", "an integer from 1 to 100"),
        (verify, "repair", 1, "True or False"),
        (evaluate, "split", 3, "a name, for example val, train or test"),
        (evaluate, "tta", "no", "True or False"),
        (evaluate, "device", "gpu0", DEVICE),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule(
    call: Callable[..., Any], name: str, value: object, rule: str, tmp_path: Path
) -> None:
    first = (SAVED, tmp_path) if call is evaluate else (tmp_path,)
    with pytest.raises(ArgumentError) as error:
        call(*first, **{name: value})
    assert str(error.value).startswith(f"{name} must be {rule}, got {value!r}")


def test_a_checkpoint_is_a_path_or_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^checkpoint must be a path or a Checkpoint, got 3\.$"):
        evaluate(3, tmp_path)  # pyright: ignore[reportArgumentType]  (wrong on purpose)
