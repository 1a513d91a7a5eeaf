"""Training on CUDA: captured steps, a host that never waits, constant memory, and resuming."""

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import LAST, RECIPE, KilledError, before_call, kill, timeless

from fastflower import Augment, Checkpoint, Recipe, train
from fastflower.loading import cache
from fastflower.training.cuda_graphs import Graphs, Outcome
from fastflower.training.optimizer import plain_state
from fastflower.training.run import Run
from fastflower.training.step import Stepper

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 0.001, "weight_decay": 0.05, "clip_norm": 0.5, "ema": 0.9}
MIXED = Augment(size=32, resize=36, crop=(0.5, 1.0), mixup=0.4)


def network(_backbone: str, classes: int, **_: Any) -> nn.Module:
    """Build a network with batch norms and dropout from layers with deterministic gradients on CUDA."""
    model, features = nn.Sequential(), nn.Sequential()
    for channels_in, channels in ((3, 16), (16, 32)):
        features.extend([nn.Conv2d(channels_in, channels, 3, stride=2), nn.BatchNorm2d(channels), nn.ReLU()])
    features.extend([nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1)])  # to one pixel, a plain mean
    model.add_module("features", features)
    model.add_module("classifier", nn.Sequential(nn.Flatten(), nn.Linear(32, classes)))
    return model


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the same kernels in every run: no benchmarking of convolutions, which may choose differently each time."""
    monkeypatch.setattr("fastflower.models.defaults.build", network)
    monkeypatch.setattr("fastflower.training.run.fastest_convolutions", lambda _: nullcontext())
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each replay of a CUDA graph."""
    found: list[int] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        found.append(id(graph))
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return found


def assert_close(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float) -> None:
    """Compare histories without timings."""
    for row, expected in zip(timeless(one), timeless(other), strict=True):
        assert row == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    ("changes", "graphs"),
    [({}, 1), (ADAMW, 1), ({"sizes": (24, 32)}, 2), ({"augment": MIXED}, 1), ({"precision": "bfloat16"}, 1)],
    ids=["sgd", "adamw, clipped, averaged", "progressive", "mixed images", "bfloat16"],
)
@pytest.mark.usefixtures("repeatable")
def test_a_run_with_cuda_graphs_equals_an_eager_run(
    shards: Path, tmp_path: Path, replays: list[int], changes: dict[str, Any], graphs: int
) -> None:
    """A different dropout mask, or a warm-up that is not undone, would give clearly different results."""
    recipe = replace(RECIPE, **changes)
    kernels = train(shards, replace(recipe, graph=False), out=tmp_path / "kernels", device="cuda")
    assert replays == []
    found = train(shards, recipe, out=tmp_path / "graphs", device="cuda")
    assert (len(replays), len(set(replays))) == (10, graphs)
    assert_close(found.history, kernels.history, 1e-3)
    one, other = (Checkpoint.load(report.folder / LAST) for report in (found, kernels))
    for name, value in one.model.items():
        assert torch.allclose(value, other.model[name], rtol=1e-3, atol=1e-4), name


def test_a_resnet_with_cuda_graphs_learns_like_an_eager_one(shards: Path, tmp_path: Path, replays: list[int]) -> None:
    """Uses bfloat16, benchmarked convolutions, and DALI's threads running during the capture."""
    recipe = replace(RECIPE, augment=Augment(size=64, resize=72, flip=0.5), precision="bfloat16")
    kernels = train(shards, replace(recipe, graph=False), out=tmp_path / "kernels", device="cuda")
    found = train(shards, recipe, out=tmp_path / "graphs", device="cuda")
    assert len(replays) == 10
    for row, expected in zip(found.history, kernels.history, strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=0.1)
    assert not torch.backends.cudnn.benchmark


def state_of(run: Run) -> dict[str, Tensor]:
    """Copy everything that a step changes to the CPU, without optimizer state that is zero."""
    named = {**dict(run.network.named_parameters()), **dict(run.network.named_buffers())}
    for number, state in plain_state(run.optimizer)["state"].items():
        named |= {f"{number} {name}": value for name, value in state.items() if value.any()}
    found = {name: value.detach().cpu().clone() for name, value in named.items()}
    return found | {"random": torch.cuda.get_rng_state(CUDA)}


@pytest.mark.parametrize("updates", [0, 2])
@pytest.mark.parametrize("changes", [{}, ADAMW], ids=["sgd", "adamw"])
def test_a_capture_leaves_everything_unchanged(
    shards: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], updates: int
) -> None:
    """All state of a ResNet-18 is bitwise equal."""
    monkeypatch.setattr("fastflower.training.run.graphs_of", lambda *_: None)
    run = Run(shards, replace(RECIPE, **changes), Path("unused"), CUDA)
    torch.manual_seed(0)
    images = torch.randn(24, 3, 32, 32, device=CUDA).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(24, device=CUDA) % 5
    for _ in range(updates):
        run.step(images, labels)
    graphs = Graphs(CUDA)

    def capture(function: Callable[[], Outcome]) -> Callable[[], Outcome]:
        graphs(function)
        return lambda: (torch.zeros((), device=CUDA), torch.zeros((), device=CUDA, dtype=torch.int64))

    parts = (run.network, run.optimizer, run.scaler, run.recipe, CUDA, torch.float32, capture)
    before = state_of(run)
    Stepper(*parts)(images, labels)
    after = state_of(run)
    assert after.keys() == before.keys()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []
    assert all(parameter.grad is None for parameter in run.network.parameters())


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("changes", [{}, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_never_waits_for_the_device_in_an_epoch(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: bool, changes: dict[str, Any]
) -> None:
    """After decoding and capturing, torch raises an error if any step of an epoch synchronizes."""
    run = Run(shards, replace(RECIPE, graph=graph, **changes), tmp_path, CUDA)
    for epoch in range(2):
        run.train_epoch(epoch)
    step, steps, numbers = run.step, len(run.loader), count(1)

    def watched(*values: Any, **options: Any) -> Any:
        number = next(numbers)
        if number == 1:
            torch.cuda.set_sync_debug_mode("error")
        found = step(*values, **options)
        if number == steps:
            torch.cuda.set_sync_debug_mode("default")
        return found

    monkeypatch.setattr(run, "step", watched)
    try:
        run.train_epoch(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert next(numbers) == steps + 1


def test_memory_does_not_grow_from_epoch_to_epoch(shards: Path, tmp_path: Path) -> None:
    # At 128 pixels all images are decoded at full scale. At smaller sizes, epochs add more decode scales to the cache.
    augment = replace(RECIPE.augment, size=128, resize=146)
    run = Run(shards, replace(RECIPE, augment=augment, epochs=50), tmp_path, CUDA)
    gc.collect()  # cycles left by earlier tests
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(CUDA)
    seen: dict[int, tuple[int, int]] = {}
    for epoch in range(50):
        run.history.append(run.epoch(epoch)[0])
        gc.collect()
        torch.cuda.synchronize(CUDA)
        seen[epoch + 1] = torch.cuda.memory_allocated(CUDA), torch.cuda.max_memory_reserved(CUDA)
    (allocated, reserved), (before, reserved_before) = seen[50], seen[3]
    assert allocated == pytest.approx(before, rel=0.01), seen
    assert reserved <= reserved_before + (24 << 20), seen  # the allocator's segments have 20 MB


def test_steps_are_captured_while_dali_loads(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """DALI's threads may synchronize the device and break a capture; then steps run eagerly."""
    monkeypatch.setattr(cache, "free_bytes", lambda _device: 0)
    with caplog.at_level("INFO", logger="fastflower"):
        report = train(shards, RECIPE, out=tmp_path / "run", device="cuda")
    assert "images are decoded every epoch" in caplog.text
    assert [row["epoch"] for row in report.history] == [1, 2]
    assert all(row["train_loss"] > 0 for row in report.history)


def killed_on(device: str, shards: Path, recipe: Recipe, out: Path, batch: int) -> None:
    """Train or resume on a device until it is killed before this batch."""
    with pytest.MonkeyPatch.context() as patch:
        before_call(Run, "step", batch, kill, patch)
        with pytest.raises(KilledError, match="killed"):
            train(shards, recipe, out=out, resume=True, save_steps=2, device=device)


@pytest.mark.parametrize("changes", [{}, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.usefixtures("repeatable")
def test_a_killed_and_resumed_run_with_cuda_graphs_gives_the_history_of_an_uninterrupted_one(
    shards: Path, tmp_path: Path, replays: list[int], changes: dict[str, Any]
) -> None:
    recipe, out = replace(RECIPE, **changes), tmp_path / "run"
    whole = train(shards, recipe, out=tmp_path / "whole", device="cuda")
    assert len(replays) == 10
    for batch in (4, 6):
        killed_on("cuda", shards, recipe, out, batch)
    resumed = train(shards, recipe, out=out, resume=True, device="cuda")
    assert len(replays) == 10 + 3 + 5 + 3
    assert_close(resumed.history, whole.history, 1e-3)


@pytest.mark.parametrize("changes", [{}, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.usefixtures("repeatable")
def test_a_run_resumes_on_the_cpu_and_again_on_the_gpu(shards: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe, out = replace(RECIPE, **changes), tmp_path / "run"
    killed_on("cuda", shards, recipe, out, 4)
    groups = Checkpoint.load(out / LAST).optimizer["param_groups"]
    assert {type(group["lr"]) for group in groups} == {float}
    killed_on("cpu", shards, recipe, out, 6)
    report = train(shards, recipe, out=out, resume=True, device="cuda")
    assert [row["epoch"] for row in report.history] == [1, 2]
    assert all(row["train_loss"] > 0 for row in report.history)


def test_a_failed_capture_does_not_break_dropout_and_other_captures() -> None:
    ones, zero = torch.ones(64, device=CUDA), torch.zeros((), device=CUDA)

    def synchronizing() -> Outcome:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return zero, zero

    with pytest.raises(RuntimeError):
        Graphs(CUDA)(synchronizing)
    assert nn.functional.dropout(ones, 0.5).sum().item() > 0
    replay = Graphs(CUDA)(lambda: (nn.functional.dropout(ones, 0.5).sum(), zero))
    assert len({replay()[0].item() for _ in range(8)}) > 1, "each replay draws a new mask"
