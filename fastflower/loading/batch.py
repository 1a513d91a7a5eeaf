"""The `Batch` that a Loader yields: what it shows, its mixup and cutmix, and its memory as numpy arrays."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflower.draws.augment import Augment
from fastflower.draws.draw import Mix
from fastflower.errors import ArgumentError, integer

if TYPE_CHECKING:
    from fastflower.loading.picture import Picture

Integers = NDArray[np.int64]
Pixels = NDArray[np.uint8]
"""Decoded image, (H, W, 3) RGB."""
Stored = NDArray[np.uint8 | np.float32 | np.uint16]
"""Images of a batch as a numpy array; float16 and bfloat16 appear as raw uint16 bits."""


class _Tensors(NamedTuple):
    images: Tensor
    """(N, 3, H, W) in channels-last memory format and the loader's dtype; normalized unless the dtype is uint8."""
    labels: Tensor
    """(N,) int64 class indices, -1 for images without labels; with mixup or cutmix, the weight of each class,
    (N, classes) float32."""
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  (hides tuple.index, which is not needed)
    """(N,) int64 positions of the samples in the split's index. All random numbers of a sample are keyed by its position."""


class Batch(_Tensors):
    """A batch of samples in epoch order, on the loader's device: the tuple (images, labels, index).

    Example:
        >>> from fastflower import Augment, Loader
        >>> loader = Loader("shards", batch_size=32, augment=Augment(size=96, crop=(0.5, 1.0)), device="cpu")
        >>> batch = next(iter(loader))
        >>> batch
        Batch(images=float32 (32, 3, 96, 96), labels=int64 (32,), index=int64 (32,), device=cpu)
        >>> images, labels, index = batch
        >>> batch.show().savefig("batch.png")  # in a notebook: batch.show()
    """

    classes: tuple[str, ...] | None = None
    """Names of the classes. None unless a Loader made this very batch; copies made by other libraries may lack it."""
    augment: Augment | None = None
    """What the images were rendered with, including their normalization; None as above."""

    def __repr__(self) -> str:
        described = (f"{name}={_described(tensor)}" for name, tensor in zip(self._fields, self, strict=True))
        return f"Batch({', '.join(described)}, device={getattr(self.images, 'device', None)})"

    def pixels(self) -> Pixels:
        """Return the images without their normalization, (N, H, W, 3) RGB.

        Raises ArgumentError if the normalization is not known.
        """
        images = self.images.detach().permute(0, 2, 3, 1).cpu()
        if images.dtype == torch.uint8:
            return images.numpy()
        if self.augment is None:
            raise ArgumentError(
                "Batch: its normalization is not known, because it is a copy or was not made by a Loader; set "
                "batch.classes and batch.augment to those of the loader."
            )
        mean, std = map(np.array, self.augment.normalization)
        scaled = images.float().numpy() * std + mean
        return np.rint(255 * scaled.clip(0, 1)).astype(np.uint8)

    def show(self, images: int = 16) -> "Picture":
        """Draw the first images with their classes, and the weights of mixed classes.

        Returns a matplotlib figure, which a notebook shows; elsewhere use its `savefig`. Raises ArgumentError as `pixels` does.
        """
        from fastflower.loading.picture import grid  # matplotlib takes a second to import

        count = integer("images", images, 1)
        first = Batch(*(tensor[:count] for tensor in self))
        first.augment = self.augment
        return grid(first.pixels(), [_title(label, self.classes) for label in first.labels.cpu()])


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _title(label: Tensor, classes: tuple[str, ...] | None) -> str:
    """Return the class of a sample, "" if it has none; if two are mixed, both with their weights."""

    def name(index: int) -> str:
        return classes[index] if classes else f"class {index}"

    if label.ndim == 0:
        return name(int(label)) if label >= 0 else ""
    top = label.topk(2)  # there are at least two classes
    (first, second), (share, rest) = map(int, top.indices), map(float, top.values)
    return name(first) if rest < 0.05 else f"{name(first)} {share:.1f}, {name(second)} {rest:.1f}"


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
