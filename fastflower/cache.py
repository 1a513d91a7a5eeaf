"""Decoded photographs kept in RAM."""

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import ArgumentError

_log = logging.getLogger("fastflower")

_SHARE = 0.5  # of the RAM that is free when the loader is made


def available_bytes() -> int:
    """RAM that can be had without swapping: the least of what the kernel and the control group allow."""
    limits = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        limits = [int(lines["MemAvailable"].split()[0]) * 1024]
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(limits))


def limit_of(cache: Literal["auto"] | int | None, decoded_bytes: int) -> int:
    """The bytes a loader may keep. "auto": everything where it fits half of the free RAM, else nothing; says which in the log.

    decoded_bytes  what all photographs of the split take. Raises ArgumentError for another kind of `cache`.
    """
    if cache is None:
        return 0
    if isinstance(cache, int) and cache >= 0:
        return cache
    if cache != "auto":
        raise ArgumentError(f"cache must be 'auto', None or a number of bytes, got {cache!r}.")
    free = available_bytes()
    fits = decoded_bytes <= _SHARE * free
    _log.info(
        "cache: %.1f GB decoded, %.1f GB of RAM free: %s",
        decoded_bytes / 1e9,
        free / 1e9,
        "each photograph is decoded once" if fits else "photographs are decoded every epoch",
    )
    return decoded_bytes if fits else 0


class PixelCache:
    """Keeps decoded photographs, first come, until `limit_bytes` are reached. Thread-safe."""

    def __init__(self, decode: Callable[[int, int], NDArray[np.uint8]], limit_bytes: int) -> None:
        self._decode = decode
        self._free = limit_bytes
        self._kept: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self._lock = Lock()

    def __call__(self, index: int, reduce: int) -> NDArray[np.uint8]:
        """A photograph at a scale, (H, W, 3) uint8; not to be written to."""
        key = (index, reduce)
        found = self._kept.get(key)
        if found is not None:
            return found
        image = self._decode(index, reduce)
        with self._lock:
            if key not in self._kept and image.nbytes <= self._free:
                self._free -= image.nbytes
                self._kept[key] = image
        return image
