"""Run the main workflow end to end: python tools/demo.py [--data FOLDER] [--weights FILE]. `make demo` runs this.

Packs a folder of class folders (by default, generated flowers), trains, evaluates, times epochs against torchvision's
ImageFolder in the same run, and writes the report to runs/demo.
"""

import json
import logging
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import tyro
from tqdm.contrib.logging import logging_redirect_tqdm

from fastflower import Checkpoint, FastflowerError, Report, evaluate, pack, train
from fastflower.errors import ArgumentError, CheckpointError, HeldError
from fastflower.files import locked
from fastflower.models.metrics import Scores
from fastflower.recipes.presets import PRESETS

ROOT = Path(__file__).parent.parent
_MARK = ".fastflower-demo"  # marks a folder that a demo may clear


class Timed(TypedDict):
    """One side of a comparison, as written by benchmarks/epoch_time.py."""

    name: str
    images: int
    seconds: list[float]
    """Seconds of each round."""
    ratio: float
    """Throughput relative to the baseline."""


def main(
    data: Path | None = None,
    weights: Path | None = None,
    backbone: str | None = None,
    epochs: int | None = None,
    out: Path = Path("runs/demo"),
) -> None:
    """Run the main workflow and print a short table.

    Args:
        data: Folder of class folders. By default, flowers are drawn.
        weights: A state_dict to start from. By default, the backbone's pretrained weights, or random ones without them.
        backbone: By default, EfficientNet-Lite0 from the extra `demo`, or resnet50 with --weights.
        epochs: Overrides the recipe's number of epochs.
        out: Folder of the run. The output of an earlier demo is removed from it; any other folder must be empty.
    """
    if data is not None and data.resolve().is_relative_to(out.resolve()):
        raise ArgumentError(f"--data {data}: is inside --out {out}, which is cleared first; choose another --out.")
    if out.exists() and not (out / _MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArgumentError(f"--out {out}: was not written by a demo; choose another folder or remove this one.")
    try:
        with locked(out / _MARK):
            _clear(out)
            _run(data, weights, backbone, epochs, out)
    except HeldError as error:
        raise ArgumentError(
            f"--out {out}: another demo is running there ({error}); wait for it or choose another folder."
        ) from None


def _run(data: Path | None, weights: Path | None, backbone: str | None, epochs: int | None, out: Path) -> None:
    start = time.perf_counter()
    folder = data or out / "flowers"
    if data is None:
        _step("drawing five kinds of flowers")
        subprocess.run([sys.executable, ROOT / "tools" / "draw_flowers.py", folder], check=True)
    _step(f"packing {folder}")
    asked = time.perf_counter()
    manifest = pack(folder, out / "shards")
    packed = time.perf_counter() - asked
    images = sum(split.samples for split in manifest.splits.values())
    print(f"{images} images in {packed:.1f} s; {len(manifest.skipped)} files skipped")
    for item in manifest.skipped:
        print(f"  {item['path']}: {item['reason']}")
    for group in manifest.label_conflicts:
        print(f"  the same image under two labels: {', '.join(group)}")
    report = _trained(out, weights, backbone, epochs)
    _step("evaluating the best checkpoint")
    scores = evaluate(report.checkpoint, out / "shards")
    _step("timing epochs against ImageFolder")
    timing = _timed(folder, out, Checkpoint.load(report.checkpoint).recipe.augment_at(0).output_size[0])
    _summary(report, scores, timing, time.perf_counter() - start)


def _clear(out: Path) -> None:
    """Remove only what a demo writes, since the folder may also contain other files."""
    for name in ("flowers", "shards"):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    patterns = ("checkpoint-*.pt", "history.csv", "report.html", "*.png", "epoch_time_*.json")
    for path in [path for pattern in patterns for path in out.glob(pattern)]:
        path.unlink()


def _trained(out: Path, weights: Path | None, backbone: str | None, epochs: int | None) -> Report:
    """Train from the weights file if given, otherwise from pretrained weights, or from scratch if they are unavailable."""
    finetune = PRESETS["finetune"]()
    if weights:
        tries = [replace(finetune, weights=str(weights), backbone=backbone or "resnet50", epochs=3)]
    elif backbone:
        tries = [replace(finetune, backbone=backbone), replace(PRESETS["scratch"](), backbone=backbone)]
    else:
        small = replace(PRESETS["finetune-small"](), augment=finetune.augment)  # too short a training for mixup
        tries = [replace(small, epochs=3, sizes=(0.71, 0.71, 0.86)), PRESETS["scratch"]()]
    for recipe in tries:
        chosen = replace(recipe, epochs=epochs or recipe.epochs)
        _step(f"training {chosen.backbone}, {chosen.epochs} epochs, weights: {chosen.weights or 'none, from scratch'}")
        try:
            return train(out / "shards", chosen, out=out)
        except CheckpointError as error:
            if recipe is tries[-1]:
                raise
            print(error)
    raise AssertionError("unreachable: the last try returns or raises")


def _timed(folder: Path, out: Path, size: int) -> dict[str, list[Timed]]:
    """Run benchmarks/epoch_time.py on 320 of the same images, at the size of the first epoch."""
    command = [sys.executable, ROOT / "benchmarks" / "epoch_time.py", "--data", folder, "--out", out]
    options = {"rounds": 3, "train-rounds": 1, "size": size, "max-images": 320, "train-images": 320}
    subprocess.run([*command, *(f"--{name}={value}" for name, value in options.items())], check=True)
    content = json.loads(next(out.glob("epoch_time_*.json")).read_text())
    return {"data loading": content["feeding"], "training": content["training"]}


def _summary(report: Report, scores: Scores, timing: dict[str, list[Timed]], seconds: float) -> None:
    rows = [("validation accuracy", f"{scores.accuracy:.1%} of {scores.num_samples} images")]
    epoch_seconds = statistics.median(row["train_seconds"] for row in report.history)
    rows.append(("training", f"{len(report.history)} epochs of {epoch_seconds:.1f} s"))
    for name, sides in timing.items():
        for side in sides:
            rate = side["images"] / statistics.median(side["seconds"])
            rows.append((f"{name}: {side['name']}", f"{rate:.0f} images/s, {side['ratio']:.2f} times the baseline"))
    rows.append(("total", f"{seconds:.0f} s"))
    rows.append(("report", str(report.folder / "report.html")))
    _step("done")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:{width}}  {value}")


def _step(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fastflower").setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm():
            tyro.cli(main)
    except FastflowerError as error:
        sys.exit(f"error: {error}")
