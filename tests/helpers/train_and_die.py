"""Run a subcommand and send it a signal at a given moment: python train_and_die.py SIGNAL WHERE CALL COMMAND ARGUMENT ...

CALL counts from 1. With WHERE "step", the signal comes before that training step; with "write", when that checkpoint is
half written. With torchrun, only the second rank gets the signal, and only before its first restart. ResNets are
narrow.
"""

import io
import os
import runpy
import signal
import sys
from itertools import count
from typing import Any

import pytest
import torch
from training_runs import narrow_resnets

from fastflower.training.run import Run


def main(name: str, where: str, call: str, *arguments: str) -> None:
    doomed = os.environ.get("RANK", "1") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    calls = count(1)
    step, save = Run.step, torch.save

    def die() -> None:
        os.kill(os.getpid(), signal.Signals[name])

    def dying_step(*values: Any, **options: Any) -> Any:
        if next(calls) == int(call):
            die()
        return step(*values, **options)

    def dying_save(content: Any, file: Any) -> None:
        if next(calls) == int(call):
            whole = io.BytesIO()
            save(content, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            die()
        save(content, file)

    if doomed and where == "step":
        Run.step = dying_step
    elif doomed:
        torch.save = dying_save
    run(*arguments)


def run(*arguments: str) -> None:
    """`python -m fastflower ARGUMENT ...` with narrow ResNets."""
    narrow_resnets(pytest.MonkeyPatch())
    sys.argv = ["fastflower", *arguments]
    runpy.run_module("fastflower", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
