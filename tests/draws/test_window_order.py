"""An order that reads few shards at a time: still exact, and still a function of the position."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflower import Augment, Loader
from fastflower.draws.order import Windows, epoch_order
from fastflower.errors import ArgumentError

LAW = settings(deadline=None, derandomize=True)
COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@LAW
@given(counts=COUNTS, window=st.integers(1, 15), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_an_epoch_is_a_permutation_and_any_slice_of_it_the_same(
    counts: list[int], window: int, seed: int, epoch: int
) -> None:
    windows = Windows(counts, window, seed=seed)
    whole = windows.indices(np.arange(sum(counts)), epoch)
    assert sorted(whole.tolist()) == list(range(sum(counts)))
    some = np.random.default_rng(seed).integers(0, sum(counts), 5)
    assert (
        windows.indices(some, epoch + 1).tolist()
        == Windows(counts, window, seed=seed).indices(some, epoch + 1).tolist()
    )
    assert windows.indices(some, epoch).tolist() == whole[some].tolist()


@LAW
@given(counts=COUNTS, window=st.integers(1, 15), epoch=st.integers(0, 9))
def test_a_shard_is_read_only_within_its_window(counts: list[int], window: int, epoch: int) -> None:
    shard_of = np.repeat(np.arange(len(counts)), counts)
    shards = epoch_order(len(counts), seed=0, epoch=epoch)
    touched = shard_of[Windows(counts, window, seed=0).indices(np.arange(sum(counts)), epoch)]
    start = 0
    for first in range(0, len(counts), window):
        inside = shards[first : first + window]
        size = sum(counts[shard] for shard in inside)
        assert set(touched[start : start + size].tolist()) <= set(inside.tolist())
        start += size


@LAW
@given(counts=COUNTS, window=st.integers(1, 5), shuffle=st.booleans(), data=st.data())
def test_ahead_returns_the_shards_of_this_window_and_the_next(
    counts: list[int], window: int, shuffle: bool, data: st.DataObject
) -> None:
    windows = Windows(counts, window, seed=0, shuffle=shuffle)
    start = data.draw(st.integers(0, sum(counts) - 1))
    positions = np.arange(start, data.draw(st.integers(start + 1, sum(counts))))
    shard_of = np.repeat(np.arange(len(counts)), counts)
    ahead = windows.ahead(positions, 3)
    assert len(set(ahead)) == len(ahead)
    assert set(shard_of[windows.indices(positions, 3)].tolist()) <= set(ahead)
    orders = [epoch_order(len(counts), seed=0, epoch=epoch) if shuffle else np.arange(len(counts)) for epoch in (3, 4)]
    parts = [order[first : first + window] for order in orders for first in range(0, len(counts), window)]
    ends = np.cumsum([sum(counts[shard] for shard in part) for part in parts])
    first, last = np.searchsorted(ends, [positions[0], positions[-1]], "right")
    assert {shard for part in parts[first : last + 2] for shard in part.tolist() if counts[shard]} <= set(ahead)
    assert len(ahead) <= (last + 3 - first) * window


def test_samples_are_mixed_over_the_whole_window() -> None:
    counts = [100] * 8
    order = Windows(counts, 4, seed=0).indices(np.arange(800), 0)
    for batch in order.reshape(-1, 50)[:8]:
        assert len(set((batch // 100).tolist())) == 4
    ranks = np.argsort(order)
    assert abs(np.corrcoef(np.arange(100), ranks[:100])[0, 1]) < 0.3


def test_windows_and_epochs_are_shuffled_differently() -> None:
    counts = [50] * 4
    first = Windows(counts, 2, seed=0).indices(np.arange(200), 0)
    assert not np.array_equal(first % 50, np.roll(first % 50, 100))
    for seed, epoch in ((1, 0), (0, 1)):
        assert not np.array_equal(first, Windows(counts, 2, seed=seed).indices(np.arange(200), epoch))


@pytest.mark.parametrize(
    ("positions", "window", "message"),
    [
        ([0, 10], 1, "positions must be from 0 to 9, got 0 to 10."),
        ([-1], 1, "positions must be from 0 to 9, got -1 to -1."),
        ([0], 0, "window must be at least 1 shard, got 0."),
    ],
)
def test_positions_and_windows_out_of_range_are_refused(positions: list[int], window: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        Windows([4, 6], window, seed=0).indices(positions, 0)


def make(shards: Path, **options: Any) -> Loader:
    return Loader(shards, **{"augment": Augment(size=16, resize=18), "window": 2, "device": "cpu", **options})


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_resume_see_the_same_samples(shards: Path, world_size: int) -> None:
    whole = [batch.index.tolist() for batch in make(shards, batch_size=8, tail="keep")]
    assert sorted(chain.from_iterable(whole)) == list(range(120))
    first = make(shards, batch_size=8, tail="keep")
    iterator = iter(first)
    for _ in range(5):
        next(iterator)
    rest: list[list[list[int]]] = []
    for rank in range(world_size):
        loader = make(shards, batch_size=8 // world_size, tail="keep", rank=rank, world_size=world_size)
        loader.load_state_dict(first.state_dict())
        rest.append([batch.index.tolist() for batch in loader])
    assert [list(chain.from_iterable(parts)) for parts in zip(*rest, strict=True)] == whole[5:]


def test_a_loader_reads_the_shards_of_one_window_at_a_time(shards: Path) -> None:
    loader = make(shards, batch_size=8, window=1)
    rows = np.load(shards / "train.index.npy")
    touched = [rows["shard"][batch.index.numpy()] for batch in loader]
    changes = np.flatnonzero(np.diff(np.concatenate(touched)))
    assert len(changes) == len(loader.manifest.splits["train"].shards) - 1
