"""The parts of gpu_check.py that describe the machine and check that everything works: facts, a smoke test, the tests."""

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import gpu_loading, record
from common.gpu_part import MAGNIFIED, SMALL, Part, Place, check_recorded
from fastflower import Augment, Loader
from fastflower.loading.backends.native import available
from fastflower.machine import cores
from fastflower.recipes.presets import report_a
from fastflower.training.run import Run

RANDOM = Augment(crop=(0.2, 1.0), flip=0.5, rotate=20, brightness=0.3, contrast=0.2, saturation=0.2, hue=0.1, erase=0.3)
_LEVELS = 4.0  # on average: a broken kernel is off by dozens; the tests judge smaller differences
_PYTEST = "pytest.txt"


def facts(part: Part, _: Place, *, copied: int = 4 << 30) -> None:
    """Time one copy or matrix product between two GPU events, in seconds, n times after one that is not counted."""
    part.found["nvjpeg"] = mapped("nvjpeg")
    part.row("libnvjpeg mapped after torchvision", ", ".join(part.found["nvjpeg"]) or "none")
    part.row("native kernel", "available" if available() else "not available: the native backend cannot be timed")
    where = record.hardware(part.device)
    part.row("processor", f"{where['processor']}, {cores()} of {where['cores']} cores")
    shared = os.statvfs("/dev/shm")  # used by DataLoader's workers: the baseline's batches of 256 take 5 GB of it
    part.row("/dev/shm", f"{shared.f_bavail * shared.f_frsize / 1e9:.0f} GB free")
    part.row("Python, torch", f"{platform.python_version()}, {torch.__version__}")
    if part.device.type != "cuda":
        part.skip("copies and products", "needs a GPU")
        return
    part.row("GPU", f"{where['gpu']}; driver, power limit, clock: {where.get('driver_power_clock', 'unknown')}")
    part.each({"copies": partial(_copies, part, copied), "products": partial(_product, part)})


def mapped(name: str) -> list[str]:
    """Return the names of the files mapped by this process that contain `name`."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({Path(line.split()[-1]).name for line in lines if name in Path(line.split()[-1]).name})


def _copies(part: Part, count: int) -> None:
    device, there = part.device, torch.empty(count, dtype=torch.uint8, device=part.device)
    here = torch.empty(count // 4, dtype=torch.uint8, pin_memory=True)
    ways = {
        "device to device, read and written": (2 * count, torch.empty_like(there), there),
        "pinned memory to device": (here.nbytes, there[: here.nbytes], here),
    }
    for name, (moved, target, source) in ways.items():
        rates = _rates(moved, device, lambda target=target, source=source: target.copy_(source, non_blocking=True))
        part.found[f"bytes_per_second: {name}"] = rates
        part.row(f"copy, {name}", f"{rates['median'] / 1e9:.0f} GB/s (min {rates['min'] / 1e9:.0f}, n = {rates['n']})")


def _product(part: Part, side: int = 8192) -> None:
    one, other = (torch.randn(side, side, device=part.device, dtype=torch.bfloat16) for _ in range(2))
    rates = _rates(2 * side**3, part.device, lambda: one @ other)
    part.found["flop_per_second: bfloat16"] = rates
    part.row(f"bfloat16 product of {side} x {side}", f"{rates['median'] / 1e12:.0f} TFLOP/s (n = {rates['n']})")


def _rates(amount: int, device: torch.device, work: Any) -> dict[str, Any]:
    work()
    rates = [amount / gpu_loading.device_seconds(work, device) for _ in range(5)]
    return {**record.spread(rates), "raw": rates}


def smoke(
    part: Part, place: Place, *, count: int = 64, augment: Augment | None = None, training: Augment | None = None
) -> None:
    """Check that the main job works before anything is timed. Compares Triton's images with the native kernel's, and
    two epochs of report A with and without CUDA graphs. Raises RuntimeError if they differ.
    """
    pieces = {
        f"Triton against native, {name}": partial(_same_images, part, place, name, count, augment)
        for name in gpu_loading.STORED
    }
    part.each({**pieces, "two epochs with and without CUDA graphs": partial(_same_losses, part, place, training)})


def _same_images(part: Part, place: Place, name: str, count: int, augment: Augment | None) -> None:
    dtype = gpu_loading.STORED[name]
    options: dict[str, Any] = {"batch_size": count, "augment": augment or RANDOM, "dtype": dtype}
    ours = next(iter(Loader(place.all, backend="triton", device=part.device, **options)))
    # Without AVX2 or kernel.so, OpenCV is the reference.
    theirs = next(iter(Loader(place.all, backend="native" if available() else "opencv", device="cpu", **options)))
    if ours.index.tolist() != theirs.index.tolist():
        raise RuntimeError(f"{name}: the two loaders yielded different samples")
    scale = 1.0 if dtype == torch.uint8 else 255 * 0.225
    differ = (ours.images.float().cpu() - theirs.images.float()).abs() * scale
    part.found[f"levels_apart_{name}"] = {
        "mean": differ.mean().item(),
        "max": differ.max().item(),
        "n": len(ours.index),
    }
    part.row(
        f"Triton against native, {name}", f"{differ.mean():.3f} levels apart on average, n = {len(ours.index)} images"
    )
    if not differ.mean() < _LEVELS:
        raise RuntimeError(
            f"{name}: images differ by {differ.mean():.2f} levels on average; at most {_LEVELS} is allowed"
        )


def _same_losses(part: Part, place: Place, augment: Augment | None) -> None:
    recipe = replace(report_a(), weights=None, augment=augment or report_a().augment)
    if part.device.type == "cpu":
        recipe = replace(recipe, batch_size=8)
    losses: dict[bool, float] = {}
    for graph in (False, True):
        run = Run(place.split, replace(recipe, graph=graph), place.scratch, part.device)
        start = time.perf_counter()
        rows = [run.epoch(epoch)[0] for epoch in range(2)]
        check_recorded(run)
        losses[graph] = statistics.mean(row["train_loss"] for row in rows)
        taken = f"{time.perf_counter() - start:.1f} s, including start-up"
        part.row(f"two epochs, {'with' if graph else 'without'} graphs", f"loss {losses[graph]:.3f}, {taken}")
    part.found["losses"] = {"without graphs": losses[False], "with graphs": losses[True]}
    if not abs(losses[True] / losses[False] - 1) < 0.2:
        raise RuntimeError(f"the losses are {losses[False]:.3f} without graphs and {losses[True]:.3f} with them")


def run_tests(
    part: Part, _: Place, *, folder: Path = record.ROOT / "tests", chosen: str = "gpu", only: str = ""
) -> None:
    """Run the test files with marked tests; others may need packages that the machine lacks. A broken file affects no other."""
    files = [str(path) for path in sorted(folder.rglob("test_*.py")) if f"pytest.mark.{chosen}" in path.read_text()]
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-m",
        "pytest",
        "-vv",
        "-m",
        chosen,
        *(["-k", only] if only else []),
    ]
    command += ["--continue-on-collection-errors", "-W", "default", "-p", "no:cacheprovider", *files]
    part.out.mkdir(parents=True, exist_ok=True)
    path = part.out / _PYTEST  # a file, so that the output survives a timeout
    with path.open("w") as file:
        limit = max(1.0, part.ends - time.perf_counter())
        how: dict[str, Any] = {
            "cwd": folder.parent,
            "env": child_environment(),
            "stdout": file,
            "stderr": subprocess.STDOUT,
        }
        try:
            status: object = subprocess.run(command, timeout=limit, check=False, **how).returncode
        except subprocess.TimeoutExpired:
            status = f"none: timed out after {limit:.0f} s"
    output = path.read_text()
    ends = Counter(re.findall(r"::.* (PASSED|FAILED|SKIPPED|ERROR)\b", output))
    part.found["tests"] = dict(ends)
    counts = ", ".join(f"{count} {word.lower()}" for word, count in sorted(ends.items()))
    part.row(f"tests marked {chosen}{only and f', {only}'}", f"{counts or 'no test ran'}; status {status}")
    if status != 0:
        raise RuntimeError(f"{' '.join(command)}: status {status}\n{output[-60_000:]}")


def child_environment() -> dict[str, str]:
    """Return the environment for child processes, with fastflower on PYTHONPATH."""
    paths = [str(record.ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


TINY: dict[str, dict[str, Any]] = {
    "smoke": {"count": 4, "augment": MAGNIFIED, "training": SMALL},
}
