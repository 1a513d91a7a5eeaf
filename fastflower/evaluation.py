"""Scores of a trained network on a split."""

from collections.abc import Iterable, Sequence
from math import isfinite, log, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from fastflower import distributed
from fastflower.backbone import train_mode
from fastflower.checkpoint import Checkpoint
from fastflower.devices import kept_memory, precision_of, resolve_device
from fastflower.draws.augment import Augment
from fastflower.errors import CheckpointError
from fastflower.loading.batch import Batch
from fastflower.loading.loader import Loader
from fastflower.metrics import Scores, score
from fastflower.recipes.recipe import Recipe
from fastflower.shards.remote import Remote

_BATCH_SIZE = 64  # of a pass without gradients: does not change the scores


def view_of(recipe: Recipe) -> Augment:
    """The validation view that goes with a recipe: no draws, the same size and normalisation."""
    training = recipe.augment
    return Augment(size=training.size, resize=training.resize, mean=training.mean, std=training.std)


def log_probabilities(network: nn.Module, images: Tensor, *, tta: bool) -> Tensor:
    """(N, K) float32, of a network in evaluation mode and images (N, 3, H, W) in the precision of its autocast.

    tta  Of the mean of the probabilities of each image and its mirror image.
    An image for which an output is not finite has NaN for every class.
    """
    precision = images.dtype
    views = [images, images.flip(3)] if tta else [images]
    with torch.inference_mode(), torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        found = [torch.log_softmax(network(view).float(), dim=1) for view in views]
        found = [rows.where(rows.isfinite().all(dim=1, keepdim=True), nan) for rows in found]
    return torch.logsumexp(torch.stack(found), dim=0) - log(len(found))


def recalibrate(network: nn.Module, batches: Iterable[Batch], freeze: int) -> None:
    """Make the statistics of batch norms, but for those of frozen stages, the means over batches."""
    train_mode(network, freeze)
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    network.eval()  # no dropout
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().reset_running_stats()
    for count, batch in enumerate(batches, start=1):
        for norm in norms:
            # A cumulative mean. momentum=None gives the same, but reads its count from the device.
            norm.momentum = 1 / count
        log_probabilities(network, batch.images, tta=False)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def measure(
    network: nn.Module, batches: Iterable[Batch], classes: tuple[str, ...], *, tta: bool, paths: Sequence[str] = ()
) -> Scores:
    """Scores of a network over the batches of all ranks, the same on each; waits for the device once, at the end.

    paths  Of the split's samples, by index.
    """
    network.eval()
    found = [(batch.index, batch.labels, log_probabilities(network, batch.images, tta=tta)) for batch in batches]
    columns = [torch.cat(column).cpu().numpy() for column in zip(*found, strict=True)]
    parts = [part for part in distributed.gathered(columns) if part]
    index, labels, outputs = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(index, kind="stable")
    return score(classes, labels[order], outputs[order], paths)


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
    # On CUDA the cache decides on the executor, which is to be that of training. RAM has no use for images that come once.
    cache = "auto" if chosen.type == "cuda" else None
    how: dict[str, Any] = {
        "device": chosen,
        "dtype": precision_of(recipe.precision, chosen),
        "shuffle": False,
        "cache": cache,
    }
    loader = Loader(shards, split, batch_size=_BATCH_SIZE, augment=view_of(recipe), **how)
    if loader.manifest.classes != checkpoint.classes:
        raise CheckpointError(
            f"{shards}: holds the classes {', '.join(loader.manifest.classes)}; "
            f"the checkpoint was trained on {', '.join(checkpoint.classes)}."
        )
    model = checkpoint.network().to(chosen, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    with kept_memory(chosen), tqdm(loader, desc="evaluate", unit="batch", disable=None) as batches:
        mirrored = recipe.tta if tta is None else tta
        scores = measure(model, batches, checkpoint.classes, tta=mirrored, paths=loader.paths)
    if not isfinite(scores.loss):
        bad = np.flatnonzero(np.isnan(scores.probabilities[:, 0]))
        raise no_class(name, scores.paths[int(bad[0])], len(bad))
    return scores


def no_class(checkpoint: str, image: str, count: int = 1) -> CheckpointError:
    """The error for a network of finite weights whose outputs for an image, and others, are not finite."""
    others = f" and {count - 1} more" if count > 1 else ""
    return CheckpointError(
        f"{checkpoint}: its network's outputs for {image}{others} are not finite, so that it names no class; pass another "
        f"checkpoint, or train again with a lower lr or precision='float32' (--precision float32)."
    )
