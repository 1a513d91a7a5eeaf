"""Trains a network on shards according to a recipe."""

import logging
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fastflower import distributed, progress
from fastflower.devices import environment, resolve_device
from fastflower.errors import ArgumentError, FolderError, StoppedError, boolean, integer
from fastflower.models.backbone import require_network
from fastflower.models.checkpoint import Checkpoint
from fastflower.models.defaults import complete, network_of
from fastflower.models.recomputation import require_options
from fastflower.models.sizes import require_sizes
from fastflower.packing.folder import Folder
from fastflower.packing.source import PACKS, shards_of
from fastflower.recipes.flags import changes, nearest
from fastflower.recipes.keywords import call_meant
from fastflower.recipes.presets import checked
from fastflower.recipes.recipe import Recipe
from fastflower.reporting.record import recorded
from fastflower.reporting.report import Report
from fastflower.shards.remote import Remote, remote
from fastflower.suggestions import Params, Result, keywords
from fastflower.training.command import Call, to_resume
from fastflower.training.failures import explaining
from fastflower.training.resuming import as_begun, start_of
from fastflower.training.run import Run
from fastflower.training.run_folder import own, run_folder
from fastflower.training.stopping import TerminatedError, preemption, stopped_by

_log = logging.getLogger("fastflower")


def _checked(call: Callable[Params, Result]) -> Callable[Params, Result]:
    return keywords(call, call_meant)


@_checked
@progress.shown()
def train(
    shards: str | Path | Remote,
    recipe: Recipe | str | None = None,
    *,
    fold: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save_steps: int | None = None,
    device: str | torch.device | None = None,
) -> Report:
    """Train on the train split, validate on the val split after every epoch, and write checkpoints, a history and a report.

    On one machine with the same number of threads, the same recipe and shards give the same history, even if the run is
    interrupted and resumed. After SIGTERM, the run saves a checkpoint and stops. Under torchrun, the ranks split each batch.

    Args:
        shards: A folder of images, an archive or a table of labels, as `pack` takes them; or the shards that `pack` wrote, or
            their URL. Images are packed once, with the defaults of `pack`, into packs/NAME-HASH beside the run's folder, and
            again only if their files change. To choose options, pack first.
        recipe: What to train, and how, also by name, such as "scratch". None uses the default, or the run's own with `resume`.
        fold: With shards that have folds: the fold to validate on, from 0; the others are for training. None uses the run's
            own with `resume`.
        out: The run's folder. None uses the first unused folder of runs/BACKBONE, runs/BACKBONE-2, ...
        resume: Continue the run in `out` from its last checkpoint, or start it if there is none.
        save_steps: Number of updates between extra checkpoints within an epoch, for epochs that take hours.
        device: None uses CUDA if available, otherwise the CPU.

    Returns the report of the run. Raises ShardError, FolderError, CheckpointError, ArgumentError or DeviceError before any
    training.
    Raises StoppedError after SIGTERM, TrainingError if a loss is not finite or a rank fails, DeviceError if memory runs out,
    and CheckpointError or TrainingError if the disk is full.

    Example:
        >>> from fastflower import Augment, Recipe, train
        >>> recipe = Recipe(weights=None, augment=Augment(size=32, flip=0.5), epochs=1, batch_size=24)
        >>> report = train("shards", recipe, out="runs/small", device="cpu")
        >>> len(report.history), report.scores.num_samples
        (1, 30)
        >>> sorted(path.name for path in report.folder.glob("*.pt"))
        ['checkpoint-best.pt', 'checkpoint-last.pt']
    """
    _require_place(shards)
    given, recipe = recipe is not None, checked(recipe)
    resume = boolean("resume", resume)
    save_steps = None if save_steps is None else integer("save_steps", save_steps, 1)
    with (
        distributed.process_group(device),
        torch.random.fork_rng(range(torch.cuda.device_count())),  # pyright: ignore[reportUnknownMemberType]  (untyped)
    ):
        chosen = resolve_device(device)
        folder = distributed.of_first_rank(partial(run_folder, out, recipe.backbone, resume=resume))
        call = Call(shards=shards, recipe=recipe, fold=fold, out=folder, save_steps=save_steps, device=device)
        run = None
        try:
            with preemption() as stop, explaining(call, chosen), own(call, new=out is None, resume=resume):
                start = start_of(folder) if resume else None
                call = as_begun(call, start, recipe=given) if start else call
                recipe = _possible(start.recipe if start else call.recipe, start)
                found = _shards_of(call, recipe, start)
                with explaining(call, chosen):
                    run = Run(
                        found,
                        recipe,
                        folder,
                        chosen,
                        start,
                        fold=call.fold,
                        save_steps=save_steps,
                        stop=stop,
                        call=call,
                    )
                    facts = _facts(run, call, found, start)
                    with recorded(folder, *facts, resume=resume) as record, explaining(call, chosen), _described(run):
                        stop.begun = True
                        report = run.train(record)
        except KeyboardInterrupt as stopped:
            how = stopped_by(stopped)
            told = (
                run.stopped(how) if run else f"{folder}: {how} before training began. {call.again_told(resume=resume)}"
            )
            if isinstance(stopped, TerminatedError):
                raise StoppedError(told) from None
            stopped.args = (told,)
            if distributed.rank() == 0:
                _log.warning("%s", told)
            raise
        if distributed.rank() == 0:
            progress.tell("train", report.last_lines())
        return report


@contextmanager
def _described(run: Run) -> Generator[None]:
    """Describe a KeyboardInterrupt, for run.json."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        stopped.args = (run.stopped(stopped_by(stopped)),)
        raise


def _require_place(shards: object) -> None:
    """Raise ArgumentError if what is passed in place of the shards is a recipe, or a run."""
    if isinstance(shards, Recipe):
        raise ArgumentError("shards come first: train(shards, recipe).")
    if isinstance(shards, str | Path) and (command := to_resume(Path(shards))):
        raise ArgumentError(f"{shards}: is a run; pass images, or shards. To continue this run:\n  {command}")


def _shards_of(call: Call, recipe: Recipe, start: Checkpoint | None) -> str | Path | Remote:
    """Return the shards to train on. Images are packed after the network could be built: then the weights are at hand."""
    trained = start and start.feeding.get("shards")

    def accept(images: Folder) -> None:
        _require_training(images, recipe.batch_size)
        network_of(recipe, images.classes, resumed=start is not None, quiet=True)

    return shards_of(call.shards, call.out.parent / PACKS, trained=trained, fold=call.fold, accept=accept)


def _require_training(images: Folder, batch_size: int) -> None:
    """Raise an error, before anything is packed, if a folder has no train split, or too few images for a batch."""
    if images.splits and "train" not in images.splits:
        what = (
            f"has no train split; it can be evaluated ({', '.join(images.splits)}), but training needs training images"
        )
        raise FolderError(f"{images.root}: {what}.")
    count = int((images.files["split"] == images.splits.index("train")).sum()) if images.splits else len(images)
    if batch_size > count:
        what = f"the batch of {batch_size} samples exceeds the {count} images for training in {images.root}"
        raise ArgumentError(f"batch_size: {what}; lower batch_size (--batch-size {max(1, count // 2)}).")


def _possible(recipe: Recipe, start: Checkpoint | None) -> Recipe:
    """Return the complete recipe. Raises, before anything is packed, if the network cannot be built or take the images."""
    if recipe.freeze and recipe.weights is None and start is None:
        raise ArgumentError(
            f"freeze must be 0 when weights is None, got {recipe.freeze}: frozen stages would stay random; "
            f"pass --freeze 0 (freeze=0), or weights to start from (--weights FILE, weights=FILE)."
        )
    require_network(recipe.backbone, None if start else recipe.weights)
    recipe = complete(recipe)
    require_sizes(recipe)
    require_options(recipe)
    return recipe


def _facts(
    run: Run, call: Call, found: str | Path | Remote, start: Checkpoint | None
) -> tuple[dict[str, object], dict[str, object]]:
    """Return what run.json says about the run, and about this session. found  The shards that it uses."""
    pack = replace(call, shards=found).address
    preset = nearest(call.recipe)
    splits = {"train": run.loader, "val": run.val}
    data = {
        "shards": call.address,
        "pack": pack if remote(found) else os.path.abspath(pack),  # noqa: PTH100  (Path.absolute keeps ..)
        "fold": call.fold,
        "classes": len(run.classes),
        "samples": {name: loader.num_samples if loader else 0 for name, loader in splits.items()},
        "identity": {name: loader.state_dict()["shards"] if loader else None for name, loader in splits.items()},
    }
    recipe = {"preset": preset, "changes": changes(call.recipe, preset), "resolved": run.recipe.to_dict()}
    facts: dict[str, object] = {"command": call.command(), "recipe": recipe, "epochs": call.recipe.epochs, "data": data}
    session: dict[str, object] = {
        "resumed_from": {"epoch": start.epoch, "step": start.step} if start else None,
        "started_from": "command line" if call.typed else "Python",
        "environment": environment(run.device, run.precision),
    }
    return facts, session
