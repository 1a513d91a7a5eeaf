"""What all backends share: samples are prepared on threads ahead of the consumer, and damaged ones are replaced."""

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

_CHUNK = 8  # samples a task: long enough to hide the cost of a task, short enough to share a batch among the threads


@dataclass(frozen=True, slots=True)
class Setup:
    """What a backend is made for, besides an augment."""

    device: torch.device
    """Where images go."""
    dtype: torch.dtype
    batch_size: int
    workers: int
    """Threads."""


@dataclass(slots=True, kw_only=True)
class Work:
    """A batch under way; backends add what they need for one."""

    request: Request
    rows: Sequence[int]
    """Those whose samples threads prepare."""


AnyWork = TypeVar("AnyWork", bound=Work)
Kept = TypeVar("Kept")


class Backend(ABC, Generic[AnyWork, Kept]):
    """Turns requests into images. A subclass says what threads prepare of each sample, and renders batches.

    kept  images that stay decoded, for all epochs and augments.
    """

    name: ClassVar[Name]
    eager: ClassVar[bool] = False
    """Whether a batch is rendered as soon as it is prepared; else when threads have enough to do without it."""

    def __init__(self, augment: Augment, samples: SampleSource, setup: Setup, kept: Kept) -> None:
        self.augment, self.samples, self.setup, self.kept = augment, samples, setup, kept
        self.threads = setup.workers
        """Those that prepare."""

    def with_augment(self, augment: Augment) -> Self:
        """Another backend over the same kept images, for what is drawn from another augment."""
        return type(self)(augment, self.samples, self.setup, self.kept)

    @abstractmethod
    def begin(self, request: Request) -> AnyWork:
        """What is to be done for a batch."""

    @abstractmethod
    def prepare(self, work: AnyWork, row: int) -> None:
        """Read, and mostly decode, the sample in a row. Runs on a thread. Raises SampleError for a damaged one."""

    def redraw(self, work: AnyWork, row: int) -> None:
        """Follow the request, in which another sample has come into a row. Runs on a thread."""

    @abstractmethod
    def render(self, works: Iterable[AnyWork], pool: ThreadPoolExecutor, /) -> Generator[tuple[Request, Tensor]]:
        """Make the images of batches whose samples are prepared, as `run` yields them."""

    def run(self, requests: Iterable[Request]) -> Generator[tuple[Request, Tensor]]:
        """Yield (request, images (N, 3, H, W), channels-last) in order; takes requests ahead. Threads end with the iterator."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="fastflower")
        try:
            yield from self.render(self._prepared(requests, pool), pool)
        finally:
            _end(pool)

    def _prepared(self, requests: Iterable[Request], pool: ThreadPoolExecutor) -> Iterator[AnyWork]:
        """Batches whose samples are prepared, while threads prepare those of the next."""
        started = deque[tuple[AnyWork, deque[Future[None]]]]()
        try:
            for request in requests:
                work = self.begin(request)
                started.append((work, deque(pool.submit(self._prepare, work, rows) for rows in chunks(work.rows))))
                waiting = sum(len(tasks) for _, tasks in started) - len(started[0][1])
                done = self.eager and all(task.done() for task in started[0][1])
                if done or waiting > 2 * self.threads:  # every thread has a task, and one more waits
                    yield _waited_for(*started.popleft())
            while started:
                yield _waited_for(*started.popleft())
        finally:
            started.clear()  # else an error's traceback would hold on to what other threads raised, and to all that they hold

    def _prepare(self, work: AnyWork, rows: Sequence[int]) -> None:
        with libjpeg.warnings():  # a pack's manifest names the images; here every epoch would, and none by its name
            for row in rows:
                while True:
                    try:
                        self.prepare(work, row)
                        break
                    except SampleError as error:
                        self.samples.replace(work.request, row, error)
                        self.redraw(work, row)

    def erased(self) -> Floats:
        """(3,) what erased boxes hold, in the units of the dtype."""
        levels = self.setup.dtype == torch.uint8
        return np.rint(self.augment.erase_levels) if levels else np.array(self.augment.erase_value, np.float64)


AnyBackend = Backend[Any, Any]


def chunks(rows: Sequence[int]) -> list[Sequence[int]]:
    """Rows, as tasks for threads."""
    return [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]


def _waited_for(work: AnyWork, tasks: deque[Future[None]]) -> AnyWork:
    """The batch, when all of its samples are prepared. Raises what a thread raised."""
    while tasks:
        tasks.popleft().result()  # a future that stayed would hold on to this frame for ever
    return work


def _end(pool: ThreadPoolExecutor) -> None:
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
