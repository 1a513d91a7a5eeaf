"""`torchrun_epochs.py SHARDS OUT`: four ranks load epochs, and then two, which also resume where the four stopped.

Each rank writes the batches that it loaded into OUT. In every training step they sum the indices of all ranks, so a rank
with an extra step would wait forever.
"""

import json
import sys
import zlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ranks import launch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastflower import Augment, Batch, Loader

GLOBAL_BATCH = 28  # leaves 8 of 120 in train, and 2 of 30 in val, too few for every rank
STOP = 2

Batches = list[tuple[list[int], int]]
"""For each batch, its indices and a checksum of its pixels."""


def make(shards: str | Path, split: str, ranks: int, **options: Any) -> Loader:
    augment = Augment(size=32, resize=36, crop=(0.2, 1.0), flip=0.5, hue=0.1)
    batch_size = GLOBAL_BATCH // ranks
    return Loader(shards, split, batch_size=batch_size, augment=augment, device="cpu", workers=1, **options)


def batches_of(batches: Iterable[Batch]) -> Batches:
    return [(batch.index.tolist(), pixels(batch)) for batch in batches]


def pixels(batch: Batch) -> int:
    """Return the sum of the images' checksums; those of the ranks add up to that of the global batch."""
    return sum(zlib.crc32(image.contiguous().numpy().tobytes()) for image in batch.images)


def train(batches: Iterable[Batch]) -> tuple[Batches, list[int]]:
    """Return this rank's batches, and for each step the sum of all ranks' indices."""
    found: Batches = []
    sums: list[int] = []
    for batch in batches:
        total = batch.index.sum()
        dist.all_reduce(total)
        sums.append(int(total))
        found += batches_of([batch])
    return found, sums


def validate(batches: Iterable[Batch]) -> tuple[int, list[float]]:
    """Return this rank's number of steps, and its batch norm's statistic: after them, and after a step with the wrapper.

    The statistic is the rank until DDP broadcasts that of rank 0.
    """
    norm, steps = nn.BatchNorm2d(3), list(batches)
    network = DistributedDataParallel(nn.Sequential(norm, nn.Conv2d(3, 1, 1))).eval()
    norm.running_mean.fill_(dist.get_rank())  # pyright: ignore[reportOptionalMemberAccess]  (it has statistics)
    seen: list[float] = []
    for images, *_ in steps:
        network.module(images)
    for call in (network.module, network):
        call(steps[0].images)
        seen.append(float(norm.running_mean[0]))  # pyright: ignore[reportOptionalSubscript]  (as above)
    return len(steps), seen


def rank(shards: str, out: str) -> None:
    dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    report: dict[str, Any] = {}
    for tail in ("drop", "pad"):
        loader = make(shards, "train", world_size, tail=tail)
        report[tail] = [train(loader) for _ in range(2)]
    loader = make(shards, "train", world_size)
    report["broken"] = [train(islice(loader, STOP))]
    report["state"] = loader.state_dict()
    report["broken"].append(train(loader))
    report["val"] = batches_of(make(shards, "val", world_size))
    report["validated"] = validate(make(shards, "val", world_size))
    if world_size == 2:
        loader = make(shards, "train", world_size)
        loader.load_state_dict(json.loads(Path(out, "0_of_4.json").read_text())["state"])
        report["resumed"] = [train(loader) for _ in range(2)]
        loader.load_state_dict(state := loader.state_dict() | {"epoch": 0, "step": STOP})
        for epoch in range(state["epoch"], 2):  # as with a DistributedSampler
            loader.set_epoch(epoch)
            report.setdefault("set epochs", []).append(train(loader))
    Path(out, f"{dist.get_rank()}_of_{world_size}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    for world_size in (4, 2):
        if any(launch(world_size, rank, *sys.argv[1:])):
            sys.exit(f"a rank of {world_size} failed")
