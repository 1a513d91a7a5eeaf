"""Distributions of Augment's draws compared with torchvision's."""

from collections.abc import Callable
from math import log, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from test_augment import LAW, SAMPLES, SWITCHED_ON, draw
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fastflower.draws.augment import Augment


def assert_same_distribution(ours: ArrayLike, theirs: ArrayLike) -> None:
    """Check with a two-sample Kolmogorov-Smirnov test at 1 in 10,000, and means within five standard errors."""
    one, other = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    grid = np.unique(np.concatenate([one, other]))
    below = [np.searchsorted(np.sort(values), grid, side="right") / len(values) for values in (one, other)]
    samples = 1 / len(one) + 1 / len(other)
    assert np.abs(below[0] - below[1]).max() < sqrt(-log(0.0001 / 2) / 2 * samples)
    error = sqrt((one.var() + other.var()) / 2 * samples)
    assert abs(one.mean() - other.mean()) <= 5 * error + 1e-12


def theirs(sample: Callable[[], Any]) -> NDArray[np.float64]:
    """Return torchvision's draws, one row per call, without changing the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return np.array([sample() for _ in range(SAMPLES)], np.float64)


@pytest.mark.parametrize("size", [(375, 500), (900, 150), (150, 900), (64, 64)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.25, 0.5)])
def test_crops_have_the_distribution_of_random_resized_crop(size: tuple[int, int], scale: tuple[float, float]) -> None:
    blank = torch.empty(3, *size, device="meta")
    peer = theirs(lambda: T.RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]))
    ours = Augment(crop=scale).draw(0, 0, np.arange(SAMPLES), np.tile(size, (SAMPLES, 1))).roi
    for column in range(4):
        assert_same_distribution(ours[:, column], peer[:, column])
    assert_same_distribution(ours[:, 2] * ours[:, 3], peer[:, 2] * peer[:, 3])
    assert_same_distribution(ours[:, 3] / ours[:, 2], peer[:, 3] / peer[:, 2])
    for corner in (0, 1):  # if the crop can move along this axis
        free = [roi[roi[:, 2 + corner] < size[corner]] for roi in (ours, peer)]
        if min(map(len, free)) > 100:
            assert_same_distribution(*(roi[:, corner] / (size[corner] - roi[:, 2 + corner]) for roi in free))


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        pytest.param((10, 1000), (0.08, 1.0), (3 / 4, 4 / 3), id="wide"),
        pytest.param((1000, 10), (0.08, 1.0), (3 / 4, 4 / 3), id="tall"),
        pytest.param((5, 501), (0.08, 1.0), (3 / 4, 4 / 3), id="wide, rounded up"),
        pytest.param((501, 5), (0.08, 1.0), (3 / 4, 4 / 3), id="tall, rounded up"),
        pytest.param((100, 100), (1.0, 1.0), (0.5, 0.9), id="square, narrow wanted"),
        pytest.param((101, 300), (1.0, 1.0), (1.1, 1.3), id="wide, nearly square wanted"),
    ],
)
def test_the_crop_if_none_fits_equals_torchvision(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    expected = T.RandomResizedCrop.get_params(torch.empty(3, *size, device="meta"), list(scale), list(ratio))
    roi = Augment(crop=scale, crop_ratio=ratio).draw(0, 0, np.arange(20), np.tile(size, (20, 1))).roi
    assert (roi == expected).all()


@LAW
@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    crop=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair))),
)
def test_crops_are_whole_pixels_inside_the_image(height: int, width: int, crop: tuple[float, float]) -> None:
    drawn = Augment(crop=crop).draw(0, 0, np.arange(50), np.tile((height, width), (50, 1)))
    top, left, rows, columns = drawn.roi.T
    assert (drawn.roi == np.rint(drawn.roi)).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (rows >= 1).all()
    assert (columns >= 1).all()
    assert (top + rows <= height).all()
    assert (left + columns <= width).all()


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    height=st.integers(20, 700),
    width=st.integers(20, 700),
    resize=st.one_of(st.integers(20, 400), st.tuples(st.integers(20, 400), st.integers(20, 400))),
    size=st.one_of(st.just(224), st.tuples(st.integers(1, 300), st.integers(1, 300))),
)
def test_the_validation_view_equals_torchvision(
    height: int, width: int, resize: int | tuple[int, int], size: int | tuple[int, int]
) -> None:
    wanted = list(resize) if isinstance(resize, tuple) else [resize]
    blank = torch.empty(1, height, width, device="meta")
    resized = F.resize(blank, wanted, InterpolationMode.NEAREST).shape[1:]
    output = size if isinstance(size, tuple) else (size, size)
    expected = []
    for axis, image in enumerate((height, width)):
        # One row or column of indices, cropped by torchvision, which pads with zeros beyond the image.
        line = torch.arange(1, resized[axis] + 1).reshape((1, -1, 1) if axis == 0 else (1, 1, -1))
        shown = F.center_crop(line, [output[0], 1] if axis == 0 else [1, output[1]]).flatten()
        first = int(shown.nonzero()[0])
        expected.append((int(shown[first]) - 1 - first) * image / resized[axis])
    expected += [side * image / of for side, image, of in zip(output, (height, width), resized, strict=True)]
    roi = Augment(resize=resize, size=size).draw(0, 0, [0], [[height, width]]).roi
    assert np.allclose(roi, [expected], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "area", "ratio"),
    [
        pytest.param((224, 224), (0.02, 0.33), (0.3, 3.3), id="torchvision's defaults"),
        pytest.param((64, 200), (0.3, 0.9), (0.3, 3.3), id="many that do not fit"),
        pytest.param((100, 100), (0.05, 0.1), (2.0, 5.0), id="tall"),
        pytest.param((8, 9), (0.3, 0.9), (0.5, 2.0), id="few pixels"),
    ],
)
def test_erased_rectangles_have_the_distribution_of_random_erasing(
    size: tuple[int, int], area: tuple[float, float], ratio: tuple[float, float]
) -> None:
    blank = torch.empty(3, *size, device="meta")

    def sample() -> tuple[int, ...]:
        box = T.RandomErasing.get_params(blank, area, ratio, [0.0])[:4]
        return (0, 0, 0, 0) if box[2:] == size else box  # the whole image means that no attempt fits

    peer = theirs(sample)
    augment = Augment(size=size, erase=1.0, erase_area=area, erase_ratio=ratio)
    ours = augment.draw(0, 0, np.arange(SAMPLES), np.full((SAMPLES, 2), 300)).erase
    assert_same_distribution(ours[:, 2] > 0, peer[:, 2] > 0)
    ours, peer = ours[ours[:, 2] > 0], peer[peer[:, 2] > 0]
    for column in range(4):
        assert_same_distribution(ours[:, column], peer[:, column])
    assert_same_distribution(ours[:, 2] / ours[:, 3], peer[:, 2] / peer[:, 3])
    assert_same_distribution(ours[:, 2] * ours[:, 3], peer[:, 2] * peer[:, 3])
    assert (ours[:, 0] + ours[:, 2] <= size[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= size[1]).all()


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_flips_and_erasing_have_their_probabilities(probability: float) -> None:
    drawn = draw(Augment(flip=probability, flip_vertical=probability, erase=probability), range(SAMPLES))
    bound = 5 * sqrt(probability * (1 - probability) / SAMPLES)
    for applied in (drawn.flip[:, 0], drawn.flip[:, 1], drawn.erase[:, 2] > 0):
        assert abs(applied.mean() - probability) <= bound


@pytest.mark.parametrize("strength", [0.2, 1.5])
def test_color_factors_have_the_distribution_of_color_jitter(strength: float) -> None:
    jitter = T.ColorJitter(strength, strength, strength, 0.1)
    ranges: Any = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    peer = theirs(lambda: T.ColorJitter.get_params(*ranges)[1:])
    drawn = draw(Augment(brightness=strength, contrast=strength, saturation=strength, hue=0.1), range(SAMPLES))
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert_same_distribution(getattr(drawn, name), peer[:, column])
        low, high = ranges[column]
        assert getattr(drawn, name).min() >= low
        assert getattr(drawn, name).max() <= high


def test_affine_parameters_have_the_distribution_of_random_affine() -> None:
    size = (120, 200)

    def sample() -> tuple[float, ...]:
        degrees, shift, factors, slants = [-25.0, 25.0], [0.1, 0.3], [0.7, 1.2], [-10.0, 10.0, -30.0, 30.0]
        angle, moved, scale, shear = T.RandomAffine.get_params(degrees, shift, factors, slants, [size[1], size[0]])
        return angle, *moved, scale, *shear

    peer = theirs(sample)
    augment = Augment(size=size, affine_rotate=25, translate=(0.1, 0.3), scale=(0.7, 1.2), shear=(10, 30))
    drawn = draw(augment, range(SAMPLES))
    ours = [drawn.affine_rotate, *drawn.translate.T, drawn.scale, *drawn.shear.T]
    for column, numbers in enumerate(ours):
        assert_same_distribution(numbers, peer[:, column])
    assert (drawn.translate == np.rint(drawn.translate)).all()
    assert np.abs(drawn.translate).max(axis=0).tolist() == [20, 36]


def test_angles_have_the_distribution_of_random_rotation() -> None:
    peer = theirs(lambda: T.RandomRotation.get_params([-30.0, 30.0]))
    assert_same_distribution(draw(Augment(rotate=30), range(SAMPLES)).rotate, peer)


@pytest.mark.parametrize(
    ("image", "options"),
    [
        pytest.param((20, 30), {}, id="inside"),
        pytest.param((9, 30), {}, id="no room below"),
        pytest.param((12, 15), {"padding": 3}, id="padded"),
        pytest.param((5, 30), {"pad_if_needed": True}, id="too small"),
        pytest.param((4, 12), {"padding": 1, "pad_if_needed": True}, id="padded and too small"),
    ],
)
def test_positions_have_the_distribution_of_random_crop(image: tuple[int, int], options: dict[str, Any]) -> None:
    size, numbered = (9, 11), torch.arange(1, image[0] * image[1] + 1).reshape(1, *image)
    transform = T.RandomCrop(size, **options)

    def corner() -> tuple[int, int]:
        """The top left of the crop in the image, from the number of any pixel that is not padding."""
        crop = transform(numbered)[0]
        row, column = torch.nonzero(crop)[0].tolist()
        number = int(crop[row, column]) - 1
        return number // image[1] - row, number % image[1] - column

    augment = Augment(size=size, resize="off", random_crop=True, padding=options.get("padding", 0))
    ours = augment.draw(0, 0, np.arange(SAMPLES), np.tile(image, (SAMPLES, 1))).roi
    peer = theirs(corner)
    assert (ours[:, 2:] == size).all()
    for axis in (0, 1):
        assert_same_distribution(ours[:, axis], peer[:, axis])
        assert set(ours[:, axis]) == set(peer[:, axis])


def test_a_probability_switches_its_group_as_random_apply_does() -> None:
    switched = {"rotate_probability": 0.3, "affine_probability": 0.8, "jitter_probability": 0.5, "grayscale": 0.2}
    always = {**SWITCHED_ON, "grayscale": 0.0}
    one, other = (Augment(**{**always, **fields}) for fields in ({}, switched))
    whole, part, nothing = (draw(augment, range(SAMPLES)) for augment in (one, other, Augment()))
    groups = {
        "rotate_probability": ("rotate",),
        "affine_probability": ("affine_rotate", "translate", "scale", "shear"),
        "jitter_probability": ("brightness", "contrast", "saturation", "hue"),
    }
    applied = {"grayscale": part.gray}
    for name, arrays in groups.items():
        applied[name] = getattr(part, arrays[0]) != getattr(nothing, arrays[0])
        for array in arrays:  # the group's own numbers, or no change
            drawn, on = getattr(part, array), applied[name]
            assert np.array_equal(drawn[on], getattr(whole, array)[on])
            assert np.array_equal(drawn[~on], getattr(nothing, array)[~on])
    for name, probability in switched.items():
        assert abs(applied[name].mean() - probability) < 5 * sqrt(probability * (1 - probability) / SAMPLES)
    correlation = np.corrcoef(np.array(list(applied.values()), float)) - np.eye(len(applied))
    assert np.abs(correlation).max() < 0.08, "the groups are switched independently of each other"
