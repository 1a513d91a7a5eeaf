"""The order of an epoch: a uniform permutation that can be computed in slices and is the same for every world size."""

import tracemalloc
from collections import Counter
from itertools import permutations
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflower.draws.order import MAX_SAMPLES, epoch_order, num_steps, permute, step_positions
from fastflower.errors import ArgumentError

SHUFFLE = settings(deadline=None, max_examples=25, derandomize=True)


def assert_chi_square(counts: list[int], cells: int) -> None:
    """Check that the chi-square of `cells` equally likely outcomes is within five standard deviations of its mean."""
    expected = sum(counts) / cells
    missing = cells - len(counts)
    value = sum((count - expected) ** 2 / expected for count in counts) + missing * expected
    freedom = cells - 1
    assert abs(value - freedom) < 5 * sqrt(2 * freedom), f"chi-square {value:.1f} with {freedom} degrees of freedom"


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 97, 1023, 1024, 1025, 2503, 4095, 65537])
@pytest.mark.parametrize("epoch", [0, 1, 1000])
def test_order_is_a_permutation(num_samples: int, epoch: int) -> None:
    order = epoch_order(num_samples, seed=0, epoch=epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@SHUFFLE
@given(num_samples=st.integers(1, 3000), seed=st.integers(-(2**63), 2**63 - 1), epoch=st.integers(0, 10**6))
def test_order_is_a_permutation_for_any_size_seed_and_epoch(num_samples: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_samples, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@pytest.mark.parametrize("num_samples", [10**10, 2**40 - 1, 2**62 - 1, MAX_SAMPLES])
def test_huge_orders_are_injective_and_stay_in_range(rng: np.random.Generator, num_samples: int) -> None:
    ends = np.concatenate([np.arange(1000), num_samples - 1 - np.arange(1000)])
    positions = np.unique(np.concatenate([ends, rng.integers(0, num_samples, 100_000)]))
    samples = permute(positions, num_samples, seed=0, epoch=0)
    assert len(np.unique(samples)) == len(positions)
    assert samples.min() >= 0
    assert samples.max() < num_samples
    # Neighbors are scattered: half of the positions land in either half of the range.
    assert abs((samples < num_samples // 2).mean() - 0.5) < 0.01


@pytest.mark.parametrize(
    ("num_samples", "epochs"),
    [
        (4, 3000),
        *(pytest.param(*each, marks=pytest.mark.soak) for each in ((3, 3000), (5, 4000))),
        pytest.param(6, 3600, id="all 720 orders of six samples"),
    ],
)
def test_all_orders_are_about_equally_likely(num_samples: int, epochs: int) -> None:
    found = Counter(tuple(epoch_order(num_samples, seed=0, epoch=epoch).tolist()) for epoch in range(epochs))
    possible = set(permutations(range(num_samples)))
    assert set(found) <= possible
    assert_chi_square(list(found.values()), len(possible))


@pytest.mark.parametrize("num_samples", [20, 1000, 10**10])
def test_the_first_sample_of_an_epoch_is_about_uniform(num_samples: int) -> None:
    firsts = [int(permute([0], num_samples, seed=3, epoch=epoch)[0]) for epoch in range(2000)]
    assert_chi_square(list(Counter(first * 20 // num_samples for first in firsts).values()), 20)


def test_orders_differ_by_epoch_and_by_seed() -> None:
    orders = {tuple(epoch_order(50, seed=seed, epoch=epoch).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400
    # Two unrelated orders of 1,000 samples agree in about one position (Poisson), never in more than ten.
    first, others = epoch_order(1000, seed=0, epoch=0), [(0, 1), (1, 0), (1, 1), (2**40, 0), (-1, 0)]
    for seed, epoch in others:
        assert (first == epoch_order(1000, seed=seed, epoch=epoch)).sum() <= 10


def test_orders_equal_the_recorded_ones() -> None:
    assert epoch_order(10, seed=0, epoch=0).tolist() == [5, 8, 2, 3, 1, 4, 6, 7, 9, 0]
    assert epoch_order(10, seed=0, epoch=1).tolist() == [6, 0, 7, 5, 3, 2, 1, 4, 9, 8]
    assert epoch_order(10, seed=1, epoch=0).tolist() == [2, 7, 8, 6, 9, 5, 4, 0, 1, 3]
    assert permute([0, 10**9], 10**10, seed=0, epoch=0).tolist() == [6062355283, 6661562744]


@SHUFFLE
@given(num_samples=st.integers(1, 2000), width=st.integers(1, 300))
def test_slices_of_an_order_equal_the_whole(num_samples: int, width: int) -> None:
    slices = [
        permute(np.arange(start, min(start + width, num_samples)), num_samples, seed=5, epoch=2)
        for start in range(0, num_samples, width)
    ]
    assert np.array_equal(np.concatenate(slices), epoch_order(num_samples, seed=5, epoch=2))


def test_no_positions_give_no_samples() -> None:
    assert permute([], 10, seed=0, epoch=0).shape == (0,)


@SHUFFLE
@given(num_samples=st.integers(1, 400), batch=st.integers(1, 70), drop_tail=st.booleans())
def test_every_world_size_sees_the_same_samples_in_the_same_step(num_samples: int, batch: int, drop_tail: bool) -> None:
    steps = num_steps(num_samples, batch, drop_tail=drop_tail)
    order = epoch_order(num_samples, seed=0, epoch=0)
    seen: list[int] = []
    for step in range(steps):
        expected = order[step * batch : (step + 1) * batch]
        for world_size in (1, 2, 4):
            parts = [
                step_positions(step, num_samples, batch, rank=rank, world_size=world_size) for rank in range(world_size)
            ]
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            samples = [permute(part, num_samples, seed=0, epoch=0) for part in parts]
            assert np.array_equal(np.concatenate(samples), expected)  # each sample once, on one rank
        seen += expected.tolist()
    dropped = num_samples - len(seen)
    assert len(set(seen)) == len(seen)
    assert 0 <= dropped < batch if drop_tail else dropped == 0


def test_the_only_rank_is_the_default() -> None:
    assert step_positions(3, 100, 16).tolist() == list(range(48, 64))
    assert step_positions(6, 100, 16).tolist() == [96, 97, 98, 99]


def test_parts_of_103_over_four_ranks_partition_and_differ_by_at_most_one() -> None:
    parts = [step_positions(0, 103, 103, rank=rank, world_size=4).tolist() for rank in range(4)]
    assert [number for part in parts for number in part] == list(range(103))
    assert sorted(map(len, parts)) == [25, 26, 26, 26]


@SHUFFLE
@given(count=st.integers(0, 10**6), world_size=st.integers(1, 64))
def test_parts_of_any_count_partition_it(count: int, world_size: int) -> None:
    parts = [step_positions(0, count, count, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), np.arange(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("num_samples", "batch", "dropped", "kept"),
    [(100, 25, 4, 4), (101, 25, 4, 5), (99, 25, 3, 4), (1, 25, 0, 1), (25, 1, 25, 25)],
)
def test_steps_count_whole_batches_or_all_batches(num_samples: int, batch: int, dropped: int, kept: int) -> None:
    assert num_steps(num_samples, batch, drop_tail=True) == dropped
    assert num_steps(num_samples, batch, drop_tail=False) == kept


def test_memory_is_that_of_a_batch() -> None:
    num_samples, step = 10**10, 9_000_000
    permute(step_positions(0, num_samples, 1024), num_samples, seed=0, epoch=0)
    tracemalloc.start()
    try:
        samples = permute(step_positions(step, num_samples, 1024, rank=1, world_size=2), num_samples, seed=0, epoch=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(samples) == 512
    assert samples.nbytes < peak < 1e6


@pytest.mark.parametrize("num_samples", [0, -1, MAX_SAMPLES + 1])
def test_a_count_outside_the_range_is_refused(num_samples: int) -> None:
    with pytest.raises(ArgumentError, match=rf"num_samples must be from 1 to 2\*\*62, got {num_samples}\."):
        permute([0], num_samples, seed=0, epoch=0)


@pytest.mark.parametrize(("positions", "range_"), [([10], "10 to 10"), ([3, 10], "3 to 10"), ([-1, 5], "-1 to 5")])
def test_positions_outside_the_epoch_are_refused(positions: list[int], range_: str) -> None:
    with pytest.raises(ArgumentError, match=rf"positions must be from 0 to 9, got {range_}\."):
        permute(positions, 10, seed=0, epoch=0)


@pytest.mark.parametrize(("rank", "world_size"), [(4, 4), (-1, 4), (1, 1)])
def test_a_rank_outside_the_world_is_refused(rank: int, world_size: int) -> None:
    rule = rf"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}\."
    with pytest.raises(ArgumentError, match=rule):
        step_positions(0, 103, 8, rank=rank, world_size=world_size)
