"""The sides to time against each other: loading alone, and whole training epochs."""

from dataclasses import replace
from pathlib import Path

import torch

from common import baseline, record
from fastflower import Augment
from fastflower.recipes.presets import report_a
from fastflower.training.run import Run


def plain_loading(folder: Path, size: int, batch_size: int, device: torch.device) -> record.Side:
    """Return the baseline for loading alone: float32 batches on the device."""
    plain = baseline.loader(folder, baseline.augmentation(size), batch_size=batch_size, pin=device.type == "cuda")

    def run() -> int:
        return sum(
            len(labels.to(device)) for images, labels in plain if images.to(device, non_blocking=True) is not None
        )

    return record.Side("ImageFolder + DataLoader", run)


def training(
    folder: Path, shards: Path, augment: Augment, batch_size: int, device: torch.device
) -> tuple[list[record.Side], Run]:
    """Return the sides that train and validate a ResNet-18 with report A's recipe, and the Run of fastflower's side."""
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
    """Return the fraction of the last `rounds` epochs, including validation, that training waited for data."""
    rows = run.history[-rounds:]
    return sum(row["wait_seconds"] for row in rows) / sum(row["train_seconds"] + row["val_seconds"] for row in rows)
