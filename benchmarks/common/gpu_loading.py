"""The parts of gpu_check.py that load without training: every way to load, and the augmentation kernels."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import epochs, record
from common.gpu_part import MAGNIFIED, Part, Place, check_recorded, verdict
from fastflower import Augment, Loader
from fastflower.devices import fastest_convolutions
from fastflower.draws import geometry
from fastflower.loading.backends.base import Setup
from fastflower.loading.backends.triton import DeviceImages, TritonBackend
from fastflower.loading.cache import Allowance, free_bytes
from fastflower.loading.request import Request
from fastflower.loading.samples import SampleSource
from fastflower.recipes.presets import report_a
from fastflower.shards.reader import ShardReader
from fastflower.training.run import Run

FROM_CACHE = 350_000  # goal, images/s
TIMES_IMAGE_FOLDER = 10  # goal for the rate from the cache
KERNEL_SHARE = 0.03  # goal, share of a ResNet-18 step
SHAPES = ((256, 4), (512, 4), (1024, 8), (512, 8))  # (pixels per program, warps); the backend uses the last
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STORED = {**DTYPES, "uint8": torch.uint8}
_ALL = 64 << 30  # cache limit in bytes, large enough for all images
_SLEEP = 100_000_000  # GPU cycles, about 50 ms, in which the host launches everything that is timed


@dataclass(frozen=True)
class Way:
    """A way to load with fastflower."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 1
    """Epochs per round; a single epoch from memory is too short to time."""


def ways(fast: int = 20) -> list[Way]:
    """Return the ways that need no DALI. Triton's come last, because a broken kernel fails everything after it."""
    half = torch.bfloat16
    found = [
        Way(f"threads, {name}, decoding, bfloat16", {"backend": backend, "dtype": half, "cache": None})
        for name, backend in (("native", "native"), ("OpenCV", "opencv"))
    ]
    found.append(
        Way(
            "threads, native, from RAM, bfloat16",
            {"backend": "native", "dtype": half, "cache": _ALL},
            max(1, fast // 4),
        )
    )
    found.append(Way("Triton, threads decode, bfloat16", {"backend": "triton", "dtype": half, "cache": None}))
    for name, dtype in DTYPES.items():
        found.append(Way(f"Triton, from the cache, {name}", {"backend": "triton", "dtype": dtype, "cache": _ALL}, fast))
    return found


def loading(
    part: Part,
    place: Place,
    *,
    batch_sizes: tuple[int, ...] = (256, 32),
    rounds: int = 5,
    augment: Augment | None = None,
    chosen: list[Way] | None = None,
) -> None:
    """Time loading alone. The clock runs from the request for an epoch's first batch until the last one is on the
    device. Loading from memory takes several epochs per round. Start-up and decoding into memory fall into the
    uncounted round.
    """
    how = (augment or report_a().augment, chosen or ways())
    part.each(
        {f"batch {batch_size}": partial(_loading, part, place, batch_size, rounds, *how) for batch_size in batch_sizes}
    )


def _loading(part: Part, place: Place, batch_size: int, rounds: int, augment: Augment, chosen: list[Way]) -> None:
    first = epochs.plain_loading(place.many, augment.output_size[0], batch_size, part.device)
    common = {"batch_size": batch_size, "augment": augment, "device": part.device}
    sides = [first, *(side_of(way, place.all, common) for way in chosen)]

    def tell(left: list[record.Side]) -> None:
        part.found[f"batch_{batch_size}"] = [record.summary(side, first) for side in left]
        for side in left:
            part.row(f"batch {batch_size}: {side.name}", record.rate(side, first))
        cached = [side for side in left if side.name.startswith("Triton, from the cache")]
        if cached:
            best = max(statistics.median(side.rates) for side in cached)
            goal = f"{best:.0f} images/s; goal: at least {FROM_CACHE}, {verdict(best, FROM_CACHE)}"
            part.row(f"batch {batch_size}: from the cache, best", goal)
            times = max(record.ratio(side, first) for side in cached)
            goal = f"{times:.1f} times; goal: at least {TIMES_IMAGE_FOLDER}, {verdict(times, TIMES_IMAGE_FOLDER)}"
            part.row(f"batch {batch_size}: from the cache, against ImageFolder", goal)

    part.interleave(f"batch {batch_size}", sides, rounds, tell)


def side_of(way: Way, shards: Path, common: dict[str, Any]) -> record.Side:
    """Return a side that makes its loader in the uncounted round, where an error drops only this side."""
    made: list[Loader] = []

    def run() -> int:
        if not made:
            made.append(Loader(shards, **common, **way.options))
        return sum(len(batch.labels) for _ in range(way.epochs) for batch in made[0])

    return record.Side(way.name, run)


def kernels(
    part: Part,
    place: Place,
    *,
    batch_sizes: tuple[int, ...] = (256, 32),
    dtypes: tuple[str, ...] = tuple(DTYPES),
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    launches: int = 50,
    steps: int = 20,
    rounds: int = 5,
    augment: Augment | None = None,
) -> None:
    """Time augmentation and ResNet-18 training steps between two GPU events. The GPU waits until everything is
    launched, so launches are not counted. Augmentation covers a whole epoch's images and includes copying each batch's
    tables. On the host, times the draws and filling the tables. Each value is a mean over launches; n counts the means.
    """
    chosen = augment or report_a().augment
    step: dict[int, float] = {}
    pieces: dict[str, Callable[[], object]] = {
        f"batch {size}: ResNet-18 step": partial(_step, part, place.split, size, chosen, steps, rounds, step)
        for size in batch_sizes
    }
    for name in dtypes:
        for size in batch_sizes:
            tried = shapes if name == dtypes[0] else shapes[-1:]  # each takes seconds to compile
            how = (part, place.split, chosen, size, name, tried, launches, rounds, step)
            pieces[f"batch {size}, {name}: augmenting"] = partial(_augmenting, *how)
    part.each(pieces)


def _step(
    part: Part, shards: Path, batch_size: int, augment: Augment, steps: int, rounds: int, found: dict[int, float]
) -> None:
    recipe = replace(report_a(), weights=None, augment=augment, batch_size=batch_size)
    run = Run(shards, recipe, shards, part.device)
    images, labels, _ = next(iter(run.loader))

    def work() -> None:
        for _ in range(steps):
            run.step(images, labels)

    with fastest_convolutions(part.device):
        work()
        times = [device_seconds(work, part.device) / steps for _ in range(rounds)]
    check_recorded(run)
    found[batch_size] = statistics.median(times)
    part.found[f"step_seconds_{batch_size}"] = {**record.spread(times), "raw": times}
    part.row(f"batch {batch_size}: ResNet-18 step", milliseconds(times))


def _augmenting(
    part: Part,
    shards: Path,
    augment: Augment,
    batch_size: int,
    name: str,
    shapes: tuple[tuple[int, int], ...],
    launches: int,
    rounds: int,
    steps: dict[int, float],
) -> None:
    step = steps.get(batch_size)
    loader = Loader(shards, batch_size=batch_size, augment=augment, device="cpu", cache=None)
    samples = SampleSource(ShardReader(loader.manifest, loader.split))
    setup = Setup(part.device, DTYPES[name], batch_size, loader.workers)
    kept = DeviceImages(loader.num_samples, Allowance(part.device, free_bytes(part.device) // 2))
    backend = TritonBackend(augment, samples, setup, kept)
    requests = list(loader.requests(0))
    for _ in backend.run(requests):  # decode and cache the images
        pass
    tables = [_tables(backend, request) for request in requests]
    label = f"batch {batch_size}, {name}"
    shape_of_images = (batch_size, *augment.output_size, 3)
    outs = [torch.empty(shape_of_images, dtype=DTYPES[name], device=part.device) for _ in range(4)]

    def launch(block: int, warps: int) -> None:
        for number in range(launches):
            backend.launch(tables[number % len(tables)], outs[number % len(outs)], block, warps)

    found: dict[str, Any] = {}
    for shape in shapes:
        work = partial(launch, *shape)
        work()  # compiles
        times = [device_seconds(work, part.device, backend.stream) / launches for _ in range(rounds)]
        share = statistics.median(times) / step if step else None
        part.found[f"batch_{batch_size}_{name}"] = {"device_seconds": found, "step_seconds": step}
        found["{} pixels, {} warps".format(*shape)] = {**record.spread(times), "share_of_step": share, "raw": times}
        goal = (
            f"; {share:.2%} of a step, goal: under {KERNEL_SHARE:.0%}, {verdict(-share, -KERNEL_SHARE)}"
            if share
            else ""
        )
        part.row(f"{label}: {shape[0]} pixels per program, {shape[1]} warps", milliseconds(times) + goal)
    host: dict[str, list[float]] = {"draw": [], "tables": []}
    for epoch in range(rounds):
        start = time.perf_counter()
        drawn = list(loader.requests(epoch))
        host["draw"].append((time.perf_counter() - start) / len(drawn))
        start = time.perf_counter()
        for request in requests:
            _tables(backend, request)
        host["tables"].append((time.perf_counter() - start) / len(requests))
    both: list[float] = [sum(pair) for pair in zip(*host.values(), strict=True)]
    part.row(f"{label}: on the host, draws and tables", milliseconds(both))
    times = {what: {**record.spread(values), "raw": values} for what, values in (host | {"both": both}).items()}
    part.found[f"batch_{batch_size}_{name}"]["host_seconds"] = times


def _tables(backend: TritonBackend, request: Request) -> torch.Tensor:
    """Return the tables of a batch; all its images must be cached."""
    decode_scale = geometry.decode_scales(request.warp.footprint)
    missing = backend.kept.missing(request.indices, decode_scale)
    if len(missing):
        raise RuntimeError(f"{len(missing)} images of a batch are not cached")
    return backend.tables(request, *backend.kept.find(request.indices, decode_scale))


def device_seconds(work: Callable[[], object], device: torch.device, stream: Any = None) -> float:
    """Return the device time of everything that `work` launches, back to back; on the CPU, the wall-clock time."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        torch.cuda._sleep(_SLEEP)
        begun.record()
        work()
        ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000


def milliseconds(times: list[float]) -> str:
    low, high = (1000 * edge(times) for edge in (min, max))
    return f"{1000 * statistics.median(times):.3f} ms ({low:.3f} - {high:.3f}, n = {len(times)})"


TINY: dict[str, dict[str, Any]] = {
    "kernels": {
        "batch_sizes": (4,),
        "dtypes": ("bfloat16",),
        "shapes": SHAPES[:2],
        "launches": 1,
        "steps": 1,
        "rounds": 2,
    }
    | {"augment": MAGNIFIED},
    "loading": {"batch_sizes": (8,), "rounds": 1, "augment": MAGNIFIED, "chosen": ways(1)},
}
