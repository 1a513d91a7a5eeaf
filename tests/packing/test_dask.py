"""Packing on a real dask cluster: the same bytes even if a worker dies, and no cached results of an earlier pack."""

import logging
import os
import re
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster
from kill_packer import checksums
from packs import drawn, paths

from fastflower import pack
from fastflower.errors import FolderError

NOWHERE: Any = None
SHARD_BYTES = 1 << 18  # about 30 shards of the drawn flowers


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    cluster = LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=NOWHERE, silence_logs=logging.CRITICAL
    )
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        yield client


@pytest.fixture
def executor(client: Client) -> Iterator[Executor]:
    with client.get_executor() as executor:
        yield executor


@pytest.fixture(scope="module")
def expected(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    pack(flowers, out, shard_bytes=SHARD_BYTES)
    assert len(list(out.glob("*.tar"))) > 20
    return checksums(out)


def test_dask_workers_make_the_same_bytes(
    flowers: Path, tmp_path: Path, executor: Executor, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also holds for relative paths, although the workers have another current folder."""
    monkeypatch.chdir(flowers.parent)
    pack(flowers.name, os.path.relpath(tmp_path / "out"), shard_bytes=SHARD_BYTES, executor=executor)
    assert checksums(tmp_path / "out") == expected


class Deadly(Executor):
    """Kills a process once the first shard is made."""

    def __init__(self, executor: Executor, victim: int) -> None:
        self.executor, self.victim, self.killed = executor, victim, False

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = self.executor.submit(fn, *args, **kwargs)
        future.add_done_callback(self.kill)
        return future

    def kill(self, _: object) -> None:
        if not self.killed:
            self.killed = True
            os.kill(self.victim, signal.SIGKILL)


def test_a_killed_dask_worker_does_not_change_the_bytes(
    flowers: Path, tmp_path: Path, cluster: LocalCluster, executor: Executor, expected: dict[str, str]
) -> None:
    deadly = Deadly(executor, next(iter(cluster.workers.values())).pid)
    pack(flowers, tmp_path / "out", shard_bytes=SHARD_BYTES, executor=deadly)
    assert deadly.killed
    assert checksums(tmp_path / "out") == expected


def test_the_images_error_is_raised_and_no_cached_result_is_reused(tmp_path: Path, executor: Executor) -> None:
    """Dask caches the result of a call as long as something references it, here the error."""
    folder, out = drawn(tmp_path / "data", a=12, b=12), tmp_path / "out"
    pack(folder, tmp_path / "expected", shard_bytes=2000, on_bad="fail")
    bad = folder / next(iter(paths(tmp_path / "expected", "val")))
    whole, times = bad.read_bytes(), (bad.stat().st_atime_ns, bad.stat().st_mtime_ns)
    bad.write_bytes(bytes(len(whole)))
    text = f"{bad}: contains only zero bytes; remove or replace it, or skip damaged images:\n  pack("
    with pytest.raises(FolderError, match=re.escape(text)) as held:
        pack(folder, out, shard_bytes=2000, on_bad="fail", executor=executor)
    assert not out.exists()
    bad.write_bytes(whole)
    os.utime(bad, ns=times)
    for _ in range(2):
        pack(folder, out, shard_bytes=2000, on_bad="fail", executor=executor)
        assert checksums(out) == checksums(tmp_path / "expected")
        shutil.rmtree(out)
    assert held.value
