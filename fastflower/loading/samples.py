"""Reads and decodes the samples of a split, names them in messages, and replaces damaged ones."""

import logging
from collections.abc import Sequence
from time import perf_counter

import numpy as np
from numpy.typing import ArrayLike

from fastflower.errors import SampleError
from fastflower.loading.batch import Pixels
from fastflower.loading.image_files import ImageFiles
from fastflower.loading.request import Request
from fastflower.loading.stats import Clock
from fastflower.shards.image import decode
from fastflower.shards.manifest import INDEX_DTYPE
from fastflower.shards.reader import ShardReader

_log = logging.getLogger("fastflower")


class EncodedFiles:
    """Image files in memory, with the interface of a ShardReader. sizes_N2  (N, 2) height and width of the decoded images."""

    split = ""

    def __init__(self, files: Sequence[bytes], sizes_N2: ArrayLike) -> None:
        self.index = np.zeros(len(files), INDEX_DTYPE)
        self.index["height"], self.index["width"] = np.transpose(np.asarray(sizes_N2))
        self._files = files

    def encoded(self, index: int) -> bytes:
        """Return the bytes of the file at `index`."""
        return self._files[index]

    def where(self, index: int) -> str:
        """Return a name for the image, for use in messages."""
        return f"image {index}"


class SampleSource:
    """Reads and decodes samples for backends. Thread-safe.

    Holds no reference to its loader, so an unused loader is freed at once, with its files and images.

    replaces  Whether to replace a damaged sample with the next one in the index. If False, the error ends the epoch.
    """

    def __init__(self, reader: ShardReader | ImageFiles | EncodedFiles, *, replaces: bool = False) -> None:
        index, self.split = reader.index, reader.split
        self.clock = Clock()
        self.sizes = np.stack([index["height"], index["width"]], axis=1).astype(np.int64)
        """(N, 2) height and width of the decoded images."""
        self.labels = index["label"].astype(np.int64)
        """(N,) class indices."""
        self.replaced: dict[int, str] = {}
        """Error message for each damaged sample, by index."""
        self._reader, self._replaces = reader, replaces

    def where(self, index: int) -> str:
        """Return the shard, key and original path of a sample, for use in messages."""
        return self._reader.where(index)

    def encoded(self, index: int) -> bytes:
        """Return the bytes of a sample's image file. Raises SampleError if the file has changed since it was packed."""
        start = perf_counter()
        try:
            return self._reader.encoded(index)
        finally:
            self.clock.add("read", perf_counter() - start)

    def decode(self, index: int, decode_scale: int = 1) -> Pixels:
        """Decode a sample to (H, W, 3) RGB, with sides divided by `decode_scale`. Raises SampleError if it is damaged."""
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
            scale = f" at decode scale 1/{decode_scale}" if decode_scale > 1 else ""
            raise SampleError(
                f"{self.where(index)}: decodes to {image.shape[1]} x {image.shape[0]} pixels{scale}, but the index says "
                f"{width} x {height}; rebuild the index with fastflower verify --repair, or pack again."
            )
        return image

    def replace(self, request: Request, row: int, error: SampleError) -> None:
        """Replace the damaged sample in `row` with the next one in the index, or raise `error`."""
        damaged, count = int(request.indices[row]), len(self.sizes)
        if self._replaces and damaged not in self.replaced:
            self.replaced[damaged] = error.reason
            _log.warning("replaced a damaged sample with the next one: %s", error.reason)
        if not self._replaces or len(self.replaced) == count:
            # Raise a new exception, because references to the original one would keep its frames alive.
            raise SampleError(str(error), reason=error.reason) from error
        index = (damaged + 1) % count
        request.put(row, index, self.sizes[index])
