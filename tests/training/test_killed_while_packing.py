"""A `train` that was killed while it packed leaves no folder that a later run must go around."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from forks import forked
from training_runs import RECIPE

from fastflower import train
from fastflower.errors import CheckpointError
from fastflower.files import locked
from fastflower.packing import packer

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

ONE = replace(RECIPE, epochs=1)


@pytest.fixture
def data(flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(flowers, "data"))


def test_the_same_command_takes_the_same_folder(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(packer, "_make_shards", dying)
        assert forked(lambda: train(data, ONE, device="cpu")) == -signal.SIGKILL
    assert [path.name for path in Path("runs/resnet18").iterdir()] == [".lock"]
    assert train(data, ONE, device="cpu").folder == Path("runs/resnet18")
    assert train(data, ONE, device="cpu").folder == Path("runs/resnet18-2")
    assert not list(Path("runs/packs").glob(".*"))


def test_a_folder_that_is_locked_or_holds_anything_else_is_left_alone(data: Path) -> None:
    for number, other in enumerate(("run.json", "notes.txt"), 1):
        folder = Path("runs", f"resnet18-{number}" if number > 1 else "resnet18")
        folder.mkdir(parents=True)
        (folder / other).write_text("{}")
    with locked(Path("runs/resnet18-3/.lock")):
        Path("runs/resnet18-4").mkdir()
        assert train(data, ONE, device="cpu").folder == Path("runs/resnet18-4")


def test_a_refused_run_removes_the_folder_of_the_killed_one(data: Path) -> None:
    Path("runs/resnet18").mkdir(parents=True)
    Path("runs/resnet18/.lock").touch()
    with pytest.raises(CheckpointError, match=r"^no\.pth: does not exist"):
        train(data, replace(RECIPE, weights="no.pth"), device="cpu")
    assert not Path("runs/resnet18").exists()
