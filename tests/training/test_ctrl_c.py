"""Ctrl-C saves at the next step and says how to continue; a second one stops at once and says what is lost."""

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training_runs import (
    DIE,
    LAST,
    RECIPE,
    arguments,
    assert_same_run,
    before_call,
    place,
    small,
    written_history,
)

from fastflower import train
from fastflower.models import inference
from fastflower.training import run as loop
from fastflower.training.run import Run
from fastflower.training.stopping import preemption

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("fastflower.models.defaults.build", small)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.models.defaults.build", small)
        return train(shards, RECIPE, out=tmp_path_factory.mktemp("whole") / "run", device="cpu").folder


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def twice() -> None:
    press()
    press()


def interrupted(shards: Path, out: Path, moment: tuple[Any, str, int], act: Any = press, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        before_call(*moment, act, patch)
        with pytest.raises(KeyboardInterrupt):
            train(shards, RECIPE, out=out, device="cpu", **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("moment", "where"),
    [
        pytest.param((Run, "step", 1), "in epoch 1, step 1", id="the first step"),
        pytest.param((Run, "step", 7), "in epoch 2, step 2", id="a step"),
        pytest.param((inference, "log_probabilities", 1), "in the validation of epoch 1", id="validation"),
        pytest.param((loop, "write_history", 1), "after epoch 1", id="after validation"),
        pytest.param((loop, "write_report", 1), "after epoch 2", id="report"),
    ],
)
def test_ctrl_c_loses_nothing(
    shards: Path, tmp_path: Path, whole: Path, moment: Any, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    interrupted(shards, out, moment)
    call = f"train({str(shards)!r}, out={str(out)!r}, device='cpu', resume=True)"
    assert caplog.messages == [
        "interrupted: saving after this step; interrupt again to stop at once",
        f"{out}: interrupted by SIGINT {where}, and saved a checkpoint. To continue:\n  {call}",
    ]
    eval(call, {"train": train, "recipe": RECIPE})
    assert_same_run(out, whole)


def test_a_second_ctrl_c_stops_at_once_and_says_what_is_lost(
    shards: Path, tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    interrupted(shards, out, (Run, "step", 9), twice, save_steps=2)
    assert place(out) == (1, 2)
    lost = r"what came after the checkpoint in epoch 2, step 2, \d+ s ago, is lost\. To continue:\n  train\("
    assert re.search(
        rf"run: interrupted by SIGINT in epoch 2, step 3; {lost}.*, save_steps=2, .*, resume=True\)$", caplog.text
    )
    train(shards, RECIPE, out=out, resume=True, device="cpu")
    assert_same_run(out, whole)


def test_before_the_first_checkpoint_nothing_is_left_that_blocks_the_next_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    interrupted(shards, tmp_path / "deep" / "run", (Run, "step", 2), twice)
    call = f"train({str(shards)!r}, {RECIPE!r}, out={str(tmp_path / 'deep' / 'run')!r}, device='cpu')"
    told = f"interrupted by SIGINT in epoch 1, step 1; nothing was saved yet. To start again:\n  {call}"
    assert caplog.messages[-1] == f"{tmp_path / 'deep' / 'run'}: {told}"
    assert list(tmp_path.iterdir()) == []
    with pytest.MonkeyPatch.context() as patch:
        before_call(Run, "step", 2, twice, patch)
        with pytest.raises(KeyboardInterrupt):
            train(shards, RECIPE, device="cpu")
    assert train(shards, RECIPE, device="cpu").folder == Path("runs/resnet18")


def test_files_of_others_in_the_folder_stay(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    interrupted(shards, tmp_path / "run", (Run, "step", 2), twice)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    train(shards, RECIPE, out=tmp_path / "run", device="cpu")


def test_before_training_begins_ctrl_c_stops_at_once(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(shards, tmp_path / "run", (loop, "optimizer_of", 1))
    call = f"train({str(shards)!r}, {RECIPE!r}, out={str(tmp_path / 'run')!r}, device='cpu')"
    told = "interrupted by SIGINT before training began. To start again:"
    assert caplog.messages == [f"{tmp_path / 'run'}: {told}\n  {call}"]
    assert list(tmp_path.iterdir()) == []


def test_an_ignored_ctrl_c_stays_ignored_and_a_programs_own_handler_stays() -> None:
    """A shell's background jobs ignore it."""
    for handler in (signal.SIG_IGN, lambda *_: None):
        signal.signal(signal.SIGINT, handler)
        with preemption() as stop:
            stop.begun = True
            assert signal.getsignal(signal.SIGINT) is handler
            press()
            assert not stop()
        assert signal.getsignal(signal.SIGINT) is handler


def test_a_command_that_is_interrupted_ends_with_130_and_the_command_to_continue(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, DIE, "SIGINT", "step", "3", *arguments(RECIPE, shards, out)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    *_, told, line = done.stderr.splitlines()
    assert told == f"{out}: interrupted by SIGINT in epoch 1, step 3, and saved a checkpoint. To continue:"
    assert line == f"  fastflower train {shards} --out {out} --save-steps 2 --device cpu --resume"
    assert place(out) == (0, 3)
    assert not (out / "history.csv").exists()
    assert (out / LAST).exists()


def test_an_interrupt_in_another_thread_is_left_to_the_program(shards: Path, tmp_path: Path) -> None:
    """There, Python delivers no signal: the run goes on, as a notebook's cell in a thread does."""
    import threading

    thread = threading.Thread(target=lambda: train(shards, RECIPE, out=tmp_path / "run", device="cpu"))
    thread.start()
    thread.join()
    assert len(written_history(tmp_path / "run")) == RECIPE.epochs


def test_the_warning_is_shown_by_default(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(shards, tmp_path / "run", (Run, "step", 2))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
