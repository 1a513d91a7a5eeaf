"""Training under torchrun: two ranks equal one process, and a killed rank does not block the others."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import HELPERS
from ranks import ENVIRONMENT
from torchrun_trainings import WEIGHTS, command, recipes
from training_runs import BEST, DIE, LAST, assert_same_run, place, timeless, written_history

from fastflower import Checkpoint, evaluate, train
from fastflower.models.backbone import build

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")


INDIVISIBLE = (
    "batch_size must be a multiple of 2, the number of ranks, got 15: Recipe.batch_size (--batch-size) "
    "is that of all ranks together; pass 14."
)


def torchrun(*arguments: str | Path, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `torchrun` on two ranks."""
    options = ["--standalone", "--local-addr", "localhost", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *arguments]
    # The limit only ends a hang; a launch takes seconds.
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=150, check=False)


@pytest.fixture(scope="module")
def launched(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of torchrun_trainings.py, and what became of the program."""
    out = tmp_path_factory.mktemp("ranks")
    torch.save(build("resnet18", 5, weights=None).state_dict(), out / WEIGHTS)
    command = [sys.executable, HELPERS / "torchrun_trainings.py", shards, out]
    # The limit only ends a hang.
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    return out, done


@pytest.fixture(scope="module")
def launch(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> tuple[Path, str]:
    """The folder of torchrun_trainings.py, and what it wrote to stderr."""
    return launched[0], launched[1].stderr


def found(launch: tuple[Path, str], name: str) -> list[dict[str, Any]]:
    """Read the result of a training on each rank."""
    out, said = launch
    paths = [out / f"{name} {rank}.json" for rank in range(2)]
    assert all(path.exists() for path in paths), said
    return [json.loads(path.read_text()) for path in paths]


def codes(launched: tuple[Path, subprocess.CompletedProcess[str]], name: str) -> list[int]:
    """The exit codes of the ranks of one of the program's launches."""
    out, done = launched
    assert done.returncode == 0, done.stderr
    return json.loads((out / "codes.json").read_text())[name]


@pytest.fixture(scope="module")
def restarted(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> tuple[Path, str, str]:
    """The folder and output of `fastflower train` on two ranks; one is killed in the second epoch, then both are restarted."""
    assert codes(launched, "restarted") == [1, -signal.SIGKILL, 0, 0]
    out = launched[0] / "restarted"
    return out, out.with_suffix(".out").read_text(), out.with_suffix(".err").read_text()


@pytest.mark.parametrize(("name", "updates"), [("frozen", 10), ("accumulated", 6), ("frozen soup", 10)])
def test_two_ranks_train_like_one_process(
    launch: tuple[Path, str], shards: Path, tmp_path: Path, name: str, updates: int
) -> None:
    """Tested with frozen batch norms, because others would see only a rank's part of a batch."""
    alone = timeless(train(shards, recipes(launch[0])[name], out=tmp_path / "run", device="cpu").history)
    for rank in found(launch, name):
        assert (rank["steps"], rank["updates"]) == (10, updates)
        for row, expected in zip(timeless(rank["history"]), alone, strict=True):
            assert row == pytest.approx(expected, rel=1e-5)
            for exact in ("epoch", "lr", "size", "train_accuracy", "val_accuracy"):
                assert row[exact] == expected[exact]
    one, other = (Checkpoint.load(folder / LAST).model for folder in (tmp_path / "run", launch[0] / name))
    assert all(torch.allclose(one[key], other[key], rtol=1e-4, atol=1e-6) for key in one)


@pytest.mark.parametrize("name", ["frozen", "accumulated", "frozen soup"])
def test_the_ranks_agree_on_the_history(launch: tuple[Path, str], name: str) -> None:
    first, second = (timeless(rank["history"]) for rank in found(launch, name))
    assert first == second == timeless(written_history(launch[0] / name))


@pytest.mark.parametrize("name", ["averaged", "soup"])
def test_a_checkpoint_of_two_ranks_scores_what_the_history_says(
    launch: tuple[Path, str], shards: Path, name: str
) -> None:
    """Each rank's batch norms have seen different images."""
    out = launch[0] / name
    best = Checkpoint.load(out / BEST)
    row = written_history(out)[best.epoch - 1]
    scores = evaluate(best, shards, device="cpu")
    assert scores.accuracy == row["val_accuracy"]
    assert scores.loss == pytest.approx(row["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not divisible", "ArgumentError: " + INDIVISIBLE),
        (
            "synchronous",
            "ArgumentError: sync_batchnorm: torch supports SyncBatchNorm only on CUDA; omit it on the CPU.",
        ),
        (
            "apart",
            f"CheckpointError: run/{LAST}: differs between ranks; set out to a folder that all machines share.",
        ),
    ],
)
def test_invalid_settings_are_refused_by_each_rank(launch: tuple[Path, str], name: str, message: str) -> None:
    assert found(launch, name) == [{"error": message}] * 2
    assert not (launch[0] / name).exists()


def test_a_folder_in_use_by_another_run_is_refused_by_all_ranks(launch: tuple[Path, str]) -> None:
    out = launch[0] / "held"
    (one,), (other,) = (entry.values() for entry in found(launch, "held"))
    assert one == other
    assert re.match(
        rf"CheckpointError: {re.escape(str(out))}: another run is training here \(process \d+ on .*\); wait\. To cont",
        one,
    )
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_only_one_rank_writes_files_and_logs(launch: tuple[Path, str], restarted: tuple[Path, str, str]) -> None:
    out, printed, told = restarted
    best, wrote = printed.splitlines()
    assert best.startswith("best: epoch ")
    assert wrote == f"wrote {out / 'report.html'}"
    assert [row["epoch"] for row in written_history(out)] == [1, 2]
    assert len((out / "history.csv").read_text().splitlines()) == 3
    assert told.count("epoch 1/2: train loss") == 1
    assert {path.name for path in out.glob("*checkpoint*")} == {LAST, BEST}
    assert len(list((launch[0] / "averaged" / "tensorboard").iterdir())) == 1


REFUSED = f"error: --batch-size{INDIVISIBLE.removeprefix('batch_size')}"


def test_every_rank_refuses_a_wrong_command_line(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = launched
    assert 1 in codes(launched, "refused")
    assert done.stderr.count(REFUSED) == 2  # ranks may write at once, into one line
    assert not (out / "refused").exists()


def test_a_rank_that_is_killed_ends_the_job_and_leaves_a_checkpoint(
    launched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = launched
    assert codes(launched, "killed") == [1, -signal.SIGKILL]
    assert "error: rank 0: another rank failed" in done.stderr
    assert "wrote" not in done.stdout
    assert place(out / "killed") == (0, 2)


@pytest.mark.soak
def test_torchrun_starts_the_module_on_every_rank(shards: Path, tmp_path: Path) -> None:
    done = torchrun("-m", "fastflower", *command(shards, tmp_path / "run"), "--batch-size", "15")
    assert done.returncode != 0
    assert done.stderr.splitlines().count(REFUSED) == 2


@pytest.mark.soak
def test_torchrun_names_the_signal_that_killed_a_rank(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = torchrun(DIE, "SIGKILL", "step", "4", *command(shards, out))
    assert done.returncode != 0
    assert "error: rank 0: another rank failed" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert "wrote" not in done.stdout
    assert place(out) == (0, 2)


def test_a_run_restarted_after_a_killed_rank_equals_an_uninterrupted_one(
    launch: tuple[Path, str], restarted: tuple[Path, str, str]
) -> None:
    out, printed, told = restarted
    assert f"{out}: resumed in epoch 2 after 2 steps" in told
    assert printed.count("wrote ") == 1
    assert_same_run(out, launch[0] / "averaged")


@pytest.mark.soak
def test_torchrun_restarts_a_run_after_a_killed_rank(launch: tuple[Path, str], shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = torchrun(DIE, "SIGKILL", "step", "8", *command(shards, out), restarts=1)
    assert done.returncode == 0, done.stderr
    assert f"{out}: resumed in epoch 2 after 2 steps" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr or "exitcode: -9" in done.stderr
    assert done.stdout.count("wrote ") == 1
    assert_same_run(out, launch[0] / "averaged")


def test_a_signal_to_one_rank_stops_all_at_the_same_step(launch: tuple[Path, str]) -> None:
    out = launch[0] / "signalled"
    said = f"StoppedError: {out}: stopped by SIGTERM in epoch 1, step 3, and saved a checkpoint. To continue:\n  train("
    one, other = (entry["error"] for entry in found(launch, "signalled"))
    assert one == other
    assert one.startswith(said)
    assert place(out) == (0, 3)


def test_a_signal_to_one_rank_stops_the_validation_of_all(launch: tuple[Path, str]) -> None:
    out = launch[0] / "validating"
    where = "in the validation of epoch 1"
    one, other = (entry["error"] for entry in found(launch, "validating"))
    assert one == other
    assert one.startswith(f"StoppedError: {out}: stopped by SIGTERM {where}, and saved a checkpoint. To continue:")
    assert place(out) == (0, 30)
