"""TensorBoard events of a run, and `reports`, which repeats the experiments of five reports."""

import runpy
import sys
import threading
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from places import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastflower import Augment, Recipe, Report, pack, train
from fastflower.cli import main
from fastflower.errors import ArgumentError, CheckpointError
from fastflower.recipes.presets import PRESETS
from fastflower.reporting import figures, report
from fastflower.training import reports as module
from fastflower.training.run import Run

pytestmark = pytest.mark.usefixtures("narrow")

PROGRAM = ROOT / "tools" / "reports.py"
SMALL = Recipe(weights=None, augment=Augment(size=32, resize=36), batch_size=40, epochs=2, lr=0.01, precision="float32")
TAGS = {
    "train_loss": "loss/train",
    "train_accuracy": "accuracy/train",
    "train_seconds": "seconds/train",
    "val_loss": "loss/val",
    "val_accuracy": "accuracy/val",
    "val_seconds": "seconds/val",
}


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return train(shards, SMALL, out=tmp_path_factory.mktemp("runs") / "run", device="cpu")


def test_tensorboard_events_have_the_columns_of_the_history(run: Report) -> None:
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {TAGS.get(name, name) for name in run.history[0]}
    for name in run.history[0]:
        found = events.Scalars(TAGS.get(name, name))
        assert [event.step for event in found] == [1, 2]
        assert [event.value for event in found] == pytest.approx([row[name] for row in run.history], rel=1e-6)


def test_without_tensorboard_training_writes_no_events(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda _name: None)
    found = train(shards, replace(SMALL, epochs=1), out=tmp_path / "run", device="cpu")
    names = {path.name for path in found.folder.iterdir() if path.suffix != ".png"}
    assert names == {"history.csv", "run.json", "checkpoint-best.pt", "checkpoint-last.pt", "report.html"}


def test_training_leaves_no_thread_behind(shards: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    train(shards, replace(SMALL, epochs=1), out=tmp_path / "run", device="cpu")
    assert set(threading.enumerate()) - before == set()


@pytest.fixture
def trained() -> list[str]:
    """Names of the trained recipes' folders."""
    return []


@pytest.fixture
def reports(trained: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module with three recipes that take a second each; two of them are compared twice."""
    one, two, three = (
        module.Experiment(name, accuracy) for name, accuracy in (("one", 90), ("two", 80), ("three", 70))
    )
    one = replace(one, seconds=125.4)
    monkeypatch.setattr(module, "REPORTS", {"a": {"first": [one, two], "again": [two]}, "b": {"last": [three, one]}})
    presets = {name: lambda seed=seed: replace(SMALL, seed=seed) for seed, name in enumerate(("one", "two", "three"))}
    monkeypatch.setattr(module, "PRESETS", presets)

    def spy(shards: str, recipe: Recipe, *, out: Path, **options: Any) -> Report:
        trained.append(out.name)
        return train(shards, recipe, out=out, **options)

    monkeypatch.setattr(module, "train", spy)
    return module


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a tiny run; other tests look at the figures."""
    monkeypatch.setattr(figures, "png", lambda _: b"")


def rows(out: Path) -> list[list[str]]:
    """Return the cells of the table's rows."""
    lines = (out / "reports.md").read_text().splitlines()
    assert lines[0].startswith("| report | compared | recipe | reported |")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:] if line.startswith("|")]


def test_reports_trains_each_recipe_once_and_compares(
    reports: Any,
    trained: list[str],
    shards: Path,
    tmp_path: Path,
) -> None:
    reports.reports(shards, report=("a", "b"), out=tmp_path, weights=None, epochs=1, device="cpu")
    assert trained == ["one", "two", "three"]
    found = rows(tmp_path)
    assert [row[:4] for row in found] == [
        ["A", "first", "one", "90.0%"],
        ["A", "first", "two", "80.0%"],
        ["A", "again", "two", "80.0%"],
        ["B", "last", "three", "70.0%"],
        ["B", "last", "one", "90.0%"],
    ]
    assert [row[6] for row in found] == ["125", "", "", "", "125"]
    assert {row[8] for row in found} == {"1"}
    for row in found:
        lines = (tmp_path / row[2] / "history.csv").read_text().splitlines()
        columns = dict(zip(lines[0].split(","), map(float, lines[1].split(",")), strict=True))
        assert row[4] == row[5] == f"{100 * columns['val_accuracy']:.1f}%"
        assert row[7] == f"{columns['train_seconds'] + columns['val_seconds']:.0f}"
    for name in ("report-a.png", "report-b.png"):
        with Image.open(tmp_path / name) as image:
            image.verify()
    text = (tmp_path / "reports.md").read_text()

    trained.clear()
    reports.reports(shards, report=("a", "b"), out=tmp_path, weights=None, epochs=1, device="cpu")
    assert trained == []
    assert (tmp_path / "reports.md").read_text() == text


@pytest.mark.usefixtures("undrawn")
def test_reports_goes_on_where_it_was_interrupted(
    reports: Any, trained: list[str], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is interrupted in the second epoch of the second recipe."""
    train_epoch = Run.train_epoch

    def killed(run: Run, epoch: int) -> dict[str, float]:
        if run.folder.name == "two" and epoch == 1:
            raise KeyboardInterrupt("killed")
        return train_epoch(run, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_epoch", killed)
        with pytest.raises(KeyboardInterrupt, match="interrupted by SIGINT after epoch 1, and saved a checkpoint"):
            reports.reports(shards, report=("a",), out=tmp_path, weights=None, device="cpu")
    assert [row[2] for row in rows(tmp_path)] == ["one"]
    first = (tmp_path / "two" / "history.csv").read_text().splitlines()[1]
    trained.clear()
    epochs: list[tuple[str, int]] = []

    def spied(run: Run, epoch: int) -> dict[str, float]:
        epochs.append((run.folder.name, epoch))
        return train_epoch(run, epoch)

    monkeypatch.setattr(Run, "train_epoch", spied)
    reports.reports(shards, report=("a",), out=tmp_path, weights=None, device="cpu")
    assert trained == ["two"]
    assert epochs == [("two", 1)]
    assert (tmp_path / "two" / "history.csv").read_text().splitlines()[1] == first
    assert [(row[2], row[8]) for row in rows(tmp_path)] == [("one", "2"), ("two", "2"), ("two", "2")]


@pytest.mark.usefixtures("undrawn")
def test_reports_finishes_a_run_without_a_report_and_does_not_mix_runs_of_other_recipes(
    reports: Any, trained: list[str], shards: Path, tmp_path: Path
) -> None:
    reports.reports(shards, report=("b",), out=tmp_path, weights=None, epochs=1, device="cpu")
    text = (tmp_path / "reports.md").read_text()
    assert text.endswith("\n\nPretrained weights: None; epochs: 1.\n")
    (tmp_path / "one" / "report.html").unlink()
    trained.clear()
    reports.reports(shards, report=("b",), out=tmp_path, weights=None, epochs=1, device="cpu")
    assert trained == ["one"]
    assert (tmp_path / "one" / "report.html").exists()
    assert (tmp_path / "reports.md").read_text() == text
    with pytest.raises(
        CheckpointError,
        match=r"was trained with epochs 1 \(now 2\); resume with that recipe, or pass none\. To train on",
    ):
        reports.reports(shards, report=("b",), out=tmp_path, weights=None, epochs=2, device="cpu")


def test_reports_refuses_an_unknown_letter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["reports", "shards", "--report", "f"])
    assert "--report" in capsys.readouterr().err
    unknown: Any = ("f",)
    with pytest.raises(ArgumentError, match=r"^report must be letters from a, b, c, d, e, got \('f',\)\.$"):
        module.reports("shards", report=unknown)


def test_reports_prints_errors_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["reports", str(tmp_path), "--weights", "None", "--device", "cpu", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {tmp_path}: has no manifest.json")
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-size", "0"), "--batch-size must be an integer, at least 1, got 0."),
        (("--size", "-1"), "--size must be one or two integers, each at least 1, got -1."),
    ],
)
def test_reports_names_its_own_flags(
    flags: tuple[str, str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reports", str(shards), "--out", str(tmp_path / "out"), "--device", "cpu", *flags]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


def test_reports_without_out_says_where_the_table_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    @wraps(module.reports)
    def recorded(**values: Any) -> str:
        asked.append(values)
        return "table\n"

    monkeypatch.setattr(module, "reports", recorded)
    assert main(["reports", "--report", "a", "c", "shards"]) == 0
    assert asked == [{"shards": "shards", "report": ("a", "c"), "out": Path("runs/reports")}]
    assert capsys.readouterr().out == "table\nwrote runs/reports/reports.md\n"


def test_exactly_the_report_presets_are_compared() -> None:
    named = {
        one.recipe
        for comparisons in module.REPORTS.values()
        for experiments in comparisons.values()
        for one in experiments
    }
    assert named == {name for name in PRESETS if name.startswith("report-")}
    assert list(module.REPORTS) == ["a", "b", "c", "d", "e"]


def test_reports_runs_as_a_program(
    flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a narrow network, so in this process."""
    for path in flowers.glob("*/000*.jpg"):  # 50: one step of training
        (tmp_path / "few" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "few" / path.parent.name / path.name).symlink_to(path)
    pack(tmp_path / "few", tmp_path / "shards")
    command = [PROGRAM, tmp_path / "shards", "--report", "a", "--weights", "None", "--epochs", "1", "--out", tmp_path]
    device = ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), *device])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(PROGRAM), run_name="__main__")
    ((letter, title, recipe, reported, *_),) = rows(tmp_path)
    assert (letter, title, recipe, reported) == ("A", "ResNet-18", "report-a", "93.3%")
    assert (tmp_path / "report-a" / "report.html").exists()
    for name in ("report-a.png", "report-a/curves.png", "report-a/confusion.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 300
    assert capsys.readouterr().out == (tmp_path / "reports.md").read_text() + f"wrote {tmp_path / 'reports.md'}\n"
