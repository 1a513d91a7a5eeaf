"""Inference: the validation view, log-probabilities, batch norm recalibration and scores over batches."""

from collections.abc import Iterable, Mapping, Sequence
from math import log, nan
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fastflower import distributed
from fastflower.draws.augment import Augment
from fastflower.errors import ArgumentError, CheckpointError
from fastflower.loading.batch import Batch
from fastflower.models.metrics import Scores, score
from fastflower.models.stages import train_mode
from fastflower.recipes.recipe import Recipe


def view_of(recipe: Recipe) -> Augment:
    """Return a recipe's validation view: the same size and normalization, without random augmentation."""
    return validation_view(recipe.augment)


def validation_view(training: Augment) -> Augment:
    """Return an augment's validation view, as `view_of` does of a recipe's."""
    return Augment(size=training.size, resize=training.resize, mean=training.mean, std=training.std)


def log_probabilities(network: nn.Module, images: Tensor, *, tta: bool) -> Tensor:
    """Return the log-probabilities, (N, K) float32, that a network in evaluation mode predicts for images (N, 3, H, W).

    The dtype of the images selects the autocast precision. A row is all NaN if any of its outputs is not finite.

    tta  Whether to average the probabilities of each image and its horizontal flip.
    """
    precision = images.dtype
    views = [images, images.flip(3)] if tta else [images]
    with torch.inference_mode(), torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        logarithms = [torch.log_softmax(_logits(network(view)), dim=1) for view in views]
        logarithms = [rows.where(rows.isfinite().all(dim=1, keepdim=True), nan) for rows in logarithms]
    return torch.logsumexp(torch.stack(logarithms), dim=0) - log(len(views))


def _logits(outputs: object) -> Tensor:
    """Return what a network returned, in float32. Raises ArgumentError unless it is a tensor (N, K)."""
    if isinstance(outputs, Tensor) and outputs.ndim == 2:
        return outputs.float()
    if isinstance(outputs, Tensor):
        what, part = f"a tensor of shape {tuple(outputs.shape)}", ".flatten(1)" if outputs.ndim > 2 else "[:, None]"
    else:
        keys = list(cast("Mapping[object, object]", outputs)) if isinstance(outputs, Mapping) else []
        outputs = cast("object", outputs)
        what = f"a {type(outputs).__name__}" + (f" with {', '.join(map(repr, keys))}" if keys else "")
        part = f"[{('logits' if 'logits' in keys else keys[0])!r}]" if keys else "[0]"
        part = ".logits" if not keys and hasattr(outputs, "logits") else part
    raise ArgumentError(
        f"checkpoint must be a network that returns logits (N, classes), got {what}; wrap it in an nn.Module with "
        f"def forward(self, images): return self.network(images){part}."
    )


def recalibrate(network: nn.Module, batches: Iterable[Batch], freeze: int) -> None:
    """Set the batch norm statistics to their means over `batches`, except in frozen stages."""
    train_mode(network, freeze)
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    norms = [module for module in network.modules() if isinstance(module, kinds) and module.training]
    network.eval()  # no dropout
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().reset_running_stats()
    for count, batch in enumerate(batches, start=1):
        for norm in norms:
            # A cumulative mean. momentum=None computes the same mean, but reads a counter and so waits for the device.
            norm.momentum = 1 / count
        log_probabilities(network, batch.images, tta=False)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def measure(
    network: nn.Module, batches: Iterable[Batch], classes: tuple[str, ...], *, tta: bool, paths: Sequence[str] = ()
) -> Scores:
    """Score a network on the batches of all ranks; every rank returns the same scores. Waits for the device once, at the end.

    paths  Paths of the split's samples, by index.
    """
    network.eval()
    rows = [(batch.index, batch.labels, log_probabilities(network, batch.images, tta=tta)) for batch in batches]
    columns = [torch.cat(column).cpu().numpy() for column in zip(*rows, strict=True)]
    parts = [part for part in distributed.gathered(columns) if part]  # a rank may have no batch
    index, labels, outputs = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(index, kind="stable")
    return score(classes, labels[order], outputs[order], paths)


def non_finite_outputs(checkpoint: str, image: str, count: int = 1) -> CheckpointError:
    """Return the error to raise if the outputs for `image` and `count - 1` other images are not finite."""
    others = f" and {count - 1} more" if count > 1 else ""
    return CheckpointError(
        f"{checkpoint}: the network's outputs for {image}{others} are not finite, so it cannot predict; pass another "
        f"checkpoint, or train again with a lower lr or precision='float32' (--precision float32)."
    )
