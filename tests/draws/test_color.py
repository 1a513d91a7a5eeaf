"""Tables and matrices compared with torchvision's functionals and Pillow."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as F

from fastflower.draws.color import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LUMA,
    brightness_table,
    contrast_table,
    normalize_factors,
    quantized,
    saturation_matrix,
)

FACTORS = [0.0, 0.3, 0.8, 1.0, 1.37, 2.5]
# float32 rounding, in gray levels.
ROUNDING = 1e-3


@pytest.fixture
def pixels(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random image (H, W, 3) with every level in each channel."""
    levels = np.stack([rng.permutation(256) for _ in range(3)], axis=-1)
    return np.concatenate([levels, rng.integers(0, 256, (768, 3))]).reshape(32, 32, 3).astype(np.uint8)


def as_tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def as_levels(image: torch.Tensor) -> NDArray[np.float32]:
    return 255 * image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("factor", FACTORS)
def test_the_brightness_table_equals_torchvision(pixels: NDArray[np.uint8], factor: float) -> None:
    expected = as_levels(F.adjust_brightness(as_tensor(pixels), factor))
    assert np.abs(brightness_table(factor)[pixels] - expected).max() < ROUNDING


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("brightness", [0.5, 1.0, 1.6])
def test_contrast_after_brightness_equals_torchvision(
    pixels: NDArray[np.uint8], factor: float, brightness: float
) -> None:
    brightened = F.adjust_brightness(as_tensor(pixels), brightness)
    expected = as_levels(F.adjust_contrast(brightened, factor))
    mean = 255 * float(F.rgb_to_grayscale(brightened).mean())
    table = contrast_table(brightness_table(brightness), factor, mean)
    assert table.dtype == np.float32
    assert np.abs(table[pixels] - expected).max() < ROUNDING


@pytest.mark.parametrize("factor", FACTORS)
def test_the_saturation_matrix_equals_torchvision(pixels: NDArray[np.uint8], factor: float) -> None:
    expected = as_levels(F.adjust_saturation(as_tensor(pixels), factor))
    ours = np.clip(pixels @ saturation_matrix(factor).T, 0, 255)
    # torchvision's weight for red is 0.2989, Pillow's is 0.299.
    assert np.abs(ours - expected).max() < ROUNDING + 0.0001 * 255 * abs(1 - factor)


def test_luma_equals_pillows_gray(pixels: NDArray[np.uint8]) -> None:
    gray = np.asarray(Image.fromarray(pixels).convert("L"), np.float64)
    assert np.abs(pixels @ LUMA - gray).max() < 0.51
    assert LUMA.sum() == pytest.approx(1)


def test_factor_one_changes_nothing(pixels: NDArray[np.uint8]) -> None:
    levels = np.arange(256)
    assert np.array_equal(brightness_table(1), levels)
    assert np.array_equal(quantized(brightness_table(1)), levels)
    assert np.abs(contrast_table(brightness_table(1), 1, 77.3) - levels).max() < ROUNDING
    assert np.array_equal(quantized(contrast_table(brightness_table(1), 1, 77.3)), levels)
    assert np.array_equal(pixels @ saturation_matrix(1).T, pixels)


def test_saturation_zero_gives_equal_channels(pixels: NDArray[np.uint8]) -> None:
    gray = pixels @ saturation_matrix(0).T
    assert np.ptp(gray, axis=-1).max() < ROUNDING
    assert np.abs(gray[..., 0] - pixels @ LUMA).max() < ROUNDING


def test_contrast_zero_gives_the_mean() -> None:
    assert np.allclose(contrast_table(brightness_table(1), 0, 77.3), 77.3)


def test_quantized_tables_are_the_nearest_levels() -> None:
    table = brightness_table(0.731)
    levels = quantized(table)
    assert levels.dtype == np.uint8
    assert np.abs(levels - table.astype(np.float64)).max() <= 0.5
    assert quantized(np.array([254.6, 0.4, 255.0], np.float32)).tolist() == [255, 0, 255]


@pytest.mark.parametrize(
    ("mean", "std"),
    [(IMAGENET_MEAN, IMAGENET_STD), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), ((0.5, 0.1, 0.9), (2.0, 0.1, 0.5))],
)
def test_normalization_equals_torchvision(
    pixels: NDArray[np.uint8], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    expected = F.normalize(as_tensor(pixels), list(mean), list(std)).permute(1, 2, 0).numpy()
    multiply, add = normalize_factors(mean, std)
    assert multiply.dtype == add.dtype == np.float32
    assert np.abs(multiply * pixels + add - expected).max() < 1e-5
