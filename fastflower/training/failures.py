"""Translates torch and system errors that occur during training into fastflower errors."""

import torch

from fastflower import distributed
from fastflower.errors import DeviceError, FastflowerError, TrainingError
from fastflower.files import refusal
from fastflower.recipes.recipe import Recipe

_NO_MEMORY = ("t allocate memory", "out of memory")  # texts of torch's errors on the CPU and on CUDA


def explained(error: Exception, recipe: Recipe, device: torch.device) -> FastflowerError | None:
    """Return the error to raise for exhausted memory, a file or disk problem, or a lost rank; None for other errors."""
    said = str(error).strip().partition("\n")[0]
    if refused := refusal(error, getattr(error, "filename", None) or "disk"):
        return refused
    if isinstance(error, OSError) and error.strerror:
        return TrainingError(
            f"{error.filename or 'disk'}: cannot be read or written ({error.strerror}); fix this, "
            f"then pass resume=True (--resume)."
        )
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in said for text in _NO_MEMORY):
        return DeviceError(
            f"batch_size {recipe.batch_size} does not fit in the memory of {device} ({said}); halve batch_size and double "
            f"accumulate to keep the same updates, or lower augment.size."
        )
    if distributed.world_size() > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in said.lower()):
        return TrainingError(
            f"rank {distributed.rank()}: another rank failed ({said}); check its log. "
            f"To restart automatically, use torchrun --max-restarts with --resume."
        )
    return None
