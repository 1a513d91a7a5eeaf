"""A recipe as flags: the command line gives the same recipe back, from each preset."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from fastflower import Augment, Recipe
from fastflower.cli import _parse_recipe
from fastflower.recipes.flags import changes, flags, nearest
from fastflower.recipes.presets import PRESETS

OTHERS = {
    "plain": Recipe(),
    "much": Recipe(
        backbone="resnet34", weights="my weights.pt", sizes=(12, 13), patience=3, clip_norm=1e-5, ema=0.9, tta=True, graph=False,
        augment=Augment(size=(32, 48), resize=None, crop=None, erase_value=(-0.5, 1e-7, 0), fixed=True, fill="photo"),
    ),
    "less": replace(PRESETS["finetune"](), weights=None, freeze=0, sizes=(), recalibrate=False),
}  # fmt: skip


def parsed(arguments: list[str]) -> Recipe:
    return _parse_recipe("fastflower train", ["shards", *arguments], "training.trainer.train", out=Path | None)[
        "recipe"
    ]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("preset", ["default", "scratch", "finetune-long"])
def test_flags_give_the_recipe_from_any_preset(name: str, preset: str) -> None:
    assert parsed(flags(OTHERS[name], preset)) == OTHERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_own_nearest_and_needs_no_other_flag(name: str) -> None:
    recipe = PRESETS[name]()
    assert PRESETS[nearest(recipe)]() == recipe
    assert changes(recipe, name) == {}
    assert flags(recipe, name) == ([] if name == "default" else ["--recipe", name])


def test_the_nearest_preset_differs_in_the_fewest_fields() -> None:
    recipe = replace(PRESETS["scratch"](), epochs=3)
    assert nearest(recipe) == "scratch"
    assert changes(recipe, "scratch") == {"epochs": 3}
    assert flags(recipe, "scratch") == ["--recipe", "scratch", "--epochs", "3"]
    names = {entry.name for entry in fields(Recipe)}
    assert {name.partition(".")[0] for name in changes(OTHERS["much"], "finetune-long")} <= names
