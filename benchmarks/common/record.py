"""Interleaved timing, its table and its JSON, and quiet for what others print: see benchmarks/README.md for the rules."""

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
    """One way of doing the job. run() does it once and returns the number of images; timings are seconds.

    clear() removes what a run left, outside of the clock.
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
        # Not asdict, which would copy what `run` holds, networks too.
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
    """Run every side once uncounted, then `rounds` times in turn, so that drift hits all alike; gives the sides that ran.

    ends  When, of perf_counter, no round may be under way that takes as long as the longest; one is counted all the same.
    failed  is told of a side that raises, which is then left out, also the baseline: ratios to it are no numbers.
    after  is called with the sides after each counted round.
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
    """How many times the baseline's rate: the median over rounds of the ratio within a round; not a number without a baseline."""
    if len(baseline.seconds) < len(side.seconds):  # it failed
        return nan
    return statistics.median(mine / theirs for mine, theirs in zip(side.rates, baseline.rates, strict=True))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """n, median, min and max."""
    return {"n": len(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(side: Side, baseline: Side) -> dict[str, Any]:
    """A side's raw timings and what they come to, beside its baseline."""
    return {**side.to_dict(), "images_per_second": spread(side.rates), "baseline": baseline.name} | {
        "n": len(side.seconds),
        "ratio": ratio(side, baseline),
    }


def rate(side: Side, baseline: Side | None = None) -> str:
    """The same in words."""
    text = f"{statistics.median(side.rates):.0f} images/s ({min(side.rates):.0f} - {max(side.rates):.0f}, n = {len(side.rates)})"
    return text if baseline is None else f"{text}, {ratio(side, baseline):.2f} times"


def table(title: str, sides: list[Side]) -> str:
    """The sides against the first of them, rates in images/s."""
    lines = [
        f"{title} (n = {len(sides[0].seconds)} after one warm-up, {sides[0].images} images a round)",
        f"{'':44}{'images/s':>9}{'min - max':>16}{'s':>8}{'ratio':>7}",
    ]
    for side in sides:
        low, high = min(side.rates), max(side.rates)
        lines.append(
            f"{side.name:44}{statistics.median(side.rates):9.0f}{f'{low:.0f} - {high:.0f}':>16}"
            f"{statistics.median(side.seconds):8.2f}{ratio(side, sides[0]):7.2f}"
        )
    return "\n".join(lines)


def kept(script: str, work: Path, side: str, seed: int, options: list[str]) -> dict[str, Any]:
    """What `script ... --only SIDE SEED` leaves in WORK/SIDE-SEED.json, run in a process of its own unless it lies there."""
    path = work / f"{side}-{seed}.json"
    if not path.exists():
        subprocess.run([sys.executable, script, *options, "--work", str(work), "--only", side, str(seed)], check=True)
    return json.loads(path.read_text())


def keep(work: Path, found: dict[str, Any], device: torch.device) -> None:
    """Leave it there, with what it ran on: a comparison that is stopped may go on on another machine."""
    part = work / "part"
    place = {"commit": COMMIT, "hardware": hardware(device), "versions": environment(device)}
    part.write_text(json.dumps({**found, **place}))
    part.replace(work / f"{found['side']}-{found['seed']}.json")


def result_path(folder: Path, what: str, device: torch.device) -> Path:
    """FOLDER/WHAT_DEVICE_YYYYMMDD.json."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return folder / f"{what}_{chip.replace(' ', '-').lower()}_{datetime.now(UTC):%Y%m%d}.json"


def write(folder: Path, what: str, device: torch.device, content: dict[str, Any]) -> Path:
    """Write that file, seen whole or not at all, with everything needed to run it again."""
    record = {
        "what": what,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": COMMIT,
        "hardware": hardware(device),
        "versions": {**environment(device), **_others(device)},
        **content,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = result_path(folder, what, device)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return part.replace(path)


@cache
def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, and the GPU where one is used; asked once, for nvidia-smi takes its time."""
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


def _others(device: torch.device) -> dict[str, str]:
    """Versions of what renders and computes beside torch."""
    found = {name: version_of(name) for name in ("nvidia-dali-cuda130", "triton")}
    return found | ({"cudnn": str(torch.backends.cudnn.version())} if device.type == "cuda" else {})


def _commit() -> str:
    """The commit of the checkout, marked where files differ from it; "unknown" outside a checkout."""
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


COMMIT = _commit()  # when the program started, not when it ended


def installed(*names: str) -> Iterator[tuple[str, str]]:
    """(name, version) of those distributions that are installed."""
    for name in names:
        with suppress(PackageNotFoundError):
            yield name, version(name)


class silent:
    """Sends what a library and its processes print to /dev/null."""

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
