"""A trained network, ready to classify single images."""

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from math import isnan
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fastflower.devices import precision_of, resolve_device
from fastflower.draws.augment import Augment
from fastflower.draws.torchvision_steps import is_transform
from fastflower.errors import ArgumentError, SampleError, boolean, integer, number, require
from fastflower.loading.arguments import AugmentLike, one_of
from fastflower.loading.backends.native import NativeRenderer, available
from fastflower.loading.backends.opencv import OpencvRenderer
from fastflower.loading.batch import Stored, as_numpy
from fastflower.loading.request import Request
from fastflower.machine import cores
from fastflower.models.backbone import on_device
from fastflower.models.checkpoint import Checkpoint
from fastflower.models.inference import log_probabilities, non_finite_outputs, validation_view
from fastflower.models.sources import Images, Source, read, sources
from fastflower.recipes.recipe import Precision
from fastflower.shards.image import MAX_PIXELS
from fastflower.suggestions import keywords

_log = logging.getLogger("fastflower")

_BATCH_SIZE = 32
URL_SECONDS = 10.0
URL_BYTES = 64 << 20
OnBad = Literal["fail", "skip"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted class and probabilities of one image."""

    path: Path | None
    """None if the image was not passed as a path, or found in a folder."""
    class_name: str
    """The most probable class."""
    probability: float
    """Probability of that class, in [0, 1]."""
    probabilities: dict[str, float] = field(repr=False)
    """Probability of every class, by name."""
    name: str = ""
    """The path, the URL, or "image 3" for the image at index 3."""
    index: int = field(default=0, compare=False)
    """Position of the image among all that were passed, from 0. A folder counts as its images."""

    def __repr__(self) -> str:
        place = f"name={self.name!r}" if self.path is None else f"path={str(self.path)!r}"
        return f"Prediction({place}, class_name={self.class_name!r}, probability={self.probability:.4f}, index={self.index})"


class Predictor:
    """A trained network, ready to classify images. Calling it is cheap, from any number of threads at once.

    Args:
        checkpoint: A checkpoint written by `train`, its path, or a network of your own. The network maps normalized images
            (N, 3, H, W) to logits (N, classes); it is copied, and the copy put into evaluation mode.
        classes: Names of the classes, in the order of the logits. Only with a network of your own, which needs them.
        augment: How the images are resized, cropped and normalized: as validation does with this Augment, or this torchvision
            transform. Only with a network of your own, which needs it.
        tta: Test-time augmentation: average the probabilities of each image and its horizontal flip. None uses the recipe's
            tta, and no flip with a network of your own.
        precision: "float32", "bfloat16", "float16", or "auto" for the fastest that the device computes natively. None uses the
            recipe's, as `evaluate` does, and that of the weights with a network of your own. Below float32, logits are rounded,
            so probabilities of different images may be equal.
        device: None uses CUDA if available, otherwise the CPU.
        url_seconds: Time limit for the download of a URL.
        url_bytes: Size limit for the download of a URL.
        max_pixels: Largest number of pixels of an image, at most the default, which is that of `pack`. A larger image is refused
            before it is decoded. Decoding takes up to 13 bytes of memory per pixel.

    Raises CheckpointError if the checkpoint cannot be used, and ArgumentError if an argument is invalid.

    Example:
        >>> from pathlib import Path
        >>> from fastflower import Predictor
        >>> predictor = Predictor("run/checkpoint-best.pt", device="cpu")
        >>> (prediction,) = predictor(Path("photo.jpg").read_bytes())
        >>> prediction.class_name in predictor.classes
        True
    """

    @keywords
    def __init__(
        self,
        checkpoint: str | Path | Checkpoint | nn.Module,
        *,
        classes: Sequence[str] | None = None,
        augment: AugmentLike = None,
        tta: bool | None = None,
        precision: Precision | None = None,
        device: str | torch.device | None = None,
        url_seconds: float = URL_SECONDS,
        url_bytes: int = URL_BYTES,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        flip = None if tta is None else boolean("tta", tta, rule="True, False or None")
        if precision is not None:
            one_of("precision", precision, get_args(Precision))
        self._url_seconds = number("url_seconds", url_seconds, "a number of seconds above 0", lambda value: value > 0)
        self._url_bytes = integer("url_bytes", url_bytes, 1, unit=" byte")
        self._max_pixels = integer("max_pixels", max_pixels, 1, at_most=MAX_PIXELS)
        if isinstance(checkpoint, nn.Module):
            self._name, own_tta, own = "network", False, _precision_of(checkpoint)
            rule = f"None or {own!r} with a network whose weights are {own}"
            require(precision in (None, own) or own == "float32", "precision", rule, precision)
            self.classes, view = _named(classes, augment)
            network = deepcopy(checkpoint).eval()
            self._backbone = type(checkpoint).__name__
        else:
            require(classes is None, "classes", "None unless a network is passed: a checkpoint has its own", classes)
            require(augment is None, "augment", "None unless a network is passed: a checkpoint has its own", augment)
            self._name = "checkpoint" if isinstance(checkpoint, Checkpoint) else str(checkpoint)
            if not isinstance(checkpoint, Checkpoint):
                checkpoint = Checkpoint.load(checkpoint)
            recipe, network = checkpoint.recipe, checkpoint.network()
            self._backbone = recipe.backbone
            self.classes, view, own_tta, own = checkpoint.classes, recipe.augment, recipe.tta, recipe.precision
        self.device, self._tta = resolve_device(device), own_tta if flip is None else flip
        self._precision = precision_of(precision or own, self.device)
        self._view = validation_view(view)
        self._workers = cores()  # takes a millisecond to read
        self._network = on_device(network, self.device)
        renderer = (NativeRenderer if available() else OpencvRenderer)(self._view, self._precision)
        self._render = cast("NativeRenderer", renderer)  # both have the same methods

    def __repr__(self) -> str:
        size = "x".join(map(str, self._view.output_size))
        return f"Predictor({self._backbone!r}, classes={len(self.classes)}, size={size}, device={str(self.device)!r})"

    def __call__(self, images: Images, *, on_bad: OnBad = "fail") -> list[Prediction]:
        """Classify images.

        images, on_bad  As for `predict`. Returns one prediction per image, in order. Raises the same errors as `predict`.
        """
        return list(self.stream(images, on_bad=on_bad))

    def stream(self, images: Images, *, on_bad: OnBad = "fail") -> Generator[Prediction]:
        """Yield the predictions of a call one by one. An iterator of images is read as the predictions are consumed.

        Holds at most 64 images in memory, whatever their number.
        """
        for _, prediction in self.outcomes(iter(sources(images)), on_bad):
            if prediction is not None:
                yield prediction

    def outcomes(self, images: Iterator[Source], on_bad: OnBad) -> Generator[tuple[Source, Prediction | None]]:
        """Yield each image with its prediction, in order, or with None if it is skipped. The next batch loads meanwhile."""
        require(on_bad in ("fail", "skip"), "on_bad", "'fail' or 'skip'", on_bad)
        pool = ThreadPoolExecutor(
            self._workers, thread_name_prefix="fastflower"
        )  # starts no thread before its first task
        started = deque[tuple[list[Source], Tensor, Iterable[SampleError | None]]]()
        try:
            while batch := list(islice(images, _BATCH_SIZE)):
                view = torch.empty((len(batch), *self._view.output_size, 3), dtype=self._precision)
                alone = len(batch) == 1  # handing one image to a thread takes longer than it saves
                errors = (map if alone else pool.map)(self._load, batch, as_numpy(view))
                started.append((batch, view, errors))
                if len(started) == 2:
                    yield from self._predicted(*started.popleft(), skip=on_bad == "skip")
            while started:
                yield from self._predicted(*started.popleft(), skip=on_bad == "skip")
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, source: Source, out: Stored) -> SampleError | None:
        """Render the validation view of an image into `out`, (H, W, 3). Return the error if the image is unusable."""
        try:
            image = read(source, url_seconds=self._url_seconds, url_bytes=self._url_bytes, max_pixels=self._max_pixels)
        except SampleError as error:
            return SampleError(error.reason, remedy=error.remedy)  # the original would keep its frames alive
        size = np.array([image.pixels.shape[:2]])
        (job,) = self._render.jobs(Request.drawn(self._view, np.zeros(1, np.int64), size, seed=0, epoch=0, step=0))
        self._render(image.at(job.decode_scale), job, out)
        return None

    def _predicted(
        self, batch: Sequence[Source], view: Tensor, errors: Iterable[SampleError | None], *, skip: bool
    ) -> Generator[tuple[Source, Prediction | None]]:
        """Yield the outcomes of a batch. view  (N, H, W, 3), rendered where the error is None."""
        good = list[int]()
        for row, (source, error) in enumerate(zip(batch, errors, strict=True)):
            if error is None:
                good.append(row)
            elif skip or source.found:
                more = f"; pass {error.remedy}" if error.remedy else ""
                _log.warning("skipped %s: %s%s", source.name, error.reason, more)
            else:
                instead = "image files or folders" if source.path else "another image"
                instead = f"{error.remedy}, {instead}" if error.remedy else instead
                what = f"{source.name}: {error.reason}; pass {instead}, or on_bad='skip' (--on-bad skip)."
                raise SampleError(what, reason=error.reason)
        predictions = dict[int, Prediction]()
        if good:
            images = (view if len(good) == len(batch) else view[good]).permute(0, 3, 1, 2).to(self.device)
            for row, probabilities in zip(good, self._probabilities(images), strict=True):
                source, best = batch[row], max(probabilities, key=probabilities.__getitem__)
                predictions[row] = Prediction(
                    source.path, best, probabilities[best], probabilities, source.name, source.index
                )
            if broken := [one.name for one in predictions.values() if isnan(one.probability)]:
                raise non_finite_outputs(self._name, broken[0], len(broken))
        for row, source in enumerate(batch):
            yield source, predictions.get(row)

    def _probabilities(self, images: Tensor) -> list[dict[str, float]]:
        """Return the probabilities of each image by class. images  (N, 3, H, W), on the predictor's device."""
        rows = log_probabilities(self._network, images, tta=self._tta).exp().cpu()
        if rows.shape != (len(images), len(self.classes)):
            raise ArgumentError(
                f"classes must name the outputs of the network: {len(self.classes)} names for {rows.shape[1]} outputs."
            )
        return [dict(zip(self.classes, row, strict=True)) for row in cast("list[list[float]]", rows.tolist())]  # pyright: ignore[reportUnknownMemberType]  (torch's types)


def _named(classes: Sequence[str] | None, augment: AugmentLike) -> tuple[tuple[str, ...], Augment]:
    """Return the classes and the augment that describe a network of the caller. Raises ArgumentError if one is missing."""
    listed = classes is not None and not isinstance(classes, str) and all(type(name) is str for name in classes)
    augment = Augment.from_torchvision(augment) if is_transform(augment) else augment
    rule = "given with a network: different names, in the order of its outputs"
    rule += ", as in Predictor(network, classes=['cat', 'dog'], augment=Augment(size=224))" if classes is None else ""
    require(listed and len(set(classes or ())) == len(classes or ()) > 0, "classes", rule, classes)
    rule = "given with a network: an Augment or a torchvision transform, for its size, mean and std"
    require(isinstance(augment, Augment), "augment", rule, augment)
    return tuple(classes or ()), cast("Augment", augment)


def _precision_of(network: nn.Module) -> str:
    """Return the precision of a network's weights, as in a recipe. Raises ArgumentError if images cannot have it."""
    found = next((weight.dtype for weight in network.parameters() if weight.is_floating_point()), torch.float32)
    known = (torch.float32, torch.bfloat16, torch.float16)
    require(
        found in known, "checkpoint", "a network in float32, bfloat16 or float16 (convert it: network.float())", found
    )
    return str(found).removeprefix("torch.")
