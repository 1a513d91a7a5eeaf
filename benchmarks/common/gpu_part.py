"""Code that the parts of gpu_check.py share: their images, and a record that is saved while a part runs."""

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import inf, isnan
from pathlib import Path
from typing import Any

import torch

from common import images, record
from fastflower import Augment, pack
from fastflower.packing.folder import scan
from fastflower.training.cuda_graphs import graphs_of
from fastflower.training.run import Run

LOADING_IMAGES = 4096  # 16 batches of 256: what an epoch takes at its ends counts for as little as it does in earnest
TRAINING_IMAGES = 2848  # of the five reports
MAGNIFIED = Augment(size=32, resize=36, crop=(0.002, 0.0025), flip=0.5, contrast=0.2)
"""What Triton's interpreter is quick at, for trials without a GPU."""
SMALL = Augment(size=32, resize=36, crop=(0.5, 1.0), flip=0.5)
"""Fast to train on with a CPU."""


@dataclass(frozen=True)
class Place:
    """Where the images are, and the shards that `prepare` makes of them. Repeats images if there are too few."""

    data: Path
    """Class folders."""
    scratch: Path
    weights: Path | None = None
    """A ResNet-50 state_dict."""

    @property
    def many(self) -> Path:
        """Class folders with LOADING_IMAGES images."""
        return self.scratch / "many"

    @property
    def all(self) -> Path:
        """Shards of the same images in one split, "train"."""
        return self.scratch / "all"

    @property
    def split(self) -> Path:
        """Shards of TRAINING_IMAGES images in two splits."""
        return self.scratch / "split"

    @property
    def folders(self) -> Path:
        """The same splits as folders, train/CLASS and val/CLASS."""
        return self.scratch / "folders"

    def prepare(self, loading: int = LOADING_IMAGES, training: int = TRAINING_IMAGES) -> None:
        """Pack the given numbers of images for loading and for training."""
        pack(repeated(self.data, self.many, loading), self.all, val_fraction=0)
        report = repeated(self.data, self.scratch / "report", training)
        pack(report, self.split)
        images.split_folders(report, self.split, self.folders)


def repeated(folder: Path, into: Path, count: int) -> Path:
    """Link `count` images, spread evenly over the classes, repeating them under other names if there are too few."""
    found = scan(folder)
    if count <= len(found):
        return images.some(folder, into, count)
    for number in range(count):
        path = Path(found.path(number % len(found)))
        link = into / path.with_name(f"{number // len(found)}-{path.name}")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((folder / path).resolve())
    return into


class Part:
    """One part of the check on a borrowed machine: it ends in time, survives failing pieces and saves after each row.

    All parts of a lease share one file, each under its name. Errors go to OUT/failures.log.
    """

    def __init__(
        self, name: str, out: Path, device: torch.device, *, file: str = "gpu", clock: str = "", seconds: float = inf
    ) -> None:
        self.name, self.out, self.device, self.file = name, out, device, file
        self.start = time.perf_counter()
        self.ends = self.until = self.start + seconds
        """Deadlines in perf_counter time, for the part and for the current piece. No round starts after them."""
        self.rows: dict[str, str] = {}
        """Lines of the table, by name."""
        self.failed: list[str] = []
        self.skipped: list[str] = []
        self.found: dict[str, Any] = {}
        """Figures for the JSON."""
        self._clock, self._quiet = " ".join(clock.split()), False

    def row(self, name: str, value: str) -> None:
        """Record a line of the table, replacing an earlier one of the same name."""
        if not self._quiet:
            print(f"  {name:60} {value}", flush=True)
        self.rows[name] = value
        self.save()

    def skip(self, what: str, why: str) -> None:
        self.skipped.append(what)
        self.row(what, f"SKIPPED, {why}")

    def each(self, pieces: Mapping[str, Callable[[], object]]) -> None:
        """Run the pieces in turn, each with an equal share of the remaining time. An error ends only its own piece."""
        for number, (what, run) in enumerate(pieces.items()):
            now = time.perf_counter()
            self.until = now + (self.ends - now) / (len(pieces) - number)
            if now > self.ends:
                self.skip(what, "out of time")
                continue
            try:
                run()
            except Exception as error:
                self.fail(what, error)
            self.save()
            if self.device.type == "cuda":
                gc.collect()
                with suppress(RuntimeError):  # every call repeats an earlier CUDA error
                    torch.cuda.empty_cache()

    def fail(self, what: str, error: Exception) -> None:
        self.failed.append(what)
        self.row(what, "FAILED, see failures.log")
        log(self.out, f"{self.name}: {what}", "".join(traceback.format_exception(error)))

    def interleave(
        self, what: str, sides: list[record.Side], rounds: int, tell: Callable[[list[record.Side]], object]
    ) -> list[record.Side]:
        """Run `record.interleave` within the time of this piece. After each round, tell(sides that ran) adds the rows."""

        def after(left: list[record.Side]) -> None:
            self._quiet = True
            tell(left)
            self._quiet = False

        def failed(name: str, error: Exception) -> None:
            self.fail(f"{what}: {name}", error)

        left = record.interleave(sides, rounds, self.device, ends=self.until, failed=failed, after=after)
        tell(left)
        return left

    def save(self, *, finished: bool = False) -> None:
        """Write everything found so far."""
        content = {
            "clock": self._clock,
            "seconds": time.perf_counter() - self.start,
            "finished": finished,
            "failed": self.failed,
            "left_out": self.skipped,
            "rows": self.rows,
            **self.found,
        }
        path = record.result_path(self.out, self.file, self.device)
        kept = json.loads(path.read_text())["parts"] if path.exists() else {}
        record.write(self.out, self.file, self.device, {"parts": {**kept, self.name: content}})


def parts(out: Path) -> dict[str, Any]:
    """Return the results that parts saved in a folder, by name."""
    found: dict[str, Any] = {}
    for path in sorted(out.glob("gpu*.json")):
        found |= json.loads(path.read_text())["parts"]
    return found


def log(out: Path, what: str, text: str) -> None:
    """Append to OUT/failures.log."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "failures.log").open("a") as file:
        file.write(f"{what}\n{text.rstrip()}\n\n")


def verdict(value: float, goal: float) -> str:
    """Say whether a figure is at least its goal; NaN is "not compared"."""
    return "not compared" if isnan(value) else "met" if value >= goal else "MISSED"


def check_recorded(run: Run) -> None:
    """Raise RuntimeError if a run should replay its steps from a CUDA graph but recorded none."""
    if graphs_of(run.recipe, run.device, run.precision) and not run.stepper.replays:
        raise RuntimeError("no step was recorded as a CUDA graph; failures.log says why")
