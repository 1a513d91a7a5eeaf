"""Train an image classifier from a folder of images without making the accelerator wait for data.

Importing this package is cheap: each name below is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastflower.draws.augment import Augment as Augment
    from fastflower.errors import FastflowerError as FastflowerError
    from fastflower.exporting.export import export as export
    from fastflower.loading.batch import Batch as Batch
    from fastflower.loading.loader import Loader as Loader
    from fastflower.models.checkpoint import Checkpoint as Checkpoint
    from fastflower.models.evaluation import evaluate as evaluate
    from fastflower.models.prediction import predict as predict
    from fastflower.models.predictor import Predictor as Predictor
    from fastflower.packing.packer import pack as pack
    from fastflower.recipes.recipe import Recipe as Recipe
    from fastflower.reporting.report import Report as Report
    from fastflower.shards.manifest import Manifest as Manifest
    from fastflower.training.trainer import train as train

_HOME = {
    "Augment": "draws.augment",
    "Batch": "loading.batch",
    "Checkpoint": "models.checkpoint",
    "FastflowerError": "errors",
    "Loader": "loading.loader",
    "Manifest": "shards.manifest",
    "Predictor": "models.predictor",
    "Recipe": "recipes.recipe",
    "Report": "reporting.report",
    "evaluate": "models.evaluation",
    "export": "exporting.export",
    "pack": "packing.packer",
    "predict": "models.prediction",
    "train": "training.trainer",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fastflower' has no attribute {name!r}")
    return getattr(import_module(f"fastflower.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
