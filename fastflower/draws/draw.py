"""Drawn augmentations as plain numbers: `Draw` for samples, `Mix` for pairs. Shape suffixes: N samples, P pairs."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastflower.draws import geometry
from fastflower.draws.geometry import Floats

# torchvision resamples again for a rotation and for an affine transform, each time adding a triangle filter's variance.
# We add half of that variance. Rotated crops then differ from torchvision's by 1.3 instead of 1.7 gray levels (0 to
# 255), and are no less accurate (docs/augmentation.md).
SOFTNESS = 0.5
# Before the crop, which may then magnify it, we add all of it: 1.5 instead of 2.1 gray levels.
SOFTNESS_FIRST = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Drawn augmentation parameters of N samples. Lengths are in pixels, angles in degrees. All arrays have N rows."""

    size: tuple[int, int]
    """(height, width) of the output."""
    move_first: bool
    """Whether rotation and affine act on the image before the crop, and not on the output."""
    image: NDArray[np.int64]
    """(N, 2) height and width of the source."""
    frame: NDArray[np.int64]
    """(N, 2) height and width of what they act on: the output, or the source as resized before the crop."""
    roi: Floats
    """(N, 4) top, left, height, width of the crop in the source. The crop may extend beyond the image."""
    flip: NDArray[np.bool_]
    """(N, 2) whether to flip: column 0 horizontally, column 1 vertically."""
    rotate: Floats
    """(N,) counterclockwise angle, as in torchvision's `rotate`."""
    affine_rotate: Floats
    """(N,) clockwise angle, as in torchvision's `affine`."""
    translate: Floats
    """(N, 2) shift along x and y in whole output pixels."""
    scale: Floats
    """(N,) zoom factor; above 1 magnifies."""
    shear: Floats
    """(N, 2) shear along x and y in degrees."""
    brightness: Floats
    """(N,) factor; 1 changes nothing."""
    contrast: Floats
    """(N,) factor; 1 changes nothing."""
    saturation: Floats
    """(N,) factor; 1 changes nothing, 0 gives gray."""
    hue: Floats
    """(N,) shift as a fraction of the color wheel, in [-0.5, 0.5]; 0 changes nothing."""
    gray: NDArray[np.bool_]
    """(N,) whether to turn the image gray."""
    erase: NDArray[np.int64]
    """(N, 4) top, left, height, width of the erased rectangle in the output; height 0 erases nothing."""

    def __len__(self) -> int:
        return len(self.roi)

    def matrix(self) -> Floats:
        """Return all geometry as one matrix per sample, (N, 2, 3), from destination to source."""
        matrix = geometry.compose(geometry.resized_crop(self.roi, self.size), geometry.flips(self.flip, self.size))
        if not self.move_first:
            return self._moved(matrix)
        to_image = geometry.resized_crop(self._whole, (self.frame[:, 0], self.frame[:, 1]))
        return geometry.compose(geometry.compose(self._moved(to_image), geometry.invert(to_image)), matrix)

    def _moved(self, matrix: Floats) -> Floats:
        """Compose a matrix with the rotation and the affine transform of the frame."""
        size = (self.frame[:, 0], self.frame[:, 1])
        still = np.zeros_like(self.shear)
        # torchvision's rotate is counterclockwise, but its affine is clockwise.
        if self.rotate.any():
            rotation = geometry.affine(-self.rotate, still, np.ones_like(self.scale), still, size)
            matrix = geometry.compose(matrix, rotation)
        if any(drawn.any() for drawn in (self.affine_rotate, self.translate, self.scale - 1, self.shear)):
            moved = geometry.affine(self.affine_rotate, self.translate, self.scale, self.shear, size)
            matrix = geometry.compose(matrix, moved)
        return matrix

    @property
    def _whole(self) -> Floats:
        """(N, 4) rectangles of the entire sources."""
        return np.concatenate([np.zeros_like(self.image), self.image], axis=1).astype(np.float64)

    def warp(self, fill: str, padding_mode: str) -> geometry.Warp:
        """Return the geometry in the form a backend needs. fill, padding_mode  As in `Augment`."""
        image = visible = self._whole
        if padding_mode != "constant":
            visible = geometry.unite(image, self.roi)
        if fill == "black" and not self.move_first:
            visible = geometry.intersect(visible, self.roi)
        turned = (self.rotate != 0).astype(np.float64)
        bent = (self.affine_rotate != 0) | (self.scale != 1) | (self.shear != 0).any(axis=1)
        matrix, skipped = self.matrix(), (turned + bent)[:, None]
        footprint = geometry.footprints(matrix)
        if self.move_first:
            footprint = footprint + SOFTNESS_FIRST * skipped * np.square(self.image / self.frame)
        else:
            footprint = footprint * (1 + SOFTNESS * skipped)
        return geometry.plan(matrix, visible, image, self.size, footprint)

    def take(self, rows: slice) -> "Draw":
        """Return the draws of the samples in `rows`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[rows] for name, value in values.items() if isinstance(value, np.ndarray)})


class Mix(NamedTuple):
    """How to mix the images in each of P pairs."""

    share: Floats
    """(P,) weight of an image's own label; its neighbor's label gets the rest."""
    box: NDArray[np.int64]
    """(P, 4) top, left, height, width of the rectangle pasted from the neighbor."""
    cut: NDArray[np.bool_]
    """(P,) True if a rectangle is pasted (CutMix), False if the entire images are blended (mixup)."""
