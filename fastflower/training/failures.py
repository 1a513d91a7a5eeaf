"""Translates torch and system errors that occur during training into fastflower errors."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from fastflower import distributed
from fastflower.errors import CheckpointError, DeviceError, FastflowerError, TrainingError
from fastflower.files import refusal
from fastflower.models.checkpoint import LAST
from fastflower.training.command import Call

_NO_MEMORY = ("t allocate memory", "out of memory")  # texts of torch's errors on the CPU and on CUDA


@contextmanager
def explaining(call: Call, device: torch.device) -> Generator[None]:
    """Translate the errors that are raised inside the block."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if explanation := _explained(error, call, device):
            raise explanation from error
        raise


@contextmanager
def resumable(call: Call) -> Generator[None]:
    """Add what to type to a CheckpointError that is raised inside the block, because a checkpoint could not be saved."""
    try:
        yield
    except CheckpointError as error:
        other = "" if (call.out / LAST).exists() else " (or pass another folder as out, --out)"
        raise CheckpointError(f"{error} To resume{other}, type:\n  {call.again(resume=True)}") from error


def _explained(error: Exception, call: Call, device: torch.device) -> FastflowerError | None:
    """Return the error to raise for exhausted memory, a file or disk problem, or a lost rank; None for other errors."""
    said = str(error).strip().partition("\n")[0]
    resume = f"To continue:\n  {call.again(resume=True)}"
    if refused := refusal(error, getattr(error, "filename", None) or "disk"):
        return refused
    if isinstance(error, OSError) and error.strerror:
        return TrainingError(
            f"{error.filename or 'disk'}: cannot be read or written ({error.strerror}); fix this. {resume}"
        )
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in said for text in _NO_MEMORY):
        return DeviceError(
            f"batch_size {call.recipe.batch_size} does not fit in the memory of {device} ({said}); halve batch_size and double "
            f"accumulate to keep the same updates, or lower augment.size.{_smaller(call)}"
        )
    if distributed.world_size() > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in said.lower()):
        return TrainingError(
            f"rank {distributed.rank()}: another rank failed ({said}); check its log. "
            f"To restart automatically, use torchrun --max-restarts with --resume. {resume}"
        )
    return None


def _smaller(call: Call) -> str:
    """Return what to type to train with half the batch size, from the run's weights if it has saved any."""
    recipe = call.recipe
    if recipe.batch_size % (2 * distributed.world_size()):
        return ""
    line = call.changed(batch_size=recipe.batch_size // 2, accumulate=2 * recipe.accumulate)
    return f" With half the batch:\n  {line}"
