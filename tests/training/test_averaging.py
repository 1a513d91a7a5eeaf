"""EMA of weights: compared with torch's AveragedModel, and in validation, checkpoints and resumed runs."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from training_runs import timeless

from fastflower import Augment, Checkpoint, Recipe, Report, evaluate, train
from fastflower.training.averaging import Average
from fastflower.training.run import Run

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

SMALL = Recipe(
    weights=None,
    augment=Augment(size=32, resize=36),
    batch_size=30,
    epochs=2,
    lr=0.02,
    schedule="constant",
    precision="float32",
    ema=0.9,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.999])
def test_an_average_equals_torchs_averaged_model(decay: float) -> None:
    trained = network()
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    ours = Average(trained, decay)

    def mean(average: Tensor, current: Tensor, number: Any) -> Tensor:
        if not average.is_floating_point():
            return current
        updates = int(number) - 1  # the first call copies the initial weights
        kept = min(decay, (1 + updates) / (10 + updates))
        return kept * average + (1 - kept) * current

    theirs = AveragedModel(trained, avg_fn=mean, use_buffers=True)
    theirs.update_parameters(trained)
    for updates in range(30):
        loss = nn.functional.cross_entropy(trained(torch.rand(6, 3, 8, 8)), torch.arange(6) % 5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.update(trained, updates)
        theirs.update_parameters(trained)
    found, expected = ours.network.state_dict(), theirs.module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name
    assert found["1.num_batches_tracked"] == 30
    assert not torch.allclose(found["1.running_mean"], trained.state_dict()["1.running_mean"], atol=1e-5)
    assert not ours.network.training
    assert not any(value.requires_grad for value in ours.network.parameters())


def test_the_average_of_constant_weights_is_constant() -> None:
    trained = network()
    before = deepcopy(trained.state_dict())
    average = Average(trained, 0.99)
    for updates in range(50):
        average.update(trained, updates)
    for name, value in average.network.state_dict().items():
        assert torch.allclose(value, before[name], rtol=1e-6), name


def test_an_update_of_the_average_does_not_change_the_trained_network() -> None:
    trained = network()
    average = Average(trained, 0.5)
    with torch.no_grad():
        for value in trained.parameters():
            value.add_(1)
    before = deepcopy(trained.state_dict())
    average.update(trained, 0)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert all(value.requires_grad for value in trained.parameters())


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return train(shards, SMALL, out=tmp_path_factory.mktemp("runs") / "ema", device="cpu")


def test_the_average_is_validated_and_saved(run: Report, shards: Path) -> None:
    for name, epoch in (("checkpoint-best.pt", run.best_epoch), ("checkpoint-last.pt", 2)):
        checkpoint = Checkpoint.load(run.folder / name)
        row = run.history[epoch - 1]
        assert checkpoint.epoch == epoch
        assert checkpoint.model.keys() == checkpoint.trained.keys()
        assert not torch.equal(checkpoint.model["conv1.weight"], checkpoint.trained["conv1.weight"])
        scores = evaluate(checkpoint, shards, device="cpu")
        assert scores.accuracy == row["val_accuracy"]
        assert scores.loss == pytest.approx(row["val_loss"], rel=1e-5)
        last_weights = evaluate(replace(checkpoint, model=checkpoint.trained), shards, device="cpu")
        assert last_weights.loss != pytest.approx(row["val_loss"], rel=1e-3)


def test_averaging_does_not_change_the_training(run: Report, shards: Path, tmp_path: Path) -> None:
    plain = train(shards, replace(SMALL, ema=None), out=tmp_path / "run", device="cpu")
    assert [row["train_loss"] for row in plain.history] == [row["train_loss"] for row in run.history]
    kept = Checkpoint.load(plain.folder / "checkpoint-last.pt")
    averaged = Checkpoint.load(run.folder / "checkpoint-last.pt")
    assert kept.trained == {}
    assert all(torch.equal(value, averaged.trained[name]) for name, value in kept.model.items())


def test_a_resumed_run_continues_its_average(run: Report, shards: Path, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    class Killed(Run):
        def train_epoch(self, epoch: int) -> dict[str, float]:
            if epoch == 1:
                raise KilledError("killed")
            return super().train_epoch(epoch)

    with pytest.raises(KilledError, match="killed"), torch.random.fork_rng():
        Killed(shards, SMALL, tmp_path, torch.device("cpu")).train()
    resumed = train(shards, SMALL, out=tmp_path, resume=True, device="cpu")
    assert timeless(resumed.history) == timeless(run.history)
    one, other = (Checkpoint.load(folder / "checkpoint-last.pt") for folder in (tmp_path, run.folder))
    assert all(torch.equal(value, other.model[name]) for name, value in one.model.items())
    assert all(torch.equal(value, other.trained[name]) for name, value in one.trained.items())


def test_an_average_counts_updates_not_batches(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven batches per epoch make three updates; the last has one batch."""
    seen: list[int] = []
    monkeypatch.setattr(Average, "update", lambda _self, _network, updates: seen.append(updates))
    train(shards, replace(SMALL, epochs=2, batch_size=16, accumulate=3), out=tmp_path / "run", device="cpu")
    assert seen == list(range(6))
