"""Class-balanced sampling: classes equally often, samples within a class equally often, as a function of position."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastflower import Augment, Loader, Recipe, pack, train
from fastflower.draws.order import balanced
from fastflower.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any)
SMALL: dict[str, Any] = {"augment": Augment(size=16, resize=18), "device": "cpu", "workers": 1}


def epoch_of(counts: list[int], seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the labels of shuffled samples, and the indices of an epoch."""
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    by_class = np.argsort(labels, kind="stable")
    return labels, balanced(np.arange(len(labels)), by_class, counts, seed=seed, epoch=epoch)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(counts=COUNTS, seed=st.integers(0, 99), epoch=st.integers(0, 99))
@example(counts=[1, 40], seed=0, epoch=0)
@example(counts=[0, 3, 0], seed=0, epoch=0)
def test_classes_and_their_samples_are_drawn_equally_often(counts: list[int], seed: int, epoch: int) -> None:
    labels, indices = epoch_of(counts, seed, epoch)
    classes = np.bincount(labels[indices], minlength=len(counts))
    assert (classes[np.array(counts) == 0] == 0).all()
    present = classes[np.array(counts) > 0]
    assert present.max() - present.min() <= 1
    for label in np.flatnonzero(counts):
        seen = np.bincount(indices[labels[indices] == label], minlength=len(labels))[labels == label]
        assert seen.max() - seen.min() <= 1, "a sample repeats only after all others of its class"


@settings(deadline=None, max_examples=100, derandomize=True)
@given(counts=COUNTS, data=st.data())
def test_any_part_of_an_epoch_equals_that_part_of_the_whole(counts: list[int], data: st.DataObject) -> None:
    labels, whole = epoch_of(counts, 3, 5)
    positions = np.array(data.draw(st.lists(st.integers(0, len(labels) - 1), max_size=20)), np.int64)
    by_class = np.argsort(labels, kind="stable")
    assert np.array_equal(balanced(positions, by_class, counts, seed=3, epoch=5), whole[positions])


def test_over_many_epochs_every_sample_is_drawn() -> None:
    """An epoch draws about 16 of the 30 samples of the larger class, different ones every time."""
    seen: Counter[int] = Counter()
    for epoch in range(40):
        _, indices = epoch_of([30, 3], 0, epoch)
        seen.update(indices.tolist())
    assert set(seen) == set(range(33))
    large = sorted(seen.values())[:30]
    assert large[0] > 0.5 * large[-1]


def test_each_pass_over_a_class_has_another_order() -> None:
    labels, indices = epoch_of([4, 400], 0, 0)
    small = indices[labels[indices] == 0]
    orders = {
        tuple(np.argsort([np.flatnonzero(small == sample)[turn] for sample in sorted(set(small))]))
        for turn in range(40)
    }
    assert len(orders) > 8
    labels, indices = epoch_of([50, 50], 0, 0)
    places = [np.searchsorted(np.flatnonzero(labels == label), indices[labels[indices] == label]) for label in (0, 1)]
    assert not np.array_equal(places[0], places[1]), "two classes of the same size have different orders"


def test_epochs_and_seeds_differ_and_classes_are_shuffled() -> None:
    orders = [epoch_of([50, 200, 10], seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(indices.tolist()) for _, indices in orders}) == 3
    labels, indices = orders[0]
    follows = np.bincount(3 * labels[indices][:-1] + labels[indices][1:], minlength=9)
    assert follows.min() > 259 / 9 / 2, "every class follows every class"


@pytest.fixture(scope="module")
def uneven(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty samples of one class, three of another."""
    folder = tmp_path_factory.mktemp("uneven")
    one, other = sorted(entry for entry in flowers.iterdir() if entry.is_dir())[:2]
    for entry, count in ((one, 30), (other, 3)):
        (folder / "data" / entry.name).mkdir(parents=True)
        for path in sorted(entry.iterdir())[:count]:
            (folder / "data" / entry.name / path.name).symlink_to(path)
    pack(folder / "data", folder / "shards", val_fraction=0)
    return folder / "shards"


def test_a_balanced_loader_yields_rare_classes_as_often_and_logs_it(
    uneven: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastflower")
    loader = Loader(uneven, batch_size=11, shuffle="balanced", **SMALL)
    labels = Counter(label for batch in loader for label in batch.labels.tolist())
    assert labels.total() == 33
    assert abs(labels[0] - labels[1]) <= 1
    assert any("drawing all classes equally often; " in line for line in caplog.messages)


def test_balanced_steps_are_the_same_at_any_world_size_and_after_a_resume(uneven: Path) -> None:
    whole = [batch.index.tolist() for batch in Loader(uneven, batch_size=8, shuffle="balanced", **SMALL)]
    ranks = [Loader(uneven, batch_size=4, shuffle="balanced", rank=rank, world_size=2, **SMALL) for rank in (0, 1)]
    parts = [[batch.index.tolist() for batch in loader] for loader in ranks]
    assert [one + other for one, other in zip(*parts, strict=True)] == whole
    ranks[0].load_state_dict({**ranks[0].state_dict(), "epoch": 0, "step": 2})
    assert [batch.index.tolist() for batch in ranks[0]] == parts[0][2:]
    with pytest.raises(Exception, match="the state has shuffle 'balanced', but this loader has True"):
        Loader(uneven, batch_size=8, **SMALL).load_state_dict(
            Loader(uneven, batch_size=8, shuffle="balanced", **SMALL).state_dict()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle": "balanced", "window": 1}, "window must be None with shuffle='balanced', which needs all shards"),
        ({"shuffle": "often"}, "shuffle must be True, False or 'balanced', got 'often'"),
    ],
)
def test_what_cannot_be_balanced_is_refused(options: dict[str, Any], message: str, uneven: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        Loader(uneven, batch_size=4, **options, **SMALL)


def test_a_recipe_may_be_balanced(uneven: Path, tmp_path: Path) -> None:
    recipe = Recipe(weights=None, augment=SMALL["augment"], batch_size=11, epochs=1, balanced=True, precision="float32")
    report = train(uneven, recipe, out=tmp_path / "run", device="cpu")
    assert report.history
