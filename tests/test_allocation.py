"""Memory that is kept: its pages are not cleared anew, it goes back at the end, and what the environment says stays."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet
from training_runs import RECIPE

from fastflower import diagnosis, evaluate, evaluation, predict, prediction, train, training
from fastflower.allocation import kept_memory

CPU = torch.device("cpu")
BLOCK = 64 << 20  # bytes: twice what glibc never keeps by itself


def faults() -> int:
    """Pages that the system had to give for a block that is written and freed, at best of five times."""

    def once() -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        assert len(b"x" * BLOCK) == BLOCK
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    return min(once() for _ in range(5))


def resident() -> int:
    """Bytes of this process that are in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_freed_memory_is_used_again_within_and_goes_back_at_the_end() -> None:
    usual, before = faults(), resident()
    assert usual >= BLOCK // (2 << 20), "a page has at most 2 MB"
    with kept_memory(CPU):
        assert faults() < usual / 10
        assert resident() - before > BLOCK // 2
    assert resident() - before < BLOCK // 2
    assert faults() > usual / 2


def test_contexts_nest_and_end_with_the_outermost_one_also_by_an_error() -> None:
    usual = faults()
    with kept_memory(CPU):
        with pytest.raises(KeyError), kept_memory(CPU):
            raise KeyError
        assert faults() < usual / 10
    assert faults() > usual / 2


def test_a_gpu_changes_nothing() -> None:
    usual = faults()
    with kept_memory(torch.device("cuda", 0)):
        assert faults() > usual / 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "100000"), ("GLIBC_TUNABLES", "glibc.rtld.nns=5:glibc.malloc.mmap_max=10")],
)
def test_what_the_environment_decides_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = faults()
    monkeypatch.setenv(name, value)
    with kept_memory(CPU):
        assert faults() > usual / 2


@pytest.mark.usefixtures("narrow", "no_pictures")
def test_every_pass_of_a_network_keeps_it(
    shards: Path, flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth: list[int] = [0]
    seen: list[int] = []

    @contextmanager
    def noted(_device: torch.device) -> Iterator[None]:
        depth[0] += 1
        yield
        depth[0] -= 1

    for module in (training, evaluation, prediction, diagnosis):
        monkeypatch.setattr(module, "kept_memory", noted)
    forward = ResNet.forward
    monkeypatch.setattr(ResNet, "forward", lambda self, x: seen.append(depth[0]) or forward(self, x))
    for job in (
        lambda: train(shards, RECIPE, out=tmp_path / "run", device="cpu"),
        lambda: evaluate(tmp_path / "run/checkpoint-best.pt", shards, device="cpu"),
        lambda: predict(tmp_path / "run/checkpoint-best.pt", flowers / "rose/0001.jpg", device="cpu"),
        lambda: diagnosis.diagnose(shards, RECIPE, seconds=0.05, device="cpu"),
    ):
        seen.clear()
        job()
        assert seen
        assert all(seen)
        assert depth == [0]
