"""Makes batches on the CPU: decoding and a renderer on a pool of threads, both of which release the interpreter lock."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, Protocol
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflower.draws.augment import Augment
from fastflower.errors import ArgumentError, SampleError
from fastflower.loading.backends.native import NativeRenderer, available
from fastflower.loading.backends.opencv import OpencvRenderer
from fastflower.loading.batch import Pixels, as_numpy, storage
from fastflower.loading.request import Replace, Request, refuse
from fastflower.loading.stats import Clock
from fastflower.shards import libjpeg

_CPU = torch.device("cpu")
_SPARE = 4  # batches whose memory waits to be used again
_CHUNK = 8  # samples a task: long enough to hide the cost of a task, short enough to share a batch among the threads


class Renderer(Protocol):
    """Pixels in, one row of the batch out. Thread-safe."""

    def jobs(self, request: Request) -> Sequence[Any]:
        """The draws of a batch, a value for each row; its attribute `reduce` says at which scale to decode the photograph."""
        ...

    def __call__(self, photo: Pixels, job: Any, out: NDArray[Any], /) -> None:
        """Write (height, width, 3) into `out`. photo  (H, W, 3) uint8, decoded at job.reduce."""
        ...


def end(pool: ThreadPoolExecutor) -> None:
    """Wait for a pool's threads until the system, too, knows of them no more.

    Before Python 3.13 joining a thread does not wait for what libraries do at its end. OpenCV takes a lock then, and a child
    that is forked meanwhile would wait for it for ever.
    """
    threads = list(pool._threads)
    pool.shutdown(wait=True, cancel_futures=True)
    for thread in threads:
        for _ in range(1000):
            if not Path(f"/proc/self/task/{thread.native_id}").exists():
                break
            sleep(0.001)


class _Memory:
    """Memory of batches, used again when nobody holds them: the system's comes zeroed, which takes a sixth of the time."""

    def __init__(self) -> None:
        # Looked through for what is free again: called back then, Python would swallow a KeyboardInterrupt that came meanwhile.
        self._lent: list[tuple[ref[NDArray[Any]], NDArray[np.uint8]]] = []
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=_SPARE)

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array of whatever content."""
        size = prod(shape) * np.dtype(dtype).itemsize
        self._free.extend(memory for array, memory in self._lent if array() is None)
        self._lent = [entry for entry in self._lent if entry[0]() is not None]
        memory = self._free.popleft() if self._free else np.empty(0, np.uint8)
        if memory.nbytes < size:
            memory = np.empty(size, np.uint8)  # by numpy, which asks the kernel for huge pages; torch does not
        array = memory[:size].view(dtype).reshape(shape)
        self._lent.append((ref(array), memory))
        return array


class ThreadBackend:
    """Turns samples into batches. decoded(index, reduce) gives a sample's pixels and runs on the pool's threads.

    renderer  "native" or "opencv"; None: native where there is one. Raises ArgumentError for "native" where there is none.
    device  where batches go: a GPU copies from pinned memory by itself, so they are rendered into it.
    """

    def __init__(
        self,
        augment: Augment,
        dtype: torch.dtype,
        decoded: Callable[[int, int], Pixels],
        replace: Replace = refuse,
        clock: Clock | None = None,
        *,
        workers: int,
        renderer: str | None = None,
        device: torch.device = _CPU,
    ) -> None:
        if renderer == "native" and not available():
            raise ArgumentError(
                "backend='native' needs a Linux wheel of fastflower and a processor with AVX2; "
                "leave backend out, or pass backend='opencv'."
            )
        native = available() if renderer is None else renderer == "native"
        self._render: Renderer = NativeRenderer(augment, dtype) if native else OpencvRenderer(augment, dtype)
        self._size, self._dtype, self._device = augment.output_size, dtype, device
        erased = np.rint(augment.erase_levels) if dtype == torch.uint8 else np.array(augment.erase_value)
        self._erased = as_numpy(torch.from_numpy(erased).to(dtype))
        self._decoded, self._replace, self._clock, self._workers = decoded, replace, clock or Clock(), workers

    def run(self, requests: Iterable[Request]) -> Generator[tuple[Request, Tensor]]:
        """Yield (request, images (N, 3, H, W), channels-last) in order. The threads end with the iterator."""
        started: deque[tuple[Request, Tensor, list[Future[None]]]] = deque()
        pool, memory = ThreadPoolExecutor(self._workers, thread_name_prefix="fastflower"), _Memory()
        try:
            for request in requests:
                started.append((request, *self._start(pool, memory, request)))
                if self._enough(started):
                    yield _finished(*started.popleft())
            while started:
                yield _finished(*started.popleft())
        finally:
            end(pool)

    def _enough(self, started: Sequence[tuple[Request, Tensor, list[Future[None]]]]) -> bool:
        """Whether every thread has a task and one more waits, without the batch that is to be yielded."""
        return sum(len(futures) for _, _, futures in started) - len(started[0][2]) > 2 * self._workers

    def _start(self, pool: ThreadPoolExecutor, memory: _Memory, request: Request) -> tuple[Tensor, list[Future[None]]]:
        indices = request.indices.tolist()
        images = self._blank(memory, len(indices))
        rows = as_numpy(images)
        jobs = self._render.jobs(request)

        def work(start: int) -> None:
            with libjpeg.warnings():  # a pack's manifest names the images; here every epoch would, and none by its name
                fill(range(start, min(start + _CHUNK, len(indices))))

        def fill(chunk: range) -> None:
            rendering = 0.0
            for row in chunk:
                job, erase = jobs[row], request.draw.erase[row]
                try:
                    photo = self._decoded(indices[row], job.reduce)
                except SampleError as error:
                    photo, job, erase = self._instead(request, row, error)
                before = perf_counter()
                self._render(photo, job, rows[row])
                if erase[2]:
                    top, left, height, width = erase.tolist()
                    rows[row, top : top + height, left : left + width] = self._erased
                rendering += perf_counter() - before
            self._clock.add("augment", rendering)

        return images.permute(0, 3, 1, 2), [pool.submit(work, start) for start in range(0, len(indices), _CHUNK)]

    def _blank(self, memory: _Memory, count: int) -> Tensor:
        """A batch of whatever content, (N, H, W, 3)."""
        shape = (count, *self._size, 3)
        if self._device.type != "cuda":
            return torch.from_numpy(memory.take(shape, storage(self._dtype))).view(self._dtype)
        with torch.cuda.device(self._device):  # or pinning takes memory of another GPU, the current one
            return torch.empty(shape, dtype=self._dtype, pin_memory=True)  # torch uses it again when no copy needs it

    def _instead(self, request: Request, row: int, error: SampleError) -> tuple[Pixels, Any, Any]:
        """The next sample that is not damaged, and its draw; its index goes into the request."""
        other = request
        while True:
            other = self._replace(other, row, error)
            try:
                job = self._render.jobs(other)[row]
                photo = self._decoded(int(other.indices[row]), job.reduce)
            except SampleError as another:
                error = another
            else:
                request.indices[row] = other.indices[row]
                return photo, job, other.draw.erase[row]


def _finished(request: Request, images: Tensor, futures: list[Future[None]]) -> tuple[Request, Tensor]:
    while futures:
        # Raises what a thread raised; a future that stayed would hold on to this frame for ever.
        futures.pop(0).result()
    return request, images
