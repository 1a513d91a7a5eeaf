"""Time epochs against ImageFolder + DataLoader, interleaved: python benchmarks/epoch_time.py [--data FOLDER]

The clock runs from the request for an epoch's first batch until its last batch is on the device or, with training,
until every validation image is scored. Images per second counts training images. All sides drop the last, incomplete
batch. The uncounted first round, whose time is recorded too, includes making loaders, starting workers and, for
fastflower's cache, decoding.
"""

from dataclasses import replace
from pathlib import Path

import torch
import tyro
from common import baseline, record
from common.epochs import plain_loading, training, waited
from common.images import images

from fastflower import Augment, Loader, Recipe
from fastflower.devices import resolve_device


def loading(folder: Path, shards: Path, augment: Augment, batch_size: int, device: torch.device) -> list[record.Side]:
    """Return the sides of loading alone: float32 batches on the device."""

    def run_with(loader: Loader) -> int:
        return sum(len(batch.labels) for batch in loader)

    decoding = Loader(shards, batch_size=batch_size, augment=augment, device=device, cache=None)
    cached = Loader(shards, batch_size=batch_size, augment=augment, device=device)
    return [
        plain_loading(folder, augment.output_size[0], batch_size, device),
        record.Side("fastflower, decoding every epoch", lambda: run_with(decoding)),
        record.Side("fastflower, decoded once (the default)", lambda: run_with(cached)),
    ]


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
        data: Folder of class folders; by default, draws flowers.
        out: Folder for the JSON.
        rounds: Counted rounds of loading alone; 0 skips it.
        train_rounds: Counted rounds of training; 0 skips it.
        batch_size: Batch size of all sides.
        size: Side of the square images, in pixels.
        max_images: Load at most this many images, spread evenly over the classes.
        train_images: The same for training, including a fifth for validation; None uses all.
        device: None means CUDA if available, else the CPU.
    """
    chosen = resolve_device(device)
    augment = replace(Augment.from_torchvision(baseline.augmentation()), size=size)
    content: dict[str, object] = {
        "clock": " ".join((__doc__ or "").split("\n\n")[1].split()),
        "data": str(data.name) if data else "drawn",
        "batch_size": batch_size,
        "augment": Recipe(augment=augment).to_dict()["augment"],
        "baseline": "ImageFolder + DataLoader, torchvision v1 transforms on PIL, one persistent worker per core",
    }
    if rounds:
        with images(data, max_images) as (folder, shards):
            sides = loading(folder, shards, augment, batch_size, chosen)
            record.interleave(sides, rounds, chosen)
        print(record.table("data loading", sides), flush=True)
        content["feeding"] = [{**side.to_dict(), "ratio": record.ratio(side, sides[0])} for side in sides]
    if train_rounds:
        with images(data, train_images, 0.2) as (folder, shards):
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
