"""Crop, flip, rotation, translation, scale and shear as one matrix.

A warp matrix maps destination to source: 2x3, columns (x, y), in pixels whose centers lie at +0.5 (a pixel covers
[i, i+1)). Rectangles are (top, left, height, width), so that they and all that is measured down and across count (y, x):
`[:, ::-1]` turns the one order into the other. Angles are degrees at the interface and radians nowhere else than here.
Shape suffixes: N batch, 2/3 matrix rows and columns, 4 sides of a rectangle, P points.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from fastflower.draws.random import Floats

# Less blur than this changes images by less than 0.1 gray levels and would cost a tenth of the time.
MIN_VARIANCE = 0.02


def compose(outer_N23: Floats, inner_N23: Floats) -> Floats:
    """The warp that applies `inner` to a destination point first, then `outer` to what it gave: outer o inner."""
    outer, inner = np.moveaxis(outer_N23, (-2, -1), (0, 1)), np.moveaxis(inner_N23, (-2, -1), (0, 1))
    # Row by row over all of N: matmul of matrices so small takes four times as long.
    out = np.stack([outer[:, 0] * inner[0, column] + outer[:, 1] * inner[1, column] for column in range(3)], axis=1)
    out[:, 2] += outer[:, 2]
    return np.moveaxis(out, (0, 1), (-2, -1))


def invert(matrix_N23: Floats) -> Floats:
    """The warp that undoes `matrix`: source to destination."""
    (a, b, x), (c, d, y) = np.moveaxis(matrix_N23, (-2, -1), (0, 1))
    rows = np.array([[d, -b, b * y - d * x], [-c, a, c * x - a * y]]) / (a * d - b * c)
    return np.moveaxis(rows, (0, 1), (-2, -1))


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
    across, down = np.moveaxis(flip_N2.astype(np.float64), -1, 0)
    zero = np.zeros_like(across)
    rows = [[1 - 2 * across, zero, size[1] * across], [zero, 1 - 2 * down, size[0] * down]]
    return np.moveaxis(np.array(rows), -1, 0)


def affine(angle_N: Floats, translate_N2: Floats, scale_N: Floats, shear_N2: Floats, size: tuple[int, int]) -> Floats:
    """Rotate by `angle` (degrees, clockwise), scale and shear about the center of `size`, then translate by pixels (x, y).

    The inverse of the forward map T(translate) C R(angle) Shear(shear) Scale(scale) C^-1, in the closed form of
    torchvision's `_get_inverse_affine_matrix` (torchvision/transforms/functional.py); shear is (x, y) in degrees.
    """
    rotation = np.radians(angle_N)
    # [[a, b], [c, d]] rotates and shears with determinant 1, so that [[d, -b], [-c, a]] is its inverse.
    a, c = np.cos(rotation), np.sin(rotation)
    b, d = -c, a
    if shear_N2.any():
        shear_x, shear_y = np.radians(shear_N2[..., 0]), np.radians(shear_N2[..., 1])
        a, c = np.cos(rotation - shear_y) / np.cos(shear_y), np.sin(rotation - shear_y) / np.cos(shear_y)
        b, d = b - a * np.tan(shear_x), d - c * np.tan(shear_x)
    a, b, c, d = a / scale_N, b / scale_N, c / scale_N, d / scale_N
    center_x, center_y = size[1] / 2, size[0] / 2
    x, y = center_x + translate_N2[..., 0], center_y + translate_N2[..., 1]
    rows = np.array([[d, -b, center_x - d * x + b * y], [-c, a, center_y + c * x - a * y]])
    return np.moveaxis(rows, -1, 0)


def corners(rectangle_N4: Floats) -> Floats:
    """The corners (x, y) of rectangles (top, left, height, width), clockwise from the top left, (N, 4, 2)."""
    top, left, height, width = np.moveaxis(rectangle_N4, -1, 0)
    right, bottom = left + width, top + height
    points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return np.stack([np.stack(point, axis=-1) for point in points], axis=-2)


def intersect(one_N4: Floats, other_N4: Floats) -> Floats:
    """The part of `one` that `other` shares, (top, left, height, width).

    At least a pixel of `one` high and wide, or all of it where it is smaller, even where they do not meet.
    """
    one_stop, other_stop = one_N4[..., :2] + one_N4[..., 2:], other_N4[..., :2] + other_N4[..., 2:]
    least = np.minimum(one_N4[..., 2:], 1)
    start = np.minimum(np.maximum(one_N4[..., :2], other_N4[..., :2]), one_stop - least)
    stop = np.minimum(one_stop, other_stop)
    return np.concatenate([start, np.maximum(stop - start, least)], axis=-1)


def grow(quad_N42: Floats, distance: float) -> Floats:
    """Move every edge of parallelograms outwards by `distance` pixels."""
    half_across = (quad_N42[..., 1, :] - quad_N42[..., 0, :]) / 2
    half_down = (quad_N42[..., 3, :] - quad_N42[..., 0, :]) / 2
    area = np.abs(half_across[..., 0] * half_down[..., 1] - half_across[..., 1] * half_down[..., 0])
    # The edges along `down` lie area / |half_down| from the middle: half_across grows as that does by `distance`.
    across = half_across * (distance * np.linalg.norm(half_down, axis=-1) / area)[..., None]
    down = half_down * (distance * np.linalg.norm(half_across, axis=-1) / area)[..., None]
    steps = [-across - down, across - down, across + down, down - across]
    return quad_N42 + np.stack(steps, axis=-2)


@dataclass(frozen=True, slots=True)
class Warp:
    """What a backend needs to resample N images: numbers only."""

    matrix: Floats
    """(N, 2, 3) destination to `region`."""
    region: NDArray[np.int64]
    """(N, 4) top, left, height, width: the part of the image that is read, edges repeated beyond it."""
    footprint: Floats
    """(N, 2) down, across: the variance of the antialiasing filter in source pixels, times six."""
    masked: NDArray[np.bool_]
    """(N,) whether some of the destination shows nothing of `visible`, and is black."""
    whole: Floats
    """(N, 2, 3) destination to the whole image."""
    visible: Floats
    """(N, 4) top, left, height, width: the part of the image that is shown."""

    @property
    def quad(self) -> Floats:
        """(N, 4, 2) the part of the destination that shows something, as corners (x, y)."""
        return transform(invert(self.whole), corners(self.visible))

    def take(self, rows: slice) -> "Warp":
        """The warps of some of the images."""
        return Warp(*(getattr(self, field.name)[rows] for field in fields(self)))


def plan(matrix_N23: Floats, visible_N4: Floats, size: tuple[int, int], softness_N: Floats) -> Warp:
    """Plan warps that show the rectangles `visible` (top, left, height, width) of their sources, for a destination of `size`.

    softness  (N,) by how much of itself the footprint is enlarged.

    Pillow's and torchvision's antialiased bilinear resize weighs the source by a triangle, (1 - |t|) for |t| < 1 in
    destination pixels, of variance 1/6; under a linear map J its covariance is J J^T / 6, of which the diagonal is used.
    """
    # Rows y, x of the source by columns x, y of the destination, and where the destination's corner comes from.
    linear_N22, offset_N2 = matrix_N23[:, ::-1, :2], matrix_N23[:, ::-1, 2]
    footprint_N2 = np.square(linear_N22).sum(axis=2) * (1 + softness_N[:, None])

    # The destination comes from a parallelogram of the source: its middle, and how far it reaches from there.
    half_size = np.array([size[1] / 2, size[0] / 2])
    middle_N2 = (linear_N22 * half_size).sum(axis=2) + offset_N2
    reach_N2 = (np.abs(linear_N22) * half_size).sum(axis=2)

    visible_start_N2, visible_size_N2 = visible_N4[:, :2], visible_N4[:, 2:]
    past_start_N2 = visible_start_N2 - (middle_N2 - reach_N2)
    past_stop_N2 = middle_N2 + reach_N2 - visible_start_N2 - visible_size_N2
    # A millionth of it: what rounding leaves where the edges of crop and output coincide.
    masked_N = (np.maximum(past_start_N2, past_stop_N2) > 1e-6 * reach_N2).any(axis=1)

    # A destination pixel is the footprint's root wide: the filter reads as much further, interpolation as much again.
    read_N2 = reach_N2 + (2 + 2 * np.sqrt(footprint_N2))
    read_N4 = intersect(visible_N4, np.concatenate([middle_N2 - read_N2, 2 * read_N2], axis=1))
    first_N2 = np.floor(read_N4[:, :2] + 1e-6)  # whole pixels, again but for rounding
    end_N2 = np.ceil(read_N4[:, :2] + read_N4[:, 2:] - 1e-6)
    to_region_N23 = matrix_N23.copy()
    to_region_N23[:, :, 2] -= first_N2[:, ::-1]
    return Warp(
        matrix=to_region_N23,
        region=np.concatenate([first_N2, end_N2 - first_N2], axis=1).astype(np.int64),
        footprint=footprint_N2,
        masked=masked_N,
        whole=matrix_N23,
        visible=visible_N4,
    )


def decode_scales(footprint_N2: Floats) -> NDArray[np.int64]:
    """The factor (N,), 1, 2, 4 or 8, by which an image may be decoded at reduced scale: at most half of its reduction."""
    least = np.sqrt(footprint_N2.min(axis=1))
    return np.where(least < 4, 1, np.where(least < 8, 2, np.where(least < 16, 4, 8)))


def shrink_factors(footprint_N2: Floats) -> NDArray[np.int64]:
    """Whole factors (N, 2) by which a source is averaged in boxes before it is blurred and warped: 1 up to a reduction by 4.

    Half of the reduction, so that two to four shrunken pixels are left to a destination pixel: one would pass a loose
    look and be 1.9 gray levels off Pillow's triangle, two are 0.8 off. Multiples of the factor of decoding at reduced scale.
    """
    decoded = decode_scales(footprint_N2)[:, None]
    return decoded * np.maximum(1, np.sqrt(footprint_N2) // (2 * decoded)).astype(np.int64)


def blur_variance(footprint_N2: Floats, shrink_N2: NDArray[np.int64]) -> Floats:
    """The variance (N, 2) in shrunken pixels that box and bilinear interpolation lack; 0 where the source is magnified.

    Wanted is footprint / 6; a box of k pixels has (k^2 - 1) / 12, interpolation between the boxes k^2 / 6.
    """
    missing = (footprint_N2 / 6 - (3 * shrink_N2**2 - 1) / 12) / shrink_N2**2
    return np.where(missing >= MIN_VARIANCE, missing, 0.0)


BLUR_TAPS = 5  # weights from the middle of the widest kernel: shrink_factors leaves reductions below 4


def blur_kernels(variance_N2: Floats) -> Floats:
    """Symmetric weights of those variances from the middle outwards, (N, 2, BLUR_TAPS): samples of a triangle, summing to 1.

    For a reduction by a whole number this is Pillow's triangle, and interpolation keeps it exactly: [1, 2, 1] / 4 for two.
    For the half-width w between m and m + 1, weights 1 - |j| / w for |j| <= m have the sum 2m + 1 - m(m+1) / w and the
    second moment m(m+1)(2m+1) / 3 - m^2 (m+1)^2 / 2w: the ratio is solved for 1 / w. Where the variance is 0, m is 0.
    """
    m = np.sqrt(6 * variance_N2 + 1).astype(np.int64) * (variance_N2 > 0)
    pairs = m * (m + 1)
    slope = (pairs * (2 * m + 1) / 3 - variance_N2 * (2 * m + 1)) / np.where(m, pairs**2 / 2 - variance_N2 * pairs, 1)
    steps = np.arange(BLUR_TAPS)
    weights = np.where(steps <= m[..., None], 1 - slope[..., None] * steps, 0.0)
    return weights / (2 * weights.sum(axis=-1, keepdims=True) - weights[..., :1])


def whole_kernel(weights: Floats) -> Floats:
    """Both halves of a symmetric kernel, given from its middle outwards, without zeros at the ends: (K,), K odd."""
    weights = weights[: np.flatnonzero(weights)[-1] + 1]
    return np.concatenate([weights[:0:-1], weights])


@dataclass(frozen=True, slots=True)
class Resampling:
    """A Warp for a renderer that averages boxes, blurs what is left of a reduction, then interpolates."""

    decode_scale: NDArray[np.int64]
    """(N,) the factor by which the image is reduced when it is decoded."""
    region: NDArray[np.int64]
    """(N, 4) top, left, height, width of the decoded image: whole boxes."""
    shrink: NDArray[np.int64]
    """(N, 2) down, across: sides of the boxes, in its pixels."""
    blur: Floats
    """(N, 2) down, across: the variance of the blur, in boxes."""
    matrix: Floats
    """(N, 2, 3) destination to boxes, both counted in whole numbers at their centers."""


def resampling(warp: Warp) -> Resampling:
    """How such a renderer carries out a warp."""
    decode_scale_N, shrink_N2 = decode_scales(warp.footprint), shrink_factors(warp.footprint)
    decode_scale_N1 = decode_scale_N[:, None]

    # The pixels of the reduced image that the region touches; `first` may lie before where the region starts.
    start_N2 = warp.region[:, :2]
    stop_N2 = start_N2 + warp.region[:, 2:]
    first_N2, end_N2 = start_N2 // decode_scale_N1, -(-stop_N2 // decode_scale_N1)
    from_first_N23 = warp.matrix.copy()
    from_first_N23[:, :, 2] += (start_N2 - decode_scale_N1 * first_N2)[:, ::-1]

    size_N2 = end_N2 - first_N2
    box_N2 = np.minimum(shrink_N2 // decode_scale_N1, size_N2)
    whole_boxes_N2 = size_N2 - size_N2 % box_N2  # at most one box at the far edge is replaced by its neighbor
    return Resampling(
        decode_scale=decode_scale_N,
        region=np.concatenate([first_N2, whole_boxes_N2], axis=1),
        shrink=box_N2,
        blur=blur_variance(warp.footprint, shrink_N2),
        matrix=centered(from_first_N23 / shrink_N2[:, ::-1, None]),
    )


def centered(matrix_N23: Floats) -> Floats:
    """The same warps between pixels whose centers lie at whole numbers, as OpenCV counts."""
    moved = matrix_N23.copy()
    moved[:, :, 2] += moved[:, :, :2].sum(axis=2) / 2 - 0.5
    return moved


def frame(warp: Warp, size: tuple[int, int]) -> Floats:
    """Destination to the shown part of the image, stretched over a frame of `size`, (N, 2, 3)."""
    return compose(invert(resized_crop(warp.visible, size)), warp.whole)
