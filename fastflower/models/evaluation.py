"""Evaluation of a trained network on a split."""

from math import isfinite
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastflower.devices import precision_of, resolve_device
from fastflower.errors import CheckpointError
from fastflower.loading.loader import Loader
from fastflower.models.backbone import on_device
from fastflower.models.checkpoint import Checkpoint
from fastflower.models.inference import measure, non_finite_outputs, view_of
from fastflower.models.metrics import Scores
from fastflower.shards.remote import Remote

_BATCH_SIZE = 64  # does not change the scores


def evaluate(
    checkpoint: str | Path | Checkpoint,
    shards: str | Path | Remote,
    *,
    split: str = "val",
    tta: bool | None = None,
    device: str | torch.device | None = None,
) -> Scores:
    """Evaluate a checkpoint on every sample of a split exactly once.

    Args:
        checkpoint: A checkpoint written by `train`.
        shards: The folder written by `pack`, or its URL, as for Loader.
        split: "train" or "val".
        tta: Test-time augmentation: average the probabilities of each image and its horizontal flip. None uses the recipe's tta.
        device: None uses CUDA if available, otherwise the CPU.

    Returns the scores, with labels, probabilities and paths in the order of the split. Raises CheckpointError if the
    checkpoint cannot be used, or if its classes differ from the classes of the shards.
    """
    name = "checkpoint" if isinstance(checkpoint, Checkpoint) else str(checkpoint)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.load(checkpoint)
    chosen, recipe = resolve_device(device), checkpoint.recipe
    loader = Loader(
        shards,
        split,
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
    model = on_device(checkpoint.network(), chosen)
    with tqdm(loader, desc="evaluate", unit="batch", disable=None) as batches:
        tta = recipe.tta if tta is None else tta
        scores = measure(model, batches, checkpoint.classes, tta=tta, paths=loader.paths)
    if not isfinite(scores.loss):
        bad = np.flatnonzero(np.isnan(scores.probabilities[:, 0]))
        raise non_finite_outputs(name, scores.paths[int(bad[0])], len(bad))
    return scores
