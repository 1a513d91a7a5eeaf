"""The RAM cache of decoded images, and the memory budgets of caches in RAM or on a GPU."""

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

_SHARE = 0.5  # fraction that "auto" may use of the memory that is free and not reserved by other loaders


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


class Decoded(NamedTuple):
    """Memory needed for the decoded images of a split, at three bytes per pixel."""

    needed: int
    """Bytes needed to keep every image at the decode scales that are drawn for it."""
    most: int
    """Bytes needed to keep every image at all decode scales."""


def decoded_bytes(sizes_N2: Integers, augment: Augment, seed: int) -> Decoded:
    """Return the memory needed for decoded images of these sizes.

    If some images are large enough to be decoded at a reduced scale, `needed` is estimated from four epochs of 256 images.
    """
    whole = 3 * int(sizes_N2.prod(axis=1).sum())
    most = whole * 4 // 3  # decode scales 2, 4 and 8 add less than a third: 1/4 + 1/16 + 1/64
    if int(sizes_N2.max()) < 4 * min(augment.output_size):  # always decoded at full scale
        return Decoded(whole, most)
    rows = np.linspace(0, len(sizes_N2) - 1, min(len(sizes_N2), 256)).astype(np.int64)
    areas = sizes_N2[rows].prod(axis=1)
    kept = np.zeros((len(rows), 9))  # pixels per image and decode scale
    for epoch in range(4):
        draw = augment.draw(seed, epoch, rows, sizes_N2[rows])
        scale = decode_scales(draw.warp(augment.fill, augment.padding_mode).footprint)
        kept[np.arange(len(rows)), scale] = areas / scale**2
    return Decoded(int(whole * kept.sum() / areas.sum()), most)


class Allowance:
    """Cache budget of one loader on a device. Unused bytes stay reserved for the loader. Thread-safe."""

    _all: ClassVar[WeakSet["Allowance"]] = WeakSet()

    def __init__(self, device: torch.device, limit_bytes: int) -> None:
        self.device = device
        self.left = limit_bytes
        self._lock = Lock()
        Allowance._all.add(self)

    def take(self, count: int) -> bool:
        """Take `count` bytes from the budget and return True, or return False if fewer are left."""
        with self._lock:
            if count > self.left:
                return False
            self.left -= count
            return True

    @staticmethod
    def reserved(device: torch.device) -> int:
        """Return the number of bytes reserved on a device by all loaders of this process."""
        return sum(other.left for other in list(Allowance._all) if other.device == device)


def _unreserved(device: torch.device) -> int:
    ranks = ranks_here() if device.type == "cpu" else 1  # each rank has its own cache
    return max(0, free_bytes(device) // ranks - Allowance.reserved(device))


def allow(cache: Cache, decoded: Decoded, device: torch.device, split: str = "") -> Allowance:
    """Return the cache budget of a loader on a device.

    With "auto", the budget is half of the free memory that no other loader has reserved, or 0 if the images do not fit;
    the choice is logged with the name of the `split`. Raises ArgumentError if `cache` is invalid.
    """
    if cache is None or (isinstance(cache, int) and cache >= 0):
        return Allowance(device, min(cache or 0, decoded.most))
    if cache != "auto":
        raise ArgumentError(f"cache must be 'auto', None or a number of bytes, got {cache!r}.")
    free = _unreserved(device)
    if decoded.needed > _SHARE * free:  # unused loaders may still reserve memory
        gc.collect()
        torch.cuda.empty_cache()  # otherwise torch keeps the memory of their images
        free = _unreserved(device)
    fits = decoded.needed <= _SHARE * free
    _log.info(
        "cache: decoded images%s need %.2f GB, and %.1f GB of %s is free: %s",
        f" of split {split!r}" if split else "",
        decoded.needed / 1e9,
        free / 1e9,
        "GPU memory" if device.type == "cuda" else "RAM",
        "each image is decoded once" if fits else "images are decoded every epoch",
    )
    return Allowance(device, min(int(_SHARE * free), decoded.most) if fits else 0)


class PixelCache:
    """Caches decoded images in RAM until the budget is used up; never evicts. Thread-safe."""

    def __init__(self, samples: SampleSource, allowance: Allowance) -> None:
        self._samples, self._allowance = samples, allowance
        self._cached: dict[tuple[int, int], Pixels] = {}
        self._lock = Lock()

    def decode(self, index: int, decode_scale: int = 1) -> Pixels:
        """Decode an image as `SampleSource.decode` does, or return it from the cache. Do not modify it."""
        key = (index, decode_scale)
        cached = self._cached.get(key)
        if cached is not None:
            return cached
        image = self._samples.decode(index, decode_scale)
        with self._lock:
            if key not in self._cached and self._allowance.take(image.nbytes):
                self._cached[key] = image
        return image
