"""The network that is exported: from raw pixels to probabilities, in operators that every engine has."""

import torch
from torch import Tensor, nn

from fastflower.draws.augment import Augment
from fastflower.draws.geometry import BLUR_TAPS, MIN_VARIANCE

_ROUNDING = 1e-4  # pixels


class RawView(nn.Module):
    """The validation view of images of any size: resize with antialiasing, center-crop, normalize.

    Resizing is two matrix products, whose weights are computed from the image's size. They are those of `predict`, which
    averages boxes of pixels, blurs them and interpolates (`draws.geometry.Resampling`). No Resize operator is used, because
    some engines have none with antialiasing.

    Args:
        augment: Gives size, resize, mean and std. Random augmentation is ignored.

    Example:
        >>> import torch
        >>> from fastflower import Augment
        >>> view = RawView(Augment(size=224, resize=256))
        >>> view(torch.zeros(375, 500, 3, dtype=torch.uint8)).shape
        torch.Size([3, 224, 224])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, augment: Augment) -> None:
        super().__init__()
        mean, std = augment.normalization
        self.size, self.resize = augment.output_size, augment.resized
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the views of RGB pixels: (..., 3, h, w) float32 of (..., H, W, 3) uint8."""
        sides = pixels.shape[-3], pixels.shape[-2]
        # torch.full keeps a dynamic size dynamic, where torch.tensor would make it a constant of the graph.
        source = torch.stack([torch.full((), side, dtype=torch.int64) for side in sides])
        resized = self._resized(source)
        decode = _decode_scale((source / resized).min())
        axes = zip(source, resized, self.size, sides, strict=True)
        down, across = (_weights(length, to, size, decode, torch.arange(side)) for length, to, size, side in axes)
        return (down @ pixels.movedim(-1, -3).float() @ across.T - self.mean) / self.std

    def _resized(self, source: Tensor) -> Tensor:
        """Return height and width after the resize, (2,) int64, as `Augment` does."""
        if isinstance(self.resize, str):
            return source
        if isinstance(self.resize, tuple):
            return torch.tensor(self.resize)
        return self.resize * source // source.min()


def _decode_scale(factor: Tensor) -> Tensor:
    """Return the factor by which `predict` lets the decoder shrink a JPEG, as `geometry.decode_scales` does."""
    steps = [torch.where(factor >= least, 2, 1) for least in (4, 8, 16)]
    return steps[0] * steps[1] * steps[2]


def _weights(length: Tensor, resized: Tensor, size: int, decode: Tensor, cells: Tensor) -> Tensor:
    """Return the weights of an axis, (size, length) float32. Rows beyond the resized image are zero, which is black.

    length, resized  Pixels of the image before and after the resize. size  Of the crop. cells  0, 1, ..., length - 1.
    """
    room = resized - size
    half = room // 2 + (room % 2) * (room // 2 % 2)  # half of it, rounded to even, as torchvision's center_crop
    start = torch.where(room < 0, -(-room // 2), half)
    factor = length / resized
    box = decode * (factor / (2 * decode)).floor().clamp(min=1).long()  # pixels

    # Boxes begin at the crop's edge, in whole pixels, and beyond it its last pixels repeat, as in `geometry.plan`. At least
    # one pixel is read. A partial box at the end is left out.
    edge = torch.minimum((start * factor).clamp(min=0), length - 1)
    last = torch.maximum(torch.minimum((start + size) * factor, length.float()), edge + 1)
    first, end = (edge + _ROUNDING).floor().long() // decode * decode, (last - _ROUNDING).ceil().long()
    boxes = (((end + decode - 1) // decode * decode - first) // box).clamp(min=1)

    place = start + torch.arange(size)
    center = ((place + 0.5) * factor - first) / box - 0.5
    before = center.floor()
    after_share = center - before
    taps = [*_blur(factor, box), torch.zeros(())]  # the last one stands for all beyond
    of_cell = torch.div(cells - first, box, rounding_mode="floor")
    weights = torch.zeros(())
    for step in range(1 - BLUR_TAPS, BLUR_TAPS + 1):
        near, far = (taps[min(abs(offset), BLUR_TAPS)] for offset in (step, step - 1))
        share = (1 - after_share) * near + after_share * far
        chosen = (before.long() + step).clamp(min=0).minimum(boxes - 1)
        weights = weights + torch.where(of_cell == chosen[:, None], share[:, None], 0.0)
    shown = (place >= 0) & (place < resized)
    averaged = torch.minimum(box, length - first - of_cell * box)  # pixels; fewer in a box that the image's edge cuts
    return torch.where(shown[:, None], weights / averaged, 0.0)


def _blur(factor: Tensor, box: Tensor) -> list[Tensor]:
    """Return half of the blur's kernel, center first, as `geometry.blur_variance` and `blur_kernels` do."""
    variance = (factor**2 / 6 - (3 * box**2 - 1) / 12) / box**2
    variance = torch.where(variance >= MIN_VARIANCE, variance, 0.0)
    reach = torch.where(variance > 0, (6 * variance + 1).sqrt().floor(), 0.0)
    pairs = reach * (reach + 1)
    slope = (pairs * (2 * reach + 1) / 3 - variance * (2 * reach + 1)) / torch.where(
        reach > 0, pairs**2 / 2 - variance * pairs, 1.0
    )
    taps = [torch.where(reach >= step, 1 - slope * step, 0.0) for step in range(BLUR_TAPS)]
    total = 2 * torch.stack(taps).sum() - taps[0]
    return [tap / total for tap in taps]


class Classifier(nn.Module):
    """A network with its view before it and softmax after it.

    Maps RGB pixels to probabilities: (H, W, 3) uint8 to (K,) float32, or (N, H, W, 3) to (N, K).

    Args:
        view: Makes the network's input.
        network: Maps (N, 3, h, w) float32 to logits (N, K).
        tta: Whether to average the probabilities of the image and its horizontal flip.
    """

    def __init__(self, view: RawView, network: nn.Module, *, tta: bool) -> None:
        super().__init__()
        self.view, self.network, self.tta = view, network, tta

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the probabilities of one image or of a batch."""
        images = self.view(pixels if pixels.ndim == 4 else pixels[None])
        probabilities = self.network(images).softmax(dim=1)
        if self.tta:
            probabilities = (probabilities + self.network(images.flip(3)).softmax(dim=1)) / 2
        return probabilities if pixels.ndim == 4 else probabilities[0]
