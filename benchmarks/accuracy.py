"""Compare accuracy with a plain ImageFolder loop: python benchmarks/accuracy.py --data FOLDER --work FOLDER

For each seed, both sides train a ResNet-18 from the same random weights, on the same split, with the same recipe
(`scratch` at a lower resolution). They differ only in decoding, random draws, order and augmentation. The accuracy of
the last epoch counts. Reports the mean difference of the pairs with its 95% confidence interval by Student's t. Nothing
is timed, so other work may run at the same time.
"""

import shutil
import statistics
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import tyro
from common import baseline, images, record
from scipy.stats import t as student
from torchvision import models, transforms

from fastflower import Recipe, pack, train
from fastflower.devices import precision_of, resolve_device
from fastflower.recipes.presets import scratch

SIDES = ("plain", "fastflower")


def recipe_of(size: int, epochs: int, seed: int, start: Path) -> Recipe:
    """Return the recipe `scratch` at another size, from the given weights."""
    augment = replace(scratch().augment, size=size)
    return replace(scratch(), augment=augment, epochs=epochs, seed=seed, weights=str(start))


def run(side: str, data: Path, work: Path, size: int, epochs: int, seed: int, device: str | None) -> dict[str, Any]:
    """Train once and return the accuracies of all epochs."""
    shards, folder, start = work / f"shards-{seed}", work / f"folder-{seed}", work / f"start-{seed}.pth"
    if not folder.exists():
        shutil.rmtree(shards, ignore_errors=True)
        manifest = pack(data, shards, val_fraction=0.4, seed=seed)
        torch.manual_seed(seed)
        torch.save(models.resnet18(num_classes=len(manifest.classes)).state_dict(), start)
        images.split_folders(data, shards, folder)
    chosen, recipe = resolve_device(device), recipe_of(size, epochs, seed, start)
    if side == "fastflower":
        report = train(shards, recipe, out=work / f"run-{seed}", resume=True, device=chosen)
        accuracies = [row["val_accuracy"] for row in report.history]
    else:
        state = torch.load(start, weights_only=True)
        model = models.resnet18(num_classes=len(state["fc.bias"]))
        model.load_state_dict(state)
        torch.manual_seed(seed)
        random = [
            transforms.RandomResizedCrop(size, recipe.augment.crop),
            transforms.RandomHorizontalFlip(),
            transforms.RandomRotation(recipe.augment.rotate, transforms.InterpolationMode.BILINEAR),
            transforms.ColorJitter(recipe.augment.brightness, recipe.augment.contrast, recipe.augment.saturation),
        ]
        how: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "epochs": epochs}
        dtype = precision_of(recipe.precision, chosen)
        plain = baseline.OneCycle(model, folder, random, size, **how, device=chosen, dtype=dtype)
        accuracies = [plain.epoch() for _ in range(epochs)]
    stored = {**recipe.to_dict(), "weights": start.name}
    return {"side": side, "seed": seed, "accuracies": accuracies, "recipe": stored}


def main(
    data: Path,
    work: Path,
    out: Path = record.ROOT / "benchmarks" / "results",
    seeds: int = 16,
    size: int = 64,
    epochs: int = 8,
    device: str | None = None,
    only: tuple[str, int] | None = None,
) -> None:
    """Train pairs and compare their accuracy.

    Args:
        data: Folder of class folders.
        work: Folder for shards, runs and finished results; an interrupted benchmark resumes from it.
        out: Folder for the JSON.
        seeds: Number of pairs, with seeds 0, 1, ...
        size: Side of the square images, in pixels.
        epochs: Epochs of each run.
        device: None means CUDA if available, else the CPU.
        only: Internal: run this side and seed in this process.
    """
    work.mkdir(parents=True, exist_ok=True)
    if only is not None:
        record.save_run(work, run(only[0], data, work, size, epochs, only[1], device), resolve_device(device))
        return
    options = ["--data", str(data), "--size", str(size), "--epochs", str(epochs)]
    options += ["--device", device] if device else []
    runs: list[dict[str, Any]] = []
    differences: list[float] = []
    for seed in range(seeds):
        plain, ours = (record.load_or_run(__file__, work, side, seed, options) for side in SIDES)
        runs += [plain, ours]
        differences.append(100 * (ours["accuracies"][-1] - plain["accuracies"][-1]))
        print(f"seed {seed}: plain {plain['accuracies'][-1]:.2%}, fastflower {differences[-1]:+.2f} points", flush=True)
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    half = float(student.ppf(0.975, seeds - 1)) * deviation / sqrt(seeds)
    summary = {"mean": mean, "standard_deviation": deviation, "interval": [mean - half, mean + half], "n": seeds}
    for side in SIDES:
        last = [100 * entry["accuracies"][-1] for entry in runs if entry["side"] == side]
        print(f"{side:12}{statistics.mean(last):6.2f}% ({min(last):.2f} - {max(last):.2f})")
    print(
        f"difference {mean:+.2f} points, 95% interval {mean - half:+.2f} to {mean + half:+.2f}, standard deviation "
        f"{deviation:.2f}, n = {seeds}"
    )
    content = {"data": data.name, "differences": summary, "runs": runs}
    print(f"wrote {record.write(out, 'accuracy', resolve_device(device), content)}")


if __name__ == "__main__":
    tyro.cli(main)
