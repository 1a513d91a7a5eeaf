"""Runs with stochastic depth and gradient checkpointing: they resume exactly, and what a backbone lacks is refused first."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_runs import LAST, RECIPE, assert_same_run, killed, timeless

from fastflower import Checkpoint, Recipe, train
from fastflower.errors import ArgumentError
from fastflower.training.diagnosis import diagnose
from fastflower.training.run import Run

DROPPING = replace(RECIPE, backbone="timm/mobilenetv3_small_050", drop_path=0.3)


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastflower.training.run.write_report", lambda *_: None)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with stochastic depth that was not interrupted, without checkpointing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.training.run.write_report", lambda *_: None)
        return train(shards, DROPPING, out=tmp_path_factory.mktemp("whole") / "run", device="cpu").folder


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_with_stochastic_depth_resumes_as_if_uninterrupted_also_with_checkpointing(
    shards: Path, tmp_path: Path, whole: Path, checkpointing: bool
) -> None:
    recipe, out = replace(DROPPING, checkpointing=checkpointing), tmp_path / "run"
    killed(shards, recipe, out, (Run, "step", 4), save_steps=2)
    killed(shards, recipe, out, (Run, "step", 5), save_steps=2)
    train(shards, recipe, out=out, resume=True, device="cpu")
    assert_same_run(out, whole)


def test_stochastic_depth_changes_the_training(shards: Path, tmp_path: Path, whole: Path) -> None:
    plain = train(shards, replace(DROPPING, drop_path=None), out=tmp_path / "run", device="cpu")
    assert timeless(plain.history) != timeless(Checkpoint.load(whole / LAST).history)


@pytest.mark.parametrize("changes", [{"drop_path": 0.1}, {"checkpointing": True}])
def test_what_a_backbone_lacks_is_refused_before_anything_is_written(
    shards: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe = Recipe(backbone="vgg11", weights=None, augment=RECIPE.augment, **changes)
    with pytest.raises(ArgumentError, match=rf"^{next(iter(changes))} must be (None|False) with backbone vgg11, "):
        train(shards, recipe, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ArgumentError, match=rf"^{next(iter(changes))} must be (None|False) with backbone vgg11, "):
        diagnose(shards, recipe, device="cpu")
