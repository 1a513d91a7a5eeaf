"""An order that reads few shards at a time: still exact, still a function of the position."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflower import Augment, Loader
from fastflower.errors import ArgumentError
from fastflower.order import epoch_order, windowed

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@given(counts=COUNTS, window=st.integers(1, 15), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_an_epoch_is_a_permutation_and_any_slice_of_it_the_same(
    counts: list[int], window: int, seed: int, epoch: int
) -> None:
    whole = windowed(np.arange(sum(counts)), counts, window, seed=seed, epoch=epoch)
    assert sorted(whole.tolist()) == list(range(sum(counts)))
    some = np.random.default_rng(seed).integers(0, sum(counts), 5)
    assert windowed(some, counts, window, seed=seed, epoch=epoch).tolist() == whole[some].tolist()


@given(counts=COUNTS, window=st.integers(1, 15), epoch=st.integers(0, 9))
def test_no_shard_is_touched_before_its_window_or_after(counts: list[int], window: int, epoch: int) -> None:
    shard_of = np.repeat(np.arange(len(counts)), counts)
    shards = epoch_order(len(counts), seed=0, epoch=epoch)
    touched = shard_of[windowed(np.arange(sum(counts)), counts, window, seed=0, epoch=epoch)]
    start = 0
    for first in range(0, len(counts), window):
        inside = shards[first : first + window]
        size = sum(counts[shard] for shard in inside)
        assert set(touched[start : start + size].tolist()) <= set(inside.tolist())
        start += size


def test_samples_are_mixed_over_the_whole_window() -> None:
    counts = [100] * 8
    order = windowed(np.arange(800), counts, 4, seed=0, epoch=0)
    for batch in order.reshape(-1, 50)[:8]:
        assert len(set((batch // 100).tolist())) == 4
    ranks = np.argsort(order)
    assert abs(np.corrcoef(np.arange(100), ranks[:100])[0, 1]) < 0.3


def test_windows_and_epochs_are_shuffled_differently() -> None:
    counts = [50] * 4
    first = windowed(np.arange(200), counts, 2, seed=0, epoch=0)
    assert not np.array_equal(first % 50, np.roll(first % 50, 100))
    for change in ({"seed": 1, "epoch": 0}, {"seed": 0, "epoch": 1}):
        assert not np.array_equal(first, windowed(np.arange(200), counts, 2, **change))


@pytest.mark.parametrize(
    ("positions", "window", "message"),
    [
        ([0, 10], 1, "positions must lie in 0 .. 9, got 0 .. 10."),
        ([-1], 1, "positions must lie in 0 .. 9, got -1 .. -1."),
        ([0], 0, "window must be at least 1 shard, got 0."),
    ],
)
def test_what_lies_outside_is_refused(positions: list[int], window: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        windowed(positions, [4, 6], window, seed=0, epoch=0)


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
