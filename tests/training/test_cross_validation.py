"""Cross-validation: training and evaluation on the folds of a pack."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packs import drawn, exactly
from training_runs import LAST, RECIPE

from fastflower import Checkpoint, Loader, Recipe, evaluate, pack, train
from fastflower.cli import main
from fastflower.errors import ArgumentError, CheckpointError, ShardError

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

SMALL = replace(RECIPE, epochs=1, batch_size=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("folds") / "data", a=10, b=8, c=6)


@pytest.fixture(scope="module")
def shards(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images in three folds. Read-only."""
    pack(data, out := tmp_path_factory.mktemp("packed") / "shards", folds=3)
    return out


@pytest.fixture(scope="module")
def others(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tars with four folds. Read-only."""
    pack(data, out := tmp_path_factory.mktemp("packed") / "others", folds=4)
    return out


def trained(shards: Path, out: Path, **options: Any) -> Path:
    return train(shards, SMALL, out=out, device="cpu", **options).folder / LAST


@pytest.fixture(scope="module")
def last(shards: Path, tmp_path_factory: pytest.TempPathFactory, narrow: None, no_figures: None) -> Path:  # noqa: ARG001  (set up first)
    """The checkpoint of a run that was trained on folds 0 and 2, and validated on fold 1."""
    return trained(shards, tmp_path_factory.mktemp("runs") / "run", fold=1)


def test_a_run_validates_on_its_fold_and_remembers_it(shards: Path, last: Path) -> None:
    checkpoint = Checkpoint.load(last)
    assert (checkpoint.fold, Checkpoint(recipe=Recipe(), classes=(), model={}, epoch=0).fold) == (1, None)
    scores = evaluate(checkpoint, shards, device="cpu")
    assert list(scores.paths) == list(Loader(shards, "val", fold=1, device="cpu").paths)
    assert scores.accuracy == checkpoint.history[-1]["val_accuracy"]
    assert scores.loss == pytest.approx(checkpoint.history[-1]["val_loss"])
    assert evaluate(last, shards, split="train", device="cpu").num_samples == 24 - scores.num_samples
    assert f"<h1>{last.parent.name}: resnet18 (recipe " in (text := (last.parent / "report.html").read_text())
    assert " on 3 classes, validated on fold 1</h1>" in text


def test_a_run_resumes_only_with_its_fold(shards: Path, others: Path, last: Path) -> None:
    run = last.parent
    what = f"{last}: was trained with fold 1, got fold"
    for fold in (0, 2):
        with pytest.raises(
            CheckpointError,
            match=exactly(f"{what} {fold}; pass fold=1 (--fold 1), or omit it. To train on other folds:").removesuffix(
                "$"
            ),
        ):
            train(shards, SMALL, fold=fold, out=run, resume=True, device="cpu")
    with pytest.raises(
        CheckpointError, match=r"the state has folds '\w+', but this loader has '\w+'; resume with the same"
    ):
        train(others, SMALL, fold=1, out=run, resume=True, device="cpu")
    for fold in (1, None):
        assert len(train(shards, SMALL, fold=fold, out=run, resume=True, device="cpu").history) == 1


def warnings(caplog: pytest.LogCaptureFixture, checkpoint: Path, shards: Path, **options: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        evaluate(checkpoint, shards, device="cpu", **options)
    return [record.getMessage().removeprefix(f"{checkpoint}: ") for record in caplog.records]


SAW = "it saw images of this fold, so the scores say little about new images"


def test_evaluating_on_training_images_is_not_silent(
    shards: Path, others: Path, data: Path, last: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings(caplog, last, shards) == warnings(caplog, last, shards, fold=1) == []
    assert warnings(caplog, last, shards, fold=0) == [f"was trained with fold 1, but is evaluated on fold 0: {SAW}"]
    what = (
        "because these shards have other folds than the checkpoint, which was trained with fold 1; pass fold (--fold)"
    )
    with pytest.raises(ArgumentError, match=exactly(f"fold must be from 0 to 3, {what}.")):
        evaluate(last, others, device="cpu")
    assert warnings(caplog, last, others, fold=1) == [f"was trained with fold 1, but is evaluated on fold 1: {SAW}"]
    pack(data, tmp_path / "smaller", folds=3, quality=50)  # other bytes, the same folds
    assert warnings(caplog, last, tmp_path / "smaller") == []
    assert len(warnings(caplog, last, tmp_path / "smaller", fold=2)) == 1
    pack(data, tmp_path / "plain")
    trained_on = {*Loader(shards, "train", fold=1, batch_size=4, device="cpu").paths}
    seen = len(trained_on & {*Loader(tmp_path / "plain", "val", batch_size=4, device="cpu").paths})
    what = f"was trained on {seen} of these 5 images, so the scores say little about new images"
    assert warnings(caplog, last, tmp_path / "plain") == [what]


def test_training_on_all_folds_validates_nothing(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained(shards, tmp_path / "run")
    assert "nothing is validated" in caplog.text
    assert "to validate on a fold, pass fold=0 .. 2 (--fold)" in caplog.text
    choice = "pass a fold from 0 to 2, or choose from train"
    with pytest.raises(ShardError, match=exactly(f"{shards}: has no samples in split 'val'; {choice}.")):
        evaluate(whole, shards, device="cpu")
    what = f"{whole}: was trained without fold, got fold 1; omit fold. To train on other folds:"
    with pytest.raises(CheckpointError, match=exactly(what).removesuffix("$")):
        train(shards, SMALL, fold=1, out=whole.parent, resume=True, device="cpu")
    assert warnings(caplog, whole, shards, fold=2) == [f"was trained on all folds, but is evaluated on fold 2: {SAW}"]


def test_the_command_line_takes_a_fold(
    shards: Path, last: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--weights", "None", "--augment.size", "32", "--epochs", "1", "--batch-size", "8", "--device", "cpu"]
    assert main(["train", str(shards), "--fold", "2", "--out", str(tmp_path / "run"), *flags]) == 0
    assert Checkpoint.load(tmp_path / "run" / LAST).fold == 2
    capsys.readouterr()
    assert main(["evaluate", str(last), str(shards), "--fold", "1", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("val: 8 images, accuracy")
