"""Progressive resizing: the size of each epoch, and changing a loader's augment."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastflower import Augment, Loader, Recipe, pack, train
from fastflower.errors import ArgumentError
from fastflower.models import inference
from fastflower.training.run import Run

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

SMALL = Recipe(
    weights=None,
    augment=Augment(size=48, resize=54, crop=(0.5, 1.0), flip=0.5),
    sizes=(32, 48),
    batch_size=40,
    epochs=4,
    lr=0.01,
    precision="float32",
)
BEFORE = Augment(size=32, resize=36, crop=(0.5, 1.0), flip=0.5, rotate=10, hue=0.1)
AFTER = replace(BEFORE, size=48, resize=54, rotate=0, erase=0.5)
BACKENDS = ["native", "opencv", "dali"]


@pytest.fixture(scope="module")
def small_shards(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of small images that have the same decode scale for every size used here."""
    folder = tmp_path_factory.mktemp("small") / "shards"
    pack(flowers, folder, max_side=96)
    return folder


def test_the_first_half_trains_at_the_small_size_and_validation_uses_the_large_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, ...]] = []
    validated: set[tuple[int, ...]] = set()
    step, outputs = Run.step, inference.log_probabilities

    def spied_step(run: Run, images: Tensor, *args: Any, **options: Any) -> Any:
        trained.append(tuple(images.shape))
        return step(run, images, *args, **options)

    def spied_outputs(network: Any, images: Tensor, *args: Any, **options: Any) -> Tensor:
        validated.add(tuple(images.shape[1:]))
        return outputs(network, images, *args, **options)

    monkeypatch.setattr(Run, "step", spied_step)
    monkeypatch.setattr(inference, "log_probabilities", spied_outputs)
    report = train(shards, SMALL, out=tmp_path / "run", device="cpu")
    assert trained == [(40, 3, 32, 32)] * 6 + [(40, 3, 48, 48)] * 6
    assert validated == {(3, 48, 48)}
    assert [row["size"] for row in report.history] == [32, 32, 48, 48]


def test_a_resumed_run_uses_the_size_of_its_epoch(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(SMALL, epochs=2)
    whole = train(shards, recipe, out=tmp_path / "whole", device="cpu")
    train_epoch = Run.train_epoch

    def killed(run: Run, epoch: int) -> dict[str, float]:
        if epoch == 1:
            raise KeyboardInterrupt("killed")
        return train_epoch(run, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_epoch", killed)
        with pytest.raises(KeyboardInterrupt, match="interrupted by SIGINT after epoch 1, and saved a checkpoint"):
            train(shards, recipe, out=tmp_path / "part", device="cpu")
    rest = train(shards, recipe, out=tmp_path / "part", resume=True, device="cpu")
    assert [row["size"] for row in rest.history] == [32, 48]
    assert [row["train_loss"] for row in rest.history] == [row["train_loss"] for row in whole.history]


def test_without_sizes_every_epoch_uses_the_augments_size(shards: Path, tmp_path: Path) -> None:
    report = train(shards, replace(SMALL, sizes=(), epochs=1), out=tmp_path / "run", device="cpu")
    assert [row["size"] for row in report.history] == [48]


@pytest.mark.parametrize("cache", ["auto", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_after_a_change_of_augment_equal_those_of_a_new_loader(
    small_shards: Path, backend: Any, cache: Any
) -> None:
    options: dict[str, Any] = {"batch_size": 16, "device": "cpu", "backend": backend, "seed": 3, "cache": cache}
    changed, new = Loader(small_shards, augment=BEFORE, **options), Loader(small_shards, augment=AFTER, **options)
    list(changed)
    changed.set_augment(AFTER)
    new.set_epoch(1)
    assert changed.augment == AFTER
    found, expected = list(changed), list(new)
    assert len(found) == len(expected) == 7
    for one, other in zip(found, expected, strict=True):
        assert one.images.shape == (16, 3, 48, 48)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.index, other.index)


# DALI caches nothing; tests/loading/backends/test_triton.py tests the Triton backend.
@pytest.mark.parametrize("backend", ["native", "opencv"])
def test_cached_images_are_not_decoded_again_after_a_change_of_augment(small_shards: Path, backend: Any) -> None:
    loader = Loader(small_shards, augment=BEFORE, batch_size=40, device="cpu", backend=backend, cache="auto")
    list(loader)
    before = loader.stats()
    loader.set_augment(AFTER)
    list(loader)
    after = loader.stats()
    assert before.decode_seconds > 0
    assert after.decode_seconds == before.decode_seconds
    assert after.read_seconds == before.read_seconds
    assert after.images == 240


def test_large_images_are_decoded_once_more_for_the_new_size(shards: Path) -> None:
    """At 32 pixels the decode scale is a quarter or a half; at 48 pixels more images need a half."""
    loader = Loader(shards, augment=Augment(size=32, resize=36), batch_size=40, device="cpu", cache="auto")
    list(loader)
    list(loader)
    loader.set_augment(Augment(size=48, resize=54))
    list(loader)
    before = loader.stats().decode_seconds
    list(loader)
    assert loader.stats().decode_seconds == before


def test_a_change_of_augment_during_an_epoch_applies_to_the_next(small_shards: Path) -> None:
    options: dict[str, Any] = {"batch_size": 8, "device": "cpu", "workers": 1}
    changed, new = Loader(small_shards, augment=BEFORE, **options), Loader(small_shards, augment=BEFORE, **options)
    expected = list(new)
    batches = iter(changed)
    found = list(islice(batches, 3))
    changed.set_augment(AFTER)
    found += list(batches)
    assert len(found) == len(expected)
    assert all(torch.equal(one.images, other.images) for one, other in zip(found, expected, strict=True))
    assert next(iter(changed)).images.shape == (8, 3, 48, 48)


def test_a_refused_change_of_augment_leaves_the_loader_unchanged(small_shards: Path) -> None:
    loader = Loader(small_shards, augment=BEFORE, batch_size=15, device="cpu")
    with pytest.raises(
        ArgumentError, match=r"augment: mixup and cutmix pair the samples within a batch, .* got 15, 'drop'"
    ):
        loader.set_augment(replace(AFTER, mixup=0.2))
    assert loader.augment == BEFORE
    images, labels, _ = next(iter(loader))
    assert images.shape == (15, 3, 32, 32)
    assert labels.shape == (15,)
