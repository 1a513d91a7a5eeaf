"""Trains a recipe on shards."""

from pathlib import Path

import torch

from fastflower import distributed
from fastflower.devices import resolve_device
from fastflower.errors import ArgumentError, CheckpointError, require
from fastflower.models.checkpoint import LAST, Checkpoint
from fastflower.recipes.recipe import Recipe
from fastflower.reporting.report import Report
from fastflower.shards.remote import Remote
from fastflower.training.failures import explained
from fastflower.training.run import Run
from fastflower.training.run_folder import own, run_folder
from fastflower.training.tally import preemption


def train(
    shards: str | Path | Remote,
    recipe: Recipe = Recipe(),  # noqa: B008  (frozen)
    *,
    out: str | Path | None = None,
    resume: bool = False,
    save_steps: int | None = None,
    device: str | torch.device | None = None,
) -> Report:
    """Train on split "train", score split "val" after every epoch, and write checkpoints, history and report.

    On one machine, with the same number of threads, the same recipe and shards give the same history, also when training
    was interrupted and resumed. SIGTERM saves after the step under way. Under torchrun the ranks share each batch.

    Args:
        shards: The folder that `pack` wrote, or its address, as for Loader.
        recipe: What to train, and how.
        out: The folder of the run; None takes the first of runs/BACKBONE, runs/BACKBONE-2, ... that is free.
        resume: Go on where the run in `out` was saved last; a run without a checkpoint starts afresh.
        save_steps: Also save after so many updates of an epoch, for epochs that take hours.
        device: None means CUDA where there is one, else the CPU.

    Raises ShardError, CheckpointError, ArgumentError or DeviceError before anything is written; later StoppedError after
    SIGTERM, TrainingError for a loss that is not finite or a rank that is gone, DeviceError when memory runs out, and
    CheckpointError or TrainingError when the disk is full.

    Example:
        >>> from fastflower import Augment, Recipe, train
        >>> recipe = Recipe(weights=None, augment=Augment(size=32, flip=0.5), epochs=1, batch_size=24)
        >>> report = train("shards", recipe, out="runs/small", device="cpu")
        >>> len(report.history), report.scores.num_samples
        (1, 30)
        >>> sorted(path.name for path in report.folder.glob("*.pt"))
        ['checkpoint-best.pt', 'checkpoint-last.pt']
    """
    rule = "a Recipe, such as fastflower.recipes.presets.PRESETS['finetune']() makes one"
    require(isinstance(recipe, Recipe), "recipe", rule, recipe)  # pyright: ignore[reportUnnecessaryIsInstance]
    require(save_steps is None or save_steps >= 1, "save_steps", "at least 1", save_steps)
    with (
        distributed.process_group(device),
        torch.random.fork_rng(range(torch.cuda.device_count())),  # pyright: ignore[reportUnknownMemberType]  (untyped)
        preemption() as stop,
    ):
        chosen = resolve_device(device)
        try:
            folder = distributed.gathered(run_folder(out, recipe.backbone, resume=resume))[0]
            with own(folder, new=out is None, resume=resume):
                start = _resumed(folder, recipe) if resume else None
                if recipe.freeze and recipe.weights is None and start is None:
                    raise ArgumentError(
                        f"freeze must be 0 where weights is None, got {recipe.freeze}: frozen stages would stay random; "
                        f"pass --freeze 0 (freeze=0), or --weights FILE (weights=) to start from."
                    )
                return Run(shards, recipe, folder, chosen, start, save_steps=save_steps, stop=stop).train()
        except (RuntimeError, MemoryError, OSError) as error:
            if explanation := explained(error, recipe, chosen):
                raise explanation from error
            raise


def _resumed(folder: Path, recipe: Recipe) -> Checkpoint | None:
    """What a run goes on from, where it was saved. Raises CheckpointError where that is of another recipe."""
    start = Checkpoint.load(folder / LAST) if (folder / LAST).exists() else None
    if len(set(distributed.gathered((start.epoch, start.step) if start else None))) > 1:
        raise CheckpointError(
            f"{folder / LAST}: ranks found different ones; let out be a folder that all machines share."
        )
    if start and start.recipe.resolved != recipe.resolved:
        raise CheckpointError(
            f"{folder / LAST}: was trained with {recipe.differences(start.recipe)}; resume with that, or name "
            f"another out, which may start from this file (weights)."
        )
    return start
