"""Figures of a run, encoded as images: curves, confusion matrix and thumbnails."""
# pyright: standard
# matplotlib does not type its keyword arguments.

import base64
import io

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from fastflower.loading.picture import drawable, png
from fastflower.models.metrics import Scores

_MOST_NAMES = 50  # maximum number of class names along each axis of the confusion matrix
_THUMB = 160  # pixels, the longer side


def curves(history: list[dict[str, float]]) -> bytes:
    """Plot loss and accuracy by epoch, as a PNG."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split in ("train", "val"):
            if f"{split}_{name}" in history[-1]:
                axes.plot(epochs, [row[f"{split}_{name}"] for row in history], marker="o", markersize=3, label=split)
        axes.set(xlabel="epoch", ylabel=name, xlim=(0, len(epochs) + 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return png(figure)


def confusion(scores: Scores) -> bytes:
    """Draw the confusion matrix as a PNG. Shades show fractions of each true class; counts are printed if they fit."""
    size = min(20, max(4.5, 0.45 * len(scores.classes)))
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    share = scores.confusion / np.maximum(1, scores.confusion.sum(axis=1, keepdims=True))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = range(0, len(scores.classes), -(-len(scores.classes) // _MOST_NAMES))
    names = [drawable(scores.classes[tick]) for tick in ticks]
    axes.set_xticks(ticks, names, rotation=45, ha="right", parse_math=False)  # a $ must not start a formula
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    if len(scores.classes) <= 30:
        for (row, column), count in np.ndenumerate(scores.confusion):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
    return png(figure)


def thumbnail(source: NDArray[np.uint8]) -> str:
    """Encode an image, (H, W, 3) uint8, as a small base64 JPEG."""
    image = Image.fromarray(source)
    image.thumbnail((_THUMB, _THUMB))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return base64.b64encode(data.getvalue()).decode()
