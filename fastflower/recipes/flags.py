"""A recipe as flags of the command line: the nearest recipe by name, and what differs from it."""

from functools import cache
from typing import cast

from fastflower.recipes.presets import PRESETS
from fastflower.recipes.recipe import Recipe


def nearest(recipe: Recipe) -> str:
    """Return the name of the preset that differs from a recipe in the fewest fields; the first of several."""
    values = _fields(recipe).items()
    return min(PRESETS, key=lambda name: sum(value != _preset(name)[field] for field, value in values))


def changes(recipe: Recipe, preset: str) -> dict[str, object]:
    """Return the fields in which a recipe differs from a preset, by the name of their flag, such as "augment.size"."""
    base = _preset(preset)
    return {name: value for name, value in _fields(recipe).items() if value != base[name]}


def flags(recipe: Recipe, preset: str) -> list[str]:
    """Return the arguments of a command line that give a recipe, starting from --recipe PRESET."""
    found = [] if preset == "default" else ["--recipe", preset]
    for name, value in changes(recipe, preset).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            folder, dot, last = flag.rpartition(".")
            found.append(f"--{flag}" if value else f"--{folder}{dot}no-{last}")
        else:
            values = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
            found += [f"--{flag}", *map(str, values)]
    return found


@cache
def _preset(name: str) -> dict[str, object]:
    return _fields(PRESETS[name]())


def _fields(recipe: Recipe) -> dict[str, object]:
    values = recipe.to_dict()
    augment = values.pop("augment")
    return values | {f"augment.{name}": value for name, value in augment.items()}
