"""Translates torch and system errors that occur during training into fastflower errors."""

from collections.abc import Generator
from contextlib import contextmanager, suppress

import torch

from fastflower import distributed
from fastflower.errors import CheckpointError, DeviceError, FastflowerError, TrainingError
from fastflower.files import refusal
from fastflower.models.backbone import skeleton_of
from fastflower.models.checkpoint import LAST
from fastflower.models.defaults import complete
from fastflower.models.recomputation import bytes_per_image, recompute_blocks
from fastflower.recipes.recipe import Recipe
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
            f"batch_size {call.recipe.batch_size} does not fit in the memory of {device} ({said}); {_smaller(call, device)}"
        )
    if distributed.world_size() > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in said.lower()):
        return TrainingError(
            f"rank {distributed.rank()}: another rank failed ({said}); check its log. "
            f"To restart automatically, use torchrun --max-restarts with --resume. {resume}"
        )
    return None


def _smaller(call: Call, device: torch.device) -> str:
    """Return what to do about a batch that does not fit, and what to type, from the run's weights if it has saved any."""
    recipe, other = call.recipe, "lower augment.size (--augment.size)"
    with suppress(Exception):  # each network has its own
        if not recipe.checkpointing and not recipe.compile and recompute_blocks(skeleton_of(recipe.backbone)):
            other = f"keep fewer activations (--checkpointing, checkpointing=True), or {other}"
    factor, estimated = _factor(recipe, device)
    if factor == 1:
        return f"{other}."
    batch, accumulate = recipe.batch_size // factor, recipe.accumulate * factor
    how = "which should fit by an estimate" if estimated else "which may still be too much"
    smaller = f"batch_size={batch}, accumulate={accumulate}"
    smaller = f"--batch-size {batch} --accumulate {accumulate}" if call.typed else smaller
    return (
        f"try {smaller}, {how} and keeps the number of images per update, or {other}. "
        f"With the smaller batch:\n  {call.changed(batch_size=batch, accumulate=accumulate)}"
    )


def _factor(recipe: Recipe, device: torch.device) -> tuple[int, bool]:
    """Return by which power of two to divide the batch, 1 if it is odd; and whether the result fits by an estimate.

    The estimate leaves out temporary tensors and fragmentation, so it has to fit in 80% of the memory.
    """
    ranks, factor, room = distributed.world_size(), 1, _room(device)
    each = weights = 0
    with suppress(Exception):  # each network has its own
        recipe = complete(recipe, quiet=True)
        network = skeleton_of(recipe.backbone, size=recipe.augment.output_size)
        weights = (
            4 * 4 * sum(parameter.numel() for parameter in network.parameters())
        )  # gradients and Adam's moments too
        each = bytes_per_image(recipe) // (1 if recipe.precision == "float32" else 2)
    while recipe.batch_size % (2 * factor * ranks) == 0:
        factor *= 2
        if not each or room is None:
            return factor, False
        if weights + each * recipe.batch_size // (factor * ranks) <= 0.8 * room:
            return factor, True
    return factor, False


def _room(device: torch.device) -> int | None:
    """Return the bytes of a GPU that this process has or can get; None on the CPU, whose swap and other programs blur them."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
