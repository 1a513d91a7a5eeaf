"""Repeat the experiments of the five student reports and compare the numbers: python tools/reports.py SHARDS

Each experiment trains a recipe in OUT/RECIPE. Interrupted experiments are resumed; the results of finished ones are read.
Writes OUT/reports.md and a figure for each report. Our accuracy is the best epoch's, chosen on the validation split as in
the reports.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from matplotlib.figure import Figure
from tqdm.contrib.logging import logging_redirect_tqdm

from fastflower import Checkpoint, FastflowerError, Loader, Recipe, train
from fastflower.errors import StoppedError
from fastflower.files import write_atomically
from fastflower.models.checkpoint import LAST
from fastflower.recipes.presets import PRESETS
from fastflower.reporting.figures import png
from fastflower.reporting.report import best_epoch

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


BATCH_128 = Experiment("report-c-batch128", 92.6)
FROZEN = Experiment("report-c-resnet50-frozen", 94.5)
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
        "batch size": [Experiment("report-c", 90.2), Experiment("report-c-batch64", 91.4), BATCH_128],
        "network": [BATCH_128, FROZEN, Experiment("report-c-densenet121", 94.2)],
        "two frozen stages, or none": [FROZEN, Experiment("report-c-resnet50", 93.2)],
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


def history_of(shards: str, name: str, recipe: Recipe, out: Path, device: str | None) -> list[dict[str, float]]:
    """Return the history of an experiment, training it first if it is not finished."""
    folder = out / name
    if (folder / "report.html").exists() and (folder / LAST).exists():
        kept = Checkpoint.load(folder / LAST)
        loaders = (Loader(shards, split, batch_size=1, device="cpu", cache=None) for split in ("train", "val"))
        used = [kept.feeding["shards"], kept.feeding.get("val")]
        if kept.recipe.resolved == recipe.resolved and used == [loader.state_dict()["shards"] for loader in loaders]:
            return kept.history
    return train(shards, recipe, out=folder, resume=True, device=device).history


def seconds_of(history: list[dict[str, float]]) -> float:
    """Return the seconds of training and validation over all epochs."""
    return sum(row["train_seconds"] + row["val_seconds"] for row in history)


def table(letters: Sequence[Letter], histories: Histories) -> str:
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
                    f"{last:.1f}% | {reported_seconds} | {seconds_of(history):.0f} | {len(history)} |"
                )
    return "\n".join(lines) + "\n"


def draw(letter: Letter, histories: Histories, path: Path) -> None:
    """Draw a row for each comparison: accuracy by epoch with the reported accuracy dashed, and bars of both."""
    comparisons = REPORTS[letter]
    figure = Figure(figsize=(11, 3.4 * len(comparisons)), layout="constrained")
    grid = figure.subplots(len(comparisons), 2, squeeze=False)
    for (curves, bars), (title, experiments) in zip(grid, comparisons.items(), strict=True):
        shown = [experiment for experiment in experiments if experiment.recipe in histories]
        for number, experiment in enumerate(shown):
            history, color = histories[experiment.recipe], f"C{number}"
            best = 100 * history[best_epoch(history) - 1]["val_accuracy"]
            accuracies = [100 * row["val_accuracy"] for row in history]
            curves.plot([row["epoch"] for row in history], accuracies, marker=".", color=color, label=experiment.recipe)
            curves.axhline(experiment.accuracy, color=color, linestyle="--", linewidth=0.8)
            bars.barh(number - 0.2, best, 0.38, color=color)
            bars.barh(number + 0.2, experiment.accuracy, 0.38, color=color, alpha=0.4)
            seconds = "" if experiment.seconds is None else f", {experiment.seconds:.0f} s"
            reported = f" reported {experiment.accuracy:.1f}{seconds}"
            bars.text(best, number - 0.2, f" here {best:.1f}, {seconds_of(history):.0f} s", va="center", fontsize=8)
            bars.text(experiment.accuracy, number + 0.2, reported, va="center", fontsize=8)
        curves.set(title=f"Report {letter.upper()}: {title}", xlabel="epoch", ylabel="validation accuracy, %")
        curves.xaxis.get_major_locator().set_params(integer=True)
        curves.legend(fontsize=8)
        bars.set_yticks(range(len(shown)), [experiment.recipe for experiment in shown], fontsize=8)
        bars.set(xlabel="best validation accuracy, %", xlim=(0, 129))
        bars.invert_yaxis()
    write_atomically(path, png(figure))


def reports(
    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")],
    report: tuple[Letter, ...] = get_args(Letter),
    out: Path = Path("runs/reports"),
    weights: str | None = "DEFAULT",
    epochs: int | None = None,
    device: str | None = None,
) -> None:
    """Train the reports' experiments and compare the results.

    Args:
        shards: Folder written by pack, or its URL.
        report: Reports to repeat, a to e.
        out: Folder for the runs, the table and the figures.
        weights: Name of pretrained torchvision weights. None uses random weights and freezes no stages.
        epochs: Overrides each recipe's number of epochs, for example to check that all experiments run.
        device: None uses CUDA if available, otherwise the CPU.
    """
    Loader(shards, "val", device="cpu", cache=None)  # fail now, not after training, if there is no validation split
    histories: Histories = {}
    for letter in report:
        for experiment in chain.from_iterable(REPORTS[letter].values()):
            recipe = PRESETS[experiment.recipe]()
            recipe = replace(recipe, weights=weights, freeze=recipe.freeze if weights else 0)
            if experiment.recipe not in histories:
                recipe = replace(recipe, epochs=epochs or recipe.epochs)
                histories[experiment.recipe] = history_of(shards, experiment.recipe, recipe, out, device)
                write_atomically(out / "reports.md", table(report, histories).encode())
        draw(letter, histories, out / f"report-{letter}.png")
    text = table(report, histories)
    text += "" if weights else "\nWith random weights no stage is frozen, whatever the recipe's name says.\n"
    text += f"\nPretrained weights: {weights}; epochs: {epochs or 'as in the reports'}.\n"
    write_atomically(out / "reports.md", text.encode())
    print(text, end="")
    print(f"wrote {out / 'reports.md'}")


def main() -> int:
    """Run the command line. Exits with status 1 after a reported error and 143 after SIGTERM."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fastflower").setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm():
            tyro.cli(reports)
    except FastflowerError as error:
        print(error if isinstance(error, StoppedError) else f"error: {error}", file=sys.stderr)
        return 143 if isinstance(error, StoppedError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
