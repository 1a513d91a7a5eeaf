"""What the warps of a draw show: the visible part, its blur, and the pixels that they read."""

from dataclasses import replace

import numpy as np
import pytest
from test_augment import SWITCHED_ON

from fastflower.draws.augment import Augment
from fastflower.draws.geometry import are_whole, corners


@pytest.mark.parametrize("fill", ["black", "photo"])
def test_fill_decides_what_is_visible(fill: str) -> None:
    sizes = np.array([[300, 400], [90, 500]])
    drawn = Augment(crop=(0.1, 0.2), rotate=30).draw(0, 0, [0, 1], sizes)
    expected = drawn.roi if fill == "black" else [[0, 0, 300, 400], [0, 0, 90, 500]]
    assert np.array_equal(drawn.warp(fill, "constant").visible, expected)


def test_a_crop_beyond_the_image_shows_only_the_image() -> None:
    drawn = Augment(resize=112, size=224).draw(0, 0, [0, 1], [[100, 100], [1, 1]])
    assert np.allclose(drawn.roi, [[-50, -50, 200, 200], [-0.5, -0.5, 2, 2]])
    warp = drawn.warp("black", "constant")
    assert np.array_equal(warp.visible, [[0, 0, 100, 100], [0, 0, 1, 1]])
    assert np.allclose(warp.quad, corners(np.array([[56.0, 56.0, 112.0, 112.0]] * 2)))
    assert warp.masked.all()


def test_each_resampling_of_torchvision_adds_half_a_triangle_to_the_footprint() -> None:
    drawn = Augment(size=20, crop=(1, 1), crop_ratio=(1, 1)).draw(0, 0, range(6), np.full((6, 2), 20))
    moved = replace(
        drawn,
        rotate=np.array([0, 5, 5, 5, 0, 0.0]),
        affine_rotate=np.array([0, 0, 5, 0, 0, 0.0]),
        shear=np.array([[0, 0], [0, 0], [0, 0], [0, 0], [0, 9], [0, 0.0]]),
        translate=np.array([[0, 0]] * 5 + [[3, 2.0]]),
    )
    footprint = moved.warp("black", "constant").footprint
    assert np.allclose(footprint[[0, 1, 2, 3, 5]], np.array([1, 1.5, 2, 1.5, 1])[:, None])
    assert footprint[4].min() >= 1.5


def test_before_the_crop_each_resampling_adds_a_whole_triangle_of_the_resized_image() -> None:
    """A rotation of an image that is resized from 40 x 80 to 20 x 20 blurs by 2 x 4 of its pixels, and a crop keeps that."""
    drawn = Augment(size=10, resize=(20, 20), rotate=9, move_first=True).draw(0, 0, [0, 1], [[40, 80]] * 2)
    for angle, expected in ((0.0, [4, 16]), (90.0, [8, 32]), (180.0, [8, 32])):
        footprint = replace(drawn, rotate=np.full(2, angle)).warp("black", "constant").footprint
        assert np.allclose(footprint, expected)


@pytest.mark.parametrize("fill", ["black", "photo"])
@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop=(0.5, 1.0), scale=(0.1, 0.1), translate=(1.0, 1.0), affine_rotate=180),
        Augment(rotate=180, scale=(0.05, 20.0), shear=(80.0, 80.0), translate=(1.0, 1.0)),
        Augment(resize=20),
        Augment(size=300, resize="off", random_crop=True, padding=9, padding_mode="edge"),
        Augment(move_first=True, crop=(0.1, 1.0), rotate=180, translate=(1.0, 1.0), scale=(0.1, 4.0)),
    ],
)
def test_no_draw_reads_outside_its_image(augment: Augment, fill: str) -> None:
    sizes = np.random.default_rng(0).integers(1, 400, (500, 2))
    region = augment.draw(0, 0, np.arange(500), sizes).warp(fill, "constant").region
    assert (region[:, :2] >= 0).all()
    assert (region[:, 2:] >= 1).all()
    assert (region[:, :2] + region[:, 2:] <= sizes).all()


@pytest.mark.parametrize("name", SWITCHED_ON)
def test_moves_is_true_if_rotation_shift_scale_or_shear_is_drawn(name: str) -> None:
    augment = Augment(**{name: SWITCHED_ON[name]})
    moving = {"rotate", "affine_rotate", "translate", "scale", "shear"}
    assert augment.moves == (name in moving)
    assert not Augment().moves


@pytest.mark.parametrize(
    "augment",
    [
        Augment(),
        Augment(resize=224),
        Augment(resize=223),
        Augment(resize=(300, 200)),
        Augment(resize=(300, 200), size=(300, 200)),
        Augment(resize=250, size=(200, 300)),
        Augment(resize=100, crop=(0.1, 1.0)),
        Augment(resize="off"),
        Augment(random_crop=True),
        Augment(random_crop=True, resize=100),
        Augment(random_crop=True, padding=4),
        Augment(random_crop=True, padding=40, padding_mode="edge"),
        Augment(random_crop=True, padding=40, padding_mode="edge", fill="photo"),
        Augment(crop=(0.5, 1.0), rotate=5, move_first=True),
        Augment(flip=0.5, flip_vertical=0.5, brightness=0.5, erase=0.5),
        *(Augment(**{name: SWITCHED_ON[name]}) for name in ("crop", "rotate", "affine_rotate", "translate", "scale")),
        Augment(shear=(0.0, 5.0)),
        Augment(crop=(0.5, 1.0), rotate=5),
    ],
)
def test_uncovers_is_true_if_some_output_shows_pixels_outside(augment: Augment) -> None:
    sizes = np.random.default_rng(0).integers(30, 900, (500, 2))
    masked = augment.draw(0, 0, np.arange(500), sizes).warp("black", augment.padding_mode).masked
    assert masked.any() == augment.uncovers


def test_upright_rectangles_of_whole_pixels_are_told_from_others() -> None:
    rectangle = np.array([[[2.0, 3.0], [9.0, 3.0], [9.0, 7.0], [2.0, 7.0]]])
    flipped, far = rectangle[:, [1, 0, 3, 2]], rectangle - 1e6
    for quad in (rectangle, flipped, far, rectangle + 1e-5):
        assert are_whole(quad).tolist() == [True]
    turned = np.array([[[5.0, 0.0], [10.0, 5.0], [5.0, 10.0], [0.0, 5.0]]])
    sheared = rectangle + np.array([[1, 0], [1, 0], [0, 0], [0, 0]])
    for quad in (turned, sheared, rectangle + 0.5, rectangle * [1, 1.1]):
        assert are_whole(quad).tolist() == [False]
