"""A network's answers: its validation view, probabilities, scores over batches."""

from collections.abc import Iterable, Sequence
from math import log, nan

import numpy as np
import torch
from torch import Tensor, nn

from fastflower import distributed
from fastflower.draws.augment import Augment
from fastflower.errors import CheckpointError
from fastflower.loading.batch import Batch
from fastflower.models.backbone import train_mode
from fastflower.models.metrics import Scores, score
from fastflower.recipes.recipe import Recipe


def view_of(recipe: Recipe) -> Augment:
    """The validation view that goes with a recipe: no draws, the same size and normalization."""
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
        logarithms = [torch.log_softmax(network(view).float(), dim=1) for view in views]
        logarithms = [rows.where(rows.isfinite().all(dim=1, keepdim=True), nan) for rows in logarithms]
    return torch.logsumexp(torch.stack(logarithms), dim=0) - log(len(views))


def recalibrate(network: nn.Module, batches: Iterable[Batch], freeze: int) -> None:
    """Make the statistics of batch norms, but for those of frozen stages, the means over batches."""
    train_mode(network, freeze)
    norms = [
        module
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.training
    ]
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
    rows = [(batch.index, batch.labels, log_probabilities(network, batch.images, tta=tta)) for batch in batches]
    columns = [torch.cat(column).cpu().numpy() for column in zip(*rows, strict=True)]
    shares = [share for share in distributed.gathered(columns) if share]  # a rank may have had no batch
    index, labels, outputs = (np.concatenate(column) for column in zip(*shares, strict=True))
    order = np.argsort(index, kind="stable")
    return score(classes, labels[order], outputs[order], paths)


def no_class(checkpoint: str, image: str, count: int = 1) -> CheckpointError:
    """The error for a network of finite weights whose outputs for an image, and others, are not finite."""
    others = f" and {count - 1} more" if count > 1 else ""
    return CheckpointError(
        f"{checkpoint}: its network's outputs for {image}{others} are not finite, so that it names no class; pass another "
        f"checkpoint, or train again with a lower lr or precision='float32' (--precision float32)."
    )
