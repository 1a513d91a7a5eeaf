"""The cache of decoded images: it changes no pixel, and stays within its limit and the free memory."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastflower import Loader
from fastflower.draws.augment import Augment
from fastflower.errors import ArgumentError
from fastflower.loading import cache
from fastflower.loading.batch import Pixels
from fastflower.loading.cache import Allowance, Decoded, PixelCache, allow, available_bytes, decoded_bytes
from fastflower.loading.samples import EncodedFiles, SampleSource

RANDOM = Augment(size=64, resize=72, crop=(0.2, 1.0), flip=0.5, rotate=20, brightness=0.3, hue=0.1)


def make(shards: Path, **options: Any) -> Loader:
    return Loader(shards, **{"augment": RANDOM, "batch_size": 16, "device": "cpu", **options})


@pytest.mark.parametrize("backend", ["native", "opencv", "dali"])
@pytest.mark.parametrize("cache", ["auto", 0, 5_000_000])
def test_pixels_do_not_depend_on_the_cache(shards: Path, cache: Any, backend: Any) -> None:
    if backend == "dali" and cache == 5_000_000:
        pytest.skip("DALI caches nothing, and refuses a number of bytes")
    loader, plain = (make(shards, cache=kept, backend=backend) for kept in (cache, None))
    for _ in range(2):
        for one, other in zip(loader, plain, strict=True):
            assert torch.equal(one.images, other.images)


def test_the_cache_keeps_no_more_than_its_limit() -> None:
    decoded: list[int] = []

    class Samples(SampleSource):
        def decode(self, index: int, decode_scale: int = 1) -> Pixels:
            decoded.append(index)
            return np.zeros((10 // decode_scale, 10 // decode_scale, 3), np.uint8)

    samples = Samples(EncodedFiles([b""] * 4, [(10, 10)] * 4))
    kept = PixelCache(samples, Allowance(torch.device("cpu"), 650))
    for _ in range(3):
        for index in range(4):
            kept.decode(index)
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


def test_loaders_never_overcommit_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budgets of all loaders of a process fit in the free memory, whatever the order of creating and filling them."""
    device, total, taken = torch.device("meta"), 1000, 0
    monkeypatch.setattr(cache, "free_bytes", lambda _device: total - taken)
    train = allow("auto", Decoded(450, 600), device)
    assert train.left == 500
    assert allow("auto", Decoded(300, 400), device).left == 0, "half of the remaining 500 is 250"
    val = allow("auto", Decoded(200, 266), device)
    assert val.left == 250
    assert train.take(450)
    taken += 450
    assert not train.take(51)
    assert Allowance.reserved(device) == 50 + 250
    third = allow("auto", Decoded(100, 133), device)
    assert third.left == 125, "half of 1000 - 450 - 300"
    assert taken + Allowance.reserved(device) <= total
    del train, val, third
    assert Allowance.reserved(device) == 0
    assert allow("auto", Decoded(200, 266), device).left == 266


def test_an_unused_loader_reserves_no_memory(
    shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loader = make(shards, cache=None)
    needed = decoded_bytes(loader._samples.sizes, loader.augment, 0).needed
    gc.collect()
    others = Allowance.reserved(torch.device("cpu"))
    monkeypatch.setattr(cache, "free_bytes", lambda _device: others + 2 * needed)
    caplog.set_level("INFO", "fastflower")
    for _ in range(3):
        make(shards, cache="auto")
    assert len(caplog.messages) == 3
    assert all("each image is decoded once" in line for line in caplog.messages)
    in_use = [make(shards, cache="auto") for _ in range(2)]
    assert len(caplog.messages) == 3 + len(in_use)
    assert "images are decoded every epoch" in caplog.messages[-1]
