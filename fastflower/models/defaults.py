"""What a recipe leaves out: the view of images, frozen stages and sizes, from its weights and backbone; its network."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from torch import nn

from fastflower import distributed
from fastflower.draws.augment import Augment
from fastflower.errors import FastflowerError
from fastflower.models.backbone import build, require_network, skeleton_of
from fastflower.models.sizes import sizes_of, takes_size
from fastflower.models.stages import stages_of
from fastflower.models.views import view_of_weights
from fastflower.recipes.flags import nearest
from fastflower.recipes.presets import PRESETS
from fastflower.recipes.recipe import Recipe

_log = logging.getLogger("fastflower")

_VIEW = ("size", "resize", "mean", "std")


def complete(recipe: Recipe, *, quiet: bool = False) -> Recipe:
    """Return a recipe with nothing left out, and log what was filled in. A complete recipe is returned as it is.

    quiet  Whether to log nothing.

    The augment's size, resize, mean and std are those that the pretrained weights expect, or a Loader's defaults with random
    weights. `freeze` is half of the stages, and `sizes` are pixels.

    Raises ArgumentError if the backbone is unknown, and CheckpointError if the weights are.
    """
    left_out = [name for name in _VIEW if getattr(recipe.augment, name) is None]
    require_network(recipe.backbone, recipe.weights if left_out else None)
    filled = replace(recipe, augment=_seen(recipe, left_out))
    filled = replace(filled, freeze=_frozen(filled), sizes=_sides(filled))
    told = "; ".join(_told(recipe, filled))
    if told and not quiet and distributed.rank() == 0:
        _log.info("%s: %s", recipe.backbone, told)
    return filled


def network_of(recipe: Recipe, classes: Sequence[str], *, resumed: bool = False, quiet: bool = False) -> nn.Module:
    """Build the network that a complete recipe trains.

    resumed  Whether its weights come from a checkpoint. But each run of a model soup starts from the recipe's weights.
    quiet  Whether to log nothing.
    """
    weights = None if resumed and recipe.soup == 1 else recipe.weights
    make = partial(build, recipe.backbone, len(classes), classes=classes, size=recipe.augment.output_size, quiet=quiet)
    return make(weights=weights, freeze=recipe.freeze or 0, drop_path=recipe.drop_path)


def brief(recipe: Recipe) -> Recipe:
    """Return a recipe as its nearest preset leaves it out, if `complete` fills in the same. For messages and run.json."""
    preset = PRESETS[nearest(recipe)]()
    with suppress(FastflowerError):  # the weights may be gone
        full = complete(recipe, quiet=True)
        for name in (*_VIEW, "freeze", "sizes"):
            if name in _VIEW:
                short = replace(recipe, augment=replace(recipe.augment, **{name: getattr(preset.augment, name)}))
            else:
                short = replace(recipe, **{name: getattr(preset, name)})
            recipe = short if complete(short, quiet=True) == full else recipe
    return recipe


def seen_as(recipe: Recipe, other: Recipe) -> Recipe:
    """Return a recipe with the view of another one, where it is left out."""
    seen = other.augment.resolved
    own = {name: getattr(seen, name) for name in _VIEW if getattr(recipe.augment, name) is None}
    return replace(recipe, augment=replace(recipe.augment, **own))


def _seen(recipe: Recipe, left_out: list[str]) -> Augment:
    """Return the augment with the view that the weights expect, where it is left out."""
    augment = recipe.augment
    view = view_of_weights(recipe.backbone, recipe.weights) if left_out else None
    if view is None:
        return augment.resolved
    own = {name: getattr(view, name) for name in left_out}
    if augment.size:  # the weights' resize is for another one
        own["resize"] = augment.resized
    return replace(augment, **own)


def _frozen(recipe: Recipe) -> int:
    """Return the number of stages to freeze: if it is left out, half of them, but none of a network with random weights."""
    if recipe.freeze is not None or recipe.weights is None:
        return recipe.freeze or 0
    return len(stages_of(skeleton_of(recipe.backbone))) // 2


def _sides(recipe: Recipe) -> tuple[int, ...]:
    """Return `sizes` in pixels: fractions as multiples of 16 that the backbone takes, or none if it takes only one size."""
    built_for = recipe.augment.output_size
    sides = [_side(size, built_for[0]) for size in recipe.sizes]
    wanted = {side: replace(recipe, sizes=(side,)).augment_at(0).output_size for side in sides}
    fractions = any(size <= 1 for size in recipe.sizes)
    if fractions and not all(takes_size(recipe.backbone, built_for, size) for size in wanted.values()):
        known = sizes_of(recipe.backbone, built_for)
        sides = [known.nearest(side) if known else built_for[0] for side in sides]
    return () if fractions and set(sides) == {built_for[0]} else tuple(sides)


def _side(size: float, height: int) -> int:
    if size > 1:
        return int(size)
    return height if size == 1 else min(height, max(16, 16 * round(size * height / 16)))


def _told(recipe: Recipe, filled: Recipe) -> Iterator[str]:
    """Yield what was filled in, for the log."""
    augment, seen = recipe.augment, filled.augment
    if filled.weights and seen != augment:
        normal = "ImageNet's mean and std"
        if seen.normalization != Augment().normalization:
            mean, std = ([round(value, 4) for value in values] for values in seen.normalization)
            normal = f"mean {mean} and std {std}"
        size = f"images of {_text(seen.size)} pixels after a resize to {_text(seen.resize)}, "
        yield f"{'' if augment.size else size}{normal}, as its weights expect"
    if recipe.freeze != filled.freeze:
        yield f"the first {filled.freeze} stages are frozen"
    if recipe.sizes != filled.sizes:
        yield f"training sizes {', '.join(map(str, filled.sizes)) or _text(seen.size)}"


def _text(size: int | tuple[int, ...] | str | None) -> str:
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)
