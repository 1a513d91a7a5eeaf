"""Fine-tune a ResNet-50 against a plain loop: python benchmarks/finetune.py --data FOLDER --weights FILE --work FOLDER

Each seed sets the split, the head, the order and the draws. For each, runs three trainings one after the other on the
same images, each in a process of its own: the plain loop of common/baseline.py (224 pixels; the stem and the first
stage frozen, or nothing), the recipe `finetune` and the recipe `finetune-long`. The clock starts before the weights are
read. It stops when the last epoch is validated or, for fastflower, when `train` returns, including checkpoints and
report. All sides validate after every epoch. The JSON also has the CPU time of the process and its workers: if it is
far below cores times seconds, something else ran on the machine. The accuracy of the last epoch counts, so the
validation split selects nothing. Finished runs are kept in --work, and an interrupted benchmark resumes from them. An
interrupted fastflower run resumes exactly; its seconds are then those of the saved epochs plus the time after resuming,
and the table does not compare them.
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
    """Return (shards, the same split as links in train/CLASS and val/CLASS)."""
    shards, folder = work / f"shards-{seed}", work / f"folder-{seed}"
    if not folder.exists():
        shutil.rmtree(shards, ignore_errors=True)
        pack(data, shards, seed=seed)
        images.split_folders(data, shards, folder)
    return shards, folder


def run(side: str, data: Path, work: Path, weights: Path, seed: int, device: str | None) -> dict[str, Any]:
    """Train once and return the accuracies of all epochs and the seconds."""
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
        del plain  # ends its workers, so that their CPU time is counted
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
    """Return the CPU time of this process and of its workers that have ended."""
    return sum(os.times()[:4])


def table(runs: list[dict[str, Any]], sides: list[str]) -> str:
    """Format each side's accuracy after the last epoch, its differences from the plain loop by seed, and its seconds.

    The share of the plain loop's seconds covers the seeds that both ran on the same hardware, in the same precision and
    without interruption.
    """
    lines = [f"{'':28}{'accuracy':>9}{'min - max':>18}{'points above plain':>26}{'s':>18}{'share':>7}"]
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
    """Fine-tune and compare accuracy and time.

    Args:
        data: Folder of class folders.
        weights: A ResNet-50 v1 state_dict with the names of torchvision's resnet50.
        work: Folder for shards, runs and finished results; an interrupted benchmark resumes from it.
        out: Folder for the JSON.
        seeds: Number of runs of each side, with seeds 0, 1, ...
        frozen: Freeze the stem and the first stage; with --no-frozen, train everything.
        device: None means CUDA if available, else the CPU.
        only: Internal: run this side and seed in this process.
    """
    work.mkdir(parents=True, exist_ok=True)
    if only is not None:
        record.save_run(work, run(only[0], data, work, weights, only[1], device), resolve_device(device))
        return
    sides = [name if frozen else f"{name}-unfrozen" for name in (PLAIN, "finetune", "finetune-long")]
    options = ["--data", str(data), "--weights", str(weights), *(["--device", device] if device else [])]
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        for side in sides:
            runs.append(record.load_or_run(__file__, work, side, seed, options))
            print(f"{side}, seed {seed}: {runs[-1]['accuracies'][-1]:.2%}, {runs[-1]['seconds']:.0f} s", flush=True)
    print(table(runs, sides))
    content = {"clock": " ".join((__doc__ or "").split("\n\n")[1].split()), "data": data.name, "runs": runs}
    print(f"wrote {record.write(out, sides[1], resolve_device(device), content)}")


if __name__ == "__main__":
    tyro.cli(main)
