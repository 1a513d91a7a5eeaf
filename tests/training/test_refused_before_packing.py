"""What `train` and `evaluate` refuse is refused before any image is packed."""

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from training_runs import RECIPE, flags

from fastflower import Recipe, train
from fastflower.cli import main
from fastflower.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")


@pytest.fixture
def data(flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))  # an empty cache
    return Path(shutil.copytree(flowers, "data"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--fold", "0"],
            "--fold must be None, because data is not packed with folds, got 0; pack it first:",
        ),
        (["--weights", "no.pth"], "no.pth: does not exist; check the path."),
        (["--weights", "data"], "data: is a folder; pass a file, such as a run's checkpoint-best.pt."),
        (["--weights", "notes.pth"], "notes.pth: was not written by torch.save or safetensors"),
        (["--weights", "other.pth"], "other.pth: holds no weights"),
    ],
)
def test_train_refuses_folds_and_weights_first(
    arguments: list[str], message: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes.pth").write_text("no weights")
    torch.save({"a": 1}, "other.pth")
    assert main(["train", str(data), *flags(RECIPE), *arguments]) == 1
    assert f"error: {message}" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_the_command_for_folds_can_be_typed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(data), "--fold", "0"]) == 1
    command, then = capsys.readouterr().err.splitlines()[-1].strip().split(" && ")
    assert then == "fastflower train shards --fold 0"
    assert main(command.split()[1:]) == 0
    recipe = flags(RECIPE)
    assert (
        main(["train", "shards", "--fold", "0", "--device", "cpu", *recipe, "--epochs", "1", "--weights", "None"]) == 0
    )


def test_weights_that_cannot_be_downloaded_are_told_first(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(CheckpointError, match=r"could not be downloaded .* --weights FILE .* --recipe scratch or "):
        train(data, Recipe(), device="cpu")
    assert not Path("runs").exists()


def test_the_log_names_the_weights_once(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastflower")
    first = train(data, RECIPE, device="cpu")
    os.utime(next(data.rglob("*.jpg")), (1, 1))
    caplog.clear()
    train(data, replace(RECIPE, weights=str(first.checkpoint)), device="cpu")
    assert sum(": loaded into resnet18" in text for text in caplog.messages) == 1
    assert any(": packing " in text for text in caplog.messages)


@pytest.mark.parametrize(("divided", "count"), [(False, 150), (True, 140)])
def test_a_batch_larger_than_the_train_split_is_refused_first(
    divided: bool, count: int, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if divided:  # two images of each class for validation
        for folder in sorted(data.iterdir()):
            for split, files in (("val", sorted(folder.iterdir())[:2]), ("train", sorted(folder.iterdir())[2:])):
                Path("divided", split, folder.name).mkdir(parents=True)
                for file in files:
                    file.rename(Path("divided", split, folder.name, file.name))
        data = Path("divided")
    sizes = [*flags(RECIPE), "--device", "cpu", "--epochs", "1", "--weights", "None"]
    assert main(["train", str(data), *sizes, "--batch-size", str(count + 1)]) == 1
    told = f"batch_size: the batch of {count + 1} samples exceeds the {count} images for training in {data}; lower batch_size"
    *_, last = capsys.readouterr().err.splitlines()
    assert last == f"error: {told} (--batch-size {count // 2})."
    assert not Path("runs").exists()
    assert main(["train", str(data), *sizes, *last.rpartition("(")[2].removesuffix(").").split()]) == 0
