"""Crop, flip, rotation, translation, scale and shear as one matrix.

A warp matrix maps destination to source: 2x3, columns (x, y), in pixels whose centres lie at +0.5 (a pixel covers
[i, i+1)). Angles are degrees at the interface and radians nowhere else than here. Shape suffixes: N batch, 2/3 matrix
rows and columns, P points.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# A residual blur below this weight changes the photographs' mean grey level by less than 0.1 and costs a tenth of the time.
MIN_BLUR = 0.01


def compose(outer_N23: Floats, inner_N23: Floats) -> Floats:
    """The warp that applies `inner` to a destination point first, then `outer` to what it gave: outer o inner."""
    linear = outer_N23[..., :2] @ inner_N23[..., :2]
    offset = outer_N23[..., :2] @ inner_N23[..., 2:] + outer_N23[..., 2:]
    return np.concatenate([linear, offset], axis=-1)


def invert(matrix_N23: Floats) -> Floats:
    """The warp that undoes `matrix`: source to destination."""
    linear = np.linalg.inv(matrix_N23[..., :2])
    return np.concatenate([linear, -linear @ matrix_N23[..., 2:]], axis=-1)


def transform(matrix_N23: Floats, points_NP2: Floats) -> Floats:
    """Map points (x, y), (N, P, 2), through the warps."""
    return points_NP2 @ np.swapaxes(matrix_N23[..., :2], -1, -2) + matrix_N23[..., None, :, 2]


def resized_crop(roi_N4: Floats, size: tuple[int, int]) -> Floats:
    """Stretch the ROI (top, left, height, width) of the source over a destination of `size`."""
    top, left, height, width = np.moveaxis(roi_N4, -1, 0)
    zero = np.zeros_like(top)
    rows = [[width / size[1], zero, left], [zero, height / size[0], top]]
    return np.moveaxis(np.array(rows), -1, 0)


def flips(flip_N2: NDArray[np.bool_], size: tuple[int, int]) -> Floats:
    """Mirror left-right where flip[:, 0], upside down where flip[:, 1]."""
    sign = np.where(flip_N2, -1.0, 1.0)
    matrix = np.zeros((*flip_N2.shape[:-1], 2, 3))
    matrix[..., 0, 0], matrix[..., 1, 1] = sign[..., 0], sign[..., 1]
    matrix[..., 0, 2] = np.where(flip_N2[..., 0], size[1], 0.0)
    matrix[..., 1, 2] = np.where(flip_N2[..., 1], size[0], 0.0)
    return matrix


def affine(
    angle_N: Floats, translate_N2: Floats, scale_N: Floats, shear_N2: Floats, size: tuple[int, int]
) -> Floats:
    """Rotate by `angle` (degrees, clockwise), scale and shear about the centre of `size`, then translate by pixels (x, y).

    The inverse of the forward map T(translate) C R(angle) Shear(shear) Scale(scale) C^-1, in the closed form of
    torchvision's `_get_inverse_affine_matrix` (torchvision/transforms/functional.py); shear is (x, y) in degrees.
    """
    rotation = np.radians(angle_N)
    shear_x, shear_y = np.radians(shear_N2[..., 0]), np.radians(shear_N2[..., 1])
    a = np.cos(rotation - shear_y) / np.cos(shear_y)
    b = -np.cos(rotation - shear_y) * np.tan(shear_x) / np.cos(shear_y) - np.sin(rotation)
    c = np.sin(rotation - shear_y) / np.cos(shear_y)
    d = -np.sin(rotation - shear_y) * np.tan(shear_x) / np.cos(shear_y) + np.cos(rotation)
    linear = np.moveaxis(np.array([[d, -b], [-c, a]]) / scale_N, -1, 0)
    centre = np.array([size[1] / 2, size[0] / 2])
    offset = centre - np.einsum("nij,nj->ni", linear, centre + translate_N2)
    return np.concatenate([linear, offset[..., None]], axis=-1)


def corners(rectangle_N4: Floats) -> Floats:
    """The corners (x, y) of rectangles (top, left, height, width), clockwise from the top left, (N, 4, 2)."""
    top, left, height, width = np.moveaxis(rectangle_N4, -1, 0)
    right, bottom = left + width, top + height
    points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return np.stack([np.stack(point, axis=-1) for point in points], axis=-2)


def intersect(one_N4: Floats, other_N4: Floats) -> Floats:
    """The common part of rectangles (top, left, height, width); at least one pixel high and wide."""
    start = np.maximum(one_N4[..., :2], other_N4[..., :2])
    stop = np.minimum(one_N4[..., :2] + one_N4[..., 2:], other_N4[..., :2] + other_N4[..., 2:])
    return np.concatenate([start, np.maximum(stop - start, 1)], axis=-1)


def covers(quad_N42: Floats, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Whether convex quadrilaterals, in either sense of rotation, contain the whole destination, (N,)."""
    edge = np.roll(quad_N42, -1, axis=-2) - quad_N42
    offset = corners(np.array([0.0, 0.0, *size]))[:, None, :] - quad_N42[..., None, :, :]
    side = edge[..., None, :, 0] * offset[..., 1] - edge[..., None, :, 1] * offset[..., 0]
    # A millionth of a pixel: what rounding leaves where crop and output edges coincide.
    tolerance = 1e-6 * np.abs(edge).max(axis=(-1, -2))[..., None, None]
    return (side >= -tolerance).all(axis=(-1, -2)) | (side <= tolerance).all(axis=(-1, -2))


@dataclass(frozen=True, slots=True)
class Warp:
    """What an executor needs to resample N photographs: numbers only."""

    matrix: Floats
    """(N, 2, 3) destination to `region`."""
    region: NDArray[np.int64]
    """(N, 4) top, left, height, width: the part of the photograph that is read, edges repeated beyond it."""
    footprint: Floats
    """(N, 2) down, across: the variance of the antialiasing filter in source pixels, times six."""
    quad: Floats
    """(N, 4, 2) the part of the destination that shows something, as corners (x, y); the rest is black."""
    masked: NDArray[np.bool_]
    """(N,) whether `quad` leaves some of the destination black."""


def plan(matrix_N23: Floats, visible_N4: Floats, size: tuple[int, int]) -> Warp:
    """Plan warps that show the rectangles `visible` (top, left, height, width) of their sources.

    Pillow's and torchvision's antialiased bilinear resize weighs the source by a triangle, (1 - |t|) for |t| < 1 in
    destination pixels, of variance 1/6; under a linear map J its covariance is J J^T / 6, of which the diagonal is used.
    """
    footprint = np.square(matrix_N23[:, :, :2]).sum(axis=2)[:, ::-1]
    needed = transform(matrix_N23, np.broadcast_to(corners(np.array([0.0, 0.0, *size])), (len(matrix_N23), 4, 2)))
    margin = 2 + 2 * np.sqrt(footprint)  # the filter reaches 1, interpolation another destination pixel's width
    start = needed.min(axis=1)[:, ::-1] - margin
    stop = needed.max(axis=1)[:, ::-1] + margin
    region = intersect(visible_N4, np.concatenate([start, stop - start], axis=1))
    first = np.floor(region[:, :2] + 1e-6)
    region = np.concatenate([first, np.ceil(region[:, :2] + region[:, 2:] - 1e-6) - first], axis=1).astype(np.int64)
    quad = transform(invert(matrix_N23), corners(visible_N4))
    inside = matrix_N23.copy()
    inside[:, :, 2] -= first[:, ::-1]
    return Warp(inside, region, footprint, quad, ~covers(quad, size))


def shrink_factors(footprint_N2: Floats) -> NDArray[np.int64]:
    """Whole factors (N, 2) by which a source is averaged in boxes before it is blurred and warped: 1 up to a reduction by 2.3.

    A box of k pixels has variance (k^2 - 1) / 12 and bilinear interpolation between boxes k^2 / 6: the largest k for which
    both together are not wider than the filter wanted, footprint / 6. `blur_weights` adds what is missing.
    """
    # 2.3 already takes k = 2: in the gap to the exact 2.345, k = 1 would need a kernel with a hole in its middle.
    return np.maximum(1, np.sqrt((2 * footprint_N2 + 1) / 3) + 0.04).astype(np.int64)


def blur_weights(footprint_N2: Floats, shrink_N2: NDArray[np.int64]) -> Floats:
    """The outer weight a, (N, 2) in 0 .. 1/3, of the kernel [a, 1 - 2a, a] that completes the antialiasing filter.

    Its variance is 2a; with box and interpolation it has the variance of Pillow's triangle. For a reduction by exactly two,
    [1/4, 1/2, 1/4] and interpolation *are* that triangle. 0 where the source is magnified.
    """
    missing = (footprint_N2 / 6 - (3 * shrink_N2**2 - 1) / 12) / shrink_N2**2
    weight = np.clip(missing / 2, 0, 1 / 3)
    return np.where(weight >= MIN_BLUR, weight, 0.0)
