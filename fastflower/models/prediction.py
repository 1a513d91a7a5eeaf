"""Prediction for single image files."""

import csv
import io
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fastflower.devices import precision_of, resolve_device
from fastflower.errors import ArgumentError, SampleError, require
from fastflower.files import blame_the_system, write_out
from fastflower.loading.backends.base import Setup
from fastflower.loading.backends.selection import create
from fastflower.loading.request import Request
from fastflower.loading.samples import EncodedFiles, SampleSource
from fastflower.machine import cores
from fastflower.models.backbone import on_device
from fastflower.models.checkpoint import Checkpoint
from fastflower.models.inference import log_probabilities, non_finite_outputs, view_of
from fastflower.packing.containers import instead_of_images
from fastflower.packing.folder import images_in
from fastflower.packing.names import EXTENSIONS
from fastflower.shards.image import Prepared, prepare

_log = logging.getLogger("fastflower")

_BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted class and probabilities of one image."""

    path: Path
    class_name: str
    """The most probable class."""
    probability: float
    """Probability of that class, in [0, 1]."""
    probabilities: dict[str, float]
    """Probability of every class, by name."""


def predict(
    checkpoint: str | Path | Checkpoint,
    images: str | Path | Iterable[str | Path],
    *,
    on_bad: Literal["fail", "skip"] = "fail",
    out: str | Path | None = None,
    device: str | torch.device | None = None,
) -> list[Prediction]:
    """Classify image files.

    Args:
        checkpoint: A checkpoint written by `train`.
        images: One or more image files or folders. A folder stands for all images in it and its subfolders. Accepts the same
            files as `pack` and prepares them the same way, with max_side and quality unset.
        on_bad: How to handle missing, damaged or otherwise unusable files: "fail" stops at the first one; "skip" logs and skips.
        out: Also write a CSV file with columns path, class and probability, plus one probability column per class.
        device: None uses CUDA if available, otherwise the CPU.

    Returns one prediction per image, in order. Raises CheckpointError if the checkpoint cannot be used, ArgumentError if an
    argument is invalid, and SampleError if a file is unusable.

    Example:
        >>> from fastflower import predict
        >>> predictions = predict("run/checkpoint-best.pt", "flowers/rose", device="cpu")
        >>> len(predictions)
        30
        >>> predictions[0].path
        PosixPath('flowers/rose/...')
        >>> len(predictions[0].probabilities)  # one per class
        5
    """
    require(on_bad in ("fail", "skip"), "on_bad", "'fail' or 'skip'", on_bad)
    if out is not None and (Path(out).is_dir() or not os.access(Path(out).parent, os.W_OK)):  # fail before predicting
        raise ArgumentError(f"out: {out} cannot be written; choose a file in an existing folder.")
    name = "checkpoint" if isinstance(checkpoint, Checkpoint) else str(checkpoint)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.load(checkpoint)
    paths = list(_files([images] if isinstance(images, (str, Path)) else images))
    chosen, recipe = resolve_device(device), checkpoint.recipe
    precision = precision_of(recipe.precision, chosen)
    model = on_device(checkpoint.network(), chosen)
    predictions: list[Prediction] = []
    starts = range(0, len(paths), _BATCH_SIZE)
    with tqdm(starts, desc="predict", unit="batch", disable=None) as bar:
        for start in bar:
            if good := _prepared(paths[start : start + _BATCH_SIZE], skip=on_bad == "skip"):
                view = _view([image for _, image in good], checkpoint, precision).to(chosen)
                rows = log_probabilities(model, view, tta=recipe.tta).exp().cpu().numpy()
                batch = [_prediction(path, row, checkpoint.classes) for (path, _), row in zip(good, rows, strict=True)]
                if broken := [prediction.path for prediction in batch if isnan(prediction.probability)]:
                    raise non_finite_outputs(name, str(broken[0]), len(broken))
                predictions += batch
    if out is not None:
        write_out(Path(out), _table(predictions, checkpoint.classes))
    return predictions


def _files(images: Iterable[str | Path]) -> Iterable[Path]:
    for entry in map(Path, images):
        if entry.is_dir():
            if not (inside := images_in(entry)):
                known = ", ".join(EXTENSIONS)
                what = f"{entry}: holds no images ({known}); pass image files or another folder."
                raise SampleError(instead_of_images(entry) or what)
            yield from inside
        else:
            yield entry


def _prepared(paths: Sequence[Path], *, skip: bool) -> list[tuple[Path, Prepared]]:
    """Prepare files as `pack` does, in order; drop unusable ones if `skip` is True."""

    def prepared(path: Path) -> Prepared | None:
        try:
            return prepare(
                path.read_bytes(),
                max_side=None,
                quality=None,
                warn=partial(_log.warning, "%s: %s", path),
                name=path.name,
            )
        except (OSError, SampleError) as error:
            blame_the_system(error, path)
            what = f"{path}: {(isinstance(error, OSError) and error.strerror) or error}"
            if not skip:
                raise SampleError(f"{what}; pass image files or folders, or on_bad='skip' (--on-bad skip).") from None
            _log.warning("skipped %s", what)
            return None

    with ThreadPoolExecutor(cores()) as pool:
        return [(path, image) for path, image in zip(paths, pool.map(prepared, paths), strict=True) if image]


def _view(images: Sequence[Prepared], checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    """Render the validation views of images as (N, 3, H, W)."""
    augment, sizes = view_of(checkpoint.recipe), np.array([image.size for image in images])
    samples = SampleSource(EncodedFiles([image.encoded for image in images], sizes))
    backend = create(None, augment, samples, Setup(torch.device("cpu"), dtype, len(images), cores()))
    request = Request.drawn(augment, np.arange(len(images)), sizes, seed=0, epoch=0, step=0)
    ((_, view),) = backend.run([request])
    return view


def _prediction(path: Path, row: NDArray[np.float32], classes: tuple[str, ...]) -> Prediction:
    probabilities: dict[str, float] = dict(zip(classes, row.tolist(), strict=True))
    best = max(probabilities, key=probabilities.__getitem__)
    return Prediction(path, best, probabilities[best], probabilities)


def _table(predictions: Iterable[Prediction], classes: tuple[str, ...]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "class", "probability", *classes])
    for one in predictions:
        writer.writerow([one.path, one.class_name, one.probability, *one.probabilities.values()])
    return text.getvalue().encode("utf-8", "backslashreplace")  # a file name need not be UTF-8
