"""Samples damaged after packing: they stop the epoch with an error that names them, or are replaced with the next one."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packs import flip_a_bit, pack_garbage

from fastflower import Augment, Loader
from fastflower.errors import SampleError, ShardError

RANDOM = Augment(size=64, resize=72, crop=(0.2, 1.0), flip=0.5, rotate=20, brightness=0.3, hue=0.1)
BACKENDS = ["native", "opencv", "dali"]
# soak: like a missing shard, where the loader decides, not the backend
MORE = [(backend, damage) for backend in ("opencv", "dali") for damage in ("truncated", "empty")]


def make(shards: Path, **options: Any) -> Loader:
    return Loader(shards, **{"augment": RANDOM, "batch_size": 16, "device": "cpu", **options})


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    """Shards with one flipped bit in the image of sample 5 of split "train"."""
    folder = Path(shutil.copytree(shards, tmp_path / "damaged"))
    flip_a_bit(folder, "train", 5)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_bit_rot_stops_the_epoch_and_names_the_sample(damaged: Path, backend: Any) -> None:
    loader = make(damaged, backend=backend, shuffle=False)
    key = loader.path_of(5)
    message = rf"train-000000\.tar: sample [0-9A-Za-z_-]+ \({key}\): its bytes have changed.*checksum.*restore"
    for _ in range(2):  # the loader still works after an error
        with pytest.raises(SampleError, match=message):
            list(loader)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_that_do_not_decode_stop_the_epoch_and_name_the_sample(
    shards: Path, tmp_path: Path, backend: Any
) -> None:
    folder = shutil.copytree(shards, tmp_path / "broken")
    pack_garbage(folder)
    loader = make(folder, split="val", backend=backend)
    with pytest.raises(SampleError, match=rf"val-000000\.tar: sample .* \({loader.path_of(3)}\): cannot be decoded"):
        list(loader)


def pixels(loader: Loader) -> tuple[list[int], torch.Tensor, list[int]]:
    batches = list(loader)
    return (
        [i for batch in batches for i in batch.index.tolist()],
        torch.cat([batch.images for batch in batches]),
        [label for batch in batches for label in batch.labels.tolist()],
    )


@pytest.mark.parametrize("cache", [None, "auto"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_sample_is_replaced_with_the_next_one(
    shards: Path, tmp_path: Path, backend: Any, cache: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    bad = {3: 4, 17: 19, 18: 19, 29: 0}  # two in a row, and the last
    for index in bad:
        flip_a_bit(folder, "val", index)
    options = {"split": "val", "batch_size": 7, "backend": backend, "cache": cache}
    _, whole, labels = pixels(make(shards, **options))
    loader = make(folder, on_bad="skip", **options)
    for _ in range(2):
        loader.set_epoch(0)
        with caplog.at_level(logging.WARNING, logger="fastflower"):
            index, images, found = pixels(loader)
        expected = [bad.get(i, i) for i in range(30)]
        assert index == expected
        assert torch.equal(images, whole[expected])
        assert found == [labels[i] for i in expected]
    assert sorted(loader.replaced) == sorted(bad)
    assert loader.stats().replaced == 4
    assert (
        len([record for record in caplog.records if "replaced a damaged sample with the next one: " in record.message])
        == 4
    )
    for i, reason in loader.replaced.items():
        assert f"({make(shards, split='val').path_of(i)}): its bytes have changed" in reason


@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_with_damaged_samples_gives_the_same_batches(shards: Path, tmp_path: Path, backend: Any) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    for index in range(0, 120, 7):
        flip_a_bit(folder, "train", index)
    whole = list(make(folder, backend=backend, on_bad="skip"))
    first = make(folder, backend=backend, on_bad="skip")
    iterator = iter(first)
    next(iterator)
    later = make(folder, backend=backend, on_bad="skip")
    later.load_state_dict(first.state_dict())
    rest = list(later)
    assert all(torch.equal(one.index, other.index) for one, other in zip(rest, whole[1:], strict=True))
    assert all(torch.equal(one.images, other.images) for one, other in zip(rest, whole[1:], strict=True))


@pytest.mark.parametrize(
    ("backend", "damage"),
    [
        pytest.param(backend, damage, marks=[pytest.mark.soak] if (backend, damage) in MORE else [])
        for damage in ("truncated", "empty", "missing")
        for backend in BACKENDS
    ],
)
def test_a_truncated_or_missing_shard_loses_only_its_samples(
    shards: Path, tmp_path: Path, backend: Any, damage: str
) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    tar = folder / "train-000001.tar"
    rows = np.load(folder / "train.index.npy")
    if damage == "missing":
        tar.unlink()
    else:
        content = tar.read_bytes()
        tar.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    kept = tar.stat().st_size if tar.exists() else 0
    lost = set(np.flatnonzero((rows["shard"] == 1) & (rows["offset"] + rows["size"] > kept)).tolist())
    assert lost
    with pytest.raises(ShardError, match=r"train-000001\.tar: (is missing|has \d+ bytes, but the manifest says \d+)"):
        make(folder, backend=backend)
    loader = make(folder, backend=backend, on_bad="skip", tail="keep")
    index, _, _ = pixels(loader)
    assert len(index) == 120
    assert set(index) == set(range(120)) - lost
    assert set(loader.replaced) == lost
    assert all("train-000001.tar: sample " in reason for reason in loader.replaced.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_epoch_stops_if_every_sample_is_damaged(shards: Path, tmp_path: Path, backend: Any) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    for tar in folder.glob("val-*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    loader = make(folder, split="val", backend=backend, on_bad="skip")
    with pytest.raises(SampleError, match=r"val-00000[01]\.tar: sample \d+: its bytes have changed"):
        list(loader)
    assert len(loader.replaced) == 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncating_a_shard_during_an_epoch_stops_the_epoch_not_the_process(
    shards: Path, tmp_path: Path, backend: Any
) -> None:
    folder = shutil.copytree(shards, tmp_path / "truncated")
    loader = make(folder, backend=backend, cache=None)
    assert len(list(loader)) == len(loader)
    for path in folder.glob("train-*.tar"):
        with path.open("r+b") as file:
            file.truncate(5000)
    with pytest.raises(SampleError, match=r"train-00000\d\.tar: sample .*: its bytes have changed"):
        list(loader)
