"""Epochs of fastflower against ImageFolder + DataLoader, interleaved in one run: python benchmarks/epoch_time.py [--data FOLDER]

The clock runs from asking for an epoch's first batch until its last batch is on the device, or, with the training step,
until the device has finished the last step. Both sides drop the last, incomplete batch. Making loaders, starting workers,
and on fastflower's cached side decoding, fall into the uncounted first round, whose time is recorded too.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import baseline
import numpy as np
import record
import torch
import tyro

from fastflower import Augment, Loader, Recipe, pack
from fastflower.batch import resolve_device
from fastflower.folder import scan
from fastflower.training import Run


@contextmanager
def photographs(data: Path | None, max_images: int | None) -> Iterator[tuple[Path, Path]]:
    """(class folders, the same packed without a validation split); without data they are drawn."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = data or Path(scratch, "drawn")
        if data is None:
            subprocess.run([sys.executable, record.ROOT / "tools" / "draw_flowers.py", folder], check=True)
        if max_images is not None:
            folder = some(folder, Path(scratch, "some"), max_images)
        shards = Path(scratch, "shards")
        pack(folder, shards, val_fraction=0)
        yield folder, shards


def some(folder: Path, into: Path, count: int) -> Path:
    """Links to at most `count` photographs, evenly spread over the classes."""
    found = scan(folder)
    numbers = np.linspace(0, len(found), min(count, len(found)), endpoint=False).astype(int)
    for number in numbers:
        path = found.path(number)
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        (into / path).symlink_to((folder / path).resolve())
    return into


def feeding(folder: Path, shards: Path, augment: Augment, batch_size: int, device: torch.device) -> list[record.Side]:
    """Loading alone, float32 batches on the device."""
    plain = baseline.loader(
        folder, baseline.augmentation(augment.output_size[0]), batch_size=batch_size, pin=device.type == "cuda"
    )

    def run_baseline() -> int:
        return sum(
            len(labels.to(device)) for images, labels in plain if images.to(device, non_blocking=True) is not None
        )

    def run_with(loader: Loader) -> int:
        return sum(len(batch.labels) for batch in loader)

    decoding = Loader(shards, batch_size=batch_size, augment=augment, device=device, cache=None)
    cached = Loader(shards, batch_size=batch_size, augment=augment, device=device)
    return [
        record.Side("ImageFolder + DataLoader", run_baseline),
        record.Side("fastflower, decoding every epoch", lambda: run_with(decoding)),
        record.Side("fastflower, decoded once (the default)", lambda: run_with(cached)),
    ]


def training(folder: Path, shards: Path, augment: Augment, batch_size: int, device: torch.device) -> list[record.Side]:
    """Loading and a ResNet-18 training step."""
    transform = baseline.augmentation(augment.output_size[0])
    plain = baseline.loader(folder, transform, batch_size=batch_size, pin=device.type == "cuda")
    num_classes = len(plain.dataset.classes)  # pyright: ignore[reportAttributeAccessIssue]
    slow = baseline.Trainer(num_classes, device, fast=False)
    fast = baseline.Trainer(num_classes, device, fast=True)
    recipe = Recipe(weights=None, augment=augment, batch_size=batch_size, epochs=10**6)
    ours = Run(shards, recipe, shards, device, None)
    epochs = iter(range(10**6))

    def run_fastflower() -> int:
        ours.train_epoch(next(epochs))
        return len(ours.loader) * batch_size

    return [
        record.Side("ImageFolder loop, float32, NCHW", lambda: slow.epoch(plain)),
        record.Side("ImageFolder loop, bfloat16, channels-last", lambda: fast.epoch(plain)),
        record.Side("fastflower, bfloat16, channels-last", run_fastflower),
    ]


def main(
    data: Path | None = None,
    out: Path = record.ROOT / "benchmarks" / "results",
    rounds: int = 5,
    train_rounds: int = 3,
    batch_size: int = 32,
    size: int = 224,
    max_images: int | None = None,
    train_images: int | None = 640,
    device: str | None = None,
) -> None:
    """Time epochs of fastflower and of ImageFolder + DataLoader in turn.

    Args:
        data: A folder of class folders; drawn flowers where it is left out.
        out: Where the JSON goes.
        rounds: Counted rounds of feeding alone; 0 leaves it out.
        train_rounds: Counted rounds of feeding and training; 0 leaves it out.
        batch_size: Of both sides.
        size: Pixels of the square images.
        max_images: Feed only so many photographs, evenly spread over the classes.
        train_images: Likewise for training; None trains on all.
        device: None means CUDA where there is one, else the CPU.
    """
    chosen = resolve_device(device)
    augment = replace(Augment.from_torchvision(baseline.augmentation()), size=size)
    content: dict[str, object] = {
        "clock": " ".join((__doc__ or "").split("\n\n")[1].split()),
        "data": str(data.name) if data else "drawn",
        "batch_size": batch_size,
        "augment": Recipe(augment=augment).to_dict()["augment"],
        "baseline": "ImageFolder + DataLoader, torchvision v1 transforms on PIL, a worker a core, persistent",
    }
    parts = (("feeding", feeding, rounds, max_images), ("training", training, train_rounds, train_images))
    for name, make, count, images in parts:
        if not count:
            continue
        with photographs(data, images) as (folder, shards):
            sides = make(folder, shards, augment, batch_size, chosen)
            record.interleave(sides, count, chosen)
        print(record.table(name, sides), flush=True)
        content[name] = [{**side.to_dict(), "ratio": record.ratio(side, sides[0])} for side in sides]
    path = record.write(out, "epoch_time", chosen, content)
    print(f"wrote {path}")


if __name__ == "__main__":
    tyro.cli(main)
