"""`torchrun_trainings.py SHARDS OUT`: two ranks train several recipes one after the other, and then by the command line.

Each rank writes into OUT what each recipe came to: a history and the number of steps, or the message of an error. Of the command
lines the first is refused, and in the others a rank is killed; the last ones' ranks are restarted, and their output is in
OUT/restarted.out and .err. OUT/codes.json has the ranks' exit codes.
"""

import json
import os
import shutil
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import train_and_die
from ranks import launch
from training_runs import LAST, RECIPE, flags, narrow_resnets, no_drawing

from fastflower import Recipe, train
from fastflower.errors import FastflowerError
from fastflower.files import locked
from fastflower.models import inference
from fastflower.training.run import Run

WEIGHTS = "weights.pth"  # in OUT, of a narrow ResNet-18, for the frozen stages
AVERAGED = replace(RECIPE, ema=0.9)  # batch norms' statistics differ by rank and are averaged too


def recipes(out: Path) -> dict[str, Recipe]:
    """Return the recipes to train, by name."""
    frozen = replace(RECIPE, freeze=4, weights=str(out / WEIGHTS))
    return {
        "frozen": frozen,
        "accumulated": replace(frozen, accumulate=2),
        "averaged": AVERAGED,
        "frozen soup": replace(frozen, soup=2),
        "soup": replace(RECIPE, soup=2, recalibrate=True),
        "signalled": RECIPE,  # SIGTERM in the second rank at its third step
        # SIGTERM in the second rank during validation; it has no part of the last batch
        "validating": replace(RECIPE, batch_size=4),
        "not divisible": replace(RECIPE, batch_size=15),
        "synchronous": replace(RECIPE, sync_batchnorm=True),
    }


def command(shards: str | Path, out: Path) -> list[str]:
    """The command line of a run whose averaged weights and batch norms' statistics must survive, too."""
    options = ["--resume", "--save-steps", "2", "--device", "cpu", *flags(AVERAGED)]
    return ["train", str(shards), "--out", str(out), *options]


def come_to(shards: str, recipe: Recipe, out: Path) -> dict[str, Any]:
    steps: list[bool] = []
    step = Run.step

    def counted(*values: Any, update: bool = True, **options: Any) -> Any:
        steps.append(update)
        if (out.name, dist.get_rank(), len(steps)) == ("signalled", 1, 3):
            signal.raise_signal(signal.SIGTERM)
        return step(*values, update=update, **options)

    def signalled(*values: Any, **options: Any) -> Any:
        if (out.name, dist.get_rank()) == ("validating", 1):
            signal.raise_signal(signal.SIGTERM)
        return log_probabilities(*values, **options)

    log_probabilities = inference.log_probabilities
    inference.log_probabilities = signalled
    Run.step = counted
    try:
        history = train(shards, recipe, out=out, resume=True, device="cpu").history
    except FastflowerError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        Run.step, inference.log_probabilities = step, log_probabilities
    return {"history": history, "steps": len(steps), "updates": sum(steps)}


def train_all(shards: str, place: str) -> None:
    """One rank."""
    # Ranks that wait for each other in vain end soon.
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    patch = pytest.MonkeyPatch()
    narrow_resnets(patch)
    no_drawing(patch)  # takes longer than a run
    out, rank = Path(place), dist.get_rank()
    for name, recipe in recipes(out).items():
        (out / f"{name} {rank}.json").write_text(json.dumps(come_to(shards, recipe, out / name)))
    # Another run holds the folder: only the first rank checks, and both fail.
    with locked(out / "held" / ".lock") if rank == 0 else nullcontext():
        dist.barrier()
        (out / f"held {rank}.json").write_text(json.dumps(come_to(shards, RECIPE, out / "held")))
    # Two machines without a shared folder: only one has the checkpoint.
    machine = out / f"machine {rank}"
    machine.mkdir()
    os.chdir(machine)
    if rank == 0:
        Path("run").mkdir()
        shutil.copy(out / "frozen" / LAST, "run")
    dist.barrier()
    (out / f"apart {rank}.json").write_text(json.dumps(come_to(shards, recipes(out)["frozen"], Path("run"))))
    dist.destroy_process_group()


def redirected(place: str, *arguments: str) -> None:
    """One rank, with its output in files, without figures."""
    no_drawing(pytest.MonkeyPatch())
    for number, suffix in ((1, "out"), (2, "err")):
        with Path(place, f"restarted.{suffix}").open("ab") as file:
            os.dup2(file.fileno(), number)
    train_and_die.main(*arguments)


def main(shards: str, place: str) -> None:
    out = Path(place)
    restarted = ["SIGKILL", "step", "8", *command(shards, out / "restarted")]  # the second epoch's third step
    codes = {
        "trained": launch(2, train_all, shards, place),
        "refused": launch(2, train_and_die.run, *command(shards, out / "refused"), "--batch-size", "15", polls=2),
        "killed": launch(2, train_and_die.main, "SIGKILL", "step", "4", *command(shards, out / "killed"), polls=2),
        "restarted": launch(2, redirected, place, *restarted, restarts=1),
    }
    (out / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
