"""Checks of arguments: numpy's numbers are plain numbers, anything else is an error that states the rule."""

from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastflower import Augment, Loader, Predictor, Recipe, evaluate, predict
from fastflower.errors import ArgumentError, boolean, integer, number, quoted


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_an_integer_becomes_plain(value: object) -> None:
    assert type(integer("seed", value, 0)) is int
    assert integer("seed", value, 0) == 3


@pytest.mark.parametrize("value", [None, 2.0, True, np.bool_(True), "3", inf, -1])
def test_anything_else_is_no_integer(value: object) -> None:
    with pytest.raises(ArgumentError, match="seed must be an integer, at least 0, got "):
        integer("seed", value, 0)


def test_an_integer_has_at_most_64_bits() -> None:
    with pytest.raises(
        ArgumentError, match=r"seed must be an integer, at least 0 and within 64 bits, got 18446744073709551616"
    ):
        integer("seed", 2**64, 0)


def test_the_rule_names_both_limits() -> None:
    with pytest.raises(ArgumentError, match="quality must be an integer from 1 to 95, got 96"):
        integer("quality", 96, 1, at_most=95)


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), np.int64(1)])
def test_a_number_becomes_plain(value: object) -> None:
    assert type(number("lr", value, "above 0", lambda lr: lr > 0)) is float


@pytest.mark.parametrize("value", [None, True, "1", inf, nan, -inf, 0, -1, 10**400])
def test_anything_else_is_no_number(value: object) -> None:
    with pytest.raises(ArgumentError, match="lr must be above 0, got "):
        number("lr", value, "above 0", lambda lr: lr > 0)


def test_booleans() -> None:
    assert boolean("tta", np.bool_(True)) is True
    assert boolean("tta", False) is False
    for value in (None, 1, 0, "yes"):
        with pytest.raises(ArgumentError, match="tta must be True or False, got "):
            boolean("tta", value)


def test_a_long_value_is_cut_in_a_message(shards: Path) -> None:
    uses: tuple[Callable[[Any], object], ...] = (
        lambda value: Predictor(value, device="cpu"),
        lambda value: Recipe(value),  # pyright: ignore[reportCallIssue]  (what a user may try)
        lambda value: predict(value, "a.jpg"),
        lambda value: evaluate(value, "shards"),
        lambda value: Recipe(backbone=value),
        lambda value: Augment(size=value),
        lambda value: Loader(shards, device=value),
        lambda value: Loader(shards, augment=value),
        lambda value: Loader(shards, device="cpu", backend=value),
    )
    for use in uses:
        with pytest.raises(ArgumentError, match=r", got bytes \(400000 bytes\)") as told:
            use(bytes(400_000))
        assert len(str(told.value)) < 400
        with pytest.raises(ArgumentError, match=r", got \[0, 0, .* \.\.\. .*, 0\]") as told:
            use([0] * 1000)
        assert len(str(told.value)) < 400
    assert quoted("a" * 78) == repr("a" * 78)
    assert quoted("x" * 60 + "y" * 60) == f"'{'x' * 39} ... {'y' * 39}'"
