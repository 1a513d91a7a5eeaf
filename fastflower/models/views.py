"""The view of an image that pretrained weights expect: its size and normalization."""

from typing import Any, NamedTuple, cast

from fastflower.models.timm_networks import PREFIX, library
from fastflower.models.torchvision_networks import NAMES, weights_of


class View(NamedTuple):
    """How pretrained weights want images: resized, center-cropped and normalized."""

    size: int
    """Side of the center crop in pixels."""
    resize: int
    """Length of the shorter side before the crop in pixels."""
    mean: tuple[float, float, float]
    """Subtracted from RGB values in [0, 1]."""
    std: tuple[float, float, float]
    """Divides the differences."""
    interpolation: str
    """Of the resize: "bilinear" or "bicubic"."""


def view_of_weights(name: str, weights: str | None) -> View | None:
    """Return the view that a backbone's pretrained weights expect, or None for random weights, files and unknown names.

    Example:
        >>> view_of_weights("resnet50", "IMAGENET1K_V2")
        View(size=224, resize=232, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation='bilinear')
    """
    if name.startswith(PREFIX):
        return _of_timm(name) if weights == "DEFAULT" else None
    entry = weights_of(name).get((weights or "").rpartition(".")[2]) if name in NAMES else None
    if entry is None:
        return None
    own = cast("dict[str, Any]", vars(entry.transforms()))
    (size,), (resize,) = own["crop_size"], own["resize_size"]
    return View(size, resize, tuple(own["mean"]), tuple(own["std"]), own["interpolation"].value)


def _of_timm(name: str) -> View | None:
    config = library(name).get_pretrained_cfg(name.removeprefix(PREFIX))
    if config is None or not config.has_weights:
        return None
    size = config.input_size[1]
    return View(size, int(size / config.crop_pct), tuple(config.mean), tuple(config.std), config.interpolation)
