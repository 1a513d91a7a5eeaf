"""Model soup: the mean of several runs from the same weights, compared with each run alone, and resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import timeless

from fastflower import Augment, Checkpoint, Recipe, Report, evaluate, train
from fastflower.errors import StoppedError
from fastflower.training.run import Run

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

SOUP = Recipe(
    weights=None,
    augment=Augment(size=48, resize=54, crop=(0.25, 1.0), flip=0.5),
    sizes=(32, 48),
    batch_size=30,
    epochs=4,
    soup=2,
    lr=0.001,
    optimizer="adam",
    schedule="one_cycle",
    precision="float32",
)
CPU = torch.device("cpu")


def weights_of(run: Run) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.network.state_dict().items()}


def last(folder: Path) -> Checkpoint:
    return Checkpoint.load(folder / "checkpoint-last.pt")


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return train(shards, SOUP, out=tmp_path_factory.mktemp("runs") / "soup", device="cpu")


@pytest.fixture(scope="module")
def members(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Final weights of each run of the model soup, trained separately."""
    found: list[dict[str, Any]] = []
    for first in (0, 2):
        with torch.random.fork_rng():
            alone = Run(shards, SOUP, tmp_path_factory.mktemp("member"), CPU)
            for epoch in (first, first + 1):
                alone.train_epoch(epoch)
        found.append(weights_of(alone))
    return found


def test_the_saved_weights_are_the_mean_of_runs_from_the_same_weights(
    run: Report, members: list[dict[str, Tensor]]
) -> None:
    kept = last(run.folder)
    assert not torch.equal(members[0]["fc.weight"], members[1]["fc.weight"])
    for name, value in kept.model.items():
        assert torch.equal(kept.trained[name], members[1][name]), name
        if value.is_floating_point():
            mean = (members[0][name].double() + members[1][name].double()) / 2
            assert torch.allclose(value.double(), mean, rtol=1e-6, atol=1e-7), name


def test_each_run_of_a_model_soup_has_the_whole_schedule_and_all_sizes(run: Report) -> None:
    rows = [[row[name] for name in ("size", "lr")] for row in run.history]
    assert [size for size, _ in rows] == [32, 48, 32, 48]
    assert rows[:2] == rows[2:]
    alone = replace(SOUP, soup=1, epochs=2)
    assert [alone.augment_at(epoch) for epoch in (0, 1)] == [SOUP.augment_at(epoch) for epoch in (2, 3)]
    assert rows[1][1] < rows[0][1]  # the last step has the lowest rate


def test_the_validated_weights_are_the_saved_ones(run: Report, shards: Path) -> None:
    assert evaluate(last(run.folder), shards, device="cpu").loss == pytest.approx(run.history[3]["val_loss"], rel=1e-5)
    best = Checkpoint.load(run.checkpoint)
    row = run.history[run.best_epoch - 1]
    assert evaluate(best, shards, device="cpu").loss == pytest.approx(row["val_loss"], rel=1e-5)


def test_the_first_run_of_a_model_soup_equals_a_run_without_soup(run: Report, shards: Path, tmp_path: Path) -> None:
    alone = train(shards, replace(SOUP, soup=1, epochs=2), out=tmp_path / "run", device="cpu")
    assert timeless(alone.history) == timeless(run.history[:2])


@pytest.mark.parametrize("call", [11, *(pytest.param(call, marks=pytest.mark.soak) for call in (2, 12, 20))])
def test_a_stopped_and_resumed_model_soup_equals_an_uninterrupted_one(
    run: Report, shards: Path, tmp_path: Path, call: int
) -> None:
    """Stop after a step, during validation, or after it. Training checks for a stop after every step and at both other places."""
    calls = iter(range(1, 1000))
    with pytest.raises(StoppedError, match="stopped by SIGTERM"), torch.random.fork_rng():
        Run(shards, SOUP, tmp_path, CPU, stop=lambda: next(calls) == call).train()
    resumed = train(shards, SOUP, out=tmp_path, resume=True, device="cpu")
    assert timeless(resumed.history) == timeless(run.history)
    one, other = last(tmp_path), last(run.folder)
    for name in one.model:
        assert torch.equal(one.model[name], other.model[name]), name
        assert torch.equal(one.trained[name], other.trained[name]), name
