"""What the loader promises: exact epochs, resume, the same samples on any number of ranks."""

import gc
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
from fastflower.errors import ArgumentError, DeviceError, ShardError
from fastflower.loading import cache
from fastflower.loading.cache import Allowance, Decoded, PixelCache, allow, available_bytes, decoded_bytes
from fastflower.loading.stats import Stats

RANDOM = Augment(size=64, resize=72, crop=(0.2, 1.0), flip=0.5, rotate=20, brightness=0.3, hue=0.1)
EXECUTORS = ["native", "opencv", "dali"]
OPENCV, DALI = (pytest.param(name, marks=pytest.mark.soak) for name in ("opencv", "dali"))  # where the loader decides


def make(shards: Path, **options: Any) -> Loader:
    return Loader(shards, **{"augment": RANDOM, "batch_size": 16, "device": "cpu", **options})


def indices(loader: Loader) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_batches_are_what_the_docstring_says(shards: Path, executor: Any) -> None:
    loader = make(shards, executor=executor, dtype=torch.bfloat16)
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


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("batch_size", [1, 7, 30, 64])
def test_an_ordered_epoch_holds_every_sample_once(shards: Path, executor: Any, batch_size: int) -> None:
    loader = make(shards, split="val", batch_size=batch_size, executor=executor)
    for _ in range(2):
        found = indices(loader)
        assert len(found) == len(loader)
        assert joined(found) == list(range(30))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_sample_looks_the_same_in_any_batch_on_any_rank(shards: Path, executor: Any) -> None:
    whole = {}
    for batch in make(shards, executor=executor, batch_size=24):
        whole |= {int(i): image for i, image in zip(batch.index, batch.images, strict=True)}
    for rank in range(4):
        for batch in make(shards, executor=executor, batch_size=6, rank=rank, world_size=4):
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


@pytest.mark.parametrize("executor", ["native", OPENCV, DALI])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 50), (2, 25), (4, 70)])
def test_a_padded_tail_is_filled_with_the_first_samples(
    shards: Path, executor: Any, world_size: int, batch_size: int
) -> None:
    order = epoch_order(120, seed=0, epoch=0)
    ranks = [
        indices(make(shards, batch_size=batch_size, rank=r, world_size=world_size, tail="pad", executor=executor))
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
    assert loader.stats().verdict == "nothing was fed yet: iterate first."
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


def test_a_verdict_names_who_waits_and_for_what() -> None:
    spent = {"read_seconds": 1.0, "decode_seconds": 5.0, "augment_seconds": 2.0}
    slow = Stats(images=10, workers=2, replaced=0, wait_seconds=4.0, consume_seconds=4.0, **spent)
    assert slow.verdict.startswith(
        "feeding holds the job back: the consumer waited 50% of the time, most of it for decoding; "
    )
    assert str(slow).splitlines()[1] == "decode       5.00 s  500.000 ms an image"
    by_dali = replace(slow, decode_seconds=0.0, augment_seconds=0.0)
    assert by_dali.verdict.startswith(
        "feeding holds the job back: the consumer waited 50% of the time; what a GPU or DALI does "
    )
    fast = replace(slow, wait_seconds=0.1)
    assert fast.verdict.startswith("the consumer holds the job back: it waited for data 2% of the time; ")


def test_a_break_is_followed_by_the_next_epoch(shards: Path) -> None:
    loader, whole = make(shards), make(shards)
    epochs = [indices(whole) for _ in range(3)]
    assert [batch.index.tolist() for batch in islice(loader, 2)] == epochs[0][:2]
    assert indices(loader) == epochs[1]
    loader.set_epoch(0)
    assert indices(loader) == epochs[0]


def test_set_epoch_after_a_state_keeps_its_place_in_that_epoch_only(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As every loop over epochs asks for, also that of a run that goes on in the middle of one."""
    before, whole = make(shards), make(shards)
    epochs = [indices(whole) for _ in range(3)]
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
    for step in (3, 0):  # also at the beginning of the next epoch
        after.load_state_dict({**state, "step": step})
        after.set_epoch(0)
        assert indices(after) == epochs[0]
        told = f"the loaded position, step {step} of epoch 1, is discarded"
        assert caplog.messages[-1] == f"set_epoch(0): begins at the start of that epoch; {told}"


@pytest.mark.parametrize("executor", ["native", OPENCV, DALI])
@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(1, 1), (1, 4), (4, 2)])
def test_resume_gives_the_remaining_batches_bit_for_bit(
    shards: Path, executor: Any, ranks_before: int, ranks_after: int
) -> None:
    whole = [batch.images for batch in make(shards, batch_size=24, executor=executor)]
    before = make(shards, batch_size=24 // ranks_before, rank=0, world_size=ranks_before, executor=executor)
    iterator = iter(before)
    next(iterator)
    next(iterator)
    state = before.state_dict()
    rest = []
    for rank in range(ranks_after):
        after = make(shards, batch_size=24 // ranks_after, rank=rank, world_size=ranks_after, executor=executor)
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
        ShardError, match=f"the state has {name} .*; resume with the same shards, split, seed and batch_size"
    ):
        make(shards).load_state_dict(state)


def test_a_state_of_other_shards_is_refused(shards: Path, flowers: Path, tmp_path: Path) -> None:
    pack(flowers, tmp_path / "other", seed=1)
    with pytest.raises(ShardError, match="the state has shards"):
        make(tmp_path / "other").load_state_dict(make(shards).state_dict())


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("cache", ["auto", 0, 5_000_000])
def test_pixels_do_not_depend_on_the_cache(shards: Path, cache: Any, executor: Any) -> None:
    if executor == "dali" and cache == 5_000_000:
        pytest.skip("DALI keeps nothing, and refuses to be told so")
    loader, plain = (make(shards, cache=kept, executor=executor) for kept in (cache, None))
    for _ in range(2):
        for one, other in zip(loader, plain, strict=True):
            assert torch.equal(one.images, other.images)


def test_the_cache_keeps_no_more_than_its_limit() -> None:
    decoded: list[int] = []

    def decode(index: int, _reduce: int) -> Any:
        decoded.append(index)
        return np.zeros((10, 10, 3), np.uint8)

    kept = PixelCache(decode, Allowance(torch.device("cpu"), 650))
    for _ in range(3):
        for index in range(4):
            kept(index, 1)
    assert decoded == [0, 1, 2, 3, 2, 3, 2, 3]


def test_auto_caches_only_what_fits() -> None:
    assert available_bytes() > 1 << 20
    cpu = torch.device("cpu")
    small, large = Decoded(1 << 20, 1 << 21), Decoded(1 << 60, 1 << 61)
    assert allow("auto", small, cpu).left == 1 << 21
    assert allow("auto", large, cpu).left == 0
    assert allow(None, small, cpu).left == 0
    assert allow(1 << 10, small, cpu).left == 1 << 10
    with pytest.raises(ArgumentError, match="cache must be 'auto', None or a number of bytes, got 'all'"):
        allow("all", small, cpu)  # pyright: ignore[reportArgumentType]


def test_what_one_loader_may_keep_no_other_counts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that loaders of a process may keep fits what was free, in whatever order they are made and filled."""
    device, total, taken = torch.device("meta"), 1000, 0
    monkeypatch.setattr(cache, "free_bytes", lambda _device: total - taken)
    train = allow("auto", Decoded(450, 600), device)
    assert train.left == 500
    assert allow("auto", Decoded(300, 400), device).left == 0, "of 500 a half, 250"
    val = allow("auto", Decoded(200, 266), device)
    assert val.left == 250
    assert train.take(450)
    taken += 450
    assert not train.take(51)
    assert Allowance.promised(device) == 50 + 250
    third = allow("auto", Decoded(100, 133), device)
    assert third.left == 125, "of 1000 - 450 - 300 a half"
    assert taken + Allowance.promised(device) <= total
    del train, val, third
    assert Allowance.promised(device) == 0
    assert allow("auto", Decoded(200, 266), device).left == 266


def test_a_loader_that_nobody_uses_promises_nothing(
    shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loader = make(shards, cache=None)
    needed = decoded_bytes(loader._samples.sizes, loader.augment, 0).needed
    gc.collect()
    others = Allowance.promised(torch.device("cpu"))
    monkeypatch.setattr(cache, "free_bytes", lambda _device: others + 2 * needed)
    caplog.set_level("INFO", "fastflower")
    for _ in range(3):
        make(shards, cache="auto")
    assert len(caplog.messages) == 3
    assert all("each photograph is decoded once" in line for line in caplog.messages)
    in_use = [make(shards, cache="auto") for _ in range(2)]
    assert len(caplog.messages) == 3 + len(in_use)
    assert "photographs are decoded every epoch" in caplog.messages[-1]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_threads_end_with_the_iterator(shards: Path, executor: Any) -> None:
    loader = make(shards, executor=executor)
    for _ in islice(loader, 1):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastflower")]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ArgumentError, "batch_size must be at least 1, got 0"),
        (
            {"batch_size": 121},
            ArgumentError,
            r"batch_size: 121, of all ranks together, exceeds the 120 samples .* lower it \(--batch-size\)",
        ),
        ({"workers": 0}, ArgumentError, "workers must be at least 1"),
        ({"window": 0}, ArgumentError, "window must be at least 1 shard, got 0"),
        ({"tail": "cut"}, ArgumentError, "tail must be 'drop', 'keep' or 'pad', got 'cut'"),
        ({"on_bad": "ignore"}, ArgumentError, "on_bad must be 'fail' or 'skip', got 'ignore'"),
        ({"dtype": torch.int32}, ArgumentError, "dtype must be one of torch.float32"),
        ({"rank": 0}, ArgumentError, "rank and world_size belong together"),
        ({"rank": 2, "world_size": 2}, ArgumentError, r"rank must lie in 0 \.\. world_size-1 = 1, got 2"),
        ({"executor": "pil"}, ArgumentError, "executor must be one of native, opencv, dali, triton, got 'pil'"),
        ({"split": "test"}, ShardError, "has no samples in split 'test'; it has train, val"),
    ],
)
def test_arguments_outside_their_rule_are_named(
    shards: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(shards, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_a_gpu_is_an_error_with_the_remedy(shards: Path) -> None:
    with pytest.raises(DeviceError, match=r"device='cuda': this machine.*has no CUDA; leave device out to use the CPU"):
        make(shards, device="cuda")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"has no manifest\.json, so it is no finished pack; name a folder"):
        Loader(tmp_path)


def test_a_batch_that_is_held_stays_as_it_is(shards: Path) -> None:
    """Memory is used again only when nobody holds the batch, or anything that looks into it."""
    options: dict[str, Any] = {"batch_size": 16, "augment": RANDOM, "device": "cpu"}
    expected = [batch.images for batch in Loader(shards, **options)]
    loader = Loader(shards, **options)
    views = [batch.images[1, :, ::2].numpy() for batch in loader]  # of memory that only these arrays hold
    held = [batch for _ in range(2) for batch in loader]
    assert all(np.array_equal(view, images[1, :, ::2].numpy()) for view, images in zip(views, expected, strict=True))
    assert len({batch.images.data_ptr() for batch in held}) == len(held)


def test_memory_of_batches_that_nobody_holds_is_used_again(shards: Path) -> None:
    loader = Loader(shards, batch_size=16, augment=RANDOM, device="cpu", workers=1)
    assert len({batch.images.data_ptr() for _ in range(6) for batch in loader}) < 3 * len(loader)


@pytest.mark.dali
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_dali_hands_its_memory_to_torch(
    device: str, dtype: torch.dtype, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointers: list[int] = []
    real = torch.from_dlpack

    def spy(tensor: Any) -> torch.Tensor:
        pointers.append(tensor.data_ptr())
        return real(tensor)

    monkeypatch.setattr(torch, "from_dlpack", spy)
    loader = make(shards, executor="dali", device=device, dtype=dtype)
    assert [batch.images.data_ptr() for batch in loader] == pointers
    assert pointers
