"""A pack that was interrupted (killed, full disk, second pack, dead worker) resumes to the same bytes."""

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from errno import ENOSPC
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from kill_packer import checksums
from packs import BEFORE_MANIFEST, NINE, child, drawn, killed, nine, samples, uninterrupted
from places import HELPERS

from fastflower import pack
from fastflower.errors import FolderError
from fastflower.packing import worker

PROGRAM = HELPERS / "kill_packer.py"
OPTIONS = NINE
RESUME = "To resume:\n  "


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Nine images in two training shards and one validation shard."""
    return nine(tmp_path / "small")


@pytest.fixture
def expected(small: Path, tmp_path: Path) -> dict[str, str]:
    """Checksums of an uninterrupted pack."""
    return uninterrupted(small, tmp_path / "expected")


def kills(folder: Path, work: Path, *arguments: str | Path) -> int:
    """Return how often tests/helpers/kill_packer.py killed a pack."""
    work.mkdir()
    command = [sys.executable, PROGRAM, folder, work, "--shard-bytes", "4000", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    found = re.fullmatch(r"(\d+) kills in \d+ attempts, 13 files, all bytes as in an uninterrupted pack\n", done.stdout)
    assert found
    return int(found[1])


def test_a_pack_killed_at_any_step_resumes_to_the_same_bytes(small: Path, tmp_path: Path) -> None:
    assert kills(small, tmp_path / "work") > 50


def test_a_pack_killed_at_random_moments_resumes_to_the_same_bytes(small: Path, tmp_path: Path) -> None:
    assert kills(small, tmp_path / "work", "--random", "5") == 5


@pytest.mark.soak
def test_a_pack_killed_while_it_resumes_can_resume_again(small: Path, tmp_path: Path) -> None:
    """The first kill comes just before the manifest is published, when all other files are; later ones at each step."""
    killed(small, tmp_path / "begun", BEFORE_MANIFEST, **OPTIONS)
    assert (tmp_path / "begun/val-000000.tar").exists()
    assert kills(small, tmp_path / "work", "--begin", tmp_path / "begun") > 30


def test_a_full_disk_is_explained_and_the_pack_resumes_with_free_space(
    small: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    """A limit on file size simulates a full disk."""
    program = (
        "import resource, sys; from fastflower.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, "pack", small, "--out", out, "--shard-bytes", "4000", "--lists"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    again = f"fastflower pack {small} --out {out} --shard-bytes 4000 --lists"
    text = f"{out}: cannot be written (File too large); choose another folder as out (--out). {RESUME}{again}\n"
    assert (done.returncode, done.stdout, done.stderr[done.stderr.index("error: ") :]) == (1, "", f"error: {text}")
    assert "Traceback" not in done.stderr
    assert [path.name for path in out.iterdir()] == [".packing"]
    assert not list(out.rglob("*.part"))
    pack(small, out, **OPTIONS)
    assert checksums(out) == expected


def refusal(folder: Path, out: Path) -> str | None:
    """Return the error message of a pack, or None if it succeeds."""
    try:
        pack(folder, out, workers=1, **OPTIONS)
    except FolderError as error:
        return str(error)
    return None


@pytest.mark.parametrize("for_good", [False, True])
def test_the_same_call_resumes_after_an_error_at_any_rename(
    small: Path, tmp_path: Path, expected: dict[str, str], for_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for one rename, or for all later renames too, so that no file can be moved back."""
    replace = Path.replace
    out, number, calls = tmp_path / "out", 0, 0

    def fail(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == number or (for_good and calls > number):
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        return replace(self, target)

    text = (
        f"{out}: cannot be written (No space left on device); free up space, or choose another folder as out (--out)."
    )
    while True:
        number += 1
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", fail)
            message = refusal(small, out)
        if message is None:
            break
        told = text if number <= 7 else f"{text} {RESUME}"  # the first seven renames save the plan
        assert message.partition("pack(")[0] == told
        visible = {path.name for path in out.iterdir()} if out.exists() else set[str]()
        assert "manifest.json" not in visible
        assert for_good or visible <= {".packing", "meta"}
        pack(small, out, **OPTIONS)
        assert checksums(out) == expected
        shutil.rmtree(out)
    assert checksums(out) == expected
    assert calls == number - 1 > 20


@pytest.mark.parametrize("stop", ["'train-000001.' in paths[0]", "paths[1] == 'val-000000.tar'"])
def test_ctrl_c_keeps_finished_shards(small: Path, tmp_path: Path, expected: dict[str, str], stop: str) -> None:
    """The interrupt comes while shards are made, or while they are published."""
    out = tmp_path / "out"
    process = child(small, out, stop, "os.kill(os.getpid(), signal.SIGINT)", **OPTIONS)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert (out / ".packing/plan.json").exists()
    assert (out / "train-000001.tar").exists() == ("val" in stop)
    assert not list(out.rglob("*.part"))
    pack(small, out, **OPTIONS)
    assert checksums(out) == expected


@pytest.mark.parametrize("ends", ["finishes", "dies"])
def test_a_second_pack_into_the_same_folder_is_refused(
    small: Path, tmp_path: Path, expected: dict[str, str], ends: str
) -> None:
    out = tmp_path / "out"
    stop = "event == 'open' and 'train-000001' in paths[0] and '.part' in paths[0]"
    first = child(small, out, stop, "print('here', flush=True); input()", **OPTIONS)
    assert first.stdout
    assert first.stdout.readline() == "here\n"
    for _ in range(1000):  # until the other two shards are made
        if len(list(out.glob(".packing/*.npz"))) == 2 and not list(out.glob(".packing/*.part")):
            break
        time.sleep(0.01)
    before = checksums(out)
    holder = rf"process {first.pid} on {re.escape(os.uname().nodename)}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    remedy = r"wait for it to finish, or choose another folder:\n  pack\(.*\)"
    with pytest.raises(
        FolderError, match=rf"^{re.escape(str(out))}: another pack is writing here \({holder}\); {remedy}$"
    ):
        pack(small, out, **OPTIONS)
    assert checksums(out) == before
    if ends == "dies":
        first.kill()
    first.communicate("\n", timeout=30)
    assert first.returncode == (0 if ends == "finishes" else -signal.SIGKILL)
    if ends == "dies":
        pack(small, out, **OPTIONS)
    assert checksums(out) == expected


class Dying(ProcessPoolExecutor):
    """A process pool with workers that die at the second shard."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.count = getattr(self, "count", 0) + 1
        return super().submit(os._exit, 1) if self.count == 2 else super().submit(fn, *args, **kwargs)


def test_a_dead_worker_is_explained_and_the_pack_resumes(small: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    out = tmp_path / "out"
    reason = "A process in the process pool was terminated abruptly while the future was running or pending."
    text = f"{out}: a worker died ({reason}); if it ran out of memory, use fewer workers. {RESUME}"
    again = f"pack({str(small)!r}, {str(out)!r}, executor=executor, "
    with (
        Dying(1, mp_context=get_context("spawn")) as executor,
        pytest.raises(FolderError, match=re.escape(text + again)),
    ):
        pack(small, out, executor=executor, **OPTIONS)
    pack(small, out, **OPTIONS)
    assert checksums(out) == expected


@pytest.mark.parametrize("third", [False, True])
def test_the_lock_of_a_removed_workspace_is_taken_again(
    small: Path, tmp_path: Path, expected: dict[str, str], third: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another pack ends between the opening and the locking of the lock file. By then, a third may have started."""
    out, flock = tmp_path / "out", fcntl.flock
    locked: list[int] = []

    def late(handle: int, operation: int) -> None:
        if operation == fcntl.LOCK_UN:
            return flock(handle, operation)
        if not locked:
            shutil.rmtree(out / ".packing")
            if third:
                (out / ".packing").mkdir()
                (out / ".packing/lock").touch()
        locked.append(os.fstat(handle).st_ino)
        return flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    pack(small, out, **OPTIONS)
    assert len(locked) == 2
    assert checksums(out) == expected


class LikeDask(Executor):
    """Reports running tasks as pending, as dask does, so they can be "cancelled" but keep running in its two threads."""

    def __init__(self) -> None:
        self.pool, self.running = ThreadPoolExecutor(2), 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            self.running += 1
            try:
                future.set_result(fn(*args, **kwargs))
            except FolderError as error:
                future.set_exception(error)
            finally:
                self.running -= 1

        self.pool.submit(run)
        return future


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_error_soon_stops_all_other_shards(tmp_path: Path, elsewhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards in progress would still write into the workspace."""
    folder = drawn(tmp_path / "data", a=20, b=20)
    options: dict[str, Any] = {"shard_bytes": 25_000, "on_bad": "fail", "val_fraction": 0, "workers": 2}
    pack(folder, tmp_path / "expected", **options)
    bad = folder / next(samples(tmp_path / "expected", "train")).path
    bad.write_bytes(bytes(bad.stat().st_size))  # the size stays the same, so it is again first in the first shard
    prepare, prepared = worker.prepare, list[bytes]()

    def slowly(data: bytes, **options: Any) -> Any:
        if data.strip(b"\0"):
            prepared.append(data)
            time.sleep(0.05)
        return prepare(data, **options)

    monkeypatch.setattr(worker, "prepare", slowly)
    monkeypatch.setattr(worker, "_CHUNK_BYTES", 1 << 12)
    executor = LikeDask()
    text = f"{bad}: contains only zero bytes; remove or replace it, or skip damaged images:\n  pack("
    with pytest.raises(FolderError, match=re.escape(text)):
        pack(folder, tmp_path / "out", executor=executor if elsewhere else None, **options)
    assert executor.running == 0
    assert not (tmp_path / "out").exists()
    assert len(prepared) < 15  # the other shard has twenty images
    executor.pool.shutdown()


def test_every_file_is_synced_before_it_is_renamed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut cannot be tested here, but the order of calls can."""
    steps: list[tuple[str, int | str]] = []
    replace, fsync = Path.replace, os.fsync

    def renamed(self: Path, target: Path) -> Path:
        steps.append(("rename", self.stat().st_ino))
        if target == tmp_path / "out/manifest.json":
            steps.append(("manifest", ""))
        return replace(self, target)

    def synced(handle: int) -> None:
        steps.append(("sync", os.fstat(handle).st_ino))
        fsync(handle)

    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(os, "fsync", synced)
    pack(small, tmp_path / "out", **OPTIONS)
    out = (tmp_path / "out").stat().st_ino
    for place, (step, inode) in enumerate(steps):
        assert step != "rename" or ("sync", inode) in steps[:place]
    end = steps.index(("manifest", ""))
    assert steps[end - 2] == ("sync", out)
    assert steps[end + 1 :] == [("sync", out)]
    for path in (tmp_path / "out").glob("*.*"):
        assert ("sync", path.stat().st_ino) in steps


@pytest.mark.parametrize("number", [None, errno.EIO, errno.EACCES, errno.EPERM, errno.EINVAL])
def test_a_failing_pack_leaves_what_was_there(
    tmp_path: Path, number: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: a damaged image. Otherwise the lock fails with this error."""
    folder, there = drawn(tmp_path / "data", a=2, b=2), tmp_path / "there"
    (folder / "a/bad.jpg").write_bytes(b"text")
    there.mkdir()

    def refuse(*_: object) -> None:
        raise OSError(number, "Refused")

    text = r"bad\.jpg: is plain text"
    if number:
        monkeypatch.setattr(fcntl, "flock", refuse)
        text = r": cannot be written \(Refused, when locking lock\); choose another folder as out \(--out\)\.$"
    for out in (there, there / "x/y"):
        with pytest.raises(FolderError, match=text):
            pack(folder, out, on_bad="fail")
        assert there.is_dir()
        assert not list(there.iterdir())
