"""The parts of gpu_check.py that need DALI: which ways to decode survive, how fast they are, and DALI's tests."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import dali_probe, gpu_loading, gpu_part, gpu_smoke, record
from common.gpu_loading import Way
from common.gpu_part import SMALL, Part, Place, verdict
from fastflower import Augment, Loader
from fastflower.loading.backends.base import Setup
from fastflower.loading.backends.triton import DeviceImages, TritonBackend
from fastflower.loading.cache import Allowance
from fastflower.loading.samples import SampleSource
from fastflower.recipes.presets import report_a
from fastflower.shards.image import decode
from fastflower.shards.reader import ShardReader

TIMES_OPENCV = 2.0  # goal for the rate of decoding on the GPU
_TOGETHER = 4  # probes at a time, because each takes seconds to start; a rate is measured beside three others
_LIMIT = 25.0  # seconds until a probe is killed
_BUSY = 4  # 8192 x 8192 matrix products before each batch, some milliseconds


WAYS = [
    {"torchvision": first, "fancy": fancy, "load": load, "region": region}
    for first, fancy, load, region in product((False, True), (True, False), (0, 1), (False, True))
]
"""Ways to decode: torchvision imported first, fancy chroma upsampling, the JPEG engine's share, only a region."""


def probe(
    part: Part, place: Place, *, count: int = 64, repeats: int = 20, chosen: Sequence[dict[str, Any]] = WAYS
) -> None:
    """Time DALI's decoder alone, in images/s, in a process of its own for each way, four processes at a time. The
    encoded bytes are in RAM, and the pixels stay on the device.
    """
    paths = sorted(place.many.glob("*/*.jp*g"))
    paths = paths[:: max(1, len(paths) // count)][:count]
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room, "images")
        folder.mkdir()
        expected, sizes = [], []
        for number, path in enumerate(paths):
            (folder / f"{number:04d}.jpg").write_bytes(path.read_bytes())
            image = decode(path.read_bytes())
            top, left = dali_probe.middle(image.shape)
            expected.append(image[top : top + dali_probe.SIDE, left : left + dali_probe.SIDE])
            sizes.append(image.shape[:2])
        (folder / "sizes.json").write_text(json.dumps(sizes))
        try_one = partial(_probe_one, part, folder, np.stack(expected), repeats)
        with ThreadPoolExecutor(_TOGETHER) as pool:
            for way, found in zip(chosen, pool.map(try_one, chosen), strict=True):
                part.found[_name_of(way)] = found
                part.row(_name_of(way), found["said"])


def _name_of(way: dict[str, Any]) -> str:
    words = ("torchvision first" if way["torchvision"] else "DALI alone", "fancy" if way["fancy"] else "plain")
    return ", ".join([*words, f"engine {way['load']}", "region" if way["region"] else "whole"])


def _probe_one(part: Part, folder: Path, expected: Any, repeats: int, way: dict[str, Any]) -> dict[str, Any]:
    pixels = folder.parent / f"{_name_of(way).replace(', ', '-').replace(' ', '_')}.npy"
    device = "gpu" if part.device.type == "cuda" else "cpu"
    flags = [f"--{name}" for name in ("torchvision", "fancy", "region") if way[name]]
    arguments = [folder, pixels, "--device", device, "--load", way["load"], "--repeats", repeats, *flags]
    command = [sys.executable, "-X", "faulthandler", dali_probe.__file__, *map(str, arguments)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_LIMIT, env=gpu_smoke.child_environment(), check=False
        )
    except subprocess.TimeoutExpired:
        return {"survived": False, "said": f"FAILED, timed out after {_LIMIT:.0f} s"}
    if done.returncode:
        gpu_part.log(part.out, f"probe: {_name_of(way)}: status {done.returncode}", done.stderr[-5_000:])
        return {"survived": False, "status": done.returncode, "said": f"FAILED with status {done.returncode}"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"survived": False, "said": f"FAILED, printed no JSON but {done.stdout[-200:]!r}"}
    differ = np.abs(np.load(pixels).astype(int) - expected)
    apart = {"mean": float(differ.mean()), "max": int(differ.max())}
    said = f"differs from OpenCV by {apart['mean']:.3f} levels, max {apart['max']}; {found['images_per_second']:.0f} images/s"
    warnings = done.stderr.strip().splitlines()
    if warnings:
        said += f"; {len(warnings)} lines on stderr, first {warnings[0][:80]!r}"
    return {"survived": True, "levels_apart": apart, "warnings": warnings[:20], "said": said, **found}


def engine(part: Part, place: Place, *, batches: int = 100, batch_size: int = 64) -> None:
    """Check, without timing, that the GPU's JPEG engine gives the CUDA decoder's pixels, on an idle and on a busy GPU."""
    first: list[torch.Tensor] = []
    equal: dict[float, bool] = {}
    for load in (0.0, 1.0):
        for busy in (False, True):
            what = f"engine {load:.0%}, GPU {'busy' if busy else 'idle'}"
            if busy and part.device.type != "cuda":
                part.skip(what, "needs a GPU")
                continue
            found = _batches(part, place, load, busy, batches, batch_size)
            first = first or found
            differ = [(one.int() - other.int()).abs() for one, other in zip(found, first, strict=True)]
            changed, most = sum(bool(each.any()) for each in differ), max(int(each.max()) for each in differ)
            mean = float(np.mean([each.float().mean().item() for each in differ]))
            equal[load] = equal.get(load, True) and changed == 0
            part.found[what] = {"batches": len(found), "changed": changed, "mean_levels": mean, "max_levels": most}
            part.row(
                what,
                f"{changed} of {len(found)} batches differ from engine 0%, idle: {mean:.3f} levels on average, max {most}",
            )
    part.found["equal"] = {f"{load:.0%}": value for load, value in equal.items()}


def _batches(part: Part, place: Place, load: float, busy: bool, batches: int, batch_size: int) -> list[torch.Tensor]:
    """Return uint8 images on the CPU, one tensor per batch."""
    found: list[torch.Tensor] = []
    side = torch.randn(8192 if busy else 1, 8192 if busy else 1, device=part.device, dtype=torch.bfloat16)
    with share_of_engine(load):
        loader = Loader(
            place.all,
            batch_size=batch_size,
            augment=Augment(),
            dtype=torch.uint8,
            device=part.device,
            backend="dali",
            cache=None,
        )
        while len(found) < batches:
            for batch in loader:
                if busy:
                    for _ in range(_BUSY):
                        side = torch.tanh(side @ side)
                found.append(batch.images.cpu())
                if len(found) == batches:
                    break
            loader.set_epoch(0)
    return found


@contextmanager
def share_of_engine(load: float) -> Iterator[None]:
    """Set the share of a batch that new pipelines give to the GPU's JPEG engine."""
    from fastflower.loading.backends import dali  # not at the top: the other parts need no DALI

    before, dali.HW_DECODER_LOAD = dali.HW_DECODER_LOAD, load
    try:
        yield
    finally:
        dali.HW_DECODER_LOAD = before


def without_engine(part: Part, place: Place, **sizes: Any) -> None:
    """Time loading alone, as in "loading": DALI decoding with CUDA kernels, against OpenCV on threads."""
    _loading(part, place, 0.0, **sizes)


def with_engine(part: Part, place: Place, **sizes: Any) -> None:
    """Time the same with the JPEG engine, if its pixels were equal."""
    found = gpu_part.parts(part.out).get("engine", {}).get("equal", {})
    if not found.get("100%"):
        part.skip("engine 100%", 'the part "engine" did not find its pixels equal to engine 0%')
        return
    _loading(part, place, 1.0, **sizes)


def _loading(
    part: Part,
    place: Place,
    load: float,
    *,
    batch_sizes: tuple[int, ...] = (256, 32),
    rounds: int = 5,
    augment: Augment | None = None,
) -> None:
    def piece(batch_size: int) -> None:
        common = {"batch_size": batch_size, "augment": augment or report_a().augment, "device": part.device}
        names = {"OpenCV on threads, bfloat16": ("opencv", torch.bfloat16)}
        names |= {f"DALI, {name}": ("dali", dtype) for name, dtype in gpu_loading.DTYPES.items()}
        sides = [
            gpu_loading.side_of(Way(name, {"backend": backend, "dtype": dtype, "cache": None}), place.all, common)
            for name, (backend, dtype) in names.items()
        ]
        what = f"engine {load:.0%}, batch {batch_size}"

        def tell(left: list[record.Side]) -> None:
            part.found[f"batch_{batch_size}"] = [record.summary(side, sides[0]) for side in left]
            for side in left:
                part.row(f"{what}: {side.name}", record.rate(side, sides[0]))
            best = max((record.ratio(side, sides[0]) for side in left[1:]), default=0.0)
            goal = f"goal: at least {TIMES_OPENCV:.0f}, {verdict(best, TIMES_OPENCV)}"
            part.row(f"{what}: best", f"{best:.2f} times OpenCV's rate; {goal}")

        part.interleave(what, sides, rounds, tell)

    with share_of_engine(load):
        part.each({f"batch {batch_size}": partial(piece, batch_size) for batch_size in batch_sizes})


def kept(
    part: Part,
    place: Place,
    *,
    batch_size: int = 256,
    batches: int = 8,
    rounds: int = 5,
    augment: Augment | None = None,
) -> None:
    """Time rendering alone, from decoded images on the device until the last batch is done: with Triton's kernels, and
    with DALI's graph without its decoder.
    """
    from fastflower.loading.backends.dali import DaliBackend, Pipeline, fn, pipeline_def, rendered, types

    view, cuda = augment or report_a().augment, part.device.type == "cuda"
    loader = Loader(place.split, batch_size=batch_size, augment=view, device="cpu", cache=None)
    requests = list(loader.requests(0))[:batches]
    samples = SampleSource(ShardReader(loader.manifest, loader.split))
    setup = Setup(part.device, torch.float16, batch_size, workers=4)
    images: dict[int, Any] = {}
    for index in np.concatenate([request.indices for request in requests]).tolist():
        image = loader.image(index)
        images[index] = torch.from_numpy(image.copy()).to(part.device) if cuda else image

    @pipeline_def(enable_conditionals=True, batch_size=batch_size, num_threads=4, prefetch_queue_depth=2)
    def graph() -> Any:
        place = "gpu" if cuda else "cpu"
        decoded = fn.external_source(
            name="samples", device=place, dtype=types.UINT8, ndim=3, layout="HWC", no_copy=True
        )
        return rendered(decoded, view, torch.float16, cuda)

    class Kept(DaliBackend):
        """A DALI backend that takes decoded images."""

        def pipeline(self) -> Pipeline:
            return graph(device_id=part.device.index if cuda else None)

        def prepare(self, work: Any, row: int) -> None:
            work.files[row] = images[int(work.request.indices[row])]

    dali = Kept(view, samples, setup)
    triton = TritonBackend(view, samples, setup, DeviceImages(loader.num_samples, Allowance(part.device, 1 << 34)))

    def run(backend: Any) -> int:
        return sum(len(made) for _, made in backend.run(iter(requests)))

    sides = [record.Side("DALI", partial(run, dali)), record.Side("Triton", partial(run, triton))]

    def tell(left: list[record.Side]) -> None:
        part.found["sides"] = [record.summary(side, sides[0]) for side in left]
        for side in left:
            part.row(f"batch {batch_size}, float16, from cached images: {side.name}", record.rate(side, sides[0]))

    part.interleave("kept", sides, rounds, tell)


def run_tests(part: Part, place: Place) -> None:
    """Run the tests marked gpu that load with DALI."""
    gpu_smoke.run_tests(part, place, only="dali")


TINY: dict[str, dict[str, Any]] = {
    "probe": {"count": 4, "repeats": 1, "chosen": [WAYS[0], WAYS[-1]]},
    "engine": {"batches": 2, "batch_size": 8},
    "dali_0": {"batch_sizes": (8,), "rounds": 1, "augment": SMALL},
    "dali_1": {"batch_sizes": (8,), "rounds": 1, "augment": SMALL},
    "kept": {"batch_size": 8, "batches": 1, "rounds": 1, "augment": gpu_part.MAGNIFIED},
}
