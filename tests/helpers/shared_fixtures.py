"""Shared fixtures: drawn flowers, packed shards, a server. Skips tests whose GPU or DALI is missing."""

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

# Without a GPU, run Triton's kernels in its interpreter. Triton reads this on import, and torchvision imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import quick_triton
from bad_server import IMPATIENT, BadServer, serving
from places import ROOT
from training_runs import narrow_resnets, no_drawing

from fastflower import pack
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
    "test_parity.py",
    "test_trainer.py",
    "test_reports.py",
)
"""They come first: one that is begun last leaves a worker with nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOW)
    lacks = {} if torch.cuda.is_available() else {"gpu": "needs CUDA, which torch does not find on this machine"}
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        lacks["dali"] = "needs DALI, which is not installed"
    for item in items:
        given = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        for name, reason in lacks.items():
            if name in item.keywords or name in [value for value in given if isinstance(value, str)]:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: more would not speed up tiny layers, and their number changes the last bits of weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _no_fsync() -> Iterator[None]:
    """Only a power cut loses data without fsync; a kill does not. Tests of when it is called set their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """Restore the log level, which the command line changes."""
    log = logging.getLogger("fastflower")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture(scope="session")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 drawn images with sides of 240 to 500 pixels, in five class folders. Read-only."""
    folder = tmp_path_factory.mktemp("drawn") / "flowers"
    command = [sys.executable, ROOT / "tools" / "draw_flowers.py", folder, "--per-class", "30"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def image_files(flowers: Path) -> list[Path]:
    """The 150 drawn images, or 150 real ones if their folder lies beside the checkout."""
    real = sorted((ROOT.parent / "shared" / "flowers").glob("*/*.jpg"))
    return real[:: len(real) // 150][:150] if len(real) >= 150 else sorted(flowers.glob("*/*.jpg"))


@pytest.fixture(scope="session")
def shards(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn images, packed into several shards: 120 for training, 30 for validation. Read-only."""
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(flowers, folder, shard_bytes=1 << 20)
    return folder


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    """A server of the packed images, with short timeouts for its readers."""
    for name, value in IMPATIENT.items():
        monkeypatch.setattr(f"fastflower.shards.remote.{name}", value)
    with serving(shards) as server:
        yield server


@pytest.fixture
def source(server: BadServer, tmp_path: Path) -> Remote:
    """The server's URL, with a cache folder of the test's own."""
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
    """Give ResNets few channels throughout a module."""
    with pytest.MonkeyPatch.context() as patch:
        narrow_resnets(patch)
        yield


@pytest.fixture(scope="module")
def no_figures() -> Iterator[None]:
    """Write empty figures, because drawing them takes longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        no_drawing(patch)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
