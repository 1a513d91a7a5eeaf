"""What a notebook shows of Manifest, Scores, Report and Checkpoint: one line each, and a little HTML."""

from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from training_runs import RECIPE

from fastflower import Checkpoint, Manifest, Report, train
from fastflower.models.metrics import Scores, score
from fastflower.shards.folds import FoldView
from fastflower.shards.manifest import Split

MANY = 21_841  # classes of ImageNet-21k
NAMES = tuple(f"class {number}" for number in range(MANY))
ROW = {"epoch": 1, "lr": 0.1, "size": 32, "train_loss": 1.5, "train_accuracy": 0.5, "images_per_second": 9.0}
ROW |= {"train_seconds": 2.0, "wait_seconds": 0.1, "val_loss": 1.25, "val_accuracy": 0.625}


def manifest(classes: tuple[str, ...], **options: Any) -> Manifest:
    counts = tuple(range(2, 2 + len(classes)))
    splits = {"train": Split(sum(counts), counts, ()), "val": Split(len(classes), (1,) * len(classes), ())}
    return Manifest(folder=Path("shards"), classes=classes, splits=splits, options={}, **options)


def scores(classes: tuple[str, ...], samples: int) -> Scores:
    """Scores of a network that finds every second sample; labels go around."""
    labels = np.arange(samples) % len(classes)
    predicted = np.where(np.arange(samples) % 2, labels, (labels + 1) % len(classes))
    return score(classes, labels, np.log(np.eye(len(classes), dtype=np.float32)[predicted] * 0.9 + 1e-3))


def table(html: str) -> list[list[str]]:
    """Return the cells of the table in a fragment of HTML, which must be well-formed."""
    return [
        ["".join(cell.itertext()) for cell in row] for row in ElementTree.fromstring(f"<div>{html}</div>").iter("tr")
    ]


def html_of(shown: Any) -> str:
    return shown._repr_html_()


CHECKPOINT = Checkpoint(recipe=RECIPE, classes=NAMES, model={"head": torch.zeros(1000, 1000)}, epoch=1, history=[ROW])
EMPTY = np.broadcast_to(np.int64(0), (MANY, MANY))  # takes no memory
SCORED = Scores(NAMES, 1.25, EMPTY, np.zeros(100, np.int64), np.broadcast_to(np.float32(0), (100, MANY)))
LINES = {
    f"Manifest(folder='shards', classes={MANY}, train={MANY * (MANY + 3) // 2}, val={MANY})": manifest(NAMES),
    "Scores(accuracy=0.500 (6 of 12), loss=3.506, classes=3)": scores(NAMES[:3], 12),
    f"Scores(accuracy=0.000 (0 of 100), loss=1.250, classes={MANY})": SCORED,
    "Report(folder='runs/a', epochs=1, best_epoch=1, val_accuracy=0.625)": Report(Path("runs/a"), [ROW], 1, SCORED),
    f"Checkpoint(backbone='resnet18', classes={MANY}, epoch=1, val_accuracy=0.625)": CHECKPOINT,
    "Split(samples=9)": Split(9, (1,) * MANY, ()),
}


@pytest.mark.parametrize("line", LINES)
def test_a_repr_is_one_short_line_however_many_classes_there_are(line: str) -> None:
    begun = perf_counter()
    assert repr(LINES[line]) == line
    assert perf_counter() - begun < 0.5


def test_without_validation_no_accuracy_is_named() -> None:
    row = {name: value for name, value in ROW.items() if not name.startswith("val")}
    assert repr(Report(Path("a"), [row], 1, None)) == "Report(folder='a', epochs=1, best_epoch=1)"
    tally: Any = {"losses": torch.zeros(3)}
    stopped = replace(CHECKPOINT, history=[], epoch=0, tally=tally)
    assert repr(stopped) == f"Checkpoint(backbone='resnet18', classes={MANY}, epoch=0, step=3)"


def test_a_view_of_a_fold_is_one_line_too() -> None:
    whole = manifest(NAMES)
    entries = {name: getattr(whole, name) for name in ("folder", "classes", "splits", "options")}
    assert len(repr(FoldView(**entries, whole=whole, fold=0))) < 100


def test_a_manifest_is_a_table_of_splits() -> None:
    shown = html_of(manifest(("<b>", "\udce9"), skipped=({"path": "a", "reason": "b"},), warnings=()))
    assert table(shown) == [
        ["class", "train", "val"],
        ["all classes", "5", "2"],
        ["<b>", "2", "1"],
        ["\\udce9", "3", "1"],
    ]
    assert "shards; 2 classes; skipped: 1<" in shown


def test_of_many_classes_a_manifest_shows_the_smallest() -> None:
    order = np.random.default_rng(0).permutation(1000)
    large = manifest(tuple(f"{number}" for number in range(1000)))
    counts = tuple((order + 5).tolist())
    large = replace(large, splits={"train": Split(sum(counts), counts, ())})
    rows = table(html_of(large))
    assert rows[2:] == [[str(int(np.flatnonzero(order == rank)[0])), str(rank + 5)] for rank in range(20)]


def test_scores_are_a_table_of_classes() -> None:
    found = scores(("a", "<b>", "c"), 12)
    assert table(html_of(found)) == [
        ["class", "samples", "precision", "recall"],
        ["a", "4", "50.0%", "50.0%"],
        ["<b>", "4", "50.0%", "50.0%"],
        ["c", "4", "50.0%", "50.0%"],
    ]
    assert f"macro_f1={found.macro_f1:.3f}" in html_of(found)


def test_of_many_classes_scores_show_those_with_the_lowest_recall() -> None:
    """Classes without samples have no recall; they come last."""
    found = scores(NAMES[:100], 150)  # each of classes 0, 2, 4 ... is never found; each of 1, 3, 5 ... always
    rows = table(html_of(found))
    assert [row[0] for row in rows[1:]] == [NAMES[2 * number] for number in range(20)]
    assert "of 100 classes, those with the lowest recall" in html_of(found)
    none = Scores(
        NAMES[:2], 0.0, np.array([[3, 0], [0, 0]]), np.zeros(3, np.int64), np.eye(2, dtype=np.float32)[[0] * 3]
    )
    assert table(html_of(none))[2] == [NAMES[1], "0", "undefined", "undefined"]


@pytest.mark.usefixtures("narrow")
def test_a_report_shows_its_best_epoch_scores_and_figures(shards: Path, tmp_path: Path) -> None:
    report = train(shards, replace(RECIPE, epochs=2), out=tmp_path / "run", device="cpu")
    shown = html_of(report)
    assert report.scores is not None
    assert table(shown) == table(html_of(report.scores))
    assert f"epoch {report.best_epoch}/2: train loss" in shown
    assert str(tmp_path / "run" / "report.html") in shown
    assert [image.get("width") for image in ElementTree.fromstring(f"<div>{shown}</div>").iter("img")] == ["640", "480"]
    assert len(shown) < 200_000  # what a saved notebook grows by
    assert html_of(replace(report, scores=None)).count("<img") == 1
    many = replace(report, scores=scores(NAMES[:60], 120))  # a confusion matrix of that size cannot be read
    assert html_of(many).count("<img") == 1
