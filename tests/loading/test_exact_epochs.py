"""Epochs of any number of samples, ranks and shards are exact, padded or cut as their tail says, wherever they resume.

The loaders are real except for the pixels: there is a manifest and an index on disk, but no image.
"""

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastflower import Augment, Loader, Manifest
from fastflower.loading import loader as loader_file
from fastflower.loading.request import Request
from fastflower.shards.manifest import INDEX_DTYPE, Shard, Split

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)
TAILS = st.sampled_from(["drop", "keep", "pad"])
WINDOWS = st.none() | st.integers(1, 9)
EXAMPLES = settings(deadline=None, max_examples=100, derandomize=True)

Ranks = list[list[list[int]]]
"""Indices of every batch of every rank."""


class NoPixels:
    """Backend that renders nothing."""

    def run(self, requests: Iterable[Request]) -> Generator[tuple[Request, Tensor]]:
        for request in requests:
            yield request, torch.empty(len(request.indices), 0)


@pytest.fixture(scope="module", autouse=True)
def _no_pixels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_file, "create", lambda *_, **__: NoPixels())
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exact")


def written(folder: Path, counts: list[int]) -> Path:
    """Write a manifest and an index for shards with these numbers of samples, without the shards."""
    samples = sum(counts)
    shards = tuple(Shard(f"{number}.tar", count, 512 * (count + 1), "") for number, count in enumerate(counts))
    manifest = Manifest(
        folder=folder, classes=("rose",), splits={"train": Split(samples, (samples,), shards)}, options={}
    )
    rows = np.zeros(samples, INDEX_DTYPE)
    rows["shard"] = np.repeat(np.arange(len(counts)), counts)
    rows["offset"] = 512 * np.concatenate([np.arange(1, count + 1) for count in counts])
    rows["size"], rows["width"], rows["height"] = 512, 40, 40
    np.save(folder / "train.index.npy", rows)
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def make(folder: Path, world_size: int, **options: Any) -> list[Loader]:
    """Return the loaders of all ranks."""
    options |= {"augment": Augment(size=8), "device": "cpu", "cache": None, "on_bad": "skip", "world_size": world_size}
    return [Loader(folder, rank=rank, **options) for rank in range(world_size)]


def batches_of(loaders: list[Loader]) -> Ranks:
    return [[batch.index.tolist() for batch in loader] for loader in loaders]


def joined(ranks: Ranks) -> list[list[int]]:
    """Return the global batches; a rank without a part of the last one has one step less."""
    steps = max(map(len, ranks))
    return [list(chain.from_iterable(rank[step] for rank in ranks if step < len(rank))) for step in range(steps)]


@EXAMPLES
@given(
    counts=COUNTS,
    world_size=st.integers(1, 6),
    batch_size=st.integers(1, 8),
    tail=TAILS,
    shuffle=st.booleans(),
    window=WINDOWS,
    epoch=st.integers(0, 10**6),
)
@example(counts=[2, 0, 3], world_size=4, batch_size=1, tail="keep", shuffle=True, window=None, epoch=0)  # 4 + 1
def test_an_epoch_over_all_ranks_is_exact_padded_or_cut_as_its_tail_says(
    folder: Path,
    counts: list[int],
    world_size: int,
    batch_size: int,
    tail: str,
    shuffle: bool,
    window: int | None,
    epoch: int,
) -> None:
    samples, share = sum(counts), batch_size * world_size
    if tail == "drop" and share > samples:
        tail = "pad"  # dropping would leave no steps, which is an error
    loaders = make(
        written(folder, counts), world_size, batch_size=batch_size, tail=tail, shuffle=shuffle, window=window
    )
    for loader in loaders:
        loader.set_epoch(epoch)
    ranks = batches_of(loaders)
    seen = Counter(index for batches in ranks for batch in batches for index in batch)
    assert [len(batches) for batches in ranks] == [len(loader) for loader in loaders]
    if tail == "keep":
        assert seen == dict.fromkeys(range(samples), 1)
        assert all(batch for batches in ranks for batch in batches)
    else:
        assert {len(batches) for batches in ranks} == {samples // share + (tail == "pad" and samples % share > 0)}
        assert {len(batch) for batches in ranks for batch in batches} == {batch_size}
    if tail == "drop":
        assert set(seen.values()) == {1}
        assert seen.total() == samples - samples % share
    if tail == "pad":
        assert seen.keys() == set(range(samples))
        assert max(seen.values()) - min(seen.values()) <= 1
    if not shuffle:
        assert list(chain.from_iterable(joined(ranks))) == [at % samples for at in range(seen.total())]


@EXAMPLES
@given(
    counts=COUNTS,
    before=st.sampled_from([1, 2, 3, 4]),
    after=st.sampled_from([1, 2, 3, 4]),
    twelfth=st.integers(1, 3),
    tail=TAILS,
    window=WINDOWS,
    epoch=st.integers(0, 99),
    data=st.data(),
)
def test_an_epoch_interrupted_anywhere_resumes_exactly_at_any_world_size(
    folder: Path,
    counts: list[int],
    before: int,
    after: int,
    twelfth: int,
    tail: str,
    window: int | None,
    epoch: int,
    data: st.DataObject,
) -> None:
    share = 12 * twelfth
    if tail == "drop" and share > sum(counts):
        tail = "pad"
    written(folder, counts)

    def loaders(world_size: int) -> list[Loader]:
        return make(folder, world_size, batch_size=share // world_size, tail=tail, window=window)

    (alone,) = loaders(1)
    alone.set_epoch(epoch)
    whole, following = joined(batches_of([alone])), joined(batches_of([alone]))
    begun = loaders(before)
    for loader in begun:
        loader.set_epoch(epoch)
    stop = data.draw(st.integers(0, min(map(len, begun))))  # ranks stop together
    first = [[batch.index.tolist() for batch in islice(loader, stop)] for loader in begun]
    states = [loader.state_dict() for loader in begun]
    assert states == [states[0]] * before
    resumed = loaders(after)
    for loader in resumed:
        loader.load_state_dict(states[-1])
    rest = joined(batches_of(resumed))
    if stop == len(whole):  # the state is at the start of the next epoch
        assert [*joined(first), *rest] == [*whole, *following]
    else:
        assert [*(joined(first) if stop else []), *rest] == whole
        assert joined(batches_of(resumed)) == following


@EXAMPLES
@given(
    counts=COUNTS,
    world_sizes=st.lists(st.sampled_from([1, 2, 3, 6]), min_size=2, max_size=6),
    share=st.integers(1, 3).map(lambda number: number * 6),
    shuffle=st.booleans(),
    epochs=st.integers(1, 4),
    own_counter=st.booleans(),
    data=st.data(),
)
def test_a_loop_with_set_epoch_that_is_killed_anywhere_trains_on_every_sample_once_an_epoch(
    folder: Path,
    counts: list[int],
    world_sizes: list[int],
    share: int,
    shuffle: bool,
    epochs: int,
    own_counter: bool,
    data: st.DataObject,
) -> None:
    """The loop's start is its own number of the epoch, or the state's. Each process has another number of ranks."""
    written(folder, counts)
    seen = [Counter[int]() for _ in range(epochs)]
    state, start, number = None, 0, 0
    for process, world_size in enumerate(world_sizes):
        loaders = make(folder, world_size, batch_size=share // world_size, tail="keep", shuffle=shuffle)
        left = None if process == len(world_sizes) - 1 else data.draw(st.integers(0, 8))
        for loader in loaders if state else ():
            loader.load_state_dict(state or {})
        for epoch in range(start, epochs):
            for loader in loaders:
                loader.set_epoch(epoch)
            for batches in zip_longest(*map(iter, loaders)):
                if left == 0:
                    break
                left = left and left - 1
                seen[epoch].update(index for batch in batches if batch for index in batch.index.tolist())
                state, number = loaders[0].state_dict(), epoch  # rank 0 has every step
            if left == 0:  # killed
                break
            state, number = loaders[0].state_dict(), epoch
        start = number if own_counter or state is None else state["epoch"]
    assert seen == [Counter(range(sum(counts)))] * epochs
