"""Classes of single image files."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastflower.batch import Request, resolve_device
from fastflower.checkpoint import Checkpoint
from fastflower.errors import SampleError
from fastflower.evaluation import log_probabilities, precision_of, view_of
from fastflower.folder import EXTENSIONS
from fastflower.image import decode
from fastflower.thread_executor import ThreadExecutor

_BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the network says of one image."""

    path: Path
    class_name: str
    """The most probable class."""
    probability: float
    """Of that class, in [0, 1]."""
    probabilities: dict[str, float]
    """Of every class."""


def predict(
    checkpoint: str | Path | Checkpoint,
    images: str | Path | Iterable[str | Path],
    *,
    device: str | torch.device | None = None,
) -> list[Prediction]:
    """Classify image files.

    Args:
        checkpoint: A checkpoint that `train` wrote.
        images: A path, or several; a folder stands for all images below it.
        device: None means CUDA where there is one, else the CPU.

    Returns one prediction an image, in order. Raises CheckpointError, and SampleError naming the file that is missing, is
    no image, or is cut short.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.load(checkpoint)
    paths = list(_files([images] if isinstance(images, (str, Path)) else images))
    chosen, recipe = resolve_device(device), checkpoint.recipe
    precision = precision_of(recipe, chosen)
    model = checkpoint.network().to(chosen, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    found: list[Prediction] = []
    for start in range(0, len(paths), _BATCH_SIZE):
        part = paths[start : start + _BATCH_SIZE]
        view = _view(part, checkpoint, precision).to(chosen)
        rows = log_probabilities(model, view, tta=recipe.tta).exp().tolist()
        found += [_prediction(path, row, checkpoint.classes) for path, row in zip(part, rows, strict=True)]
    return found


def _files(images: Iterable[str | Path]) -> Iterable[Path]:
    for entry in map(Path, images):
        if entry.is_dir():
            inside = sorted(path for path in entry.rglob("*") if path.suffix.lower() in EXTENSIONS)
            if not inside:
                raise SampleError(
                    f"{entry}: holds no images ({', '.join(EXTENSIONS)}); name image files or another folder."
                )
            yield from inside
        else:
            yield entry


def _read(path: Path, reduce: int = 1) -> NDArray[np.uint8]:
    try:
        return decode(path.read_bytes(), reduce)
    except OSError as error:
        raise SampleError(f"{path}: {error.strerror}; name an image file, or a folder of them.") from None
    except SampleError as error:
        raise SampleError(f"{path}: {error}; name an image file.") from None


def _view(paths: Sequence[Path], checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    """The validation view of image files, (N, 3, H, W)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        photos = list(pool.map(_read, paths))
    augment, indices = view_of(checkpoint.recipe), np.arange(len(paths))
    sizes = np.array([photo.shape[:2] for photo in photos], np.int64)
    request = Request.drawn(augment, indices, sizes, seed=0, epoch=0, step=0)

    def decoded(index: int, reduce: int) -> NDArray[np.uint8]:
        return photos[index] if reduce == 1 else _read(paths[index], reduce)

    executor = ThreadExecutor(augment, dtype, decoded, workers=os.cpu_count() or 1)
    ((_, images),) = executor.run([request])
    return images


def _prediction(path: Path, row: list[float], classes: tuple[str, ...]) -> Prediction:
    probabilities = dict(zip(classes, row, strict=True))
    best = max(probabilities, key=probabilities.__getitem__)
    return Prediction(path, best, probabilities[best], probabilities)
