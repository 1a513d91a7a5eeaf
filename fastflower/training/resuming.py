"""Which checkpoint a run resumes from, and refusals to resume with another recipe, fold or data."""

import logging
from dataclasses import replace
from pathlib import Path

from fastflower import distributed
from fastflower.errors import CheckpointError
from fastflower.loading.loader import Loader
from fastflower.models.checkpoint import LAST, Checkpoint
from fastflower.models.defaults import brief, complete, seen_as
from fastflower.training.command import Call

_log = logging.getLogger("fastflower")


def start_of(folder: Path) -> Checkpoint | None:
    """Load the checkpoint to resume from, if there is one. Raises CheckpointError if it differs between ranks."""
    place = folder / LAST
    start = Checkpoint.load(place) if place.exists() else None
    if len(set(distributed.gathered((start.epoch, start.step) if start else None))) > 1:
        raise CheckpointError(f"{place}: differs between ranks; set out to a folder that all machines share.")
    return start


def as_begun(call: Call, start: Checkpoint, *, recipe: bool) -> Call:
    """Return the call with the run's own recipe, unless `recipe` says that one was passed, and its own fold if it has none.

    Raises CheckpointError if the recipe or the fold differs from that of the run.
    """
    place = call.out / LAST
    if not recipe:
        call = replace(call, recipe=brief(start.recipe))
    if call.fold is None:
        call = replace(call, fold=start.fold)
    passed = complete(seen_as(call.recipe, start.recipe), quiet=True)
    if passed != start.recipe:
        what = f"{place}: was trained with {passed.differences(start.recipe)}; resume with that recipe, or pass none"
        if start.recipe.backbone != call.recipe.backbone:
            raise CheckpointError(f"{what}. To train the new one from its start:\n  {call.anew()}")
        raise CheckpointError(f"{what}. {_onward(call)}")
    if start.fold != call.fold:
        theirs = "without fold" if start.fold is None else f"with fold {start.fold}"
        remedy = "omit fold" if start.fold is None else f"pass fold={start.fold} (--fold {start.fold}), or omit it"
        # Not from its weights: they come from images that the other fold validates on.
        raise CheckpointError(
            f"{place}: was trained {theirs}, got fold {call.fold}; {remedy}. To train on other folds:\n  {call.anew()}"
        )
    return call


def require_same_data(start: Checkpoint, call: Call, train: Loader, val: Loader | None) -> None:
    """Raise CheckpointError if the checkpoint was trained or validated on other data than that of the loaders."""
    place, what = call.out / LAST, ""
    if start.classes != train.manifest.classes:
        theirs, ours = ", ".join(start.classes), ", ".join(train.manifest.classes)
        what = f"was trained on classes {theirs}, but these shards have {ours}; resume with the original shards"
    elif start.feeding["shards"] != train.state_dict()["shards"]:
        what = "was trained on other shards; resume with those"
    elif "val" in start.feeding and start.feeding["val"] != (val.state_dict()["shards"] if val else None):
        what = "was validated on a different val split; resume with the original shards"
    if what:
        raise CheckpointError(f"{place}: {what}. {_onward(call)}")


def warn_of_changes(start: Checkpoint, call: Call, now: dict[str, str]) -> None:
    """Warn about changes in the environment since the checkpoint that affect results."""
    then = start.environment
    for name in ("device", "precision", "threads", "torch", "ranks"):
        effect = "results will differ in the last bits"
        if name == "ranks" and not call.recipe.sync_batchnorm:
            effect += ", or more if batch norms are trained, because they see only their rank's part of a batch"
        if then.get(name) != now[name] and distributed.rank() == 0:
            _log.warning("%s: %s changed from %s to %s; %s", call.out / LAST, name, then.get(name), now[name], effect)


def _onward(call: Call) -> str:
    return f"To train on from its weights:\n  {call.onward()}"
