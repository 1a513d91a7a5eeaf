"""Evaluation of a trained network on a split."""

import logging
from math import isfinite
from pathlib import Path

import numpy as np
import torch

from fastflower import progress
from fastflower.devices import precision_of, resolve_device
from fastflower.errors import ArgumentError, CheckpointError, boolean, require
from fastflower.loading.loader import Loader
from fastflower.models.backbone import on_device
from fastflower.models.checkpoint import Checkpoint
from fastflower.models.inference import measure, non_finite_outputs, view_of
from fastflower.models.metrics import Scores
from fastflower.shards.manifest import Manifest
from fastflower.shards.mirror import Mirror
from fastflower.shards.remote import Remote, remote

_log = logging.getLogger("fastflower")

_BATCH_SIZE = 64  # does not change the scores


@progress.shown()
def evaluate(
    checkpoint: str | Path | Checkpoint,
    shards: str | Path | Remote,
    *,
    split: str = "val",
    fold: int | None = None,
    tta: bool | None = None,
    device: str | torch.device | None = None,
) -> Scores:
    """Evaluate a checkpoint on every sample of a split exactly once.

    Args:
        checkpoint: A checkpoint written by `train`.
        shards: The folder written by `pack`, or its URL, as for Loader.
        split: Any split of the shards, such as "val", "train" or "test".
        fold: With shards that were packed with folds: "val" is this fold, and "train" all others. None uses the fold that
            the checkpoint was validated on.
        tta: Test-time augmentation: average the probabilities of each image and its horizontal flip. None uses the recipe's tta.
        device: None uses CUDA if available, otherwise the CPU.

    Returns the scores, with labels, probabilities and paths in the order of the split. Raises CheckpointError if the
    checkpoint cannot be used, or if its classes differ from the classes of the shards. Logs a warning if the fold was among
    the training images.
    """
    require(isinstance(split, str), "split", "a name, for example val, train or test", split)  # pyright: ignore[reportUnnecessaryIsInstance]  (callers may be untyped)
    tta = None if tta is None else boolean("tta", tta)
    name = "checkpoint" if isinstance(checkpoint, Checkpoint) else str(checkpoint)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.load(checkpoint)
    chosen, recipe = resolve_device(device), checkpoint.recipe
    loader = Loader(
        shards,
        split,
        fold=_own_fold(checkpoint, shards, split) if fold is None else fold,
        batch_size=_BATCH_SIZE,
        augment=view_of(recipe),
        device=chosen,
        dtype=precision_of(recipe.precision, chosen),
        # On CUDA, `cache` also selects the backend, which must be the same as in training. On the CPU, a cache would not help,
        # because each image is used only once.
        cache="auto" if chosen.type == "cuda" else None,
        shuffle=False,
    )
    if loader.manifest.classes != checkpoint.classes:
        raise CheckpointError(
            f"{shards}: has the classes {', '.join(loader.manifest.classes)}, but the checkpoint was trained on "
            f"{', '.join(checkpoint.classes)}; pass shards with the checkpoint's classes."
        )
    _warn_of_training_images(name, checkpoint, loader)
    model = on_device(checkpoint.network(), chosen)
    with progress.bar(loader, desc="evaluate", unit="batch") as batches:
        tta = recipe.tta if tta is None else tta
        scores = measure(model, batches, checkpoint.classes, tta=tta, paths=loader.paths)
    if not isfinite(scores.loss):
        bad = np.flatnonzero(np.isnan(scores.probabilities[:, 0]))
        raise non_finite_outputs(name, scores.paths[int(bad[0])], len(bad))
    return scores


def _own_fold(checkpoint: Checkpoint, shards: str | Path | Remote, split: str) -> int | None:
    """Return the fold that the checkpoint was validated on, if any. Raises ArgumentError if these shards have other folds."""
    if checkpoint.fold is None or split not in ("train", "val"):
        return None
    source = remote(shards)
    manifest = Mirror.connect(source).manifest if source else Manifest.load(str(shards))
    if manifest.folds is None:
        return None
    if manifest.folds.sha256[:16] != checkpoint.feeding["folds"]:
        what = (
            f"because these shards have other folds than the checkpoint, which was trained with fold {checkpoint.fold}"
        )
        raise ArgumentError(f"fold must be from 0 to {manifest.folds.count - 1}, {what}; pass fold (--fold).")
    return checkpoint.fold


def _warn_of_training_images(name: str, checkpoint: Checkpoint, loader: Loader) -> None:
    """Warn if the loader yields a fold that the checkpoint was trained on."""
    trained, evaluated = checkpoint.feeding, loader.state_dict()
    same = {key for key in ("shards", "folds", "fold") if trained.get(key) == evaluated.get(key)}
    if (
        loader.fold is not None
        and loader.split == "val"
        and same & {"shards", "folds"}
        and not same >= {"folds", "fold"}
    ):
        how = "on all folds" if checkpoint.fold is None else f"with fold {checkpoint.fold}"
        what = "it saw images of this fold, so the scores say little about new images"
        _log.warning("%s: was trained %s, but is evaluated on fold %d: %s", name, how, loader.fold, what)
