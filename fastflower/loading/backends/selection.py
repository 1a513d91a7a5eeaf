"""Chooses a loader's backend and cache budget."""

import os
from collections.abc import Callable
from typing import get_args

import torch

from fastflower.draws.augment import Augment
from fastflower.errors import ArgumentError, quoted
from fastflower.loading.backends.base import AnyBackend, Name, Setup
from fastflower.loading.backends.native import available
from fastflower.loading.backends.threads import NativeBackend, OpencvBackend
from fastflower.loading.cache import Allowance, Cache, Decoded, PixelCache, allow, decoded_bytes
from fastflower.loading.samples import SampleSource

_WORD_BYTES = 4  # bytes per pixel in GPU memory (RGB and padding), compared with three in RAM


def choose(
    name: Name | None, device: torch.device, cache: Cache, decoded: Callable[[], Decoded], split: str = ""
) -> tuple[Name, Allowance]:
    """Return the backend's name and cache budget.

    decoded  Function that returns the memory needed for decoded images. split  Their split, for the log.

    Raises ArgumentError if the backend is unknown or unavailable, or does not support `device` or `cache`.
    """
    if name not in (*get_args(Name), None):
        raise ArgumentError(f"backend must be one of {', '.join(get_args(Name))}, got {quoted(name)}.")
    cuda = device.type == "cuda"
    if name == "triton" and not cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ArgumentError(f"backend='triton' needs device='cuda', got {str(device)!r}; leave backend out.")
    if name == "native" and not available():
        raise ArgumentError(
            "backend='native' needs a Linux wheel of fastflower and a processor with AVX2; "
            "leave backend out, or pass backend='opencv'."
        )
    if name == "dali" and isinstance(cache, int) and cache:
        raise ArgumentError(f"cache must be None with backend='dali', which caches nothing, got {cache!r}; omit it.")
    if name == "triton" or (name is None and cuda and cache is not None):
        words = Decoded(*(size // 3 * _WORD_BYTES for size in decoded()))
        allowance = allow(cache, words, device, split)
        return ("triton" if name or allowance.left else "dali"), allowance
    if name == "dali" or (name is None and cuda):
        return "dali", Allowance(device, 0)
    allowance = Allowance(device, 0) if cache is None else allow(cache, decoded(), torch.device("cpu"), split)
    return name or ("native" if available() else "opencv"), allowance


def create(
    wanted: Name | None, augment: Augment, samples: SampleSource, setup: Setup, cache: Cache = None, *, seed: int = 0
) -> AnyBackend:
    """Create the wanted backend, or the one that suits the device and the cache if `wanted` is None.

    seed  Random seed of the draws, used to estimate the memory for decoded images. Raises ArgumentError like `choose`.
    """
    name, allowance = choose(
        wanted, setup.device, cache, lambda: decoded_bytes(samples.sizes, augment, seed), samples.split
    )
    if name == "dali":
        from fastflower.loading.backends.dali import DaliBackend  # takes half a second to import

        return DaliBackend(augment, samples, setup, None)
    if name == "triton":
        from fastflower.loading.backends.triton import DeviceImages, TritonBackend

        return TritonBackend(augment, samples, setup, DeviceImages(len(samples.sizes), allowance))
    kind = NativeBackend if name == "native" else OpencvBackend
    return kind(augment, samples, setup, PixelCache(samples, allowance))
