"""Which backend makes a loader's batches, and how much it may keep decoded."""

import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from fastflower.draws.augment import Augment
from fastflower.errors import ArgumentError
from fastflower.loading.backends.native import available
from fastflower.loading.backends.threads import ThreadBackend
from fastflower.loading.cache import Allowance, Decoded, PixelCache, allow
from fastflower.loading.request import Backend
from fastflower.loading.samples import SampleSource

Name = Literal["native", "opencv", "dali", "triton"]
_WORD_BYTES = 4  # of a pixel in a GPU's memory, RGB and a spare; in RAM it takes three


def choose(
    name: Name | None, device: torch.device, cache: Literal["auto"] | int | None, decoded: Callable[[], Decoded]
) -> tuple[Name, Allowance]:
    """(backend, what it may keep). decoded  what the photographs of the split take.

    Raises ArgumentError for a backend that does not go with the device or the cache.
    """
    if name not in (*get_args(Name), None):
        raise ArgumentError(f"backend must be one of {', '.join(get_args(Name))}, got {name!r}.")
    cuda = device.type == "cuda"
    if name == "triton" and not cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ArgumentError(f"backend='triton' needs device='cuda', got {str(device)!r}; leave backend out.")
    if name == "dali" and isinstance(cache, int) and cache:
        raise ArgumentError(
            f"cache must be None with backend='dali', which keeps nothing, got {cache!r}; leave it out."
        )
    if name == "triton" or (name is None and cuda and cache is not None):
        words = Decoded(*(size // 3 * _WORD_BYTES for size in decoded()))
        allowance = allow(cache, words, device)
        return ("triton" if name or allowance.left else "dali"), allowance
    if name == "dali" or (name is None and cuda):
        return "dali", Allowance(device, 0)
    return name or ("native" if available() else "opencv"), allow(cache, decoded(), torch.device("cpu"))


def maker(
    name: Name,
    allowance: Allowance,
    samples: SampleSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    workers: int,
) -> Callable[[Augment], Backend]:
    """A function that makes backends for one augment after another, all over the same kept photographs."""
    if name == "dali":
        from fastflower.loading.backends.dali import DaliBackend  # takes half a second to import

        options = {"device": device, "batch_size": batch_size, "workers": workers}
        sources = (samples.encoded, samples.decode, samples.replace)
        return lambda augment: DaliBackend(augment, dtype, *sources, **options)
    if name == "triton":
        from fastflower.loading.backends.triton import DevicePhotos, TritonBackend

        photos = DevicePhotos(len(samples.sizes), allowance)
        return lambda augment: TritonBackend(augment, dtype, samples.decode, photos, samples.replace, workers=workers)
    kept = PixelCache(samples.decode, allowance)
    how: dict[str, Any] = {"workers": workers, "renderer": name, "device": device}
    return lambda augment: ThreadBackend(augment, dtype, kept, samples.replace, samples.clock, **how)
