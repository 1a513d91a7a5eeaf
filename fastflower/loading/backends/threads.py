"""Makes batches on the CPU: threads decode and render, both of which release the interpreter lock."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from threading import Lock
from time import perf_counter
from typing import Any, ClassVar, Protocol
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflower.draws.augment import Augment
from fastflower.loading.backends.base import Backend, Setup, Work
from fastflower.loading.backends.native import NativeRenderer
from fastflower.loading.backends.opencv import OpencvRenderer
from fastflower.loading.batch import Pixels, Stored, as_numpy, storage
from fastflower.loading.cache import PixelCache
from fastflower.loading.request import Request
from fastflower.loading.samples import SampleSource

_SPARE = 4  # batches whose memory waits to be used again

Job = Any
"""What a renderer does for a row: its own, but for the attribute `decode_scale`, the scale at which the image is decoded."""


class Renderer(Protocol):
    """Decoded images in, rows of the batch out. Thread-safe."""

    def __init__(self, augment: Augment, dtype: torch.dtype) -> None: ...

    def jobs(self, request: Request) -> list[Job]:
        """What to do for each row."""
        ...

    def __call__(self, image: Pixels, job: Job, out: Stored, /) -> None:
        """Write (height, width, 3) into `out`. image  (H, W, 3) uint8, decoded at job.decode_scale."""
        ...


class _Memory:
    """Memory of batches, used again when nobody holds them: the system's comes zeroed, which takes a sixth of the time.

    Thread-safe.
    """

    def __init__(self) -> None:
        # Looked through for what is free again: called back then, Python would swallow a KeyboardInterrupt that came meanwhile.
        self._lent: list[tuple[ref[Stored], NDArray[np.uint8]]] = []
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=_SPARE)
        self._lock = Lock()

    def take(self, shape: tuple[int, ...], dtype: type[np.uint8 | np.float32 | np.uint16]) -> Stored:
        """An array of whatever content."""
        size = prod(shape) * np.dtype(dtype).itemsize
        with self._lock:
            self._free.extend(memory for array, memory in self._lent if array() is None)
            self._lent = [entry for entry in self._lent if entry[0]() is not None]
            memory = self._free.popleft() if self._free else np.empty(0, np.uint8)
            if memory.nbytes < size:
                memory = np.empty(size, np.uint8)  # by numpy, which asks the kernel for huge pages; torch does not
            array = memory[:size].view(dtype).reshape(shape)
            self._lent.append((ref(array), memory))
        return array

    def give_back(self) -> None:
        """To the system, all of it; what is lent goes when nobody holds it."""
        with self._lock:
            self._free.clear()
            self._lent.clear()


@dataclass(slots=True, kw_only=True)
class _Rendering(Work):
    images: Tensor
    """(N, H, W, 3)."""
    out: Stored
    """The same memory."""
    jobs: list[Job]


class ThreadBackend(Backend[_Rendering, PixelCache]):
    """Threads prepare whole rows of a batch: decoded, rendered, erased.

    For a GPU they render into pinned memory, from which it copies by itself.
    """

    renderer: ClassVar[type[Renderer]]

    def __init__(self, augment: Augment, samples: SampleSource, setup: Setup, kept: PixelCache) -> None:
        super().__init__(augment, samples, setup, kept)
        self._render = self.renderer(augment, setup.dtype)
        self._erased = as_numpy(torch.as_tensor(self.erased()).to(setup.dtype))
        self._memory = _Memory()

    def begin(self, request: Request) -> _Rendering:
        count = len(request.indices)
        images = self._blank((count, *self.augment.output_size, 3))
        jobs = self._render.jobs(request)
        return _Rendering(request=request, rows=range(count), images=images, out=as_numpy(images), jobs=jobs)

    def _blank(self, shape: tuple[int, ...]) -> Tensor:
        """A batch of whatever content."""
        device, dtype = self.setup.device, self.setup.dtype
        if device.type != "cuda":
            return torch.as_tensor(self._memory.take(shape, storage(dtype))).view(dtype)
        with torch.cuda.device(device):  # or pinning takes memory of another GPU, the current one
            return torch.empty(shape, dtype=dtype, pin_memory=True)  # torch uses it again when no copy needs it

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
            # By map, which holds no batch while it waits for the next: its memory is used again.
            yield from map(self._finished, works)
        finally:
            self._memory.give_back()

    def _finished(self, work: _Rendering) -> tuple[Request, Tensor]:
        return work.request, work.images.permute(0, 3, 1, 2)


class NativeBackend(ThreadBackend):
    """By kernel.c."""

    name, renderer = "native", NativeRenderer


class OpencvBackend(ThreadBackend):
    """By OpenCV."""

    name, renderer = "opencv", OpencvRenderer
