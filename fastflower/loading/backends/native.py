"""Renders with `kernel.c`, which blurs, warps, colors and normalizes in two passes. Requires AVX2."""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import torch

from fastflower.draws import color, geometry
from fastflower.draws.augment import Augment
from fastflower.loading.backends.opencv import shrunken
from fastflower.loading.batch import Pixels, Stored
from fastflower.loading.request import Request

_LIBRARY = Path(__file__).with_name("kernel.so")
_KINDS = {torch.uint8: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


# These two structures must have the same fields in the same order as Numbers and Output in kernel.c.
class _Numbers(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("warp", ctypes.c_float * 6),
        ("frame", ctypes.c_float * 6),
        ("masked", ctypes.c_int32),
        ("blurred", ctypes.c_int32),
        ("blur", ctypes.c_float * (2 * geometry.BLUR_TAPS)),
        ("brightness", ctypes.c_float),
        ("contrast", ctypes.c_float),
        ("saturation", ctypes.c_float),
        ("hue", ctypes.c_float),
        ("gray", ctypes.c_int64),
    )


class _Output(ctypes.Structure):
    _fields_ = (
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("multiply", ctypes.c_float * 3),
        ("add", ctypes.c_float * 3),
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """Everything the kernel needs to render one sample, except the image."""

    decode_scale: int
    region: tuple[slice, slice]
    shrink: tuple[int, int]
    numbers: _Numbers


@cache
def _kernel() -> ctypes.CDLL:
    kernel = ctypes.CDLL(str(_LIBRARY))
    kernel.render.argtypes = (ctypes.c_void_p,) * 4
    kernel.render.restype = None
    kernel.scratch_bytes.argtypes = (ctypes.c_int64,) * 4
    kernel.scratch_bytes.restype = ctypes.c_int64
    if not hasattr(kernel, "numbers_bytes") or kernel.numbers_bytes() != ctypes.sizeof(_Numbers):
        raise ImportError(f"{_LIBRARY}: was compiled from another kernel.c; run make install, or reinstall fastflower.")
    return kernel


def available() -> bool:
    """Return whether the package contains the kernel and the processor has AVX2, which the kernel requires."""
    return _LIBRARY.exists() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class NativeRenderer:
    """Renders a decoded image into a row of the batch. Thread-safe."""

    def __init__(self, augment: Augment, dtype: torch.dtype) -> None:
        self._kernel = _kernel()
        self._size = augment.output_size
        multiply, add = color.normalize_factors(*augment.normalization)
        self._output = _Output(*self._size, _KINDS[dtype], tuple(multiply.tolist()), tuple(add.tolist()))
        self._scratch = local()

    def jobs(self, request: Request) -> list[_Job]:
        """Return one job per row of the request."""
        warp = request.warp
        resampling = geometry.resampling(warp)
        count = len(request.indices)
        numbers: Any = np.zeros(count, np.dtype(_Numbers))
        numbers["warp"] = resampling.matrix.reshape(count, 6)
        numbers["masked"] = warp.masked
        if warp.masked.any():
            numbers["frame"] = geometry.centered(geometry.frame(warp, self._size)).reshape(count, 6)
        numbers["blurred"] = resampling.blur.any(axis=1)
        numbers["blur"] = geometry.blur_kernels(resampling.blur).reshape(count, -1)
        for name in color.FACTORS:
            numbers[name] = getattr(request.draw, name)
        numbers["gray"] = request.draw.gray
        rows = (_Numbers * count).from_buffer(numbers)
        columns = zip(
            resampling.decode_scale.tolist(), resampling.region.tolist(), resampling.shrink.tolist(), rows, strict=True
        )
        return [
            _Job(decode_scale, (slice(top, top + height), slice(left, left + width)), (down, across), row)
            for decode_scale, (top, left, height, width), (down, across), row in columns
        ]

    def __call__(self, image: Pixels, job: _Job, out: Stored, /) -> None:
        """Render `image`, (H, W, 3) uint8 decoded at job.decode_scale, into `out`, (height, width, 3)."""
        source = shrunken(image[job.region], job.shrink)
        height, width, _ = source.shape
        if height < 2 or width < 2:  # the kernel always reads two rows and two columns
            source = np.pad(source, ((0, height < 2), (0, width < 2), (0, 0)), mode="edge")
            height, width, _ = source.shape
        if source.strides[1:] != (3, 1) or source.strides[0] * height >= 1 << 31:
            source = np.ascontiguousarray(source)
        numbers = job.numbers
        numbers.source = source.__array_interface__["data"][0]
        numbers.stride = source.strides[0]
        numbers.end = numbers.source + source.strides[0] * (height - 1) + 3 * width
        numbers.height, numbers.width = height, width
        self._kernel.render(
            ctypes.addressof(numbers),
            ctypes.addressof(self._output),
            out.__array_interface__["data"][0],
            self._scratch_for(height, width),
        )

    def _scratch_for(self, height: int, width: int) -> int:
        """Return the address of this thread's scratch memory for a region of (height, width) pixels."""
        needed = self._kernel.scratch_bytes(height, width, *self._size)
        if getattr(self._scratch, "size", 0) < needed:
            self._scratch.memory = np.empty(needed, np.uint8)
            self._scratch.size, self._scratch.address = needed, self._scratch.memory.__array_interface__["data"][0]
        return self._scratch.address
