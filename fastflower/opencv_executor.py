"""Runs draws on the CPU: OpenCV's SIMD kernels on a pool of threads, which release the interpreter lock while they work."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflower import color, geometry
from fastflower.augment import Augment
from fastflower.batch import Clock, Replace, Request, refuse
from fastflower.errors import SampleError

Pixels = NDArray[np.uint8]

_CHUNK = 8  # samples a task: long enough to hide the cost of a task, short enough to share a batch among the threads
_WARP = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
_SUBPIXEL = 8  # bits of fraction in the corners given to fillPoly
# fillPoly also paints the boundary, about a pixel wide: so far out, it darkens 0.3 shown pixels an image, and 17 at 0.
_BOUNDARY = 0.75


class OpencvExecutor:
    """Turns samples into batches. decoded(index) gives a sample's pixels and runs on the pool's threads."""

    def __init__(
        self,
        augment: Augment,
        dtype: torch.dtype,
        decoded: Callable[[int], Pixels],
        replace: Replace = refuse,
        clock: Clock | None = None,
        *,
        workers: int,
    ) -> None:
        self._render = _Renderer(augment, dtype)
        self._decoded = decoded
        self._replace = replace
        self._clock = clock or Clock()
        self._workers = workers

    def run(self, requests: Iterable[Request]) -> Generator[tuple[Request, Tensor]]:
        """Yield (request, images (N, 3, H, W), channels-last) in order. The threads end with the iterator."""
        started: deque[tuple[Request, Tensor, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="fastflower")
        try:
            for request in requests:
                started.append((request, *self._start(pool, request)))
                if self._enough(started):
                    yield _finished(*started.popleft())
            while started:
                yield _finished(*started.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _enough(self, started: Sequence[tuple[Request, Tensor, list[Future[None]]]]) -> bool:
        """Whether every thread has a task and one more waits, without the batch that is to be yielded."""
        return sum(len(futures) for _, _, futures in started) - len(started[0][2]) > 2 * self._workers

    def _start(self, pool: ThreadPoolExecutor, request: Request) -> tuple[Tensor, list[Future[None]]]:
        indices = request.indices.tolist()
        images, rows = self._render.empty(len(indices))
        jobs = self._render.jobs(request)

        def work(start: int) -> None:
            rendering = 0.0
            for row in range(start, min(start + _CHUNK, len(indices))):
                try:
                    photo, job = self._decoded(indices[row]), jobs[row]
                except SampleError as error:
                    photo, job = self._instead(request, row, error)
                before = perf_counter()
                self._render(photo, job, rows[row])
                rendering += perf_counter() - before
            self._clock.add("augment", rendering)

        return images, [pool.submit(work, start) for start in range(0, len(indices), _CHUNK)]

    def _instead(self, request: Request, row: int, error: SampleError) -> tuple[Pixels, "_Job"]:
        """The next sample that is not damaged; its index goes into the request."""
        other = request
        while True:
            other = self._replace(other, row, error)
            try:
                photo = self._decoded(int(other.indices[row]))
            except SampleError as another:
                error = another
            else:
                request.indices[row] = other.indices[row]
                return photo, self._render.jobs(other)[row]


def _finished(request: Request, images: Tensor, futures: list[Future[None]]) -> tuple[Request, Tensor]:
    for future in futures:
        future.result()  # raises what a thread raised
    return request, images


@dataclass(frozen=True, slots=True)
class _Job:
    """One sample's draw, ready for OpenCV."""

    region: tuple[slice, slice]
    shrink: tuple[int, int]
    blur: tuple[float, float]
    matrix: NDArray[np.float64]
    outside: NDArray[np.int32] | None
    brightness: float
    contrast: float
    saturation: float
    hue: int
    erase: tuple[slice, slice]


class _Renderer:
    """Pixels in, one row of the batch out. Thread-safe: holds only constants."""

    def __init__(self, augment: Augment, dtype: torch.dtype) -> None:
        self._fill = augment.fill
        self._size = augment.output_size
        self._dtype = dtype
        multiply, add = color.normalize_factors(augment.mean, augment.std)
        levels = np.arange(256, dtype=np.float32)[:, None]
        if dtype == torch.uint8:
            self._erased = np.rint(augment.erase_levels)
            self._table = None
        else:
            table = torch.from_numpy(levels * multiply + add).to(dtype)
            self._erased = _as_numpy(torch.tensor(augment.erase_value).to(dtype))
            self._table = _as_numpy(table)[:, None, :]
        _height, width = self._size
        self._multiply, self._add = (np.tile(factor, width) for factor in (multiply, add))

    def empty(self, count: int) -> tuple[Tensor, NDArray[Any]]:
        """A batch to be filled: the tensor (N, 3, H, W), channels-last, and the same memory as (N, H, W, 3)."""
        # By numpy, which asks the kernel for huge pages; torch does not.
        rows = np.empty((count, *self._size, 3), _storage(self._dtype))
        return torch.from_numpy(rows).view(self._dtype).permute(0, 3, 1, 2), rows

    def jobs(self, request: Request) -> list[_Job]:
        draw = request.draw
        warp = draw.warp(request.sizes, self._fill)
        shrink = geometry.shrink_factors(warp.footprint)
        blur = geometry.blur_variance(warp.footprint, shrink)
        matrix = warp.matrix / shrink[:, ::-1, None]
        # From pixel centres at +0.5 to OpenCV's, which lie at whole numbers.
        matrix[:, :, 2] += matrix[:, :, :2].sum(axis=2) / 2 - 0.5
        frame = geometry.corners(np.array([-2.0, -2.0, self._size[0] + 4, self._size[1] + 4]))
        quad = geometry.grow(warp.quad, _BOUNDARY)
        hue = np.rint(draw.hue * 256).astype(int) % 256
        jobs = []
        for row, (top, left, height, width) in enumerate(warp.region.tolist()):
            outside = None
            if warp.masked[row]:
                polygons = np.stack([frame, quad[row]]) - 0.5
                outside = np.rint(polygons * 2**_SUBPIXEL).astype(np.int32)
            down, across = (
                min(factor, side) for factor, side in zip(shrink[row].tolist(), (height, width), strict=False)
            )
            erase_top, erase_left, erase_height, erase_width = draw.erase[row].tolist()
            jobs.append(
                _Job(
                    # Whole boxes only: at most one box at the far edge is replaced by its neighbour.
                    region=(slice(top, top + height - height % down), slice(left, left + width - width % across)),
                    shrink=(down, across),
                    blur=tuple(blur[row].tolist()),
                    matrix=matrix[row],
                    outside=outside,
                    brightness=float(draw.brightness[row]),
                    contrast=float(draw.contrast[row]),
                    saturation=float(draw.saturation[row]),
                    hue=int(hue[row]),
                    erase=(slice(erase_top, erase_top + erase_height), slice(erase_left, erase_left + erase_width)),
                )
            )
        return jobs

    def __call__(self, photo: Pixels, job: _Job, out: NDArray[Any]) -> None:
        image = self._warped(photo[job.region], job)
        image = _toned(image, job.brightness, job.contrast)
        if job.saturation != 1:
            image = cv2.transform(image, color.saturation_matrix(job.saturation))
        if job.hue:
            image = _turned(image, job.hue)
        self._written(image, out)
        if job.erase[0].stop:
            out[job.erase] = self._erased

    def _warped(self, source: Any, job: _Job) -> Any:
        if job.shrink != (1, 1):
            down, across = job.shrink
            size = (source.shape[1] // across, source.shape[0] // down)
            source = cv2.resize(source, size, interpolation=cv2.INTER_AREA)
        if job.blur != (0, 0):
            down, across = map(geometry.blur_kernel, job.blur)
            source = cv2.sepFilter2D(source, -1, across, down, borderType=cv2.BORDER_REPLICATE)
        height, width = self._size
        image = cv2.warpAffine(source, job.matrix, (width, height), flags=_WARP, borderMode=cv2.BORDER_REPLICATE)
        if job.outside is not None:
            cv2.fillPoly(image, list(job.outside), (0, 0, 0), cv2.LINE_AA, _SUBPIXEL)
        return image

    def _written(self, image: Any, out: NDArray[Any]) -> None:
        """Normalise into the batch, in its dtype."""
        if self._table is None:
            out[...] = image
        elif self._dtype == torch.float32:  # a product and a sum take half the time of a look-up
            flat = out.reshape(out.shape[0], -1)
            np.multiply(image.reshape(flat.shape), self._multiply, out=flat)
            np.add(flat, self._add, out=flat)
        else:
            cv2.LUT(image, self._table, out)


def _toned(image: Any, brightness: float, contrast: float) -> Any:
    """Brightness, then contrast about the mean grey of the brightened image."""
    if contrast == 1:
        return image if brightness == 1 else cv2.LUT(image, color.quantized(color.brightness_table(brightness)))
    levels = color.brightness_table(brightness)
    if brightness > 1:  # clips: the mean must be taken afterwards
        image = cv2.LUT(image, color.quantized(levels))
        levels = color.brightness_table(1)
        brightness = 1
    mean = brightness * float(color.LUMA @ cv2.mean(image)[:3])
    return cv2.LUT(image, color.quantized(color.contrast_table(levels, contrast, mean)))


def _turned(image: Any, steps: int) -> Any:
    """Turn the hue by steps / 256 of the wheel."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(steps)  # wraps, as the wheel does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _storage(dtype: torch.dtype) -> Any:
    """The numpy dtype that stores `dtype`; numpy has no bfloat16, so its bits travel as uint16."""
    return {torch.uint8: np.uint8, torch.float32: np.float32}.get(dtype, np.uint16)


def _as_numpy(tensor: Tensor) -> NDArray[Any]:
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()
