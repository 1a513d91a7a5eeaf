"""Brightness, contrast, saturation and normalization as tables and matrices that match torchvision's functions.

Pixels are RGB in [0, 255]. The order is brightness, contrast, saturation, hue. Each operation clips to [0, 255] as in
torchvision. Shape suffixes: K table entries (256), C channels.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

FACTORS = ("brightness", "contrast", "saturation", "hue")  # fields of Augment and Draw, in order of application
# ITU-R BT.601 luma, as in Pillow's convert("L"). torchvision's rgb_to_grayscale uses 0.2989 for red.
LUMA = np.array([0.299, 0.587, 0.114])
# Per-channel statistics of ImageNet for pixel values in [0, 1], as torchvision's pretrained weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LEVELS = np.arange(256, dtype=np.float64)


def brightness_table(factor: float) -> Floats:
    """Return clip(factor * value) for each pixel value: a lookup table, (256,) float32 in [0, 255]."""
    return np.clip(factor * _LEVELS, 0, 255).astype(np.float32)


def contrast_table(levels_K: Floats, factor: float, mean: float) -> Floats:
    """Apply contrast to a table: clip(mean + factor * (value - mean)). `mean` is the mean gray before contrast."""
    return np.clip(mean + factor * (levels_K - mean), 0, 255).astype(np.float32)


def saturation_matrix(factor: float) -> Floats:
    """Return the (3, 3) float32 matrix that blends a pixel x with its gray: factor * x + (1 - factor) * (LUMA . x)."""
    return (factor * np.eye(3) + (1 - factor) * LUMA).astype(np.float32)


def normalize_factors(mean: tuple[float, float, float], std: tuple[float, float, float]) -> tuple[Floats, Floats]:
    """Return (multiply, add), each (C,) float32, with multiply * value + add = (value / 255 - mean) / std."""
    multiply = 1 / (255 * np.asarray(std, np.float64))
    add = -np.asarray(mean, np.float64) / np.asarray(std, np.float64)
    return multiply.astype(np.float32), add.astype(np.float32)


def quantized(levels_K: Floats) -> NDArray[np.uint8]:
    """Round a lookup table to integers, (256,) uint8."""
    return np.rint(levels_K).astype(np.uint8)
