"""The cache of remote shards by itself: what goes first, who waits for whom, what a fork, an exit and a full disk do."""

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
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


def names_of(made: Mirror) -> list[str]:
    return [shard.name for shard in made.manifest.split("train").shards]


def held(cache: str | Path) -> set[str]:
    return {path.name for path in Path(cache).glob("*/*.tar")}


def settled(made: Mirror) -> None:
    """Wait for what is being fetched ahead."""
    end = time.monotonic() + 30
    while made._threads and time.monotonic() < end:
        time.sleep(0.01)
    assert not made._threads


def test_the_shard_that_was_not_used_for_longest_makes_room(source: Remote, server: BadServer) -> None:
    made = Mirror.connect(source)
    names = names_of(made)
    sizes = [shard.bytes for shard in made.manifest.split("train").shards]
    tight = Mirror.connect(Remote(url=server.url, folder=source.folder, limit_bytes=sum(sizes[:3])))
    for number, name in enumerate(names[:3]):
        tight.path(name)
        os.utime(tight.folder / name, (1000 + number, 1000 + number))
    tight.prefetch([names[0]])  # used again: now the second is the oldest
    tight._wanted, tight._ahead = set(), []
    tight.path(names[3])
    assert names[1] not in held(source.folder)
    assert {names[0], names[3]} <= held(source.folder)


def test_what_is_read_soonest_stays_and_the_rest_waits_for_room(source: Remote, server: BadServer) -> None:
    made = Mirror.connect(source)
    names = names_of(made)
    sizes = [shard.bytes for shard in made.manifest.split("train").shards]
    tight = Mirror.connect(Remote(url=server.url, folder=source.folder, limit_bytes=2 * max(sizes)))
    assert tight.prefetch(names[:2]) == set(names[:2])
    settled(tight)
    assert tight.prefetch(names[1:4]) == set(names[:4]), "those of the call before are kept as well"
    settled(tight)
    assert len(held(source.folder)) == 2, "the window behind made room for one, the other waits"
    assert names[1] in held(source.folder)
    tight.path(names[2])
    assert held(source.folder) == {names[1], names[2]}, "what is read later goes first"
    tight.path(names[3])
    assert names[3] in held(source.folder), "what is waited for comes before what is only wanted"


def test_making_room_leaves_other_files_that_are_being_written(source: Remote) -> None:
    made = Mirror.connect(source)
    written = made.folder / f"val.index.npy.{os.getpid()}-1.part"
    written.write_bytes(b"half")
    made.path(names_of(made)[0])
    assert written.read_bytes() == b"half"
    assert sorted(path.name for path in made.folder.glob("val*")) == [written.name]


@pytest.mark.parametrize("locks", [True, False])
def test_a_part_that_a_killed_process_left_takes_no_room(
    source: Remote, server: BadServer, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system has no locks one counts as left when nothing came for longer than all attempts take."""
    made = Mirror.connect(source)
    names = names_of(made)
    size = max(shard.bytes for shard in made._shards.values())
    tight = Mirror.connect(Remote(url=server.url, folder=source.folder, limit_bytes=size))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuse)
    parts = [tight.folder / f"{names[0]}.0123abcd.part", tight.folder / f"{names[1]}.part"]  # of an older fastflower
    for part in parts:
        part.write_bytes(bytes(size))
        long_ago = time.time() - 8 * (remote._TIMEOUT + remote._LONGEST_PAUSE) - 1
        os.utime(part, (long_ago, long_ago))
    assert tight.path(names[0]).exists()
    assert not any(part.exists() for part in parts)


def test_without_locks_an_epoch_is_whole(source: Remote, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    one, other = (Loader(place, **OPTIONS, window=2) for place in (source, shards))
    assert [batch.index.tolist() for batch in one] == [batch.index.tolist() for batch in other]


@pytest.mark.parametrize("wait", ["shard", "room"])
def test_a_break_does_not_wait_for_a_lock_that_is_never_given_back(source: Remote, wait: str) -> None:
    loader = Loader(source, **OPTIONS, window=1, shuffle=False)
    assert loader._mirror is not None
    feeding = iter(loader)
    next(feeding)
    path = Path(source.folder) / "room.lock"
    with locked(
        path if wait == "room" else loader._mirror.folder / f"{names_of(loader._mirror)[3]}.lock", lambda: False
    ):
        ends_soon(feeding.close)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_shard_gets_its_name_while_nobody_counts(source: Remote, server: BadServer) -> None:
    """Whoever makes room looks for tars, then for parts: one renamed in between would take room that nobody knows of."""
    made = Mirror.connect(source)
    path = made.folder / names_of(made)[0]
    with (Path(source.folder) / "room.lock").open("w") as counting:

        def count(_name: str, asked: int) -> None:
            if not asked:
                fcntl.flock(counting, fcntl.LOCK_EX)

        server.fault = count
        thread = threading.Thread(target=made.path, args=(path.name,))
        thread.start()
        while path.name not in server.sent or server.sent[path.name] < made._shards[path.name].bytes:
            time.sleep(0.01)
        thread.join(0.3)
        assert thread.is_alive()
        assert not path.exists()
        assert len(list(path.parent.glob(f"{path.name}.*.part"))) == 1
        fcntl.flock(counting, fcntl.LOCK_UN)
        thread.join(20)
    assert path.exists()


def test_pauses_double_up_to_the_longest(
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
    pauses = [line.rpartition("trying again in ")[2] for line in caplog.messages]
    assert pauses == ["0.2 s", "0.5 s", "1.0 s", "2.0 s", "3.0 s", "3.0 s", "3.0 s"]


def test_what_may_not_be_read_is_asked_for_once(source: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(_self: RemoteFiles, name: str, *_: object) -> bytes:
        asked.append(name)
        raise PermissionError("Access Denied")

    monkeypatch.setattr(RemoteFiles, "_request", refuse)
    with pytest.raises(ShardError, match=r"manifest.json: may not be read \(Access Denied\); check the credentials"):
        Mirror.connect(source)
    assert asked == ["manifest.json"]


def ends_soon(action: Any) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits"


@pytest.mark.parametrize("kind", ["stall", "503"])
def test_a_break_waits_neither_for_a_server_that_stalls_nor_for_the_next_attempt(
    kind: str, source: Remote, server: BadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_TIMEOUT", "_FIRST_PAUSE", "_LONGEST_PAUSE"):
        monkeypatch.setattr(remote, name, 1000.0)
    server.fault = lambda name, _asked: kind if name > "train-000002" and name.endswith(".tar") else None
    feeding = iter(Loader(source, **OPTIONS, window=1, shuffle=False))
    next(feeding)
    ends_soon(feeding.close)  # pyright: ignore[reportAttributeAccessIssue]


HOLDING = """
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
    other = subprocess.Popen([sys.executable, "-c", HOLDING, *locks], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    feeding = iter(loader)
    next(feeding)
    ends_soon(feeding.close)  # pyright: ignore[reportAttributeAccessIssue]
    other.kill()
    other.communicate()


def test_one_iterator_may_end_while_another_goes_on(source: Remote, shards: Path) -> None:
    loader = Loader(source, **OPTIONS, window=2)
    one = iter(loader)
    first = next(one).index.tolist()
    other = iter(loader)
    next(other)
    other.close()  # pyright: ignore[reportAttributeAccessIssue]
    rest = [batch.index.tolist() for batch in one]
    assert [first, *rest] == [batch.index.tolist() for batch in Loader(shards, **OPTIONS, window=2)]


FORKED = """
import json, os, sys
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
    deafen(remote.RemoteFiles, loader._shards_ahead(0, 0)[0])
if sys.argv[4].endswith("exit"):
    feeding = iter(loader)
    next(feeding)
    print("fed", flush=True)
    raise RuntimeError("with an iterator at hand")
if sys.argv[4] == "during":
    feeding = iter(loader)
    next(feeding)
child = os.fork()
if not child and sys.argv[4] == "during":
    feeding.close()
loader.set_epoch(0)
fed = sum(len(batch.index) for batch in loader)
os.write(1, f"{fed}\\n".encode())  # in one piece: two processes write
if child:
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))
os._exit(0)
"""


def program(server: BadServer, cache: Path, what: str) -> "subprocess.Popen[str]":
    paths = os.pathsep.join(map(str, (HELPERS, Path(__file__).parent)))
    command = [sys.executable, "-W", "ignore", "-c", FORKED, paths, server.url, str(cache), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.soak), "during"])
def test_a_forked_process_downloads_for_itself(when: str, server: BadServer, tmp_path: Path) -> None:
    asked = server.fault

    def slow(name: str, number: int) -> str | None:
        time.sleep(0.005)
        return asked(name, number)

    server.fault = slow
    process = program(server, tmp_path / "cache", when)
    out, err = process.communicate(timeout=90)
    assert (process.returncode, out) == (0, "120\n120\n"), err[-2000:]


@pytest.mark.parametrize("what", ["exit", pytest.param("deaf exit", marks=pytest.mark.soak)])
def test_an_exit_does_not_wait_for_downloads(what: str, server: BadServer, tmp_path: Path) -> None:
    """Neither for a server that stalls, nor for a thread that does not notice that the interpreter ends."""
    server.fault = lambda name, asked: "stall" if what == "exit" and name.endswith(".tar") and asked > 60 else None
    process = program(server, tmp_path / "cache", what)
    assert process.stdout is not None
    assert process.stdout.readline() == "fed\n"
    start = time.monotonic()
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "with an iterator at hand" in err
    assert time.monotonic() - start < 30  # a stalled piece alone would be asked for eight times


def test_a_cache_that_somebody_cleared_is_filled_again(source: Remote) -> None:
    made = Mirror.connect(source)
    name = names_of(made)[0]
    assert made.path(name).exists()
    for path in made.folder.iterdir():
        path.unlink()
    made.folder.rmdir()
    assert made.path(name).exists()


def test_a_cache_that_cannot_be_written_stops_the_epoch_whatever_is_said_of_bad_samples(source: Remote) -> None:
    loader = Loader(source, **OPTIONS, on_bad="skip", shuffle=False)
    assert loader._mirror is not None
    for name in names_of(loader._mirror):
        (loader._mirror.folder / f"{name}.lock").mkdir()
    with pytest.raises(ShardError, match=r"cannot be written \(Is a directory\); make room, or name another folder"):
        list(loader)
    assert not loader.replaced


def test_an_index_of_another_pack_is_refused(server: BadServer, source: Remote, shards: Path, tmp_path: Path) -> None:
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
    with pytest.raises(ShardError, match=rf"^{source.url}/train.index.npy: counts other samples of each shard than"):
        Loader(source, **OPTIONS)


def test_a_thread_that_fails_in_a_way_nobody_foresaw_does_not_hold_up_the_end(
    source: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Mirror._download

    def download(self: Mirror, name: str, *, demanded: bool = False) -> None:
        if not demanded:
            raise ValueError("unforeseen")
        real(self, name, demanded=demanded)

    monkeypatch.setattr(Mirror, "_download", download)
    feeding = iter(Loader(source, **OPTIONS, window=1))
    next(feeding)
    ends_soon(feeding.close)  # pyright: ignore[reportAttributeAccessIssue]
