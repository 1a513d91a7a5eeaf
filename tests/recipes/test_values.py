"""Values of every type in every field of Recipe and Augment: an error that names the field, or a value that survives JSON."""

import json
from dataclasses import fields
from decimal import Decimal
from math import inf, nan
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform
from torch import nn
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from fastflower import Augment, Recipe
from fastflower.errors import ArgumentError

# fmt: off
NASTY = [
    None, True, False, np.True_, 0, 1, -1, 2, 3.0, 0.5, -0.5, inf, -inf, nan, 2**31, 2**63 - 1, 2**63, 2**64, -(2**64), 10**400,
    "", "1", "0.1", "None", "resnet18", "sgd", "black", b"1", 1j, Decimal(1), object(), [], {}, set(), (1,), (1, 2), [0.5, 1],
    (1, 2, 3), (nan, 1), (0.5, inf, 1), ("1", "2"), (True, False), (None, None), ((1, 2), (3, 4)), np.int64(3), np.uint8(3),
    np.float32(0.5), np.float64(nan), np.str_("sgd"), np.array(3), np.array([1, 2]), (np.float32(0.5), np.int64(1)),
    torch.tensor(1), torch.tensor([1, 2]), range(2), Path("weights.pth"), Augment(), Recipe, {"size": 64}, v2.Identity(),
]
# fmt: on
FIELDS = [
    pytest.param(kind, item.name, id=f"{kind.__name__}.{item.name}")
    for kind in (Recipe, Augment)
    for item in fields(kind)
]
values = (
    st.sampled_from(NASTY)
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.floats() | st.integers(), max_size=4)
)


def has_type(value: object, kind: Any) -> bool:
    """Return whether a value has exactly the annotated type: no subclass, no integer for a float."""
    if get_origin(kind) in (UnionType, Union):
        return any(has_type(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        items = value if isinstance(value, tuple) else (object,)
        kinds = kinds[:1] * len(items) if kinds[-1] is ... else kinds
        return len(items) == len(kinds) and all(map(has_type, items, kinds))
    return value in get_args(kind) if get_args(kind) else type(value) is kind


def check(kind: type[Recipe] | type[Augment], name: str, value: Any) -> None:
    try:
        made = kind(**{name: value})
    except ArgumentError as error:
        assert str(error).startswith((f"{kind.__name__}.{name} must be ", "Recipe.augment: "))  # noqa: PT017  (an error is one of two outcomes)
        return
    recipe = made if isinstance(made, Recipe) else Recipe(augment=made)
    (item,) = (item for item in fields(kind) if item.name == name)
    assert has_type(getattr(made, name), item.type)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict(), allow_nan=False))) == recipe


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_each_nasty_value_is_refused_by_name_or_becomes_plain(kind: type[Recipe] | type[Augment], name: str) -> None:
    for value in NASTY:
        check(kind, name, value)


@given(st.sampled_from([param.values for param in FIELDS]), values)
@settings(max_examples=300, deadline=None)
def test_any_value_is_refused_by_name_or_becomes_plain(field: Any, value: Any) -> None:
    kind, name = field
    check(kind, name, value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", True, "an integer, at least 1, got True"),
        ("epochs", 3.0, "an integer, at least 1, got 3.0"),
        ("epochs", "3", "an integer, at least 1, got '3'"),
        ("batch_size", 2.0, "an integer, at least 1, got 2.0"),
        ("batch_size", -1, "an integer, at least 1, got -1"),
        ("lr", "1e-3", "a number above 0, got '1e-3'"),
        ("lr", inf, "a number above 0, got inf"),
        ("seed", 2**64, "an integer and within 64 bits, got 18446744073709551616"),
        ("seed", None, "an integer, got None"),
        ("tta", "no", "True or False, got 'no'"),
        ("tta", 1, "True or False, got 1"),
        ("backbone", None, "a string, got None"),
        ("weights", True, "a string or None, got True"),
        ("augment", {"size": 64}, "an Augment, or a torchvision transform, got {'size': 64}"),
        ("sizes", 128, "sizes in pixels, or fractions of the size above 0 and up to 1, got 128"),
    ],
)
def test_what_a_recipe_refuses(field: str, value: Any, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Recipe(**{field: value})
    assert str(error.value) == f"Recipe.{field} must be {message}."


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rotate", nan, "a number, 0 or more, got nan"),
        ("rotate", (10, 20), "a number, 0 or more, got (10, 20)"),
        ("size", (224,), "one or two integers, each at least 1, got (224,)"),
        ("size", 224.0, "one or two integers, each at least 1, got 224.0"),
        ("flip", True, "a probability in [0, 1], got True"),
        ("crop", 0.5, "(min, max) with 0 < min <= max <= 1, got 0.5"),
        ("mean", 0.5, "three numbers (red, green, blue), got 0.5"),
        ("fill", 0, "one of black, photo, got 0"),
        ("fixed", None, "True or False, got None"),
    ],
)
def test_what_an_augment_refuses(field: str, value: Any, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Augment(**{field: value})
    assert str(error.value) == f"Augment.{field} must be {message}."


@pytest.mark.parametrize(
    "transform",
    [
        v2.Compose([v2.RandomResizedCrop(96), v2.RandomHorizontalFlip(0.25)]),
        nn.Sequential(v2.RandomResizedCrop(96), v2.RandomHorizontalFlip(0.25)),
        v2.RandomResizedCrop(96),
        ResNet18_Weights.DEFAULT.transforms(),
        create_transform(64, is_training=True, auto_augment=None),
        RandomResizedCropAndInterpolation(64, interpolation="bilinear"),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_a_transform_is_converted(transform: Any) -> None:
    assert Recipe(augment=transform).augment == Augment.from_torchvision(transform)


@pytest.mark.parametrize("made_by", [ResNet18_Weights.DEFAULT, ResNet18_Weights.DEFAULT.transforms])
def test_what_only_makes_a_transform_is_answered(made_by: Any) -> None:
    with pytest.raises(
        ArgumentError, match=r"^Recipe\.augment: .* such as weights\.transforms\(\), with parentheses\.$"
    ):
        Recipe(augment=made_by)


def test_integers_where_floats_stand_in_an_old_checkpoint_still_load() -> None:
    old = Recipe().to_dict()
    augment = old["augment"] | {"rotate": 10, "scale": [1, 1], "mean": [0, 0, 0]}
    recipe = Recipe.from_dict({**old, "lr": 1, "warmup_epochs": 2, "clip_norm": 5, "augment": augment})
    assert (recipe.lr, recipe.warmup_epochs, recipe.clip_norm, recipe.augment.rotate) == (1, 2, 5, 10)
    assert recipe.resolved == Recipe.from_dict(recipe.to_dict()).resolved


@pytest.mark.parametrize("kind", [list, tuple, np.array, np.float32, torch.tensor])
def test_three_numbers_are_three_numbers_in_any_container(kind: Any) -> None:
    """Those of single precision are the decimals that were written."""
    mean = (0.485, 0.456, 0.406)
    assert Augment(mean=kind(mean), size=np.array([64, 96])) == Augment(mean=mean, size=(64, 96))  # pyright: ignore[reportArgumentType]  (what a user may pass)
    assert Augment(mean=[kind([value])[0] for value in mean]) == Augment(mean=mean)  # pyright: ignore[reportArgumentType]  (as above)
    for wrong in (
        kind(mean[:2]),
        kind([mean] * 3),
        np.array([[1, 2, 3]]),
        np.array(["a"] * 3),
        np.array([0.4, nan, 0.4]),
    ):
        with pytest.raises(ArgumentError, match=r"^Augment\.mean must be .*, got "):
            Augment(mean=wrong)  # pyright: ignore[reportArgumentType]  (as above)
