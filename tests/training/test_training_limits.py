"""Stopped training: timings and the best checkpoint survive, and non-finite weights are never saved."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import BEST, LAST, RECIPE, assert_same_run, before_call, killed, small, terminate

from fastflower import Checkpoint, train
from fastflower.errors import StoppedError, TrainingError
from fastflower.training.run import Run

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastflower.models.defaults.build", small)


def test_the_seconds_before_an_interruption_count(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_call(Run, "step", 3, terminate, monkeypatch)
    with pytest.raises(StoppedError, match="stopped by SIGTERM in epoch 1, step 3, and saved"):
        train(shards, RECIPE, out=tmp_path, device="cpu")
    last = Checkpoint.load(tmp_path / LAST)
    last.tally["seconds"] = last.tally.get("seconds", 0.0) + 1000
    last.tally["waited"] = last.tally.get("waited", 0.0) + 500
    last.save(tmp_path / LAST)
    first, second = train(shards, RECIPE, out=tmp_path, resume=True, device="cpu").history
    assert first["train_seconds"] > 1000 > second["train_seconds"]
    assert first["wait_seconds"] > 500 > second["wait_seconds"]
    assert first["images_per_second"] < 1


def test_a_kill_between_saving_best_and_last_does_not_lose_the_best_epoch(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastflower.training.run.best_epoch", lambda _: 1)
    whole = tmp_path / "whole"
    train(shards, RECIPE, out=whole, device="cpu")
    killed(shards, RECIPE, tmp_path / "run", (Checkpoint, "save", 2))
    train(shards, RECIPE, out=tmp_path / "run", resume=True, device="cpu")
    assert Checkpoint.load(whole / BEST).epoch == 1
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("save_steps", [None, 1])
def test_weights_that_are_not_finite_are_never_saved(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int | None
) -> None:
    """For example, the last update of an epoch can overflow although its loss was finite."""
    step, done = Run.step, [0]

    def breaking(self: Run, *values: Any, **options: Any) -> Any:
        found = step(self, *values, **options)
        done[0] += 1
        if done[0] == 10:  # the last of the second epoch
            with torch.no_grad():
                next(self.network.parameters()).fill_(torch.nan)
        return found

    monkeypatch.setattr(Run, "step", breaking)
    advice = (
        "start a new run in a different folder (out) with a lower lr, warm-up (warmup_epochs) "
        "or gradient clipping (clip_norm)"
    )
    message = (
        f"{tmp_path}: the validation loss is not finite after epoch 2; {advice}. "
        f"If {LAST} exists, it was saved before this happened."
        if save_steps is None
        else f"{tmp_path}: weights are no longer finite and were not saved; {advice}."
    )
    with pytest.raises(TrainingError, match=f"^{re.escape(message)}$"):
        train(shards, RECIPE, out=tmp_path, save_steps=save_steps, device="cpu")
    last = Checkpoint.load(tmp_path / LAST)
    assert (last.epoch, last.step) == ((1, 0) if save_steps is None else (1, 4))
    assert all(value.isfinite().all() for value in last.model.values())


@pytest.mark.parametrize("ema", [None, 0.5])
def test_batch_norm_statistics_that_are_not_finite_are_never_saved(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    """An infinite variance makes outputs 0, so the validation loss stays finite. An average is checked too."""
    step, done = Run.step, [0]

    def breaking(self: Run, *values: Any, **options: Any) -> Any:
        done[0] += 1
        if done[0] == 10:  # the last of the second epoch
            next(value for name, value in self.scored.named_buffers() if name.endswith("running_var")).fill_(torch.inf)
        return step(self, *values, **options)

    monkeypatch.setattr(Run, "step", breaking)
    with pytest.raises(TrainingError, match=r": weights are no longer finite and were not saved; start a new run"):
        train(shards, replace(RECIPE, ema=ema), out=tmp_path, device="cpu")
    assert Checkpoint.load(tmp_path / LAST).epoch == 1


def test_two_signals_stop_training_like_one(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_call(Run, "step", 2, lambda: (terminate(), terminate()), monkeypatch)
    with pytest.raises(StoppedError, match="stopped by SIGTERM in epoch 1, step 2, and saved"):
        train(shards, replace(RECIPE, epochs=1), out=tmp_path, device="cpu")
