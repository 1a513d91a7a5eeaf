"""Everything that a machine with CUDA is asked to show: python benchmarks/gpu_check.py OUT --data FOLDER --weights FILE

Each part runs in a process of its own, so that none costs the others, not even by a kernel that leaves the GPU unusable; it
leaves its figures in a JSON file of OUT while it goes on, and what fails in OUT/failures.log. Eight files at most. A short table
comes last. Ends with status 2 on a machine without CUDA, and 1 when something failed.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import epoch_time
import gpu_feeding
import gpu_training
import record
import torch
import tyro
from gpu_feeding import verdict

from fastflower import pack

Name = Literal["tests", "kernels", "feeding", "overlap", "epochs", "runs", "accuracy", "memory"]
SECONDS: dict[str, float] = {
    "tests": 240,
    "kernels": 120,
    "feeding": 240,
    "overlap": 240,
    "epochs": 120,
    "runs": 180,
    "accuracy": 240,
    "memory": 120,
}
"""After which a part begins nothing more; together 25 minutes."""
_GRACE = 60  # seconds until it is ended
_LEAST = 20  # seconds that a part is begun with

RUN_SECONDS, TRAIN_SECONDS = 20.0, 6.0  # of report A, process and training, the goals
RUNS = {"report A": ("report-a", 3), "report D, 25 epochs": ("report-d", 1), "report D, 50 epochs": ("report-d-50", 1)}


@dataclass(frozen=True)
class Place:
    """Where photographs lie, and shards of them that `prepare` makes."""

    data: Path
    """Class folders."""
    scratch: Path
    weights: Path | None = None
    """A ResNet-50 state_dict."""

    @property
    def all(self) -> Path:
        """Shards with one split, "train"."""
        return self.scratch / "all"

    @property
    def split(self) -> Path:
        """Shards with two."""
        return self.scratch / "split"

    @property
    def folders(self) -> Path:
        """The same split, as train/CLASS and val/CLASS."""
        return self.scratch / "folders"

    def prepare(self) -> None:
        pack(self.data, self.all, val_fraction=0)
        pack(self.data, self.split)
        epoch_time.split_folders(self.data, self.split, self.folders)


PARTS: dict[str, Callable[[record.Part, Place], None]] = {
    "tests": lambda part, _: tests(part, record.ROOT / "tests"),
    "kernels": lambda part, place: gpu_feeding.kernels(part, place.all),
    "feeding": lambda part, place: gpu_feeding.feeding(part, place.data, place.all),
    "overlap": lambda part, place: gpu_training.overlap(part, place.split),
    "epochs": lambda part, place: gpu_training.epochs(part, place.folders, place.split),
    "runs": lambda part, place: runs(part, place.split, place.scratch),
    "accuracy": lambda part, place: gpu_training.accuracy(part, place.data, place.weights, place.scratch),
    "memory": lambda part, place: gpu_training.memory(part, place.split),
}


def tests(part: record.Part, folder: Path) -> None:
    """The files with tests that are marked `gpu`: others may need packages that the machine lacks."""
    files = [str(path) for path in sorted(folder.glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", *files]

    def run() -> None:
        part.out.mkdir(parents=True, exist_ok=True)
        path = part.out / "pytest.txt"  # which stays where time runs out
        with path.open("w") as file:
            limit = part.ends - time.perf_counter() + _GRACE / 2
            how: dict[str, Any] = {
                "cwd": record.ROOT,
                "env": surroundings(),
                "stdout": file,
                "stderr": subprocess.STDOUT,
            }
            done = subprocess.run(command, timeout=limit, check=False, **how)
        said = path.read_text()
        lines = [line for line in said.splitlines() if line.strip()] or ["pytest said nothing"]
        part.found["said"] = lines[-1]
        if done.returncode:
            part.row("tests marked gpu", lines[-1].strip("= "))
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{said[-60_000:]}")
        part.row("tests marked gpu", lines[-1].strip("= "))

    part.attempt("tests", run)


def surroundings() -> dict[str, str]:
    """The environment of processes, in which fastflower is found."""
    paths = [str(record.ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def runs(
    part: record.Part,
    shards: Path,
    scratch: Path,
    *,
    chosen: dict[str, tuple[str, int]] = RUNS,
    flags: tuple[str, ...] = (),
) -> None:
    """Whole runs of tools/train.py, from the start of its process until its exit, with checkpoints and report. All from random
    weights: ResNet-18's pretrained ones are downloaded by torchvision, for which there may be no network.

    chosen  (recipe, n) by name. flags  for all of them.
    """
    for name, (recipe, count) in chosen.items():
        part.found[name] = []
        for number in range(count):
            what = f"{name}, run {number + 1}"
            arguments = [
                str(shards),
                "--recipe",
                recipe,
                "--weights",
                "None",
                "--out",
                str(scratch / f"{recipe}-{number}"),
            ]
            part.attempt(
                what, partial(_run, part, part.found[name], [*arguments, *flags], scratch / f"{recipe}-{number}")
            )
        done = part.found[name]
        if done:
            whole, train, val = ([run[key] for run in done] for key in ("seconds", "train_seconds", "val_seconds"))
            goals = (RUN_SECONDS, TRAIN_SECONDS) if recipe == "report-a" else (None, None)
            part.row(f"{name}, from random weights: process", seconds(whole, goals[0]))
            part.row(f"{name}: training", seconds(train, goals[1]))
            part.row(f"{name}: validation", seconds(val))
            part.row(f"{name}: best validation accuracy", f"{max(run['best_accuracy'] for run in done):.1%}")


def _run(part: record.Part, done: list[dict[str, Any]], arguments: list[str], out: Path) -> None:
    command = [sys.executable, str(record.ROOT / "tools" / "train.py"), *arguments]
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        limit = max(60.0, part.ends - start)
        try:
            how: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT, "env": surroundings()}
            status = subprocess.run(command, timeout=limit, check=False, **how).returncode
        except subprocess.TimeoutExpired:
            status = f"none: it was ended after {limit:.0f} s"
        taken = time.perf_counter() - start
        if status != 0 or not (out / "checkpoint-best.pt").exists():
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)}: status {status}\n{output.read()[-20_000:]}")
    with (out / "history.csv").open() as file:
        history = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    found: dict[str, Any] = {name: sum(row[name] for row in history) for name in ("train_seconds", "val_seconds")}
    best = max(row["val_accuracy"] for row in history)
    done.append({"seconds": taken, **found, "best_accuracy": best, "command": arguments, "history": history})


def seconds(times: list[float], goal: float | None = None) -> str:
    text = f"{statistics.median(times):.1f} s ({min(times):.1f} - {max(times):.1f}, n = {len(times)})"
    return text if goal is None else f"{text}; goal: under {goal:.0f} s, {verdict(statistics.median(times) < goal)}"


def do(name: str, out: Path, device: torch.device, place: Place, seconds: float) -> int:
    """One part, in this process; 1 when something of it failed."""
    module: Any = next(module for module in (sys.modules[__name__], gpu_feeding, gpu_training) if hasattr(module, name))
    clock = (getattr(module, name).__doc__ or "").partition("\n\n")[0]
    group = "state" if name in ("tests", "memory") else name  # eight files with the log
    part = record.Part(name, out, device, clock=clock, seconds=seconds, group=group)
    part.save()
    PARTS[name](part, place)
    part.save(finished=True)
    return 1 if part.failed else 0


def in_turn(
    out: Path, names: Sequence[str], command: Callable[[str, float], list[str]], limit: float
) -> tuple[list[tuple[str, str]], list[str]]:
    """(rows of all parts, those that failed). command(name, seconds) does a part in a process of its own."""
    ends, failed = time.perf_counter() + limit, []
    rows: list[tuple[str, str]] = []
    for name in names:
        start = time.perf_counter()
        seconds = min(SECONDS.get(name, limit), ends - start)
        if seconds < min(_LEAST, limit):
            rows.append((name, "LEFT OUT, out of time"))
            continue
        print(f"{name}:", flush=True)
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(command(name, seconds), stderr=errors, env=surroundings(), process_group=0)
            try:
                status = process.wait(seconds + _GRACE)
            except BaseException as error:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                status = f"none: it was ended after {seconds + _GRACE:.0f} s"
            errors.seek(0)
            said = errors.read().decode(errors="replace")[-20_000:]
        found = record.parts(out).get(name, {})
        rows += [tuple(row) for row in found.get("rows", [])]
        if status != 0:
            failed.append(name)
        if status != 0 and not (status == 1 and found.get("finished")):
            record.log(out, f"{name}: ended with status {status}", said)
            rows.append((name, "FAILED, see failures.log"))
        print(f"{name}: {time.perf_counter() - start:.0f} s, status {status}", flush=True)
    return rows, failed


def main(
    out: Annotated[Path, tyro.conf.Positional],
    data: Path | None = None,
    weights: Path | None = None,
    parts: tuple[Name, ...] = get_args(Name),
    limit: float = sum(SECONDS.values()),
    commit: str | None = None,
    only: Name | None = None,
    scratch: Path | None = None,
) -> int:
    """Run every GPU check.

    Args:
        out: Where JSON and the log of failures go.
        data: A folder of class folders; drawn flowers where it is left out.
        weights: A ResNet-50 state_dict to fine-tune; without, that part is left out.
        parts: Which, in their own order.
        limit: Seconds in all; a part that would begin later is left out.
        commit: Of the checkout, where there is no git to ask.
        only: Do this part in this process, over what --scratch holds; what the processes are started with.
        scratch: See only.
    """
    if not torch.cuda.is_available():
        print(f"no CUDA on this machine (torch {torch.__version__}): nothing was run")
        return 2
    record.COMMIT = commit or record.COMMIT
    if only and scratch and data:
        return do(only, out, torch.device("cuda", 0), Place(data, scratch, weights), limit)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        photographs = data.resolve() if data else room / "drawn"
        if data is None:
            subprocess.run([sys.executable, record.ROOT / "tools" / "draw_flowers.py", photographs], check=True)
        Place(photographs, room).prepare()
        print(f"prepared: {time.perf_counter() - begun:.0f} s", flush=True)

        def command(name: str, seconds: float) -> list[str]:
            given = ["--data", photographs, "--scratch", room, "--only", name, "--limit", seconds]
            given += ["--commit", record.COMMIT, *(["--weights", weights.resolve()] if weights else [])]
            return [sys.executable, __file__, *map(str, [out.resolve(), *given])]

        left = limit - (time.perf_counter() - begun)
        rows, failed = in_turn(out, [name for name in SECONDS if name in parts], command, left)
    print(f"\n{torch.cuda.get_device_name()}, {time.perf_counter() - begun:.0f} s")
    for name, value in rows:
        print(f"  {name:60} {value}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
