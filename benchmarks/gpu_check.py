"""Everything that a machine with CUDA is asked to show: python benchmarks/gpu_check.py OUT --data FOLDER [--lease a]

Each part runs in a process of its own until its time is up, so that none costs the others, not even by a kernel that leaves the
GPU unusable. Its figures are in OUT/gpu_LEASE_CHIP_DATE.json after each row, what fails in OUT/failures.log, and a table comes
last. Ends with status 2 on a machine without CUDA, and 1 when something failed. `--device cpu` tries the check itself, at tiny
sizes, and says what it could not do.
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
    "feeding": gpu_loading.feeding,
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
        "feeding": 75,
        "overlap": 65,
        "runs": 30,
        "tests": 75,
        "profile": 15,
        "epochs": 25,
        "compile": 65,
    },
    "b": {"facts": 15, "probe": 50, "engine": 30, "dali_0": 60, "dali_1": 50, "kept": 45, "dali_tests": 90},
}
"""Seconds of each part: the first needs no DALI and takes 480 s in all, its headline figures 300; the second 360. What a part
leaves of its time goes to the next."""
AT_LEISURE: dict[str, float] = {**dict.fromkeys(PARTS, 300.0), "accuracy": 900.0}
"""Without a lease."""
ENDS_THE_CALL = "smoke"  # where it fails, the others would only fail for the same reason
_LEAST = 5.0  # seconds that a part is begun with
_RESERVE = 4.0  # seconds at a part's end, or a tenth of its time, in which it begins no further round


def do(name: str, out: Path, device: torch.device, place: Place, *, file: str, ends: float) -> int:
    """One part, in this process, which is ended at `ends`, of perf_counter; 1 when something of it failed."""
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
    """(rows of all parts, those that failed). command(name, ends) does a part in a process of its own.

    slots  The seconds of each part, one after another from `begun`, of perf_counter, on: what a part leaves of its time goes to
    the next, and one that would go over its time is ended.
    """
    rows: list[tuple[str, str]] = []
    failed: list[str] = []
    ends = begun
    for name, slot in slots.items():
        start, ends = time.perf_counter(), ends + slot
        if ends - start < min(_LEAST, slot):
            rows.append((name, "LEFT OUT, out of time"))
            continue
        print(f"{name}:", flush=True)
        status, said = _ended(command(name, ends), ends - start)
        found = gpu_part.parts(out).get(name, {})
        rows += found.get("rows", {}).items()
        if status != 0:
            failed.append(name)
        if status != 0 and not (status == 1 and found.get("finished")):
            gpu_part.log(out, f"{name}: ended with status {status}", said)
            rows.append((name, f"FAILED with status {status}, see failures.log"))
        elif said.strip():  # what went well may have warned
            gpu_part.log(out, f"{name}: said", said[-4000:])
        print(f"{name}: {time.perf_counter() - start:.0f} s, status {status}", flush=True)
        if name == ENDS_THE_CALL and isinstance(status, int) and status != 0:  # slow is no failure
            print((out / "failures.log").read_text(), flush=True)
            rows.append(("all that follows", f"LEFT OUT, since {name} failed"))
            break
    return rows, failed


def _ended(command: Sequence[str], seconds: float) -> tuple[int | str, str]:
    """(exit status, the end of what it wrote to stderr) of a process that is ended when its time is up."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stderr=errors, env=gpu_smoke.surroundings(), process_group=0)
        try:
            status: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"none: it was ended after {seconds:.0f} s"
        finally:  # with all that it started
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
"""Arguments of the parts where there is no GPU."""


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
        out: Where the JSON and the log of failures go.
        data: A folder of class folders; drawn flowers where it is left out.
        weights: A ResNet-50 state_dict to fine-tune; without, the part "accuracy" is left out.
        lease: "a" runs what needs no DALI in 480 seconds, "b" what needs it in 360; None runs all, without haste.
        parts: Run only these.
        device: "cpu" tries the check's own code where there is no GPU.
        commit: Of the checkout, where there is no git to ask.
        only: Do this part in this process, over what --scratch holds; what the processes are started with.
        scratch: See only.
        ends: When that part is ended, of perf_counter, which all processes of Linux share.
    """
    begun = time.perf_counter()
    if device == "cuda" and not torch.cuda.is_available():
        print(
            f"no CUDA on this machine (torch {torch.__version__}): nothing was run; --device cpu tries the check itself"
        )
        return 2
    unknown = [name for name in (*parts, *([only] if only else [])) if name not in PARTS]
    if unknown:
        print(f"--parts: there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
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
    chip = torch.cuda.get_device_name() if device == "cuda" else "no GPU: figures of a trial mean nothing"
    print(f"\n{chip}, commit {record.COMMIT}, {time.perf_counter() - begun:.0f} s")
    for name, value in rows:
        print(f"  {name:60} {value}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
