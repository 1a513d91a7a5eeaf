"""Recalibration of batch norm statistics at the end of training, compared with torch's update_bn."""

from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import BEST, LAST, RECIPE, assert_same_run, timeless

from fastflower import Checkpoint, Loader, evaluate, train
from fastflower.errors import StoppedError
from fastflower.loading.batch import Batch
from fastflower.models.backbone import build
from fastflower.models.inference import recalibrate, view_of
from fastflower.training.run import Run

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

ANEW = replace(RECIPE, sizes=(24, 32), recalibrate=True)
CPU = torch.device("cpu")


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.zeros(4, dtype=torch.int64)
    return [Batch(torch.randn((4, 3, 32, 32), generator=generator) + number, labels, labels) for number in range(count)]


def statistics(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.named_buffers() if "running" in name}


def test_recalibrated_statistics_equal_those_of_torchs_update_bn() -> None:
    network = build("resnet18", 5, weights=None, freeze=0)
    expected = deepcopy(network)
    given = batches(3)
    recalibrate(network, given, 0)
    update_bn([batch.images for batch in given], expected)
    found = statistics(network)
    for name, value in statistics(expected).items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name
    momenta = {module.momentum for module in network.modules() if isinstance(module, nn.BatchNorm2d)}
    assert momenta == {0.1}


class Reads(TorchDispatchMode):
    """Counts reads of a tensor's value, which would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_recalibration_reads_nothing_from_the_device() -> None:
    network, given = build("resnet18", 5, weights=None, freeze=0), batches(3)
    with Reads() as reads:
        update_bn([batch.images for batch in given], deepcopy(network))
    assert reads.count > 0, "torch's update_bn reads the counter of each batch norm"
    with Reads() as reads:
        recalibrate(network, given, 0)
    assert reads.count == 0


def test_recalibration_skips_frozen_stages() -> None:
    network = build("resnet18", 5, weights=None, freeze=2)
    before = statistics(network)
    recalibrate(network, batches(2), 2)
    kept = {name for name, value in statistics(network).items() if torch.equal(value, before[name])}
    assert kept == {name for name in before if name.startswith(("bn1", "layer1", "layer2"))}


def test_recalibration_disables_dropout() -> None:
    network = build("resnet18", 5, weights=None, freeze=0)
    other = deepcopy(network)
    other.layer1 = nn.Sequential(nn.Dropout(0.5), *other.layer1)  # pyright: ignore
    for one in (network, other):
        recalibrate(one, batches(2), 0)
    for left, right in zip(statistics(network).values(), statistics(other).values(), strict=True):
        assert torch.equal(left, right)


def test_training_ends_with_the_statistics_of_its_last_weights_on_validation_views(
    shards: Path, tmp_path: Path
) -> None:
    """Recalibration changes nothing else."""
    plain = train(shards, replace(ANEW, recalibrate=False), out=tmp_path / "plain", device="cpu")
    anew = train(shards, ANEW, out=tmp_path / "anew", device="cpu")
    different = {
        name
        for one, other in zip(timeless(plain.history), timeless(anew.history), strict=True)
        for name in one
        if one[name] != other[name]
    }
    assert different == {"val_loss", "val_accuracy"}
    assert timeless(plain.history)[0] == timeless(anew.history)[0]
    left, right = (Checkpoint.load(report.folder / LAST) for report in (plain, anew))
    assert left.feeding == right.feeding
    network = left.network()
    loader = Loader(shards, "train", batch_size=ANEW.batch_size, augment=view_of(ANEW), seed=ANEW.seed, device="cpu")
    loader.set_epoch(ANEW.epochs)
    update_bn([batch.images for batch in islice(loader, 20)], network)
    for name, value in network.state_dict().items():
        exact = "running" not in name
        assert torch.allclose(right.model[name], value, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-5), name
    scores = evaluate(right, shards, device="cpu")
    assert scores.loss == pytest.approx(anew.history[-1]["val_loss"], rel=1e-5)


def test_averaged_weights_get_their_own_statistics(shards: Path, tmp_path: Path) -> None:
    report = train(shards, replace(ANEW, ema=0.9), out=tmp_path / "run", device="cpu")
    kept = Checkpoint.load(report.folder / LAST)
    assert not torch.equal(kept.model["bn1.running_mean"], kept.trained["bn1.running_mean"])
    assert evaluate(kept, shards, device="cpu").loss == pytest.approx(report.history[-1]["val_loss"], rel=1e-5)


@pytest.mark.parametrize("call", [16, *(pytest.param(call, marks=pytest.mark.soak) for call in (13, 20, 21))])
def test_a_stopped_and_resumed_model_soup_with_recalibration_equals_an_uninterrupted_one(
    shards: Path, tmp_path: Path, call: int
) -> None:
    """Stop before, at and after the end of the first run. Training checks for a stop after each of five steps, before each of
    five batches of recalibration and two of validation, and after an epoch."""
    recipe = replace(ANEW, epochs=4, soup=2)
    whole = train(shards, recipe, out=tmp_path / "whole", device="cpu")
    calls = iter(range(1, 1000))
    with pytest.raises(StoppedError, match="stopped by SIGTERM"), torch.random.fork_rng():
        Run(shards, recipe, tmp_path / "run", CPU, stop=lambda: next(calls) == call).train()
    train(shards, recipe, out=tmp_path / "run", resume=True, device="cpu")
    assert (whole.folder / BEST).exists()
    assert_same_run(tmp_path / "run", whole.folder)
