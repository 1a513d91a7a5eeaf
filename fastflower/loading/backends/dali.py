"""Decodes and renders in one DALI graph on the GPU; tests run the same graph on DALI's CPU backend.

The only file that imports nvidia.dali. Tests pin DALI's undocumented behavior.
"""
# pyright: standard
# DALI has no type annotations.

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn as untyped_fn
from nvidia.dali import math
from nvidia.dali import types as untyped_types
from nvidia.dali.pipeline import Pipeline, pipeline_def
from torch import Tensor

from fastflower.draws import color, geometry
from fastflower.draws.augment import Augment
from fastflower.errors import SampleError
from fastflower.loading.backends.base import Backend, Setup, Work
from fastflower.loading.batch import Integers
from fastflower.loading.request import Request
from fastflower.loading.samples import SampleSource

# DALI creates most attributes of these modules at run time.
fn: Any = untyped_fn
types: Any = untyped_types
Node = Any
"""Output of a DALI operator."""

# Fraction of a batch that the GPU's JPEG engine decodes; DALI's default is 0.65. On an H100 with nvJPEG 12.3 to 13.2, the
# engine may write pixels out of stream order (pytorch/torchcodec pull request 1634). Keep this at 0 until benchmarks/gpu_check.py
# shows that 0 and 1 give equal pixels on a busy GPU.
HW_DECODER_LOAD = 0.0

_AHEAD = 2  # batches in the pipeline
_COLORS = {**{name: name for name in color.FACTORS}, "grayscale": "gray"}  # fields of Augment, and what they draw
# DALI has no bfloat16. Converting from float16 moves 6 bytes per value; converting from float32 moves 10.
_DTYPES = {torch.uint8: types.UINT8, torch.float16: types.FLOAT16, torch.bfloat16: types.FLOAT16}


@dataclass(slots=True, kw_only=True)
class _Reading(Work):
    files: list[NDArray[np.uint8]]
    """Encoded images, one per row."""


class DaliBackend(Backend[_Reading, None]):
    """Reads on threads; DALI decodes and renders on the device. Caches nothing."""

    name = "dali"

    def __init__(self, augment: Augment, samples: SampleSource, setup: Setup, kept: None = None) -> None:
        super().__init__(augment, samples, setup, kept)
        self.threads = max(1, setup.workers // 4)  # reading and checksums take far less time than decoding
        self._pipe: Pipeline | None = None

    def pipeline(self) -> Pipeline:
        """Return an unbuilt pipeline for the backend's augment, dtype, device and batch size."""
        device = self.setup.device
        return _graph(
            self.augment,
            self.setup.dtype,
            device.type == "cuda",
            batch_size=self.setup.batch_size,
            num_threads=max(1, self.setup.workers - self.threads),
            device_id=device.index if device.type == "cuda" else None,
            prefetch_queue_depth=_AHEAD,
        )

    def begin(self, request: Request) -> _Reading:
        rows = range(len(request.indices))
        return _Reading(request=request, rows=rows, files=[np.empty(0, np.uint8)] * len(rows))

    def prepare(self, work: _Reading, row: int) -> None:
        work.files[row] = np.frombuffer(self.samples.encoded(int(work.request.indices[row])), np.uint8)

    def render(self, works: Iterable[_Reading], _pool: ThreadPoolExecutor, /) -> Generator[tuple[Request, Tensor]]:
        # An error or an early exit leaves batches in the pipeline, so it is reused only if it was drained.
        pipe, self._pipe = self._pipe, None
        scheduled = deque[Request]()
        for work in works:
            pipe = pipe or self._primed(work)
            self._feed(pipe, work.request, work.files)
            pipe.schedule_run()
            scheduled.append(work.request)
            if len(scheduled) == _AHEAD:
                yield self._next(pipe, scheduled.popleft())
        while pipe and scheduled:
            yield self._next(pipe, scheduled.popleft())
        self._pipe = pipe

    def _primed(self, work: _Reading) -> Pipeline:
        """Return a built pipeline that takes one batch per run.

        A pipeline's first run takes as many batches as it prefetches. Each of these contains only the first image of `work`.
        """
        pipe, request = self.pipeline(), work.request.row(0)
        pipe.build()
        for _ in range(_AHEAD):
            self._feed(pipe, request, work.files[:1])
        pipe.schedule_run()
        for _ in range(_AHEAD):
            self._outputs(pipe, request)
        return pipe

    def _feed(self, pipe: Pipeline, request: Request, files: list[NDArray[np.uint8]]) -> None:
        draw, warp, augment = request.draw, request.warp, self.augment
        sigma, window = _gaussians(warp.footprint)
        inputs = {
            "start": warp.region[:, :2].astype(np.int32),
            "shape": warp.region[:, 2:].astype(np.int32),
            "matrix": np.ascontiguousarray(warp.matrix, np.float32),
            "blurred": (sigma > _NO_BLUR).any(axis=1),
            "sigma": sigma.astype(np.float32),
            "window": window.astype(np.int32),
        }
        # DALI rejects inputs that the graph of this augment does not use.
        if augment.uncovers:
            inputs["mask_matrix"] = np.ascontiguousarray(geometry.frame(warp, draw.size), np.float32)
        if augment.erase:
            inputs["erase_anchor"] = draw.erase[:, :2].astype(np.float32)
            inputs["erase_shape"] = draw.erase[:, 2:].astype(np.float32)
        for field, name in _COLORS.items():
            if getattr(augment, field):
                inputs[name] = getattr(draw, name).astype(np.float32).reshape(-1, 1, 1, 1)
        pipe.feed_input("samples", files)
        for name, values in inputs.items():
            # Passing arrays takes 1.4 ms per batch of 256; passing lists of rows takes 15.9 ms.
            pipe.feed_input(name, values)

    def _next(self, pipe: Pipeline, request: Request) -> tuple[Request, Tensor]:
        # The tensor shares DALI's memory, which DALI reuses once the tensor is freed.
        images = torch.from_dlpack(self._outputs(pipe, request))
        return request, images.to(self.setup.dtype).permute(0, 3, 1, 2)

    def _outputs(self, pipe: Pipeline, request: Request) -> Node:
        """Return the pipeline's next output: the images of `request`."""
        device = self.setup.device
        try:
            if device.type == "cuda":
                with torch.cuda.device(device):  # the default streams of all GPUs have the same handle
                    (images,) = pipe.outputs(cuda_stream=torch.cuda.current_stream(device))
            else:
                (images,) = pipe.outputs()
        except RuntimeError as error:
            if "out of memory" in str(error).lower():
                raise
            for index in request.indices.tolist():  # raises an error that names the sample; DALI's may not
                self.samples.decode(index)
            raise SampleError(
                f"DALI failed on a batch, but all of its samples decode on the CPU; pass another backend. DALI reports: {error}"
            ) from error
        return images.as_tensor()


_NO_BLUR = 0.05  # sigma so small that the Gaussian has a single nonzero weight


def _gaussians(footprint_N2: geometry.Floats) -> tuple[geometry.Floats, Integers]:
    """Return the (sigma, window) of antialiasing Gaussian blurs, each (N, 2), vertical and horizontal.

    Their variance is `geometry.blur_variance`. When downscaling by at most 2, the blur has three weights, the same as in
    `geometry.blur_kernels`. When downscaling by more, a Gaussian approximates the triangle filter.
    """
    variance = geometry.blur_variance(footprint_N2, np.ones(footprint_N2.shape, np.int64))
    outer = np.clip(variance / 2, 1e-12, 0.25)  # weight a in [a, 1 - 2a, a]
    narrow = np.sqrt(-0.5 / np.log(outer / (1 - 2 * outer)))
    wide = variance >= 0.5
    sigma = np.where(wide, np.sqrt(variance), np.where(variance > 0, narrow, _NO_BLUR))
    return sigma, np.where(wide, 2 * np.ceil(3 * sigma) + 1, 3).astype(np.int64)


@pipeline_def(enable_conditionals=True)
def _graph(augment: Augment, dtype: torch.dtype, gpu: bool) -> Node:
    """Define the graph that decodes and renders.

    It decodes entire images. Decoding only a region on the GPU is reported to crash on Hopper (NVIDIA/nvImageCodec issue
    55). nvJPEG before 13.2, as installed with torchvision, rejects regions of most images, so the CPU would decode them.
    """
    images = fn.decoders.image(
        _given("samples", types.UINT8, 1),
        device="mixed" if gpu else "cpu",
        jpeg_fancy_upsampling=True,  # makes the GPU's chroma equal to the CPU decoder's
        hw_decoder_load=HW_DECODER_LOAD,
    )
    return rendered(images, augment, dtype, gpu)


def _given(name: str, dtype: object, ndim: int) -> Node:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim)


def rendered(images: Node, augment: Augment, dtype: torch.dtype, gpu: bool) -> Node:
    """Crop, blur, warp, mask, color, erase and normalize, skipping steps that `augment` never draws.

    images  DALI node of decoded images, (H, W, 3) uint8. The result has size augment.output_size, and `dtype` or the
    nearest dtype that DALI supports.
    """
    images = fn.slice(images, _given("start", types.INT32, 1), _given("shape", types.INT32, 1), axes=(0, 1))
    sigma, window = _given("sigma", types.FLOAT, 1), _given("window", types.INT32, 1)
    if _given("blurred", types.BOOL, 0):
        images = fn.gaussian_blur(images, sigma=sigma, window_size=window)
    # Without fill_value, DALI repeats the edge pixels.
    images = fn.warp_affine(images, _given("matrix", types.FLOAT, 2), size=augment.output_size)
    images = fn.cast(images, dtype=types.FLOAT)
    if augment.uncovers:
        where = "gpu" if gpu else "cpu"
        whole = fn.constant(fdata=1.0, shape=[*augment.output_size, 1], layout="HWC", device=where)
        mask = _given("mask_matrix", types.FLOAT, 2)
        images = images * fn.warp_affine(whole, mask, size=augment.output_size, fill_value=0.0)
    factors = {name: _given(name, types.FLOAT, 3) for field, name in _COLORS.items() if getattr(augment, field)}
    images = _color(images, augment, {name: node.gpu() if gpu else node for name, node in factors.items()})
    raw = dtype == torch.uint8
    mean, std = 255 * np.array(augment.normalization)
    images = fn.reshape(images, layout="HWC")
    if augment.erase:
        images = fn.erase(  # before normalization, in float32, because the GPU operator does not support float16
            images,
            anchor=_given("erase_anchor", types.FLOAT, 1),
            shape=_given("erase_shape", types.FLOAT, 1),
            axis_names="HW",
            fill_value=list(augment.erase_levels if raw else np.array(augment.erase_value) * std + mean),
        )
    return fn.crop_mirror_normalize(
        images,
        mean=[0.0] * 3 if raw else list(mean),
        std=[1.0] * 3 if raw else list(std),
        dtype=_DTYPES.get(dtype, types.FLOAT),
        output_layout="HWC",
    )


def _color(images: Node, augment: Augment, factor: dict[str, Node]) -> Node:
    """Apply torchvision's jitter, then grayscale, to (H, W, 3) floats, clipping each result to 0 .. 255."""
    luma = color.LUMA.astype(np.float32).reshape(1, 1, 3)

    def gray(pixels: Node) -> Node:
        return fn.reductions.sum(pixels * luma, axes=2, keep_dims=True)

    if augment.brightness:
        images = math.clamp(images * factor["brightness"], 0.0, 255.0)
    if augment.contrast:
        # Written as arithmetic: GPU operators do not accept GPU tensors as named arguments such as contrast_center.
        mean = fn.reductions.mean(gray(images), axes=[0, 1], keep_dims=True)
        images = math.clamp(mean + factor["contrast"] * (images - mean), 0.0, 255.0)
    if augment.saturation:
        level = gray(images)
        images = math.clamp(level + factor["saturation"] * (images - level), 0.0, 255.0)
    if augment.hue:
        images = _turned(images, factor["hue"])
    return images + factor["gray"] * (gray(images) - images) if augment.grayscale else images


def _turned(images: Node, turns: Node) -> Node:
    """Rotate the hue exactly: V - C * clamp(min(k, 4 - k), 0, 1), k = (n + hue / 60 degrees) mod 6, n = 5, 3, 1 for R, G, B.

    Closed form of HSV to RGB: Wikipedia, "HSL and HSV", "HSV to RGB alternative". fn.hsv, in YIQ, is 16 gray levels off.
    """
    red, green, blue = images[:, :, 0:1], images[:, :, 1:2], images[:, :, 2:3]
    value = math.max(red, math.max(green, blue))
    chroma = value - math.min(red, math.min(green, blue))
    divisor = math.max(chroma, 1e-6)
    is_red = fn.cast(red == value, dtype=types.FLOAT)
    is_green = fn.cast(green == value, dtype=types.FLOAT) * (1.0 - is_red)
    is_blue = 1.0 - is_red - is_green
    sector = (
        is_red * (green - blue) / divisor
        + is_green * ((blue - red) / divisor + 2.0)
        + is_blue * ((red - green) / divisor + 4.0)
    ) + 6.0 * turns
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (sector + offset) / 6.0
        k = 6.0 * (k - math.floor(k))
        channels.append(value - chroma * math.clamp(math.min(k, 4.0 - k), 0.0, 1.0))
    return fn.cat(*channels, axis=2)
