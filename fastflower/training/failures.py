"""What torch and the system say when training fails, in the caller's words."""

import torch

from fastflower import distributed
from fastflower.errors import DeviceError, FastflowerError, TrainingError
from fastflower.files import refusal
from fastflower.recipes.recipe import Recipe


def explained(error: Exception, recipe: Recipe, device: torch.device) -> FastflowerError | None:
    """Our error for memory that ran out, for what the system refuses, as a full disk does, or for a rank that is gone."""
    said = str(error).strip().partition("\n")[0]
    if refused := refusal(error, getattr(error, "filename", None) or "disk"):
        return refused
    if isinstance(error, OSError) and error.strerror:
        return TrainingError(
            f"{error.filename or 'disk'}: cannot be read or written ({error.strerror}); fix that, then resume (--resume)."
        )
    if (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or "t allocate memory" in said
        or "out of memory" in said
    ):
        return DeviceError(
            f"batch_size {recipe.batch_size} does not fit the memory of {device} ({said}); halve batch_size and double "
            f"accumulate for the same updates, or lower augment.size."
        )
    if distributed.world_size() > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in said.lower()):
        return TrainingError(
            f"rank {distributed.rank()}: another rank is gone ({said}); look at its log. "
            f"torchrun --max-restarts with --resume goes on by itself."
        )
    return None
