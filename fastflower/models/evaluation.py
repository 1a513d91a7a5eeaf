"""Scores of a trained network on a split."""

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
from fastflower.models.inference import measure, no_class, view_of
from fastflower.models.metrics import Scores
from fastflower.shards.remote import Remote

_BATCH_SIZE = 64  # of a pass without gradients: does not change the scores


def evaluate(
    checkpoint: str | Path | Checkpoint,
    shards: str | Path | Remote,
    *,
    split: str = "val",
    tta: bool | None = None,
    device: str | torch.device | None = None,
) -> Scores:
    """Score a checkpoint on every sample of a split, exactly once; by index in the split, as `Scores` promises.

    Args:
        checkpoint: A checkpoint that `train` wrote.
        shards: The folder that `pack` wrote, or its address, as for Loader.
        split: "train" or "val".
        tta: Score the mean probabilities of each image and its mirror image; None does as the recipe says.
        device: None means CUDA where there is one, else the CPU.

    Raises CheckpointError when the checkpoint cannot be used or was trained on other classes than the shards hold.
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
        # On CUDA the cache decides on the backend, which is to be that of training. RAM has no use for images that come once.
        cache="auto" if chosen.type == "cuda" else None,
        shuffle=False,
    )
    if loader.manifest.classes != checkpoint.classes:
        raise CheckpointError(
            f"{shards}: holds the classes {', '.join(loader.manifest.classes)}; "
            f"the checkpoint was trained on {', '.join(checkpoint.classes)}."
        )
    model = on_device(checkpoint.network(), chosen)
    with tqdm(loader, desc="evaluate", unit="batch", disable=None) as batches:
        mirrored = recipe.tta if tta is None else tta
        scores = measure(model, batches, checkpoint.classes, tta=mirrored, paths=loader.paths)
    if not isfinite(scores.loss):
        bad = np.flatnonzero(np.isnan(scores.probabilities[:, 0]))
        raise no_class(name, scores.paths[int(bad[0])], len(bad))
    return scores
