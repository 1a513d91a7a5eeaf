"""Proof that an exported file answers as `predict` does: it is run on images, and its probabilities are compared."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastflower.errors import ExportError, SampleError
from fastflower.exporting.formats import Exported, Run
from fastflower.loading.batch import Pixels
from fastflower.loading.image_files import images_below
from fastflower.models.checkpoint import Checkpoint
from fastflower.models.predictor import Predictor
from fastflower.models.sources import Source, read, sources
from fastflower.models.trained_on import packs_of
from fastflower.shards.image import MAX_PIXELS
from fastflower.shards.manifest import Manifest
from fastflower.shards.reader import ShardReader

_log = logging.getLogger("fastflower")

Item = TypeVar("Item")

MOST_IMAGES = 64
TOLERANCE = 0.02  # of a probability; predict rounds to whole gray levels on the way, the file does not
TIE = 1e-3  # of two probabilities: the classes of such images may be exchanged


@dataclass(frozen=True, slots=True)
class Proof:
    """Agreement of an exported file with `predict`."""

    images: int
    """Number of images that were compared."""
    source: str
    """Where the images are from."""
    worst: float
    """Largest difference of a probability."""
    worst_image: str
    same: int
    """Number of images with the same class, or with a tie between both."""

    def __str__(self) -> str:
        count = f"{self.images} image{'s' * (self.images != 1)} {self.source}"
        return f"{count}: same class for {self.same}, largest difference of a probability {self.worst:.4f} ({self.worst_image})"


@dataclass(frozen=True, slots=True)
class Images:
    """Images to compare on."""

    source: str
    """Where they are from."""
    names: Sequence[str]
    pixels: Sequence[Pixels]
    """Upright, (H, W, 3) uint8 of RGB, of any sizes."""
    expected: NDArray[np.float32]
    """(N, K) probabilities by `predict`, in float32."""


def proof_of(run: Run, images: Images) -> Proof:
    """Run a file on images, and compare its probabilities with those expected."""
    found = np.stack([run(pixels) for pixels in images.pixels])
    difference = np.abs(found - images.expected).max(axis=1)
    rows, one, other = np.arange(len(found)), found.argmax(axis=1), images.expected.argmax(axis=1)
    tied = np.abs(images.expected[rows, other] - images.expected[rows, one]) <= TIE
    worst = int(difference.argmax())
    same = int(((one == other) | tied).sum())
    return Proof(len(found), images.source, float(difference[worst]), images.names[worst], same)


def require_proof(proof: Proof, name: str) -> None:
    """Raise ExportError unless all classes agree and all probabilities are within 0.02."""
    if not (proof.worst <= TOLERANCE and proof.same == proof.images):
        rule = f"within {TOLERANCE} of predict's, with the same class"
        raise ExportError(f"{name}: its probabilities must be {rule}, but of {proof}; no file was written.")


def images_for(exported: Exported, folder: str | Path | None) -> Images:
    """Return up to 64 images with what `predict` says of them: of a folder, of the run's val split, or drawn here.

    Raises SampleError if a folder has no usable image.
    """
    source, found = _chosen(exported.checkpoint, folder)
    pixels, names = list[Pixels](), list[str]()
    for image in found:
        try:
            pixels.append(read(image, url_seconds=0, url_bytes=0, max_pixels=MAX_PIXELS).pixels)
            names.append(image.name)
        except SampleError as error:
            _log.warning("skipped %s: %s", image.name, error.reason)
    if not pixels:
        raise SampleError(f"{folder}: none of its images is usable; pass another folder (--prove).")
    if exported.shape is not None:
        pixels = [fitted(each, exported.shape) for each in pixels]
        found = list(sources(pixels))
    predict = Predictor(exported.checkpoint, precision="float32", device="cpu")
    predicted = [one for _, one in predict.outcomes(iter(found), "skip") if one is not None]
    expected = np.array([list(one.probabilities.values()) for one in predicted], np.float32)
    return Images(source, names, pixels, expected)


def _chosen(checkpoint: Checkpoint, folder: str | Path | None) -> tuple[str, list[Source]]:
    if folder is not None:
        return f"of {folder}", list(sources(_spread(images_below(Path(folder)))))
    if encoded := images_of(checkpoint, "val", MOST_IMAGES)[0]:
        return "of the run's val split", list(sources(encoded))
    return "drawn here, because the run's val split is not at hand (--prove FOLDER)", list(sources(drawn()))


def images_of(checkpoint: Checkpoint, split: Literal["train", "val"], most: int) -> tuple[list[bytes], list[int]]:
    """Return image files of a split of the run, evenly spread over it, and the classes that the checkpoint gives their labels.

    Returns none if the run's shards are not on this machine.
    """
    _, pack = packs_of(checkpoint)
    if pack is None:
        return [], []
    manifest, fold = Manifest.load(pack), checkpoint.fold
    stored = split if fold is None else "train"
    if stored not in manifest.splits or not manifest.splits[stored].samples:
        return [], []
    rows = np.arange(manifest.splits[stored].samples)
    if fold is not None:
        rows = rows[(manifest.fold_numbers() == fold) == (split == "val")]
    reader = ShardReader(manifest, stored)
    chosen = _spread(rows.tolist(), most)
    numbers = [checkpoint.classes.index(name) for name in manifest.classes]
    return [reader.encoded(row) for row in chosen], [numbers[label] for label in reader.index["label"][chosen].tolist()]


def drawn() -> list[Pixels]:
    """Return images of soft random colors, of several sizes and shapes, always the same."""
    dice = np.random.default_rng(0)
    images = list[Pixels]()
    for height, width in ((375, 500), (500, 375), (256, 256), (900, 1200), (64, 96), (333, 1000), (224, 300), (20, 40)):
        coarse = Image.fromarray(dice.integers(0, 256, (9, 12, 3), np.uint8))
        images.append(np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.uint8))
    return images


def fitted(pixels: Pixels, shape: tuple[int, int]) -> Pixels:
    """Return an image resized to (height, width), whatever its aspect ratio."""
    return np.asarray(Image.fromarray(pixels).resize((shape[1], shape[0]), Image.Resampling.BICUBIC), np.uint8)


def _spread(images: Sequence[Item], most: int = MOST_IMAGES) -> list[Item]:
    """Return up to `most` items, evenly spread."""
    count = min(most, len(images))
    return [images[number * len(images) // count] for number in range(count)]
