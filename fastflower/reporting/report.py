"""Report of a run: history.csv, figures (*.png), TensorBoard events and a self-contained report.html."""

import base64
import csv
import io
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, Template

from fastflower.files import write_atomically
from fastflower.loading.loader import Loader
from fastflower.models.metrics import Scores
from fastflower.recipes.flags import changes, nearest
from fastflower.recipes.recipe import Recipe
from fastflower.reporting.figures import confusion, curves, thumbnail
from fastflower.reporting.record import read
from fastflower.tables import html

_MISTAKES = 12  # maximum number of images shown
_MOST_CONFUSED = 50  # maximum number of classes whose confusion matrix can be read in a notebook


@dataclass(frozen=True, slots=True)
class Report:
    """Result of a run, as returned by `train`."""

    folder: Path
    """The run's folder. Contains history.csv, checkpoint-best.pt, checkpoint-last.pt, report.html, figures (*.png), and
    tensorboard/ if that package is installed."""
    history: list[dict[str, float]]
    """One row per epoch: epoch, lr, size (pixels), images (trained on: those that do not fill a last batch are left out),
    train_loss, train_accuracy, images_per_second, train_seconds, wait_seconds, and, if there is a val split, val_loss,
    val_accuracy and val_seconds."""
    best_epoch: int
    """Epoch with the highest validation accuracy, counted from 1; ties go to the lowest validation loss."""
    scores: Scores | None
    """Scores of the best epoch on the val split; None if the shards have no val split."""

    def __repr__(self) -> str:
        row = self.history[self.best_epoch - 1]
        val = f", val_accuracy={row['val_accuracy']:.3f}" if "val_accuracy" in row else ""
        return f"Report(folder={str(self.folder)!r}, epochs={len(self.history)}, best_epoch={self.best_epoch}{val})"

    def _repr_html_(self) -> str:
        """Return the best epoch, its scores and the figures, for notebooks."""
        text = (
            f"{self.folder / 'report.html'}; best: {epoch_line(self.history[self.best_epoch - 1], len(self.history))}"
        )
        parts = [f"<p>{html(text)}</p>", _image(curves(self.history), 640)]
        if self.scores is not None:
            parts.append(self.scores._repr_html_())  # pyright: ignore[reportPrivateUsage]  (IPython chose the name)
            if len(self.scores.classes) <= _MOST_CONFUSED:
                parts.append(_image(confusion(self.scores), 480))
        return "".join(parts)

    def last_lines(self) -> list[str]:
        """Return the best epoch, if there is a val split, and where the report is."""
        accuracy = self.history[self.best_epoch - 1].get("val_accuracy", 0.0)
        best = f"best: epoch {self.best_epoch}, validation accuracy {accuracy:.1%}"
        return [best] * (self.scores is not None) + [f"wrote {self.folder / 'report.html'}"]

    @property
    def checkpoint(self) -> Path:
        """Path of the best epoch's checkpoint."""
        return self.folder / "checkpoint-best.pt"


def best_epoch(history: list[dict[str, float]]) -> int:
    """Return the epoch with the highest validation accuracy, counted from 1.

    Ties, which are common with a small split, go to the lowest loss, then to the first epoch. Without validation, the last
    epoch is the best.
    """
    if "val_accuracy" not in history[-1]:
        return len(history)
    return max(range(len(history)), key=lambda row: (history[row]["val_accuracy"], -history[row]["val_loss"])) + 1


def epoch_line(row: dict[str, float], epochs: int) -> str:
    """Format a row of the history for the log."""
    text = f"epoch {row['epoch']:.0f}/{epochs}: train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:.1%}"
    if "val_accuracy" in row:
        text += f", val loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:.1%}"
    text += f", {row['size']:.0f} pixels, {row['images_per_second']:.0f} images/s"
    return f"{text}, waited for data {row['wait_seconds']:.1f} of {row['train_seconds']:.1f} s"


@contextmanager
def tensorboard(folder: Path) -> Generator[Callable[[dict[str, float]], None]]:
    """Yield a function that writes a row of the history to the run's tensorboard folder.

    The function does nothing if the tensorboard package is not installed.
    """
    if find_spec("tensorboard") is None:
        yield lambda _: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as board:

        def write(row: dict[str, float]) -> None:
            for name, value in row.items():
                split, _, what = name.partition("_")
                tag = f"{what}/{split}" if split in ("train", "val") else name
                board.add_scalar(tag, value, row["epoch"])  # pyright: ignore[reportUnknownMemberType]  (untyped)
            board.flush()

        yield write


def write_history(folder: Path, history: list[dict[str, float]]) -> None:
    """Write the entire history to history.csv."""
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
    """Write the figures and report.html into the run's folder."""
    figures, preset = {"curves": curves(history)}, nearest(recipe)
    mistakes: list[dict[str, object]] = []
    if scores is not None and val is not None:
        figures["confusion"] = confusion(scores)
        mistakes = _mistakes(scores, val)
    for name, data in figures.items():
        write_atomically(folder / f"{name}.png", data)
    html = _template().render(
        name=Path(os.path.abspath(folder)).name,  # noqa: PTH100  (Path.absolute keeps ..)
        preset=preset if not changes(recipe, preset) else f"{preset}, changed",
        recipe=recipe.resolved.to_dict(),
        classes=classes,
        fold=val.fold if val else None,
        history=history,
        best=history[best_epoch - 1],
        scores=scores,
        figures={name: base64.b64encode(data).decode() for name, data in figures.items()},
        mistakes=mistakes,
        folder=str(folder),
        record=read(folder),
    )
    write_atomically(folder / "report.html", html.encode("utf-8", "backslashreplace"))


@cache
def _template() -> Template:
    return Environment(loader=PackageLoader("fastflower.reporting"), autoescape=True).get_template("report.html")


def _image(data: bytes, width: int) -> str:
    """Return a PNG as HTML."""
    return f'<img width="{width}" src="data:image/png;base64,{base64.b64encode(data).decode()}" />'


def _mistakes(scores: Scores, val: Loader) -> list[dict[str, object]]:
    """Return the most confident mistakes on the val split, as dicts for the template of report.html."""
    predicted = scores.predictions
    wrong = np.flatnonzero(predicted != scores.labels)
    worst = wrong[np.argsort(-scores.confidence[wrong], kind="stable")][:_MISTAKES]
    return [
        {
            "true": scores.classes[scores.labels[index]],
            "predicted": scores.classes[predicted[index]],
            "probability": float(scores.confidence[index]),
            "path": scores.paths[index],
            "jpeg": thumbnail(val.image(int(index))),
        }
        for index in worst
    ]
