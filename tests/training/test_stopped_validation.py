"""Interrupted validation: the epoch's training is saved, and a resumed run continues with the validation."""

from dataclasses import replace
from itertools import count as count_from
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import LAST, RECIPE, assert_same_run, before_call, kill, killed, place, small, terminate

from fastflower import Checkpoint, Recipe, train
from fastflower.errors import StoppedError
from fastflower.models import inference
from fastflower.training import run as loop
from fastflower.training.run import Run

pytestmark = pytest.mark.usefixtures("no_figures")

# A validation has two batches; a recalibration has five and comes before it.
VARIANTS: list[Any] = [
    ({}, [1, 2, 3]),
    ({"ema": 0.9, "accumulate": 2, "patience": 1, "epochs": 3}, [3]),
    ({"epochs": 4, "soup": 2, "recalibrate": True, "sizes": (24, 40)}, [7]),
    pytest.param({"epochs": 4, "soup": 2}, [3, 7], marks=pytest.mark.soak),
    pytest.param({"epochs": 4, "soup": 2, "recalibrate": True, "sizes": (24, 40)}, [3, 8], marks=pytest.mark.soak),
    pytest.param({"ema": 0.9, "recalibrate": True}, [5], marks=pytest.mark.soak),
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastflower.models.defaults.build", small)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List that grows by one with each training step."""
    done: list[int] = []
    step = Run.step

    def counted(*values: Any, **options: Any) -> Any:
        done.append(1)
        return step(*values, **options)

    monkeypatch.setattr(Run, "step", counted)
    return done


def trained(shards: Path, recipe: Recipe, out: Path, steps: list[int]) -> int:
    """Resume to the end; return the number of training steps."""
    steps.clear()
    train(shards, recipe, out=out, resume=True, device="cpu")
    return len(steps)


@pytest.mark.parametrize(("changes", "numbers"), VARIANTS)
def test_sigterm_during_validation_saves_the_epochs_training_and_stops_before_the_next_batch(
    shards: Path, tmp_path: Path, steps: list[int], changes: dict[str, Any], numbers: list[int]
) -> None:
    """`numbers` counts the batches of recalibration and validation."""
    recipe = replace(RECIPE, **changes)
    whole = train(shards, recipe, out=tmp_path / "whole", device="cpu")
    for number in numbers:
        out, seen = tmp_path / f"run-{number}", count_from(0)
        with pytest.MonkeyPatch.context() as patch:
            before_call(inference, "log_probabilities", number, terminate, patch)
            before_call(inference, "log_probabilities", number + 1, lambda seen=seen: next(seen), patch)
            with pytest.raises(StoppedError) as stopped:
                train(shards, recipe, out=out, device="cpu")
        assert next(seen) == 0, "no batch after the current one"
        epochs, step = place(out)
        where = f"in the validation of epoch {epochs + 1}" if step else f"after epoch {epochs}"
        assert f"run-{number}: stopped by SIGTERM {where}, and saved a checkpoint. To continue:" in str(stopped.value)
        assert step in (0, 5)
        left = len(whole.history) - epochs - (1 if step else 0)
        assert trained(shards, recipe, out, steps) == 5 * left, "finished steps are not repeated"
        assert_same_run(out, whole.folder)


def test_sigterm_at_the_start_of_validation_stops_before_its_first_batch(
    shards: Path, tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        before_call(loop, "measure", 2, terminate, patch)
        before_call(inference, "log_probabilities", 3, kill, patch)
        with pytest.raises(StoppedError, match="stopped by SIGTERM in the validation of epoch 2, and saved"):
            train(shards, RECIPE, out=tmp_path / "run", device="cpu")
    last = Checkpoint.load(tmp_path / "run" / LAST)
    assert (last.epoch, last.step, last.tally.get("trained")) == (1, 5, True)
    assert trained(shards, RECIPE, tmp_path / "run", steps) == 0


def test_a_kill_during_a_long_validation_does_not_lose_the_epochs_training(
    shards: Path, tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is saved once after ten seconds of validation (zero here), and none for a short one."""
    saved: list[str] = []
    monkeypatch.setattr(Checkpoint, "save", spied(saved, Checkpoint.save))
    whole = train(shards, RECIPE, out=tmp_path / "whole", device="cpu")
    assert saved.count(LAST) == 2
    monkeypatch.setattr("fastflower.training.run._LONG", -1.0)
    saved.clear()
    again = train(shards, RECIPE, out=tmp_path / "again", device="cpu")
    assert saved.count(LAST) == 4
    assert_same_run(again.folder, whole.folder)
    killed(shards, RECIPE, tmp_path / "run", (inference, "log_probabilities", 2))
    assert place(tmp_path / "run") == (0, 5)
    assert trained(shards, RECIPE, tmp_path / "run", steps) == 5
    assert_same_run(tmp_path / "run", whole.folder)


def spied(saved: list[str], save: Any) -> Any:
    def spy(self: Checkpoint, path: Path, **options: Any) -> None:
        saved.append(path.name)
        save(self, path, **options)

    return spy


def test_an_older_versions_checkpoint_of_the_last_step_of_an_epoch_can_be_resumed(
    shards: Path, tmp_path: Path, steps: list[int]
) -> None:
    """It lacks `trained`, and was saved before the epoch was added to the model soup."""
    recipe = replace(RECIPE, soup=2)
    whole = train(shards, recipe, out=tmp_path / "whole", device="cpu").folder
    killed(shards, recipe, tmp_path / "run", (loop, "measure", 1), save_steps=5)
    last = Checkpoint.load(tmp_path / "run" / LAST)
    assert last.tally.pop("trained") is False
    last.save(tmp_path / "run" / LAST)
    assert trained(shards, recipe, tmp_path / "run", steps) == 5
    assert_same_run(tmp_path / "run", whole)


def test_sigterm_while_the_best_epoch_is_scored_again_stops_without_losing_anything(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastflower.training.run.best_epoch", lambda _: 1)
    with monkeypatch.context() as patch:
        before_call(loop, "measure", 3, terminate, patch)
        with pytest.raises(StoppedError, match="stopped by SIGTERM after epoch 2, and saved"):
            train(shards, RECIPE, out=tmp_path / "run", device="cpu")
    assert place(tmp_path / "run") == (2, 0)
    assert train(shards, RECIPE, out=tmp_path / "run", resume=True, device="cpu").scores is not None


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"soup": 2}])
def test_a_checkpoint_saved_during_recalibration_has_the_statistics_of_training(
    shards: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Partial new statistics would give wrong predictions."""
    recipe = replace(RECIPE, recalibrate=True, **changes)
    killed(
        shards,
        replace(recipe, recalibrate=False),
        tmp_path / "plain",
        (loop, "write_history", 1 if "soup" in changes else 2),
    )
    with pytest.MonkeyPatch.context() as patch:
        batches = 3 if "soup" in changes else 5  # the third of recalibration; without soup, after two of validation
        before_call(inference, "log_probabilities", batches, terminate, patch)
        with pytest.raises(StoppedError, match="in the validation of epoch"):
            train(shards, recipe, out=tmp_path / "run", device="cpu")
    left, right = (Checkpoint.load(tmp_path / name / LAST) for name in ("plain", "run"))
    for name, value in left.model.items():
        assert torch.equal(right.model[name], value), name
