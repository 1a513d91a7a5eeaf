"""Time the first batch and the gap between epochs: python benchmarks/latency.py [--data FOLDER]

"first batch" runs from making the loader until its first batch is ready, in a process that has already imported its
libraries. "between epochs" runs from the end of an epoch until the first batch of the next one. Batches of 64, float32,
on the CPU. The sides run in turn, each time with a new loader.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import tyro
from common import baseline, record
from common.images import images

from fastflower import Augment, Loader


def measured(make: Callable[[], Iterable[Any]]) -> tuple[float, float]:
    """Return (first batch, between epochs) in seconds."""
    start = time.perf_counter()
    loader = make()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - start
    for _ in batches:
        pass
    start = time.perf_counter()
    next(iter(loader))
    return first, time.perf_counter() - start


def main(
    data: Path | None = None,
    out: Path = record.ROOT / "benchmarks" / "results",
    rounds: int = 7,
    max_images: int | None = 640,
) -> None:
    """Time first batches of fastflower and of ImageFolder + DataLoader.

    Args:
        data: Folder of class folders; by default, draws flowers.
        out: Folder for the JSON.
        rounds: Counted rounds, after one warm-up round.
        max_images: Use at most this many images, spread evenly over the classes.
    """
    augment = Augment.from_torchvision(baseline.augmentation())
    with images(data, max_images) as (folder, shards):
        sides: dict[str, Callable[[], Iterable[Any]]] = {
            "ImageFolder + DataLoader": lambda: baseline.loader(
                folder, baseline.augmentation(), batch_size=64, pin=False
            ),
            "fastflower": lambda: Loader(shards, batch_size=64, augment=augment, device="cpu"),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name, make in sides.items():
                seconds = measured(make)
                if number:
                    found[name].append(seconds)
    print(f"{'':28}{'first batch, ms':>24}{'between epochs, ms':>24}   n = {rounds}")
    for name, pairs in found.items():
        cells = [
            f"{1000 * statistics.median(times):.0f} ({1000 * min(times):.0f} - {1000 * max(times):.0f})"
            for times in zip(*pairs, strict=True)
        ]
        print(f"{name:28}{cells[0]:>24}{cells[1]:>24}")
    content = {"clock": " ".join((__doc__ or "").split("\n\n")[1].split()), "seconds": found}
    print(f"wrote {record.write(out, 'latency', torch.device('cpu'), content)}")


if __name__ == "__main__":
    tyro.cli(main)
