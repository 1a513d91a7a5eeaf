"""The loader's guarantees: exact epochs, resuming, and the same samples on any number of ranks."""

import pickle
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastflower import Augment, Loader, pack
from fastflower.draws.order import epoch_order
from fastflower.errors import ArgumentError, ShardError
from fastflower.loading.stats import Stats

RANDOM = Augment(size=64, resize=72, crop=(0.2, 1.0), flip=0.5, rotate=20, brightness=0.3, hue=0.1)
BACKENDS = ["native", "opencv", "dali"]
# soak: in these tests the loader decides, not the backend
OPENCV, DALI = (pytest.param(name, marks=pytest.mark.soak) for name in ("opencv", "dali"))


def make(shards: Path, **options: Any) -> Loader:
    return Loader(shards, **{"augment": RANDOM, "batch_size": 16, "device": "cpu", **options})


def indices(loader: Loader) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_what_the_docstring_says(shards: Path, backend: Any) -> None:
    loader = make(shards, backend=backend, dtype=torch.bfloat16)
    images, labels, index = next(iter(loader))
    assert images.shape == (16, 3, 64, 64)
    assert images.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == index.dtype == torch.int64
    classes = loader.manifest.classes
    assert [loader.path_of(i).split("/")[0] for i in index.tolist()] == [classes[label] for label in labels.tolist()]


def test_a_shuffled_epoch_follows_the_order_and_drops_the_tail(shards: Path) -> None:
    loader = make(shards, batch_size=50, seed=3)
    assert len(loader) == 2
    for epoch in range(3):
        assert joined(indices(loader)) == epoch_order(120, seed=3, epoch=epoch)[:100].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [1, 7, 30, 64])
def test_an_ordered_epoch_holds_every_sample_once(shards: Path, backend: Any, batch_size: int) -> None:
    loader = make(shards, split="val", batch_size=batch_size, backend=backend)
    for _ in range(2):
        found = indices(loader)
        assert len(found) == len(loader)
        assert joined(found) == list(range(30))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_looks_the_same_in_any_batch_on_any_rank(shards: Path, backend: Any) -> None:
    whole = {}
    for batch in make(shards, backend=backend, batch_size=24):
        whole |= {int(i): image for i, image in zip(batch.index, batch.images, strict=True)}
    for rank in range(4):
        for batch in make(shards, backend=backend, batch_size=6, rank=rank, world_size=4):
            for i, image in zip(batch.index, batch.images, strict=True):
                assert torch.equal(image, whole[int(i)])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_each_global_batch(shards: Path, world_size: int) -> None:
    alone = indices(make(shards, batch_size=24))
    ranks = [
        indices(make(shards, batch_size=24 // world_size, rank=r, world_size=world_size)) for r in range(world_size)
    ]
    assert [joined(parts) for parts in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 16), (4, 7), (3, 10), (4, 29)])
def test_ranks_evaluate_every_sample_once_and_never_an_empty_batch(
    shards: Path, world_size: int, batch_size: int
) -> None:
    loaders = [
        make(shards, split="val", batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    found = [indices(loader) for loader in loaders]
    assert [len(batches) for batches in found] == [len(loader) for loader in loaders]
    assert all(batch for batches in found for batch in batches)
    assert sorted(i for batches in found for batch in batches for i in batch) == list(range(30))


@pytest.mark.parametrize("backend", ["native", OPENCV, DALI])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 50), (2, 25), (4, 70)])
def test_a_padded_tail_repeats_the_first_samples(shards: Path, backend: Any, world_size: int, batch_size: int) -> None:
    order = epoch_order(120, seed=0, epoch=0)
    ranks = [
        indices(make(shards, batch_size=batch_size, rank=r, world_size=world_size, tail="pad", backend=backend))
        for r in range(world_size)
    ]
    found = joined(joined(parts) for parts in zip(*ranks, strict=True))
    assert {len(batch) for batches in ranks for batch in batches} == {batch_size}
    assert found == np.resize(order, len(found)).tolist()
    assert 120 <= len(found) < 120 + batch_size * world_size


def test_a_kept_tail_makes_a_shuffled_epoch_exact(shards: Path) -> None:
    loader = make(shards, batch_size=50, tail="keep")
    assert [len(batch) for batch in indices(loader)] == [50, 50, 20]
    loader.set_epoch(0)
    assert sorted(joined(indices(loader))) == list(range(120))


def test_stats_add_up_over_epochs(shards: Path) -> None:
    loader = make(shards, cache=None)
    assert loader.stats().verdict == "no batches yet: iterate over the loader first."
    list(loader)
    first = loader.stats()
    assert (first.images, first.replaced) == (112, 0)
    assert min(first.read_seconds, first.decode_seconds, first.augment_seconds, first.wait_seconds) > 0
    for _ in loader:
        time.sleep(0.05)
    second = loader.stats()
    assert second.images == 224
    assert second.consume_seconds - first.consume_seconds >= 7 * 0.05
    assert second.decode_seconds > first.decode_seconds


def test_the_verdict_names_the_bottleneck() -> None:
    spent = {"read_seconds": 1.0, "decode_seconds": 5.0, "augment_seconds": 2.0}
    slow = Stats(images=10, workers=2, replaced=0, wait_seconds=4.0, consume_seconds=4.0, **spent)
    assert slow.verdict.startswith(
        "data loading is the bottleneck: the consumer waited 50% of the time, mostly for decoding; "
    )
    assert str(slow).splitlines()[1] == "decode       5.00 s  500.000 ms per image"
    by_dali = replace(slow, decode_seconds=0.0, augment_seconds=0.0)
    assert by_dali.verdict.startswith(
        "data loading is the bottleneck: the consumer waited 50% of the time; work in DALI or on a GPU is not timed "
    )
    fast = replace(slow, wait_seconds=0.1)
    assert fast.verdict.startswith("the consumer is the bottleneck: it waited for data 2% of the time; ")


def test_the_next_epoch_follows_a_break(shards: Path) -> None:
    loader, whole = make(shards), make(shards)
    epochs = [indices(whole) for _ in range(3)]
    assert [batch.index.tolist() for batch in islice(loader, 2)] == epochs[0][:2]
    assert indices(loader) == epochs[1]
    loader.set_epoch(0)
    assert indices(loader) == epochs[0]


def test_set_epoch_keeps_a_loaded_step_only_in_the_loaded_epoch(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A training loop calls set_epoch for every epoch, also when it resumes in the middle of one."""
    before, whole = make(shards), make(shards)
    epochs = [indices(whole) for _ in range(4)]
    for epoch, steps in ((0, 7), (1, 3)):
        before.set_epoch(epoch)
        for _ in islice(before, steps):
            pass
    state = before.state_dict()
    after, found = make(shards), list[list[list[int]]]()
    after.load_state_dict(state)
    for epoch in (1, 2):
        after.set_epoch(epoch)
        assert epoch == 2 or after.state_dict() == state
        found.append(indices(after))
    assert found == [epochs[1][3:], epochs[2]]
    assert caplog.messages == []
    for step in (3, 0):  # also at the start of the epoch
        after.load_state_dict({**state, "step": step})
        after.set_epoch(3)
        assert indices(after) == epochs[3]
        assert caplog.messages[-1] == (
            f"set_epoch(3): starting at the first step of epoch 3, and not at the loaded position, step {step} of epoch 1; to "
            f"resume there, start the loop over the epochs at state['epoch'], which is 1"
        )


def test_set_epoch_of_a_finished_epoch_yields_nothing_once(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A training loop that saves after the last batch, with its own number of the epoch, does not train the epoch again."""
    before, after, whole = make(shards), make(shards), make(shards)
    epochs = [indices(whole) for _ in range(2)]
    for step, _ in enumerate(before, start=1):
        state = before.state_dict()
        assert (state["epoch"], state["step"]) == ((1, 0) if step == len(before) else (0, step))
    state = before.state_dict()
    caplog.set_level("INFO", "fastflower")
    # The second state is what a run of `train` saves that stops in its validation.
    for saved in (state, {**state, "epoch": 0, "step": len(before)}):
        caplog.clear()
        after.load_state_dict(saved)
        after.set_epoch(0)
        after.set_epoch(0)  # some frameworks call it twice
        iter(after)
        assert pickle.loads(pickle.dumps(after)).state_dict() == after.state_dict() == state
        assert len(after) == len(before)
        assert indices(after) == []
        assert after.state_dict() == state
        (told,) = (message for message in caplog.messages if message.startswith("set_epoch"))
        assert told == "set_epoch(0): the state was saved after epoch 0, so the next loop over it has no batch"
        after.set_epoch(1)
        assert indices(after) == epochs[1]
        after.set_epoch(0)  # without load_state_dict
        assert indices(after) == epochs[0]
        after.load_state_dict(saved)
        after.set_epoch(1)
        assert indices(after) == epochs[1]


@pytest.mark.parametrize("backend", ["native", OPENCV, DALI])
@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(1, 1), (1, 4), (4, 2)])
def test_resume_gives_the_remaining_batches_bit_for_bit(
    shards: Path, backend: Any, ranks_before: int, ranks_after: int
) -> None:
    whole = [batch.images for batch in make(shards, batch_size=24, backend=backend)]
    before = make(shards, batch_size=24 // ranks_before, rank=0, world_size=ranks_before, backend=backend)
    iterator = iter(before)
    next(iterator)
    next(iterator)
    state = before.state_dict()
    rest = []
    for rank in range(ranks_after):
        after = make(shards, batch_size=24 // ranks_after, rank=rank, world_size=ranks_after, backend=backend)
        after.load_state_dict(state)
        rest.append([batch.images for batch in after])
        assert after.state_dict()["epoch"] == 1
    batches = [torch.cat(parts) for parts in zip(*rest, strict=True)]
    assert len(batches) == len(whole) - 2
    assert all(torch.equal(one, other) for one, other in zip(batches, whole[2:], strict=True))


def test_state_is_plain_and_small(shards: Path) -> None:
    loader = make(shards)
    list(islice(loader, 3))
    state = loader.state_dict()
    assert (state["epoch"], state["step"]) == (0, 3)
    assert all(isinstance(value, int | str | bool | None) for value in state.values())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 8}, "global_batch_size"),
        ({"split": "val"}, "shards"),
        ({"shuffle": False}, "shuffle"),
        ({"tail": "pad"}, "tail"),
        ({"window": 2}, "window"),
    ],
)
def test_a_state_of_another_order_is_refused(shards: Path, change: dict[str, Any], name: str) -> None:
    state = make(shards, **change).state_dict()
    with pytest.raises(
        ShardError, match=f"the state has {name} .*; resume with the same shards, split, fold, seed and batch_size"
    ):
        make(shards).load_state_dict(state)


def test_a_state_of_other_shards_is_refused(shards: Path, flowers: Path, tmp_path: Path) -> None:
    pack(flowers, tmp_path / "other", seed=1)
    with pytest.raises(ShardError, match="the state has shards"):
        make(tmp_path / "other").load_state_dict(make(shards).state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_end_with_the_iterator(shards: Path, backend: Any) -> None:
    loader = make(shards, backend=backend)
    for _ in islice(loader, 1):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastflower")]


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"has no manifest\.json, so it is not a finished pack; pass a folder"):
        Loader(tmp_path)


def test_a_batch_in_use_does_not_change(shards: Path) -> None:
    """Memory is reused only when nothing refers to the batch or to a view of it."""
    options: dict[str, Any] = {"batch_size": 16, "augment": RANDOM, "device": "cpu"}
    expected = [batch.images for batch in Loader(shards, **options)]
    loader = Loader(shards, **options)
    views = [batch.images[1, :, ::2].numpy() for batch in loader]  # only these arrays keep the memory alive
    held = [batch for _ in range(2) for batch in loader]
    assert all(np.array_equal(view, images[1, :, ::2].numpy()) for view, images in zip(views, expected, strict=True))
    assert len({batch.images.data_ptr() for batch in held}) == len(held)


def test_memory_of_unused_batches_is_reused(shards: Path) -> None:
    loader = Loader(shards, batch_size=16, augment=RANDOM, device="cpu", workers=1)
    assert len({batch.images.data_ptr() for _ in range(6) for batch in loader}) < 3 * len(loader)


@pytest.mark.dali
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_dali_shares_its_memory_with_torch(
    device: str, dtype: torch.dtype, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointers: list[int] = []
    real = torch.from_dlpack

    def spy(tensor: Any) -> torch.Tensor:
        pointers.append(tensor.data_ptr())
        return real(tensor)

    monkeypatch.setattr(torch, "from_dlpack", spy)
    loader = make(shards, backend="dali", device=device, dtype=dtype)
    assert [batch.images.data_ptr() for batch in loader] == pointers
    assert pointers


def test_the_deprecated_executor_argument_chooses_the_backend(shards: Path) -> None:
    with pytest.warns(FutureWarning, match=r"^Loader\(executor=\) is deprecated; pass backend='opencv'\.$") as told:
        loader = make(shards, executor="opencv")
    assert (len(told), told[0].filename, loader.backend) == (1, __file__, "opencv")
    assert [batch.index.tolist() for batch in pickle.loads(pickle.dumps(loader))] == indices(loader)
    with pytest.raises(
        ArgumentError, match=r"^executor is a deprecated alias for backend; pass only backend='native'\.$"
    ):
        make(shards, executor="opencv", backend="native")
