"""The command line refuses wrong flags before it imports torch: it reads signatures from the source. torchrun repeats errors."""

import inspect
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fastflower.cli import _TYPES, main  # pyright: ignore[reportPrivateUsage]
from fastflower.outline import Outline

FUNCTIONS = (
    "packing.packer.pack",
    "shards.verification.verify",
    "training.diagnosis.diagnose",
    "reporting.preview.preview",
    "training.trainer.train",
    "training.reports.reports",
    "models.evaluation.evaluate",
    "models.prediction.predict",
    "models.catalog.backbones",
)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_outline_has_the_signature_and_docstring_of_the_function(function: str) -> None:
    module, _, name = function.rpartition(".")
    own = {"recipe", "out", "split"}  # whose types the command line sets
    outline = Outline(f"fastflower.{module}", name, {*_TYPES, *own})
    call = getattr(import_module(f"fastflower.{module}"), name)
    assert outline.__doc__ == inspect.getdoc(call)
    mine, theirs = inspect.signature(outline).parameters, inspect.signature(call).parameters
    assert list(mine) == list(theirs)
    for word, parameter in theirs.items():
        assert (mine[word].kind, mine[word].default) == (parameter.kind, parameter.default)
        assert word in {*_TYPES, *own} or mine[word].annotation == parameter.annotation


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("train data --epoch 3 --foo", 2, "did you mean --epochs"),
        ("train data --epochs three", 2, "--epochs must be an integer"),
        ("train data --recipe nope", 1, "no recipe has this name"),
        ("train data --batch-size 0", 1, "--batch-size must be"),
        ("train data scratch", 2, "fastflower train data --recipe scratch"),
        ("trian data", 2, "fastflower train data"),
        ("pack data --val 0.1", 2, "--val-fraction"),
        ("predict a b --batch 3", 2, "batch size"),
        ("evaluate a", 2, "SHARDS is missing"),
        ("train --help", 0, "--recipe"),
        ("predict --help", 0, "--on-bad"),
    ],
)
def test_a_wrong_command_line_is_answered_without_torch(line: str, status: int, said: str) -> None:
    code = (
        "import sys\nfrom fastflower.cli import main\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as error:\n    status = error.code\n"
        "print(sorted({'torch', 'cv2', 'matplotlib'} & set(sys.modules)))\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert said in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("line", ["train nowhere --epochs 1", "train data --foo"])
def test_torchrun_is_told_the_error_so_that_its_last_lines_have_it(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with suppress(SystemExit):
        main(line.split())
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    assert failure.message == capsys.readouterr().err.splitlines()[-1]
    assert failure.message.startswith("error: ")
    assert abs(failure.timestamp - time.time()) < 60
