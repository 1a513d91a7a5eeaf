"""Recipes are frozen values that survive a dictionary and JSON, and refuse what cannot be trained."""

import json
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch

from fastflower.augment import Augment
from fastflower.backbone import build
from fastflower.errors import ArgumentError
from fastflower.recipe import PRESETS, Recipe

UNUSUAL = Recipe(
    backbone="densenet121",
    weights="weights/mine.pth",
    freeze=2,
    augment=Augment(
        size=(96, 128),
        resize=(100, 140),
        crop=(0.3, 0.7),
        crop_ratio=(0.9, 1.1),
        flip_vertical=0.25,
        rotate=15,
        affine_rotate=5,
        translate=(0.1, 0.2),
        scale=(0.8, 1.2),
        shear=(3.0, 4.0),
        hue=0.1,
        erase=0.5,
        erase_value=(0.1, 0.2, 0.3),
        fill="photo",
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.3, 0.4),
        fixed=True,
    ),
    epochs=3,
    batch_size=7,
    balanced=True,
    optimizer="adamw",
    clip_norm=1.5,
    accumulate=2,
    warmup_epochs=0.5,
    lr=0.3,
    momentum=0.0,
    weight_decay=0.01,
    schedule="cosine",
    step_epochs=2,
    gamma=0.5,
    label_smoothing=0.2,
    precision="float16",
    seed=11,
)
RECIPES = [pytest.param(preset(), id=name) for name, preset in PRESETS.items()]


@pytest.mark.parametrize("recipe", [*RECIPES, pytest.param(UNUSUAL, id="unusual")])
def test_a_recipe_survives_a_dictionary_and_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    through_json = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert through_json == recipe
    assert through_json.augment.draw(0, 0, [3], [[300, 400]]).size == recipe.augment.output_size
    assert hash(through_json) == hash(recipe)  # no list is left in it


def test_the_unusual_recipe_differs_from_the_default_in_every_field() -> None:
    same = [field.name for field in fields(Recipe) if getattr(UNUSUAL, field.name) == getattr(Recipe(), field.name)]
    assert same == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_presets_name_backbones_that_can_be_built(recipe: Recipe) -> None:
    with torch.device("meta"):
        network = build(recipe.backbone, 5, weights=None, freeze=recipe.freeze)
        logits = network.eval()(torch.empty(1, 3, *recipe.augment.output_size))
    assert logits.shape == (1, 5)


def test_presets_differ() -> None:
    assert len({preset() for preset in PRESETS.values()}) == len(PRESETS)


def test_a_recipe_cannot_be_changed_but_derived() -> None:
    recipe = Recipe()
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'epochs'"):
        recipe.epochs = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert replace(recipe, epochs=3) == Recipe(epochs=3)
    assert recipe.epochs == 15


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("freeze", -1, "0 or more"),
        ("epochs", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("lr", 0.0, "above 0"),
        ("lr", float("nan"), "above 0"),
        ("momentum", 1.0, "in [0, 1)"),
        ("momentum", -0.1, "in [0, 1)"),
        ("weight_decay", -1e-4, "0 or more"),
        ("schedule", "linear", "constant, step, cosine or one_cycle"),
        ("step_epochs", 0, "at least 1"),
        ("gamma", 0.0, "above 0"),
        ("label_smoothing", 1.0, "in [0, 1)"),
        ("label_smoothing", -0.1, "in [0, 1)"),
        ("precision", "float64", "bfloat16, float16 or float32"),
    ],
)
def test_a_field_outside_its_rule_is_refused(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ArgumentError, match="Recipe") as error:
        Recipe(**{field: value})
    assert str(error.value) == f"Recipe.{field} must be {rule}, got {value!r}."


def test_a_stored_augment_outside_its_rule_is_refused() -> None:
    values = Recipe().to_dict()
    values["augment"]["flip"] = 2
    with pytest.raises(ArgumentError, match=r"Augment\.flip must be a probability in \[0, 1\], got 2\."):
        Recipe.from_dict(values)
