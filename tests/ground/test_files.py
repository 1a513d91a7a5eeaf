"""File locks that end with their process, and atomic writes, as used by training runs, demos, packs and mirrors."""

import errno
import fcntl
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packs import drawn
from places import ROOT
from training_runs import LAST, RECIPE

from fastflower import files, pack, train
from fastflower.errors import CheckpointError, HeldError
from fastflower.files import locked, written

HOLDER = rf"process \d+ on {re.escape(os.uname().nodename)}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC"

HOLDING = """
import os, subprocess, sys, time
from pathlib import Path
from fastflower.files import locked
with locked(Path(sys.argv[1])):
    if sys.argv[2] == "subprocess":
        subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
    if sys.argv[2] != "fork" or not os.fork():  # a forked child prints once it runs
        print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holding(path: Path, child: str = "none") -> "Iterator[subprocess.Popen[str]]":
    """Start a process that holds a lock, optionally with a child that outlives it. All of them end with the block."""
    command = [sys.executable, "-c", HOLDING, str(path), child]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("child", ["none", "fork", "subprocess"])
def test_a_lock_ends_with_its_process_even_if_children_live_on(tmp_path: Path, child: str) -> None:
    path = tmp_path / "folder" / "lock"
    with holding(path, child) as process:
        with pytest.raises(HeldError, match=rf"^process {process.pid} on ") as caught, locked(path):
            pass
        assert re.fullmatch(HOLDER, str(caught.value))
        process.kill()
        process.wait()
        with locked(path) as exists:
            assert exists


def test_a_lock_excludes_other_threads_and_is_free_afterward(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        with pytest.raises(HeldError, match=rf"^process {os.getpid()} on "), locked(path):
            pass
        with pytest.raises(CancelledError), locked(path, lambda: True):
            pass
    with locked(path):
        pass
    assert path.read_text() == ""


def test_a_forked_child_does_not_release_its_parents_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        child = os.fork()
        if not child:
            os._exit(_leave_and_try(tmp_path / "lock"))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _leave_and_try(path: Path) -> int:
    for lock in list(files._open_locks):
        lock.release()
    try:
        with locked(path):
            return 1
    except HeldError:
        return 0


WAITING = """
import sys
from pathlib import Path
from fastflower.files import locked
print("waits", flush=True)
with locked(Path(sys.argv[1]), lambda: False):
    print("has it", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_waiting_for_a_lock_can_be_interrupted(tmp_path: Path, number: int) -> None:
    with locked(tmp_path / "lock"):
        command = [sys.executable, "-c", WAITING, str(tmp_path / "lock")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            time.sleep(0.2)
            process.send_signal(number)
            out, _ = process.communicate(timeout=10)
    assert (process.returncode, out) == (-number, "")


def test_a_waiter_gets_the_lock_even_if_its_file_is_removed(tmp_path: Path) -> None:
    path, order = tmp_path / "folder" / "lock", list[str]()

    def wait() -> None:
        with locked(path, lambda: False):
            order.append("second")

    with locked(path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        order.append("first")
        path.unlink()
        path.parent.rmdir()
    thread.join(10)
    assert order == ["first", "second"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_file_locks_work_continues_after_one_warning(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(files, "_lacks", set[tuple[int, str]]())
    for path in (tmp_path / "a/lock", tmp_path / "b/lock"):
        with locked(path) as exists, locked(path, lambda: False) as again:
            assert (exists, again) == (False, False)
    what = "its file system does not support locks, so run only one process at a time here"
    assert caplog.messages == [f"{tmp_path / 'a'}: {what} ({os.strerror(number)})"]
    pack(drawn(tmp_path / "data", a=3, b=3), tmp_path / "out")
    assert not (tmp_path / "out/.packing").exists()


def test_other_errors_of_a_lock_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / "lock"):
        pass


def test_two_writers_of_a_file_have_separate_temporary_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written(path) as one, written(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def held(out: Path) -> str:
    return rf"^{re.escape(str(out))}: another run is training here \({HOLDER}\); wait\. To continue it:\n"


@pytest.mark.usefixtures("narrow", "no_figures")
@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_a_folder_names_the_process_that_holds_it(shards: Path, tmp_path: Path, resume: bool) -> None:
    out = tmp_path / "run"
    with holding(out / ".lock"):
        before = {path: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(CheckpointError, match=held(out)):
            train(shards, RECIPE, out=out, resume=resume, device="cpu")
        assert {path: path.read_bytes() for path in out.iterdir()} == before
    half = out / f"{LAST}.0123abcd.part"  # left by a kill
    half.touch()
    (out / "mine.part").touch()
    train(shards, replace(RECIPE, epochs=1), out=out, resume=resume, device="cpu")
    assert not half.exists()
    assert (out / "mine.part").exists()
    assert not (out / ".lock").exists()


@pytest.mark.usefixtures("narrow", "no_figures")
def test_a_folder_is_locked_only_while_training_runs(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastflower.training.run import Run

    out, step, tries = tmp_path / "run", Run.step, list[str]()

    def second(self: Any, *values: Any, **options: Any) -> Any:
        if not tries:
            tries.append("")
            with pytest.raises(CheckpointError, match=held(out)) as caught:
                train(shards, RECIPE, out=out, resume=True, device="cpu")
            tries.append(str(caught.value))
        return step(self, *values, **options)

    monkeypatch.setattr(Run, "step", second)
    train(shards, replace(RECIPE, epochs=1), out=out, device="cpu")
    assert f"process {os.getpid()} on" in tries[1]
    with pytest.raises(
        CheckpointError, match=r"run: already holds a run\. To train on from its weights with this recipe:\n"
    ):
        train(shards, RECIPE, out=out, device="cpu")
    assert not (out / ".lock").exists()


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        train(shards, replace(RECIPE, weights="nothing.pt"), out=tmp_path / "runs" / "a", device="cpu")
    assert not (tmp_path / "runs").exists()


def test_two_demos_in_one_folder_do_not_delete_each_others_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(out)])
    (out / "shards").mkdir(parents=True)
    with holding(out / ".fastflower-demo"), pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "demo.py"), run_name="__main__")
    told = f"{end.value.code}{capsys.readouterr().err}"
    assert re.search(
        rf"--out {re.escape(str(out))}: another demo is running there \({HOLDER}\); wait for it or choose", told
    )
    assert (out / "shards").exists()
