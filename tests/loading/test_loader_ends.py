"""A loader leaves nothing behind, however its epoch ends, and works in forked and spawned processes and notebooks."""

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fastflower import Augment, Loader
from fastflower.loading import loader as loader_file

AUGMENT = Augment(size=32, resize=36, crop=(0.3, 1.0), hue=0.1)
OPTIONS: dict[str, Any] = {"batch_size": 8, "augment": AUGMENT, "device": "cpu"}
FEW: dict[str, Any] = {**OPTIONS, "split": "val", "shuffle": True, "batch_size": 4}
"""Eight steps, which even DALI is quick at."""
BACKENDS = ["native", "opencv", "dali"]
OPENCV = pytest.param("opencv", marks=pytest.mark.soak)  # threads like native


@pytest.fixture(scope="module", autouse=True)
def _only_new_objects_are_collected() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def left() -> dict[str, Any]:
    """Return what could be left behind: processes, our threads, open files, shared memory."""
    gc.collect()
    me = psutil.Process()
    return {
        "processes": len(me.children(recursive=True)),
        "threads": sorted(thread.name for thread in threading.enumerate() if "fastflower" in thread.name),
        "files": sorted(file.path for file in me.open_files()),
        "shared": [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line],
    }


@pytest.mark.parametrize("backend", ["native", "dali", OPENCV])
@pytest.mark.parametrize("end", ["whole", "break", "exception", "interrupt", "two at once"])
def test_an_epoch_leaves_nothing_behind(end: str, backend: Any, shards: Path) -> None:
    before = left()
    loader = Loader(shards, backend=backend, **FEW)
    if end == "two at once":
        for _pair in zip(loader, loader, strict=False):
            break
    try:
        for step, _batch in enumerate(loader):
            if step == 2 and end == "break":
                break
            if step == 2 and end == "exception":
                raise RuntimeError("consumer failed")
            if step == 2 and end == "interrupt":
                signal.raise_signal(signal.SIGINT)
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert {**left(), "files": before["files"]} == before
    assert len(list(loader)) == len(loader), "and the next epoch is whole"
    del loader  # it keeps shards open
    assert left() == before


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_loader_ends import load_forever
load_forever(Path(sys.argv[2]))
"""


def load_forever(shards: Path) -> None:
    loader = Loader(shards, **OPTIONS)
    while True:
        for _batch in loader:
            os.write(1, b"batch\n")


def test_a_process_that_is_interrupted_ends_at_once_and_leaves_nothing(shards: Path) -> None:
    """The interpreter shuts down, so the process is no fork."""
    before = left()
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(shards)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "batch\n"
    assert psutil.Process(process.pid).children(recursive=True) == []
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 1)
    assert left() == before


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.usefixtures("nothing_to_collect")
def test_a_process_that_is_killed_ends_at_once_and_leaves_nothing(shards: Path) -> None:
    before = left()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 1)
        load_forever(shards)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert said.readline() == "batch\n"
        assert psutil.Process(child).children(recursive=True) == []
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0) == (child, signal.SIGKILL)
    assert left() == before


def test_memory_is_reused_only_after_a_batch_is_gone_and_freeing_it_runs_no_python(shards: Path) -> None:
    """Python swallows a KeyboardInterrupt in the callback of a weak reference."""
    batches = iter(Loader(shards, backend="opencv", workers=1, **OPTIONS))
    kept = [next(batches) for _ in range(6)]
    places = [batch.images.data_ptr() for batch in kept]
    assert len(set(places)) == len(places)
    calls: list[str] = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    del kept
    sys.setprofile(None)
    assert calls == []
    assert {batch.images.data_ptr() for batch in batches} & set(places)


def send_batches(loader: Loader, pipe: Any) -> None:
    pipe.send([(batch.index.tolist(), batch.images.sum().item()) for batch in loader])


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_threads_are_gone_from_the_system_when_an_iterator_ends(shards: Path) -> None:
    for _ in range(20):
        iterator = iter(Loader(shards, **OPTIONS))
        next(iterator)
        ours = {thread.native_id for thread in threading.enumerate() if thread.name.startswith("fastflower")}
        assert ours
        iterator.close()  # pyright: ignore[reportAttributeAccessIssue]
        assert not ours & {thread.id for thread in psutil.Process().threads()}


@pytest.mark.usefixtures("nothing_to_collect")
@pytest.mark.parametrize("backend", ["native", OPENCV])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_loader_works_in_another_process(method: str, backend: Any, shards: Path) -> None:
    loader = Loader(shards, backend=backend, **OPTIONS)
    next(iter(loader))  # its threads have run in this process
    loader.load_state_dict({**loader.state_dict(), "epoch": 1, "step": 3})
    context: Any = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=send_batches, args=(loader, there))
    process.start()
    assert here.poll(60), "no batches arrived"
    received = here.recv()
    process.join()
    assert process.exitcode == 0
    assert received == [(batch.index.tolist(), batch.images.sum().item()) for batch in loader]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pickled_loader_stands_where_it_stood(backend: Any, shards: Path) -> None:
    loader = Loader(shards, backend=backend, seed=3, **FEW)
    loader.set_epoch(2)
    for step, _batch in enumerate(loader):
        if step == 1:
            break
    again = pickle.loads(pickle.dumps(loader))
    assert again.state_dict() == loader.state_dict()
    assert all(torch.equal(one.images, other.images) for one, other in zip(again, loader, strict=True))


def test_a_pickled_loader_logs_which_position_it_discards(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = Loader(shards, batch_size=16, device="cpu")
    loader.load_state_dict({**loader.state_dict(), "step": 3})
    pickle.loads(pickle.dumps(loader)).set_epoch(1)
    (message,) = caplog.messages
    assert message.startswith(
        "set_epoch(1): starting at the first step of epoch 1, and not at the loaded position, step 3 "
    )


def test_an_unpickled_loader_uses_the_cores_of_its_own_machine(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, default = Loader(shards, workers=3, **OPTIONS), Loader(shards, **OPTIONS)
    monkeypatch.setattr(loader_file, "cores", lambda: 40)
    assert [pickle.loads(pickle.dumps(each)).workers for each in (chosen, default)] == [3, 41]


def test_a_pickled_loader_keeps_its_rank(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed may not be initialized in the process that unpickles it."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_rank", lambda: 1)
        patch.setattr(torch.distributed, "get_world_size", lambda: 3)
        loader = Loader(shards, **OPTIONS)
    again = pickle.loads(pickle.dumps(loader))
    assert (again.rank, again.world_size) == (loader.rank, loader.world_size) == (1, 3)


def test_a_loader_works_inside_an_event_loop(shards: Path) -> None:
    """The cells of a notebook run inside one."""

    async def cell() -> int:
        return sum(len(batch.labels) for batch in Loader(shards, **OPTIONS))

    assert asyncio.run(cell()) == 120


def test_the_state_needs_no_pickle_and_no_large_file(shards: Path) -> None:
    loader = Loader(shards, **OPTIONS)
    next(iter(loader))
    assert len(repr(loader.state_dict())) < 300


def test_creating_a_loader_reads_no_image(shards: Path) -> None:
    """So the first batch does not take longer on a large data set."""
    start = psutil.Process().io_counters().read_chars
    loader = Loader(shards, **OPTIONS)
    index = (shards / "train.index.npy").stat().st_size
    assert psutil.Process().io_counters().read_chars - start < index + 100_000
    assert len(loader) == 15
