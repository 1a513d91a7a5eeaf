"""The samples of a split: from an index to bytes to pixels, where one lies, and what stands in for a damaged one."""

import logging
from collections.abc import Sequence
from time import perf_counter

import numpy as np
from numpy.typing import ArrayLike

from fastflower.errors import SampleError
from fastflower.loading.batch import Pixels
from fastflower.loading.request import Request
from fastflower.loading.stats import Clock
from fastflower.shards.image import decode
from fastflower.shards.manifest import INDEX_DTYPE
from fastflower.shards.reader import ShardReader

_log = logging.getLogger("fastflower")


class EncodedFiles:
    """Image files in memory, for what takes a ShardReader. sizes  (N, 2) height and width of the decoded images."""

    def __init__(self, files: Sequence[bytes], sizes_N2: ArrayLike) -> None:
        self.index = np.zeros(len(files), INDEX_DTYPE)
        self.index["height"], self.index["width"] = np.transpose(np.asarray(sizes_N2))
        self._files = files

    def encoded(self, index: int) -> bytes:
        """The bytes of a file."""
        return self._files[index]

    def where(self, index: int) -> str:
        """Which it is, for messages."""
        return f"image {index}"


class SampleSource:
    """What backends ask for samples. Thread-safe.

    It does not know the loader that it is made for: one that nobody uses is freed at once, with its files and images.

    replaces  put the next sample of the index in the place of a damaged one; else its error stops the epoch.
    """

    def __init__(self, reader: ShardReader | EncodedFiles, *, replaces: bool = False) -> None:
        index = reader.index
        self.clock = Clock()
        self.sizes = np.stack([index["height"], index["width"]], axis=1).astype(np.int64)
        """(N, 2) height and width of the decoded images."""
        self.labels = index["label"].astype(np.int64)
        """(N,) the samples' classes."""
        self.replaced: dict[int, str] = {}
        """Damaged samples, by index, and what is wrong with each."""
        self._reader, self._replaces = reader, replaces

    def where(self, index: int) -> str:
        """Shard, key and original path of a sample, for messages."""
        return self._reader.where(index)

    def encoded(self, index: int) -> bytes:
        """The bytes of a sample's image file. Raises SampleError when they are not those that were packed."""
        start = perf_counter()
        try:
            return self._reader.encoded(index)
        finally:
            self.clock.add("read", perf_counter() - start)

    def decode(self, index: int, decode_scale: int = 1) -> Pixels:
        """An image, (H, W, 3) RGB, a pixel for each box of `decode_scale` pixels. Raises SampleError when it is damaged."""
        encoded = self.encoded(index)
        start = perf_counter()
        try:
            image = decode(encoded, decode_scale)
        except SampleError as error:
            raise SampleError(f"{self.where(index)}: {error}") from None
        finally:
            self.clock.add("decode", perf_counter() - start)
        height, width = self.sizes[index].tolist()
        if image.shape[:2] != (-(-height // decode_scale), -(-width // decode_scale)):
            scale = f" at 1/{decode_scale} of its scale" if decode_scale > 1 else ""
            raise SampleError(
                f"{self.where(index)}: is decoded to {image.shape[1]} x {image.shape[0]} pixels{scale}, the index says "
                f"{width} x {height}; rebuild it with fastflower verify --repair, or pack again."
            )
        return image

    def replace(self, request: Request, row: int, error: SampleError) -> None:
        """Set the next sample of the index into a row whose sample is damaged, or raise what is wrong with that."""
        damaged, count = int(request.indices[row]), len(self.sizes)
        if self._replaces and damaged not in self.replaced:
            self.replaced[damaged] = str(error)
            _log.warning("another sample stands in for a damaged one: %s", error)
        if not self._replaces or len(self.replaced) == count:
            # A new one: what holds on to the other would hold on to its frames.
            raise SampleError(str(error)) from error
        index = (damaged + 1) % count
        request.put(row, index, self.sizes[index])
