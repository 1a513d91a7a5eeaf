"""Unusual inputs of training: numpy numbers, two runs at once, another validation split, unreadable files."""

import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packs import draw_image
from places import ROOT
from training_runs import RECIPE

from fastflower import Augment, Checkpoint, distributed, evaluate, pack, train
from fastflower.errors import ArgumentError, CheckpointError
from fastflower.models.weights_file import load_file
from fastflower.training import diagnosis
from fastflower.training.diagnosis import diagnose
from fastflower.training.run import Run
from fastflower.training.run_folder import run_folder

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")


def test_a_recipe_converts_numpy_numbers_lists_and_paths_to_plain_values(shards: Path, tmp_path: Path) -> None:
    odd: dict[str, Any] = {"size": [32, np.int64(32)], "resize": np.int32(36), "crop": [0.5, np.float32(1.0)]}
    augment = Augment(**odd, flip=np.float64(0.5))  # pyright: ignore[reportArgumentType]
    given: dict[str, Any] = {"lr": np.float64(0.01), "batch_size": np.int64(24), "epochs": np.int8(1), "sizes": [32]}
    recipe = replace(RECIPE, augment=augment, **given)
    plain = replace(RECIPE, augment=replace(RECIPE.augment, size=(32, 32)), epochs=1, sizes=(32,))
    assert recipe == plain
    assert {type(getattr(recipe, name)) for name in ("batch_size", "epochs")} == {int}
    assert type(recipe.augment.flip) is float
    done = train(shards, recipe, out=tmp_path / "run", device="cpu")
    assert Checkpoint.load(done.checkpoint).recipe == recipe.resolved
    assert evaluate(done.checkpoint, shards, device="cpu").accuracy == done.history[-1]["val_accuracy"]
    train(shards, plain, out=tmp_path / "run", resume=True, device="cpu")
    again: Any = replace(plain, weights=tmp_path / "run" / "checkpoint-best.pt")
    assert again.weights == str(done.checkpoint)
    assert train(shards, again, out=tmp_path / "next", device="cpu").checkpoint.exists()


def test_of_two_runs_started_together_the_second_does_not_overwrite_the_first(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    began = run_folder(None, RECIPE.backbone, resume=False)
    first = train(shards, RECIPE, device="cpu")
    assert first.folder == began
    monkeypatch.setattr("fastflower.training.trainer.run_folder", lambda *_, **__: began)
    before = first.checkpoint.read_bytes()
    with pytest.raises(
        CheckpointError,
        match=r"^runs/resnet18: another run just took it; run again, or pass a folder as out \(--out\)\.$",
    ):
        train(shards, replace(RECIPE, seed=1), device="cpu")
    assert first.checkpoint.read_bytes() == before


def packed(root: Path, out: Path, **splits: int) -> Path:
    """Pack the same 24 training images each time, and other splits with images drawn from a first seed."""
    for split, first in {"train": 0, **splits}.items():
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(12):
                draw_image(first + 100 * (name == "b") + number, 40).save(root / split / name / f"{number}.jpg")
    pack(root, out)
    return out


def test_a_run_resumes_only_with_its_own_validation_split(tmp_path: Path) -> None:
    first = packed(tmp_path / "1", tmp_path / "first", val=1000)
    same = packed(tmp_path / "2", tmp_path / "same", val=1000)
    other = packed(tmp_path / "3", tmp_path / "other", val=2000)
    none = packed(tmp_path / "4", tmp_path / "none", test=1000)
    recipe = replace(RECIPE, batch_size=8)
    train(first, recipe, out=tmp_path / "run", device="cpu")
    train(none, recipe, out=tmp_path / "without", device="cpu")
    message = r"checkpoint-last\.pt: was validated on a different val split; resume with the original shards\. To train on from"
    for shards, run in ((other, "run"), (none, "run"), (first, "without")):
        with pytest.raises(CheckpointError, match=message):
            train(shards, recipe, out=tmp_path / run, resume=True, device="cpu")
    assert len(train(same, recipe, out=tmp_path / "run", resume=True, device="cpu").history) == recipe.epochs


def test_an_unreadable_file_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r": is a folder; pass a file, such as a run's checkpoint-best\.pt\.$"):
        load_file(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.pt").touch()
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(
        CheckpointError, match=r"a\.pt: cannot be read \(Permission denied\); make it readable, or pass another file"
    ):
        load_file(tmp_path / "a.pt")


def test_ranks_refuse_a_numbered_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    message = (
        r"^device must be cuda under torchrun, got 'cuda:0': each rank uses the GPU whose number is its local rank\.$"
    )
    with pytest.raises(ArgumentError, match=message), distributed.process_group("cuda:0"):
        pass


def test_the_diagnosis_benchmarks_convolutions_as_training_does(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = [False]
    seen: list[bool] = []

    @contextmanager
    def fastest(_device: torch.device) -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    step = Run.step

    def noted(self: Run, *batch: Any) -> Any:
        seen.append(inside[0])
        return step(self, *batch)

    monkeypatch.setattr(diagnosis, "fastest_convolutions", fastest)
    monkeypatch.setattr(Run, "step", noted)
    diagnose(shards, RECIPE, seconds=0.05, device="cpu")
    assert seen
    assert all(seen)


@pytest.mark.parametrize("out", [".", "file"])
def test_the_demo_does_not_clear_folders_it_did_not_create(
    tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's images in a folder called flowers must survive."""
    (tmp_path / "flowers" / "rose").mkdir(parents=True)
    (tmp_path / "flowers" / "rose" / "mine.jpg").touch()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", out])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "demo.py"), run_name="__main__")
    told = f"--out {out}: was not written by a demo; choose another folder or remove this one."
    assert told in f"{end.value.code}{capsys.readouterr().err}"
    assert (tmp_path / "flowers" / "rose" / "mine.jpg").exists()
