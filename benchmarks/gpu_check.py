"""Everything that a machine with CUDA is asked to show: python benchmarks/gpu_check.py OUT [--data FOLDER] [--weights FILE]

Runs the tests marked `gpu`, times feeding and epochs against ImageFolder, trains to an accuracy, prints a short table last
and leaves JSON in OUT. Ends with status 2 on a machine without CUDA, and 1 when a part failed; the other parts still run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import baseline
import epoch_time
import record
import torch
import tyro

from fastflower import Augment, Loader, Recipe, pack, train
from fastflower.native_renderer import available
from fastflower.recipe import PRESETS, report_a

Rows = list[tuple[str, str]]


def gpu_tests(out: Path) -> Rows:
    """pytest -m gpu; the whole log is kept."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(record.ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=record.ROOT, env=environment, capture_output=True, text=True, check=False)
    (out / "gpu_tests.log").write_text(done.stdout + done.stderr)
    last = [line for line in done.stdout.splitlines() if line.strip()][-1]
    if done.returncode:
        raise RuntimeError(f"pytest -m gpu: {last}; see gpu_tests.log")
    return [("tests marked gpu", last.strip("= "))]


def loader_rates(folder: Path, shards: Path, out: Path, device: torch.device, batch_size: int) -> Rows:
    """Feeding alone: DALI and threads, decoding and from memory, four dtypes, against ImageFolder."""
    augment = Augment.from_torchvision(baseline.augmentation())
    sides = epoch_time.feeding(folder, shards, augment, batch_size, device)
    ways: dict[str, dict[str, Any]] = {}
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16), ("uint8", torch.uint8)):
        ways[f"DALI, {name}, decoding"] = {"dtype": dtype, "executor": "dali", "cache": None}
    threads = "native" if available() else "opencv"
    ways[f"threads, {threads}, decoding"] = {"executor": threads, "cache": None}
    ways[f"threads, {threads}, from RAM"] = {"executor": threads}
    for name, options in ways.items():
        loader = Loader(shards, batch_size=batch_size, augment=augment, device=device, **options)
        sides.append(record.Side(name, lambda loader=loader: sum(len(batch.labels) for batch in loader)))
    record.interleave(sides, 5, device)
    print(record.table(f"feeding, batch {batch_size}", sides), flush=True)
    found = [{**side.to_dict(), "ratio": record.ratio(side, sides[0])} for side in sides]
    record.write(out, f"loader_rates_{batch_size}", device, {"batch_size": batch_size, "sides": found})
    return [(f"feeding, batch {batch_size}: {side.name}", _rate(side, sides[0])) for side in sides]


def epochs(data: Path, out: Path, device: torch.device, batch_size: int) -> Rows:
    """Feeding, training and validating ResNet-18."""
    augment = Augment.from_torchvision(baseline.augmentation())
    with epoch_time.photographs(data, None, 0.2) as (folder, shards):
        sides, _ = epoch_time.training(folder, shards, augment, batch_size, device)
        record.interleave(sides, 5, device)
    print(record.table(f"training and validation, batch {batch_size}", sides), flush=True)
    found = [{**side.to_dict(), "ratio": record.ratio(side, sides[0])} for side in sides]
    record.write(out, f"epoch_time_{batch_size}", device, {"batch_size": batch_size, "sides": found})
    return [(f"training, batch {batch_size}: {side.name}", _rate(side, sides[0])) for side in sides]


def accuracy(folder: Path, out: Path, device: torch.device, weights: Path | None) -> Rows:
    """Whole runs: report A from scratch, and ResNet-50 from weights where a file is given; seconds from call to report."""
    runs: dict[str, Recipe] = {"report A, from scratch": replace(report_a(), weights=None)}
    if weights is not None:
        runs["ResNet-50, fine-tuned"] = replace(PRESETS["finetune"](), weights=str(weights))
    rows: Rows = []
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        pack(folder, Path(scratch, "shards"))
        for name, recipe in runs.items():
            start = time.perf_counter()
            report = train(Path(scratch, "shards"), recipe, out=Path(scratch, name.replace(" ", "-")), device=device)
            seconds = time.perf_counter() - start
            best = report.history[report.best_epoch - 1]["val_accuracy"]
            last = report.history[-1]["val_accuracy"]
            found[name] = {"seconds": seconds, "history": report.history, "recipe": recipe.to_dict()}
            rows.append((name, f"{last:.1%} after the last epoch, {best:.1%} at best, {seconds:.1f} s (n = 1)"))
    record.write(out, "accuracy", device, found)
    return rows


def _rate(side: record.Side, first: record.Side) -> str:
    median, low, high = statistics.median(side.rates), min(side.rates), max(side.rates)
    return (
        f"{median:.0f} images/s ({low:.0f} - {high:.0f}, n = {len(side.rates)}), {record.ratio(side, first):.2f} times"
    )


def main(out: Annotated[Path, tyro.conf.Positional], data: Path | None = None, weights: Path | None = None) -> int:
    """Run every GPU check.

    Args:
        out: Where JSON and logs go.
        data: A folder of class folders; drawn flowers where it is left out.
        weights: A ResNet-50 state_dict to fine-tune.
    """
    if not torch.cuda.is_available():
        print(f"no CUDA on this machine (torch {torch.__version__}): nothing was run")
        return 2
    device = torch.device("cuda")
    out.mkdir(parents=True, exist_ok=True)
    rows: Rows = []
    failed: list[str] = []

    def part(name: str, run: Callable[[], Rows]) -> None:
        try:
            rows.extend(run())
        except Exception:  # the machine is borrowed: what one part meets must not cost the others
            failed.append(name)
            rows.append((name, "FAILED, see failures.log"))
            with (out / "failures.log").open("a") as log:
                log.write(f"{name}\n{traceback.format_exc()}\n")

    part("tests marked gpu", lambda: gpu_tests(out))
    with epoch_time.photographs(data, None) as (folder, shards):
        for batch_size in (32, 256):
            part(
                f"feeding, batch {batch_size}", lambda size=batch_size: loader_rates(folder, shards, out, device, size)
            )
            part(f"training, batch {batch_size}", lambda size=batch_size: epochs(folder, out, device, size))
        part("accuracy", lambda: accuracy(folder, out, device, weights))
    summary = {"hardware": record.hardware(device), "failed": failed, "rows": rows}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\n{torch.cuda.get_device_name(device)}")
    for name, value in rows:
        print(f"  {name:52} {value}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
