"""Warps compared with Pillow, OpenCV and torchvision, and by brute force with the pixels that they read and show."""

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.functional import _get_inverse_affine_matrix

from fastflower.draws.geometry import (
    MIN_VARIANCE,
    affine,
    blur_kernels,
    blur_variance,
    compose,
    corners,
    flips,
    footprints,
    grow,
    intersect,
    invert,
    plan,
    resized_crop,
    shrink_factors,
    transform,
    whole_kernel,
)

Floats = NDArray[np.float64]

LAW = settings(deadline=None, max_examples=60, derandomize=True)
IDENTITY = np.array([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
# Tolerance in pixels for properties that hold up to rounding.
EXACT = 1e-7


def turned(angle: float, size: tuple[int, int], *, shift: tuple[float, float] = (0, 0), scale: float = 1) -> Floats:
    """Return a warp (1, 2, 3) that rotates clockwise, shifts and scales."""
    return affine(np.array([angle]), np.array([shift]), np.array([scale]), np.zeros((1, 2)), size)


@st.composite
def warps(draw: st.DrawFn) -> Floats:
    """Draw a warp (1, 2, 3) of a 40 x 60 destination: a crop, with or without flips, and an affine."""
    numbers = st.floats(-1, 1, allow_subnormal=False)
    roi = [draw(st.floats(0, 200)), draw(st.floats(0, 200)), draw(st.floats(5, 300)), draw(st.floats(5, 300))]
    flip = np.array([[draw(st.booleans()), draw(st.booleans())]])
    moved = affine(
        np.array([draw(numbers) * 180]),
        np.array([[draw(numbers) * 50, draw(numbers) * 50]]),
        np.array([draw(st.floats(0.3, 3))]),
        np.array([[draw(numbers) * 40, draw(numbers) * 40]]),
        (40, 60),
    )
    return compose(resized_crop(np.array([roi]), (40, 60)), compose(flips(flip, (40, 60)), moved))


def pillow_warp(image: Floats, matrix: Floats, size: tuple[int, int]) -> Floats:
    """Warp with Pillow by a destination-to-source matrix (2, 3). Its pixel centers are also at +0.5."""
    data = tuple(matrix.ravel().tolist())
    source = Image.fromarray(image.astype(np.float32))
    return np.asarray(
        source.transform((size[1], size[0]), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR), np.float64
    )


def smooth_image(height: int, width: int) -> Floats:
    y, x = np.mgrid[:height, :width] + 0.5
    return 128 + 60 * np.sin(x / 17) * np.cos(y / 13) + 40 * np.sin((x + 2 * y) / 29)


@LAW
@given(warps())
def test_a_warp_and_its_inverse_compose_to_the_identity(matrix: Floats) -> None:
    assert np.allclose(compose(invert(matrix), matrix), IDENTITY, atol=EXACT)
    assert np.allclose(compose(matrix, invert(matrix)), IDENTITY, atol=EXACT)


@LAW
@given(warps(), warps(), warps())
def test_composition_is_associative(one: Floats, two: Floats, three: Floats) -> None:
    left, right = compose(compose(one, two), three), compose(one, compose(two, three))
    assert np.allclose(left, right, rtol=1e-9, atol=1e-6)


@LAW
@given(warps(), warps())
def test_a_composed_warp_maps_points_through_inner_then_outer(outer: Floats, inner: Floats) -> None:
    points = np.array([[[0.0, 0.0], [60.0, 40.0], [12.5, 7.25], [-3.0, 80.0]]])
    together = transform(compose(outer, inner), points)
    assert np.allclose(together, transform(outer, transform(inner, points)), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("flip", [(False, False), (True, False), (False, True), (True, True)])
def test_flipping_twice_is_the_identity(flip: tuple[bool, bool]) -> None:
    matrix = flips(np.array([flip]), (30, 50))
    assert np.allclose(compose(matrix, matrix), IDENTITY)
    point = transform(matrix, np.array([[[10.0, 4.0]]]))[0, 0]
    assert point.tolist() == [40 if flip[0] else 10, 26 if flip[1] else 4]


@pytest.mark.parametrize("angle", [360.0, -360.0, 720.0])
def test_a_full_turn_is_the_identity(angle: float) -> None:
    assert np.allclose(turned(angle, (30, 50)), IDENTITY, atol=EXACT)


def test_four_quarter_turns_are_the_identity_and_one_is_not() -> None:
    quarter = turned(90, (30, 50))
    half = compose(quarter, quarter)
    assert np.allclose(half, turned(180, (30, 50)), atol=EXACT)
    assert np.allclose(compose(half, half), IDENTITY, atol=EXACT)
    # Clockwise: the point right of the center (25, 15) comes from above it.
    assert np.allclose(transform(quarter, np.array([[[35.0, 15.0]]])), [[[25.0, 5.0]]])


@LAW
@given(
    angle=st.floats(-360, 360),
    shift=st.tuples(st.floats(-99, 99), st.floats(-99, 99)),
    scale=st.floats(0.2, 5),
    shear=st.tuples(st.floats(-60, 60), st.floats(-60, 60)),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
)
def test_affine_equals_torchvision(
    angle: float, shift: tuple[float, float], scale: float, shear: tuple[float, float], size: tuple[int, int]
) -> None:
    ours = affine(np.array([angle]), np.array([shift]), np.array([scale]), np.array([shear]), size)
    # torchvision's center for PIL images, with pixel centers at +0.5.
    about: Any = ([size[1] / 2, size[0] / 2], angle, list(shift), scale, list(shear))
    points = np.array([[[0.0, 0.0], [size[1], size[0]], [size[1], 0.0], [17.5, -3.0]]])
    inverse = np.reshape(_get_inverse_affine_matrix(*about), (1, 2, 3))
    assert np.allclose(transform(ours, points), transform(inverse, points), rtol=1e-9, atol=1e-6)
    forward = np.reshape(_get_inverse_affine_matrix(*about, inverted=False), (1, 2, 3))
    assert np.allclose(transform(forward, transform(ours, points)), points, rtol=1e-6, atol=1e-5)


def test_a_resized_crop_maps_corners_to_corners() -> None:
    rois = np.array([[10.0, 20.0, 100.0, 50.0], [0.5, -3.0, 7.25, 9.0]])
    matrices = resized_crop(rois, (30, 60))
    frame = np.broadcast_to(corners(np.array([0.0, 0.0, 30.0, 60.0])), (2, 4, 2))
    assert np.allclose(transform(matrices, frame), corners(rois))
    assert corners(rois)[0].tolist() == [[20, 10], [70, 10], [70, 110], [20, 110]]


def test_pillow_opencv_and_a_matrix_share_one_pixel_convention() -> None:
    image, size = smooth_image(90, 120), (64, 80)
    matrix = compose(resized_crop(np.array([[12.0, 17.0, 60.0, 75.0]]), size), turned(11, size))[0]
    pillow = pillow_warp(image, matrix, size)
    centered = matrix.copy()
    centered[:, 2] += matrix[:, :2].sum(axis=1) / 2 - 0.5  # OpenCV's pixel centers are at integers
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    opencv = cv2.warpAffine(image.astype(np.float32), centered, size[::-1], flags=flags)
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    source = transform(matrix[None], np.stack([x, y], axis=-1).reshape(1, -1, 2))[0] - 0.5
    cell = np.floor(source).astype(int)
    inner = ((cell >= 0) & (cell + 1 < [120, 90])).all(axis=1)
    cell, share = cell[inner], (source - cell)[inner]
    rows, columns = cell[:, 1], cell[:, 0]
    above = image[rows, columns] * (1 - share[:, 0]) + image[rows, columns + 1] * share[:, 0]
    below = image[rows + 1, columns] * (1 - share[:, 0]) + image[rows + 1, columns + 1] * share[:, 0]
    expected = above * (1 - share[:, 1]) + below * share[:, 1]
    assert inner.mean() > 0.9
    assert np.abs(pillow.ravel()[inner] - expected).max() < 0.01
    assert np.abs(opencv.ravel()[inner] - expected).max() < 0.3  # OpenCV rounds positions to a 32nd of a pixel
    # Another pixel convention would fail.
    assert np.abs(pillow_warp(image, centered, size).ravel()[inner] - expected).max() > 0.5


def test_one_composed_warp_is_close_to_two_warps_by_pillow() -> None:
    image = smooth_image(200, 200)
    outer = compose(
        resized_crop(np.array([[15.0, 10.0, 170.0, 160.0]]), (150, 150)), flips(np.array([[True, False]]), (150, 150))
    )
    inner = turned(25, (150, 150), shift=(6, -9), scale=1.2)
    twice = pillow_warp(pillow_warp(image, outer[0], (150, 150)), inner[0], (150, 150))
    once = pillow_warp(image, compose(outer, inner)[0], (150, 150))
    shown = (twice > 0) & (once > 0)
    shown = cv2.erode(shown.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert shown.mean() > 0.7
    assert np.abs(twice - once)[shown].max() < 1
    wrong = pillow_warp(image, compose(inner, outer)[0], (150, 150))
    assert np.abs(twice - wrong)[shown].max() > 20


@pytest.mark.parametrize(
    ("matrix", "lands"),
    [
        pytest.param(IDENTITY, (10, 4), id="identity"),
        pytest.param(turned(0, (41, 41), shift=(5, -3)), (15, 1), id="translated right and up"),
        pytest.param(turned(90, (41, 41)), (36, 10), id="rotated clockwise"),
        pytest.param(turned(-90, (41, 41)), (4, 30), id="rotated counterclockwise"),
        pytest.param(turned(0, (41, 41), scale=0.5), (15, 12), id="shrunk about the center"),
        pytest.param(flips(np.array([[True, False]]), (41, 41)), (30, 4), id="flipped horizontally"),
        pytest.param(flips(np.array([[False, True]]), (41, 41)), (10, 36), id="flipped vertically"),
        pytest.param(resized_crop(np.array([[2.0, 7.0, 41.0, 41.0]]), (41, 41)), (3, 2), id="cropped"),
    ],
)
def test_one_bright_pixel_lands_where_the_matrix_says(matrix: Floats, lands: tuple[int, int]) -> None:
    image = np.zeros((41, 41))
    image[4, 10] = 1
    shown = pillow_warp(image, matrix[0], (41, 41))
    assert np.unravel_index(int(shown.argmax()), shown.shape) == lands[::-1]
    assert np.allclose(transform(invert(matrix), np.array([[[10.5, 4.5]]])), [[np.array(lands) + 0.5]], atol=0.26)


def holds(quad: Floats, point: tuple[float, float]) -> bool:
    """Return True if the point is inside: a ray from it crosses the outline an odd number of times (even-odd rule)."""
    inside = False
    for (x0, y0), (x1, y1) in zip(quad, np.roll(quad, -1, axis=0), strict=True):
        if (y0 > point[1]) != (y1 > point[1]) and point[0] < x0 + (point[1] - y0) / (y1 - y0) * (x1 - x0):
            inside = not inside
    return inside


def test_masked_agrees_with_a_point_in_polygon_test(rng: np.random.Generator) -> None:
    size, count = (30, 50), 600
    visible = np.concatenate([rng.uniform(-40, 10, (count, 2)), rng.uniform(20, 140, (count, 2))], axis=1)
    moved = affine(
        rng.uniform(-180, 180, count), np.zeros((count, 2)), np.ones(count), rng.uniform(-30, 30, (count, 2)), size
    )
    moved[::3] = compose(flips(np.array([[True, False]]), size), moved[::3])
    warp = plan(moved, visible, visible, size, footprints(moved))
    frame = [(0.0, 0.0), (50.0, 0.0), (50.0, 30.0), (0.0, 30.0)]
    expected = np.array([all(holds(quad, point) for point in frame) for quad in warp.quad])
    assert 0.1 < expected.mean() < 0.9
    assert np.array_equal(~warp.masked, expected)


@pytest.mark.parametrize("flipped", [True, False])
def test_coinciding_edges_leave_nothing_black(flipped: bool) -> None:
    visible = np.array([[0, 0, 30, 50], [0, 0, 30, 49.99], [0.01, 0, 29.99, 50], [-1, -1, 32, 52]], np.float64)
    matrix = flips(np.full((4, 2), flipped), (30, 50))
    assert plan(matrix, visible, visible, (30, 50), footprints(matrix)).masked.tolist() == [False, True, True, False]


@LAW
@given(warps(), st.floats(0.1, 20))
def test_grow_moves_every_edge_outward_by_the_distance(matrix: Floats, distance: float) -> None:
    quad = transform(matrix, corners(np.array([[0.0, 0.0, 40.0, 60.0]])))
    grown = grow(quad, distance)[0]
    for start in range(4):
        a, b = quad[0, start], quad[0, (start + 1) % 4]
        normal = np.array([b[1] - a[1], a[0] - b[0]]) / np.linalg.norm(b - a)
        outwards = np.sign((a - quad[0].mean(axis=0)) @ normal)
        moved = [outwards * float((grown[corner % 4] - a) @ normal) for corner in (start, start + 1)]
        assert np.allclose(moved, distance, rtol=1e-6)


def test_intersect_gives_the_common_pixels(rng: np.random.Generator) -> None:
    def pixels(rectangle: Floats) -> set[tuple[int, int]]:
        top, left, height, width = rectangle.astype(int).tolist()
        return {(y, x) for y in range(top, top + height) for x in range(left, left + width)}

    one, other = (
        np.concatenate([rng.integers(-5, 9, (300, 2)), rng.integers(1, 12, (300, 2))], 1).astype(float)
        for _ in range(2)
    )
    disjoint = 0
    for left, right, common in zip(one, other, intersect(one, other), strict=True):
        expected = pixels(left) & pixels(right)
        if expected:
            assert pixels(common) == expected
        else:
            disjoint += 1
            assert len(pixels(common)) >= 1
            assert pixels(common) <= pixels(left)
    assert 10 < disjoint < 290


def test_the_identity_needs_one_pixel_and_masks_nothing() -> None:
    image = np.array([[0.0, 0.0, 40.0, 60.0]])
    warp = plan(IDENTITY, image, image, (40, 60), footprints(IDENTITY))
    assert warp.footprint.tolist() == [[1, 1]]
    assert warp.masked.tolist() == [False]
    assert warp.region.tolist() == [[0, 0, 40, 60]]
    assert np.array_equal(warp.matrix, IDENTITY)
    assert np.array_equal(warp.whole, IDENTITY)
    assert np.allclose(warp.quad, corners(image))


@LAW
@given(matrix=warps(), height=st.integers(1, 300), width=st.integers(1, 300), cut=st.floats(0, 0.5))
def test_the_region_is_inside_the_image_and_contains_all_needed_pixels(
    matrix: Floats, height: int, width: int, cut: float
) -> None:
    size = (40, 60)
    visible = np.array([[height * cut / 2, width * cut, height * (1 - cut), width * (1 - cut)]])
    warp = plan(matrix, visible, visible, size, footprints(matrix))
    top, left, rows, columns = warp.region[0].tolist()
    assert 0 <= top < top + rows <= height
    assert 0 <= left < left + columns <= width
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    source = transform(matrix, np.stack([x, y], axis=-1).reshape(1, -1, 2))[0]
    assert np.allclose(source, transform(warp.matrix, np.stack([x, y], axis=-1).reshape(1, -1, 2))[0] + [left, top])
    # Interpolation reads both neighbors of a point. The filter before it reads a destination pixel's width further.
    reach = np.sqrt(warp.footprint[0, ::-1])
    first, last = np.floor(source - 0.5 - reach), np.floor(source - 0.5 + reach) + 1
    start = np.floor(visible[0, 1::-1] + 1e-6)
    stop = np.ceil(visible[0, 1::-1] + visible[0, :1:-1] - 1e-6) - 1
    needed = np.clip(np.stack([first, last]), start, stop).astype(int)
    assert needed[..., 0].min() >= left
    assert needed[..., 0].max() < left + columns
    assert needed[..., 1].min() >= top
    assert needed[..., 1].max() < top + rows


def test_the_region_of_a_small_crop_is_not_the_whole_image() -> None:
    matrix = resized_crop(np.array([[500.0, 700.0, 40.0, 60.0]]), (40, 60))
    image = np.array([[0.0, 0.0, 2000.0, 3000.0]])
    warp = plan(matrix, image, image, (40, 60), footprints(matrix))
    assert warp.region.tolist() == [[496, 696, 48, 68]]


@LAW
@given(warps())
def test_the_footprint_is_the_extent_of_a_destination_pixel(matrix: Floats) -> None:
    down, across = footprints(matrix)[0]
    steps = np.diff(transform(matrix, np.array([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]]))[0], axis=0)
    assert np.isclose(across, (steps[:, 0] ** 2).sum())
    assert np.isclose(down, (steps[:, 1] ** 2).sum())


@LAW
@given(warps())
def test_a_warp_is_masked_where_a_destination_corner_shows_nothing(matrix: Floats) -> None:
    image = np.array([[0.0, 0.0, 200.0, 250.0]])
    warp = plan(matrix, image, image, (40, 60), footprints(matrix))
    seen = transform(matrix, corners(np.array([[0.0, 0.0, 40.0, 60.0]])))[0]
    outside = np.maximum(-seen, seen - [250, 200]).max()
    if abs(outside) > 1e-3:
        assert warp.masked[0] == (outside > 0)
    assert np.allclose(transform(matrix, warp.quad), corners(image), atol=1e-5)


def test_nothing_is_shrunk_below_a_reduction_by_four() -> None:
    factors = np.array([[0.1, 1.0], [2.0, 3.0], [3.99, 3.9999]])
    assert (shrink_factors(factors**2) == 1).all()


@LAW
@given(st.floats(4, 500))
def test_a_destination_pixel_covers_two_to_four_shrunken_pixels(reduction: float) -> None:
    left, unchanged = reduction / shrink_factors(np.array([[reduction**2, 1.0]]))[0]
    assert (2 - 1e-9 <= left < 4 + 1e-9, unchanged) == (True, reduction)


def blur_kernel_of(variance: float) -> NDArray[np.float64]:
    return whole_kernel(blur_kernels(np.array([variance, variance]))[0])


@LAW
@given(st.floats(MIN_VARIANCE, 3.9))
def test_a_blur_kernel_has_the_variance_asked_for(variance: float) -> None:
    kernel = blur_kernel_of(variance)
    assert np.array_equal(kernel, kernel[::-1])
    assert (kernel >= -1e-6).all()
    assert np.isclose(kernel.sum(), 1, atol=1e-6)
    assert np.isclose((kernel * (np.arange(len(kernel)) - len(kernel) // 2) ** 2).sum(), variance, rtol=1e-4)
    assert (np.diff(kernel[len(kernel) // 2 :]) < 0).all()  # decreases toward the ends, like a triangle


@pytest.mark.parametrize(("reduction", "weights"), [(2, [1, 2, 1]), (3, [1, 2, 3, 2, 1]), (4, [1, 2, 3, 4, 3, 2, 1])])
def test_for_an_integer_reduction_the_kernel_is_a_triangle(reduction: int, weights: list[int]) -> None:
    kernel = blur_kernel_of(blur_variance(np.array([[reduction**2, 1.0]]), np.ones((1, 2), np.int64))[0, 0])
    kernel = kernel[np.abs(kernel) > 1e-6]
    assert np.allclose(kernel, np.array(weights) / sum(weights), atol=1e-6)


@pytest.mark.parametrize("reduction", [2, 3, 4])
def test_kernel_and_interpolation_equal_pillows_reduction(rng: np.random.Generator, reduction: int) -> None:
    row = rng.uniform(0, 255, 30 * reduction)
    image = Image.fromarray(row[None].astype(np.float32))
    expected = np.asarray(image.resize((30, 1), Image.Resampling.BILINEAR))[0]
    variance = blur_variance(np.array([[reduction**2, 1.0]]), np.ones((1, 2), np.int64))
    assert variance[0, 1] == 0  # as many pixels as before: nothing to blur
    blurred = np.convolve(row, blur_kernel_of(variance[0, 0]), mode="same")
    centers = (np.arange(30) + 0.5) * reduction - 0.5
    shrunken = np.interp(centers, np.arange(len(row)), blurred)
    assert np.abs(shrunken - expected)[3:-3].max() < 0.01


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.floats(0.01, 1e5))
def test_box_kernel_and_interpolation_have_the_variance_of_the_footprint(footprint: float) -> None:
    shrink = shrink_factors(np.array([[footprint, footprint]]))
    blur = blur_variance(np.array([[footprint, footprint]]), shrink)[0, 0]
    boxes = int(shrink[0, 0])
    box, interpolation, kernel_variance = np.var(np.arange(boxes)), boxes**2 / 6, 0.0
    if blur:
        kernel = blur_kernel_of(blur)
        kernel_variance = boxes**2 * float((kernel * (np.arange(len(kernel)) - len(kernel) // 2) ** 2).sum())
    total = box + kernel_variance + interpolation
    if blur:
        assert np.isclose(total, footprint / 6, rtol=1e-4)
    else:  # magnified, or too little is missing to be worth a pass
        assert footprint / 6 - MIN_VARIANCE <= total * (boxes == 1)
