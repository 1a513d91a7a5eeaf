"""Decoded images kept in RAM, and how much memory there is for them, in RAM or in a GPU."""

import gc
import logging
from threading import Lock
from typing import ClassVar, Literal, NamedTuple
from weakref import WeakSet

import numpy as np
import torch

from fastflower.draws.augment import Augment
from fastflower.draws.geometry import decode_scales
from fastflower.errors import ArgumentError
from fastflower.loading.batch import Integers, Pixels
from fastflower.loading.samples import SampleSource
from fastflower.machine import available_bytes, ranks_here

_log = logging.getLogger("fastflower")

Cache = Literal["auto"] | int | None

_SHARE = 0.5  # of the memory that is free, and promised to no other loader, when one is made


def free_bytes(device: torch.device) -> int:
    """Memory of a device that can be had now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


class Decoded(NamedTuple):
    """What the images of a split take at three bytes a pixel: at the scales that they are drawn at, and at all scales."""

    needed: int
    most: int


def decoded_bytes(sizes_N2: Integers, augment: Augment, seed: int) -> Decoded:
    """What images of those sizes take when they are decoded.

    At the scales that large ones are drawn at, an estimate, from four epochs of 256.
    """
    whole = 3 * int(sizes_N2.prod(axis=1).sum())
    most = whole * 4 // 3  # a half, a quarter and an eighth of each side are less than a third more
    if int(sizes_N2.max()) < 4 * min(augment.output_size):  # none is ever decoded at a reduced scale
        return Decoded(whole, most)
    rows = np.linspace(0, len(sizes_N2) - 1, min(len(sizes_N2), 256)).astype(np.int64)
    areas = sizes_N2[rows].prod(axis=1)
    kept = np.zeros((len(rows), 9))  # by scale
    for epoch in range(4):
        draw = augment.draw(seed, epoch, rows, sizes_N2[rows])
        scale = decode_scales(draw.warp(sizes_N2[rows], augment.fill).footprint)
        kept[np.arange(len(rows)), scale] = areas / scale**2
    return Decoded(int(whole * kept.sum() / areas.sum()), most)


class Allowance:
    """The bytes that one loader may keep on a device. What it has not taken is promised to it, and to no other. Thread-safe."""

    _all: ClassVar[WeakSet["Allowance"]] = WeakSet()

    def __init__(self, device: torch.device, limit_bytes: int) -> None:
        self.device = device
        self.left = limit_bytes
        self._lock = Lock()
        Allowance._all.add(self)

    def take(self, count: int) -> bool:
        """Whether so many bytes more may be kept; they then count."""
        with self._lock:
            if count > self.left:
                return False
            self.left -= count
            return True

    @staticmethod
    def promised(device: torch.device) -> int:
        """Bytes that the loaders of this process may still take on a device."""
        return sum(other.left for other in list(Allowance._all) if other.device == device)


def _unpromised(device: torch.device) -> int:
    ranks = ranks_here() if device.type == "cpu" else 1  # each keeps images of its own
    return max(0, free_bytes(device) // ranks - Allowance.promised(device))


def allow(cache: Cache, decoded: Decoded, device: torch.device) -> Allowance:
    """What a loader may keep on a device. "auto": half of what is free and promised to no other, where that is enough; logged.

    Raises ArgumentError for another kind of `cache`.
    """
    if cache is None or (isinstance(cache, int) and cache >= 0):
        return Allowance(device, min(cache or 0, decoded.most))
    if cache != "auto":
        raise ArgumentError(f"cache must be 'auto', None or a number of bytes, got {cache!r}.")
    free = _unpromised(device)
    if decoded.needed > _SHARE * free:  # a loader that nobody uses holds on to what is its own
        gc.collect()
        torch.cuda.empty_cache()  # else what it kept stays torch's
        free = _unpromised(device)
    fits = decoded.needed <= _SHARE * free
    _log.info(
        "cache: %.2f GB decoded, %.1f GB of %s free: %s",
        decoded.needed / 1e9,
        free / 1e9,
        "GPU memory" if device.type == "cuda" else "RAM",
        "each image is decoded once" if fits else "images are decoded every epoch",
    )
    return Allowance(device, min(int(_SHARE * free), decoded.most) if fits else 0)


class PixelCache:
    """Keeps decoded images in RAM, first come, while it is allowed to. Thread-safe."""

    def __init__(self, samples: SampleSource, allowance: Allowance) -> None:
        self._samples, self._allowance = samples, allowance
        self._kept: dict[tuple[int, int], Pixels] = {}
        self._lock = Lock()

    def decode(self, index: int, decode_scale: int = 1) -> Pixels:
        """An image as `SampleSource.decode` gives it, mostly decoded before; not to be written to."""
        key = (index, decode_scale)
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        image = self._samples.decode(index, decode_scale)
        with self._lock:
            if key not in self._kept and self._allowance.take(image.nbytes):
                self._kept[key] = image
        return image
