"""The `Batch` that a Loader yields, its mixup and cutmix, and its memory as numpy arrays."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflower.draws.draw import Mix

Integers = NDArray[np.int64]
Pixels = NDArray[np.uint8]
"""Decoded image, (H, W, 3) RGB."""
Stored = NDArray[np.uint8 | np.float32 | np.uint16]
"""Images of a batch as a numpy array; float16 and bfloat16 appear as raw uint16 bits."""


class Batch(NamedTuple):
    """A batch of samples in epoch order, on the loader's device."""

    images: Tensor
    """(N, 3, H, W) in channels-last memory format and the loader's dtype; normalized unless the dtype is uint8."""
    labels: Tensor
    """(N,) int64 class indices, -1 for images without labels; with mixup or cutmix, the weight of each class,
    (N, classes) float32."""
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  (hides tuple.index, which is not needed)
    """(N,) int64 positions of the samples in the split's index. All random numbers of a sample are keyed by its position."""


def mixed(batch: Batch, mix: Mix, num_classes: int, put: Callable[[Tensor], Tensor]) -> Batch:
    """Mix floating-point images and labels (N,) within each pair of samples; labels become (N, num_classes) float32.

    put  Function that copies a CPU tensor to the batch's device without waiting for the GPU.
    """
    images, labels, index = batch
    partner = torch.arange(len(labels), device=labels.device) ^ 1
    numbers = np.repeat(np.stack([mix.share, np.where(mix.cut, 1.0, mix.share)]), 2, axis=1).astype(np.float32)
    share, blend = put(torch.as_tensor(numbers))[:, :, None]
    classes = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()  # one_hot syncs the GPU
    out = torch.lerp(images[partner], images, blend[:, :, None, None].to(images.dtype))
    for pair, (top, left, height, width) in enumerate(mix.box.tolist()):
        if height and width:
            place = (slice(None), slice(top, top + height), slice(left, left + width))
            out[2 * pair][place], out[2 * pair + 1][place] = images[2 * pair + 1][place], images[2 * pair][place]
    return Batch(out.contiguous(memory_format=torch.channels_last), torch.lerp(classes[partner], classes, share), index)


def as_numpy(tensor: Tensor) -> Stored:
    """Return a numpy view of the tensor's memory."""
    return tensor.numpy() if tensor.dtype in (torch.float32, torch.uint8) else tensor.view(torch.uint16).numpy()
