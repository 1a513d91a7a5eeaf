"""run.json: what was run, on what, when, how it ended, and nothing secret."""

import json
import os
import platform
import re
import signal
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from training_runs import (
    LAST,
    RECIPE,
    before_call,
    child,
    killed,
    small,
    terminate,
)

from fastflower import Loader, Manifest, Recipe, train
from fastflower.cli import main
from fastflower.errors import StoppedError, TrainingError
from fastflower.reporting import record
from fastflower.reporting.record import FILE, git_state, read, recorded, without_secrets
from fastflower.training import run as loop
from fastflower.training.run import Run

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastflower.models.defaults.build", small)


def kept(out: Path) -> dict[str, Any]:
    found = read(out)
    assert found is not None
    assert found == json.loads((out / FILE).read_text())
    return found


def test_a_finished_run_says_what_it_was(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # not in a repository
    before = datetime.now(UTC).replace(microsecond=0)
    report = train(shards, RECIPE, out="run", device="cpu")
    found = kept(report.folder)
    assert found.keys() == {
        "format", "version", "status", "error", "command", "recipe", "epochs", "finished_epochs", "data", "seconds", "sessions",
    }  # fmt: skip
    assert (found["format"], found["version"], found["status"], found["error"]) == (
        "fastflower run",
        1,
        "finished",
        None,
    )
    assert (found["epochs"], found["finished_epochs"]) == (2, 2)
    train_loader, val = (Loader(shards, split, batch_size=1, device="cpu") for split in ("train", "val"))
    assert found["data"] == {
        "shards": str(shards),
        "pack": str(shards),
        "fold": None,
        "classes": 5,
        "samples": {"train": 120, "val": 30},
        "identity": {"train": train_loader.state_dict()["shards"], "val": val.state_dict()["shards"]},
    }
    assert Recipe.from_dict(found["recipe"]["resolved"]) == RECIPE.resolved
    (session,) = found["sessions"]
    assert session["working_directory"] == str(tmp_path)
    assert (session["host"], session["pid"]) == (platform.node(), os.getpid())
    assert (session["status"], session["resumed_from"], session["started_from"]) == ("finished", None, "Python")
    assert session["git"] is None
    started, ended = (datetime.fromisoformat(session[name]) for name in ("started", "ended"))
    assert before <= started <= ended <= datetime.now(UTC)
    assert 0 < sum(row["train_seconds"] for row in report.history) < session["seconds"] == found["seconds"]
    environment = session["environment"]
    assert torch.__version__.startswith(environment["torch"])
    assert environment["ranks"] == "1"
    assert {"device", "threads", "python", "torchvision", "fastflower"} <= environment.keys()


def test_its_command_repeats_the_run(shards: Path, tmp_path: Path) -> None:
    import shlex

    recipe = replace(RECIPE, epochs=1)
    train(shards, recipe, out=tmp_path / "run", device="cpu")
    found = kept(tmp_path / "run")
    assert found["recipe"]["changes"]["epochs"] == 1
    program, *arguments = shlex.split(found["command"])
    assert program == "fastflower"
    arguments[arguments.index(str(tmp_path / "run"))] = str(tmp_path / "again")
    assert main(arguments) == 0
    again = kept(tmp_path / "again")
    assert again["sessions"][0]["started_from"] == "command line"
    assert again["command"] == found["command"].replace(str(tmp_path / "run"), str(tmp_path / "again"))
    assert again["recipe"]["preset"] == "default"


def test_the_report_shows_it_and_runs_of_older_versions_still_have_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(shards, RECIPE, out=tmp_path / "run", device="cpu")
    html = (tmp_path / "run" / "report.html").read_text()
    session = kept(tmp_path / "run")["sessions"][0]
    for text in (
        str(tmp_path / "run"),
        session["started"],
        "120 training and 30 validation images",
        "fastflower train ",
    ):
        assert text in html
    monkeypatch.setattr("fastflower.reporting.report.read", lambda _: None)
    train(shards, RECIPE, out=tmp_path / "run", resume=True, device="cpu")
    assert "fastflower train " not in (tmp_path / "run" / "report.html").read_text()


def test_a_killed_run_says_running_until_it_is_resumed(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = child("SIGKILL", "step", "8", recipe=RECIPE, shards=shards, out=out)
    assert done.returncode < 0
    found = kept(out)
    (session,) = found["sessions"]
    assert (found["status"], session["status"], session["ended"]) == ("running", "running", None)
    assert session["host"] == platform.node()
    assert session["pid"] != os.getpid()
    assert found["finished_epochs"] == 1
    (out / LAST).unlink()  # of another network than this process's
    train(shards, RECIPE, out=out, resume=True, device="cpu")
    assert [each["status"] for each in kept(out)["sessions"]] == ["killed", "finished"]


def test_a_resumed_run_lists_its_sessions(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        before_call(Run, "step", 7, terminate, patch)
        with pytest.raises(StoppedError):
            train(shards, RECIPE, out=out, device="cpu")
    found = kept(out)
    assert found["status"] == "interrupted"
    call = f"train({str(shards)!r}, out={str(out)!r}, device='cpu', resume=True)"
    told = f"{out}: stopped by SIGTERM in epoch 2, step 2, and saved a checkpoint. To continue:\n  {call}"
    assert found["error"] == found["sessions"][0]["error"] == told
    killed(shards, RECIPE, out, (Run, "step", 2))
    assert kept(out)["status"] == "failed"
    assert kept(out)["error"] == "KilledError: killed"
    train(shards, RECIPE, out=out, resume=True, device="cpu")
    found = kept(out)
    assert [each["status"] for each in found["sessions"]] == ["interrupted", "failed", "finished"]
    assert [each["resumed_from"] for each in found["sessions"]] == [None, *[{"epoch": 1, "step": 2}] * 2]
    assert found["seconds"] == pytest.approx(sum(each["seconds"] for each in found["sessions"]))
    assert found["error"] is None
    html = (out / "report.html").read_text()
    assert "in 3 sessions" in html


def test_an_interrupted_run_says_where_and_what_it_has_saved(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call = f"train({str(shards)!r}, out={str(out)!r}, device='cpu', resume=True)"
    lost = r"what came after the checkpoint after epoch 1, 0 s ago, is lost"
    for presses, saved in ((1, "in epoch 1, step 2, and saved a checkpoint"), (2, f"in epoch 2, step 1; {lost}")):
        with pytest.MonkeyPatch.context() as patch:
            for _ in range(presses):
                before_call(Run, "step", {1: 2, 2: 5}[presses], lambda: signal.raise_signal(signal.SIGINT), patch)
            with pytest.raises(KeyboardInterrupt):
                train(shards, RECIPE, out=out, resume=True, device="cpu")
        assert kept(out)["status"] == "interrupted"
        assert kept(out)["error"] == f"{out}: interrupted by SIGINT {saved}. To continue:\n  {call}"


def test_a_folder_that_is_packed_first_is_recorded_with_its_pack(
    flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(flowers)
    train("data", replace(RECIPE, epochs=1), out="runs/a", device="cpu")
    (pack,) = (tmp_path / "runs" / "packs").iterdir()
    data = kept(Path("runs/a"))["data"]
    assert (data["shards"], data["pack"]) == ("data", str(pack))
    identity = Manifest.load(pack).identity("train")["shards"]
    html = Path("runs/a/report.html").read_text()
    assert f"from data, packed as {pack.name} (identity {identity})." in html
    assert str(tmp_path) not in html


def test_a_damaged_record_is_replaced_with_a_warning(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(shards, RECIPE, out=tmp_path / "run", device="cpu")
    for damage in (b"{", b"[]", b"\xff\xfe\x00"):
        (tmp_path / "run" / FILE).write_bytes(damage)
        assert read(tmp_path / "run") is None
        caplog.clear()
        train(shards, RECIPE, out=tmp_path / "run", resume=True, device="cpu")
        assert caplog.messages == [
            f"{tmp_path / 'run' / FILE}: is damaged, so the new one does not list earlier sessions"
        ]
        assert len(kept(tmp_path / "run")["sessions"]) == 1


def test_a_record_that_cannot_be_written_is_an_error_that_names_it(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / FILE).mkdir(parents=True)
    with pytest.raises(
        TrainingError, match=rf"{FILE}.*: cannot be read or written \(Is a directory\); fix this\. To con"
    ):
        train(shards, RECIPE, out=tmp_path / "run", device="cpu")


def test_an_error_of_training_stays_the_error_if_the_record_cannot_be_written_either(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "history.csv")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device", FILE)

    def fill() -> None:
        monkeypatch.setattr(record, "write_atomically", refuse)
        full()

    before_call(loop, "write_history", 1, fill, monkeypatch)
    with pytest.raises(TrainingError, match=r"^history\.csv: cannot be read or written"):
        train(shards, RECIPE, out=tmp_path / "run", device="cpu")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "a.txt"], [*name, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_the_commit_of_the_working_directory(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True)
    head = asked.stdout.strip()
    (repository / "untracked.txt").write_text("runs and the like")
    assert git_state(repository) == {"commit": head, "dirty": False}
    (repository / "a.txt").write_text("two")
    (repository / "below").mkdir()
    assert git_state(repository / "below") == {"commit": head, "dirty": True}
    assert git_state(tmp_path) is None  # not a repository
    monkeypatch.setenv("PATH", "")
    assert git_state(repository) is None  # no git


def test_secrets_in_addresses_are_not_recorded() -> None:
    key = "s3://bucket/shards?token=abc&x=1"
    told = {
        "a": "https://me:pass@host:8080/a/b@c?sig=1#sha256=00",
        "b": [f"fastflower train '{key}' --out x", "s3://user@bucket", "mail@host, plain?"],
        "c": 1,
    }
    assert without_secrets(told) == {
        "a": "https://host:8080/a/b@c#sha256=00",
        "b": ["fastflower train 's3://bucket/shards' --out x", "s3://bucket", "mail@host, plain?"],
        "c": 1,
    }


def test_no_environment_variable_is_recorded(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "swordfish")
    train(shards, replace(RECIPE, epochs=1), out=tmp_path / "run", device="cpu")
    assert not re.search("swordfish|MY_TOKEN", (tmp_path / "run" / FILE).read_text())


def test_an_epochs_write_takes_no_time(tmp_path: Path) -> None:
    """Without the disk's part."""
    with recorded(tmp_path, {"epochs": 9}, {"environment": {}}, resume=False) as write:
        times: list[float] = []
        for epoch in range(20):
            start = perf_counter()
            write(epoch)
            times.append(perf_counter() - start)
    assert sorted(times)[10] < 0.005
