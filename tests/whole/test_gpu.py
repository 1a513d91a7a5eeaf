"""Tests that need CUDA: both GPU backends against torchvision and the CPU, with slow consumers, and in training."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch
from common.gpu_smoke import RANDOM
from packs import pack_garbage

from fastflower import Augment, Loader, Recipe, evaluate, train
from fastflower.errors import SampleError

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def encoded(image_files: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in image_files[:64]]


@pytest.mark.parametrize("name", ["dali", "triton"])
@pytest.mark.parametrize("case", parity.CASES)
def test_a_gpu_renders_like_torchvision(case: str, name: str, encoded: list[bytes]) -> None:
    found = parity.differences(case, name, encoded, device="cuda")
    worst = f"{case}: mean {found.mean():.2f}, worst image {found.max():.2f}"
    assert found.mean() <= parity.CASES[case].limit, worst
    assert found.max() <= 12, worst


@pytest.mark.parametrize("name", ["dali", "triton"])
def test_a_gpu_renders_like_opencv(name: str, encoded: list[bytes]) -> None:
    gpu, cpu = (parity.render(way, RANDOM, encoded, device=where) for way, where in ((name, "cuda"), ("opencv", "cpu")))
    assert np.abs(gpu - cpu).mean() < 2


@pytest.mark.dali
def test_dali_on_the_gpu_equals_its_cpu_backend(encoded: list[bytes]) -> None:
    gpu, cpu = (parity.render("dali", RANDOM, encoded, device=device) for device in ("cuda", "cpu"))
    assert np.abs(gpu - cpu).mean() < 1


@pytest.mark.parametrize("name", ["dali", "triton"])
@pytest.mark.parametrize("augment", [Augment(), Augment(size=150, crop=(0.1, 0.2))], ids=["whole", "a part"])
def test_exif_orientations_are_obeyed_on_a_gpu(name: str, augment: Augment, encoded: list[bytes]) -> None:
    turned = parity.turned(encoded[0])
    ours = parity.render(name, augment, turned, device="cuda")
    theirs = parity.render("opencv", augment, turned)
    assert np.abs(ours - theirs).mean(axis=(1, 2, 3)).max() < 2
    assert np.abs(theirs[0] - theirs[5]).mean() > 10, "a wrong orientation would be noticed"


WAYS = [("dali", None), ("triton", None), ("triton", "auto"), ("triton", 20_000_000), ("opencv", "auto")]


@pytest.mark.parametrize(("backend", "cache"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_batches_arrive_on_the_gpu(shards: Path, backend: Any, cache: Any, dtype: torch.dtype) -> None:
    loader = Loader(shards, batch_size=16, augment=RANDOM, device="cuda", backend=backend, cache=cache, dtype=dtype)
    plain = Loader(shards, batch_size=16, augment=RANDOM, device="cpu", dtype=dtype)
    for _ in range(2):
        for batch, other in zip(loader, plain, strict=True):
            assert batch.images.is_cuda
            assert batch.labels.is_cuda
            assert batch.index.tolist() == other.index.tolist()
            assert batch.images.dtype == dtype
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            scale = 1.0 if dtype == torch.uint8 else 255 * 0.225
            assert (batch.images.float().cpu() - other.images.float()).abs().mean().item() * scale < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # DALI has no bfloat16; it is rounded afterwards
@pytest.mark.parametrize(("backend", "cache"), WAYS)
def test_a_slow_consumer_cannot_corrupt_other_batches(
    shards: Path, backend: Any, cache: Any, dtype: torch.dtype
) -> None:
    """The consumer lags behind, overwrites each batch and frees it, so memory that is reused too early would show."""
    how: dict[str, Any] = {"backend": backend, "cache": cache, "dtype": dtype}
    loader = Loader(shards, batch_size=8, augment=RANDOM, device="cuda", **how)
    expected: list[torch.Tensor] = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        for batch in loader:
            torch.cuda.synchronize()
            expected.append(batch.images.cpu())
    load = torch.randn(4096, 4096, device="cuda")
    found: list[torch.Tensor] = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        for batch in loader:
            for _ in range(10):  # some milliseconds of work, so that the host runs ahead
                load = torch.tanh(load @ load)
            found.append(batch.images.clone())
            batch.images.fill_(float("nan"))
            del batch
    torch.cuda.synchronize()
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["dali", "triton"])
def test_two_loaders_share_a_gpu(shards: Path, backend: Any) -> None:
    def loader(split: str) -> Loader:
        return Loader(shards, split, batch_size=10, augment=RANDOM, device="cuda", backend=backend, tail="drop")

    alone = {split: [batch.images.cpu() for batch in loader(split)] for split in ("train", "val")}
    pairs = zip(loader("train"), loader("val"), strict=False)
    for number, (train_batch, val_batch) in enumerate(pairs):
        assert torch.equal(train_batch.images.cpu(), alone["train"][number])
        assert torch.equal(val_batch.images.cpu(), alone["val"][number])


@pytest.mark.parametrize("backend", ["dali", "triton"])
def test_a_failure_names_its_sample_and_later_loaders_work(shards: Path, tmp_path: Path, backend: Any) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "broken"))
    pack_garbage(folder)
    broken = Loader(folder, "val", batch_size=8, augment=RANDOM, device="cuda", backend=backend)
    for _ in range(3):
        with pytest.raises(
            SampleError, match=rf"val-000000\.tar: sample .* \({broken.path_of(3)}\): cannot be decoded"
        ):
            list(broken)
    assert sum(len(batch.index) for batch in Loader(shards, "val", device="cuda", backend=backend)) == 30


@pytest.mark.parametrize(("backend", "cache"), WAYS)
def test_two_runs_yield_the_same_batches_and_kept_batches_do_not_change(shards: Path, backend: Any, cache: Any) -> None:
    """All batches are kept while the pipeline runs, so a reused buffer would show."""
    options: dict[str, Any] = {"backend": backend, "cache": cache, "device": "cuda", "augment": RANDOM}
    runs = [list(Loader(shards, batch_size=8, **options)) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.index, other.index)


def test_batches_of_threads_are_made_in_pinned_memory(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If they were pinned later, the training thread would copy them once more."""
    copied: list[int] = []
    real = torch.Tensor.pin_memory

    def counting(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_pinned():
            copied.append(tensor.nbytes)
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", counting)
    for batch in Loader(shards, batch_size=16, augment=RANDOM, device="cuda", backend="opencv"):
        assert batch.images.is_cuda
    assert max(copied) <= 16 * 8, "only labels and indices"


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_mixing_does_not_synchronize(shards: Path) -> None:
    augment = replace(RANDOM, mixup=0.2, cutmix=1.0)
    loader, plain = (Loader(shards, batch_size=8, augment=augment, device=device) for device in ("cuda", "cpu"))
    list(loader)  # compiles kernels and decodes images
    loader.set_epoch(0)
    try:
        torch.cuda.set_sync_debug_mode("error")
        batches = list(loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, other in zip(batches, plain, strict=True):
        assert torch.allclose(batch.labels.cpu(), other.labels)
        assert (batch.images.cpu() - other.images).abs().mean().item() * 58 < 2


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_the_main_job_runs_on_the_gpu(shards: Path, tmp_path: Path, precision: Any) -> None:
    small = replace(RANDOM, size=64, resize=72)
    recipe = Recipe(weights=None, augment=small, epochs=2, batch_size=24, lr=0.01, precision=precision)
    report = train(shards, recipe, out=tmp_path / "run", device="cuda")
    scores = evaluate(report.checkpoint, shards, device="cuda")
    # The same images, but in other batches: one prediction of 30 may differ.
    assert abs(scores.accuracy - report.history[report.best_epoch - 1]["val_accuracy"]) < 1.5 / 30
    assert evaluate(report.checkpoint, shards, device="cpu").num_samples == 30
