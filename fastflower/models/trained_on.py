"""Which images a checkpoint was trained on, so that scores on these are not taken for scores on new images."""

import json
import logging
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastflower.loading.loader import Loader
from fastflower.models.checkpoint import LAST, Checkpoint
from fastflower.models.weights_file import BEST
from fastflower.packing.source import PACKS, RUNS, trained_pack
from fastflower.shards.manifest import Manifest

_log = logging.getLogger("fastflower")


def packs_of(checkpoint: Checkpoint) -> tuple[Path, Path | None]:
    """Return the folder for packs beside a checkpoint's run, and the pack that the checkpoint was trained on, if it is known.

    A file outside a run's folder, and a checkpoint that was not loaded from a file, use runs/packs.
    """
    file = checkpoint.file
    files = [Path(os.path.realpath(file)), file.absolute()] if file else []  # whichever of them the run was given as
    places = [
        path.parent.parent / PACKS for path in files if any((path.parent / name).exists() for name in (BEST, LAST))
    ]
    places = [*dict.fromkeys([*places, RUNS])]
    trained = checkpoint.feeding.get("shards")
    found = {place: pack for place in places if (pack := trained_pack(place.glob("*"), trained))}
    if found:
        return next(iter(found.items()))
    return places[0], trained_pack([shards for path in files if (shards := _recorded(path.parent))], trained)


def _recorded(run: Path) -> Path | None:
    """Return the shards that a run's run.json names, or None."""
    try:
        data = json.loads((run / "run.json").read_text("utf-8"))["data"]
        return Path(data.get("pack") or data["shards"])  # runs of older versions name no pack
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def warn_of_training_images(
    name: str, checkpoint: Checkpoint, loader: Loader, trained: Path | None, *, asked: bool, given: bool
) -> None:
    """Warn if the loader yields images that the checkpoint was trained on, or if nothing tells.

    trained  The pack that it was trained on, if it is known. asked  Whether the user chose the split. given  Whether the
    user passed shards, and not a folder of images.
    """
    identity = checkpoint.feeding.get("shards")
    own = "train" in loader.manifest.splits and loader.manifest.identity("train")["shards"] == identity
    if own:
        if loader.split == "train" and not asked:
            what = "was trained on these images, which are the only split, so the scores say little about new images"
            _log.warning("%s: %s", name, what)
    elif trained:
        known = _contents(Manifest.load(trained), "train", checkpoint.fold)
        seen = int(np.isin(_contents(loader.manifest, loader.split), known).sum())
        if seen:
            what = (
                f"was trained on {seen} of these {loader.num_samples} images, so the scores say little about new images"
            )
            _log.warning("%s: %s", name, what)
    elif identity and not given and loader.split == "test":
        what = "nothing here tells which images it was trained on; if they are among these, the scores are too good"
        _log.warning("%s: %s", name, what)


def _contents(manifest: Manifest, split: str, fold: int | None = None) -> NDArray[np.uint64]:
    """Return a number for the content of each image of a split. fold  The fold to leave out."""
    index = manifest.index(split)
    numbers = (index["size"].astype(np.uint64) << np.uint64(32)) | index["crc32"]
    return numbers if fold is None else numbers[manifest.fold_numbers() != fold]
