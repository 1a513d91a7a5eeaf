"""The `Loader`: orders, reads, decodes and augments samples, and yields them in batches."""

import logging
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from inspect import signature
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fastflower import distributed
from fastflower.devices import resolve_device
from fastflower.draws.augment import Augment
from fastflower.draws.order import num_steps, step_positions
from fastflower.errors import ArgumentError, ShardError, require
from fastflower.loading.backends.base import Name, Setup
from fastflower.loading.backends.selection import create
from fastflower.loading.batch import Batch, Integers, Pixels, mixed
from fastflower.loading.cache import Cache
from fastflower.loading.request import Request
from fastflower.loading.samples import SampleSource
from fastflower.loading.stats import SPENT, Stats
from fastflower.loading.steps import Order, Shuffle, Tail
from fastflower.machine import cores
from fastflower.shards.folds import FoldView, check_fold
from fastflower.shards.manifest import Manifest
from fastflower.shards.mirror import Mirror
from fastflower.shards.reader import Paths, ShardReader
from fastflower.shards.remote import Remote, remote

_log = logging.getLogger("fastflower")

_REMOTE_WINDOW = 8  # shards: half a gigabyte at the packer's 64 MB per shard, or about ten thousand images
_DRAWN_TOGETHER = 1024  # samples: enough to outweigh the overhead of numpy calls
_BATCHES_AHEAD = 8  # batches that the host may run ahead of the GPU: about 30 ms at 4 ms per step
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


class Loader(IterableDataset[Batch]):
    """Iterates over packed shards in batches, one epoch per `for` loop.

    Each `for` starts the next epoch, even after a `break`. The order and the augmentation depend only on the seed and
    the epoch. An epoch yields every sample at most once, and exactly once with tail="keep". Samples repeat only in a
    padded tail or a balanced order.

    Args:
        shards: Folder written by `pack`, a URL such as s3://bucket/shards, or a `fastflower.shards.remote.Remote`.
            Remote shards are prefetched into a bounded cache on disk.
        split: Split to read, for example "train" (the default) or "val".
        batch_size: Number of samples per step on this rank (default 64). The global batch size is batch_size * world_size.
        augment: Distribution of random augmentations. None (the default) means `Augment()`, the validation view.
        seed: Random seed for the order and the augmentation (default 0).
        device: Device for the batches. None (the default) means CUDA if it is available, otherwise the CPU.
        dtype: Data type of the images: torch.float32 (the default), bfloat16, float16 or uint8. Images in uint8 are not
            normalized.
        cache: Memory for decoded images. "auto" (the default) caches all images if they fit in half of the free RAM (with
            CUDA, half of the free GPU memory), otherwise none. A number of bytes caches as many images as fit. None
            disables the cache.
        rank, world_size: Rank of this process and number of ranks; pass both or neither. They default to the values of
            torch.distributed if it is initialized, otherwise to 0 and 1.
        fold: With shards that were packed with folds: "val" is this fold, from 0, and "train" all others. None (the default)
            reads a split as packed.
        shuffle: Whether to shuffle the samples. None (the default) shuffles "train" only. "balanced" draws all classes
            equally often; each epoch then repeats samples of small classes and skips samples of large ones.
        window: Number of shards that a shuffled epoch reads at a time, shuffling their samples together. None (the
            default) means all shards, or 8 if they are remote. Set a window if storage is slow at random access, or if
            the shards do not fit in the page cache.
        tail: What to do with the last samples if they do not fill a global batch. "drop" (the default if shuffled) skips
            them. "keep" (the default otherwise) splits them over the ranks; a rank that gets none has one fewer step.
            "pad" fills the batch with the first samples of the epoch.
        on_bad: What to do with a damaged sample. "fail" (the default) raises a SampleError. "skip" replaces it with the
            next sample in the index, logs the error once and adds it to `replaced`.
        backend: Backend that renders the batches. With CUDA, "triton" (the default if images are cached) renders from GPU
            memory, and "dali" (the default otherwise) decodes on the GPU in every epoch. "native" and "opencv" render
            on the CPU; without CUDA, "native" is the default if the processor has AVX2, otherwise "opencv". All backends draw
            the same numbers; their pixels differ by one or two gray levels.
        workers: Number of threads. Defaults to the number of cores of this rank plus one, so that no core is idle while a
            thread waits for the GIL. Ranks on the same machine share its cores.
        executor: Deprecated alias for `backend`.

    Raises ShardError if shards are missing or damaged, ArgumentError if an argument is invalid, and DeviceError if CUDA
    is requested but not available.

    Example:
        >>> loader = Loader("shards", batch_size=32, augment=Augment(size=96, crop=(0.5, 1.0)), device="cpu")
        >>> loader.num_samples, len(loader)
        (120, 3)
        >>> for images, labels, index in loader:
        ...     print(tuple(images.shape), images.dtype, tuple(labels.shape), labels.dtype)
        (32, 3, 96, 96) torch.float32 (32,) torch.int64
        (32, 3, 96, 96) torch.float32 (32,) torch.int64
        (32, 3, 96, 96) torch.float32 (32,) torch.int64
    """

    def __init__(
        self,
        shards: str | Path | Remote,
        split: str = "train",
        *,
        fold: int | None = None,
        batch_size: int = 64,
        augment: Augment | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        cache: Cache = "auto",
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: Shuffle | None = None,
        window: int | None = None,
        tail: Tail | None = None,
        on_bad: Literal["fail", "skip"] = "fail",
        backend: Name | None = None,
        workers: int | None = None,
        executor: Name | None = None,
    ) -> None:
        self.shards, self.split, self.fold, self.batch_size, self.seed = shards, split, fold, batch_size, seed
        self.augment = augment or Augment()
        self.device, self.dtype = resolve_device(device), dtype or torch.float32
        self.cache, self.workers = cache, workers or cores() + 1
        backend = _backend_of(backend, executor)
        # Kept as passed, because None may resolve differently in the process that unpickles this loader.
        self._passed = {"device": device, "workers": workers, "backend": backend}
        self.rank, self.world_size = distributed.place(rank, world_size)
        self.shuffle: Shuffle = split == "train" if shuffle is None else shuffle
        source = remote(shards)
        self.window = _REMOTE_WINDOW if window is None and source and self.shuffle else window
        self.tail: Tail = tail or ("drop" if self.shuffle else "keep")
        self.on_bad = on_bad
        self._check(workers)
        self._check_mix(self.augment)

        self._mirror = Mirror.connect(source) if source else None
        self.manifest = self._mirror.manifest if self._mirror else Manifest.load(str(shards))
        check_fold(self.manifest, split, fold)
        if self._mirror:
            self._mirror.open_split(split, self.window or 1, fold)
        if fold is not None:
            self.manifest = FoldView.of(self.manifest, fold)
        fetch = self._mirror.path if self._mirror else None
        self._reader = ShardReader(self.manifest, split, strict=on_bad == "fail" and not fetch, fetch=fetch)
        self._samples = SampleSource(self._reader, replaces=on_bad == "skip")
        self._order = Order(self.manifest.split(split), self._samples.labels, seed, self.shuffle, self.window)
        self._num_steps = num_steps(self.num_samples, self.global_batch_size, drop_tail=self.tail == "drop")
        self._check_steps()
        self.replaced = self._samples.replaced
        """Error message for each damaged sample, by index."""
        setup = Setup(self.device, self.dtype, batch_size, self.workers)
        self._backend = create(backend, self.augment, self._samples, setup, cache, seed=seed)

        self._images = 0
        self._next = (0, 0)  # (epoch, step) at which the next `for` starts
        self._restored = False  # whether load_state_dict set `_next`
        self._position = (0, 0)  # (epoch, step) of the batch after the last one yielded

    def _check(self, workers: int | None) -> None:
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        require(workers is None or workers >= 1, "workers", "at least 1", workers)
        require(self.shuffle in (True, False, "balanced"), "shuffle", "True, False or 'balanced'", self.shuffle)
        require(self.window is None or self.window >= 1, "window", "at least 1 shard", self.window)
        require(self.tail in ("drop", "keep", "pad"), "tail", "'drop', 'keep' or 'pad'", self.tail)
        require(self.on_bad in ("fail", "skip"), "on_bad", "'fail' or 'skip'", self.on_bad)
        require(self.dtype in _DTYPES, "dtype", f"one of {', '.join(map(str, _DTYPES))}", self.dtype)
        if self.shuffle == "balanced" and self.window is not None:
            raise ArgumentError(
                "window must be None with shuffle='balanced', which needs all shards; omit window, and pass a local folder."
            )

    def _check_mix(self, augment: Augment) -> None:
        mixes = augment.mixup or augment.cutmix
        if mixes and (self.batch_size % 2 or self.tail == "keep" or self.dtype == torch.uint8):
            raise ArgumentError(
                "augment: mixup and cutmix pair the samples within a batch, so they require an even batch_size, tail='drop' or "
                f"'pad', and a floating-point dtype; got {self.batch_size}, {self.tail!r} and {self.dtype}."
            )

    def _check_steps(self) -> None:
        if not self._num_steps and self.tail == "drop":
            raise ArgumentError(
                f"batch_size: the global batch of {self.global_batch_size} samples exceeds the {self.num_samples} samples of "
                f"split {self.split!r}, so an epoch would have no steps; lower batch_size (--batch-size), "
                f"or pass tail='keep' to Loader."
            )
        if self.shuffle == "balanced":
            _log.info("shuffle: drawing all classes equally often; an epoch repeats some samples and skips others")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the arguments and the position, but not the cached images."""
        names = signature(Loader.__init__).parameters.keys() - {"self", "executor"}
        arguments = {name: getattr(self, name) for name in names} | self._passed
        position = {"_next": self._next, "_position": self._position, "_restored": self._restored}
        return partial(type(self), **arguments), (), position

    def image(self, index: int) -> Pixels:
        """Return the entire decoded image of a sample, (H, W, 3) RGB. Do not modify the image."""
        return self._samples.decode(index)

    def where(self, index: int) -> str:
        """Return the shard, key and original path of a sample, for use in messages."""
        return self._samples.where(index)

    def path_of(self, index: int) -> str:
        """Return the original path of a sample's image, relative to the packed folder."""
        return self._reader.path(index)

    @property
    def paths(self) -> Paths:
        """Original paths of all samples, by index."""
        return Paths(self._reader)

    @property
    def backend(self) -> Name:
        """Name of the backend that renders the batches."""
        return self._backend.name

    @property
    def num_samples(self) -> int:
        """Number of samples in the split, over all ranks."""
        return len(self._samples.labels)

    @property
    def global_batch_size(self) -> int:
        """Number of samples per step over all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Return the number of steps per epoch. A rank that gets no sample of a kept tail has one fewer step."""
        last_is_empty = self.tail == "keep" and not len(self._positions(self._num_steps - 1))
        return self._num_steps - last_is_empty

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ArgumentError(
                f"num_workers must be 0, got {worker.num_workers}: a Loader has its own threads, and each worker process "
                f"would yield every batch."
            )
        self._position = self._next
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        # Advance here and not in __iter__: torchdata and Lightning create iterators without taking a batch from them.
        epoch, start = self._position = self._next
        self._next, self._restored = (epoch + 1, 0), False
        if self._mirror:
            self._mirror.begin_use()
        rendered = self._backend.run(self._announced(self.requests(epoch, start)))
        waiting_since, used = perf_counter(), deque[torch.cuda.Event]()
        try:
            for request, images in rendered:
                after = request.step + 1
                self._position = (epoch, after) if after < self._num_steps else (epoch + 1, 0)
                labels = torch.as_tensor(self._samples.labels[request.indices])
                index = torch.as_tensor(request.indices)
                batch = self._mixed(request, Batch(self._put(images), self._put(labels), self._put(index)))
                yielded_at = perf_counter()
                self._samples.clock.add("wait", yielded_at - waiting_since)
                self._images += len(index)
                yield batch
                self._pace(used)
                waiting_since = perf_counter()
                self._samples.clock.add("consume", waiting_since - yielded_at)
            self._position = (epoch + 1, 0)  # even if this rank has no samples in the last step
        finally:
            with self._mirror.ending_use() if self._mirror else nullcontext():
                rendered.close()
                self._reader.close_all_but(())  # no file stays open between epochs

    def _pace(self, used: deque[torch.cuda.Event]) -> None:
        """Limit how many batches the host runs ahead of the GPU, because each batch takes GPU memory."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)  # the waiting thread sleeps instead of spinning
        event.record(torch.cuda.current_stream(self.device))
        used.append(event)
        if len(used) > _BATCHES_AHEAD:
            used.popleft().synchronize()

    def _mixed(self, request: Request, batch: Batch) -> Batch:
        augment = request.augment
        if not (augment.mixup or augment.cutmix):
            return batch
        mix = augment.mix(self.seed, request.epoch, request.indices)
        return mixed(batch, mix, len(self.manifest.classes), self._put)

    def stats(self) -> Stats:
        """Return how the loader spent its time over all epochs so far."""
        seconds = {f"{name}_seconds": self._samples.clock[name] for name in SPENT}
        return Stats(images=self._images, workers=self.workers, replaced=len(self.replaced), **seconds)

    def requests(self, epoch: int, start: int = 0) -> Iterator[Request]:
        """Yield the requests of an epoch, starting at step `start`.

        After the first step, the numbers of multiple steps are drawn together, which is three times as fast.
        """
        augment = self.augment  # set_augment may change it during the epoch
        later = range(start + 1, len(self), max(1, _DRAWN_TOGETHER // self.batch_size))
        for first, end in pairwise([*range(start, min(start + 1, len(self))), *later, len(self)]):
            positions = [self._positions(step) for step in range(first, end)]
            indices = self._order.indices(np.concatenate(positions), epoch)
            sizes = self._samples.sizes[indices]
            drawn = Request.drawn(augment, indices, sizes, seed=self.seed, epoch=epoch, step=first)
            row = 0
            for step, count in enumerate(map(len, positions), first):
                yield drawn.take(step, slice(row, row + count))
                row += count

    def _announced(self, requests: Iterator[Request]) -> Iterator[Request]:
        """Yield the requests. Before each one, tell the mirror which shards to prefetch."""
        for request in requests:
            if self._mirror:
                self._reader.close_all_but(self._mirror.prefetch(self._shards_ahead(request.epoch, request.step)))
            yield request

    def _shards_ahead(self, epoch: int, step: int) -> list[str]:
        """Return the names of the shards that a step reads, followed by the shards of the next window."""
        shards = self.manifest.split(self.split).shards
        return [shards[number].name for number in self._order.windows.ahead(self._positions(step), epoch)]

    def _positions(self, step: int) -> Integers:
        ranks = {"rank": self.rank, "world_size": self.world_size}
        return step_positions(step, self.num_samples, self.global_batch_size, **ranks, pad=self.tail == "pad")

    def indices(self, epoch: int, step: int) -> Integers:
        """Return the indices (N,) of this rank's samples in one step of an epoch."""
        return self._order.indices(self._positions(step), epoch)

    def _put(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == self.device.type:
            return tensor
        with torch.cuda.device(self.device):  # otherwise pinning takes memory on the current GPU
            return tensor.pin_memory().to(self.device, non_blocking=True)

    def set_augment(self, augment: Augment) -> None:
        """Change the augmentation, starting with the next `for`. Cached images are kept."""
        self._check_mix(augment)
        self.augment = augment
        self._backend = self._backend.with_augment(augment)

    def set_epoch(self, epoch: int) -> None:
        """Start the next `for` at this epoch's first step, or at the loaded step if `load_state_dict` restored this epoch."""
        if epoch != self._next[0] and self._restored:
            message = "set_epoch(%d): starting at the first step; discarded the loaded position, step %d of epoch %d"
            _log.warning(message, epoch, self._next[1], self._next[0])
        self._next = self._position = (epoch, self._next[1] if epoch == self._next[0] else 0)
        self._restored = False

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values. After k batches of an epoch, the position is batch k (zero-based)."""
        epoch, step = self._position
        return {"epoch": epoch, "step": step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next `for` at the position in `state`.

        The world size may differ from the saved one if the global batch size is the same.
        Raises ShardError if the state was saved with other shards, or a different split, fold, order, seed or global batch size.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ShardError(
                    f"load_state_dict: the state has {name} {state.get(name)!r}, but this loader has {value!r}; "
                    f"resume with the same shards, split, fold, seed and batch_size * world_size."
                )
        self._next = self._position = (int(state["epoch"]), int(state["step"]))
        self._restored = True

    def _identity(self) -> dict[str, object]:
        """Return everything that determines the order and the draws, except the position."""
        return {
            **self.manifest.identity(self.split),
            "split": self.split,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "shuffle": self.shuffle,
            "window": self.window,
            "tail": self.tail,
        }


def _backend_of(backend: Name | None, executor: Name | None) -> Name | None:
    if executor is None:
        return backend
    if backend is not None:
        raise ArgumentError(f"executor is a deprecated alias for backend; pass only backend={backend!r}.")
    warnings.warn(f"Loader(executor=) is deprecated; pass backend={executor!r}.", FutureWarning, stacklevel=3)
    return executor
