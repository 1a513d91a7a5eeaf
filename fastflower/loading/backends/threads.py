"""Renders batches on the CPU. Threads decode and render; both steps release the GIL."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from threading import Lock
from time import perf_counter
from typing import Any, ClassVar
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflower.draws.augment import Augment
from fastflower.loading.backends.base import Backend, Setup, Work
from fastflower.loading.backends.native import NativeRenderer
from fastflower.loading.backends.opencv import OpencvRenderer
from fastflower.loading.batch import Stored, as_numpy
from fastflower.loading.cache import PixelCache
from fastflower.loading.request import Request
from fastflower.loading.samples import SampleSource

_SPARE = 4  # maximum number of free memory blocks kept for reuse

Renderer = NativeRenderer | OpencvRenderer


class _Memory:
    """Lends memory for batches, and reuses it once a batch is freed. Thread-safe.

    Without reuse, the system would zero new memory. That would take a sixth of the time when loading from RAM.
    """

    def __init__(self) -> None:
        # `take` polls for freed memory, because Python swallows a KeyboardInterrupt in a weak reference's callback.
        self._lent: list[tuple[ref[NDArray[np.uint8]], NDArray[np.uint8]]] = []
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=_SPARE)
        self._lock = Lock()

    def take(self, size: int) -> NDArray[np.uint8]:
        """Return `size` uninitialized bytes."""
        with self._lock:
            self._free.extend(memory for array, memory in self._lent if array() is None)
            self._lent = [entry for entry in self._lent if entry[0]() is not None]
            memory = self._free.popleft() if self._free else np.empty(0, np.uint8)
            if memory.nbytes < size:
                memory = np.empty(size, np.uint8)  # numpy asks the kernel for huge pages; torch does not
            array = memory[:size]
            self._lent.append((ref(array), memory))
        return array

    def give_back(self) -> None:
        """Return all free memory to the system. Memory that a batch still uses is returned when the batch is freed."""
        with self._lock:
            self._free.clear()
            self._lent.clear()


@dataclass(slots=True, kw_only=True)
class _Rendering(Work):
    images: Tensor
    """(N, H, W, 3)."""
    out: Stored
    """Numpy view of `images`."""
    jobs: list[Any]
    """One job per row, from the renderer's `jobs`."""


class ThreadBackend(Backend[_Rendering, PixelCache]):
    """Decodes and renders each row of a batch, including its erased rectangle, on one thread.

    For a GPU, threads render into pinned memory, which is copied to the GPU asynchronously.
    """

    renderer: ClassVar[type[Renderer]]

    def __init__(self, augment: Augment, samples: SampleSource, setup: Setup, kept: PixelCache) -> None:
        super().__init__(augment, samples, setup, kept)
        self._render = self.renderer(augment, setup.dtype)
        self._erased = as_numpy(torch.as_tensor(self.erased()).to(setup.dtype))
        self._memory = _Memory()

    def begin(self, request: Request) -> _Rendering:
        device, dtype = self.setup.device, self.setup.dtype
        shape = (len(request.indices), *self.augment.output_size, 3)
        if device.type == "cuda":
            with torch.cuda.device(device):  # otherwise pinning takes memory on the current GPU
                images = torch.empty(shape, dtype=dtype, pin_memory=True)  # torch reuses it after the copy
        else:
            images = torch.as_tensor(self._memory.take(prod(shape) * dtype.itemsize)).view(dtype).view(shape)
        jobs = self._render.jobs(request)
        return _Rendering(request=request, rows=range(len(jobs)), images=images, out=as_numpy(images), jobs=jobs)

    def prepare(self, work: _Rendering, row: int) -> None:
        job, out = work.jobs[row], work.out[row]
        image = self.kept.decode(int(work.request.indices[row]), job.decode_scale)
        start = perf_counter()
        self._render(image, job, out)
        top, left, height, width = work.request.draw.erase[row].tolist()
        if height:
            out[top : top + height, left : left + width] = self._erased
        self.samples.clock.add("augment", perf_counter() - start)

    def redraw(self, work: _Rendering, row: int) -> None:
        (work.jobs[row],) = self._render.jobs(work.request.row(row))

    def render(self, works: Iterable[_Rendering], _pool: ThreadPoolExecutor, /) -> Generator[tuple[Request, Tensor]]:
        try:
            # map keeps no reference to a batch while it waits for the next one, so its memory can be reused.
            yield from map(self._finished, works)
        finally:
            self._memory.give_back()

    def _finished(self, work: _Rendering) -> tuple[Request, Tensor]:
        return work.request, work.images.permute(0, 3, 1, 2)


class NativeBackend(ThreadBackend):
    """Renders with kernel.c."""

    name, renderer = "native", NativeRenderer


class OpencvBackend(ThreadBackend):
    """Renders with OpenCV."""

    name, renderer = "opencv", OpencvRenderer
