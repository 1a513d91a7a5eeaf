"""The parts of gpu_check.py that train: loading during training, whole runs, epochs, torch.compile, a profile, accuracy."""

import csv
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch

from common import baseline, record
from common.epochs import training, waited
from common.gpu_part import SMALL, Part, Place, check_recorded, verdict
from common.gpu_smoke import child_environment
from fastflower import Augment, Loader, Recipe, pack, train
from fastflower.devices import fastest_convolutions
from fastflower.loading.batch import Batch
from fastflower.recipes.presets import PRESETS, report_a
from fastflower.training.run import Run

OVERLAP = 0.98  # goal, share of the rate with a replayed batch
MARKS = (0.945, 0.96)  # validation accuracies to reach
CASES = (("resnet18", 32, 200), ("resnet18", 256, 40), ("resnet50", 32, 140), ("resnet50", 256, 24))
RUN_SECONDS, TRAIN_SECONDS = 20.0, 6.0  # goals for report A: process and training
RUNS = {"report A": ("report-a", 2)}


class Replayed:
    """Replaces a loader: yields as many batches per epoch, all of them the loader's first batch, kept on the device."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._batch = Batch(*(part.clone() for part in next(iter(loader))))

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            yield self._batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def overlap(
    part: Part,
    place: Place,
    *,
    cases: tuple[tuple[str, int, int], ...] = CASES,
    rounds: int = 5,
    augment: Augment | None = None,
) -> None:
    """Time training epochs as `train` runs them until their losses are on the host, with the loader and with one
    replayed batch on the device. A round has as many epochs as the case's steps need. The first round is the warm-up
    and includes decoding, recording and compiling.

    Args:
        cases: (backbone, batch size, steps per round).
    """
    pieces = {}
    for backbone, batch_size, steps in cases:
        recipe = _endless(augment, backbone=backbone, batch_size=batch_size)
        ways = {"graph": recipe, "no graph": replace(recipe, graph=False)}
        what = f"{backbone}, batch {batch_size}"
        pieces[what] = partial(_overlap, part, place.all, what, ways, steps, rounds)
    part.each(pieces)


def compiled(
    part: Part, place: Place, *, batch_size: int = 32, steps: int = 200, rounds: int = 5, augment: Augment | None = None
) -> None:
    """Time ResNet-18 as in `overlap`, also with torch.compile (mode "reduce-overhead" on CUDA)."""
    recipe = _endless(augment, batch_size=batch_size)
    ways = {"graph": recipe, "no graph": replace(recipe, graph=False), "torch.compile": replace(recipe, compile=True)}
    if part.device.type != "cuda":
        del ways["torch.compile"]
        part.skip("torch.compile", "needs a GPU")
    _overlap(part, place.all, f"resnet18, batch {batch_size}, compiled too", ways, steps, rounds)


def _endless(augment: Augment | None, **changes: Any) -> Recipe:
    """Return report A's recipe from random weights, with so many epochs that the learning rate stays constant."""
    return replace(report_a(), weights=None, augment=augment or report_a().augment, epochs=10**6, **changes)


def _overlap(part: Part, shards: Path, what: str, ways: dict[str, Recipe], steps: int, rounds: int) -> None:
    sides: list[record.Side] = []
    histories: dict[str, list[dict[str, float]]] = {}

    def epochs(run: Run, loader: Any, rows: list[dict[str, float]]) -> int:
        count = ceil(steps / len(loader))
        run.loader = loader
        rows += [run.train_epoch(len(rows) + number) for number in range(count)]
        check_recorded(run)
        return count * len(loader) * loader.global_batch_size

    for way, recipe in ways.items():
        run = Run(shards, recipe, shards, part.device)
        for name, source in (("replayed", Replayed(run.loader)), ("loader", run.loader)):
            rows = histories[f"{way}, {name}"] = []
            sides.append(record.Side(f"{way}, {name}", partial(epochs, run, source, rows)))

    def tell(left: list[record.Side]) -> None:
        ran = {side.name: side for side in left}
        found: dict[str, Any] = {}
        part.found[what] = found
        for way in ways:
            replayed, loader = ran.get(f"{way}, replayed"), ran.get(f"{way}, loader")
            if replayed is None or loader is None:
                continue
            rows = histories[loader.name]
            counted = rows[len(rows) // (len(loader.seconds) + 1) :]
            waited = sum(row["wait_seconds"] for row in counted) / sum(row["train_seconds"] for row in counted)
            share, warm_up = record.ratio(loader, replayed), replayed.warm_up_seconds[0]
            found[way] = {"sides": [record.summary(side, replayed) for side in (replayed, loader)], "share": share}
            found[way] |= {"waited": waited, "warm_up_seconds": warm_up}
            goal = f"goal: at least {OVERLAP:.0%}, {verdict(share, OVERLAP)}"
            part.row(f"{what}, {way}: with the loader", f"{record.rate(loader)}, {share:.1%} of replayed; {goal}")
            plain = ran.get("no graph, loader")
            also = (
                f"{record.ratio(loader, plain):.2f} times the rate without a graph"
                if plain and plain is not loader
                else ""
            )
            waiting = f"waited {waited:.1%} of the time; warm-up {warm_up:.1f} s"
            part.row(f"{what}, {way}", "; ".join(filter(None, (also, waiting))))

    part.interleave(what, sides, rounds, tell)


def runs(part: Part, place: Place, *, chosen: dict[str, tuple[str, int]] = RUNS, flags: tuple[str, ...] = ()) -> None:
    """Time whole runs of `fastflower train`, from process start to exit, including checkpoints and report. All start
    from random weights: torchvision would have to download pretrained ResNet-18 weights, and there may be no network.

    Args:
        chosen: (recipe, n) by name.
        flags: Passed to every run.
    """
    pieces = {}
    for name, (recipe, count) in chosen.items():
        part.found[name] = []
        for number in range(count):
            out = place.scratch / f"{recipe}-{number}"
            arguments = [str(place.split), "--recipe", recipe, "--weights", "None", "--out", str(out), *flags]
            pieces[f"{name}, run {number + 1}"] = partial(_run, part, name, arguments, out)
    part.each(pieces)


def _run(part: Part, name: str, arguments: list[str], out: Path) -> None:
    # -P: import nothing from the current folder
    command = [sys.executable, "-P", "-m", "fastflower", "train", *arguments]
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=child_environment(), check=False)
        taken = time.perf_counter() - start
        if done.returncode or not (out / "checkpoint-best.pt").exists():
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{output.read()[-20_000:]}")
    with (out / "history.csv").open() as file:
        history = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    sums = {column: sum(row[column] for row in history) for column in ("train_seconds", "val_seconds")}
    best = max(row["val_accuracy"] for row in history)
    found = part.found[name]
    found.append({"seconds": taken, **sums, "best_accuracy": best, "command": arguments, "history": history})
    whole, train, val = ([run[key] for run in found] for key in ("seconds", "train_seconds", "val_seconds"))
    goals = (RUN_SECONDS, TRAIN_SECONDS) if name == "report A" else (None, None)
    part.row(f"{name}, from random weights: process", seconds(whole, goals[0]))
    part.row(f"{name}: training", seconds(train, goals[1]))
    part.row(f"{name}: validation", seconds(val))
    part.row(f"{name}: best validation accuracy", f"{max(run['best_accuracy'] for run in found):.1%}")


def seconds(times: list[float], goal: float | None = None) -> str:
    text = f"{statistics.median(times):.1f} s ({min(times):.1f} - {max(times):.1f}, n = {len(times)})"
    return text if goal is None else f"{text}; goal: under {goal:.0f} s, {verdict(-statistics.median(times), -goal)}"


def epochs(
    part: Part,
    place: Place,
    *,
    batch_sizes: tuple[int, ...] = (32, 256),
    rounds: int = 3,
    augment: Augment | None = None,
) -> None:
    """Time report A's epochs, including validation: from the request for an epoch's first batch until every validation
    image is scored. Images per second counts training images.
    """
    pieces = {
        f"batch {batch_size}": partial(_epochs, part, place, augment or report_a().augment, batch_size, rounds)
        for batch_size in batch_sizes
    }
    part.each(pieces)


def _epochs(part: Part, place: Place, augment: Augment, batch_size: int, rounds: int) -> None:
    sides, run = training(place.folders, place.split, augment, batch_size, part.device)

    def tell(left: list[record.Side]) -> None:
        what = f"batch {batch_size}"
        found = {"sides": [record.summary(side, sides[0]) for side in left], "history": run.history}
        for side in left:
            part.row(f"{what}: {side.name}", record.rate(side, sides[0]))
        if sides[-1] in left:
            found["waited"] = waited(run, len(sides[-1].seconds))
            part.row(f"{what}: waited for data", f"{found['waited']:.1%} of the time")
        part.found[f"batch_{batch_size}"] = found

    part.interleave(f"batch {batch_size}", sides, rounds, tell)


class Moments(logging.Handler):
    """Records when `train` logs the end of an epoch, which is after its validation and checkpoint."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("epoch "):
            self.seconds.append(time.perf_counter())


def accuracy(
    part: Part,
    place: Place,
    *,
    recipes: dict[str, Recipe] | None = None,
    seeds: int = 5,
    marks: tuple[float, ...] = MARKS,
) -> None:
    """Time from the call of `train` until an epoch reaches a mark in validation accuracy and is saved. Includes
    start-up, reading the weights and saving earlier checkpoints; the first run of the process also initializes CUDA.
    The seed sets the split, the head, the order and the draws.

    Args:
        recipes: Recipes by name; each starts from the weights in `place`.
        seeds: Number of seeds.
        marks: Validation accuracies.
    """
    if place.weights is None:
        part.skip("accuracy", "needs --weights")
        return
    chosen = recipes or {
        name: replace(PRESETS[name](), backbone=baseline.RESNET50) for name in ("finetune", "finetune-long")
    }
    part.found |= {name: [] for name in chosen}
    pieces = {}
    for seed in range(seeds):
        for name, recipe in chosen.items():
            from_weights = replace(recipe, weights=str(place.weights), seed=seed)
            pieces[f"{name}, seed {seed}"] = partial(_reach, part, name, place, from_weights, marks)
    part.each(pieces)


def _reach(part: Part, name: str, place: Place, recipe: Recipe, marks: tuple[float, ...]) -> None:
    shards = place.scratch / f"shards-{recipe.seed}"
    if not (shards / "manifest.json").exists():
        pack(place.data, shards, seed=recipe.seed)
    logger, moments = logging.getLogger("fastflower"), Moments()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(moments)
    try:
        start = time.perf_counter()
        report = train(shards, recipe, out=place.scratch / f"{name}-{recipe.seed}", device=part.device)
        taken = time.perf_counter() - start
    finally:
        logger.removeHandler(moments)
        logger.setLevel(level)
    ends = [moment - start for moment in moments.seconds]
    rows = list(zip(ends, report.history, strict=True))
    reached = {f"{mark:.1%}": next((end for end, row in rows if row["val_accuracy"] >= mark), None) for mark in marks}
    first = report.history[0]
    found = {"seed": recipe.seed, "seconds": taken, "reached_seconds": reached, "epoch_ends": ends}
    found |= {"start_up_seconds": ends[0] - first["train_seconds"] - first["val_seconds"], "history": report.history}
    done = part.found[name]
    done.append({**found, "recipe": {**recipe.to_dict(), "weights": Path(str(recipe.weights)).name}})
    for mark in reached:
        times = [run["reached_seconds"][mark] for run in done if run["reached_seconds"][mark] is not None]
        text = f"{len(times)} of {len(done)} reached it"
        part.row(f"{name}: until {mark}", f"{mean(times, ' s')}; {text}" if times else text)
    last = [100 * run["history"][-1]["val_accuracy"] for run in done]
    part.row(f"{name}: accuracy after the last epoch", mean(last, "%"))
    part.row(f"{name}: until train returned", mean([run["seconds"] for run in done], " s"))


def mean(values: list[float], unit: str) -> str:
    deviation = f", sd {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{unit}{deviation}, n = {len(values)}"


def profile(
    part: Part,
    place: Place,
    *,
    batch_sizes: tuple[int, ...] = (32, 256),
    steps: int = 20,
    augment: Augment | None = None,
) -> None:
    """Profile report A's steps with torch's profiler, which slows the host. Sums the GPU's work by kernel, and reports
    the fraction of the time between its first and last work in which the GPU is idle.
    """
    pieces = {
        f"profile, batch {size}": partial(_profile, part, place.all, _endless(augment, batch_size=size), steps)
        for size in batch_sizes
    }
    part.each(pieces)


def _profile(part: Part, shards: Path, recipe: Recipe, steps: int) -> None:
    run = Run(shards, recipe, shards, part.device)
    cuda = part.device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    batches = (batch for _ in iter(int, 1) for batch in run.loader)

    def train_on(count: int) -> None:
        for _ in range(count):
            images, labels, _ = next(batches)
            run.step(images, labels)
        if cuda:
            torch.cuda.synchronize(part.device)

    with fastest_convolutions(part.device), tempfile.TemporaryDirectory() as scratch:
        train_on(max(steps // 2, len(run.loader)))  # at least one epoch, so that everything is decoded
        with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])]) as profiler:
            train_on(steps)
        batches.close()
        profiler.export_chrome_trace(f"{scratch}/trace.json")
        events = json.loads(Path(scratch, "trace.json").read_text())["traceEvents"]
    order = "cuda_time_total" if cuda else "cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)
    stats = run.loader.stats()
    what = f"batch {recipe.batch_size}"
    found = {"gpu": gpu_work(events, steps), "key_averages": table, "stats": {**asdict(stats), "said": str(stats)}}
    part.found[f"profile_{recipe.batch_size}"] = {"steps": steps, **found}
    if found["gpu"]:
        part.row(f"profile, {what}: GPU idle between kernels", f"{found['gpu']['idle_share']:.1%} of {steps} steps")
        for kernel in found["gpu"]["kernels"][:5]:
            part.row(f"profile, {what}: {kernel['name'][:30]}", f"{kernel['ms_a_step']:.3f} ms per step")
    part.row(f"profile, {what}: the loader's verdict", stats.verdict)


def gpu_work(events: list[dict[str, Any]], steps: int) -> dict[str, Any] | None:
    """Return the GPU's idle share and its work by stream and kernel, from the events of a trace; None without GPU events."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    work = sorted((event for event in events if event.get("cat") in kinds), key=lambda event: event["ts"])
    if not work:
        return None
    streams: dict[str, float] = defaultdict(float)
    kernels: dict[str, list[float]] = defaultdict(list)
    busy, last = 0.0, work[0]["ts"]
    for event in work:  # in microseconds
        begun, ended = event["ts"], event["ts"] + event["dur"]
        busy += max(0.0, ended - max(begun, last))
        last = max(last, ended)
        streams[str(event.get("args", {}).get("stream", event.get("tid")))] += event["dur"] / steps / 1000
        kernels[event["name"]].append(event["dur"])
    whole = last - work[0]["ts"]
    totals = sorted(kernels.items(), key=lambda entry: -sum(entry[1]))
    return {
        "idle_share": 1 - busy / whole if whole else 0.0,
        "ms_a_step": whole / steps / 1000,
        "busy_ms_a_step_by_stream": streams,
        "kernels": [
            {"name": name, "ms_a_step": sum(times) / steps / 1000, "times_a_step": len(times) / steps}
            for name, times in totals[:40]
        ],
    }


_FLAGS = ("--batch-size", "8", "--epochs", "1", "--augment.size", "32", "--augment.resize", "36", "--device", "cpu")
_TINY: dict[str, Any] = {"rounds": 1, "augment": SMALL}
TINY: dict[str, dict[str, Any]] = {
    "overlap": {**_TINY, "cases": (("resnet18", 8, 2),)},
    "compile": {**_TINY, "batch_size": 8, "steps": 2},
    "runs": {"chosen": {"report A": ("report-a", 1)}, "flags": _FLAGS},
    "epochs": {**_TINY, "batch_sizes": (8,)},
    "profile": {"batch_sizes": (8,), "steps": 3, "augment": SMALL},
    "accuracy": {"recipes": {"tiny": Recipe(augment=SMALL, epochs=2, batch_size=8)}, "seeds": 2, "marks": (0.0, 1.01)},
}
