"""The base class of all backends. Threads prepare samples ahead of the consumer, and replace damaged ones."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastflower.draws.augment import Augment
from fastflower.draws.random import Floats
from fastflower.errors import SampleError
from fastflower.loading.request import Request
from fastflower.loading.samples import SampleSource
from fastflower.shards import libjpeg

Name = Literal["native", "opencv", "dali", "triton"]

_CHUNK = 8  # samples per task: enough to hide a task's overhead, few enough to spread a batch over the threads


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings of a backend other than its augment."""

    device: torch.device
    """Device of the rendered images."""
    dtype: torch.dtype
    batch_size: int
    workers: int
    """Number of threads."""


@dataclass(slots=True, kw_only=True)
class Work:
    """A batch being prepared; backends add their own fields."""

    request: Request
    rows: Sequence[int]
    """Rows that the threads have to prepare."""


AnyWork = TypeVar("AnyWork", bound=Work)
Kept = TypeVar("Kept")


class Backend(ABC, Generic[AnyWork, Kept]):
    """Renders the images of requests. A subclass prepares each sample on a thread, then renders batches.

    kept  Cache of decoded images, shared across epochs and augments.
    """

    name: ClassVar[Name]
    eager: ClassVar[bool] = False
    """Whether to render a batch as soon as it is prepared. By default, first queue enough work for the threads."""

    def __init__(self, augment: Augment, samples: SampleSource, setup: Setup, kept: Kept) -> None:
        self.augment, self.samples, self.setup, self.kept = augment, samples, setup, kept
        self.threads = setup.workers
        """Number of threads that prepare samples."""

    def with_augment(self, augment: Augment) -> Self:
        """Return a backend that uses another augment and shares the cached images."""
        return type(self)(augment, self.samples, self.setup, self.kept)

    @abstractmethod
    def begin(self, request: Request) -> AnyWork:
        """Create the state of a batch whose samples are about to be prepared."""

    @abstractmethod
    def prepare(self, work: AnyWork, row: int) -> None:
        """Read and usually decode the sample in `row`. Runs on a worker thread. Raises SampleError if the sample is damaged."""

    def redraw(self, work: AnyWork, row: int) -> None:
        """Update `work` after the sample in `row` of its request was replaced. Runs on a worker thread."""

    @abstractmethod
    def render(self, works: Iterable[AnyWork], pool: ThreadPoolExecutor, /) -> Generator[tuple[Request, Tensor]]:
        """Render prepared batches, and yield the same tuples as `run`."""

    def run(self, requests: Iterable[Request]) -> Generator[tuple[Request, Tensor]]:
        """Yield (request, images) in order: images (N, 3, H, W), channels-last. The threads stop when the iterator ends."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="fastflower")
        try:
            yield from self.render(self._prepared(requests, pool), pool)
        finally:
            _end(pool)

    def _prepared(self, requests: Iterable[Request], pool: ThreadPoolExecutor) -> Iterator[AnyWork]:
        """Yield prepared batches while threads prepare the next ones."""
        started = deque[tuple[AnyWork, deque[Future[None]]]]()
        try:
            for request in requests:
                work = self.begin(request)
                started.append((work, deque(pool.submit(self._prepare, work, rows) for rows in chunks(work.rows))))
                waiting = sum(len(tasks) for _, tasks in started) - len(started[0][1])
                done = self.eager and all(task.done() for task in started[0][1])
                if done or waiting > 2 * self.threads:  # every thread has a task and another one queued
                    yield _waited_for(*started.popleft())
            while started:
                yield _waited_for(*started.popleft())
        finally:
            started.clear()  # an error's traceback would keep the other threads' errors alive, with all they refer to

    def _prepare(self, work: AnyWork, rows: Sequence[int]) -> None:
        # The manifest lists these warnings. libjpeg would repeat them every epoch, without file names.
        with libjpeg.warnings():
            for row in rows:
                while True:
                    try:
                        self.prepare(work, row)
                        break
                    except SampleError as error:
                        self.samples.replace(work.request, row, error)
                        self.redraw(work, row)

    def erased(self) -> Floats:
        """Return the color (3,) of erased rectangles: in 0 .. 255 if the dtype is uint8, otherwise normalized."""
        levels = self.setup.dtype == torch.uint8
        return np.rint(self.augment.erase_levels) if levels else np.array(self.augment.erase_value, np.float64)


AnyBackend = Backend[Any, Any]


def chunks(rows: Sequence[int]) -> list[Sequence[int]]:
    """Split rows into chunks, one per task."""
    return [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]


def _waited_for(work: AnyWork, tasks: deque[Future[None]]) -> AnyWork:
    """Wait until all samples of a batch are prepared, and return the batch. Re-raises exceptions from threads."""
    while tasks:
        tasks.popleft().result()  # a future left in `tasks` would keep this frame alive
    return work


def _end(pool: ThreadPoolExecutor) -> None:
    """Shut down a pool, and wait until the operating system has removed its threads.

    Before Python 3.13, joining a thread does not wait for the cleanup that libraries do when a thread exits. OpenCV takes
    a lock there, and a process forked at that moment would wait for the lock forever.
    """
    threads = list(pool._threads)
    pool.shutdown(wait=True, cancel_futures=True)
    for thread in threads:
        for _ in range(1000):
            if not Path(f"/proc/self/task/{thread.native_id}").exists():
                break
            sleep(0.001)
