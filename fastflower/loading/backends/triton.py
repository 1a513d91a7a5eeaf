"""Renders on a GPU by two Triton kernels, from images that lie decoded in its memory; threads decode what does not yet.

Copies and kernels run on a stream of their own, a batch ahead of the consumer. His stream waits for an event before he has a
batch, and ours waits for what he has asked for so far before it writes the next one but one: he may run ahead of the GPU as
far as he likes, and the memory of batches that he let go is used again without growing.
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

_SCALES = (1, 2, 4, 8)  # of decoding
_WORD_BYTES = 4  # of a pixel
BLOCK, WARPS = 512, 8  # output pixels a program; on compute capability 9.0 at most 48 registers a thread, no spills
_ROW_BYTES = 8 * kernels.WHOLE + 4 * kernels.FRACTIONS


class DeviceImages:
    """Decoded images in a device's memory, first come, while it is allowed to; a pixel takes a word of four bytes.

    Samples that come in one batch lie in one piece, and stay where they are.
    """

    def __init__(self, num_samples: int, allowance: Allowance) -> None:
        self.device = allowance.device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        """All that touches them runs on it."""
        self._address = np.zeros((num_samples, len(_SCALES)), np.int64)  # 0: not here
        self._width = np.zeros((num_samples, len(_SCALES)), np.int64)
        self._allowance = allowance
        self._pieces: list[Tensor] = []

    def missing(self, indices_N: Integers, decode_scale_N: Integers) -> Integers:
        """The rows of samples that are not here at their scale."""
        return np.flatnonzero(self._address[indices_N, _level(decode_scale_N)] == 0)

    def find(self, indices_N: Integers, decode_scale_N: Integers) -> tuple[Integers, Integers]:
        """(addresses (N,), widths (N,)) of samples at their scales; 0 of those that are not here."""
        place = (indices_N, _level(decode_scale_N))
        return self._address[place], self._width[place]

    def add(
        self, indices_M: Integers, decode_scale_M: Integers, images: Sequence[Pixels], pool: ThreadPoolExecutor
    ) -> tuple[Integers, Integers, Tensor]:
        """Bring images (H, W, 3) to the device, and keep them if all that are new may stay.

        Returns (addresses (M,), widths (M,), memory to hold on to until the kernel is launched).
        """
        level_M = _level(decode_scale_M)
        # Neither twice in this batch nor kept since then by the batch before, which was still being decoded.
        new = np.zeros(len(level_M), np.bool_)
        new[np.unique(indices_M * len(_SCALES) + level_M, return_index=True)[1]] = True
        new &= self._address[indices_M, level_M] == 0
        order = np.argsort(~new, kind="stable")  # those that stay come first, in one piece
        pixels_M = np.array([image.shape[0] * image.shape[1] for image in images])
        kept_pixels = int(pixels_M[new].sum())
        if not self._allowance.take(_WORD_BYTES * kept_pixels):
            new[:], kept_pixels = False, 0
        starts_M = np.empty_like(pixels_M)
        starts_M[order] = np.cumsum(pixels_M[order]) - pixels_M[order]
        staged = self._staged(images, starts_M, pixels_M, pool)
        stay, go = (words.to(self.device, non_blocking=True) for words in (staged[:kept_pixels], staged[kept_pixels:]))
        past = starts_M - kept_pixels  # of an image that goes: its start in that piece
        address_M = np.where(past < 0, stay.data_ptr() + _WORD_BYTES * starts_M, go.data_ptr() + _WORD_BYTES * past)
        width_M = np.array([image.shape[1] for image in images])
        if kept_pixels:
            self._pieces.append(stay)
            place = (indices_M[new], level_M[new])
            self._address[place], self._width[place] = address_M[new], width_M[new]
        return address_M, width_M, go

    def _staged(
        self, images: Sequence[Pixels], starts_M: Integers, pixels_M: Integers, pool: ThreadPoolExecutor
    ) -> Tensor:
        """Images as words, each from its start on, in memory that a GPU can copy from by itself."""
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
    """The places in _SCALES."""
    return np.log2(decode_scale_N).astype(np.int64)


@dataclass(slots=True, kw_only=True)
class _Decoding(Work):
    decode_scale: Integers
    """(N,) the scales at which images are decoded."""
    images: dict[int, Pixels]
    """By row, of those that are not on the device."""


class TritonBackend(Backend[_Decoding, DeviceImages]):
    """Threads decode what is not on the device yet; two kernels render.

    On the CPU it runs in Triton's interpreter, for tests: TRITON_INTERPRET=1.
    """

    name = "triton"
    eager = True  # what waits lies decoded in RAM, and a sample that comes again is decoded again

    def __init__(self, augment: Augment, samples: SampleSource, setup: Setup, kept: DeviceImages) -> None:
        super().__init__(augment, samples, setup, kept)
        self.stream = kept.stream
        multiply, add = color.normalize_factors(augment.mean, augment.std)
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
            # By map, which holds no batch's images while it waits for the next.
            for batch in map(partial(self._launch, pool), works):
                launched.append(batch)
                if len(launched) > 1:
                    yield self._handed_over(*launched.popleft())
            while launched:
                yield self._handed_over(*launched.popleft())
        finally:
            if self.stream:  # batches that nobody took are freed here, and may still be written to
                torch.cuda.current_stream(self.kept.device).wait_stream(self.stream)

    def _launch(self, pool: ThreadPoolExecutor, work: _Decoding) -> tuple[Request, Tensor, torch.Event | None]:
        """Copy what was decoded to the device, and render: (request, images, the event after which they are there)."""
        request, device = work.request, self.kept.device
        shape = (len(request.indices), *self.augment.output_size, 3)
        images = torch.empty(shape, dtype=self.setup.dtype, device=device)  # the consumer's stream owns it
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(device))
        with self._ours():
            # Memory that is freed at the end of this block is used again by what comes later on the same stream.
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
        """Every number of the batch, as `triton_kernels` lays them out, in memory that a GPU can copy from by itself.

        address, width  (N,) of the decoded images.
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
        """Have `tables` rendered into `out`, (N, H, W, 3). block  output pixels a program; warps  that carry it out."""
        augment, (count, height, width, _) = self.augment, out.shape
        memory = memory.to(self.kept.device, non_blocking=True)
        bytes_of_whole = count * kernels.WHOLE * 8
        whole, numbers = memory[:bytes_of_whole].view(torch.int64), memory[bytes_of_whole:].view(torch.float32)
        if not self.stream:  # the interpreter takes its time for each program
            block = _power_of_two(height * width)
        blocks = -(-height * width // block)
        size = {"H": height, "W": width, "BLOCK": block, "num_warps": warps}
        steps = (
            kernels.SATURATES * (augment.saturation > 0)
            | kernels.TURNS * (augment.hue > 0)
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
        """To the consumer's stream, which waits for them; the host does not."""
        if made is not None:
            current = torch.cuda.current_stream(self.kept.device)
            current.wait_event(made)
            images.record_stream(current)  # for whoever changes streams between two batches; else it does nothing
        return request, images

    def _ours(self) -> AbstractContextManager[object]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


def _power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()
