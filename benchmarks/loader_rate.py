"""Compare data loading alone for all installed libraries: python benchmarks/loader_rate.py [--data FOLDER]

The clock runs from the request for an epoch's first batch until its last one is ready, float32 on the CPU. Each way to
load runs in a process of its own. They take turns, round by round; the others wait. CPU seconds are those of the
process and its children during the counted rounds. Memory is the peak of the process and its children, sampled twenty
times a second during two rounds that are not counted. It is given as the sum of resident sets, and as memory that no
file backs (Pss_Anon + Pss_Shmem), which counts shared memory once and the page cache not at all.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

import psutil
import torch
import tyro
from common import baseline, peers, record
from common.images import drawn, some
from common.record import installed, silent

from fastflower import Augment, Loader, pack
from fastflower.packing.folder import scan
from fastflower.shards.image import decode

Epoch = Callable[[], int]
Kind = Literal["warm-up", "memory", "counted"]


def ours(backend: Literal["native", "opencv"], cache: Literal["auto"] | None) -> Callable[[peers.Job], Epoch]:
    """Return fastflower's way to load; with a cache, the uncounted first round decodes."""

    def way(job: peers.Job) -> Epoch:
        augment = Augment.from_torchvision(baseline.augmentation())
        loader = Loader(
            job.shards, batch_size=job.batch_size, augment=augment, device="cpu", backend=backend, cache=cache
        )
        return lambda: sum(len(batch.labels) for batch in loader)

    return way


def floor(renderer: str, *, decoded: bool) -> Callable[[peers.Job], Epoch]:
    """Return bare threads as a way to load; see common/floor.py."""

    def way(job: peers.Job) -> Epoch:
        from common import floor

        augment = Augment.from_torchvision(baseline.augmentation())
        loader = Loader(job.shards, batch_size=job.batch_size, augment=augment, device="cpu", cache=None)
        return floor.epoch_of(loader, renderer, peers.WORKERS, decoded=decoded)

    return way


WAYS: dict[str, tuple[str | None, Callable[[peers.Job], Epoch]]] = {
    "ImageFolder + DataLoader": (None, peers.imagefolder),
    "torchvision v2 on tensors": (None, peers.torchvision_v2),
    "webdataset": ("webdataset", peers.webdataset),
    "DALI, CPU backend, the obvious graph": ("nvidia.dali", peers.dali),
    "SPDL": ("spdl", peers.spdl),
    "litdata": ("litdata", peers.litdata),
    "MosaicML streaming": ("streaming", peers.mds),
    "floor: OpenCV, decoding": (None, floor("opencv", decoded=False)),
    "floor: native, decoding": (None, floor("native", decoded=False)),
    "floor: OpenCV, from RAM": (None, floor("opencv", decoded=True)),
    "floor: native, from RAM": (None, floor("native", decoded=True)),
    "fastflower, OpenCV, decoding": (None, ours("opencv", None)),
    "fastflower, native, decoding": (None, ours("native", None)),
    "fastflower, OpenCV, from RAM": (None, ours("opencv", "auto")),
    "fastflower, native, from RAM": (None, ours("native", "auto")),
}
# For enlarged images: enough to see how the ratio changes.
FEW = [name for name in WAYS if "ImageFolder" in name or "v2" in name or "native" in name]


@dataclass
class Process:
    """One way to load, in a process of its own."""

    name: str
    job: peers.Job
    images: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    warm_up_seconds: list[float] = field(default_factory=list)
    peak_resident_bytes: int = 0
    peak_own_bytes: int = 0

    def __post_init__(self) -> None:
        command = [sys.executable, __file__, "--way", self.name, "--data", self.job.folder]
        command += ["--shards", self.job.shards, "--scratch", self.job.scratch]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.tree = psutil.Process(self.child.pid)

    def round(self, kind: Kind) -> None:
        """Load one epoch."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        over = Event()
        watching = Thread(target=self._watch, args=(over,))
        if kind != "counted":
            watching.start()
        before = self._cpu()
        self.child.stdin.write("go\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        over.set()
        if not line:
            raise RuntimeError(f"{self.name}: its process ended; pass --way, --data, --shards and --scratch to see why")
        if kind == "counted":
            self.cpu_seconds.append(self._cpu() - before)
        else:
            watching.join()
        self.images, seconds = json.loads(line)
        if kind != "memory":
            (self.seconds if kind == "counted" else self.warm_up_seconds).append(seconds)

    def end(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()

    def _processes(self) -> list[psutil.Process]:
        return [self.tree, *self.tree.children(recursive=True)]

    def _cpu(self) -> float:
        times = [process.cpu_times() for process in self._processes()]
        own = self.tree.cpu_times()
        return sum(part.user + part.system for part in times) + own.children_user + own.children_system

    def _watch(self, over: Event) -> None:
        while not over.wait(0.05):
            resident, own = (sum(parts) for parts in zip(*map(memory, self._processes()), strict=True))
            self.peak_resident_bytes = max(self.peak_resident_bytes, resident)
            self.peak_own_bytes = max(self.peak_own_bytes, own)

    def to_side(self) -> record.Side:
        return record.Side(self.name, lambda: 0, images=self.images, seconds=self.seconds)

    def to_dict(self) -> dict[str, Any]:
        names = ("name", "images", "seconds", "cpu_seconds", "warm_up_seconds", "peak_resident_bytes", "peak_own_bytes")
        return {name: getattr(self, name) for name in names}


def memory(process: psutil.Process) -> tuple[int, int]:
    """Return (resident bytes, bytes that no file backs); the latter count only this process's share of shared memory."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # the process has just ended
        return 0, 0
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return found["Rss"], found["Pss_Anon"] + found["Pss_Shmem"]


def serve(way: str, job: peers.Job) -> None:
    """Serve one way to load: run an epoch for each line on stdin, and write its images and seconds to stdout."""
    job.scratch.mkdir(parents=True, exist_ok=True)
    with silent():
        epoch = WAYS[way][1](job)
    for _line in sys.stdin:
        start = time.perf_counter()
        images = epoch()
        print(json.dumps([images, time.perf_counter() - start]), flush=True)


def measured(folder: Path, scratch: Path, names: list[str], rounds: int) -> list[Process]:
    """Run all ways in turn, round by round."""
    pack(folder, scratch / "shards", val_fraction=0, shard_bytes=4 << 20)  # webdataset needs a shard per worker
    processes = [
        Process(name, peers.Job(folder, scratch / "shards", scratch / f"way{number}"))
        for number, name in enumerate(names)
        if WAYS[name][0] is None or find_spec(WAYS[name][0] or "")
    ]
    counted: list[Kind] = ["counted"] * rounds
    for kind in ("warm-up", "memory", *counted):
        for process in processes:
            process.round(kind)
    for process in processes:
        process.end()
    return processes


def table(title: str, processes: list[Process]) -> str:
    """Format rates, ratios to the first way, CPU seconds and memory."""
    rates = record.table(title, [process.to_side() for process in processes]).splitlines()
    rates[1] += f"{'CPU s/1000':>12}{'RSS MB':>8}{'own MB':>8}"
    for number, process in enumerate(processes):
        cpu = 1000 * sum(process.cpu_seconds) / len(process.cpu_seconds) / process.images
        rates[number + 2] += f"{cpu:12.2f}{process.peak_resident_bytes / 1e6:8.0f}{process.peak_own_bytes / 1e6:8.0f}"
    return "\n".join(rates)


def growth(shards: Path, epochs: int) -> dict[str, list[int]]:
    """Return the bytes that fastflower's process holds after each epoch, by cache: None (decoding) and auto (from RAM)."""
    found: dict[str, list[int]] = {}
    for cache in (None, "auto"):
        epoch = ours("native", cache)(peers.Job(shards, shards, shards))
        found[str(cache)] = [memory(psutil.Process())[1] for _ in range(epochs) if epoch()]
    return found


def enlarged(folder: Path, into: Path, size: tuple[int, int], count: int) -> Path:
    """Write `count` images, enlarged to (width, height), as JPEG of quality 90, and return their folder."""
    import cv2

    few = some(folder, into / "few", count)
    for path in sorted(few.glob("*/*")):
        target = into / "large" / path.relative_to(few)
        target.parent.mkdir(parents=True, exist_ok=True)
        image = cv2.resize(decode(path.read_bytes()), size, interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(target), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return into / "large"


def main(
    data: Path | None = None,
    out: Path = record.ROOT / "benchmarks" / "results",
    rounds: int = 5,
    epochs: int = 50,
    larger: bool = True,
    way: str | None = None,
    shards: Path | None = None,
    scratch: Path | None = None,
) -> None:
    """Compare ways to load.

    Args:
        data: Folder of class folders; by default, draws flowers.
        out: Folder for the JSON.
        rounds: Counted rounds.
        epochs: Epochs over which to record the growth of memory; 0 skips it.
        larger: Also compare on images enlarged to 500 x 375 and 4000 x 3000 pixels.
        way: Internal: serve one way to load, on --data, --shards and --scratch.
        shards: See --way.
        scratch: See --way.
    """
    if way is not None and data and shards and scratch:
        return serve(way, peers.Job(data, shards, scratch))
    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        folder = data.resolve() if data else drawn(room / "drawn")
        tasks: list[tuple[str, Path, list[str]]] = [(f"{len(scan(folder))} images as they are", folder, list(WAYS))]
        for size, count in (((500, 375), 640), ((4000, 3000), 64)) if larger else ():
            title = f"{count} images of {size[0]} x {size[1]}"
            tasks.append((title, enlarged(folder, room / title.replace(" ", "-"), size, count), FEW))
        content: dict[str, Any] = {"clock": " ".join((__doc__ or "").split("\n\n")[1].split()), "feeding": {}}
        for number, (title, images, names) in enumerate(tasks):
            processes = measured(images, room / str(number), names, rounds)
            print(table(title, processes), flush=True)
            content["feeding"][title] = [process.to_dict() for process in processes]
        if epochs:
            content["growth"] = growth(room / "0" / "shards", epochs)
            for cache, held in content["growth"].items():
                kept = [f"{held[number] / 1e6:.0f}" for number in (0, len(held) // 2, -1)]
                print(
                    f"memory after epochs 1, {len(held) // 2 + 1} and {len(held)}, cache {cache}: {' '.join(kept)} MB"
                )
    names = ("webdataset", "litdata", "mosaicml-streaming", "spdl", "opencv-python-headless", "nvidia-dali-cuda130")
    content["peers"] = dict(installed(*names))
    print(f"wrote {record.write(out, 'loader_rate', torch.device('cpu'), content)}")
    return None


if __name__ == "__main__":
    tyro.cli(main)
