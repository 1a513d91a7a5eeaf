"""A pretrained ResNet-50 on photographs: python benchmarks/finetune.py --data FOLDER --weights FILE

Packs the folder and trains the recipe `finetune` once for each seed (of the split, the head, the order and the draws). The
clock runs from the call of `train` until it returns, reading weights, validation, checkpoints and report included. Scored is
the last epoch, so the validation split chooses nothing; the best epoch stands beside it.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import record
import tyro

from fastflower import pack, train
from fastflower.batch import resolve_device
from fastflower.recipe import PRESETS


def main(
    data: Path,
    weights: Path,
    out: Path = record.ROOT / "benchmarks" / "results",
    seeds: int = 1,
    epochs: int | None = None,
    device: str | None = None,
) -> None:
    """Fine-tune and score.

    Args:
        data: A folder of class folders.
        weights: A state_dict of torchvision's resnet50.
        out: Where the JSON goes.
        seeds: How many runs, with seeds 0, 1, ...
        epochs: Instead of the recipe's five.
        device: None means CUDA where there is one, else the CPU.
    """
    chosen = resolve_device(device)
    runs: list[dict[str, object]] = []
    accuracies: list[float] = []
    for seed in range(seeds):
        recipe = PRESETS["finetune"]()
        recipe = replace(recipe, weights=str(weights), seed=seed, epochs=epochs or recipe.epochs)
        with tempfile.TemporaryDirectory() as scratch:
            pack(data, Path(scratch, "shards"), seed=seed)
            start = time.perf_counter()
            report = train(Path(scratch, "shards"), recipe, out=Path(scratch, "run"), device=chosen)
            seconds = time.perf_counter() - start
        accuracies.append(report.history[-1]["val_accuracy"])
        stored = {**recipe.to_dict(), "weights": weights.name}
        runs.append({"seed": seed, "seconds": seconds, "history": report.history, "recipe": stored})
        best = max(row["val_accuracy"] for row in report.history)
        print(
            f"seed {seed}: {accuracies[-1]:.2%} after the last epoch, {best:.2%} at best, {seconds:.0f} s", flush=True
        )
    spread = f", from {min(accuracies):.2%} to {max(accuracies):.2%}" if seeds > 1 else ""
    print(f"mean {np.mean(accuracies):.2%}{spread} (n = {seeds})")
    print(f"wrote {record.write(out, 'finetune', chosen, {'data': data.name, 'runs': runs})}")


if __name__ == "__main__":
    tyro.cli(main)
