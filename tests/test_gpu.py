"""What needs CUDA: DALI on the GPU against torchvision, against the CPU, and under the training loop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch

from fastflower import Augment, Loader, Recipe, evaluate, train

pytestmark = pytest.mark.gpu

RANDOM = Augment(crop=(0.2, 1.0), flip=0.5, rotate=20, brightness=0.3, contrast=0.2, saturation=0.2, hue=0.1, erase=0.3)


@pytest.fixture(scope="module")
def encoded(photographs: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in photographs[:128]]


@pytest.mark.parametrize("case", parity.CASES)
def test_dali_on_the_gpu_draws_what_torchvision_draws(case: str, encoded: list[bytes]) -> None:
    found = parity.differences(case, "dali", encoded, device="cuda")
    worst = f"{case}: mean {found.mean():.2f}, worst photograph {found.max():.2f}"
    assert found.mean() <= parity.CASES[case].limit, worst
    assert found.max() <= 12, worst


def test_dali_on_the_gpu_equals_its_cpu_backend(encoded: list[bytes]) -> None:
    gpu, cpu = (parity.render("dali", RANDOM, encoded, device=device) for device in ("cuda", "cpu"))
    assert np.abs(gpu - cpu).mean() < 1


@pytest.mark.parametrize(("executor", "cache"), [("dali", None), ("dali", "auto"), ("opencv", "auto")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_batches_arrive_on_the_gpu(shards: Path, executor: Any, cache: Any, dtype: torch.dtype) -> None:
    loader = Loader(shards, batch_size=16, augment=RANDOM, device="cuda", executor=executor, cache=cache, dtype=dtype)
    plain = Loader(shards, batch_size=16, augment=RANDOM, device="cpu", dtype=dtype)
    for batch, other in zip(loader, plain, strict=True):
        assert batch.images.is_cuda
        assert batch.labels.is_cuda
        assert batch.index.tolist() == other.index.tolist()
        assert batch.images.dtype == dtype
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        scale = 1.0 if dtype == torch.uint8 else 255 * 0.225
        assert (batch.images.float().cpu() - other.images.float()).abs().mean().item() * scale < 2


def test_two_runs_give_the_same_batches_and_kept_batches_stay(shards: Path) -> None:
    """Batches are kept while the pipeline goes on: a buffer used again would show."""
    runs = [list(Loader(shards, batch_size=8, augment=RANDOM, device="cuda")) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.index, other.index)


def test_the_main_job_runs_on_the_gpu(shards: Path, tmp_path: Path) -> None:
    recipe = Recipe(weights=None, augment=replace(RANDOM, size=64, resize=72), epochs=2, batch_size=24, lr=0.01)
    report = train(shards, recipe, out=tmp_path / "run", device="cuda")
    scores = evaluate(report.checkpoint, shards, device="cuda")
    assert scores.accuracy == report.history[report.best_epoch - 1]["val_accuracy"]
    assert evaluate(report.checkpoint, shards, device="cpu").num_samples == 30
