"""One shard of a pack: it has the same bytes if it is made twice, at the same time or after damage."""

import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kill_packer import checksums
from packs import drawn, exactly

from fastflower.errors import FolderError
from fastflower.packing import worker as module
from fastflower.packing.folder import scan
from fastflower.packing.plan import Options, Plan, load_plan, make_plan, save_plan
from fastflower.packing.worker import STOP, MadeShard, key_of, make_shard, make_shard_elsewhere
from fastflower.shards.manifest import INDEX_DTYPE, Shard

NAME = "train-000000"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Nine images, three of them damaged or missing."""
    folder = drawn(tmp_path / "small", a=4, b=5)
    (folder / "a/001.jpg").write_bytes(b"text")
    (folder / "b/000.jpg").write_bytes(b"")
    (folder / "b/004.jpg").unlink()
    (folder / "b/004.jpg").symlink_to("nowhere")
    return folder


@pytest.fixture(autouse=True)
def one_image_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1 << 12)


def planned(folder: Path, work: Path, **changes: Any) -> Plan:
    """Make a workspace with the plan of one shard."""
    options: Any = {"split_by": "class", "val_fraction": 0.0, "seed": 0, "shard_bytes": 1 << 30, "max_side": None}
    options |= {"quality": None, "on_bad": "skip", "on_conflict": "keep", "lists": False}
    plan = make_plan(scan(folder), Options(**(options | changes)), {})
    work.mkdir(parents=True)
    save_plan(plan, work)
    return plan


def make(folder: Path, work: Path, mapped: Any = map, advance: Callable[[int], object] = lambda _: None) -> int:
    """Make the first shard."""
    return make_shard(load_plan(work, folder), work, 0, mapped, advance)


@pytest.fixture
def work(small: Path, tmp_path: Path) -> Path:
    planned(small, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def expected(small: Path, tmp_path: Path) -> dict[str, str]:
    """Checksums of all files in a workspace where the shard was made once."""
    planned(small, tmp_path / "expected")
    make(small, tmp_path / "expected")
    made = checksums(tmp_path / "expected")
    assert {f"{NAME}.tar", f"{NAME}.idx", f"{NAME}.npz"} < made.keys()
    return made


def test_an_existing_shard_is_not_made_again(small: Path, work: Path, expected: dict[str, str]) -> None:
    counts: list[int] = []
    assert make(small, work, advance=counts.append) == sum(counts) == 9
    assert checksums(work) == expected
    before = {path.name: path.stat() for path in work.iterdir()}
    counts.clear()
    assert make(small, work, advance=counts.append) == sum(counts) == 9
    assert {path.name: path.stat() for path in work.iterdir()} == before


def test_the_record_describes_the_shard(small: Path, work: Path) -> None:
    make(small, work)
    made = MadeShard.load(work / f"{NAME}.npz")
    data = (work / f"{NAME}.tar").read_bytes()
    assert made.entry == Shard(f"{NAME}.tar", 6, len(data), hashlib.sha256(data).hexdigest())
    found = scan(small)
    paths = [found.path(number) for number in made.numbers]
    assert sorted(paths) == [f"a/00{n}.jpg" for n in (0, 2, 3)] + [f"b/00{n}.jpg" for n in (1, 2, 3)]
    for path, row in zip(paths, made.rows, strict=True):
        assert data[row["offset"] : row["offset"] + row["size"]] == (small / path).read_bytes()
        assert row["label"] == int(path.startswith("b/"))
    assert made.hashes.shape == (6,)
    assert len(set(made.hashes.tolist())) == 6
    assert sorted(made.skipped, key=lambda item: item["path"]) == [
        {"path": "a/001.jpg", "reason": "is plain text, named .jpg"},
        {"path": "b/000.jpg", "reason": "is empty"},
        {"path": "b/004.jpg", "reason": "No such file or directory"},
    ]


def test_two_processes_can_make_the_same_shard_at_once(small: Path, work: Path, expected: dict[str, str]) -> None:
    """Neither process finishes its shard before the other has started."""
    program = """if True:
        import os, sys, time
        from pathlib import Path
        from fastflower.packing.plan import load_plan
        from fastflower.packing.worker import make_shard

        def meet(function, items):
            for item in items:
                yield function(item)
                (work.parent / f"here-{os.getpid()}").touch()
                while len(list(work.parent.glob("here-*"))) < 2:
                    time.sleep(0.01)

        root, work = Path(sys.argv[1]), Path(sys.argv[2])
        sys.exit(make_shard(load_plan(work, root), work, 0, meet))
    """
    processes = [subprocess.Popen([sys.executable, "-c", program, small, work]) for _ in range(2)]
    assert [process.wait(30) for process in processes] == [9, 9]
    assert checksums(work) == expected


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [Path.unlink, cut, flipped, emptied])
@pytest.mark.parametrize("ending", ["tar", "npz"])
def test_a_damaged_shard_is_made_again(
    small: Path, work: Path, expected: dict[str, str], ending: str, damage: Callable[[Path], object]
) -> None:
    make(small, work)
    damage(work / f"{NAME}.{ending}")
    assert checksums(work) != expected
    make(small, work)
    assert checksums(work) == expected


def test_a_shard_without_dalis_index_is_made_again(small: Path, work: Path, expected: dict[str, str]) -> None:
    make(small, work)
    (work / f"{NAME}.idx").unlink()
    make(small, work)
    assert checksums(work) == expected


def test_a_record_loads_unchanged_or_not_at_all(tmp_path: Path) -> None:
    """Every byte is changed in turn, and the file is truncated at every seventh byte."""
    path = tmp_path / "record.npz"
    rows = np.arange(2 * INDEX_DTYPE.itemsize, dtype=np.uint8).view(INDEX_DTYPE)
    shard = Shard("train-000000.tar", 2, 20480, "0" * 64)
    reason = {"path": "ø/caf\udce9.jpg", "reason": "is not an image"}
    made = MadeShard(shard, rows, np.array([3, 1]), np.array([7, 1 << 63], np.uint64), [reason])
    made.save(path)
    whole = path.read_bytes()

    def same(data: bytes) -> bool:
        path.write_bytes(data)
        try:
            read = MadeShard.load(path)
        except OSError:
            return False
        assert (read.entry, read.skipped) == (made.entry, made.skipped)
        assert [read.rows.tolist(), read.numbers.tolist(), read.hashes.tolist()] == [
            made.rows.tolist(), made.numbers.tolist(), made.hashes.tolist()
        ]  # fmt: skip
        assert (read.rows.dtype, read.numbers.dtype, read.hashes.dtype) == (INDEX_DTYPE, np.int64, np.uint64)
        return True

    assert same(whole)
    for place in range(len(whole)):
        for bits in (0x01, 0x80):
            same(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
        if place % 7 == 0:
            assert not same(whole[:place])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        MadeShard.load(path)


def after(chunks: int, error: BaseException) -> Callable[..., Iterator[Any]]:
    """Return a map that raises an error after some chunks."""

    def mapped(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == chunks:
                raise error
            yield function(item)

    return mapped


@pytest.mark.parametrize("chunks", [0, 1, 8])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_an_error_in_the_middle_of_a_shard_leaves_nothing(
    small: Path, work: Path, expected: dict[str, str], error: BaseException, chunks: int
) -> None:
    before = checksums(work)
    with pytest.raises(type(error)):
        make(small, work, after(chunks, error))
    assert checksums(work) == before
    make(small, work)
    assert checksums(work) == expected


def test_a_stopped_worker_leaves_nothing(small: Path, work: Path, expected: dict[str, str]) -> None:
    before = checksums(work)
    asked: list[int] = []

    def stopped(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            asked.append(number)
            if number == 3:
                (work / STOP).touch()
            yield function(item)

    assert make(small, work, stopped) == 0
    assert asked == [0, 1, 2, 3]
    assert make(small, work, stopped) == 0  # it does not start
    assert asked == [0, 1, 2, 3]
    (work / STOP).unlink()
    assert checksums(work) == before
    make(small, work)
    assert checksums(work) == expected


def test_the_order_in_which_threads_finish_does_not_change_the_bytes(
    small: Path, work: Path, expected: dict[str, str]
) -> None:
    finished: list[int] = []

    def slow(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        def late(numbered: tuple[int, Any]) -> Any:
            number, item = numbered
            time.sleep(0.02 * (9 - number))
            made = function(item)
            finished.append(number)
            return made

        with ThreadPoolExecutor(9) as pool:
            yield from pool.map(late, enumerate(items))

    make(small, work, slow)
    assert finished[0] > finished[-1]
    assert checksums(work) == expected


@pytest.mark.parametrize("chunk_bytes", [1, 3 << 12, 1 << 20, 1 << 40])
def test_the_size_of_chunks_does_not_change_the_bytes(
    small: Path, work: Path, expected: dict[str, str], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    make(small, work)
    assert checksums(work) == expected


def test_chunks_are_small_and_consecutive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file counts its bytes, at least 4 KiB. The file that exceeds the limit starts the next chunk."""
    folder, limit = drawn(tmp_path / "data", a=20, b=20), 1 << 15
    monkeypatch.setattr(module, "_CHUNK_BYTES", limit)
    for number in range(0, 40, 3):
        with (folder / "ab"[number % 2] / f"{number // 2:03d}.jpg").open("ab") as file:
            file.write(bytes(number * 1000))
    plan = planned(folder, tmp_path / "work")
    chunks: list[Any] = []

    def kept(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        chunks.extend(items)
        return map(function, chunks)

    make(folder, tmp_path / "work", kept)
    assert np.concatenate(chunks).tolist() == plan.order.tolist()
    sizes = [np.maximum(plan.folder.files["size"][chunk].astype(int), 1 << 12) for chunk in chunks]
    assert [size.tolist() for size in sizes if size[1:].sum() > limit] == []
    total = sum(size.sum() for size in sizes)
    assert 0.5 * total / limit < len(chunks) <= total / limit + 1


@pytest.mark.parametrize(
    ("name", "reason"), [("a/001.jpg", "is plain text, named .jpg"), ("b/004.jpg", "No such file or directory")]
)
def test_a_bad_image_stops_the_shard_if_on_bad_is_fail(small: Path, tmp_path: Path, name: str, reason: str) -> None:
    for other in {"a/001.jpg", "b/000.jpg", "b/004.jpg"} - {name}:
        (small / other).unlink()
    work = tmp_path / "work"
    planned(small, work, on_bad="fail")
    before = checksums(work)
    text = f"{small / name}: {reason}"
    with pytest.raises(FolderError, match=exactly(text)):
        make(small, work)
    assert checksums(work) == before


def test_the_folder_may_move_after_planning(small: Path, work: Path, expected: dict[str, str]) -> None:
    make(small.rename(small.with_name("moved")), work)
    assert checksums(work) == expected


def test_two_threads_can_make_the_same_shard_at_once(small: Path, work: Path, expected: dict[str, str]) -> None:
    barrier = threading.Barrier(2, timeout=20)

    def meet(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            barrier.wait()
            yield function(item)

    plan = load_plan(work, small)
    with ThreadPoolExecutor(2) as pool:
        making = [pool.submit(make_shard, plan, work, 0, meet) for _ in range(2)]
        assert [future.result() for future in making] == [9, 9]
    assert checksums(work) == expected


def test_only_one_thread_at_a_time_loads_arrays(
    small: Path, work: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11 may raise SystemError if two threads do."""
    load, inside, most = np.load, [0], [0]

    def watched(*args: Any, **options: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.002)
        loaded = load(*args, **options)
        inside[0] -= 1
        return loaded

    monkeypatch.setattr(np, "load", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: make_shard_elsewhere(small, work, 0, bytes([number])), range(8)))
    assert most == [1]
    assert checksums(work) == expected


def test_keys_depend_on_the_whole_path_and_are_readable() -> None:
    several = ("a/x.jpg", "a/x.png", "b/x.jpg", "a_x.jpg", "a/x.JPG", "a/é.jpg", "a/è.jpg")
    assert len({key_of(path) for path in several}) == 7
    assert key_of("rose/red 12.jpg") == f"rose_red_12-{hashlib.sha256(b'rose/red 12.jpg').hexdigest()[:16]}"
    assert len(key_of("c/" + "long" * 100 + "-end.jpg")) + len(".json") <= 100  # what a tar header holds


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(st.binary(max_size=120), unique=True, max_size=8))
def test_keys_are_plain_short_and_unique_for_any_paths(paths: list[bytes]) -> None:
    keys = [key_of(os.fsdecode(path)) for path in paths]
    assert len(set(keys)) == len(keys)
    for path, key in zip(paths, keys, strict=True):
        assert re.fullmatch(r"[0-9A-Za-z_-]{0,64}-[0-9a-f]{16}", key)
        assert key.endswith(hashlib.sha256(path).hexdigest()[:16])
