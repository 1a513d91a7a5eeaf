"""Which image sizes a network takes, tried out on the meta device without computing anything."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from fastflower.errors import ArgumentError
from fastflower.models.backbone import require_network, skeleton_of
from fastflower.models.timm_networks import is_timm, native_size
from fastflower.recipes.recipe import Recipe


@dataclass(frozen=True)
class Sizes:
    """The sides of square images that a network takes, in pixels: multiples of `step` from `least` to `most`."""

    least: int
    most: int | None = None
    """None: no limit."""
    step: int = 1

    def __str__(self) -> str:
        """Describe the sizes for a message."""
        if self.least == self.most:
            return f"{self.least} pixels"
        return f"a multiple of {self.step} pixels" if self.step > 1 else f"at least {self.least} pixels"

    def nearest(self, side: int) -> int:
        """Return a size that works and is close to `side`."""
        near = max(self.least, round(side / self.step) * self.step)
        return near if self.most is None else min(near, self.most)


@cache
def sizes_of(name: str, size: tuple[int, int] | None = None) -> Sizes | None:
    """Return the sizes that a backbone takes, or None if that cannot be found out.

    size  As for `build`.

    Example:
        >>> print(sizes_of("resnet50"), sizes_of("vit_b_16"), sep="; ")
        at least 1 pixels; 224 pixels
    """
    network = skeleton_of(name, size=size).eval()
    side = native_side(network)
    if not takes(network, (side, side)):
        return None
    if takes(network, (side + 1, side + 1)):
        low, high = (0, 1) if takes(network, (1, 1)) else (1, side)  # low does not work, high does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if takes(network, (middle, middle)) else (middle, high)
        return Sizes(high)
    for step in (step for step in range(2, side + 1) if side % step == 0):
        if takes(network, (side + step, side + step)):
            return Sizes(step, step=step)
    return Sizes(side, side)


def native_side(network: nn.Module) -> int:
    """Return the side of the images that a network is made for, 224 if it says nothing."""
    return native_size(network) if is_timm(network) else int(getattr(network, "image_size", 224))


def takes(network: nn.Module, size: tuple[int, int]) -> bool:
    """Return whether a network on the meta device takes images of a size."""
    try:
        with torch.inference_mode():
            network(torch.empty(2, 3, *size, device="meta"))
    except Exception:  # each network has its own
        return False
    return True


@cache
def takes_size(name: str, built_for: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return whether a backbone that is built for images of one size takes those of another."""
    return takes(skeleton_of(name, size=built_for).eval(), size)


def require_sizes(recipe: Recipe) -> None:
    """Raise ArgumentError if the recipe's backbone is unknown or does not take the recipe's image sizes."""
    require_network(recipe.backbone)
    built_for = recipe.augment.output_size
    wanted = {built_for: "augment.size"} | {
        size: "sizes" for epoch in range(recipe.epochs) if (size := recipe.augment_at(epoch).output_size) != built_for
    }
    name = recipe.backbone
    for size, field in wanted.items():
        known = None if takes_size(name, built_for, size) else sizes_of(name, built_for) or sizes_of(name)
        if known:
            got, near = size[0] if size[0] == size[1] else size, known.nearest(size[0])
            raise ArgumentError(
                f"{field} must be {known} with backbone {name}, got {got}; pass for example --{field} {near}."
            )
