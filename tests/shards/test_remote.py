"""Shards at an address: what servers do costs time, not data; the cache keeps its limit; nothing half-done stays."""

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
    except FileNotFoundError:  # it has just made room
        return 0


def assert_nothing_half_done(cache: str | Path) -> None:
    assert not list(Path(cache).rglob("*.part"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastflower")]


@pytest.mark.parametrize("options", [{}, {"window": 1}, {"split": "val"}, {"shuffle": False, "tail": "keep"}], ids=str)
def test_an_address_feeds_what_the_folder_feeds(options: dict[str, Any], source: Remote, shards: Path) -> None:
    shuffled = {"split", "shuffle"}.isdisjoint(options)
    expected = epochs(shards, **({"window": 8, **options} if shuffled else options))
    assert_same(epochs(source, **options), expected)
    assert_nothing_half_done(source.folder)


@pytest.mark.parametrize("kind", ["503", "truncate", "stall", "flip", "whole"])
def test_a_server_that_misbehaves_costs_time_not_data(
    kind: str, source: Remote, server: BadServer, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "fastflower")

    def fault(name: str, asked: int) -> str | None:
        if kind == "stall" and not name.endswith("0.tar"):
            return None  # one shard is slow enough
        return kind if asked in (0, 3) and not (kind == "flip" and not name.endswith(".tar")) else None

    server.fault = fault
    assert_same(epochs(source, 1, window=2), epochs(shards, 1, window=2))
    assert_nothing_half_done(source.folder)
    assert any("trying again in" in line for line in caplog.messages) == (kind != "whole")


def test_a_server_that_knows_no_ranges_is_read_whole(source: Remote, server: BadServer, shards: Path) -> None:
    server.fault = lambda _name, _asked: "whole"
    assert_same(epochs(source, 1, window=1), epochs(shards, 1, window=1))


def test_every_shard_is_downloaded_once_and_not_again_while_all_fit(
    source: Remote, server: BadServer, shards: Path
) -> None:
    epochs(source, 3)
    sizes = {shard.name: shard.bytes for shard in Manifest.load(shards).split("train").shards}
    assert {name: server.sent[name] for name in sizes} == sizes
    before = server.asked.copy()
    epochs(source, 1)
    assert server.asked - before == {"manifest.json": 1}, "another loader finds all but the manifest here"


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
    # A file that has gone from the folder takes room on the disk as long as it is open.
    assert len([file.path for file in psutil.Process().open_files() if str(tmp_path) in file.path]) < len(train)
    assert len(tars(tmp_path / "cache")) < len(train)
    assert_nothing_half_done(tmp_path / "cache")


def test_a_limit_below_three_windows_is_refused(server: BadServer, tmp_path: Path) -> None:
    source = Remote(url=server.url, folder=tmp_path / "cache", limit_bytes=1000)
    with pytest.raises(
        ArgumentError, match=r"limit_bytes must hold three windows of shards, here \d+ bytes, got 1000; raise it"
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


def test_a_break_ends_the_downloads_and_the_next_epoch_is_whole(
    source: Remote, server: BadServer, shards: Path
) -> None:
    loader = Loader(source, **OPTIONS, window=2)
    next(iter(loader))
    assert_nothing_half_done(source.folder)
    server.fault = lambda name, _asked: "stall" if name.endswith(".tar") else None
    shutil.rmtree(source.folder, ignore_errors=True)
    loader = Loader(source, **OPTIONS, window=2)
    feeding = iter(loader)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.shards.remote._ATTEMPTS", 2)
        patch.setattr("fastflower.shards.remote._TIMEOUT", 0.3)
        with pytest.raises(ShardError, match=r"could not be read in 2 attempts \(not all came within "):
            next(feeding)
    assert_nothing_half_done(source.folder)
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
            r"/train-000001.tar: could not be read in 3 attempts \(its bytes are not those",
        ),
        ("manifest.json", "truncate", r"/manifest.json: could not be read in 3 attempts"),
        ("train.index.npy", "503", r"/train.index.npy: could not be read in 3 attempts"),
    ],
)
def test_a_server_that_never_recovers_is_named(
    name: str, kind: str, message: str, source: Remote, server: BadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastflower.shards.remote._ATTEMPTS", 3)
    server.fault = lambda asked_for, _asked: kind if asked_for == name else None
    with pytest.raises(ShardError, match=message):
        epochs(source, 1)
    assert_nothing_half_done(source.folder)
    server.fault = lambda _name, _asked: None
    assert len(epochs(source, 1)) == len(Loader(source, **OPTIONS)), "what was wrong has left nothing behind"


def test_what_a_killed_process_left_is_cleared_away(source: Remote, shards: Path) -> None:
    epochs(source, 1)
    (gone, *_) = tars(source.folder)
    part = gone.with_name(f"{gone.name}.part")
    gone.rename(part)
    stale = part.with_name("train-999999.tar.part")
    stale.write_bytes(bytes(1000))
    assert_same(epochs(source, 1), epochs(shards, 1, window=8))
    assert_nothing_half_done(source.folder)


def test_a_new_pack_at_the_address_is_not_mixed_with_the_old(
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
        ("missing", r"http://127.0.0.1:\d+/shards/manifest.json: is not there; name the folder that pack wrote"),
        ("text", r"http://127.0.0.1:\d+/shards/manifest.json: cannot be read"),
        (
            "path",
            r"http://127.0.0.1:\d+/shards/manifest.json: names a shard '../train-000000.tar', which is no file's name",
        ),
        ("index", r"http://127.0.0.1:\d+/shards/train.index.npy: has \(3,\) rows"),
    ],
)
def test_what_is_no_pack_is_refused_and_not_kept(
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


def test_addresses_that_nobody_knows_are_refused() -> None:
    with pytest.raises(
        ArgumentError, match="gopher://host/shards: Protocol not known: gopher; name a folder, or an address"
    ):
        Loader("gopher://host/shards")


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_what_an_address_asks_to_be_installed_is_named() -> None:
    with pytest.raises(
        ArgumentError, match=r"gs://bucket/shards: .*gcsfs.*; pip install 'fastflower\[s3\]', for gs:// \[gcs\]"
    ):
        Loader("gs://bucket/shards")


def test_a_cache_that_cannot_be_written_is_named(server: BadServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ShardError, match=r"cannot be written \(.*\); make room, or name another folder with Remote\(folder=\)"
    ):
        Loader(Remote(url=server.url, folder=tmp_path / "file"), **OPTIONS)


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """A real S3 server on loopback, as s3fs is told of it."""
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
    with pytest.raises(ShardError, match=r"s3://bucket/nothing/manifest.json: is not there"):
        Loader(Remote(url="s3://bucket/nothing", folder=tmp_path / "cache", options=s3), **OPTIONS)
    assert_nothing_half_done(tmp_path / "cache")
