"""What the parts of gpu_check.py share: the images they run on, and a record that is on the disk while a part goes on."""

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

FEEDING_IMAGES = 4096  # 16 batches of 256: what an epoch takes at its ends counts for as little as it does in earnest
TRAINING_IMAGES = 2848  # of the five reports
MAGNIFIED = Augment(size=32, resize=36, crop=(0.002, 0.0025), flip=0.5, contrast=0.2)
"""What Triton's interpreter is quick at, for trials without a GPU."""
SMALL = Augment(size=32, resize=36, crop=(0.5, 1.0), flip=0.5)
"""What a CPU trains on quickly."""


@dataclass(frozen=True)
class Place:
    """Where images lie, and shards of them that `prepare` makes. Fewer images than are wanted come several times."""

    data: Path
    """Class folders."""
    scratch: Path
    weights: Path | None = None
    """A ResNet-50 state_dict."""

    @property
    def many(self) -> Path:
        """Class folders of FEEDING_IMAGES."""
        return self.scratch / "many"

    @property
    def all(self) -> Path:
        """Shards of those with one split, "train"."""
        return self.scratch / "all"

    @property
    def split(self) -> Path:
        """Shards of TRAINING_IMAGES with two splits."""
        return self.scratch / "split"

    @property
    def folders(self) -> Path:
        """The same split, as train/CLASS and val/CLASS."""
        return self.scratch / "folders"

    def prepare(self, feeding: int = FEEDING_IMAGES, training: int = TRAINING_IMAGES) -> None:
        """Pack so many images for each."""
        pack(repeated(self.data, self.many, feeding), self.all, val_fraction=0)
        report = repeated(self.data, self.scratch / "report", training)
        pack(report, self.split)
        images.split_folders(report, self.split, self.folders)


def repeated(folder: Path, into: Path, count: int) -> Path:
    """Links to `count` images, evenly from all classes; each comes again under another name where there are too few."""
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
    """A part of a check that must bring home what it has: it ends in time, fails in pieces, and is on the disk after each row.

    All parts of a lease share a file, each under its name. What fails is told in OUT/failures.log.
    """

    def __init__(
        self, name: str, out: Path, device: torch.device, *, file: str = "gpu", clock: str = "", seconds: float = inf
    ) -> None:
        self.name, self.out, self.device, self.file = name, out, device, file
        self.start = time.perf_counter()
        self.ends = self.until = self.start + seconds
        """When, of perf_counter, no further round is begun: of the part, and of the piece under way."""
        self.rows: dict[str, str] = {}
        """What is worth a line of the table, by its name."""
        self.failed: list[str] = []
        self.left_out: list[str] = []
        self.found: dict[str, Any] = {}
        """Figures, for the JSON."""
        self._clock, self._quiet = " ".join(clock.split()), False

    def row(self, name: str, value: str) -> None:
        """Keep a line, in place of an earlier one of that name."""
        if not self._quiet:
            print(f"  {name:60} {value}", flush=True)
        self.rows[name] = value
        self.save()

    def leave_out(self, what: str, why: str) -> None:
        self.left_out.append(what)
        self.row(what, f"LEFT OUT, {why}")

    def each(self, pieces: Mapping[str, Callable[[], object]]) -> None:
        """Do pieces in turn, each in an equal share of the time that is left; what one raises costs the others nothing."""
        for number, (what, run) in enumerate(pieces.items()):
            now = time.perf_counter()
            self.until = now + (self.ends - now) / (len(pieces) - number)
            if now > self.ends:
                self.leave_out(what, "out of time")
                continue
            try:
                run()
            except Exception as error:
                self.fail(what, error)
            self.save()
            if self.device.type == "cuda":
                gc.collect()
                with suppress(RuntimeError):  # an error of CUDA's comes again at every call
                    torch.cuda.empty_cache()

    def fail(self, what: str, error: Exception) -> None:
        self.failed.append(what)
        self.row(what, "FAILED, see failures.log")
        log(self.out, f"{self.name}: {what}", "".join(traceback.format_exception(error)))

    def interleave(
        self, what: str, sides: list[record.Side], rounds: int, tell: Callable[[list[record.Side]], object]
    ) -> list[record.Side]:
        """`record.interleave` within the time of this piece. After each round tell(sides that ran) makes its rows."""

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
        """Write all that was found so far."""
        content = {
            "clock": self._clock,
            "seconds": time.perf_counter() - self.start,
            "finished": finished,
            "failed": self.failed,
            "left_out": self.left_out,
            "rows": self.rows,
            **self.found,
        }
        path = record.result_path(self.out, self.file, self.device)
        kept = json.loads(path.read_text())["parts"] if path.exists() else {}
        record.write(self.out, self.file, self.device, {"parts": {**kept, self.name: content}})


def parts(out: Path) -> dict[str, Any]:
    """What parts left in a folder, by name."""
    found: dict[str, Any] = {}
    for path in sorted(out.glob("gpu*.json")):
        found |= json.loads(path.read_text())["parts"]
    return found


def log(out: Path, what: str, text: str) -> None:
    """Add to OUT/failures.log."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "failures.log").open("a") as file:
        file.write(f"{what}\n{text.rstrip()}\n\n")


def verdict(value: float, goal: float) -> str:
    """What to say of a figure that is to be at least the goal."""
    return "not compared" if isnan(value) else "met" if value >= goal else "MISSED"


def check_recorded(run: Run) -> None:
    """Raise RuntimeError where a run's steps were to be replayed from a CUDA graph, and none was recorded."""
    if graphs_of(run.recipe, run.device, run.precision) and not run.stepper.replays:
        raise RuntimeError("no step was recorded as a CUDA graph: see what was said, in failures.log")
