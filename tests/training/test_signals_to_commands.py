"""SIGINT and SIGTERM at any moment of `train FOLDER`: the status, what is printed, and that the printed command works."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from training_runs import RECIPE, before_call, flags, small

from fastflower import pack
from fastflower.cli import main
from fastflower.packing import packer, source
from fastflower.reporting import record
from fastflower.training import run as loop
from fastflower.training.run import Run

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

BEFORE, FIRST, LATER = "before training began", "in epoch 1, step 1, and saved", "in epoch 2, step 2, and saved"
MOMENTS: list[Any] = [
    pytest.param(source, "files_of", 1, BEFORE, id="before packing"),
    pytest.param(packer, "_make_shards", 1, BEFORE, id="packing"),
    pytest.param(packer, "publish", 1, BEFORE, id="packed"),
    pytest.param(loop, "network_of", 1, BEFORE, id="building the network"),
    pytest.param(Run, "step", 1, FIRST, id="the first step"),
    pytest.param(Run, "step", 7, LATER, id="in an epoch"),
    pytest.param(loop, "measure", 1, "in the validation of epoch 1, and saved", id="validation"),
    pytest.param(loop, "write_report", 1, "after epoch 2, and saved", id="the report"),
]
SIGNALS = [("SIGINT", 130, "interrupted by SIGINT"), ("SIGTERM", 143, "stopped by SIGTERM")]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("fastflower.models.defaults.build", small)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM], "as it was"
    signal.signal(signal.SIGINT, before[signal.SIGINT])


@pytest.fixture
def data(flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 30 images in the working directory."""
    monkeypatch.chdir(tmp_path)
    for path in flowers.glob("*/*.jpg"):
        if int(path.stem[-3:]) < 6:
            (tmp_path / "data" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "data" / path.parent.name / path.name)
    return Path("data")


def signalled(name: str, moment: tuple[Any, str, int], command: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        before_call(*moment, lambda: signal.raise_signal(signal.Signals[name]), patch)
        return main(command)


@pytest.mark.parametrize(("place", "function", "number", "where"), MOMENTS)
@pytest.mark.parametrize(("name", "status", "how"), SIGNALS)
def test_the_last_line_is_a_command_that_works(
    place: Any, function: str, number: int, where: str, name: str, status: int, how: str, data: Path, capsys: Any
) -> None:
    command = ["train", str(data), "--device", "cpu", *flags(RECIPE), "--batch-size", "5"]
    assert signalled(name, (place, function, number), command) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    *_, told, typed = printed.err.splitlines()
    run = Path("runs/resnet18")
    assert told.startswith(f"{run}: {how} {where}")
    kept = json.loads((run / record.FILE).read_text()) if run.exists() else None
    assert (kept is None) == (where == BEFORE), "a run that saved nothing leaves nothing"
    if kept:
        assert (kept["status"], kept["error"]) == ("interrupted", f"{told}\n{typed}")
    program, *arguments = shlex.split(typed)
    assert program == "fastflower"
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {run / 'report.html'}"
    assert json.loads((run / record.FILE).read_text())["status"] == "finished"
    assert [path.name for path in Path("runs").iterdir() if path.name != run.name] == ["packs"]


@pytest.mark.parametrize(("name", "status", "how"), SIGNALS)
def test_a_process_that_gets_a_signal_while_it_packs_ends_with_its_status(
    name: str, status: int, how: str, data: Path
) -> None:
    """In a real process, where threads pack: the signal comes with the first packed image."""
    program = (
        "import os, signal, sys\nfrom fastflower.packing import packer\nfrom fastflower.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nmake = packer.make_shard\n"
        f"def dying(*values):\n    os.kill(os.getpid(), signal.{name})\n    return make(*values)\n"
        "packer.make_shard = dying\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "train", str(data), "--recipe", "scratch", "--batch-size", "8", "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    *_, told, typed = done.stderr.splitlines()
    assert told == f"runs/resnet18: {how} before training began. To start again:"
    assert typed == "  fastflower train data --recipe scratch --batch-size 8 --out runs/resnet18 --device cpu"
    assert not Path("runs/resnet18").exists()


def test_a_resumed_run_that_is_stopped_before_its_first_step_is_resumed_again(data: Path, capsys: Any) -> None:
    command = ["train", str(data), "--device", "cpu", *flags(RECIPE), "--batch-size", "5", "--out", "runs/a"]
    assert signalled("SIGINT", (Run, "step", 2), command) == 130
    assert signalled("SIGTERM", (loop, "network_of", 1), ["train", str(data), "--out", "runs/a", "--resume"]) == 143
    *_, told, typed = capsys.readouterr().err.splitlines()
    assert told == "runs/a: stopped by SIGTERM before training began. To continue:"
    assert typed == "  fastflower train data --out runs/a --resume"
    assert main(shlex.split(typed)[1:]) == 0


def test_an_interrupted_pack_says_what_to_type(data: Path, capsys: Any) -> None:
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        before_call(packer, "publish", 1, lambda: signal.raise_signal(signal.SIGINT), patch)
        assert main(["pack", str(data), "--out", "my shards"]) == 130
    *_, told, typed = capsys.readouterr().err.splitlines()
    assert (told, typed) == ("interrupted. To run it again:", "  fastflower pack data --out 'my shards'")
    assert main(shlex.split(typed)[1:]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "wrote my shards"


def test_python_calls_log_the_last_lines_of_the_command_line(
    data: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from fastflower import train

    assert main(["pack", str(data), "--out", "shards"]) == 0
    packed = capsys.readouterr().out
    assert main(["train", "shards", "--device", "cpu", *flags(RECIPE), "--batch-size", "5", "--out", "runs/a"]) == 0
    trained = capsys.readouterr().out
    told = "\n".join(caplog.messages)
    assert not any(line in told for line in (packed + trained).splitlines()), "the command line prints them once"

    calls: list[tuple[Callable[[], object], str]] = [
        (
            lambda: pack("data", "shards-2"),
            packed.replace("shards\n", "shards-2\n").replace("in 1 shards-2", "in 1 shards"),
        ),
        (lambda: train("shards", RECIPE, out="runs/b", device="cpu"), "wrote runs/b/report.html\n"),
        (lambda: train(data, RECIPE, out="runs/c", device="cpu"), "wrote runs/c/report.html\n"),
    ]
    for call, last in calls:
        caplog.clear()
        call()
        count = last.count("\n")
        assert "\n".join(caplog.messages[-count:]) + "\n" == last
        assert sum(message.startswith("wrote ") for message in caplog.messages) == 1, "not those of the pack inside"
    assert trained.splitlines()[0].startswith("best: epoch ")
    assert caplog.messages[-2].startswith("best: epoch ")
