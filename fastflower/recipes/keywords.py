"""Fields of a recipe that were passed to `train` as keywords: the call that has them in a recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from fastflower.draws.augment import Augment
from fastflower.errors import ArgumentError
from fastflower.recipes.presets import checked
from fastflower.recipes.recipe import Recipe
from fastflower.suggestions import flag_meant

_OPTIONS = ("fold", "out", "resume", "save_steps", "device")
_FIELDS = [item.name for item in fields(Recipe) if item.name != "augment"]
_DRAWS = [f"augment.{item.name}" for item in fields(Augment)]
_UNITS = ("steps", "ratio", "pct", "mode", "epoch", "freq")  # of values that would mean something else here


def call_meant(args: Sequence[object], given: Mapping[str, object]) -> str:
    """Return what to type in place of a call of `train` with keywords that are fields of a recipe, also by other names.

    Returns "" if none is, or if a value does not fit.
    """
    values: dict[str, object] = dict(zip(("shards", "recipe"), args, strict=False))
    changed, drawn = dict[str, object](), dict[str, object]()
    for word, value in given.items():
        name, value = (word, value) if word in ("shards", "recipe", *_OPTIONS) else _meant(word, value)
        home = drawn if name in _DRAWS else changed if name in _FIELDS else values
        home[name.removeprefix("augment.")] = value
    place, base = values.pop("shards", "data"), values.pop("recipe", None)
    values.pop("", None)  # what is not clear
    try:
        recipe = checked(base)
        recipe = replace(recipe, augment=replace(recipe.augment, **drawn), **changed)
    except ArgumentError:
        return ""
    if not (changed or drawn):
        return ""
    *lines, made = _named(base, recipe, changed, drawn) if isinstance(base, str) else _written(recipe)
    plain = {name: value if isinstance(value, int | None) else str(value) for name, value in values.items()}
    shards = repr(str(place)) if isinstance(place, str | Path) else "shards"
    call = ", ".join([shards, made, *(f"{name}={value!r}" for name, value in plain.items())])
    return "\n  ".join(["\nType:", *lines, f"train({call})"])


def _meant(word: str, value: object) -> tuple[str, object]:
    """Return the field or argument that a keyword means, and its value; "" if it is not clear."""
    known = [f"--{name.replace('_', '-')}" for name in (*_FIELDS, *_DRAWS, *_OPTIONS)]
    flag, *implied = flag_meant("train", word, known) or [""]
    name, unit = flag.lstrip("-").replace("-", "_"), word.rpartition("_")[2]
    other = name == "resume" or (implied and value is False) or (unit in _UNITS and unit not in name)
    return "" if other else name, implied[0] if implied else value


def _written(recipe: Recipe) -> list[str]:
    names = "Augment, Recipe, train" if "Augment(" in repr(recipe) else "Recipe, train"
    return [f"from fastflower import {names}", repr(recipe)]


def _named(name: str, recipe: Recipe, changed: Mapping[str, object], drawn: Mapping[str, object]) -> list[str]:
    parts = [f"{field}={getattr(recipe, field)!r}" for field in changed]
    draws = ", ".join(f"{field}={getattr(recipe.augment, field)!r}" for field in drawn)
    parts += [f"augment=replace(recipe.augment, {draws})"] if drawn else []
    imports = ["from dataclasses import replace", "from fastflower import train"]
    imports += ["from fastflower.recipes.presets import PRESETS"]
    return [*imports, f"recipe = PRESETS[{name!r}]()", f"replace(recipe, {', '.join(parts)})"]
