"""Evaluation of a trained network on a split."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path

import numpy as np
import torch

from fastflower import progress
from fastflower.devices import precision_of, resolve_device
from fastflower.errors import ArgumentError, CheckpointError, boolean, require
from fastflower.loading.loader import Loader
from fastflower.models.backbone import on_device
from fastflower.models.checkpoint import Checkpoint, require_order
from fastflower.models.inference import measure, non_finite_outputs, view_of
from fastflower.models.metrics import Scores
from fastflower.models.trained_on import packs_of, warn_of_training_images
from fastflower.packing.source import shards_of
from fastflower.shards.manifest import Manifest
from fastflower.shards.mirror import Mirror
from fastflower.shards.remote import Remote, remote
from fastflower.suggestions import keywords

_log = logging.getLogger("fastflower")

_BATCH_SIZE = 64  # does not change the scores


@keywords
@progress.shown()
def evaluate(
    checkpoint: str | Path | Checkpoint,
    shards: str | Path | Remote,
    *,
    split: str | None = None,
    fold: int | None = None,
    tta: bool | None = None,
    device: str | torch.device | None = None,
) -> Scores:
    """Evaluate a checkpoint on every sample of a split exactly once.

    Args:
        checkpoint: A checkpoint written by `train`.
        shards: A folder of images, an archive or a table of labels, as `pack` takes them; or the shards that `pack` wrote, or
            their URL. The classes may be some of the checkpoint's, in any order. Images are packed once, into
            packs/NAME-HASH beside the checkpoint's run. A folder without splits is evaluated wholly, unless `train` drew a
            val split from it for this checkpoint. To choose options, pack first.
        split: The split to evaluate, such as "val" or "test". None means "val" if there is one, else the only split.
        fold: With shards that were packed with folds: "val" is this fold, and "train" all others. None uses the fold that
            the checkpoint was validated on.
        tta: Test-time augmentation: average the probabilities of each image and its horizontal flip. None uses the recipe's tta.
        device: None uses CUDA if available, otherwise the CPU.

    Returns the scores over the checkpoint's classes, with labels, probabilities and paths in the order of the split. Raises
    CheckpointError if the checkpoint cannot be used, or does not know a class of the shards, ArgumentError if there are
    several splits, none of them "val", and FolderError if a folder cannot be packed. Logs a warning if images of the
    training are evaluated unasked, or if a folder is evaluated wholly and nothing tells which images are.
    """
    rule = "a name, for example val, train or test"
    require(split is None or isinstance(split, str), "split", rule, split)  # pyright: ignore[reportUnnecessaryIsInstance]  (callers may be untyped)
    tta = None if tta is None else boolean("tta", tta)
    require_order(checkpoint, shards, lambda own, rest: f"evaluate({own!r}, {rest[0]!r})")
    name = "checkpoint"
    if not isinstance(checkpoint, Checkpoint):
        name, checkpoint = str(checkpoint), Checkpoint.load(checkpoint)
    chosen, recipe, passed = resolve_device(device), checkpoint.recipe, shards
    packs, trained = packs_of(checkpoint)
    refuse = partial(_refuse_unknown, shards.url if isinstance(shards, Remote) else str(shards), checkpoint)
    shards = shards_of(
        shards,
        packs,
        trained=checkpoint.feeding.get("shards"),
        as_split="test",
        fold=fold,
        accept=lambda images: refuse(images.classes),
    )
    source = remote(shards)
    manifest = Mirror.connect(source).manifest if source else Manifest.load(str(shards))
    refuse(manifest.classes)
    number_of = torch.tensor([checkpoint.classes.index(name) for name in manifest.classes])
    asked, split = split, split or _default_split(manifest)
    loader = Loader(
        shards,
        split,
        fold=_own_fold(checkpoint, manifest, split) if fold is None else fold,
        batch_size=_BATCH_SIZE,
        augment=view_of(recipe),
        device=chosen,
        dtype=precision_of(recipe.precision, chosen),
        # On CUDA, `cache` also selects the backend, which must be the same as in training. On the CPU, a cache would not help,
        # because each image is used only once.
        cache="auto" if chosen.type == "cuda" else None,
        shuffle=False,
    )
    _warn_of_folds(name, checkpoint, loader)
    given = Path(str(passed)) == Path(str(shards))
    warn_of_training_images(name, checkpoint, loader, trained, asked=asked is not None, given=given)
    model, number_of = on_device(checkpoint.network(), chosen), number_of.to(chosen)
    with progress.bar(loader, desc="evaluate", unit="batch") as batches:
        tta = recipe.tta if tta is None else tta
        labeled = (batch._replace(labels=number_of[batch.labels]) for batch in batches)
        scores = measure(model, labeled, checkpoint.classes, tta=tta, paths=loader.paths)
    if not isfinite(scores.loss):
        bad = np.flatnonzero(np.isnan(scores.probabilities[:, 0]))
        raise non_finite_outputs(name, scores.paths[int(bad[0])], len(bad))
    return replace(scores, split=split)


def _refuse_unknown(passed: str, checkpoint: Checkpoint, classes: Sequence[str]) -> None:
    """Raise CheckpointError if the checkpoint does not know one of the classes of the shards or images that were passed."""
    if unknown := [name for name in classes if name not in checkpoint.classes]:
        what = f"has the {'class' if len(unknown) == 1 else 'classes'} {', '.join(unknown)}"
        raise CheckpointError(
            f"{passed}: {what}, which the checkpoint was not trained on; pass shards or images with some or all of its "
            f"classes: {', '.join(checkpoint.classes)}."
        )


def _default_split(manifest: Manifest) -> str:
    """Return "val" if there is such a split or there are folds, else the only split. Raises ArgumentError if it is unclear."""
    full = [name for name, split in manifest.splits.items() if split.samples]
    if "val" in full or manifest.folds:
        return "val"
    if len(full) != 1:
        raise ArgumentError(f"split must be one of {', '.join(full)}, got None: {manifest.folder} has no val split.")
    return full[0]


def _own_fold(checkpoint: Checkpoint, manifest: Manifest, split: str) -> int | None:
    """Return the fold that the checkpoint was validated on, if any. Raises ArgumentError if these shards have other folds."""
    if checkpoint.fold is None or split not in ("train", "val"):
        return None
    if manifest.folds is None:
        return None
    if manifest.folds.sha256[:16] != checkpoint.feeding["folds"]:
        what = (
            f"because these shards have other folds than the checkpoint, which was trained with fold {checkpoint.fold}"
        )
        raise ArgumentError(f"fold must be from 0 to {manifest.folds.count - 1}, {what}; pass fold (--fold).")
    return checkpoint.fold


def _warn_of_folds(name: str, checkpoint: Checkpoint, loader: Loader) -> None:
    """Warn if the loader yields a fold that the checkpoint was trained on."""
    trained, evaluated = checkpoint.feeding, loader.state_dict()
    same = {key for key in ("shards", "folds", "fold") if trained.get(key) == evaluated.get(key)}
    if (
        loader.fold is not None
        and loader.split == "val"
        and same & {"shards", "folds"}
        and not same >= {"folds", "fold"}
    ):
        how = "on all folds" if checkpoint.fold is None else f"with fold {checkpoint.fold}"
        what = "it saw images of this fold, so the scores say little about new images"
        _log.warning("%s: was trained %s, but is evaluated on fold %d: %s", name, how, loader.fold, what)
