"""Shards at a URL: server faults cost time, not data; the cache stays within its limit; no partial files remain."""

import json
import logging
import multiprocessing
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from bad_server import BadServer
from packs import resealed

from fastflower import Augment, Loader, Manifest
from fastflower.errors import ArgumentError, ShardError
from fastflower.shards.remote import Remote

pytest.importorskip("aiohttp")
AUGMENT = Augment(size=16, resize=18, crop=(0.3, 1.0))
OPTIONS: dict[str, Any] = {"batch_size": 8, "augment": AUGMENT, "device": "cpu", "workers": 2, "cache": None}


def epochs(shards: Any, count: int = 2, **options: Any) -> list[tuple[list[int], torch.Tensor]]:
    loader = Loader(shards, **{**OPTIONS, **options})
    return [(batch.index.tolist(), batch.images) for _ in range(count) for batch in loader]


def assert_same(found: list[tuple[list[int], torch.Tensor]], expected: list[tuple[list[int], torch.Tensor]]) -> None:
    assert [index for index, _ in found] == [index for index, _ in expected]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(found, expected, strict=True))


def tars(cache: str | Path) -> list[Path]:
    return sorted(Path(cache).glob("*/*.tar"))


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it has just been evicted
        return 0


def assert_no_partial_files(cache: str | Path) -> None:
    assert not list(Path(cache).rglob("*.part"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastflower")]


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"split": "val"}, {"shuffle": False, "tail": "keep"}], ids=str)
def test_a_url_yields_the_same_batches_as_the_folder(options: dict[str, Any], source: Remote, shards: Path) -> None:
    shuffled = {"split", "shuffle"}.isdisjoint(options)
    expected = epochs(shards, **({"window": 8, **options} if shuffled else options))
    assert_same(epochs(source, **options), expected)
    assert_no_partial_files(source.folder)


@pytest.mark.parametrize("kind", ["503", "truncate", "stall", "flip", "whole"])
def test_a_server_that_misbehaves_costs_time_not_data(
    kind: str, source: Remote, server: BadServer, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "fastflower")

    def fault(name: str, requests_before: int) -> str | None:
        if kind == "stall" and not name.endswith("0.tar"):
            return None  # one shard is slow enough
        return kind if requests_before in (0, 3) and not (kind == "flip" and not name.endswith(".tar")) else None

    server.fault = fault
    assert_same(epochs(source, 1, window=2), epochs(shards, 1, window=2))
    assert_no_partial_files(source.folder)
    assert any("retrying in" in line for line in caplog.messages) == (kind != "whole")


def test_files_of_a_server_without_ranges_are_read_whole(source: Remote, server: BadServer, shards: Path) -> None:
    server.fault = lambda _name, _asked: "whole"
    assert_same(epochs(source, 1, window=1), epochs(shards, 1, window=1))


def test_every_shard_is_downloaded_only_once_if_all_fit_in_the_cache(
    source: Remote, server: BadServer, shards: Path
) -> None:
    epochs(source, 3)
    sizes = {shard.name: shard.bytes for shard in Manifest.load(shards).split("train").shards}
    assert {name: server.sent[name] for name in sizes} == sizes
    before = server.asked.copy()
    epochs(source, 1)
    assert server.asked - before == {"manifest.json": 1}, "another loader finds all but the manifest in the cache"


def test_the_cache_stays_within_its_limit(server: BadServer, shards: Path, tmp_path: Path) -> None:
    train = Manifest.load(shards).split("train").shards
    assert len(train) > 4
    limit = 3 * max(shard.bytes for shard in train)
    source = Remote(url=server.url, folder=tmp_path / "cache", limit_bytes=limit)
    loader = Loader(source, **{**OPTIONS, "batch_size": 7}, window=1, tail="pad")
    for _ in range(2):
        seen: list[int] = []
        for batch in loader:
            seen += batch.index.tolist()
            assert sum(map(size_of, (tmp_path / "cache").glob("*/*.tar*"))) <= limit
        assert set(seen) == set(range(120))
    # A deleted file takes disk space as long as it is open.
    assert len([file.path for file in psutil.Process().open_files() if str(tmp_path) in file.path]) < len(train)
    assert len(tars(tmp_path / "cache")) < len(train)
    assert_no_partial_files(tmp_path / "cache")


def test_a_limit_below_three_windows_is_rejected(server: BadServer, tmp_path: Path) -> None:
    source = Remote(url=server.url, folder=tmp_path / "cache", limit_bytes=1000)
    with pytest.raises(
        ArgumentError, match=r"limit_bytes must be at least \d+ to hold three windows of shards, got 1000; raise it"
    ):
        Loader(source, **OPTIONS, window=1)


def feed(source: Remote, rank: int, out: Path, together: Any) -> None:
    together.wait(60)
    loader = Loader(source, **{**OPTIONS, "batch_size": 4}, rank=rank, world_size=2)
    out.write_text(json.dumps([batch.index.tolist() for batch in loader]))


def test_ranks_on_one_machine_download_each_shard_once(
    source: Remote, server: BadServer, shards: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    process = context.Process(target=feed, args=(source, 1, tmp_path / "1.json", together))
    process.start()
    feed(source, 0, tmp_path / "0.json", together)
    process.join()
    assert process.exitcode == 0
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    whole = [index for index, _ in epochs(shards, 1, window=8)]
    assert [left + right for left, right in zip(one, other, strict=True)] == whole
    sizes = {shard.name: shard.bytes for shard in Manifest.load(shards).split("train").shards}
    assert {name: server.sent[name] for name in sizes} == sizes


def test_a_break_stops_the_downloads_and_the_next_epoch_is_complete(
    source: Remote, server: BadServer, shards: Path
) -> None:
    loader = Loader(source, **OPTIONS, window=2)
    next(iter(loader))
    assert_no_partial_files(source.folder)
    server.fault = lambda name, _asked: "stall" if name.endswith(".tar") else None
    shutil.rmtree(source.folder, ignore_errors=True)
    loader = Loader(source, **OPTIONS, window=2)
    batches = iter(loader)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.shards.remote._ATTEMPTS", 2)
        patch.setattr("fastflower.shards.remote._TIMEOUT", 0.3)
        with pytest.raises(ShardError, match=r"could not be read in 2 attempts \(timed out after "):
            next(batches)
    assert_no_partial_files(source.folder)
    server.fault = lambda _name, _asked: None
    loader.set_epoch(0)
    assert_same([(batch.index.tolist(), batch.images) for batch in loader], epochs(shards, 1, window=2))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "train-000000.tar",
            "503",
            r"/train-000000.tar: could not be read in 3 attempts \(503, .*check the connection",
        ),
        (
            "train-000001.tar",
            "flip",
            r"/train-000001.tar: could not be read in 3 attempts \(its bytes do not match the manifest",
        ),
        ("manifest.json", "truncate", r"/manifest.json: could not be read in 3 attempts"),
        ("train.index.npy", "503", r"/train.index.npy: could not be read in 3 attempts"),
    ],
)
def test_a_server_that_never_recovers_is_reported(
    name: str, kind: str, message: str, source: Remote, server: BadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastflower.shards.remote._ATTEMPTS", 3)
    server.fault = lambda asked_for, _asked: kind if asked_for == name else None
    with pytest.raises(ShardError, match=message):
        epochs(source, 1)
    assert_no_partial_files(source.folder)
    server.fault = lambda _name, _asked: None
    assert len(epochs(source, 1)) == len(Loader(source, **OPTIONS)), "the fault has left nothing behind"


def test_leftovers_of_a_killed_process_are_removed(source: Remote, shards: Path) -> None:
    epochs(source, 1)
    (gone, *_) = tars(source.folder)
    part = gone.with_name(f"{gone.name}.part")
    gone.rename(part)
    stale = part.with_name("train-999999.tar.part")
    stale.write_bytes(bytes(1000))
    assert_same(epochs(source, 1), epochs(shards, 1, window=8))
    assert_no_partial_files(source.folder)


def test_a_new_pack_at_the_url_is_not_mixed_with_the_old_one(
    server: BadServer, source: Remote, tmp_path: Path, shards: Path
) -> None:
    epochs(source, 1)
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    (other / "manifest.json").write_text(replace(Manifest.load(other), versions={}).to_json())
    server.folder = other
    assert len(epochs(source, 1)) > 0
    assert len([path for path in Path(source.folder).iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "missing",
            r"http://127.0.0.1:\d+/shards/manifest.json: does not exist; pass the URL of a folder that pack wrote",
        ),
        ("text", r"http://127.0.0.1:\d+/shards/manifest.json: cannot be read"),
        (
            "path",
            r"http://127.0.0.1:\d+/shards/manifest.json: lists shard '../train-000000.tar', which is not a file name",
        ),
        ("index", r"http://127.0.0.1:\d+/shards/train.index.npy: has shape \(3,\)"),
    ],
)
def test_an_invalid_pack_is_rejected_and_not_cached(
    change: str, message: str, server: BadServer, source: Remote, shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(shards, folder)
    text = (folder / "manifest.json").read_text()
    if change == "missing":
        (folder / "manifest.json").unlink()
    elif change == "text":
        (folder / "manifest.json").write_text("<html>welcome</html>")
    elif change == "path":
        (folder / "manifest.json").write_text(text.replace('"train-000000.tar"', '"../train-000000.tar"'))
        resealed(folder)
    else:
        np.save(folder / "train.index.npy", np.load(folder / "train.index.npy")[:3])
    server.folder = folder
    with pytest.raises(ShardError, match=message):
        Loader(source, **OPTIONS)
    server.folder = shards
    assert len(Loader(source, **OPTIONS)) > 0


def test_an_unknown_protocol_is_rejected() -> None:
    with pytest.raises(ArgumentError, match="gopher://host/shards: Protocol not known: gopher; pass a folder or a URL"):
        Loader("gopher://host/shards")


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_the_message_names_the_extra_to_install() -> None:
    with pytest.raises(
        ArgumentError, match=r"gs://bucket/shards: .*gcsfs.*; pip install .*'fastflower\[gcs\]' \(gs://\)"
    ):
        Loader("gs://bucket/shards")


def test_a_cache_that_cannot_be_written_is_reported(server: BadServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ShardError,
        match=r"cannot be written \(.*\); set XDG_CACHE_HOME to a writable folder, or pass Remote\(folder=...\) from Python\.$",
    ):
        Loader(Remote(url=server.url, folder=tmp_path / "file"), **OPTIONS)


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """A real S3 server on loopback, as the options of s3fs."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"key": "test", "secret": "test", "endpoint_url": f"http://{host}:{port}"}
    server.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore", "ignore::ResourceWarning")
def test_s3(s3: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    import s3fs

    system = s3fs.S3FileSystem(**s3)
    system.mkdir("bucket")
    system.put(str(shards), "bucket/flowers", recursive=True)
    source = Remote(url="s3://bucket/flowers", folder=tmp_path / "cache", options=s3)
    assert_same(epochs(source), epochs(shards, window=8))
    with pytest.raises(ShardError, match=r"s3://bucket/nothing/manifest.json: does not exist"):
        Loader(Remote(url="s3://bucket/nothing", folder=tmp_path / "cache", options=s3), **OPTIONS)
    assert_no_partial_files(tmp_path / "cache")
