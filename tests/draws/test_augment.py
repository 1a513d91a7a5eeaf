"""Draws of `Augment`: independent of each other and of their batch, with torchvision's geometry."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import ArrayLike, NDArray
from torchvision.transforms import functional as F

from fastflower.draws.augment import Augment
from fastflower.draws.draw import Draw
from fastflower.draws.geometry import corners, transform
from fastflower.errors import ArgumentError

SAMPLES = 4000
LAW = settings(deadline=None, max_examples=60, derandomize=True)

# Every augmentation, and the part of a Draw that it determines: (array, columns).
SWITCHED_ON: dict[str, Any] = {
    "crop": (0.1, 0.9),
    "flip": 0.5,
    "flip_vertical": 0.5,
    "rotate": 30.0,
    "affine_rotate": 20.0,
    "translate": (0.2, 0.1),
    "scale": (0.5, 1.5),
    "shear": (10.0, 20.0),
    "brightness": 0.4,
    "contrast": 0.3,
    "saturation": 0.2,
    "hue": 0.3,
    "grayscale": 0.4,
    "erase": 0.7,
}
DETERMINES: dict[str, tuple[str, Any]] = {
    **{name: (name, ...) for name in SWITCHED_ON},
    "crop": ("roi", ...),
    "flip": ("flip", (slice(None), 0)),
    "flip_vertical": ("flip", (slice(None), 1)),
    "grayscale": ("gray", ...),
}
EVERYTHING = Augment(**SWITCHED_ON)
ARRAYS = [field.name for field in fields(Draw) if field.name not in ("size", "move_first")]
GIVEN = {"image", "frame"}  # not drawn


def draw(augment: Augment, indices: ArrayLike, *, seed: int = 0, epoch: int = 0) -> Draw:
    """Draw for images with sizes derived from their indices."""
    numbers = np.asarray(indices)
    return augment.draw(seed, epoch, numbers, np.stack([200 + 7 * numbers % 91, 180 + 11 * numbers % 203], axis=-1))


def equal(one: Draw, other: Draw) -> bool:
    same = (one.size, one.move_first) == (other.size, other.move_first)
    return same and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


@pytest.mark.parametrize("seed", [0, 1, -5, 2**63])
@pytest.mark.parametrize("epoch", [0, 7])
def test_the_default_draws_nothing(seed: int, epoch: int) -> None:
    drawn = draw(Augment(), range(50), seed=seed, epoch=epoch)
    neutral = replace(
        drawn,
        flip=np.zeros((50, 2), bool),
        rotate=np.zeros(50),
        affine_rotate=np.zeros(50),
        translate=np.zeros((50, 2)),
        scale=np.ones(50),
        shear=np.zeros((50, 2)),
        brightness=np.ones(50),
        contrast=np.ones(50),
        saturation=np.ones(50),
        hue=np.zeros(50),
        gray=np.zeros(50, bool),
        erase=np.zeros((50, 4), np.int64),
    )
    assert equal(drawn, neutral)
    assert equal(drawn, draw(Augment(), range(50)))
    assert np.allclose(transform(drawn.matrix(), corners(np.tile([0.0, 0, 224, 224], (50, 1)))), corners(drawn.roi))


def test_a_draw_does_not_depend_on_its_batch() -> None:
    whole = draw(EVERYTHING, range(40), epoch=3)
    shuffled = np.random.default_rng(1).permutation(40)
    together = draw(EVERYTHING, shuffled, epoch=3)
    for name in ARRAYS:
        assert np.array_equal(getattr(together, name), getattr(whole, name)[shuffled])
    for index in range(40):
        assert equal(draw(EVERYTHING, [index], epoch=3), whole.take(slice(index, index + 1)))


def test_every_array_of_a_draw_is_covered_here() -> None:
    assert {array for array, _ in DETERMINES.values()} == set(ARRAYS) - GIVEN


@pytest.mark.parametrize("name", SWITCHED_ON)
def test_a_draw_does_not_depend_on_other_augmentations(name: str) -> None:
    alone = draw(Augment(**{name: SWITCHED_ON[name]}), range(200))
    together, nothing = draw(EVERYTHING, range(200)), draw(Augment(), range(200))
    array, columns = DETERMINES[name]
    assert np.array_equal(getattr(alone, array)[columns], getattr(together, array)[columns])
    assert not np.array_equal(getattr(alone, array)[columns], getattr(nothing, array)[columns])
    getattr(alone, array)[columns] = getattr(nothing, array)[columns]
    assert equal(alone, nothing)  # it determines nothing else


@pytest.mark.parametrize("name", SWITCHED_ON)
def test_draws_differ_by_epoch_seed_and_index(name: str) -> None:
    array, columns = DETERMINES[name]
    sizes = np.full((200, 2), 300)

    def drawn(seed: int, epoch: int, first: int) -> NDArray[Any]:
        return getattr(EVERYTHING.draw(seed, epoch, np.arange(first, first + 200), sizes), array)[columns]

    variants = [drawn(0, 0, 0), drawn(0, 1, 0), drawn(1, 0, 0), drawn(1, 1, 0), drawn(0, 0, 1000)]
    for number, one in enumerate(variants):
        for other in variants[:number]:
            assert (one != other).mean() > 0.1


def test_fixed_draws_the_same_in_every_epoch() -> None:
    fixed = replace(EVERYTHING, fixed=True)
    assert equal(draw(fixed, range(50), epoch=0), draw(fixed, range(50), epoch=9))
    assert not equal(draw(fixed, range(50)), draw(fixed, range(50), seed=1))
    assert not equal(draw(EVERYTHING, range(50), epoch=0), draw(EVERYTHING, range(50), epoch=9))


def test_taking_rows_keeps_their_numbers() -> None:
    whole, part = draw(EVERYTHING, range(40)), draw(EVERYTHING, range(40)).take(slice(10, 25))
    assert len(whole) == 40
    assert len(part) == 15
    assert equal(part, draw(EVERYTHING, range(10, 25)))


def test_no_two_drawn_numbers_are_correlated() -> None:
    drawn = replace(EVERYTHING, erase=1.0).draw(0, 0, np.arange(SAMPLES), np.full((SAMPLES, 2), 1000))
    roi, erase = drawn.roi, drawn.erase.astype(float)
    columns: dict[str, NDArray[Any]] = {
        "crop's area": roi[:, 2] * roi[:, 3],
        "crop's ratio": np.log(roi[:, 3] / roi[:, 2]),
        "crop's top": roi[:, 0] / np.maximum(1, 1000 - roi[:, 2]),
        "crop's left": roi[:, 1] / np.maximum(1, 1000 - roi[:, 3]),
        "erase's area": erase[:, 2] * erase[:, 3],
        "erase's top": erase[:, 0] / (224 - erase[:, 2]),
        "erase's left": erase[:, 1] / (224 - erase[:, 3]),
        "flip": drawn.flip[:, 0],
        "flip_vertical": drawn.flip[:, 1],
        "rotate": drawn.rotate,
        "affine_rotate": drawn.affine_rotate,
        "translate x": drawn.translate[:, 0],
        "translate y": drawn.translate[:, 1],
        "scale": drawn.scale,
        "shear x": drawn.shear[:, 0],
        "shear y": drawn.shear[:, 1],
        "brightness": drawn.brightness,
        "contrast": drawn.contrast,
        "saturation": drawn.saturation,
        "hue": drawn.hue,
        "gray": drawn.gray,
    }
    correlation = np.corrcoef(np.array(list(columns.values()), np.float64)) - np.eye(len(columns))
    worst = np.unravel_index(np.abs(correlation).argmax(), correlation.shape)
    # Rejecting rectangles that do not fit correlates area and ratio slightly. 0.08 is five standard deviations of zero.
    assert np.abs(correlation).max() < 0.08, [list(columns)[column] for column in worst]


@pytest.mark.parametrize("flip", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("angle", [0, 90, 180, -90])
@pytest.mark.parametrize(("affine_angle", "shift"), [(0, (0, 0)), (90, (0, 0)), (-90, (3, 1)), (0, (-2, 4))])
def test_right_angles_and_shifts_move_pixels_as_torchvision_does(
    flip: tuple[bool, bool], angle: int, affine_angle: int, shift: tuple[int, int]
) -> None:
    image = torch.arange(1.0, 12 * 15 + 1).reshape(1, 12, 15)
    drawn = replace(
        Augment(size=8).draw(0, 0, [0], [[12, 15]]),
        roi=np.array([[3.0, 5.0, 8.0, 8.0]]),
        flip=np.array([flip]),
        rotate=np.array([float(angle)]),
        affine_rotate=np.array([float(affine_angle)]),
        translate=np.array([shift], np.float64),
    )
    expected = F.crop(image, 3, 5, 8, 8)
    expected = F.hflip(expected) if flip[0] else expected
    expected = F.vflip(expected) if flip[1] else expected
    expected = F.affine(F.rotate(expected, angle), affine_angle, list(shift), 1.0, [0.0, 0.0])
    y, x = np.mgrid[:8, :8] + 0.5
    source = np.floor(transform(drawn.matrix(), np.stack([x, y], -1).reshape(1, -1, 2))[0]).astype(int)
    shown = ((source >= [5, 3]) & (source < [13, 11])).all(axis=1)
    pixels = np.where(shown, image[0].numpy()[source[:, 1].clip(0, 11), source[:, 0].clip(0, 14)], 0)
    assert np.array_equal(pixels.reshape(8, 8), expected[0].numpy())


def test_a_counterclockwise_rotation_moves_the_right_edge_to_the_top() -> None:
    """This is torchvision's rotate(+90). Its affine(+90) rotates clockwise."""
    drawn = Augment(size=10, crop=(1, 1), crop_ratio=(1, 1)).draw(0, 0, [0], [[10, 10]])
    frame = corners(np.array([[0.0, 0.0, 10.0, 10.0]]))
    turned = replace(drawn, rotate=np.array([90.0])).matrix()
    assert np.allclose(transform(turned, frame), [[[10, 0], [10, 10], [0, 10], [0, 0]]])
    other_way = replace(drawn, affine_rotate=np.array([90.0])).matrix()
    assert np.allclose(transform(other_way, frame), [[[0, 10], [0, 0], [10, 0], [10, 10]]])
    flipped = replace(drawn, flip=np.array([[True, False]])).matrix()
    assert np.allclose(transform(flipped, frame), [[[10, 0], [0, 0], [0, 10], [10, 10]]])


def test_one_draw_equals_the_recorded_one() -> None:
    drawn = replace(EVERYTHING, size=(160, 224), erase=1.0).draw(0, 0, [7], [[375, 500]])
    recorded: dict[str, Any] = {
        "roi": [95.0, 196.0, 249.0, 267.0],
        "flip": [True, False],
        "rotate": 4.657036017034798,
        "affine_rotate": -12.507787795853119,
        "translate": [-8.0, 1.0],
        "scale": 1.4739992766647612,
        "shear": [-9.530587610815477, -8.596104552578566],
        "brightness": 0.7147848205769822,
        "contrast": 0.8804469533232336,
        "saturation": 1.1210060640989918,
        "hue": -0.13877230073635266,
        "gray": False,
        "erase": [6, 2, 92, 49],
    }
    assert drawn.size == (160, 224)
    assert recorded.keys() == set(ARRAYS) - GIVEN
    for name, value in recorded.items():
        assert np.allclose(getattr(drawn, name)[0], value, rtol=1e-14, atol=0), name


def test_erased_levels_are_those_that_normalize_to_the_value() -> None:
    augment = Augment(erase_value=(0.5, -0.25, 1.0))
    image = torch.tensor(augment.erase_levels).reshape(3, 1, 1) / 255
    mean, std = map(list, augment.normalization)
    value = F.normalize(image, mean, std).flatten().tolist()
    assert value == pytest.approx(augment.erase_value, abs=1e-6)
    assert Augment(erase_value=(99.0, -99.0, 0.0)).erase_levels == pytest.approx((255, 0, 255 * 0.406))


def test_sizes_are_pairs_or_squares() -> None:
    assert Augment(size=96).output_size == (96, 96)
    assert Augment(size=(96, 128)).output_size == (96, 128)
    assert draw(Augment(size=(96, 128)), [0]).size == (96, 128)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("size", 0, "one or two integers, each at least 1"),
        ("size", (224, 0), "one or two integers, each at least 1"),
        ("resize", 0, "one or two integers, each at least 1, or 'off'"),
        ("resize", (-1, 256), "one or two integers, each at least 1, or 'off'"),
        ("flip", 1.5, "a probability in [0, 1]"),
        ("flip", -0.1, "a probability in [0, 1]"),
        ("flip", float("nan"), "a probability in [0, 1]"),
        ("flip_vertical", 2, "a probability in [0, 1]"),
        ("grayscale", 1.1, "a probability in [0, 1]"),
        *((f"{name}_probability", -0.1, "a probability in [0, 1]") for name in ("rotate", "affine", "jitter")),
        ("padding", -1, "an integer, at least 0"),
        ("padding", 4, "0 unless random_crop is True"),
        ("padding_mode", "wrap", "one of constant, edge"),
        ("erase", -1, "a probability in [0, 1]"),
        ("rotate", -10, "a number, 0 or more"),
        ("rotate", float("inf"), "a number, 0 or more"),
        ("affine_rotate", -1, "a number, 0 or more"),
        *((name, value, "a number, 0 or more") for name, value in (("brightness", -0.2), ("contrast", float("nan")))),
        ("hue", 0.6, "a number in [0, 0.5]"),
        ("hue", -0.1, "a number in [0, 0.5]"),
        ("translate", (1.1, 0.0), "two fractions in [0, 1]"),
        ("translate", (0.0, -0.1), "two fractions in [0, 1]"),
        ("shear", (90.0, 0.0), "two angles in [0, 90) degrees"),
        ("shear", (0.0, -5.0), "two angles in [0, 90) degrees"),
        ("crop", (0.0, 1.0), "(min, max) with 0 < min <= max <= 1"),
        ("crop", (0.5, 0.4), "(min, max) with 0 < min <= max <= 1"),
        ("crop", (0.5, 1.1), "(min, max) with 0 < min <= max <= 1"),
        ("crop_ratio", (1.2, 1.1), "(min, max) with 0 < min <= max"),
        ("crop_ratio", (1.0, float("inf")), "(min, max) with 0 < min <= max"),
        ("scale", (0.0, 1.0), "(min, max) with 0 < min <= max"),
        ("erase_area", (0.3, 0.2), "(min, max) with 0 < min <= max <= 1"),
        ("erase_area", (0.3, 1.2), "(min, max) with 0 < min <= max <= 1"),
        ("erase_ratio", (-1.0, 2.0), "(min, max) with 0 < min <= max"),
        ("fill", "white", "one of black, photo"),
        ("std", (0.2, 0.0, 0.2), "three numbers above 0"),
        ("size", 64.5, "one or two integers, each at least 1"),
        ("resize", (64, 64, 64), "one or two integers, each at least 1, or 'off'"),
        ("translate", (0.1,), "two fractions in [0, 1]"),
        ("shear", (1, 2, 3), "two angles in [0, 90) degrees"),
        *((name, (0.1, 0.2, 0.3), "(min, max) with 0 < min <= max <= 1") for name in ("crop", "erase_area")),
        *((name, (1,), "(min, max) with 0 < min <= max") for name in ("crop_ratio", "scale", "erase_ratio")),
        ("scale", None, "(min, max) with 0 < min <= max"),
        ("std", (0.5,), "three numbers above 0"),
        *((name, (0.5,), "three numbers (red, green, blue)") for name in ("mean", "erase_value")),
        ("mean", 0.5, "three numbers (red, green, blue)"),
        ("mean", ("0", "0", "0"), "three numbers (red, green, blue)"),
    ],
)
def test_a_field_outside_its_rule_is_refused(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ArgumentError, match="Augment") as error:
        Augment(**{field: value})
    assert str(error.value) == f"Augment.{field} must be {rule}, got {value!r}."


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop", (1.0, 1.0)),
        ("hue", 0.5),
        ("flip", 1),
        ("translate", (1.0, 1.0)),
        ("erase_area", (0.1, 1.0)),
        ("size", 1),
    ],
)
def test_the_ends_of_a_range_are_allowed(field: str, value: Any) -> None:
    assert getattr(Augment(**{field: value}), field) == value
