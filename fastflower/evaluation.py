"""Scores of a trained network on a split."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from fastflower.augment import Augment
from fastflower.batch import Batch, resolve_device
from fastflower.checkpoint import Checkpoint
from fastflower.errors import CheckpointError
from fastflower.loader import Loader
from fastflower.metrics import Scores, score
from fastflower.recipe import Recipe
from fastflower.store import Remote

_BATCH_SIZE = 64  # of a pass without gradients: does not change the scores


def view_of(recipe: Recipe) -> Augment:
    """The validation view that goes with a recipe: no draws, the same size and normalisation."""
    training = recipe.augment
    return Augment(size=training.size, resize=training.resize, mean=training.mean, std=training.std)


def loader_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype in which a loader gives images to a recipe's autocast."""
    return getattr(torch, recipe.precision)


def measure(
    model: nn.Module, batches: Iterable[Batch], classes: tuple[str, ...], device: torch.device, precision: torch.dtype
) -> Scores:
    """Scores of a network in evaluation mode over the batches; waits for the device once, at the end."""
    labels: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
                logits = model(batch.images)
            outputs.append(torch.log_softmax(logits.float(), dim=1))
            labels.append(batch.labels)
    return score(classes, np.asarray(torch.cat(labels).cpu()), np.asarray(torch.cat(outputs).cpu()))


def evaluate(
    checkpoint: str | Path | Checkpoint,
    shards: str | Path | Remote,
    *,
    split: str = "val",
    device: str | torch.device | None = None,
) -> Scores:
    """Score a checkpoint on every sample of a split, exactly once.

    Args:
        checkpoint: A checkpoint that `train` wrote.
        shards: The folder that `pack` wrote, or its address, as for Loader.
        split: "train" or "val".
        device: None means CUDA where there is one, else the CPU.

    Raises CheckpointError when the checkpoint cannot be used or was trained on other classes than the shards hold.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.load(checkpoint)
    chosen, recipe = resolve_device(device), checkpoint.recipe
    precision = loader_dtype(recipe)
    loader = Loader(
        shards,
        split,
        batch_size=_BATCH_SIZE,
        augment=view_of(recipe),
        device=chosen,
        dtype=precision,
        shuffle=False,
        cache=None,
    )
    if loader.manifest.classes != checkpoint.classes:
        raise CheckpointError(
            f"{shards}: holds the classes {', '.join(loader.manifest.classes)}; "
            f"the checkpoint was trained on {', '.join(checkpoint.classes)}."
        )
    model = checkpoint.network().to(chosen, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    with tqdm(loader, desc="evaluate", unit="batch", disable=None) as batches:
        return measure(model, batches, checkpoint.classes, chosen, precision)
