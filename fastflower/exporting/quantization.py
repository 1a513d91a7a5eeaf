"""int8 ONNX: a smaller, often faster file with nearly the same answers, kept only if it has them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import ArgumentError, ExportError
from fastflower.exporting.formats import Exported, Run, onnx_package, quiet, run_onnx
from fastflower.exporting.proof import fitted, images_of
from fastflower.loading.batch import Pixels
from fastflower.models.checkpoint import Checkpoint
from fastflower.shards.image import decode

_CALIBRATING = 128  # training images
_MOST_IMAGES = 512  # of the val split
_TIMED = 30  # runs
AGREEMENT = 0.98  # of classes, with the float file


class Quantized(NamedTuple):
    """An int8 file beside its float file, measured on this machine."""

    file: Path
    images: int
    """Number of images of the run's val split that were compared."""
    same: int
    """Number of images with the same class."""
    accuracy: tuple[float, float]
    """Of the float file and the int8 file, on these images."""
    bytes: tuple[int, int]
    milliseconds: tuple[float, float]
    """For one image, the median of 30."""

    def __str__(self) -> str:
        (was, now), (before, after), (slow, fast) = self.accuracy, self.bytes, self.milliseconds
        return (
            f"{self.same} of {self.images} images of the val split get the same class; accuracy {was:.1%}, now {now:.1%}; "
            f"{before / 1e6:.1f} MB, now {after / 1e6:.1f}; {slow:.1f} ms an image, now {fast:.1f}"
        )


class _Samples:
    """Calibration images, as onnxruntime's CalibrationDataReader."""

    def __init__(self, images: Sequence[Pixels], *, batched: bool) -> None:
        self._images: Iterator[Pixels] = iter(images)
        self._batched = batched

    def get_next(self) -> dict[str, Pixels] | None:
        image = next(self._images, None)
        return None if image is None else {"pixels": image[None] if self._batched else image}


def calibration_images(checkpoint: Checkpoint) -> list[bytes]:
    """Return training images. Raises ArgumentError if the run's shards are not on this machine."""
    images = images_of(checkpoint, "train", _CALIBRATING)[0]
    if not images:
        what = "False unless the run's shards are on this machine, because training images calibrate it"
        raise ArgumentError(f"int8 must be {what}, got True.")
    return images


def quantized(exported: Exported, file: Path, out: Path) -> Quantized:
    """Write an int8 file from a float file, and compare both.

    Weights are int8 per channel, activations uint8 per tensor. The view and softmax stay in float32.
    """
    checkpoint, batched = exported.checkpoint, exported.shape is not None
    tools, onnx = onnx_package("onnxruntime.quantization"), onnx_package("onnx")
    training = [_pixels(data, exported) for data in calibration_images(checkpoint)]
    folded = out.with_suffix(".folded")
    try:
        with quiet():
            onnx_package("onnxruntime.quantization.shape_inference").quant_pre_process(
                str(file), str(folded), skip_symbolic_shape=True
            )
            graph = onnx.load(str(folded)).graph
            constants = {value.name for value in graph.initializer}
            layers = [
                node.name
                for node in graph.node
                if node.op_type in ("Conv", "Gemm", "MatMul") and constants.intersection(node.input[1:2])
            ]
            tools.quantize_static(
                str(folded),
                str(out),
                _Samples(training, batched=batched),
                quant_format=tools.QuantFormat.QDQ,
                per_channel=True,
                nodes_to_quantize=layers,
            )
        model = onnx.load(str(out))
        onnx.helper.set_model_props(model, {entry.key: entry.value for entry in onnx.load(str(file)).metadata_props})
        onnx.save(model, str(out))
    finally:
        folded.unlink(missing_ok=True)
    return _compared(exported, file, out)


def require_agreement(done: Quantized, file: Path) -> None:
    """Raise ExportError unless 98% of the images get the class that the float file gives them."""
    if done.same < AGREEMENT * done.images:
        raise ExportError(
            f"{done.file.name}: must give {AGREEMENT:.0%} of the images the class of the float file, but {done}; {file.name} "
            f"was written, the int8 file was not. Export without --int8 (int8=False)."
        )


def _compared(exported: Exported, file: Path, out: Path) -> Quantized:
    images, labels = images_of(exported.checkpoint, "val", _MOST_IMAGES)
    pixels = [_pixels(data, exported) for data in images]
    if not pixels:
        raise ArgumentError("int8 must be False, because the run has no val split to compare on, got True.")
    runs = [run_onnx(exported, path) for path in (file, out)]
    classes = [np.array([run(each).argmax() for each in pixels]) for run in runs]
    accuracy = [float((found == np.array(labels)).mean()) for found in classes]
    milliseconds = [_milliseconds(run, pixels[0]) for run in runs]
    sizes = file.stat().st_size, out.stat().st_size
    same = int((classes[0] == classes[1]).sum())
    return Quantized(out, len(pixels), same, (accuracy[0], accuracy[1]), sizes, (milliseconds[0], milliseconds[1]))


def _pixels(data: bytes, exported: Exported) -> NDArray[np.uint8]:
    pixels = decode(data)
    return pixels if exported.shape is None else fitted(pixels, exported.shape)


def _milliseconds(run: Run, pixels: Pixels) -> float:
    seconds = list[float]()
    for _ in range(_TIMED):
        begun = perf_counter()
        run(pixels)
        seconds.append(perf_counter() - begun)
    return 1000 * median(seconds)
