"""The `Batch` that a Loader yields, mixup and cutmix of a batch, and its memory as numpy arrays."""

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
"""Images of a batch as a numpy array; float16 and bfloat16 as their bits."""


class Batch(NamedTuple):
    """Samples in the order of the epoch, on the loader's device."""

    images: Tensor
    """(N, 3, H, W) in channels-last memory, in the loader's dtype; normalized unless the dtype is uint8."""
    labels: Tensor
    """(N,) int64 class indices. With mixup or cutmix (N, classes) float32, the share of each class."""
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  (hides tuple.index, which is not needed)
    """(N,) int64 positions of the samples in the split's index. They key every random number."""


def mixed(batch: Batch, mix: Mix, num_classes: int, put: Callable[[Tensor], Tensor]) -> Batch:
    """Mix float images and labels (N,) within each pair; labels become (N, num_classes) float32.

    put  copies a CPU tensor to the batch's device without waiting for the GPU.
    """
    images, labels, index = batch
    partner = torch.arange(len(labels), device=labels.device) ^ 1
    numbers = np.repeat(np.stack([mix.share, np.where(mix.cut, 1.0, mix.share)]), 2, axis=1).astype(np.float32)
    share, blend = put(torch.as_tensor(numbers))[:, :, None]
    classes = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()  # one_hot waits for a GPU
    out = torch.lerp(images[partner], images, blend[:, :, None, None].to(images.dtype))
    for pair, (top, left, height, width) in enumerate(mix.box.tolist()):
        if height and width:
            place = (slice(None), slice(top, top + height), slice(left, left + width))
            out[2 * pair][place], out[2 * pair + 1][place] = images[2 * pair + 1][place], images[2 * pair][place]
    return Batch(out.contiguous(memory_format=torch.channels_last), torch.lerp(classes[partner], classes, share), index)


def as_numpy(tensor: Tensor) -> Stored:
    """Return a view of the tensor's memory."""
    return tensor.numpy() if tensor.dtype in (torch.float32, torch.uint8) else tensor.view(torch.uint16).numpy()
