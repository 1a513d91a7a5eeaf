"""What was drawn, as plain numbers: `Draw` of samples, `Mix` of pairs of them. Shape suffix: N samples."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastflower.draws import geometry
from fastflower.draws.geometry import Floats

# torchvision resamples again for a rotation and for an affine, each adding a triangle's variance. Half of it is added here:
# the chain is then 1.5 gray levels from torchvision's instead of 1.8, and no further from the truth (docs/augmentation.md).
SOFTNESS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """The numbers drawn for N samples. Lengths are pixels, angles degrees; arrays share their first dimension."""

    size: tuple[int, int]
    """(height, width) of the output."""
    roi: Floats
    """(N, 4) top, left, height, width in the source; may reach beyond it when the crop is larger than the image."""
    flip: NDArray[np.bool_]
    """(N, 2) left-right, upside-down."""
    rotate: Floats
    """(N,) counter-clockwise, as torchvision's `rotate`."""
    affine_rotate: Floats
    """(N,) clockwise, as torchvision's `affine`."""
    translate: Floats
    """(N, 2) x, y: whole output pixels."""
    scale: Floats
    """(N,) factor; above 1 enlarges."""
    shear: Floats
    """(N, 2) x, y degrees."""
    brightness: Floats
    contrast: Floats
    saturation: Floats
    """(N,) factors; 1 changes nothing."""
    hue: Floats
    """(N,) turns of the color wheel in [-0.5, 0.5]; 0 changes nothing."""
    erase: NDArray[np.int64]
    """(N, 4) top, left, height, width in the output; height 0 erases nothing."""

    def __len__(self) -> int:
        return len(self.roi)

    def matrix(self) -> Floats:
        """The whole geometry as one warp a sample, (N, 2, 3), destination to source."""
        matrix = geometry.compose(geometry.resized_crop(self.roi, self.size), geometry.flips(self.flip, self.size))
        still = np.zeros_like(self.shear)
        # torchvision's rotate turns counter-clockwise and its affine clockwise.
        if self.rotate.any():
            rotation = geometry.affine(-self.rotate, still, np.ones_like(self.scale), still, self.size)
            matrix = geometry.compose(matrix, rotation)
        if any(drawn.any() for drawn in (self.affine_rotate, self.translate, self.scale - 1, self.shear)):
            moved = geometry.affine(self.affine_rotate, self.translate, self.scale, self.shear, self.size)
            matrix = geometry.compose(matrix, moved)
        return matrix

    def warp(self, sizes_N2: ArrayLike, fill: str) -> geometry.Warp:
        """The geometry as a backend needs it, for images of `sizes`, (N, 2) height and width."""
        sizes = np.asarray(sizes_N2, np.float64).reshape(-1, 2)
        image = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
        visible = image if fill == "photo" else geometry.intersect(image, self.roi)
        turned = (self.rotate != 0).astype(np.float64)
        bent = (self.affine_rotate != 0) | (self.scale != 1) | (self.shear != 0).any(axis=1)
        return geometry.plan(self.matrix(), visible, self.size, SOFTNESS * (turned + bent))

    def take(self, rows: slice) -> "Draw":
        """The draws of some of the samples."""
        arrays = {field.name: getattr(self, field.name)[rows] for field in fields(self) if field.name != "size"}
        return replace(self, **arrays)


class Mix(NamedTuple):
    """How the images of each pair are mixed; of P pairs."""

    share: Floats
    """(P,) of an image's own label; the rest is its neighbor's."""
    box: NDArray[np.int64]
    """(P, 4) top, left, height, width of the rectangle that is pasted from the neighbor."""
    cut: NDArray[np.bool_]
    """(P,) whether a rectangle is pasted, not the whole image blended."""
