"""Draws images as a figure, without pyplot: no display is needed, and nothing is kept after use."""
# pyright: standard
# matplotlib does not type its keyword arguments.

import io
from collections.abc import Sequence
from math import ceil, sqrt

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

_COLUMNS = 8  # at most
_TITLE = 28  # maximum number of characters


class Picture(Figure):
    """A figure that a notebook shows, once."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure) -> bytes:
    """Render a figure as a PNG at 110 dpi."""
    data = io.BytesIO()
    # Omit matplotlib's version, so that the same run gives the same bytes.
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    return data.getvalue()


def drawable(name: str) -> str:
    """Escape a class name for matplotlib, because the name may not be valid UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def grid(images: NDArray[np.uint8], titles: Sequence[str]) -> Picture:
    """Draw images, (N, H, W, 3) RGB, each below its title, in rows of at most eight."""
    columns = min(_COLUMNS, ceil(sqrt(len(images))))
    rows = -(-len(images) // columns)
    picture = Picture(figsize=(1.6 * columns, 1.8 * rows), layout="constrained")
    cells = list(picture.subplots(rows, columns, squeeze=False).flat)
    for axes in cells:
        axes.axis("off")
    for axes, image, title in zip(cells, images, titles, strict=False):
        axes.imshow(image)
        short = title if len(title) <= _TITLE else f"{title[: _TITLE - 1]}…"
        axes.set_title(drawable(short), fontsize=8, parse_math=False)  # a $ must not start a formula
    return picture
