"""The picture of a run: history.csv, curves.png, confusion.png and one report.html that opens anywhere."""

import base64
import csv
import io
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from PIL import Image

from fastflower.files import write_atomically
from fastflower.loading.loader import Loader
from fastflower.models.metrics import Scores
from fastflower.recipes.recipe import Recipe

_MISTAKES = 12  # photographs shown
_MOST_NAMES = 50  # at either side of the confusion matrix
_THUMB = 160  # pixels


@dataclass(frozen=True, slots=True)
class Report:
    """What `train` returns."""

    folder: Path
    """Of the run: history.csv, checkpoint-best.pt, checkpoint-last.pt, report.html, curves.png, confusion.png, and where the
    package is installed tensorboard."""
    history: list[dict[str, float]]
    """A row an epoch: epoch, lr, size (pixels), train_loss, train_accuracy, images_per_second, train_seconds,
    wait_seconds, and where there is a split "val" val_loss, val_accuracy and val_seconds."""
    best_epoch: int
    """Of the highest validation accuracy, of equals the lowest validation loss; counted from 1."""
    scores: Scores | None
    """Of the best epoch on split "val"."""

    @property
    def checkpoint(self) -> Path:
        """The network of the best epoch."""
        return self.folder / "checkpoint-best.pt"


def best_epoch(history: list[dict[str, float]]) -> int:
    """The epoch, counted from 1, of the highest validation accuracy, of equals that of the lowest loss, of equals the first.

    A small split gives many epochs the same accuracy. It is the last epoch where nothing was validated.
    """
    if "val_accuracy" not in history[-1]:
        return len(history)
    return max(range(len(history)), key=lambda row: (history[row]["val_accuracy"], -history[row]["val_loss"])) + 1


def epoch_line(row: dict[str, float], epochs: int) -> str:
    """A row of the history in words."""
    text = f"epoch {row['epoch']:.0f}/{epochs}: train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:.1%}"
    if "val_accuracy" in row:
        text += f", val loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:.1%}"
    text += f", {row['size']:.0f} pixels, {row['images_per_second']:.0f} images/s"
    return f"{text}, {row['wait_seconds']:.1f} of {row['train_seconds']:.1f} s waiting"


def tensorboard(folder: Path) -> Any:
    """As a context: a writer of the run's folder "tensorboard", or None where the package is not installed."""
    if find_spec("tensorboard") is None:
        return nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


def write_history(folder: Path, history: list[dict[str, float]], board: Any = None) -> None:
    """Write history.csv whole, after every epoch, and its last row to `board`."""
    if board is not None:
        for name, value in history[-1].items():
            split, _, what = name.partition("_")
            board.add_scalar(f"{what}/{split}" if split in ("train", "val") else name, value, history[-1]["epoch"])
        board.flush()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[-1]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(folder / "history.csv", text.getvalue().encode())


def write_report(
    folder: Path,
    recipe: Recipe,
    classes: tuple[str, ...],
    history: list[dict[str, float]],
    best_epoch: int,
    scores: Scores | None,
    val: Loader | None,
) -> None:
    """Draw the run and write it into its folder."""
    pictures = {"curves": _curves(history)}
    mistakes: list[dict[str, Any]] = []
    if scores is not None and val is not None:
        pictures["confusion"] = _confusion(scores)
        mistakes = _mistakes(scores, val)
    for name, data in pictures.items():
        write_atomically(folder / f"{name}.png", data)
    template = Environment(loader=PackageLoader("fastflower"), autoescape=True).get_template("report.html")
    html = template.render(
        recipe=recipe.to_dict(),
        classes=classes,
        history=history,
        best=history[best_epoch - 1],
        scores=scores,
        pictures={name: base64.b64encode(data).decode() for name, data in pictures.items()},
        mistakes=mistakes,
    )
    write_atomically(folder / "report.html", html.encode("utf-8", "backslashreplace"))


def drawable(name: str) -> str:
    """A class's name as matplotlib takes it: it need not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def png(figure: Figure) -> bytes:
    """A figure as a file, 110 pixels an inch."""
    data = io.BytesIO()
    # Without the version of matplotlib inside, the same run gives the same bytes.
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    return data.getvalue()


def _curves(history: list[dict[str, float]]) -> bytes:
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


def _confusion(scores: Scores) -> bytes:
    size = min(20, max(4.5, 0.45 * len(scores.classes)))
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    share = scores.confusion / np.maximum(1, scores.confusion.sum(axis=1, keepdims=True))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = range(0, len(scores.classes), -(-len(scores.classes) // _MOST_NAMES))
    names = [drawable(scores.classes[tick]) for tick in ticks]
    axes.set_xticks(ticks, names, rotation=45, ha="right", parse_math=False)  # a $ is a $
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    if len(scores.classes) <= 30:
        for (row, column), count in np.ndenumerate(scores.confusion):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
    return png(figure)


def _mistakes(scores: Scores, val: Loader) -> list[dict[str, Any]]:
    """The photographs that were given to a wrong class with the highest probability."""
    predicted = scores.predictions
    confidence = scores.probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != scores.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:_MISTAKES]
    return [
        {
            "true": scores.classes[scores.labels[index]],
            "predicted": scores.classes[predicted[index]],
            "probability": float(confidence[index]),
            "path": scores.paths[index],
            "jpeg": _thumbnail(val.photo(int(index))),
        }
        for index in worst
    ]


def _thumbnail(photo: Any) -> str:
    image = Image.fromarray(photo)
    image.thumbnail((_THUMB, _THUMB))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return base64.b64encode(data.getvalue()).decode()
