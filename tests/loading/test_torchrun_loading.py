"""Epochs under torchrun: ranks take their place from torch.distributed, with an all_reduce in every step."""

import json
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from places import HELPERS
from ranks import ENVIRONMENT
from torchrun_epochs import STOP, Batches, batches_of, make

from fastflower.draws.order import epoch_order

WORLD_SIZES = [2, 4]

Reports = dict[int, list[dict[str, Any]]]
"""Reports of the processes, by world size and rank."""


@pytest.fixture(scope="module")
def reports(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What four ranks and then two wrote; the two also resume where the four stopped."""
    out = tmp_path_factory.mktemp("reports")
    command = [sys.executable, HELPERS / "torchrun_epochs.py", shards, out]
    # The limit only ends a hang; a launch takes seconds.
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {
        world_size: [json.loads((out / f"{rank}_of_{world_size}.json").read_text()) for rank in range(world_size)]
        for world_size in WORLD_SIZES
    }


@pytest.fixture(scope="module")
def alone(shards: Path) -> dict[str, list[Batches]]:
    """The same epochs in this process as the only rank."""
    loaders = {tail: make(shards, "train", 1, tail=tail, rank=0, world_size=1) for tail in ("drop", "pad")}
    found = {tail: [batches_of(loader) for _ in range(2)] for tail, loader in loaders.items()}
    for number in range(2):
        order = epoch_order(120, seed=0, epoch=number).tolist()
        assert samples(found["drop"][number]) == order[:112]
        assert samples(found["pad"][number]) == order + order[:20]
    return found


def joined(parts: Iterable[Batches]) -> Batches:
    """Join the batches of all ranks to global batches. Every rank must have the same number of steps."""
    steps = zip(*parts, strict=True)
    return [(list(chain.from_iterable(index for index, _ in step)), sum(sum_ for _, sum_ in step)) for step in steps]


def samples(epoch: Batches) -> list[int]:
    return list(chain.from_iterable(index for index, _ in epoch))


def epochs(ranks: list[dict[str, Any]], name: str) -> list[Batches]:
    """Return the epochs over all ranks, and check that every rank saw the sum over all ranks in every step."""
    found: list[Batches] = []
    for parts in zip(*(rank[name] for rank in ranks), strict=True):
        found.append(joined(batches_ for batches_, _ in parts))
        for _, sums in parts:
            assert sums == [sum(index) for index, _ in found[-1]]
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("tail", ["drop", "pad"])
def test_the_ranks_share_the_batches_of_one_process(
    reports: Reports, alone: dict[str, list[Batches]], world_size: int, tail: str
) -> None:
    assert epochs(reports[world_size], tail) == alone[tail]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_dropped_tail_gives_no_sample_twice_and_whole_batches_on_every_rank(
    reports: Reports, world_size: int
) -> None:
    for epoch in epochs(reports[world_size], "drop"):
        assert len(epoch) == 4
        assert len(set(samples(epoch))) == len(samples(epoch)) == 112
    lengths = {len(index) for rank in reports[world_size] for part, _ in rank["drop"] for index, _ in part}
    assert lengths == {28 // world_size}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_padded_tail_gives_every_sample_and_whole_batches_on_every_rank(reports: Reports, world_size: int) -> None:
    for epoch in epochs(reports[world_size], "pad"):
        assert len(epoch) == 5
        assert set(samples(epoch)) == set(range(120))
    lengths = {len(index) for rank in reports[world_size] for part, _ in rank["pad"] for index, _ in part}
    assert lengths == {28 // world_size}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_ranks_validate_every_sample_once_and_never_an_empty_batch(reports: Reports, world_size: int) -> None:
    parts: list[Batches] = [rank["val"] for rank in reports[world_size]]
    assert sorted(chain.from_iterable(map(samples, parts))) == list(range(30))
    assert all(index for part in parts for index, _ in part)
    # Two samples are left for the second step, so two of four ranks have one step less.
    assert [len(part) for part in parts] == {2: [2, 2], 4: [1, 2, 1, 2]}[world_size]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_break_on_all_ranks_is_followed_by_a_whole_new_epoch(
    reports: Reports, alone: dict[str, list[Batches]], world_size: int
) -> None:
    begun, whole = epochs(reports[world_size], "broken")
    assert begun == alone["drop"][0][:STOP]
    assert whole == alone["drop"][1]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_has_the_same_state(reports: Reports, world_size: int) -> None:
    state, *others = (rank["state"] for rank in reports[world_size])
    assert (state["epoch"], state["step"]) == (0, STOP)
    assert others == [state] * (world_size - 1)


@pytest.mark.parametrize("way", ["resumed", "set epochs"])
def test_two_processes_resume_what_four_began(reports: Reports, alone: dict[str, list[Batches]], way: str) -> None:
    """Also if they call set_epoch first thing in each epoch."""
    rest, following = epochs(reports[2], way)
    assert rest == alone["drop"][0][STOP:]
    assert following == alone["drop"][1]


def test_validation_without_the_wrapper_waits_for_no_rank(reports: Reports) -> None:
    """DDP's forward broadcasts buffers also in evaluation mode, for which a rank with fewer steps would be missing."""
    steps, seen = zip(*(rank["validated"] for rank in reports[4]), strict=True)
    assert sorted(steps) == [1, 1, 2, 2]
    assert [own for own, _ in seen] == [0, 1, 2, 3]
    assert [broadcast for _, broadcast in seen] == [0, 0, 0, 0]
