"""Renders with OpenCV's SIMD kernels, which release the GIL."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from cv2.typing import MatLike
from numpy.typing import NDArray

from fastflower.draws import color, geometry
from fastflower.draws.augment import Augment
from fastflower.loading.batch import Pixels, Stored, as_numpy
from fastflower.loading.request import Request

_WARP = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
_SUBPIXEL = 8  # fractional bits of the corner coordinates passed to fillPoly
# Outward shift of the visible part's edges, in pixels. fillPoly also paints the boundary, which is about a pixel wide.
# It darkens 0.3 visible pixels per image with the shift, and 17 without it.
_BOUNDARY = 0.75


@dataclass(frozen=True, slots=True)
class _Job:
    """Everything OpenCV needs to render one sample, except the image."""

    decode_scale: int
    region: tuple[slice, slice]
    shrink: tuple[int, int]
    blur: NDArray[np.float64] | None
    matrix: NDArray[np.float64]
    shown: NDArray[np.float64] | None
    """(4, 2) corners (x, y) of the visible part; the rest is black. None if everything is visible."""
    whole: bool
    """Whether the visible part is a rectangle of whole pixels."""
    brightness: float
    contrast: float
    saturation: float
    hue: int
    """Hue shift in 1/256 turns of the color wheel."""
    gray: bool


class OpencvRenderer:
    """Renders a decoded image into a row of the batch. Thread-safe because it holds only constants."""

    def __init__(self, augment: Augment, dtype: torch.dtype) -> None:
        self._size = augment.output_size
        self._dtype = dtype
        multiply, add = color.normalize_factors(*augment.normalization)
        levels = np.arange(256, dtype=np.float32)[:, None]
        self._table = as_numpy(torch.as_tensor(levels * multiply + add).to(dtype))[:, None, :]
        height, width = self._size
        self._frame = geometry.corners(np.array([-2.0, -2.0, height + 4, width + 4]))
        self._multiply, self._add = (np.tile(factor, width) for factor in (multiply, add))

    def jobs(self, request: Request) -> list[_Job]:
        """Return one job per row of the request."""
        draw, warp = request.draw, request.warp
        resampling = geometry.resampling(warp)
        kernels = geometry.blur_kernels(resampling.blur)
        quad = warp.quad
        whole = geometry.are_whole(quad)
        hue = np.rint(draw.hue * 256).astype(int) % 256
        jobs = list[_Job]()
        for row, (top, left, height, width) in enumerate(resampling.region.tolist()):
            down, across = resampling.shrink[row].tolist()
            jobs.append(
                _Job(
                    decode_scale=int(resampling.decode_scale[row]),
                    region=(slice(top, top + height), slice(left, left + width)),
                    shrink=(down, across),
                    blur=kernels[row] if resampling.blur[row].any() else None,
                    matrix=resampling.matrix[row],
                    shown=quad[row] if warp.masked[row] else None,
                    whole=bool(whole[row]),
                    brightness=float(draw.brightness[row]),
                    contrast=float(draw.contrast[row]),
                    saturation=float(draw.saturation[row]),
                    hue=int(hue[row]),
                    gray=bool(draw.gray[row]),
                )
            )
        return jobs

    def __call__(self, source: Pixels, job: _Job, out: Stored, /) -> None:
        """Render `source`, (H, W, 3) uint8 decoded at job.decode_scale, into `out`, (height, width, 3)."""
        image = _toned(self._warped(source[job.region], job), job.brightness, job.contrast)
        if job.saturation != 1:
            image = cv2.transform(image, color.saturation_matrix(job.saturation))
        if job.hue:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
            hsv[..., 0] += np.uint8(job.hue)  # wraps around like the color wheel
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
        if job.gray:
            image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        if self._dtype == torch.uint8:
            out[...] = image
        elif self._dtype == torch.float32:  # takes half the time of a lookup table
            flat = out.reshape(out.shape[0], -1)
            np.multiply(image.reshape(flat.shape), self._multiply, out=flat)
            np.add(flat, self._add, out=flat)
        else:
            cv2.LUT(image, self._table, out)

    def _warped(self, source: MatLike, job: _Job) -> MatLike:
        source = shrunken(source, job.shrink)
        if job.blur is not None:
            down, across = map(geometry.whole_kernel, job.blur)
            source = cv2.sepFilter2D(source, -1, across, down, borderType=cv2.BORDER_REPLICATE)
        height, width = self._size
        image = cv2.warpAffine(source, job.matrix, (width, height), flags=_WARP, borderMode=cv2.BORDER_REPLICATE)
        if job.shown is None:
            return image
        if job.whole:
            corners = np.rint(job.shown).astype(int)
            (left, top), (right, bottom) = corners.min(axis=0).clip(0).tolist(), corners.max(axis=0).clip(0).tolist()
            image[:top], image[bottom:], image[:, :left], image[:, right:] = 0, 0, 0, 0
        else:
            polygons = np.stack([self._frame, geometry.grow(job.shown, _BOUNDARY)]) - 0.5
            polygons = np.rint(polygons * 2**_SUBPIXEL).astype(np.int32)
            cv2.fillPoly(image, list(polygons), (0, 0, 0), cv2.LINE_AA, _SUBPIXEL)
        return image


def shrunken(source: MatLike, shrink: tuple[int, int]) -> MatLike:
    """Average over boxes of `shrink` (height, width) pixels. The sides of `source` must be multiples of the box sides."""
    if shrink == (1, 1):
        return source
    down, across = shrink
    size = (source.shape[1] // across, source.shape[0] // down)
    return cv2.resize(source, size, interpolation=cv2.INTER_AREA)


def _toned(image: MatLike, brightness: float, contrast: float) -> MatLike:
    """Apply brightness, then contrast about the mean gray of the brightened image."""
    if contrast == 1:
        return image if brightness == 1 else cv2.LUT(image, color.quantized(color.brightness_table(brightness)))
    levels = color.brightness_table(brightness)
    if brightness > 1:  # brightening clips, so the mean must be taken afterwards
        image = cv2.LUT(image, color.quantized(levels))
        levels, brightness = color.brightness_table(1), 1
    mean = brightness * float(color.LUMA @ cv2.mean(image)[:3])
    return cv2.LUT(image, color.quantized(color.contrast_table(levels, contrast, mean)))
