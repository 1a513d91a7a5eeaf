"""Applies a Draw with torchvision's functionals. All backends are tested against this chain."""

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fastflower import Augment
from fastflower.draws.draw import Draw

BILINEAR = InterpolationMode.BILINEAR
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, from torchvision's documentation


def geometry_chain(image: torch.Tensor, draw: Draw, row: int, augment: Augment) -> torch.Tensor:
    """Apply crop, flips, rotation and affine, one torchvision call each, to a (C, H, W) float32 image in 0..1."""
    if augment.crop is None and augment.resized != "off":
        resize = augment.resized if isinstance(augment.resized, tuple) else [augment.resized]
        image = F.resize(image, list(resize), BILINEAR, antialias=True)
    if augment.move_first:
        return cropped(moved(image, draw, row, augment), draw, row, augment)
    return moved(cropped(image, draw, row, augment), draw, row, augment)


def cropped(image: torch.Tensor, draw: Draw, row: int, augment: Augment) -> torch.Tensor:
    """Crop and flip."""
    size = list(draw.size)
    if augment.crop is None and not augment.random_crop:
        image = F.center_crop(image, size)
    elif augment.crop is None:
        top, left = (draw.roi[row, :2] * image.shape[1:] / draw.image[row]).round().astype(int).tolist()
        # torchvision pads, then crops. These pads are large enough for any crop that overlaps the image.
        edges = [max(0, -left), max(0, -top)]
        far = [max(0, edge + size[1 - axis] - image.shape[2 - axis]) for axis, edge in enumerate((left, top))]
        image = F.crop(
            F.pad(image, edges + far, padding_mode=augment.padding_mode), top + edges[1], left + edges[0], *size
        )
    else:
        top, left, height, width = (int(part) for part in draw.roi[row])
        image = F.resized_crop(image, top, left, height, width, size, BILINEAR, antialias=True)
    if draw.flip[row, 0]:
        image = F.horizontal_flip(image)
    return F.vertical_flip(image) if draw.flip[row, 1] else image


def moved(image: torch.Tensor, draw: Draw, row: int, augment: Augment) -> torch.Tensor:
    """Rotate, then apply the affine transform."""
    if augment.rotate:
        image = F.rotate(image, float(draw.rotate[row]), BILINEAR)
    if augment.moves:
        image = F.affine(
            image,
            angle=float(draw.affine_rotate[row]),
            translate=[float(part) for part in draw.translate[row]],
            scale=float(draw.scale[row]),
            shear=[float(part) for part in draw.shear[row]],
            interpolation=BILINEAR,
        )
    return image


def color_chain(image: torch.Tensor, draw: Draw, row: int) -> torch.Tensor:
    """Apply jitter, then grayscale, to a (3, H, W) float32 image in 0..1, except steps that change nothing."""
    for adjust, factor, neutral in (
        (F.adjust_brightness, draw.brightness[row], 1),
        (F.adjust_contrast, draw.contrast[row], 1),
        (F.adjust_saturation, draw.saturation[row], 1),
        (F.adjust_hue, draw.hue[row], 0),
    ):
        image = image if factor == neutral else adjust(image, float(factor))
    return F.rgb_to_grayscale(image, num_output_channels=3) if draw.gray[row] else image


def render(
    source: NDArray[np.uint8], draw: Draw, row: int, augment: Augment
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return (image (H, W, 3) in 0..255, mask (H, W) of the pixels that no step of the chain moved out of the frame)."""
    image = torch.from_numpy(source).permute(2, 0, 1).float() / 255
    shown = geometry_chain(torch.ones_like(image[:1]), draw, row, augment)[0] > 0.999
    image = color_chain(geometry_chain(image, draw, row, augment), draw, row)
    return 255 * image.permute(1, 2, 0).numpy(), shown.numpy()
