"""The backbones there are, with what one needs to choose one."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch

from fastflower.errors import ArgumentError
from fastflower.models.backbone import skeleton_of
from fastflower.models.sizes import native_side, sizes_of
from fastflower.models.stages import stages_of
from fastflower.models.timm_networks import PREFIX, library
from fastflower.models.torchvision_networks import NAMES, weights_of
from fastflower.models.views import view_of_weights


class Backbone(NamedTuple):
    """A network that `Recipe.backbone` can name."""

    name: str
    parameters: int
    """Number of parameters with a head for 1,000 classes."""
    stages: int
    """The most that `Recipe.freeze` can be."""
    sizes: str
    """Sizes of images that it takes."""
    native: int
    """Side in pixels of the images that its weights were trained on."""
    at_hand: bool
    """Whether its pretrained weights (DEFAULT) are on this machine."""


def backbones(pattern: str) -> Iterator[Backbone]:
    """List the backbones whose names match a pattern, with their stages and the image sizes that they take.

    Args:
        pattern: A name, perhaps with the wildcards * and ?, for example "resnet*" or "timm/convnext*". Without "timm/", it
            lists networks of torchvision. timm's are listed without tags.

    Yields one backbone after the other. Each takes up to a few seconds, because the sizes are tried out, without weights.
    Raises ArgumentError if no name matches.

    Example:
        >>> from fastflower.models.catalog import backbones
        >>> [each.name for each in backbones("resnet?8")]
        ['resnet18']
    """
    known = [f"{PREFIX}{name}" for name in library(pattern).list_models()] if pattern.startswith(PREFIX) else NAMES
    if not (names := [name for name in known if fnmatchcase(name, pattern)]):
        raise ArgumentError(
            f"pattern: no backbone is named {pattern!r}; pass for example 'resnet*' or '{PREFIX}convnext*'."
        )
    for name in names:
        network, view = skeleton_of(name), view_of_weights(name, "DEFAULT")
        count = sum(parameter.numel() for parameter in network.parameters())
        size = view.size if view else native_side(network)
        native = size if isinstance(size, int) else size[0]
        yield Backbone(name, count, len(stages_of(network)), str(sizes_of(name) or "?"), native, at_hand(name))


def at_hand(name: str) -> bool:
    """Return whether the pretrained weights of a backbone are in the cache of torch's or Hugging Face's hub."""
    if not name.startswith(PREFIX):
        weights = weights_of(name).get("DEFAULT")
        return weights is not None and _in_hub(weights.url)
    config = library(name).get_pretrained_cfg(name.removeprefix(PREFIX))
    if config is None or not config.has_weights:
        return False
    if config.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        cached = (try_to_load_from_cache(config.hf_hub_id, each) for each in ("model.safetensors", "pytorch_model.bin"))
        return any(isinstance(path, str) for path in cached)
    return bool(config.url) and _in_hub(config.url)


def _in_hub(url: str) -> bool:
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]).exists()
