"""ResNet-50 from pretrained weights, against a plain torchvision loop: python benchmarks/finetune.py --data FOLDER --weights FILE

For each seed (of the split, the head, the order and the draws) one after the other: the plain loop of common/baseline.py (224
pixels, the stem and the first stage frozen, or nothing), the recipe `finetune` and the recipe `finetune-long`, all on the same
images, each in a process of its own. The clock runs from before the weights are read until the last epoch is validated,
for fastflower until `train` returns, with its checkpoints and report; every side validates after every epoch. Its JSON has, too,
the time that the process and its workers spent on processors: where it is far from the cores times the clock, something else
ran there too. Scored is the last epoch: the validation split chooses nothing. A run that is finished is kept in --work, so that
a benchmark that was stopped goes on where it was. So does a training of fastflower, exactly; its seconds are then those of the
epochs that were kept and of what followed, and are compared with nothing.
"""

import os
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from common import baseline, images, record
from torchvision import transforms

from fastflower import pack, train
from fastflower.devices import precision_of, resolve_device
from fastflower.models.checkpoint import LAST, Checkpoint
from fastflower.recipes.presets import PRESETS

PLAIN = "plain"
EPOCHS = 5  # of the plain loop


def prepare(data: Path, work: Path, seed: int) -> tuple[Path, Path]:
    """(shards, the same split as folders train/CLASS and val/CLASS of links)."""
    shards, folder = work / f"shards-{seed}", work / f"folder-{seed}"
    if not folder.exists():
        shutil.rmtree(shards, ignore_errors=True)
        pack(data, shards, seed=seed)
        images.split_folders(data, shards, folder)
    return shards, folder


def run(side: str, data: Path, work: Path, weights: Path, seed: int, device: str | None) -> dict[str, Any]:
    """One training; accuracies of all its epochs and its seconds."""
    shards, folder = prepare(data, work, seed)
    chosen = resolve_device(device)
    start, spent = time.perf_counter(), _processor_seconds()
    if side.startswith(PLAIN):
        torch.manual_seed(seed)
        model = baseline.pretrained_resnet50(weights, len(list((folder / "train").iterdir())))
        random = [transforms.RandomResizedCrop(224, (0.25, 1.0)), transforms.RandomHorizontalFlip()]
        frozen = (model.conv1, model.bn1, model.layer1) if side == PLAIN else ()
        how: dict[str, Any] = {"lr": 0.02, "weight_decay": 1e-4, "epochs": EPOCHS, "frozen": frozen}
        dtype = precision_of(PRESETS["finetune"]().precision, chosen)
        plain = baseline.OneCycle(model, folder, random, 224, **how, device=chosen, dtype=dtype)
        accuracies = [plain.epoch() for _ in range(EPOCHS)]
        seconds = time.perf_counter() - start
        del plain  # its workers end, so that what they spent is counted
        extra: dict[str, Any] = {}
    else:
        recipe = replace(PRESETS[side](), backbone=baseline.RESNET50, weights=str(weights), seed=seed)
        out = work / f"run-{side}-{seed}"
        kept = Checkpoint.load(out / LAST) if (out / LAST).exists() else None
        history = train(shards, recipe, out=out, resume=True, device=chosen).history
        seconds = time.perf_counter() - start
        seconds += sum(row["train_seconds"] + row["val_seconds"] for row in history[: kept.epoch if kept else 0])
        accuracies = [row["val_accuracy"] for row in history]
        extra = {
            "resumed": kept is not None,
            "history": history,
            "recipe": {**recipe.to_dict(), "weights": weights.name},
        }
    spent = _processor_seconds() - spent
    return {
        "side": side,
        "seed": seed,
        "precision": str(precision_of(PRESETS["finetune"]().precision, chosen)).removeprefix("torch."),
        "seconds": seconds,
        "processor_seconds": spent,
        "accuracies": accuracies,
        **extra,
    }


def _processor_seconds() -> float:
    """Of this process and of its workers that have ended."""
    return sum(os.times()[:4])


def table(runs: list[dict[str, Any]], sides: list[str]) -> str:
    """Each side's accuracy after the last epoch and its seconds, and its differences from the plain loop, seed by seed.

    The share of the plain loop's seconds is of the seeds of which both ran on one kind of processor in one precision, in one go.
    """
    lines = [f"{'':28}{'accuracy':>9}{'min - max':>18}{'points more':>26}{'s':>18}{'share':>7}"]
    plain = [entry for entry in runs if entry["side"] == sides[0]]
    for side in sides:
        mine = [entry for entry in runs if entry["side"] == side]
        last = [100 * entry["accuracies"][-1] for entry in mine]
        more = [100 * (one["accuracies"][-1] - other["accuracies"][-1]) for one, other in zip(mine, plain, strict=True)]
        alike = [(one, other) for one, other in zip(mine, plain, strict=True) if _ran_on(one) == _ran_on(other)]
        share = f"{statistics.mean(one['seconds'] / other['seconds'] for one, other in alike):.2f}" if alike else "-"
        seconds = " ".join(f"{entry['seconds']:.0f}" for entry in mine)
        spread = f"{statistics.mean(more):+.2f} ({', '.join(f'{value:+.1f}' for value in more)})"
        lines.append(
            f"{side:28}{statistics.mean(last):8.2f}%{f'{min(last):.2f} - {max(last):.2f}':>18}{spread:>26}{seconds:>18}"
            f"{share:>7}"
        )
    return "\n".join([*lines, f"n = {len(plain)} seeds"])


def _ran_on(entry: dict[str, Any]) -> tuple[Any, ...]:
    hardware = entry.get("hardware", {})
    return hardware.get("processor"), hardware.get("gpu"), entry.get("precision"), entry.get("resumed", False)


def main(
    data: Path,
    weights: Path,
    work: Path,
    out: Path = record.ROOT / "benchmarks" / "results",
    seeds: int = 3,
    frozen: bool = True,
    device: str | None = None,
    only: tuple[str, int] | None = None,
) -> None:
    """Fine-tune and compare.

    Args:
        data: A folder of class folders.
        weights: A state_dict with the names of torchvision's resnet50, of a ResNet v1.
        work: Where shards, runs and what is finished are kept.
        out: Where the JSON goes.
        seeds: How many runs of each side, with seeds 0, 1, ...
        frozen: Leave the stem and the first stage as they are; the other way all is trained.
        device: None means CUDA where there is one, else the CPU.
        only: One side and seed, in this process; what the others are started with.
    """
    work.mkdir(parents=True, exist_ok=True)
    if only is not None:
        record.keep(work, run(only[0], data, work, weights, only[1], device), resolve_device(device))
        return
    sides = [name if frozen else f"{name}-unfrozen" for name in (PLAIN, "finetune", "finetune-long")]
    options = ["--data", str(data), "--weights", str(weights), *(["--device", device] if device else [])]
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        for side in sides:
            runs.append(record.kept(__file__, work, side, seed, options))
            print(f"{side}, seed {seed}: {runs[-1]['accuracies'][-1]:.2%}, {runs[-1]['seconds']:.0f} s", flush=True)
    print(table(runs, sides))
    content = {"clock": " ".join((__doc__ or "").split("\n\n")[1].split()), "data": data.name, "runs": runs}
    print(f"wrote {record.write(out, sides[1], resolve_device(device), content)}")


if __name__ == "__main__":
    tyro.cli(main)
