"""Renders on a GPU by two Triton kernels, from photographs that lie decoded in its memory; threads decode what does not yet.

Copies and kernels run on a stream of their own, a batch ahead of the consumer. His stream waits for an event before he has a
batch, and ours waits for what he has asked for so far before it writes the next one but one: he may run ahead of the GPU as
far as he likes, and the memory of batches that he let go is used again without growing.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflower.draws import color, geometry
from fastflower.draws.augment import Augment
from fastflower.errors import SampleError
from fastflower.loading.backends import triton_kernels as kernels
from fastflower.loading.backends.threads import end
from fastflower.loading.batch import Pixels
from fastflower.loading.cache import Allowance
from fastflower.loading.request import Replace, Request, refuse
from fastflower.shards import libjpeg

_CHUNK = 8  # samples a task
_BLOCK, _WARPS = 512, 8  # output pixels a program; on compute capability 9.0 at most 48 registers a thread, no spills
_ROW_BYTES = 8 * kernels.WHOLE + 4 * kernels.FRACTIONS
_FACTORS = {"brightness": kernels.BRIGHTNESS, "contrast": kernels.CONTRAST}
_FACTORS |= {"saturation": kernels.SATURATION, "hue": kernels.HUE}


class DevicePhotos:
    """Decoded photographs in a device's memory, first come, while it is allowed to; a pixel takes a word of four bytes.

    Samples that come in one batch lie in one piece, and stay where they are.
    """

    def __init__(self, num_samples: int, allowance: Allowance) -> None:
        self.device = allowance.device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        """All that touches them runs on it."""
        self._address = np.zeros((num_samples, 4), np.int64)  # at scales 1, 2, 4 and 8; 0: not here
        self._width = np.zeros((num_samples, 4), np.int64)
        self._allowance = allowance
        self._pieces: list[Tensor] = []

    def missing(self, indices_N: NDArray[np.int64], reduce_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of samples that are not here at their scale."""
        return np.flatnonzero(self._address[indices_N, np.log2(reduce_N).astype(int)] == 0)

    def places(
        self,
        indices_N: NDArray[np.int64],
        reduce_N: NDArray[np.int64],
        rows_M: NDArray[np.int64],
        photos: Sequence[Pixels],
        pool: ThreadPoolExecutor,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Tensor | None]:
        """(addresses (N,), widths (N,), memory to hold on to until the kernel is launched).

        photos  those that were missing, (H, W, 3) uint8, of the batch's rows `rows_M`.
        """
        level = np.log2(reduce_N).astype(int)
        address, width = self._address[indices_N, level], self._width[indices_N, level]
        if not photos:
            return address, width, None
        new = np.zeros(len(photos), bool)  # neither twice in this batch, nor kept since by one that was under way
        new[np.unique(indices_N[rows_M] * 4 + level[rows_M], return_index=True)[1]] = True
        new &= address[rows_M] == 0
        order = np.argsort(~new, kind="stable")
        rows_M, photos = rows_M[order], [photos[number] for number in order]
        pixels = np.array([photo.shape[0] * photo.shape[1] for photo in photos])
        ends = np.cumsum(pixels)
        staged = torch.empty(int(ends[-1]), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        words = staged.numpy().view(np.uint8).reshape(-1, 4)

        def stage(start: int) -> None:
            for number in range(start, min(start + _CHUNK, len(photos))):
                photo = photos[number]
                place = words[ends[number] - pixels[number] : ends[number]].reshape(*photo.shape[:2], 4)
                cv2.cvtColor(photo, cv2.COLOR_RGB2RGBA, dst=place)

        list(pool.map(stage, range(0, len(photos), _CHUNK)))
        count = int(new.sum())
        kept = int(pixels[:count].sum())
        if not self._allowance.take(4 * kept):
            count = kept = 0
        stays, goes = (part.to(self.device, non_blocking=True) for part in (staged[:kept], staged[kept:]))
        start = ends - pixels
        address[rows_M] = np.where(start < kept, stays.data_ptr() + 4 * start, goes.data_ptr() + 4 * (start - kept))
        width[rows_M] = [photo.shape[1] for photo in photos]
        if kept:
            self._pieces.append(stays)
            rows = rows_M[:count]
            self._address[indices_N[rows], level[rows]] = address[rows]
            self._width[indices_N[rows], level[rows]] = width[rows]
        return address, width, goes


@dataclass(frozen=True, slots=True)
class _Started:
    """A batch of which the rows that are not on the device are being decoded."""

    request: Request
    how: geometry.Resampling
    rows: NDArray[np.int64]
    futures: list[Future[list[Any]]]


class TritonBackend:
    """Turns samples into batches. decode(index, reduce) gives a sample's pixels and runs on threads.

    On the CPU it runs in Triton's interpreter, for tests: TRITON_INTERPRET=1.
    """

    def __init__(
        self,
        augment: Augment,
        dtype: torch.dtype,
        decode: Callable[[int, int], Pixels],
        photos: DevicePhotos,
        replace: Replace = refuse,
        *,
        workers: int,
    ) -> None:
        self._augment, self._dtype, self._workers = augment, dtype, workers
        self._decode, self._photos, self._replace = decode, photos, replace
        self._device, self._stream = photos.device, photos.stream
        multiply, add = color.normalize_factors(augment.mean, augment.std)
        erased = np.rint(augment.erase_levels) if dtype == torch.uint8 else np.array(augment.erase_value)
        with self._ours():
            constants = np.concatenate([multiply, add, erased])
            self._constants = torch.tensor(constants, dtype=torch.float32, device=self._device)

    def run(self, requests: Iterable[Request]) -> Generator[tuple[Request, Tensor]]:
        """Yield (request, images (N, 3, H, W), channels-last) in order. The threads end with the iterator."""
        started: deque[_Started] = deque()
        launched: deque[tuple[Request, Tensor, Any]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="fastflower")
        try:
            for request in requests:
                started.append(self._start(pool, request))
                if self._enough(started):
                    launched.append(self._launch(pool, started.popleft()))
                if len(launched) > 1:
                    yield self._handed_over(*launched.popleft())
            while started or launched:
                if started:
                    launched.append(self._launch(pool, started.popleft()))
                if len(launched) > 1 or not started:
                    yield self._handed_over(*launched.popleft())
        finally:
            end(pool)
            if self._stream:  # batches that nobody took are freed here, and may still be written to
                torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _enough(self, started: Sequence[_Started]) -> bool:
        """Whether the first batch is decoded, or every thread has a task and one more waits without it."""
        waiting = sum(len(batch.futures) for batch in started) - len(started[0].futures)
        return all(future.done() for future in started[0].futures) or waiting > 2 * self._workers

    def _start(self, pool: ThreadPoolExecutor, request: Request) -> _Started:
        """Begin to decode what is not on the device."""
        how = geometry.resampling(request.warp)
        rows = self._photos.missing(request.indices, how.reduce)
        wanted = list(zip(request.indices[rows].tolist(), how.reduce[rows].tolist(), strict=True))

        def decode(part: list[tuple[int, int]]) -> list[Any]:
            with libjpeg.warnings():  # a pack's manifest names the images
                return [self._decoded(*sample) for sample in part]

        parts = [wanted[start : start + _CHUNK] for start in range(0, len(wanted), _CHUNK)]
        return _Started(request, how, rows, [pool.submit(decode, part) for part in parts])

    def _decoded(self, index: int, reduce: int) -> Any:
        """The pixels, or what is wrong with the sample."""
        try:
            return self._decode(index, reduce)
        except SampleError as error:
            return error

    def _launch(self, pool: ThreadPoolExecutor, batch: _Started) -> tuple[Request, Tensor, Any]:
        """Copy what was decoded to the device, and render: (request, images, the event after which they are there)."""
        request, how = batch.request, batch.how
        photos = [photo for future in batch.futures for photo in future.result()]
        for number, row in enumerate(batch.rows.tolist()):
            while isinstance(photos[number], SampleError):
                request = self._replace(request, row, photos[number])
                how = geometry.resampling(request.warp)
                photos[number] = self._decoded(int(request.indices[row]), int(how.reduce[row]))
        shape = (len(request.indices), *self._augment.output_size, 3)
        images = torch.empty(shape, dtype=self._dtype, device=self._device)  # the consumer's stream owns it
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with self._ours():
            # Memory that is freed at the end of this block is used again by what comes later on the same stream.
            address, width, _held = self._photos.places(request.indices, how.reduce, batch.rows, photos, pool)
            self._render(self._tables(request, how, address, width), images)
            made = self._stream.record_event() if self._stream else None
        return request, images.permute(0, 3, 1, 2), made

    def _tables(
        self, request: Request, how: geometry.Resampling, address: NDArray[np.int64], width: NDArray[np.int64]
    ) -> Tensor:
        """Every number of the batch, as `triton_kernels` lays them out, in memory that a GPU can copy from by itself."""
        count = len(address)
        memory = torch.empty(count * _ROW_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None)
        bytes_of_whole = count * kernels.WHOLE * 8
        whole = memory[:bytes_of_whole].view(torch.int64).numpy().reshape(count, kernels.WHOLE)
        numbers = memory[bytes_of_whole:].view(torch.float32).numpy().reshape(count, kernels.FRACTIONS)
        top, left = how.region[:, 0], how.region[:, 1]
        whole[:, kernels.ADDRESS] = address + 4 * (top * width + left)
        whole[:, kernels.STRIDE] = width
        whole[:, kernels.HEIGHT : kernels.WIDTH + 1] = how.region[:, 2:] // how.shrink
        whole[:, kernels.BOX_DOWN : kernels.BOX_ACROSS + 1] = how.shrink
        kernel = geometry.blur_kernels(how.blur)
        whole[:, kernels.REACH_DOWN : kernels.REACH_ACROSS + 1] = (kernel[:, :, 1:] != 0).sum(axis=2)
        whole[:, kernels.MASKED] = request.warp.masked
        whole[:, kernels.ERASE : kernels.ERASE + 4] = request.draw.erase
        numbers[:, kernels.WARP : kernels.FRAME] = how.matrix.reshape(count, 6)
        if request.warp.masked.any():
            frame = geometry.centred(geometry.frame(request.warp, self._augment.output_size))
            numbers[:, kernels.FRAME : kernels.BLUR_DOWN] = frame.reshape(count, 6)
        numbers[:, kernels.BLUR_DOWN : kernels.BRIGHTNESS].reshape(count, 2, -1)[:, :, :-1] = kernel
        numbers[:, [kernels.BLUR_ACROSS - 1, kernels.BRIGHTNESS - 1]] = 0
        for name, column in _FACTORS.items():
            numbers[:, column] = getattr(request.draw, name)
        return memory

    def _render(self, memory: Tensor, out: Tensor, block: int = _BLOCK, warps: int = _WARPS) -> None:
        """Write `out`, (N, H, W, 3). block  output pixels a program; warps  that carry it out."""
        augment, (count, height, width, _) = self._augment, out.shape
        tables = memory.to(self._device, non_blocking=True)
        bytes_of_whole = count * kernels.WHOLE * 8
        whole, numbers = tables[:bytes_of_whole].view(torch.int64), tables[bytes_of_whole:].view(torch.float32)
        if not self._stream:  # the interpreter takes its time for each program
            block = _power_of_two(height * width)
        blocks = -(-height * width // block)
        size = {"H": height, "W": width, "BLOCK": block, "num_warps": warps}
        drawn = {"SATURATION": augment.saturation > 0, "HUE": augment.hue > 0, "ERASE": augment.erase > 0}
        drawn["NORMAL"] = self._dtype != torch.uint8
        grid = (blocks, count)
        if augment.contrast:
            planes = torch.empty((count, 3, height, width), dtype=torch.float16, device=self._device)
            greys = torch.empty((count, blocks), dtype=torch.float32, device=self._device)
            kernels.warp[grid](whole, numbers, planes, greys, **size)
            parts = (whole, numbers, planes, greys, self._constants, out)
            kernels.colour[grid](*parts, **size, **drawn, BLOCKS=_power_of_two(blocks))
        else:
            kernels.render[grid](whole, numbers, self._constants, out, **size, **drawn)

    def _handed_over(self, request: Request, images: Tensor, made: Any) -> tuple[Request, Tensor]:
        """To the consumer's stream, which waits for them; the host does not."""
        if made is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(made)
            images.record_stream(current)  # for whoever changes streams between two batches; else it does nothing
        return request, images

    def _ours(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()
