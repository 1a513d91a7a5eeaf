"""Prediction: classes of images from a trained network, in memory and as a table."""

from collections.abc import Generator, Sequence
from operator import length_hint
from pathlib import Path

import torch
from torch import nn

from fastflower import progress
from fastflower.loading.arguments import AugmentLike
from fastflower.models.checkpoint import Checkpoint, require_order
from fastflower.models.predictor import URL_BYTES, URL_SECONDS, OnBad, Prediction, Predictor
from fastflower.models.sources import Images, Source, sources
from fastflower.models.submission import Ids, Table
from fastflower.recipes.recipe import Precision
from fastflower.shards.image import MAX_PIXELS
from fastflower.suggestions import keywords


@keywords
@progress.shown()
def predict(
    checkpoint: str | Path | Checkpoint | nn.Module,
    images: Images,
    *,
    on_bad: OnBad = "fail",
    out: str | Path | None = None,
    columns: Sequence[str] | None = None,
    ids: Ids | None = None,
    sample: str | Path | None = None,
    classes: Sequence[str] | None = None,
    augment: AugmentLike = None,
    tta: bool | None = None,
    precision: Precision | None = None,
    device: str | torch.device | None = None,
    url_seconds: float = URL_SECONDS,
    url_bytes: int = URL_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> list[Prediction]:
    """Classify images.

    To classify more images later, keep a `Predictor`, which builds the network only once.

    Args:
        checkpoint: A checkpoint written by `train`.
        images: One or more image files, folders or URLs (http, https). A folder stands for all images in it and its subfolders.
            From Python also bytes, binary file objects, PIL images, and (H, W, 3) uint8 arrays of RGB. Accepts the same files
            as `pack` and prepares them the same way, with max_side and quality unset.
        on_bad: How to handle missing, damaged or otherwise unusable images: "fail" stops at the first one that was passed by
            itself, and skips those in folders; "skip" skips all. Each is named in a warning, and the command fails at the end
            if "fail" skipped any.
        out: Also write a CSV file with columns path, class and probability, plus one probability column per class. Cells of
            skipped images are empty.
        columns: Header of the CSV file for a competition, instead: id,label for file name and class, or id and classes for
            their probabilities.
        ids: With columns: "name" writes the file name as id, "stem" the name without its extension. None writes the name.
        sample: A competition's sample_submission.csv: the CSV file has its header, its ids and their order, instead. Each id is
            the name of an image, with or without extension or folders. Images that it does not list are not predicted.
        classes: With a network of your own in place of a checkpoint, see `Predictor`.
        augment: With a network of your own in place of a checkpoint, see `Predictor`.
        tta: Test-time augmentation: average the probabilities of each image and its horizontal flip. None uses the recipe's tta.
        precision: What the network computes in; "auto" is the fastest that the device computes natively. None uses the recipe's.
            Below float32, logits are rounded, so probabilities of different images may be equal.
        device: None uses CUDA if available, otherwise the CPU.
        url_seconds: Time limit for the download of a URL.
        url_bytes: Size limit for the download of a URL.
        max_pixels: Largest number of pixels of an image, which is refused before it is decoded if it has more.

    Returns one prediction per image, in order, without skipped ones. Raises CheckpointError if the checkpoint cannot be used,
    ArgumentError if an argument is invalid, and SampleError if an image is unusable.

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
    require_order(checkpoint, images, lambda own, rest: f"predict({own!r}, {rest if rest[1:] else rest[0]!r})")
    found = sources(images)
    predictor = Predictor(
        checkpoint,
        classes=classes,
        augment=augment,
        tta=tta,
        precision=precision,
        device=device,
        url_seconds=url_seconds,
        url_bytes=url_bytes,
        max_pixels=max_pixels,
    )
    table = Table(out, predictor.classes, found, columns=columns, ids=ids, sample=sample)
    return [one for _, one in tabulated(predictor, on_bad, table) if one is not None]


def tabulated(predictor: Predictor, on_bad: OnBad, table: Table) -> Generator[tuple[Source, Prediction | None]]:
    """Yield what `Predictor.outcomes` does of the table's images, with a progress bar, and write the table at the end."""
    remaining = iter(table.images)
    with progress.bar(desc="predict", unit="image", total=length_hint(remaining) or None) as bar:
        for source, prediction in predictor.outcomes(remaining, on_bad):
            table.add(source, prediction)
            bar.update()
            yield source, prediction
    table.write()
