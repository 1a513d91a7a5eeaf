"""The best epoch: the same one in the report, in checkpoint-best.pt and for patience."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_runs import BEST, LAST, RECIPE

from fastflower import Checkpoint, Loader, train
from fastflower.reporting.report import best_epoch
from fastflower.training.run import Run

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")


def row(accuracy: float, loss: float) -> dict[str, float]:
    return {"val_accuracy": accuracy, "val_loss": loss}


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([row(0.5, 1.0), row(0.9, 0.5), row(0.9, 0.4), row(0.9, 0.4), row(0.8, 0.1)], 3),
        ([row(0.9, 0.4), row(0.9, 0.5)], 1),
        ([row(1.0, 0.3), row(1.0, 0.2), row(1.0, 0.1)], 3),
        ([row(0.0, 2.0)], 1),
        ([{}, {}], 2),
    ],
)
def test_among_epochs_of_equal_accuracy_the_lowest_loss_is_best(history: list[dict[str, float]], expected: int) -> None:
    assert best_epoch(history) == expected


def test_a_tie_resolved_by_an_older_version_stays_as_it_is(shards: Path, tmp_path: Path) -> None:
    """Its checkpoint-best.pt is from the first epoch, so best_epoch must be that one too."""
    report = train(shards, RECIPE, out=tmp_path / "run", device="cpu")
    last = Checkpoint.load(tmp_path / "run" / LAST)
    first, second = ({**entry, "val_accuracy": 0.5} for entry in last.history)
    history = [{**first, "val_loss": 2.0}, {**second, "val_loss": 1.0}]
    replace(last, history=history).save(tmp_path / "run" / LAST)
    replace(last, history=history[:1], epoch=1).save(report.checkpoint)
    assert train(shards, RECIPE, out=tmp_path / "run", resume=True, device="cpu").best_epoch == 1


def test_patience_and_the_best_checkpoint_follow_the_loss_when_accuracies_are_equal(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal accuracy with a lower loss is better and restarts the count."""
    losses = [2.0, 1.5, 1.6, 1.4, 1.4, 1.45, 0.1]

    class Scored(Run):
        def _score(self, val: Loader) -> Any:
            scores = super()._score(val)
            scores.confusion[:] = np.eye(5, dtype=np.int64)
            return replace(scores, loss=losses[min(len(self.history), 6)])

    monkeypatch.setattr("fastflower.training.trainer.Run", Scored)
    report = train(shards, replace(RECIPE, patience=2, epochs=7), out=tmp_path / "run", device="cpu")
    assert [entry["val_loss"] for entry in report.history] == losses[:6]
    assert report.best_epoch == Checkpoint.load(tmp_path / "run" / BEST).epoch == 4
