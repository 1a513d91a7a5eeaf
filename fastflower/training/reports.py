"""The experiments of five student reports, repeated: each report's numbers next to ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

import torch

from fastflower import progress
from fastflower.errors import require
from fastflower.files import write_atomically
from fastflower.loading.loader import Loader
from fastflower.models.checkpoint import LAST, Checkpoint
from fastflower.recipes.presets import PRESETS
from fastflower.recipes.recipe import Precision, Recipe
from fastflower.reporting.figures import Compared, comparison
from fastflower.reporting.report import best_epoch
from fastflower.shards.remote import Remote
from fastflower.training.trainer import train

Letter = Literal["a", "b", "c", "d", "e"]


@dataclass(frozen=True)
class Experiment:
    """A row of a report: our recipe, and the reported numbers."""

    recipe: str
    accuracy: float
    """Validation accuracy, in percent."""
    seconds: float | None = None


def _report_e(backbone: str, *accuracies: float) -> list[Experiment]:
    """Pair a network's four accuracies with recipes in the report's order. The report does not say which accuracy is which."""
    names = [f"report-e-{backbone}-freeze{freeze}-{kind}" for freeze in (2, 3) for kind in ("fixed", "mixed")]
    return [Experiment(name, accuracy) for name, accuracy in zip(names, accuracies, strict=True)]


_BATCH_128 = Experiment("report-c-batch128", 92.6)
_FROZEN = Experiment("report-c-resnet50-frozen", 94.5)
# The experiments to compare side by side, by report, then by title of the comparison.
REPORTS: dict[Letter, dict[str, list[Experiment]]] = {
    "a": {"ResNet-18": [Experiment("report-a", 93.33, 19 * 60 + 35)]},
    "b": {
        "batch size and network": [
            Experiment("report-b", 93.2),
            Experiment("report-b-batch64", 90.4),
            Experiment("report-b-resnet34", 92.5),
        ]
    },
    "c": {
        "batch size": [Experiment("report-c", 90.2), Experiment("report-c-batch64", 91.4), _BATCH_128],
        "network": [_BATCH_128, _FROZEN, Experiment("report-c-densenet121", 94.2)],
        "two frozen stages, or none": [_FROZEN, Experiment("report-c-resnet50", 93.2)],
    },
    "d": {
        "25 epochs, and 25 more": [
            Experiment("report-d", 89.82, 3 * 60 + 20),
            Experiment("report-d-50", 93.33, 6 * 60 + 49),
        ]
    },
    "e": {
        "ResNet-101": _report_e("resnet101", 80.43, 80.10, 80.10, 79.44),
        "ResNet-152": _report_e("resnet152", 80.10, 79.70, 79.47, 78.50),
        "VGG-11": _report_e("vgg11", 65.77, 64.00, 64.34, 62.00),
        "40 epochs": [Experiment("report-e-resnet101-40", 80.49)],
    },
}

Histories = dict[str, list[dict[str, float]]]
"""Histories of the runs so far, by recipe."""


def _history_of(
    shards: str | Path | Remote, name: str, recipe: Recipe, out: Path, device: str | torch.device | None
) -> list[dict[str, float]]:
    """Return the history of an experiment, training it first if it is not finished."""
    folder = out / name
    if (folder / "report.html").exists() and (folder / LAST).exists():
        kept = Checkpoint.load(folder / LAST)
        loaders = (Loader(shards, split, batch_size=1, device="cpu", cache=None) for split in ("train", "val"))
        used = [kept.feeding["shards"], kept.feeding.get("val")]
        if kept.recipe.resolved == recipe.resolved and used == [loader.state_dict()["shards"] for loader in loaders]:
            return kept.history
    return train(shards, recipe, out=folder, resume=True, device=device).history


def _seconds_of(history: list[dict[str, float]]) -> float:
    """Return the seconds of training and validation over all epochs."""
    return sum(row["train_seconds"] + row["val_seconds"] for row in history)


def _table(letters: Sequence[Letter], histories: Histories) -> str:
    """Format the reported results and ours as Markdown; a recipe that is compared twice has two rows."""
    lines = [
        "| report | compared | recipe | reported | ours, best epoch | last epoch | reported s | ours s | epochs |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for letter in letters:
        for title, experiments in REPORTS[letter].items():
            for experiment in experiments:
                if experiment.recipe not in histories:
                    continue
                history = histories[experiment.recipe]
                best = 100 * history[best_epoch(history) - 1]["val_accuracy"]
                last = 100 * history[-1]["val_accuracy"]
                reported_seconds = "" if experiment.seconds is None else round(experiment.seconds)
                lines.append(
                    f"| {letter.upper()} | {title} | {experiment.recipe} | {experiment.accuracy:.1f}% | {best:.1f}% | "
                    f"{last:.1f}% | {reported_seconds} | {_seconds_of(history):.0f} | {len(history)} |"
                )
    return "\n".join(lines) + "\n"


def _draw(letter: Letter, histories: Histories, path: Path) -> None:
    """Draw a row for each comparison: accuracy by epoch with the reported accuracy dashed, and bars of both."""
    rows: dict[str, list[Compared]] = {}
    for title, experiments in REPORTS[letter].items():
        shown = [experiment for experiment in experiments if experiment.recipe in histories]
        rows[f"Report {letter.upper()}: {title}"] = [
            Compared(
                name=experiment.recipe,
                accuracies=[100 * row["val_accuracy"] for row in histories[experiment.recipe]],
                best=100 * histories[experiment.recipe][best_epoch(histories[experiment.recipe]) - 1]["val_accuracy"],
                seconds=_seconds_of(histories[experiment.recipe]),
                reported=experiment.accuracy,
                reported_seconds=experiment.seconds,
            )
            for experiment in shown
        ]
    write_atomically(path, comparison(rows))


@progress.shown()
def reports(
    shards: str | Path | Remote,
    *,
    report: tuple[Letter, ...] = get_args(Letter),
    out: str | Path = Path("runs/reports"),
    weights: str | None = "DEFAULT",
    epochs: int | None = None,
    batch_size: int | None = None,
    accumulate: int | None = None,
    size: int | None = None,
    precision: Precision | None = None,
    seed: int | None = None,
    device: str | torch.device | None = None,
) -> str:
    """Train the experiments of five student reports and compare the results.

    Each experiment trains a recipe in OUT/RECIPE. Interrupted experiments are resumed; the results of finished ones are
    read. Writes OUT/reports.md and a figure for each report. Our accuracy is the best epoch's, chosen on the validation
    split as in the reports.

    Args:
        shards: The folder written by `pack`, or its URL, as for Loader.
        report: Reports to repeat, a to e.
        out: Folder for the runs, the table and the figures.
        weights: Pretrained weights for every experiment: a torchvision name or a file. None uses random weights and
            freezes no stages.
        epochs: Overrides each recipe's number of epochs, for example to check that all experiments run.
        batch_size: Overrides each recipe's number of samples per step.
        accumulate: Overrides each recipe's number of batches per update.
        size: Overrides each recipe's image size in pixels.
        precision: Overrides each recipe's precision.
        seed: Overrides each recipe's random seed.
        device: None uses CUDA if available, otherwise the CPU.

    Returns the table as Markdown. Raises what `train` raises, and ShardError if the shards have no val split.

    Example:
        >>> table = reports("shards", report=("a",), out="try", weights=None, epochs=1, size=32, device="cpu")
        >>> print(table.splitlines()[2][:36])
        | A | ResNet-18 | report-a | 93.3% |
    """
    require(set(report) <= set(REPORTS), "report", f"letters from {', '.join(REPORTS)}", report)
    Loader(shards, "val", device="cpu", cache=None)  # fail now, not after training, if there is no validation split
    given = {"epochs": epochs, "batch_size": batch_size, "accumulate": accumulate, "precision": precision, "seed": seed}
    changes = {name: value for name, value in given.items() if value is not None}
    out, histories = Path(out), Histories()
    for letter in report:
        for experiment in chain.from_iterable(REPORTS[letter].values()):
            if experiment.recipe not in histories:
                recipe = _changed(PRESETS[experiment.recipe](), weights, size, changes)
                histories[experiment.recipe] = _history_of(shards, experiment.recipe, recipe, out, device)
                write_atomically(out / "reports.md", _table(report, histories).encode())
        _draw(letter, histories, out / f"report-{letter}.png")
    text = _table(report, histories)
    text += "" if weights else "\nWith random weights no stage is frozen, whatever the recipe's name says.\n"
    others = [f"{name}: {value}" for name, value in {**changes, "size": size}.items() if value and name != "epochs"]
    others = [f"Pretrained weights: {weights}", f"epochs: {epochs or 'as in the reports'}", *others]
    text += f"\n{'; '.join(others)}.\n"
    write_atomically(out / "reports.md", text.encode())
    progress.tell("reports", [f"wrote {out / 'reports.md'}"])
    return text


def _changed(recipe: Recipe, weights: str | None, size: int | None, changes: Mapping[str, object]) -> Recipe:
    augment = replace(recipe.augment, size=size) if size else recipe.augment
    recipe = replace(recipe, weights=weights, freeze=recipe.freeze if weights else 0, augment=augment)
    return Recipe.from_dict({**recipe.to_dict(), **changes})
