"""Crop, flip, rotation, translation, scale and shear as one matrix.

A warp matrix is 2x3 and maps destination points (x, y) to the source. Pixel i covers [i, i + 1), with its center at
i + 0.5. Rectangles are (top, left, height, width). Points and matrices are in (x, y) order; sizes and other pairs are in
(y, x) order unless stated otherwise. `[:, ::-1]` converts between the two. All functions take angles in degrees.
Shape suffixes: N batch, 2 and 3 matrix rows and columns, 4 rectangle values, P points.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from fastflower.draws.random import Floats

Size = tuple[int, int] | tuple[NDArray[np.int64], NDArray[np.int64]]
"""(height, width) in pixels, of all images or of each."""

# Smaller blurs are skipped: they take a tenth of the rendering time, but change images by less than 0.1 gray levels.
MIN_VARIANCE = 0.02


def compose(outer_N23: Floats, inner_N23: Floats) -> Floats:
    """Return the warp that applies `inner` to a destination point, then `outer` to the result: outer o inner."""
    outer, inner = np.moveaxis(outer_N23, (-2, -1), (0, 1)), np.moveaxis(inner_N23, (-2, -1), (0, 1))
    # Compute one row for all N at a time: matmul takes four times as long for matrices this small.
    out = np.stack([outer[:, 0] * inner[0, column] + outer[:, 1] * inner[1, column] for column in range(3)], axis=1)
    out[:, 2] += outer[:, 2]
    return np.moveaxis(out, (0, 1), (-2, -1))


def invert(matrix_N23: Floats) -> Floats:
    """Return the inverse warps, from source to destination."""
    (a, b, x), (c, d, y) = np.moveaxis(matrix_N23, (-2, -1), (0, 1))
    rows = np.array([[d, -b, b * y - d * x], [-c, a, c * x - a * y]]) / (a * d - b * c)
    return np.moveaxis(rows, (0, 1), (-2, -1))


def transform(matrix_N23: Floats, points_NP2: Floats) -> Floats:
    """Map points (x, y) of shape (N, P, 2) through the warps."""
    return points_NP2 @ np.swapaxes(matrix_N23[..., :2], -1, -2) + matrix_N23[..., None, :, 2]


def resized_crop(roi_N4: Floats, size: Size) -> Floats:
    """Return the warps that stretch each source ROI (top, left, height, width) to a destination of `size`."""
    top, left, height, width = np.moveaxis(roi_N4, -1, 0)
    zero = np.zeros_like(top)
    rows = [[width / size[1], zero, left], [zero, height / size[0], top]]
    return np.moveaxis(np.array(rows), -1, 0)


def flips(flip_N2: NDArray[np.bool_], size: tuple[int, int]) -> Floats:
    """Return the warps that flip horizontally if flip[:, 0] and vertically if flip[:, 1]."""
    across, down = np.moveaxis(flip_N2.astype(np.float64), -1, 0)
    zero = np.zeros_like(across)
    rows = [[1 - 2 * across, zero, size[1] * across], [zero, 1 - 2 * down, size[0] * down]]
    return np.moveaxis(np.array(rows), -1, 0)


def affine(angle_N: Floats, translate_N2: Floats, scale_N: Floats, shear_N2: Floats, size: Size) -> Floats:
    """Return the warps that rotate, scale and shear about the center of `size`, then translate.

    angle  Clockwise rotation in degrees. translate  Shift (x, y) in pixels. shear  Shear (x, y) in degrees.

    The result is the inverse of T(translate) C R(angle) Shear(shear) Scale(scale) C^-1. C moves the origin to the
    center. The closed form is torchvision's `_get_inverse_affine_matrix` (torchvision/transforms/functional.py).
    """
    rotation = np.radians(angle_N)
    # [[a, b], [c, d]] rotates and shears with determinant 1, so its inverse is [[d, -b], [-c, a]].
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
    """Return the corners (x, y) of rectangles (top, left, height, width), clockwise from the top left: (N, 4, 2)."""
    top, left, height, width = np.moveaxis(rectangle_N4, -1, 0)
    right, bottom = left + width, top + height
    points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return np.stack([np.stack(point, axis=-1) for point in points], axis=-2)


def intersect(one_N4: Floats, other_N4: Floats) -> Floats:
    """Return the intersection of rectangles (top, left, height, width).

    The result always lies in `one`, even without overlap. Its sides are at least one pixel long, unless those of `one` are
    shorter.
    """
    one_stop, other_stop = one_N4[..., :2] + one_N4[..., 2:], other_N4[..., :2] + other_N4[..., 2:]
    least = np.minimum(one_N4[..., 2:], 1)
    start = np.minimum(np.maximum(one_N4[..., :2], other_N4[..., :2]), one_stop - least)
    stop = np.minimum(one_stop, other_stop)
    return np.concatenate([start, np.maximum(stop - start, least)], axis=-1)


def unite(one_N4: Floats, other_N4: Floats) -> Floats:
    """Return the smallest rectangles that contain both rectangles (top, left, height, width)."""
    start = np.minimum(one_N4[:, :2], other_N4[:, :2])
    stop = np.maximum(one_N4[:, :2] + one_N4[:, 2:], other_N4[:, :2] + other_N4[:, 2:])
    return np.concatenate([start, stop - start], axis=1)


def grow(quad_N42: Floats, distance: float) -> Floats:
    """Move every edge of the parallelograms outward by `distance` pixels."""
    half_across = (quad_N42[..., 1, :] - quad_N42[..., 0, :]) / 2
    half_down = (quad_N42[..., 3, :] - quad_N42[..., 0, :]) / 2
    area = np.abs(half_across[..., 0] * half_down[..., 1] - half_across[..., 1] * half_down[..., 0])
    # Edges parallel to half_down are area / |half_down| from the center. To move them by `distance`, scale half_across.
    across = half_across * (distance * np.linalg.norm(half_down, axis=-1) / area)[..., None]
    down = half_down * (distance * np.linalg.norm(half_across, axis=-1) / area)[..., None]
    steps = [-across - down, across - down, across + down, down - across]
    return quad_N42 + np.stack(steps, axis=-2)


def are_whole(quad_N42: Floats) -> NDArray[np.bool_]:
    """Return whether parallelograms are upright rectangles with edges between pixels, (N,), within 1/1000 pixel."""
    edges_N22 = np.stack([quad_N42.min(axis=1), quad_N42.max(axis=1)], axis=1)
    from_edge_N42 = np.abs(quad_N42[:, None] - edges_N22[:, :, None]).min(axis=1)
    from_pixel_N22 = np.abs(edges_N22 - np.rint(edges_N22))
    return np.maximum(from_edge_N42.max(axis=(1, 2)), from_pixel_N22.max(axis=(1, 2))) < 1e-3


@dataclass(frozen=True, slots=True)
class Warp:
    """Arrays that a backend needs to resample N images."""

    matrix: Floats
    """(N, 2, 3) matrices from destination to `region`."""
    region: NDArray[np.int64]
    """(N, 4) top, left, height, width of the part of the image to read. Edge pixels repeat outside the region."""
    footprint: Floats
    """(N, 2) vertical, horizontal: six times the variance of the antialiasing filter, in squared source pixels."""
    masked: NDArray[np.bool_]
    """(N,) True if part of the destination lies outside `visible` and is black."""
    whole: Floats
    """(N, 2, 3) matrices from destination to the entire source image."""
    visible: Floats
    """(N, 4) top, left, height, width of the part of the image that may be shown."""

    @property
    def quad(self) -> Floats:
        """(N, 4, 2) corners (x, y) of `visible` in the destination."""
        return transform(invert(self.whole), corners(self.visible))

    def take(self, rows: slice) -> "Warp":
        """Return the warps of the images in `rows`."""
        return Warp(*(getattr(self, field.name)[rows] for field in fields(self)))


def footprints(matrix_N23: Floats) -> Floats:
    """Return the footprints (N, 2) of warps: vertical, horizontal, in squared source pixels.

    A footprint describes the triangle filter of antialiased bilinear resizing in Pillow and torchvision. In destination
    pixels, the filter is 1 - |t| for |t| < 1, and its variance is 1/6. Let J be the linear part of a warp. In source
    pixels, the filter's covariance is then J J^T / 6. Only the diagonal is used.
    """
    return np.square(matrix_N23[:, ::-1, :2]).sum(axis=2)


def plan(matrix_N23: Floats, visible_N4: Floats, image_N4: Floats, size: tuple[int, int], footprint_N2: Floats) -> Warp:
    """Plan warps to a destination of `size` that show only the `visible` rectangles of the sources.

    visible  Rectangles (N, 4). Parts outside of `image`, (N, 4), show its edge pixels.
    """
    # Rows are source y, x; columns are destination x, y. The destination's corner (0, 0) maps to the offset.
    linear_N22, offset_N2 = matrix_N23[:, ::-1, :2], matrix_N23[:, ::-1, 2]

    # In the source, the destination is a parallelogram. Find its center and how far it extends from there.
    half_size = np.array([size[1] / 2, size[0] / 2])
    middle_N2 = (linear_N22 * half_size).sum(axis=2) + offset_N2
    reach_N2 = (np.abs(linear_N22) * half_size).sum(axis=2)

    visible_start_N2, visible_size_N2 = visible_N4[:, :2], visible_N4[:, 2:]
    past_start_N2 = visible_start_N2 - (middle_N2 - reach_N2)
    past_stop_N2 = middle_N2 + reach_N2 - visible_start_N2 - visible_size_N2
    # Tolerate rounding errors (one millionth) if the edges of crop and output coincide.
    masked_N = (np.maximum(past_start_N2, past_stop_N2) > 1e-6 * reach_N2).any(axis=1)

    # A destination pixel is sqrt(footprint) source pixels wide. Filter and interpolation each read that far past the edge.
    read_N2 = reach_N2 + (2 + 2 * np.sqrt(footprint_N2))
    read_N4 = intersect(intersect(image_N4, visible_N4), np.concatenate([middle_N2 - read_N2, 2 * read_N2], axis=1))
    first_N2 = np.floor(read_N4[:, :2] + 1e-6)  # whole pixels, within rounding error
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
    """Return decode scales (N,): the largest of 2, 4 and 8 that is at most half the downscaling factor, else 1."""
    least = np.sqrt(footprint_N2.min(axis=1))
    return np.where(least < 4, 1, np.where(least < 8, 2, np.where(least < 16, 4, 8)))


def shrink_factors(footprint_N2: Floats) -> NDArray[np.int64]:
    """Return the sides (N, 2) of the boxes to average before blur and warp: 1 when downscaling by less than 4.

    A side is about half the downscaling factor and a multiple of the decode scale. This leaves two to four boxes per
    destination pixel. With two boxes, images differ from Pillow's by 0.8 gray levels (0 to 255). With one, they would
    differ by 1.9.
    """
    decoded = decode_scales(footprint_N2)[:, None]
    return decoded * np.maximum(1, np.sqrt(footprint_N2) // (2 * decoded)).astype(np.int64)


def blur_variance(footprint_N2: Floats, shrink_N2: NDArray[np.int64]) -> Floats:
    """Return the variance (N, 2) of the blur after box averaging, in squared boxes. It is 0 for magnified sources.

    The total variance should be footprint / 6. A box of k pixels adds (k^2 - 1) / 12, interpolation between boxes k^2 / 6.
    """
    missing = (footprint_N2 / 6 - (3 * shrink_N2**2 - 1) / 12) / shrink_N2**2
    return np.where(missing >= MIN_VARIANCE, missing, 0.0)


BLUR_TAPS = 5  # half the widest kernel, including the center: after box averaging, downscaling is below 4


def blur_kernels(variance_N2: Floats) -> Floats:
    """Return one half of each symmetric triangle kernel, center first: (N, 2, BLUR_TAPS).

    Each full kernel has sum 1 and the given variance. When downscaling by exactly 2 or 3, kernel and interpolation
    together are Pillow's triangle filter; for 2, the kernel is [1, 2, 1] / 4. Let w be the half-width of the triangle,
    between integers m and m + 1. Tap j has the weight 1 - |j| / w for |j| <= m. The weights have the sum
    2m + 1 - m(m+1) / w and the second moment m(m+1)(2m+1) / 3 - m^2 (m+1)^2 / 2w. The variance is the second moment
    divided by the sum; solving for 1 / w gives the slope. A variance of 0 gives m = 0.
    """
    m = np.sqrt(6 * variance_N2 + 1).astype(np.int64) * (variance_N2 > 0)
    pairs = m * (m + 1)
    slope = (pairs * (2 * m + 1) / 3 - variance_N2 * (2 * m + 1)) / np.where(m, pairs**2 / 2 - variance_N2 * pairs, 1)
    steps = np.arange(BLUR_TAPS)
    weights = np.where(steps <= m[..., None], 1 - slope[..., None] * steps, 0.0)
    return weights / (2 * weights.sum(axis=-1, keepdims=True) - weights[..., :1])


def whole_kernel(weights: Floats) -> Floats:
    """Expand half a symmetric kernel, center first, to the full kernel (K,), and drop its outer zeros. K is odd."""
    weights = weights[: np.flatnonzero(weights)[-1] + 1]
    return np.concatenate([weights[:0:-1], weights])


@dataclass(frozen=True, slots=True)
class Resampling:
    """A Warp for a backend that averages boxes, then blurs, then interpolates."""

    decode_scale: NDArray[np.int64]
    """(N,) decode scale: factor by which the decoder downscales the image."""
    region: NDArray[np.int64]
    """(N, 4) top, left, height, width of the part of the decoded image to read. Consists of whole boxes."""
    shrink: NDArray[np.int64]
    """(N, 2) vertical, horizontal: side lengths of the boxes, in pixels of the decoded image."""
    blur: Floats
    """(N, 2) vertical and horizontal variance of the blur, in squared boxes."""
    matrix: Floats
    """(N, 2, 3) matrices from destination pixels to boxes. The centers of both have integer coordinates."""


def resampling(warp: Warp) -> Resampling:
    """Convert a Warp to a Resampling."""
    decode_scale_N, shrink_N2 = decode_scales(warp.footprint), shrink_factors(warp.footprint)
    decode_scale_N1 = decode_scale_N[:, None]

    # Pixels of the decoded image that the region touches. `first` may be before the start of the region.
    start_N2 = warp.region[:, :2]
    stop_N2 = start_N2 + warp.region[:, 2:]
    first_N2, end_N2 = start_N2 // decode_scale_N1, -(-stop_N2 // decode_scale_N1)
    from_first_N23 = warp.matrix.copy()
    from_first_N23[:, :, 2] += (start_N2 - decode_scale_N1 * first_N2)[:, ::-1]

    size_N2 = end_N2 - first_N2
    box_N2 = np.minimum(shrink_N2 // decode_scale_N1, size_N2)
    whole_boxes_N2 = size_N2 - size_N2 % box_N2  # a partial box at the far edge is replaced by its neighbor
    return Resampling(
        decode_scale=decode_scale_N,
        region=np.concatenate([first_N2, whole_boxes_N2], axis=1),
        shrink=box_N2,
        blur=blur_variance(warp.footprint, shrink_N2),
        matrix=centered(from_first_N23 / shrink_N2[:, ::-1, None]),
    )


def centered(matrix_N23: Floats) -> Floats:
    """Convert warps to OpenCV's convention, with pixel centers at integers."""
    moved = matrix_N23.copy()
    moved[:, :, 2] += moved[:, :, :2].sum(axis=2) / 2 - 0.5
    return moved


def frame(warp: Warp, size: tuple[int, int]) -> Floats:
    """Return matrices (N, 2, 3) from the destination to the `visible` rectangle stretched to `size`."""
    return compose(invert(resized_crop(warp.visible, size)), warp.whole)
