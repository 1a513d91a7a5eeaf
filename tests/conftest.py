"""Drawn flowers, packed shards, and the rule for tests that need a GPU."""

import gc
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

# Triton's kernels run in its interpreter where there is no GPU. It asks for this when it is imported, which torchvision does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import quick_triton
from bad_server import IMPATIENT, BadServer, serving
from places import ROOT
from training_runs import narrow_resnets

from fastflower import pack
from fastflower.reporting import figures
from fastflower.shards.remote import Remote

if os.environ.get("TRITON_INTERPRET") == "1":
    quick_triton.hurry()

# A shell's background jobs ignore SIGINT, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW = (
    "test_torchrun_training.py",
    "test_torchrun_loading.py",
    "test_interrupted_training.py",
    "test_gpu_parts.py",
    "test_loader_ends.py",
    "test_remote.py",
    "test_open_files.py",
    "test_readme.py",
    "test_reports.py",
)
"""They come first: one that is begun last leaves a worker with nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOW)
    lacks = {} if torch.cuda.is_available() else {"gpu": "needs CUDA, and torch finds none on this machine"}
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        lacks["dali"] = "needs DALI, which is not installed"
    for item in items:
        given = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        for name, reason in lacks.items():
            if name in item.keywords or name in [value for value in given if isinstance(value, str)]:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers of so few pixels gain nothing from more; and the last bits of weights depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """The command line turns fastflower's log on; other tests shall not see that."""
    log = logging.getLogger("fastflower")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture(scope="session")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 drawn images, 240 to 500 pixels a side, in five class folders. Not to be written to."""
    folder = tmp_path_factory.mktemp("drawn") / "flowers"
    command = [sys.executable, ROOT / "tools" / "draw_flowers.py", folder, "--per-class", "30"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def image_files(flowers: Path) -> list[Path]:
    """The 150 drawn images, or as many of a folder of real ones where it stands beside the checkout."""
    real = sorted((ROOT.parent / "shared" / "flowers").glob("*/*.jpg"))
    return real[:: len(real) // 150][:150] if len(real) >= 150 else sorted(flowers.glob("*/*.jpg"))


@pytest.fixture(scope="session")
def shards(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn images, packed: 120 to train on, 30 to validate, in several shards. Not to be written to."""
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(flowers, folder, shard_bytes=1 << 20)
    return folder


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    """A server of the packed images, and readers that are impatient with it."""
    for name, value in IMPATIENT.items():
        monkeypatch.setattr(f"fastflower.shards.remote.{name}", value)
    with serving(shards) as server:
        yield server


@pytest.fixture
def source(server: BadServer, tmp_path: Path) -> Remote:
    """Its address, with a cache of the test's own."""
    return Remote(url=server.url, folder=tmp_path / "cache")


@pytest.fixture(scope="module")
def _frozen() -> Iterator[None]:
    """What is frozen stays so until a module ends: searching all objects for garbage takes longer than most tests."""
    yield
    gc.unfreeze()


@pytest.fixture
def nothing_to_collect(_frozen: None) -> None:
    """A child that is forked finds no garbage of tests before, such as pipelines of DALI, whose threads it does not have."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """A module's ResNets have few channels."""
    with pytest.MonkeyPatch.context() as patch:
        narrow_resnets(patch)
        yield


@pytest.fixture(scope="module")
def no_figures() -> Iterator[None]:
    """Reports of runs have empty pictures, whose drawing takes longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "png", lambda _: b"")
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
