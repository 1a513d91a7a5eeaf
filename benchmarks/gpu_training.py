"""The parts of gpu_check.py that train in one process: feeding beside steps, epochs, accuracy, memory, a profile."""

import json
import logging
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from math import ceil, nan
from pathlib import Path
from typing import Any

import baseline
import epoch_time
import record
import torch
from gpu_feeding import verdict

from fastflower import Augment, Loader, Recipe, pack, train
from fastflower.batch import Batch
from fastflower.recipe import PRESETS, report_a
from fastflower.stepping import fastest_convolutions
from fastflower.training import Run

OVERLAP = 0.98  # of the rate with a replayed batch, the goal
MARKS = (0.945, 0.96)  # validation accuracies
CASES = (("resnet18", 32, 200), ("resnet18", 256, 50), ("resnet50", 32, 200), ("resnet50", 256, 50))


class Replayed:
    """In a loader's place: as many batches an epoch, all of them the first, which lies on the device."""

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
    part: record.Part,
    shards: Path,
    *,
    cases: tuple[tuple[str, int, int], ...] = CASES,
    rounds: int = 5,
    augment: Augment | None = None,
    compiled: tuple[str, int] | None = ("resnet18", 32),
) -> None:
    """Training epochs as `train` has them, fed by the loader, and the same fed one batch that lies on the device, until the
    epoch's losses are on the host. A round is as many epochs as give the case's steps. Warm-up is the first round, with what is
    decoded, recorded or compiled in it.

    cases  (backbone, batch size, steps a round). compiled  (backbone, batch size) that torch.compile is tried with.
    """
    for backbone, batch_size, steps in cases:
        recipe = replace(
            report_a(), weights=None, augment=augment or report_a().augment, backbone=backbone, batch_size=batch_size
        )
        recipe = replace(recipe, epochs=10**6)  # the rate stays
        ways = {"no graph": replace(recipe, graph=False), "graph": recipe}
        if compiled == (backbone, batch_size):
            ways["torch.compile"] = replace(recipe, compile=True)
        what = f"{backbone}, batch {batch_size}"
        part.attempt(what, partial(_overlap, part, shards, what, ways, steps, rounds))


def _overlap(part: record.Part, shards: Path, what: str, ways: dict[str, Recipe], steps: int, rounds: int) -> None:
    sides: list[record.Side] = []
    histories: dict[str, list[dict[str, float]]] = {}

    def epochs(run: Run, loader: Any, rows: list[dict[str, float]]) -> int:
        count = ceil(steps / len(loader))
        run.loader = loader
        rows += [run.train_epoch(len(rows) + number) for number in range(count)]
        return count * len(loader) * loader.global_batch_size

    for way, recipe in ways.items():
        run = Run(shards, recipe, shards, part.device)
        for name, source in (("replayed", Replayed(run.loader)), ("loader", run.loader)):
            rows = histories[f"{way}, {name}"] = []
            sides.append(record.Side(f"{way}, {name}", partial(epochs, run, source, rows)))
    left = record.interleave(
        sides, rounds, part.device, ends=part.ends, failed=lambda name, error: part.fail(f"{what}: {name}", error)
    )
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
        goal = f"goal: at least {OVERLAP:.0%}, {verdict(share >= OVERLAP)}"
        part.row(f"{what}, {way}: with the loader", f"{record.rate(loader)}, {share:.1%} of replayed; {goal}")
        times = record.ratio(loader, ran["no graph, loader"]) if "no graph, loader" in ran else nan
        also = f"{times:.2f} times that without a graph" if way != "no graph" else ""
        compiling = ", compiling included" if way == "torch.compile" else ""
        waiting = f"waited {waited:.1%} of the time; warm-up {warm_up:.1f} s{compiling}"
        part.row(f"{what}, {way}", "; ".join(filter(None, (also, waiting))))


def epochs(
    part: record.Part,
    folder: Path,
    shards: Path,
    *,
    batch_sizes: tuple[int, ...] = (32, 256),
    rounds: int = 5,
    augment: Augment | None = None,
) -> None:
    """Report A's epochs, validation included: from asking for an epoch's first batch until every validation image is scored;
    images a second are training images.

    folder  train/CLASS and val/CLASS, the same split as the shards.
    """
    for batch_size in batch_sizes:
        how = (folder, shards, augment or report_a().augment, batch_size, rounds)
        part.attempt(f"batch {batch_size}", partial(_epochs, part, *how))


def _epochs(part: record.Part, folder: Path, shards: Path, augment: Augment, batch_size: int, rounds: int) -> None:
    sides, run = epoch_time.training(folder, shards, augment, batch_size, part.device)

    def fails(name: str, error: Exception) -> None:
        part.fail(f"batch {batch_size}: {name}", error)

    left = record.interleave(sides, rounds, part.device, ends=part.ends, failed=fails)
    part.found[f"batch_{batch_size}"] = {
        "sides": [record.summary(side, sides[0]) for side in left],
        "history": run.history,
    }
    for side in left:
        part.row(f"batch {batch_size}: {side.name}", record.rate(side, sides[0]))
    if sides[-1] in left:
        waited = epoch_time.waited(run, len(sides[-1].seconds))
        part.found[f"batch_{batch_size}"]["waited"] = waited
        part.row(f"batch {batch_size}: waited for data", f"{waited:.1%} of the time")


class Moments(logging.Handler):
    """When `train` said that an epoch is over, which it does when the epoch is validated and saved."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("epoch "):
            self.seconds.append(time.perf_counter())


def accuracy(
    part: record.Part,
    data: Path,
    weights: Path | None,
    scratch: Path,
    *,
    recipes: dict[str, Recipe] | None = None,
    seeds: int = 5,
    marks: tuple[float, ...] = MARKS,
) -> None:
    """From the call of `train` until the first epoch whose validation accuracy reaches a mark is validated and saved: starting,
    reading the weights and earlier checkpoints included. The first run of the process starts CUDA, too. Seeds are of split,
    head, order and draws.

    recipes  by name; each starts from `weights`.
    """
    if weights is None:
        part.row("accuracy", "LEFT OUT: no --weights were given")
        part.left_out.append("all")
        return
    chosen = recipes or {
        name: replace(PRESETS[name](), backbone=baseline.RESNET50) for name in ("finetune", "finetune-long")
    }
    part.found |= {name: [] for name in chosen}
    for seed in range(seeds):
        for name, recipe in chosen.items():
            from_weights = replace(recipe, weights=str(weights), seed=seed)
            part.attempt(f"{name}, seed {seed}", partial(_reach, part, name, data, from_weights, scratch, marks))
    for name in chosen:
        done = part.found[name]
        if not done:
            continue
        for mark in marks:
            times = [run["reached_seconds"][f"{mark:.1%}"] for run in done]
            times = [value for value in times if value is not None]
            text = f"{len(times)} of {len(done)} reached it"
            part.row(f"{name}: until {mark:.1%}", f"{mean(times, ' s')}; {text}" if times else text)
        last = [100 * run["history"][-1]["val_accuracy"] for run in done]
        part.row(f"{name}: accuracy after the last epoch", mean(last, "%"))
        part.row(f"{name}: until train returned", mean([run["seconds"] for run in done], " s"))


def _reach(part: record.Part, name: str, data: Path, recipe: Recipe, scratch: Path, marks: tuple[float, ...]) -> None:
    shards = scratch / f"shards-{recipe.seed}"
    if not (shards / "manifest.json").exists():
        pack(data, shards, seed=recipe.seed)
    logger, moments = logging.getLogger("fastflower"), Moments()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(moments)
    try:
        start = time.perf_counter()
        report = train(shards, recipe, out=scratch / f"{name}-{recipe.seed}", device=part.device)
        taken = time.perf_counter() - start
    finally:
        logger.removeHandler(moments)
        logger.setLevel(level)
    ends = [moment - start for moment in moments.seconds]
    reached = {
        f"{mark:.1%}": next(
            (end for end, row in zip(ends, report.history, strict=True) if row["val_accuracy"] >= mark), None
        )
        for mark in marks
    }
    first = report.history[0]
    found = {"seed": recipe.seed, "seconds": taken, "reached_seconds": reached, "epoch_ends": ends}
    found |= {"start_up_seconds": ends[0] - first["train_seconds"] - first["val_seconds"], "history": report.history}
    part.found[name].append({**found, "recipe": {**recipe.to_dict(), "weights": Path(str(recipe.weights)).name}})
    part.row(f"{name}, seed {recipe.seed}", f"{report.history[-1]['val_accuracy']:.2%} after {taken:.1f} s")


def mean(values: list[float], unit: str) -> str:
    deviation = f", sd {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{unit}{deviation}, n = {len(values)}"


def memory(
    part: record.Part,
    shards: Path,
    *,
    epochs: tuple[int, int] = (2, 50),
    batch_sizes: tuple[int, ...] = (32, 256),
    steps: int = 20,
    augment: Augment | None = None,
) -> None:
    """Bytes after two numbers of epochs of report A, validation included. Then where the time of steps goes: sums of the GPU's
    work by kernel, and the share of the time between its first and last work in which it has none, by torch's profiler, which
    slows the host.
    """
    recipe = replace(report_a(), weights=None, augment=augment or report_a().augment, epochs=10**6)
    part.attempt("memory", partial(_memory, part, shards, replace(recipe, batch_size=batch_sizes[0]), epochs))
    for batch_size in batch_sizes:
        how = (part, shards, replace(recipe, batch_size=batch_size), steps)
        part.attempt(f"profile, batch {batch_size}", partial(_profile, *how))


def _memory(part: record.Part, shards: Path, recipe: Recipe, epochs: tuple[int, int]) -> None:
    run = Run(shards, recipe, shards, part.device)
    held: dict[str, dict[str, int]] = {}
    for epoch in range(epochs[-1]):
        if part.over:
            part.left_out.append(f"memory after epoch {epochs[-1]}: stopped after {epoch}")
            break
        run.epoch(epoch)
        if epoch + 1 in epochs:
            held[f"epoch_{epoch + 1}"] = bytes_held(part.device)
            text = ", ".join(f"{name} {value / 1e6:.1f} MB" for name, value in held[f"epoch_{epoch + 1}"].items())
            part.row(f"memory after epoch {epoch + 1}", text)
    part.found["memory"] = held


def bytes_held(device: torch.device) -> dict[str, int]:
    """Of the process in RAM, and of torch on the GPU."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if device.type != "cuda":
        return {"resident": resident}
    names = ("memory_allocated", "memory_reserved", "max_memory_allocated")
    return {"resident": resident, **{name: getattr(torch.cuda, name)(device) for name in names}}


def _profile(part: record.Part, shards: Path, recipe: Recipe, steps: int) -> None:
    run = Run(shards, recipe, shards, part.device)
    cuda = part.device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    fed = (batch for _ in iter(int, 1) for batch in run.loader)

    def train_on(count: int) -> None:
        for _ in range(count):
            images, labels, _ = next(fed)
            run.step(images, labels)
        if cuda:
            torch.cuda.synchronize(part.device)

    with fastest_convolutions(part.device), tempfile.TemporaryDirectory() as scratch:
        train_on(max(steps // 2, len(run.loader)))  # an epoch at least, so that all is decoded
        with torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if cuda else [])]) as profiler:
            train_on(steps)
        fed.close()
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
            part.row(f"profile, {what}: {kernel['name'][:30]}", f"{kernel['ms_a_step']:.3f} ms a step")
    part.row(f"profile, {what}: the loader says", stats.verdict)


def gpu_work(events: list[dict[str, Any]], steps: int) -> dict[str, Any] | None:
    """What a GPU did, from the events of a trace: its idle share, its work by stream and by kernel; None where it did nothing."""
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
