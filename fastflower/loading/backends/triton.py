"""Renders on a GPU with Triton kernels, from decoded images in GPU memory. Threads decode images that are not cached.

Copies and kernels run on their own stream, one batch ahead of the consumer. The consumer's stream waits for an event
before it uses a batch. Our stream waits for the work queued by the consumer before it writes a batch, because the
memory may be reused. So the host can run ahead of the GPU, and the memory for batches does not grow.
"""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
from torch import Tensor

from fastflower.draws import color, geometry
from fastflower.draws.augment import Augment
from fastflower.loading.backends import triton_kernels as kernels
from fastflower.loading.backends.base import Backend, Setup, Work, chunks
from fastflower.loading.batch import Integers, Pixels
from fastflower.loading.cache import Allowance
from fastflower.loading.request import Request
from fastflower.loading.samples import SampleSource

_SCALES = (1, 2, 4, 8)  # decode scales
_WORD_BYTES = 4  # bytes per pixel
# Output pixels and warps per program. On compute capability 9.0, threads then use at most 48 registers and spill none.
BLOCK, WARPS = 512, 8
_ROW_BYTES = 8 * kernels.WHOLE + 4 * kernels.FRACTIONS


class DeviceImages:
    """Caches decoded images in device memory until the budget is used up. Each pixel takes one four-byte word.

    The new images of a batch share one block of memory. Images are never moved or evicted.
    """

    def __init__(self, num_samples: int, allowance: Allowance) -> None:
        self.device = allowance.device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        """CUDA stream for all work on these images; None on the CPU."""
        self._address = np.zeros((num_samples, len(_SCALES)), np.int64)  # 0 if not cached
        self._width = np.zeros((num_samples, len(_SCALES)), np.int64)
        self._allowance = allowance
        self._pieces: list[Tensor] = []

    def missing(self, indices_N: Integers, decode_scale_N: Integers) -> Integers:
        """Return the rows (M,) of the samples that are not cached at their decode scales."""
        return np.flatnonzero(self._address[indices_N, _level(decode_scale_N)] == 0)

    def find(self, indices_N: Integers, decode_scale_N: Integers) -> tuple[Integers, Integers]:
        """Return the addresses (N,) and widths (N,) of samples at their decode scales, or 0 if not cached."""
        place = (indices_N, _level(decode_scale_N))
        return self._address[place], self._width[place]

    def add(
        self, indices_M: Integers, decode_scale_M: Integers, images: Sequence[Pixels], pool: ThreadPoolExecutor
    ) -> tuple[Integers, Integers, Tensor]:
        """Copy images (H, W, 3) to the device, and cache the new ones if all of them fit in the budget.

        Returns (addresses (M,), widths (M,), memory to keep alive until the kernel is launched).
        """
        level_M = _level(decode_scale_M)
        # Not new: repeats within this batch, and images that an earlier batch has cached since this batch began.
        new = np.zeros(len(level_M), np.bool_)
        new[np.unique(indices_M * len(_SCALES) + level_M, return_index=True)[1]] = True
        new &= self._address[indices_M, level_M] == 0
        order = np.argsort(~new, kind="stable")  # images to cache come first, in one block
        pixels_M = np.array([image.shape[0] * image.shape[1] for image in images])
        kept_pixels = int(pixels_M[new].sum())
        if not self._allowance.take(_WORD_BYTES * kept_pixels):
            new[:], kept_pixels = False, 0
        starts_M = np.empty_like(pixels_M)
        starts_M[order] = np.cumsum(pixels_M[order]) - pixels_M[order]
        staged = self._staged(images, starts_M, pixels_M, pool)
        kept, rest = (part.to(self.device, non_blocking=True) for part in (staged[:kept_pixels], staged[kept_pixels:]))
        past = starts_M - kept_pixels  # start of an image in `rest`
        address_M = np.where(past < 0, kept.data_ptr() + _WORD_BYTES * starts_M, rest.data_ptr() + _WORD_BYTES * past)
        width_M = np.array([image.shape[1] for image in images])
        if kept_pixels:
            self._pieces.append(kept)
            place = (indices_M[new], level_M[new])
            self._address[place], self._width[place] = address_M[new], width_M[new]
        return address_M, width_M, rest

    def _staged(
        self, images: Sequence[Pixels], starts_M: Integers, pixels_M: Integers, pool: ThreadPoolExecutor
    ) -> Tensor:
        """Return the images as words in pinned memory, for asynchronous copies to a GPU. Image i starts at word starts_M[i]."""
        staged = torch.empty(int(pixels_M.sum()), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        words = staged.numpy().view(np.uint8).reshape(-1, _WORD_BYTES)

        def stage(numbers: Sequence[int]) -> None:
            for number in numbers:
                image, start = images[number], starts_M[number]
                place = words[start : start + pixels_M[number]].reshape(*image.shape[:2], _WORD_BYTES)
                cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=place)

        list(pool.map(stage, chunks(range(len(images)))))
        return staged


def _level(decode_scale_N: Integers) -> Integers:
    """Return the positions of decode scales in _SCALES."""
    return np.log2(decode_scale_N).astype(np.int64)


@dataclass(slots=True, kw_only=True)
class _Decoding(Work):
    decode_scale: Integers
    """(N,) decode scales."""
    images: dict[int, Pixels]
    """Decoded images that are not cached on the device, by row."""


class TritonBackend(Backend[_Decoding, DeviceImages]):
    """Decodes images on threads unless they are cached on the device, and renders them with Triton kernels.

    On the CPU, it runs in Triton's interpreter, for tests (TRITON_INTERPRET=1).
    """

    name = "triton"
    eager = True  # a waiting batch takes RAM, and samples that recur in the meantime would be decoded again

    def __init__(self, augment: Augment, samples: SampleSource, setup: Setup, kept: DeviceImages) -> None:
        super().__init__(augment, samples, setup, kept)
        self.stream = kept.stream
        multiply, add = color.normalize_factors(*augment.normalization)
        with self._ours():
            constants = np.concatenate([multiply, add, self.erased()])
            self._constants = torch.tensor(constants, dtype=torch.float32, device=kept.device)

    def begin(self, request: Request) -> _Decoding:
        decode_scale = geometry.decode_scales(request.warp.footprint)
        rows = self.kept.missing(request.indices, decode_scale).tolist()
        return _Decoding(request=request, rows=rows, decode_scale=decode_scale, images={})

    def prepare(self, work: _Decoding, row: int) -> None:
        work.images[row] = self.samples.decode(int(work.request.indices[row]), int(work.decode_scale[row]))

    def redraw(self, work: _Decoding, row: int) -> None:
        (work.decode_scale[row],) = geometry.decode_scales(work.request.row(row).warp.footprint)

    def render(self, works: Iterable[_Decoding], pool: ThreadPoolExecutor, /) -> Generator[tuple[Request, Tensor]]:
        launched = deque[tuple[Request, Tensor, torch.Event | None]]()
        try:
            # map keeps no reference to a batch's images while it waits for the next batch.
            for batch in map(partial(self._launch, pool), works):
                launched.append(batch)
                if len(launched) > 1:
                    yield self._handed_over(*launched.popleft())
            while launched:
                yield self._handed_over(*launched.popleft())
        finally:
            if self.stream:  # unused batches are freed here, but kernels may still be writing to them
                torch.cuda.current_stream(self.kept.device).wait_stream(self.stream)

    def _launch(self, pool: ThreadPoolExecutor, work: _Decoding) -> tuple[Request, Tensor, torch.Event | None]:
        """Copy decoded images to the device, launch the kernels, and return (request, images, event after the kernels)."""
        request, device = work.request, self.kept.device
        shape = (len(request.indices), *self.augment.output_size, 3)
        images = torch.empty(shape, dtype=self.setup.dtype, device=device)  # allocated on the consumer's stream
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(device))
        with self._ours():
            # Memory freed at the end of this block is reused only by later work on the same stream.
            address, width = self.kept.find(request.indices, work.decode_scale)
            if work.images:
                rows = np.array(work.rows)
                decoded = [work.images[row] for row in work.rows]
                added = self.kept.add(request.indices[rows], work.decode_scale[rows], decoded, pool)
                address[rows], width[rows], _held = added
            self.launch(self.tables(request, address, width), images)
            made = self.stream.record_event() if self.stream else None
        return request, images.permute(0, 3, 1, 2), made

    def tables(self, request: Request, address: Integers, width: Integers) -> Tensor:
        """Return both tables of the batch, with the columns that `triton_kernels` defines, in pinned memory.

        address, width  Addresses (N,) and widths (N,) of the decoded images.
        """
        count, resampling = len(address), geometry.resampling(request.warp)
        memory = torch.empty(count * _ROW_BYTES, dtype=torch.uint8, pin_memory=self.stream is not None)
        bytes_of_whole = count * kernels.WHOLE * 8
        whole = memory[:bytes_of_whole].view(torch.int64).numpy().reshape(count, kernels.WHOLE)
        numbers = memory[bytes_of_whole:].view(torch.float32).numpy().reshape(count, kernels.FRACTIONS)
        top, left = resampling.region[:, 0], resampling.region[:, 1]
        whole[:, kernels.ADDRESS] = address + 4 * (top * width + left)
        whole[:, kernels.STRIDE] = width
        whole[:, kernels.HEIGHT : kernels.WIDTH + 1] = resampling.region[:, 2:] // resampling.shrink
        whole[:, kernels.BOX_DOWN : kernels.BOX_ACROSS + 1] = resampling.shrink
        kernel = geometry.blur_kernels(resampling.blur)
        whole[:, kernels.REACH_DOWN : kernels.REACH_ACROSS + 1] = (kernel[:, :, 1:] != 0).sum(axis=2)
        whole[:, kernels.MASKED] = request.warp.masked
        whole[:, kernels.ERASE : kernels.ERASE + 4] = request.draw.erase
        whole[:, kernels.GRAY] = request.draw.gray
        numbers[:, kernels.WARP : kernels.FRAME] = resampling.matrix.reshape(count, 6)
        if request.warp.masked.any():
            frame = geometry.centered(geometry.frame(request.warp, self.augment.output_size))
            numbers[:, kernels.FRAME : kernels.BLUR_DOWN] = frame.reshape(count, 6)
        numbers[:, kernels.BLUR_DOWN : kernels.BRIGHTNESS].reshape(count, 2, -1)[:, :, :-1] = kernel
        numbers[:, [kernels.BLUR_ACROSS - 1, kernels.BRIGHTNESS - 1]] = 0
        for column, name in enumerate(color.FACTORS, kernels.BRIGHTNESS):
            numbers[:, column] = getattr(request.draw, name)
        return memory

    def launch(self, memory: Tensor, out: Tensor, block: int = BLOCK, warps: int = WARPS) -> None:
        """Render into `out`, (N, H, W, 3). memory  Result of `tables`. block, warps  Output pixels and warps per program."""
        augment, (count, height, width, _) = self.augment, out.shape
        memory = memory.to(self.kept.device, non_blocking=True)
        bytes_of_whole = count * kernels.WHOLE * 8
        whole, numbers = memory[:bytes_of_whole].view(torch.int64), memory[bytes_of_whole:].view(torch.float32)
        if not self.stream:  # the interpreter has a high overhead per program
            block = _power_of_two(height * width)
        blocks = -(-height * width // block)
        size = {"H": height, "W": width, "BLOCK": block, "num_warps": warps}
        steps = (
            kernels.SATURATES * (augment.saturation > 0)
            | kernels.TURNS * (augment.hue > 0)
            | kernels.GRAYS * (augment.grayscale > 0)
            | kernels.ERASES * (augment.erase > 0)
            | kernels.NORMALIZES * (self.setup.dtype != torch.uint8)
        )
        grid = (blocks, count)
        if augment.contrast:
            planes = torch.empty((count, 3, height, width), dtype=torch.float16, device=self.kept.device)
            grays = torch.empty((count, blocks), dtype=torch.float32, device=self.kept.device)
            kernels.warp[grid](whole, numbers, planes, grays, **size)
            kernels.color[grid](
                whole, numbers, planes, grays, self._constants, out, **size, STEPS=steps, BLOCKS=_power_of_two(blocks)
            )
        else:
            kernels.render[grid](whole, numbers, self._constants, out, **size, STEPS=steps)

    def _handed_over(self, request: Request, images: Tensor, made: torch.Event | None) -> tuple[Request, Tensor]:
        """Make the consumer's stream, not the host, wait for the images. Return the batch."""
        if made is not None:
            current = torch.cuda.current_stream(self.kept.device)
            current.wait_event(made)
            images.record_stream(current)  # only needed if the consumer changes streams between batches
        return request, images

    def _ours(self) -> AbstractContextManager[object]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
