"""Frozen stages need weights to start from."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import LAST, RECIPE

from fastflower import Checkpoint, evaluate, train
from fastflower.cli import main
from fastflower.errors import ArgumentError
from fastflower.models.backbone import build
from fastflower.recipes.presets import PRESETS
from fastflower.training.diagnosis import diagnose
from fastflower.training.optimizer import optimizer_of

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")
FROZEN = replace(RECIPE, freeze=1)


@pytest.mark.parametrize("resume", [False, True])
def test_freezing_random_weights_is_refused_before_anything_is_written(
    shards: Path, tmp_path: Path, resume: bool
) -> None:
    message = (
        "freeze must be 0 when weights is None, got 2: frozen stages would stay random; pass --freeze 0 (freeze=0), or "
        "weights to start from (--weights FILE, weights=FILE)."
    )
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        train(
            shards,
            replace(PRESETS["finetune"](), weights=None, freeze=2),
            out=tmp_path / "run",
            resume=resume,
            device="cpu",
        )
    assert not (tmp_path / "run").exists()


def test_an_older_run_that_froze_random_weights_can_be_resumed_and_evaluated(shards: Path, tmp_path: Path) -> None:
    """It starts from the weights in its checkpoint."""
    out = tmp_path / "run"
    train(shards, replace(RECIPE, epochs=1), out=out, device="cpu")
    last = Checkpoint.load(out / LAST)
    groups = optimizer_of(build("resnet18", 5, weights=None, freeze=1), FROZEN).state_dict()
    feeding = {**last.feeding, "epoch": 0}
    begun = replace(last, recipe=FROZEN, history=[], epoch=0, optimizer=groups, feeding=feeding)
    begun.save(out / LAST)
    report = train(shards, FROZEN, out=out, resume=True, device="cpu")
    assert len(report.history) == FROZEN.epochs
    assert torch.equal(Checkpoint.load(report.checkpoint).model["conv1.weight"], last.model["conv1.weight"])
    assert evaluate(report.checkpoint, shards, device="cpu").accuracy == max(
        row["val_accuracy"] for row in report.history
    )


def test_on_the_command_line_frozen_stages_need_weights(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--augment.size", "32", "--sizes", "32", "--epochs", "1", "--device", "cpu"]
    command = [
        "train",
        str(shards),
        "--recipe",
        "finetune",
        "--weights",
        "None",
        *small,
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*command, "--freeze", "2"]) == 1
    assert capsys.readouterr().err.startswith("error: --freeze must be 0 when weights is None, got 2: ")
    assert not (tmp_path / "run").exists()
    assert main(command) == 0  # the recipe's freeze is half of the stages of a pretrained network
    assert Checkpoint.load(tmp_path / "run").recipe.freeze == 0


def test_the_doctor_accepts_frozen_stages_without_weights(shards: Path) -> None:
    """It measures with random weights, which take the same time."""
    assert diagnose(shards, replace(PRESETS["finetune"](), sizes=(32,)), seconds=0.01, device="cpu").training_rate > 0
