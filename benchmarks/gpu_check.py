"""Run every check that needs a machine with CUDA: python benchmarks/gpu_check.py OUT --data FOLDER [--lease a]

Each part runs in a process of its own with a time limit, so that a failure affects no other part, even if a kernel
leaves the GPU unusable. Saves figures in OUT/gpu_LEASE_CHIP_DATE.json after each row and errors in OUT/failures.log,
and prints a table at the end. Exits with status 2 on a machine without CUDA and 1 if something failed. `--device cpu`
tries the check itself at tiny sizes and says what it skipped.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from common import gpu_dali, gpu_loading, gpu_part, gpu_smoke, gpu_training, record
from common.gpu_part import Part, Place
from common.images import drawn

PARTS: dict[str, Callable[..., object]] = {
    "facts": gpu_smoke.facts,
    "smoke": gpu_smoke.smoke,
    "kernels": gpu_loading.kernels,
    "loading": gpu_loading.loading,
    "overlap": gpu_training.overlap,
    "runs": gpu_training.runs,
    "tests": gpu_smoke.run_tests,
    "profile": gpu_training.profile,
    "epochs": gpu_training.epochs,
    "compile": gpu_training.compiled,
    "accuracy": gpu_training.accuracy,
    "probe": gpu_dali.probe,
    "engine": gpu_dali.engine,
    "dali_0": gpu_dali.without_engine,
    "dali_1": gpu_dali.with_engine,
    "kept": gpu_dali.kept,
    "dali_tests": gpu_dali.run_tests,
}
PREPARING = 20.0  # seconds
LEASES: dict[str, dict[str, float]] = {
    "a": {
        "facts": 15,
        "smoke": 60,
        "kernels": 35,
        "loading": 75,
        "overlap": 65,
        "runs": 30,
        "tests": 75,
        "profile": 15,
        "epochs": 25,
        "compile": 65,
    },
    "b": {"facts": 15, "probe": 50, "engine": 30, "dali_0": 60, "dali_1": 50, "kept": 45, "dali_tests": 90},
}
"""Seconds for each part. Lease "a" needs no DALI and takes 480 s, its headline figures 300 s; lease "b" takes 360 s.
Time that a part does not use goes to the next one."""
AT_LEISURE: dict[str, float] = {**dict.fromkeys(PARTS, 300.0), "accuracy": 900.0}
"""Seconds for each part without a lease."""
ENDS_THE_CALL = "smoke"  # if it fails, the others would fail for the same reason
_LEAST = 5.0  # seconds; a part with less time left does not start
_RESERVE = 4.0  # seconds, or a tenth of a part's time if more, at its end in which no round starts


def do(name: str, out: Path, device: torch.device, place: Place, *, file: str, ends: float) -> int:
    """Run one part in this process until the deadline `ends`, in perf_counter time. Return 1 if any of it failed."""
    run = PARTS[name]
    clock = (run.__doc__ or "").partition("\n\n")[0]
    left = ends - time.perf_counter()
    part = Part(name, out, device, file=file, clock=clock, seconds=left - max(_RESERVE, left / 10))
    part.save()
    tiny = TINY.get(name, {}) if device.type == "cpu" else {}
    part.each({name: lambda: run(part, place, **tiny)})
    part.save(finished=True)
    return 1 if part.failed else 0


def in_turn(
    out: Path, slots: Mapping[str, float], command: Callable[[str, float], Sequence[str]], begun: float
) -> tuple[list[tuple[str, str]], list[str]]:
    """Run the parts one after the other, and return (rows of all parts, names of those that failed).

    Args:
        out: Where the parts save their results.
        slots: Seconds for each part, from `begun` on. Unused time goes to the next part; a part that runs longer is killed.
        command: Called with (name, ends). Returns the command that runs a part in a process of its own.
        begun: When the first slot starts, in perf_counter time.
    """
    rows: list[tuple[str, str]] = []
    failed: list[str] = []
    ends = begun
    for name, slot in slots.items():
        start, ends = time.perf_counter(), ends + slot
        if ends - start < min(_LEAST, slot):
            rows.append((name, "SKIPPED, out of time"))
            continue
        print(f"{name}:", flush=True)
        status, stderr = _run_limited(command(name, ends), ends - start)
        found = gpu_part.parts(out).get(name, {})
        rows += found.get("rows", {}).items()
        if status != 0:
            failed.append(name)
        if status != 0 and not (status == 1 and found.get("finished")):
            gpu_part.log(out, f"{name}: ended with status {status}", stderr)
            rows.append((name, f"FAILED with status {status}, see failures.log"))
        elif stderr.strip():  # warnings of a part that succeeded
            gpu_part.log(out, f"{name}: wrote to stderr", stderr[-4000:])
        print(f"{name}: {time.perf_counter() - start:.0f} s, status {status}", flush=True)
        if name == ENDS_THE_CALL and isinstance(status, int) and status != 0:  # a timeout is no failure
            print((out / "failures.log").read_text(), flush=True)
            rows.append(("remaining parts", f"SKIPPED, because {name} failed"))
            break
    return rows, failed


def _run_limited(command: Sequence[str], seconds: float) -> tuple[int | str, str]:
    """Run a process, and kill it after `seconds`. Return (exit status, end of its stderr)."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stderr=errors, env=gpu_smoke.child_environment(), process_group=0)
        try:
            status: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"none: timed out after {seconds:.0f} s"
        finally:  # its children too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        errors.seek(0)
        return status, errors.read().decode(errors="replace")[-20_000:]


TINY: dict[str, dict[str, Any]] = {
    **gpu_smoke.TINY,
    **gpu_loading.TINY,
    **gpu_training.TINY,
    **gpu_dali.TINY,
}
"""Arguments of the parts without a GPU."""


def main(
    out: Annotated[Path, tyro.conf.Positional],
    data: Path | None = None,
    weights: Path | None = None,
    lease: Literal["a", "b"] | None = None,
    parts: tuple[str, ...] = (),
    device: Literal["cuda", "cpu"] = "cuda",
    commit: str | None = None,
    only: str | None = None,
    scratch: Path | None = None,
    ends: float = 0,
) -> int:
    """Run the GPU checks.

    Args:
        out: Folder for the JSON and failures.log.
        data: Folder of class folders; by default, draws flowers.
        weights: A ResNet-50 state_dict to fine-tune; without it, the part "accuracy" is skipped.
        lease: "a" runs what needs no DALI in 480 seconds, "b" what needs it in 360; None runs everything with more time.
        parts: Run only these parts.
        device: "cpu" tries the check's own code without a GPU.
        commit: The checkout's commit, if git cannot be asked.
        only: Internal: run this part in this process on the images in --scratch.
        scratch: See --only.
        ends: See --only: the part's deadline in perf_counter time, which all processes share on Linux.
    """
    begun = time.perf_counter()
    if device == "cuda" and not torch.cuda.is_available():
        print(
            f"no CUDA on this machine (torch {torch.__version__}): nothing was run; pass --device cpu to try the check itself"
        )
        return 2
    unknown = [name for name in (*parts, *([only] if only else [])) if name not in PARTS]
    if unknown:
        print(f"--parts: there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
        return 2
    record.COMMIT = commit or record.COMMIT
    file = f"gpu_{lease or 'check'}"
    where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    if only and scratch and data:
        return do(only, out, where, Place(data, scratch, weights), file=file, ends=ends)
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    out.mkdir(parents=True, exist_ok=True)
    slots = LEASES[lease] if lease else AT_LEISURE
    slots = {name: slot for name, slot in slots.items() if not parts or name in parts}
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        images = data.resolve() if data else drawn(room / "drawn")
        Place(images, room).prepare(*((20, 20) if device == "cpu" else ()))
        print(f"prepared: {time.perf_counter() - begun:.0f} s", flush=True)

        def command(name: str, ends: float) -> list[str]:
            given = ["--data", images, "--scratch", room, "--only", name, "--ends", ends, "--device", device]
            given += ["--commit", record.COMMIT, *(["--weights", weights.resolve()] if weights else [])]
            given += ["--lease", lease] if lease else []
            return [sys.executable, "-X", "faulthandler", *map(str, [__file__, out.resolve(), *given])]

        rows, failed = in_turn(out, slots, command, begun + PREPARING if lease else time.perf_counter())
    chip = torch.cuda.get_device_name() if device == "cuda" else "no GPU: the figures of a trial mean nothing"
    print(f"\n{chip}, commit {record.COMMIT}, {time.perf_counter() - begun:.0f} s")
    for name, value in rows:
        print(f"  {name:60} {value}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
