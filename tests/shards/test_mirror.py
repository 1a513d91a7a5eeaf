"""The local cache of remote shards: order of eviction, waiting, forks, exits and unwritable folders."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bad_server import BadServer
from places import HELPERS
from test_remote import OPTIONS

from fastflower import Loader, Manifest
from fastflower.errors import ShardError
from fastflower.files import locked
from fastflower.shards import remote
from fastflower.shards.mirror import Mirror
from fastflower.shards.remote import Remote, RemoteFiles

pytest.importorskip("aiohttp")


def names_of(mirror: Mirror) -> list[str]:
    return [shard.name for shard in mirror.manifest.split("train").shards]


def cached(cache: str | Path) -> set[str]:
    return {path.name for path in Path(cache).glob("*/*.tar")}


def wait_for_downloads(mirror: Mirror) -> None:
    """Wait until the prefetched shards are downloaded."""
    end = time.monotonic() + 30
    while mirror._threads and time.monotonic() < end:
        time.sleep(0.01)
    assert not mirror._threads


def test_the_least_recently_used_shard_is_evicted(source: Remote, server: BadServer) -> None:
    mirror = Mirror.connect(source)
    names = names_of(mirror)
    sizes = [shard.bytes for shard in mirror.manifest.split("train").shards]
    tight = Mirror.connect(Remote(url=server.url, folder=source.folder, limit_bytes=sum(sizes[:3])))
    for number, name in enumerate(names[:3]):
        tight.path(name)
        os.utime(tight.folder / name, (1000 + number, 1000 + number))
    tight.prefetch([names[0]])  # used again, so the second is now the oldest
    tight._wanted, tight._ahead = set(), []
    tight.path(names[3])
    assert names[1] not in cached(source.folder)
    assert {names[0], names[3]} <= cached(source.folder)


def test_shards_that_are_read_soonest_stay_and_the_rest_wait_for_room(source: Remote, server: BadServer) -> None:
    mirror = Mirror.connect(source)
    names = names_of(mirror)
    sizes = [shard.bytes for shard in mirror.manifest.split("train").shards]
    tight = Mirror.connect(Remote(url=server.url, folder=source.folder, limit_bytes=2 * max(sizes)))
    assert tight.prefetch(names[:2]) == set(names[:2])
    wait_for_downloads(tight)
    assert tight.prefetch(names[1:4]) == set(names[:4]), "shards of the previous call are kept too"
    wait_for_downloads(tight)
    assert len(cached(source.folder)) == 2, "one of the previous window is evicted, the other download waits"
    assert names[1] in cached(source.folder)
    tight.path(names[2])
    assert cached(source.folder) == {names[1], names[2]}, "the shard that is needed last is evicted first"
    tight.path(names[3])
    assert names[3] in cached(source.folder), "an awaited shard takes precedence over prefetched ones"


def test_eviction_leaves_other_partial_files_alone(source: Remote) -> None:
    mirror = Mirror.connect(source)
    written = mirror.folder / f"val.index.npy.{os.getpid()}-1.part"
    written.write_bytes(b"half")
    mirror.path(names_of(mirror)[0])
    assert written.read_bytes() == b"half"
    assert sorted(path.name for path in mirror.folder.glob("val*")) == [written.name]


@pytest.mark.parametrize("locks", [True, False])
def test_a_partial_file_of_a_killed_process_takes_no_room(
    source: Remote, server: BadServer, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks, a file counts as abandoned if nothing was written for longer than all attempts take."""
    mirror = Mirror.connect(source)
    names = names_of(mirror)
    size = max(shard.bytes for shard in mirror._shards.values())
    tight = Mirror.connect(Remote(url=server.url, folder=source.folder, limit_bytes=size))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuse)
    parts = [tight.folder / f"{names[0]}.0123abcd.part", tight.folder / f"{names[1]}.part"]  # new name, old name
    for part in parts:
        part.write_bytes(bytes(size))
        long_ago = time.time() - 8 * (remote._TIMEOUT + remote._LONGEST_PAUSE) - 1
        os.utime(part, (long_ago, long_ago))
    assert tight.path(names[0]).exists()
    assert not any(part.exists() for part in parts)


def test_an_epoch_without_file_locks_is_complete(source: Remote, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    one, other = (Loader(place, **OPTIONS, window=2) for place in (source, shards))
    assert [batch.index.tolist() for batch in one] == [batch.index.tolist() for batch in other]


@pytest.mark.parametrize("wait", ["shard", "room"])
def test_a_break_does_not_wait_for_a_lock_that_is_never_released(source: Remote, wait: str) -> None:
    loader = Loader(source, **OPTIONS, window=1, shuffle=False)
    assert loader._mirror is not None
    batches = iter(loader)
    next(batches)
    path = Path(source.folder) / "room.lock"
    with locked(
        path if wait == "room" else loader._mirror.folder / f"{names_of(loader._mirror)[3]}.lock", lambda: False
    ):
        assert_returns_soon(batches.close)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_shard_gets_its_name_only_under_the_room_lock(source: Remote, server: BadServer) -> None:
    """Eviction lists tars, then partial files. A file renamed in between would not be counted."""
    mirror = Mirror.connect(source)
    path = mirror.folder / names_of(mirror)[0]
    with (Path(source.folder) / "room.lock").open("w") as counting:

        def count(_name: str, asked: int) -> None:
            if not asked:
                fcntl.flock(counting, fcntl.LOCK_EX)

        server.fault = count
        thread = threading.Thread(target=mirror.path, args=(path.name,))
        thread.start()
        while path.name not in server.sent or server.sent[path.name] < mirror._shards[path.name].bytes:
            time.sleep(0.01)
        thread.join(0.3)
        assert thread.is_alive()
        assert not path.exists()
        assert len(list(path.parent.glob(f"{path.name}.*.part"))) == 1
        fcntl.flock(counting, fcntl.LOCK_UN)
        thread.join(20)
    assert path.exists()


def test_pauses_between_attempts_double_up_to_a_limit(
    source: Remote, server: BadServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"_FIRST_PAUSE": 0.25, "_LONGEST_PAUSE": 3.0}.items():
        monkeypatch.setattr(remote, name, value)
    slept: list[float] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += 100

    monkeypatch.setattr(remote.random, "uniform", lambda _low, high: high)
    monkeypatch.setattr(remote.time, "sleep", sleep)
    caplog.set_level(logging.WARNING, "fastflower")
    server.fault = lambda _name, _asked: "503"
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
    with pytest.raises(ShardError, match="could not be read in 8 attempts"):
        Mirror.connect(source)
    pauses = [line.rpartition("retrying in ")[2] for line in caplog.messages]
    assert pauses == ["0.2 s", "0.5 s", "1.0 s", "2.0 s", "3.0 s", "3.0 s", "3.0 s"]


def test_a_denied_file_is_requested_only_once(source: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(_self: RemoteFiles, name: str, *_: object) -> bytes:
        asked.append(name)
        raise PermissionError("Access Denied")

    monkeypatch.setattr(RemoteFiles, "_request", refuse)
    with pytest.raises(ShardError, match=r"manifest.json: access denied \(Access Denied\); check the credentials"):
        Mirror.connect(source)
    assert asked == ["manifest.json"]


def assert_returns_soon(action: Any) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it still waits"


@pytest.mark.parametrize("kind", ["stall", "503"])
def test_a_break_does_not_wait_for_a_stalled_server_or_the_next_attempt(
    kind: str, source: Remote, server: BadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_TIMEOUT", "_FIRST_PAUSE", "_LONGEST_PAUSE"):
        monkeypatch.setattr(remote, name, 1000.0)
    server.fault = lambda name, _asked: kind if name > "train-000002" and name.endswith(".tar") else None
    batches = iter(Loader(source, **OPTIONS, window=1, shuffle=False))
    next(batches)
    assert_returns_soon(batches.close)  # pyright: ignore[reportAttributeAccessIssue]


HOLD_LOCKS = """
import fcntl, sys, time
files = [open(path, "w") for path in sys.argv[1:]]
for file in files:
    fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_a_break_does_not_wait_for_another_process(source: Remote) -> None:
    loader = Loader(source, **OPTIONS, window=1, shuffle=False)
    assert loader._mirror is not None
    locks = [str(loader._mirror.folder / f"{name}.lock") for name in names_of(loader._mirror)[1:]]
    other = subprocess.Popen([sys.executable, "-c", HOLD_LOCKS, *locks], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    batches = iter(loader)
    next(batches)
    assert_returns_soon(batches.close)  # pyright: ignore[reportAttributeAccessIssue]
    other.kill()
    other.communicate()


def test_one_iterator_may_end_while_another_continues(source: Remote, shards: Path) -> None:
    loader = Loader(source, **OPTIONS, window=2)
    one = iter(loader)
    first = next(one).index.tolist()
    other = iter(loader)
    next(other)
    other.close()  # pyright: ignore[reportAttributeAccessIssue]
    rest = [batch.index.tolist() for batch in one]
    assert [first, *rest] == [batch.index.tolist() for batch in Loader(shards, **OPTIONS, window=2)]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.usefixtures("nothing_to_collect")
@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.soak), "during"])
def test_a_forked_process_starts_its_own_downloads(when: str, source: Remote, server: BadServer) -> None:
    asked = server.fault

    def slow(name: str, number: int) -> str | None:
        time.sleep(0.005)
        return asked(name, number)

    server.fault = slow
    loader = Loader(source, **OPTIONS, window=1)
    batches = iter(loader)
    if when == "during":
        next(batches)
    child = os.fork()
    if not child:
        images = 0
        with suppress(BaseException):
            batches.close()  # pyright: ignore[reportAttributeAccessIssue]
            images = images_of_an_epoch(loader)
        os._exit(images)
    assert images_of_an_epoch(loader) == 120
    deadline = time.monotonic() + 90
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 120 << 8), "the child's exit status is its number of images"


def images_of_an_epoch(loader: Loader) -> int:
    loader.set_epoch(0)
    return sum(len(batch.index) for batch in loader)


EXITS = """
import os, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from bad_server import IMPATIENT, deafen
from test_remote import OPTIONS
from fastflower import Loader
from fastflower.shards import remote
from fastflower.shards.remote import Remote
for name, value in IMPATIENT.items():
    setattr(remote, name, value)
loader = Loader(Remote(url=sys.argv[2], folder=sys.argv[3]), **OPTIONS, window=1)
if sys.argv[4] == "deaf exit":
    deafen(remote.RemoteFiles, loader._steps.shards_ahead(0, 0)[0])
batches = iter(loader)
next(batches)
print("loaded", flush=True)
raise RuntimeError("with an open iterator")
"""


@pytest.mark.parametrize("what", ["exit", pytest.param("deaf exit", marks=pytest.mark.soak)])
def test_an_exit_does_not_wait_for_downloads(what: str, server: BadServer, shards: Path, tmp_path: Path) -> None:
    """It waits neither for a stalled server nor for a thread that does not notice the shutdown."""
    first = Loader(shards, **OPTIONS, window=1)._steps.shards_ahead(0, 0)[0]
    server.fault = lambda name, _: "stall" if what == "exit" and name.endswith(".tar") and name != first else None
    paths = os.pathsep.join(map(str, (HELPERS, Path(__file__).parent)))
    command = [sys.executable, "-W", "ignore", "-c", EXITS, paths, server.url, str(tmp_path / "cache"), what]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "loaded\n"
    start = time.monotonic()
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "with an open iterator" in err
    assert time.monotonic() - start < 30  # a single stalled piece would be requested eight times


def test_a_deleted_cache_is_filled_again(source: Remote) -> None:
    mirror = Mirror.connect(source)
    name = names_of(mirror)[0]
    assert mirror.path(name).exists()
    for path in mirror.folder.iterdir():
        path.unlink()
    mirror.folder.rmdir()
    assert mirror.path(name).exists()


def test_an_unwritable_cache_stops_the_epoch_even_with_on_bad_skip(source: Remote) -> None:
    loader = Loader(source, **OPTIONS, on_bad="skip", shuffle=False)
    assert loader._mirror is not None
    for name in names_of(loader._mirror):
        (loader._mirror.folder / f"{name}.lock").mkdir()
    with pytest.raises(
        ShardError, match=r"cannot be written \(Is a directory\); set XDG_CACHE_HOME to a writable folder, or pass"
    ):
        list(loader)
    assert not loader.replaced


def test_an_index_of_another_pack_is_rejected(server: BadServer, source: Remote, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in shards.iterdir():
        (folder / path.name).symlink_to(path)
    manifest = Manifest.load(shards)
    train = manifest.splits["train"]
    first, second, *rest = train.shards
    first, second = replace(first, samples=first.samples - 1), replace(second, samples=second.samples + 1)
    splits = {**manifest.splits, "train": replace(train, shards=(first, second, *rest))}
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(replace(manifest, splits=splits).to_json())
    server.folder = folder
    with pytest.raises(
        ShardError, match=rf"^{source.url}/train.index.npy: disagrees with the manifest on the number of samples"
    ):
        Loader(source, **OPTIONS)


def test_an_unexpected_error_in_a_download_thread_does_not_block_the_end(
    source: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Mirror._download

    def download(self: Mirror, name: str, *, demanded: bool = False) -> None:
        if not demanded:
            raise ValueError("unforeseen")
        real(self, name, demanded=demanded)

    monkeypatch.setattr(Mirror, "_download", download)
    batches = iter(Loader(source, **OPTIONS, window=1))
    next(batches)
    assert_returns_soon(batches.close)  # pyright: ignore[reportAttributeAccessIssue]
