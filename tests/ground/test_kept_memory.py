"""Memory that is kept: its pages are not cleared anew, it goes back at the end, and what the environment says stays."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet
from training_runs import RECIPE

from fastflower import evaluate, predict, train
from fastflower.models import evaluation, prediction
from fastflower.training import diagnosis, run

BLOCK = 64 << 20  # bytes: twice what glibc never keeps by itself
PROGRAM = f"""
import json, os, resource, torch
from contextlib import suppress
from pathlib import Path
from fastflower.devices import kept_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
found = dict()

def faults(what):
    "Pages that the system had to give for a block that is written and freed, at best of five times."
    def once():
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        b"x" * {BLOCK}
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    found[what] = min(once() for _ in range(5))

def resident(what):
    found[what] = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

faults("before")
with kept_memory(CPU):
    faults("within")
    blocks = [b"x" * {BLOCK} for _ in range(4)]
    resident("held")
    blocks.clear()
    resident("kept")
    with kept_memory(CPU):
        pass
    with suppress(KeyError), kept_memory(CPU):
        raise KeyError
    faults("nested")
resident("given back")
faults("after")
blocks = [b"x" * {BLOCK} for _ in range(4)]
resident("held again")
del blocks[:3]
resident("under another")
with kept_memory(GPU):
    faults("of a GPU")
for setting in ("MALLOC_TRIM_THRESHOLD_=100000", "GLIBC_TUNABLES=glibc.rtld.nns=5:glibc.malloc.mmap_max=10"):
    name, _, value = setting.partition("=")
    os.environ[name] = value
    with kept_memory(CPU):
        faults(setting)
    del os.environ[name]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, int]:
    """In a process of its own: what a heap has free depends on all that was done before."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=plain, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_freed_memory_is_used_again_within(found: dict[str, int]) -> None:
    assert found["before"] >= BLOCK // (2 << 20), "a page has at most 2 MB"
    assert found["within"] < found["before"] / 10
    assert found["kept"] > found["held"] - BLOCK


def test_contexts_nest_and_end_with_the_outermost_one_also_by_an_error(found: dict[str, int]) -> None:
    assert found["nested"] < found["before"] / 10
    assert found["given back"] < found["held"] - 3 * BLOCK
    assert found["after"] > found["before"] / 2
    assert found["under another"] < found["held again"] - 2 * BLOCK


def test_a_gpu_and_what_the_environment_decides_change_nothing(found: dict[str, int]) -> None:
    for what in ("of a GPU", *(name for name in found if "=" in name)):
        assert found[what] > found["before"] / 2
    assert sum("=" in name for name in found) == 2


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

    for module in (run, evaluation, prediction, diagnosis):
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
