"""A checkpoint and images in each other's place: the message ends with the command or call that works."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from fastflower import Augment, Checkpoint, Loader, Predictor, Recipe, evaluate, predict
from fastflower.cli import main
from fastflower.errors import ArgumentError, CheckpointError, SampleError

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def run(narrow: None, tmp_path: Path) -> Path:  # noqa: ARG001  (is set up first)
    """The folder of a run, with figures, as `train` leaves it. The working folder also holds images."""
    torch.manual_seed(0)
    recipe = Recipe(weights=None, augment=Augment(size=32, resize=36))
    model = resnet18(weights=None, num_classes=2).state_dict()
    (tmp_path / "runs" / "my run").mkdir(parents=True)
    folder = tmp_path / "runs" / "my run"
    Checkpoint(recipe=recipe, classes=("a", "b"), model=model, epoch=1).save(folder / "checkpoint-best.pt")
    (folder / "history.csv").touch()
    for name in ("runs/my run/curves.png", "1.png", "data/a/1.png", "data/b/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red" if "a" in name else "blue").save(tmp_path / name)
    return folder


@pytest.mark.parametrize("own", ["runs/my run", "runs/my run/checkpoint-best.pt"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("predict 1.png RUN", "predict RUN 1.png"),
        ("predict data RUN", "predict RUN data"),
        ("predict 1.png data/a/1.png RUN --on-bad skip", "predict RUN 1.png data/a/1.png --on-bad skip"),
        ("predict --device cpu -- 1.png RUN", "predict RUN 1.png --device cpu"),
        ("evaluate data RUN", "evaluate RUN data"),
    ],
)
def test_the_swapped_command_is_the_last_line_and_works(
    own: str, before: str, after: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent.parent)
    assert main([own if word == "RUN" else word for word in before.split()]) == 1
    *first, last = capsys.readouterr().err.splitlines()
    wrong = next(word for word in before.split() if word in ("1.png", "data"))
    assert first == [
        f"error: {wrong}: is not a checkpoint, but {own} is; pass the checkpoint first:"
    ]  # no list of files
    assert last == f"  fastflower {after.replace('RUN', shlex.quote(own))}"
    assert main(shlex.split(last)[1:]) == 0


def test_a_url_in_place_of_the_checkpoint_is_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "https://a.org/1.jpg", str(run)]) == 1
    assert capsys.readouterr().err.endswith(f"\n  fastflower predict '{run}' https://a.org/1.jpg\n")


@pytest.mark.parametrize(
    ("call", "images", "shown"),
    [
        (predict, "1.png", "predict({run!r}, '1.png')"),
        (predict, Path("data"), "predict({run!r}, 'data')"),
        (evaluate, "data", "evaluate({run!r}, 'data')"),
    ],
)
def test_the_swapped_call_is_the_last_line_and_works(
    call: Callable[..., Any], images: str | Path, shown: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent.parent)
    for other in (run, run / "checkpoint-best.pt", [run, "1.png"]) if call is predict else (run,):
        with pytest.raises(CheckpointError) as error:
            call(images, other)
        line = str(error.value).rpartition("\n  ")[2]
        own = str(other[0] if isinstance(other, list) else other)
        if not isinstance(other, list):
            assert line == shown.format(run=own)
        assert eval(line, {"predict": predict, "evaluate": evaluate})


def test_a_checkpoint_that_is_missing_is_not_taken_for_an_image(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"/no\.jpg: does not exist; check the path\.$"):
        predict(run / "no.jpg", run)


def test_a_run_without_a_finished_epoch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my run").mkdir()
    Path("my run/checkpoint-last.pt").touch()
    message = (
        r"resume it \(train\(shards, out='my run', resume=True\)\), or pass my run/checkpoint-last\.pt, its weights"
    )
    with pytest.raises(CheckpointError, match=f"^my run: no epoch of this run is finished; {message}"):
        Checkpoint.load("my run")
    assert main(["predict", "my run", "a.jpg"]) == 1
    assert "; resume it (fastflower train SHARDS --out 'my run' --resume), or pass" in capsys.readouterr().err


def test_a_predictor_says_which_of_its_arguments_is_no_checkpoint_and_no_image(run: Path) -> None:
    image, data = run.parent.parent / "1.png", run.parent.parent / "data"
    with pytest.raises(CheckpointError, match=r"/1\.png: is an image, not a checkpoint; pass the checkpoint first"):
        Predictor(image)
    with pytest.raises(
        CheckpointError, match=r"/data: is a folder; pass a file, such as a run's checkpoint-best\.pt\."
    ):
        Predictor(data)
    predictor = Predictor(run, device="cpu")
    with pytest.raises(
        SampleError, match=r"best\.pt: is a checkpoint or other file of PyTorch, .*; pass image files or"
    ):
        predictor(run / "checkpoint-best.pt")


def test_predict_and_a_loader_take_the_images_of_a_folder_in_the_same_order(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nested"
    for name in (
        "a/2.png",
        "a.png",
        "a/b/1.png",
        "A.png",
        "a/10.png",
        "a b/1.png",
        "B/a.png",
        "é.png",
        "a-b/1.png",
        "a/b.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(folder / name)
    loader = Loader.from_files(folder, batch_size=3, augment=Augment(size=32), device="cpu")
    assert [one.path for one in predict(run, folder, device="cpu")] == sorted(folder.rglob("*.png"))
    assert list(loader.paths) == list(map(str, sorted(folder.rglob("*.png"))))


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_runs_figures_are_no_images(command: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(run / "checkpoint-best.pt"), str(run)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"error: {run}: is a run, not images; pass images or shards after the checkpoint.\n"
    with pytest.raises(ArgumentError, match="is a run, not images"):
        predict(run, [run.parent.parent / "1.png", run])


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("runs", "runs: is a folder of runs; pass one of them, such as the newest, runs/my run."),
        ("runs/my_run", "runs/my_run: does not exist; did you mean runs/my run?"),
        ("runs/myrun/checkpoint-best.pt", "runs/myrun/checkpoint-best.pt: does not exist; did you mean runs/my run?"),
        (
            "runs/my run/history.csv",
            "runs/my run/history.csv: is no checkpoint, but lies in the folder of a run; pass runs/my run.",
        ),
    ],
)
def test_what_lies_near_a_run_is_answered_with_the_run(
    typed: str, said: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent.parent)
    with pytest.raises(CheckpointError) as error:
        Predictor(typed)
    assert str(error.value) == said
    assert Predictor("runs/my run", device="cpu")("1.png")[0].class_name in "ab"  # what the messages name
