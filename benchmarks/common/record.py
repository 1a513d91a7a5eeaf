"""Interleaved timing, its table and its JSON, and a way to silence libraries. benchmarks/README.md has the rules."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import inf, nan
from pathlib import Path
from typing import Any

import torch

from fastflower.devices import environment
from fastflower.machine import version_of

ROOT = Path(__file__).parents[2]


@dataclass
class Side:
    """One side of a comparison. run() does the job once and returns the number of images; timings are in seconds.

    clear() removes the output of a run, off the clock.
    """

    name: str
    run: Callable[[], int]
    clear: Callable[[], object] = lambda: None
    images: int = 0
    seconds: list[float] = field(default_factory=list)
    warm_up_seconds: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [self.images / seconds for seconds in self.seconds]

    def to_dict(self) -> dict[str, Any]:
        # Not asdict, which would deep-copy whatever `run` refers to, even networks.
        names = ("name", "images", "seconds", "warm_up_seconds")
        return {name: getattr(self, name) for name in names}


def interleave(
    sides: Sequence[Side],
    rounds: int,
    device: torch.device,
    *,
    ends: float = inf,
    failed: Callable[[str, Exception], object] | None = None,
    after: Callable[[list[Side]], object] = lambda _: None,
) -> list[Side]:
    """Run each side once uncounted, then `rounds` times in turn to spread drift evenly. Return the sides that ran.

    Args:
        sides: The first is the baseline.
        rounds: Number of counted rounds.
        device: Synchronized before each clock read.
        ends: Deadline in perf_counter time. Starts no round that would pass it if it took as long as the longest one,
            but counts at least one.
        failed: Called with the name and error of a side that raises. The side is dropped, even if it is the baseline.
        after: Called with the remaining sides after each counted round.
    """
    left = list(sides)
    longest = 0.0
    for number in range(rounds + 1):
        begun = time.perf_counter()
        if number > 1 and begun + longest > ends:
            break
        for side in list(left):
            try:
                _wait(device)
                start = time.perf_counter()
                side.images = side.run()
                _wait(device)
                (side.seconds if number else side.warm_up_seconds).append(time.perf_counter() - start)
                side.clear()
            except Exception as error:
                if failed is None:
                    raise
                left.remove(side)
                failed(side.name, error)
        if number:
            longest = max(longest, time.perf_counter() - begun)
            after(left)
    return left


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(side: Side, baseline: Side) -> float:
    """Return the median over rounds of a side's rate relative to the baseline's in that round, or NaN if the baseline failed."""
    if len(baseline.seconds) < len(side.seconds):  # the baseline failed
        return nan
    return statistics.median(mine / theirs for mine, theirs in zip(side.rates, baseline.rates, strict=True))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return n, median, min and max."""
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(side: Side, baseline: Side) -> dict[str, Any]:
    """Return a side's raw timings, its rates and its ratio to the baseline."""
    return {**side.to_dict(), "images_per_second": spread(side.rates), "baseline": baseline.name} | {
        "n": len(side.seconds),
        "ratio": ratio(side, baseline),
    }


def rate(side: Side, baseline: Side | None = None) -> str:
    """Format a side's rates and, with a baseline, its ratio to it."""
    text = f"{statistics.median(side.rates):.0f} images/s ({min(side.rates):.0f} - {max(side.rates):.0f}, n = {len(side.rates)})"
    return text if baseline is None else f"{text}, {ratio(side, baseline):.2f} times the baseline"


def table(title: str, sides: list[Side]) -> str:
    """Format the sides against the first one, with rates in images/s."""
    lines = [
        f"{title} (n = {len(sides[0].seconds)} after one warm-up, {sides[0].images} images per round)",
        f"{'':44}{'images/s':>9}{'min - max':>16}{'s':>8}{'ratio':>7}",
    ]
    for side in sides:
        low, high = min(side.rates), max(side.rates)
        lines.append(
            f"{side.name:44}{statistics.median(side.rates):9.0f}{f'{low:.0f} - {high:.0f}':>16}"
            f"{statistics.median(side.seconds):8.2f}{ratio(side, sides[0]):7.2f}"
        )
    return "\n".join(lines)


def load_or_run(script: str, work: Path, side: str, seed: int, options: list[str]) -> dict[str, Any]:
    """Return the result in WORK/SIDE-SEED.json. If it is missing, run `script ... --only SIDE SEED` in a process of its own."""
    path = work / f"{side}-{seed}.json"
    if not path.exists():
        subprocess.run([sys.executable, script, *options, "--work", str(work), "--only", side, str(seed)], check=True)
    return json.loads(path.read_text())


def save_run(work: Path, found: dict[str, Any], device: torch.device) -> None:
    """Save a result for load_or_run, with its environment: an interrupted comparison may resume on another machine."""
    part = work / "part"
    place = {"commit": COMMIT, "hardware": hardware(device), "versions": environment(device)}
    part.write_text(json.dumps({**found, **place}))
    part.replace(work / f"{found['side']}-{found['seed']}.json")


def result_path(folder: Path, what: str, device: torch.device) -> Path:
    """Return FOLDER/WHAT_DEVICE_YYYYMMDD.json."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return folder / f"{what}_{chip.replace(' ', '-').lower()}_{datetime.now(UTC):%Y%m%d}.json"


def write(folder: Path, what: str, device: torch.device, content: dict[str, Any]) -> Path:
    """Write result_path's file atomically, with everything needed to repeat the run."""
    record = {
        "what": what,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": COMMIT,
        "hardware": hardware(device),
        "versions": {**environment(device), **_library_versions(device)},
        **content,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = result_path(folder, what, device)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return part.replace(path)


@cache
def hardware(device: torch.device) -> dict[str, Any]:
    """Return processor, cores, memory and, for a CUDA device, the GPU. Cached because nvidia-smi is slow."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    found: dict[str, Any] = {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        with suppress(OSError, subprocess.SubprocessError):
            asked = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
            done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10)
            found["driver_power_clock"] = done.stdout.strip()
    return found


def _library_versions(device: torch.device) -> dict[str, str]:
    """Return the versions of libraries other than torch that render and compute."""
    found = {name: version_of(name) for name in ("nvidia-dali-cuda130", "triton")}
    return found | ({"cudnn": str(torch.backends.cudnn.version())} if device.type == "cuda" else {})


def _commit() -> str:
    """Return the checkout's commit, marked if files differ from it, or "unknown" outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


COMMIT = _commit()  # read at the start: the checkout may change while the program runs


def installed(*names: str) -> Iterator[tuple[str, str]]:
    """Yield (name, version) of each distribution that is installed."""
    for name in names:
        with suppress(PackageNotFoundError):
            yield name, version(name)


class silent:
    """Redirects what this process and its children print to /dev/null."""

    def __enter__(self) -> None:
        self._kept = [os.dup(1), os.dup(2)]
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(nowhere, number)
        os.close(nowhere)

    def __exit__(self, *_: object) -> None:
        for number, kept in zip((1, 2), self._kept, strict=True):
            os.dup2(kept, number)
            os.close(kept)
