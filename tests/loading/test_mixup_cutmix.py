"""Mixup and cutmix: pairs of the global batch, torchvision's distributions, the same on any number of ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from fastflower import Augment, Loader, Recipe, train
from fastflower.draws.draw import Mix
from fastflower.errors import ArgumentError
from fastflower.loading.batch import Batch, mixed

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

BOTH = Augment(size=32, resize=36, flip=0.5, mixup=0.4, cutmix=1.0)


def ks_2samp(one: Any, other: Any) -> float:
    """Return the p-value of the two-sample Kolmogorov-Smirnov test."""
    found: Any = stats.ks_2samp(one, other)
    return float(found.pvalue)


def make(shards: Path, **options: Any) -> Loader:
    return Loader(shards, **{"augment": BOTH, "batch_size": 24, "device": "cpu", **options})


def test_pairs_are_mixed_as_a_plain_loop_mixes_them() -> None:
    rng = np.random.default_rng(0)
    images = rng.random((6, 3, 10, 12), np.float32)
    labels = np.array([0, 2, 1, 1, 2, 0])
    mix = Mix(
        np.array([0.3, 0.75, 1.0]), np.array([[0, 0, 0, 0], [2, 3, 5, 6], [4, 4, 0, 3]]), np.array([False, True, True])
    )
    expected, shares = images.copy(), np.zeros((6, 3))
    for row in range(6):
        pair, other = row // 2, row ^ 1
        share = mix.share[pair]
        shares[row, labels[row]] += share
        shares[row, labels[other]] += 1 - share
        if mix.cut[pair]:
            top, left, height, width = mix.box[pair]
            inside = (slice(None), slice(top, top + height), slice(left, left + width))
            expected[row][inside] = images[other][inside]
        else:
            expected[row] = share * images[row] + (1 - share) * images[other]
    batch = Batch(torch.from_numpy(images), torch.from_numpy(labels), torch.arange(len(labels)))
    found, found_shares, _ = mixed(batch, mix, 3, torch.clone)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(found_shares.numpy(), shares, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("alpha", "cut"), [(0.2, False), (1.0, False), (1.0, True), (0.5, True)])
def test_shares_follow_torchvisions_distribution(alpha: float, cut: bool) -> None:
    count, size = 4000, 64
    augment = Augment(size=size, cutmix=alpha) if cut else Augment(size=size, mixup=alpha)
    mine = augment.mix(0, 0, np.arange(2 * count))
    assert set(mine.cut.tolist()) == {cut}
    torch.manual_seed(0)
    transform = (v2.CutMix if cut else v2.MixUp)(alpha=alpha, num_classes=2)
    image = torch.zeros(1, 1, size, size)
    theirs = [transform.make_params([image])["lam_adjusted" if cut else "lam"] for _ in range(count)]
    assert ks_2samp(mine.share, theirs) > 1e-3
    if cut:
        assert np.allclose(1 - mine.box[:, 2] * mine.box[:, 3] / size**2, mine.share)
        assert (mine.box >= 0).all()
        assert (mine.box[:, :2] + mine.box[:, 2:] <= size).all()
        assert ks_2samp(mine.box[:, 0], mine.box[:, 1]) > 1e-3


def test_mixup_and_cutmix_together_are_drawn_equally_often() -> None:
    cut = BOTH.mix(1, 2, np.arange(4000)).cut
    assert stats.binomtest(int(cut.sum()), 2000, 0.5).pvalue > 1e-3


def test_a_mix_depends_on_seed_epoch_and_sample_unless_it_is_fixed() -> None:
    def shares(augment: Augment, seed: int, epoch: int, start: int = 0) -> list[float]:
        return augment.mix(seed, epoch, np.arange(start, start + 8)).share.tolist()

    first = shares(BOTH, 0, 0)
    assert first == shares(BOTH, 0, 0)
    assert first[1:] == shares(BOTH, 0, 0, 2)[:3]
    assert first != shares(BOTH, 1, 0)
    assert first != shares(BOTH, 0, 1)
    assert shares(BOTH, -1, 0) != first
    fixed = Augment(size=32, mixup=1.0, fixed=True)
    assert shares(fixed, 0, 0) == shares(fixed, 0, 5)


@pytest.mark.parametrize("backend", ["native", "opencv", "dali"])
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_any_number_of_ranks_mixes_the_same_images(shards: Path, backend: Any, world_size: int) -> None:
    alone = list(make(shards, backend=backend))
    ranks = [
        list(make(shards, backend=backend, batch_size=24 // world_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
        assert whole.labels.shape == (24, 5)
        assert torch.allclose(whole.labels.sum(dim=1), torch.ones(24))


def test_a_mixed_batch_is_made_of_the_unmixed_images(shards: Path) -> None:
    plain = next(iter(make(shards, augment=Augment(size=32, resize=36, flip=0.5))))
    batch = next(iter(make(shards)))
    mix = BOTH.mix(0, 0, plain.index)
    images, labels, _ = mixed(plain, mix, 5, torch.clone)
    assert torch.equal(images, batch.images)
    assert torch.equal(labels, batch.labels)
    assert not torch.equal(plain.images, batch.images)


@pytest.mark.parametrize(
    "options", [{"batch_size": 15}, {"tail": "keep"}, {"dtype": torch.uint8}], ids=["odd", "keep", "uint8"]
)
def test_batches_that_cannot_be_mixed_are_refused(shards: Path, options: dict[str, Any]) -> None:
    with pytest.raises(
        ArgumentError,
        match=r"^augment: mixup and cutmix pair the samples within a batch, .* got \d+, '\w+' and torch\.\w+\.$",
    ):
        make(shards, **options)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_negative_parameter_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^Augment\.{name} must be a number, 0 or more, got -1\.$"):
        Augment(**{name: -1})  # pyright: ignore[reportArgumentType]


def test_training_accepts_mixed_labels(shards: Path, tmp_path: Path) -> None:
    recipe = Recipe(weights=None, augment=BOTH, epochs=1, batch_size=24, lr=0.01)
    report = train(shards, recipe, out=tmp_path / "run", device="cpu")
    assert 0 <= report.history[0]["train_accuracy"] <= 1
    assert np.isfinite(report.history[0]["train_loss"])
