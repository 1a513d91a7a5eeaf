"""Figures of a run, encoded as images: curves, confusion matrix and thumbnails."""
# pyright: standard
# matplotlib does not type its keyword arguments.

import base64
import io
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
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
        axes.set(ylabel=name)
        _number_epochs(axes, len(epochs))
        axes.grid(alpha=0.3)
        axes.legend()
    return png(figure)


def _number_epochs(axes: Axes, epochs: int) -> None:
    """Let the x axis show epochs 1 to `epochs`, with whole numbers."""
    axes.set(xlabel="epoch", xlim=(0.5, epochs + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A run next to the results that a report states for it. Accuracies are in percent."""

    name: str
    accuracies: list[float]
    """One per epoch."""
    best: float
    """Accuracy of the best epoch."""
    seconds: float
    reported: float
    reported_seconds: float | None


def comparison(rows: dict[str, list[Compared]]) -> bytes:
    """Draw a row for each title, as a PNG: accuracy by epoch with the reported accuracy dashed, and bars of both."""
    figure = Figure(figsize=(11, 3.4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for (lines, bars), (title, runs) in zip(grid, rows.items(), strict=True):
        for number, run in enumerate(runs):
            color = f"C{number}"
            epochs = range(1, len(run.accuracies) + 1)
            lines.plot(epochs, run.accuracies, marker=".", color=color, label=run.name)
            lines.axhline(run.reported, color=color, linestyle="--", linewidth=0.8)
            bars.barh(number - 0.2, run.best, 0.38, color=color)
            bars.barh(number + 0.2, run.reported, 0.38, color=color, alpha=0.4)
            seconds = "" if run.reported_seconds is None else f", {run.reported_seconds:.0f} s"
            bars.text(run.best, number - 0.2, f" here {run.best:.1f}, {run.seconds:.0f} s", va="center", fontsize=8)
            told = f" reported {run.reported:.1f}{seconds}"
            bars.text(run.reported, number + 0.2, told, va="center", fontsize=8)
        lines.set(title=title, ylabel="validation accuracy, %")
        _number_epochs(lines, max(len(run.accuracies) for run in runs))
        lines.legend(fontsize=8)
        bars.set_yticks(range(len(runs)), [run.name for run in runs], fontsize=8)
        bars.set(xlabel="best validation accuracy, %", xlim=(0, 129))
        bars.invert_yaxis()
    return png(figure)


def thumbnail(source: NDArray[np.uint8]) -> str:
    """Encode an image, (H, W, 3) uint8, as a small base64 JPEG."""
    image = Image.fromarray(source)
    image.thumbnail((_THUMB, _THUMB))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return base64.b64encode(data.getvalue()).decode()
