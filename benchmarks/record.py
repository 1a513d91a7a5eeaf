"""Interleaved timing, the table it prints and the JSON it leaves: see README.md beside this file for the rules."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastflower.checkpoint import environment

ROOT = Path(__file__).parent.parent


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
        return {key: value for key, value in asdict(self).items() if key not in ("run", "clear")}


def interleave(sides: list[Side], rounds: int, device: torch.device) -> None:
    """Run every side once uncounted, then `rounds` times in turn, so that drift hits all alike."""
    for number in range(rounds + 1):
        for side in sides:
            _wait(device)
            start = time.perf_counter()
            side.images = side.run()
            _wait(device)
            (side.seconds if number else side.warm_up_seconds).append(time.perf_counter() - start)
            side.clear()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(side: Side, baseline: Side) -> float:
    """How many times the baseline's rate: the median over rounds of the ratio within a round."""
    return statistics.median(mine / theirs for mine, theirs in zip(side.rates, baseline.rates, strict=True))


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


def keep(work: Path, found: dict[str, Any]) -> None:
    """Leave it there."""
    part = work / "part"
    part.write_text(json.dumps({**found, "commit": COMMIT}))
    part.replace(work / f"{found['side']}-{found['seed']}.json")


def write(folder: Path, what: str, device: torch.device, content: dict[str, Any]) -> Path:
    """Write FOLDER/WHAT_DEVICE_YYYYMMDD.json with everything needed to run it again."""
    now = datetime.now(UTC)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    record = {
        "what": what,
        "when": now.isoformat(timespec="seconds"),
        "commit": COMMIT,
        "hardware": hardware(device),
        "versions": environment(device),
        **content,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{what}_{chip.replace(' ', '-').lower()}_{now:%Y%m%d}.json"
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return path


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, and the GPU where one is used."""
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
    return found


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
