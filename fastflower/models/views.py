"""The view of an image that pretrained weights expect: its size and normalization."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from torchvision.models import WeightsEnum  # pyright: ignore[reportMissingTypeStubs]

from fastflower.draws.augment import Augment
from fastflower.models.backbone import local_file
from fastflower.models.packaged import PACKAGED
from fastflower.models.timm_networks import PREFIX, library
from fastflower.models.torchvision_networks import NAMES, V1, weights_of
from fastflower.models.weights_file import best_in, load_file


class View(NamedTuple):
    """How pretrained weights want images: resized, center-cropped and normalized."""

    size: int | tuple[int, int]
    """Side of the center crop in pixels, or height and width."""
    resize: int | tuple[int, int] | Literal["off"]
    """Length of the shorter side before the crop in pixels, or height and width; "off" for no resize."""
    mean: tuple[float, float, float]
    """Subtracted from RGB values in [0, 1]."""
    std: tuple[float, float, float]
    """Divides the differences."""
    interpolation: str = "bilinear"
    """Of the resize: "bilinear" or "bicubic"."""


_MEAN, _STD = 127 / 255, 128 / 255  # (pixel - 127) / 128 [github.com/tensorflow/tpu, efficientnet/lite]
_PACKAGED = {"lite0": View(224, 256, (_MEAN, _MEAN, _MEAN), (_STD, _STD, _STD), "bicubic")}


def view_of_weights(name: str, weights: str | None) -> View | None:
    """Return the view that a backbone's pretrained weights expect, or None for random weights and unknown names.

    For a file that `train` wrote, that is the view of the training. For any other file, it is the view of torchvision's first
    weights (IMAGENET1K_V1) or of timm's weights for the backbone.

    Raises CheckpointError if a file cannot be read or downloaded.

    Example:
        >>> view_of_weights("resnet50", "IMAGENET1K_V2")
        View(size=224, resize=232, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation='bilinear')
    """
    if weights is None:
        return None
    if weights in PACKAGED:
        return _PACKAGED[weights]
    if (path := local_file(weights)) and (view := _of_file(path)):
        return view
    if name.startswith(PREFIX):
        return _of_timm(name)
    tag = "IMAGENET1K_V1" if path else weights.rpartition(".")[2]
    known: Mapping[str, WeightsEnum] = weights_of(V1.get(name, name) if path else name) if name in NAMES else {}
    entry = known.get(tag) or (next(iter(known.values()), None) if path else None)
    if entry is None:
        return None
    own = cast("dict[str, Any]", vars(entry.transforms()))
    (size,), (resize,) = own["crop_size"], own["resize_size"]
    return View(size, resize, tuple(own["mean"]), tuple(own["std"]), own["interpolation"].value)


def _of_timm(name: str) -> View | None:
    config = library(name).get_pretrained_cfg(name.removeprefix(PREFIX))
    if config is None:
        return None
    height, width = config.input_size[1:]
    size = height if height == width else (height, width)
    resize = int(min(height, width) / config.crop_pct)
    if config.crop_mode == "squash":  # both sides, whatever the image's aspect ratio
        resize = (int(height / config.crop_pct), int(width / config.crop_pct))
    return View(size, resize, config.mean, config.std, config.interpolation)


def _of_file(path: Path) -> View | None:
    """Return the view of the training that wrote a file, or None if it is of another program."""
    content = load_file(best_in(path), foreign=True)
    if content.get("format") != "fastflower":
        return None
    own = Augment(**content["recipe"]["augment"])
    return View(own.resolved_size, own.resized, *own.normalization)
