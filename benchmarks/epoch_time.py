"""Epochs of fastflower against ImageFolder + DataLoader, interleaved in one run: python benchmarks/epoch_time.py [--data FOLDER]

The clock runs from asking for an epoch's first batch until its last batch is on the device, or, with the training step,
until every validation image is scored; images a second are training images. All sides drop the last, incomplete batch. Making
loaders, starting workers, and on fastflower's cached side decoding, fall into the uncounted first round, whose time is
recorded too.
"""

import shutil
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

from fastflower import Augment, Loader, Manifest, Recipe, pack
from fastflower.devices import resolve_device
from fastflower.packing.folder import scan
from fastflower.recipes.presets import report_a
from fastflower.training.run import Run


@contextmanager
def photographs(data: Path | None, max_images: int | None, val_fraction: float = 0.0) -> Iterator[tuple[Path, Path]]:
    """(class folders, or train/CLASS and val/CLASS, the same packed); without data they are drawn."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = data or Path(scratch, "drawn")
        if data is None:
            subprocess.run([sys.executable, record.ROOT / "tools" / "draw_flowers.py", folder], check=True)
        if max_images is not None:
            folder = some(folder, Path(scratch, "some"), max_images)
        shards = Path(scratch, "shards")
        pack(folder, shards, val_fraction=val_fraction)
        yield split_folders(folder, shards, Path(scratch, "splits")) if val_fraction else folder, shards


def split_folders(data: Path, shards: Path, into: Path) -> Path:
    """Links SPLIT/CLASS/... to the photographs of each split, for ImageFolder."""
    part = into.with_name(f"{into.name}.part")  # a part of the photographs must not be taken for all
    shutil.rmtree(part, ignore_errors=True)
    for split in Manifest.load(str(shards)).splits:
        loader = Loader(shards, split, batch_size=1, device="cpu", cache=None)
        for index in range(loader.num_samples):
            place = part / split / loader.path_of(index)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to((data / loader.path_of(index)).resolve())
    return part.rename(into)


def some(folder: Path, into: Path, count: int) -> Path:
    """Links to at most `count` photographs, evenly spread over the classes."""
    found = scan(folder)
    numbers = np.linspace(0, len(found), min(count, len(found)), endpoint=False).astype(int)
    for number in numbers:
        path = found.path(number)
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        (into / path).symlink_to((folder / path).resolve())
    return into


def plain_feeding(folder: Path, size: int, batch_size: int, device: torch.device) -> record.Side:
    """The baseline of loading alone, float32 batches on the device."""
    plain = baseline.loader(folder, baseline.augmentation(size), batch_size=batch_size, pin=device.type == "cuda")

    def run() -> int:
        return sum(
            len(labels.to(device)) for images, labels in plain if images.to(device, non_blocking=True) is not None
        )

    return record.Side("ImageFolder + DataLoader", run)


def feeding(folder: Path, shards: Path, augment: Augment, batch_size: int, device: torch.device) -> list[record.Side]:
    """Loading alone, float32 batches on the device."""

    def run_with(loader: Loader) -> int:
        return sum(len(batch.labels) for batch in loader)

    decoding = Loader(shards, batch_size=batch_size, augment=augment, device=device, cache=None)
    cached = Loader(shards, batch_size=batch_size, augment=augment, device=device)
    return [
        plain_feeding(folder, augment.output_size[0], batch_size, device),
        record.Side("fastflower, decoding every epoch", lambda: run_with(decoding)),
        record.Side("fastflower, decoded once (the default)", lambda: run_with(cached)),
    ]


def training(
    folder: Path, shards: Path, augment: Augment, batch_size: int, device: torch.device
) -> tuple[list[record.Side], Run]:
    """Loading, a ResNet-18 training step and a validation, report A's recipe; fastflower's side also as what it is made of."""
    size, pin = augment.output_size[0], device.type == "cuda"
    plain = baseline.loader(folder / "train", baseline.augmentation(size), batch_size=batch_size, pin=pin)
    view = baseline.validation(folder / "val", size, pin=pin)
    recipe = replace(report_a(), weights=None, augment=augment, batch_size=batch_size, epochs=10**6)
    ours = Run(shards, recipe, shards, device)
    slow = baseline.Trainer(len(ours.classes), device, None)
    fast = baseline.Trainer(len(ours.classes), device, ours.precision)
    precision = str(ours.precision).removeprefix("torch.")

    def run_plain(trainer: baseline.Trainer) -> int:
        images = trainer.epoch(plain)
        baseline.accuracy(trainer.model, view, device, trainer.dtype)
        return images

    def run_fastflower() -> int:
        ours.history.append(ours.epoch(len(ours.history))[0])
        return len(ours.loader) * batch_size

    sides = [
        record.Side("ImageFolder loop, float32, NCHW", lambda: run_plain(slow)),
        record.Side(f"ImageFolder loop, {precision}, channels-last", lambda: run_plain(fast)),
        record.Side(f"fastflower, {precision}, channels-last", run_fastflower),
    ]
    return sides, ours


def waited(run: Run, rounds: int) -> float:
    """The share of the counted epochs, validation included, in which training waited for data."""
    rows = run.history[-rounds:]
    return sum(row["wait_seconds"] for row in rows) / sum(row["train_seconds"] + row["val_seconds"] for row in rows)


def main(
    data: Path | None = None,
    out: Path = record.ROOT / "benchmarks" / "results",
    rounds: int = 5,
    train_rounds: int = 3,
    batch_size: int = 32,
    size: int = 224,
    max_images: int | None = None,
    train_images: int | None = 800,
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
        train_images: Likewise for training, a fifth of them to validate; None trains on all.
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
    if rounds:
        with photographs(data, max_images) as (folder, shards):
            sides = feeding(folder, shards, augment, batch_size, chosen)
            record.interleave(sides, rounds, chosen)
        print(record.table("feeding", sides), flush=True)
        content["feeding"] = [{**side.to_dict(), "ratio": record.ratio(side, sides[0])} for side in sides]
    if train_rounds:
        with photographs(data, train_images, 0.2) as (folder, shards):
            sides, run = training(folder, shards, augment, batch_size, chosen)
            record.interleave(sides, train_rounds, chosen)
        print(record.table("training and validation", sides))
        share = waited(run, train_rounds)
        print(f"fastflower waited for data {share:.1%} of the time", flush=True)
        content["training"] = [{**side.to_dict(), "ratio": record.ratio(side, sides[0])} for side in sides]
        content |= {"training_history": run.history, "training_waited": share}
    path = record.write(out, "epoch_time", chosen, content)
    print(f"wrote {path}")


if __name__ == "__main__":
    tyro.cli(main)
