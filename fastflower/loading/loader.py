"""Feeds batches: order, then bytes, decode, one warp, one pass of color."""

import hashlib
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
from fastflower.shards.manifest import Manifest
from fastflower.shards.mirror import Mirror
from fastflower.shards.reader import Paths, ShardReader
from fastflower.shards.remote import Remote, remote

_log = logging.getLogger("fastflower")

_REMOTE_WINDOW = 8  # shards: with the packer's 64 MB half a gigabyte, some ten thousand images
_DRAWN_TOGETHER = 1024  # samples: numpy's calls then cost less than what they compute
_BATCHES_AHEAD = 8  # of a GPU: some 30 ms of steps of 4 ms, in which the host may do something else
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


class Loader(IterableDataset[Batch]):
    """Iterates over the batches of one epoch at a time.

    Every `for` is a fresh epoch with its own order and draws, both functions of (seed, epoch): after a `break` the next
    `for` begins the next epoch. Every sample comes at most once an epoch, and exactly once where the tail is kept.

    Args:
        shards: The folder that `pack` wrote; also an address such as s3://bucket/shards, or a
            `fastflower.shards.remote.Remote`, of which shards are downloaded ahead into a bounded cache.
        split: "train" or "val".
        batch_size: Samples a step on this rank; the global batch is batch_size * world_size.
        augment: What is drawn; None is `Augment()`, the validation view.
        seed: Of the order and of the draws.
        device: Where batches are put; None means CUDA where there is one, else the CPU.
        dtype: Of the images: float32 (the default), bfloat16, float16, or uint8, which is not normalized.
        cache: "auto" keeps decoded images when all fit in half of the RAM that is free, with CUDA of the GPU's memory; a
            number of bytes keeps what fits, None nothing.
        rank, world_size: Of torch.distributed where that is initialized, else 0 and 1.
        shuffle: None shuffles "train" only; "balanced" draws all classes equally often, for an epoch that is not exact any more:
            samples of small classes come again, and some of large ones not at all.
        window: Shards that a shuffled epoch reads at a time, shuffled over all of the window's samples; None: all, or 8 of an
            address. For storage that is slow at random access, and where the shards do not fit the page cache.
        tail: What does not fill a global batch: "drop" (the default when shuffled), "keep" (the default when not: ranks get
            uneven parts of it, a rank without a part one step less), or "pad" with the epoch's first samples.
        on_bad: What a damaged sample does: "fail" stops the epoch with a SampleError, "skip" puts the next sample of the
            index in its place; `replaced` counts them, and the log names each once.
        backend: With CUDA "triton" (the default where images are kept: two kernels render from the GPU's memory) or "dali"
            (otherwise: decodes on the GPU, every epoch); "native", a kernel for processors with AVX2 (the default without CUDA,
            where there is one), or "opencv". Their pixels differ by a gray level or two, their draws not at all.
        workers: Threads; by default one more than cores, so that none idles while a thread waits for Python's lock. Ranks on
            one machine share its cores.
        executor: The former name of `backend`.

    Raises ShardError for shards that are missing or damaged, ArgumentError for an argument outside its rule, DeviceError.

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
        self.shards, self.split, self.batch_size, self.seed = shards, split, batch_size, seed
        self.augment = augment or Augment()
        self.device, self.dtype = resolve_device(device), dtype or torch.float32
        self.cache, self.workers = cache, workers or cores() + 1
        backend = _asked_for(backend, executor)
        # As asked for: where a Loader travels to, None may mean another thing.
        self._asked = {"device": device, "workers": workers, "backend": backend}
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
        if self._mirror:
            self._mirror.open_split(split, self.window or 1)
        fetch = self._mirror.path if self._mirror else None
        self._reader = ShardReader(self.manifest, split, strict=on_bad == "fail" and not fetch, fetch=fetch)
        self._samples = SampleSource(self._reader, replaces=on_bad == "skip")
        self._order = Order(self.manifest.split(split), self._samples.labels, seed, self.shuffle, self.window)
        self._num_steps = num_steps(self.num_samples, self.global_batch_size, drop_tail=self.tail == "drop")
        self._check_steps()
        self.replaced = self._samples.replaced
        """Damaged samples, by index, and what is wrong with each."""
        setup = Setup(self.device, self.dtype, batch_size, self.workers)
        self._backend = create(backend, self.augment, self._samples, setup, cache, seed=seed)

        self._images = 0
        self._next = (0, 0)  # (epoch, step) at which the next `for` begins
        self._restored = False  # whether a state said so
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
                "window must be None with shuffle='balanced', which reads all shards; so must shards be local."
            )

    def _check_mix(self, augment: Augment) -> None:
        mixes = augment.mixup or augment.cutmix
        if mixes and (self.batch_size % 2 or self.tail == "keep" or self.dtype == torch.uint8):
            raise ArgumentError(
                "augment: mixup and cutmix mix pairs of a batch, in floating point: they need an even batch_size, tail 'drop' "
                f"or 'pad' and a dtype other than uint8; got {self.batch_size}, {self.tail!r} and {self.dtype}."
            )

    def _check_steps(self) -> None:
        if not self._num_steps and self.tail == "drop":
            raise ArgumentError(
                f"batch_size: {self.global_batch_size}, of all ranks together, exceeds the {self.num_samples} samples of "
                f"split {self.split!r}, so an epoch would have no step; lower it (--batch-size), or give a Loader tail='keep'."
            )
        if self.shuffle == "balanced":
            _log.info("shuffle: classes come equally often, so that an epoch does not hold every sample exactly once")

    def __reduce__(self) -> tuple[object, ...]:
        """To another process: made again from the same arguments, at the same place; nothing kept goes along."""
        names = signature(Loader.__init__).parameters.keys() - {"self", "executor"}
        arguments = {name: getattr(self, name) for name in names} | self._asked
        place = {"_next": self._next, "_position": self._position, "_restored": self._restored}
        return partial(type(self), **arguments), (), place

    def image(self, index: int) -> Pixels:
        """The whole decoded image of a sample, (H, W, 3) RGB; not to be written to."""
        return self._samples.decode(index)

    def where(self, index: int) -> str:
        """Shard, key and original path of a sample, for messages."""
        return self._samples.where(index)

    def path_of(self, index: int) -> str:
        """The path, relative to the packed folder, that a sample's image had."""
        return self._reader.path(index)

    @property
    def paths(self) -> Paths:
        """`path_of` every sample, by index."""
        return Paths(self._reader)

    @property
    def backend(self) -> Name:
        """Which of them makes the batches."""
        return self._backend.name

    @property
    def num_samples(self) -> int:
        """Samples in the split, over all ranks."""
        return len(self._samples.labels)

    @property
    def global_batch_size(self) -> int:
        """Samples a step over all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Steps in an epoch: the same on every rank, but for one fewer where a kept tail has no sample for it."""
        last_is_empty = self.tail == "keep" and not len(self._positions(self._num_steps - 1))
        return self._num_steps - last_is_empty

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ArgumentError(
                f"num_workers must be 0, got {worker.num_workers}: a Loader has threads of its own, and each worker process "
                f"would feed every batch."
            )
        self._position = self._next
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        # At the first batch, not in __iter__: torchdata and Lightning make iterators that they take no batch from.
        epoch, start = self._position = self._next
        self._next, self._restored = (epoch + 1, 0), False
        if self._mirror:
            self._mirror.begin_use()
        made = self._backend.run(self._announced(self.requests(epoch, start)))
        asked, used = perf_counter(), deque[torch.cuda.Event]()
        try:
            for request, images in made:
                after = request.step + 1
                self._position = (epoch, after) if after < self._num_steps else (epoch + 1, 0)
                labels = torch.as_tensor(self._samples.labels[request.indices])
                index = torch.as_tensor(request.indices)
                batch = self._mixed(request, Batch(self._put(images), self._put(labels), self._put(index)))
                given = perf_counter()
                self._samples.clock.add("wait", given - asked)
                self._images += len(index)
                yield batch
                self._pace(used)
                asked = perf_counter()
                self._samples.clock.add("consume", asked - given)
            self._position = (epoch + 1, 0)  # where this rank has no part of the last step
        finally:
            with self._mirror.ending_use() if self._mirror else nullcontext():
                made.close()
                self._reader.close_all_but(())  # no file stays open between epochs

    def _pace(self, used: deque[torch.cuda.Event]) -> None:
        """Let a host that asks a GPU for steps run ahead of it by so many batches: unbounded it takes memory for each."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)  # the waiting thread sleeps
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
        """Where the time of all epochs so far went."""
        seconds = {f"{name}_seconds": self._samples.clock[name] for name in SPENT}
        return Stats(images=self._images, workers=self.workers, replaced=len(self.replaced), **seconds)

    def requests(self, epoch: int, start: int = 0) -> Iterator[Request]:
        """What the backend is asked for in an epoch, from step `start` on.

        After the first, steps are drawn together, which takes a third of the time.
        """
        augment = self.augment  # whatever it is set to meanwhile
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
        """Requests, each after the mirror has heard which shards it needs, and which come next."""
        for request in requests:
            if self._mirror:
                self._reader.close_all_but(self._mirror.prefetch(self._shards_ahead(request.epoch, request.step)))
            yield request

    def _shards_ahead(self, epoch: int, step: int) -> list[str]:
        """Return the names of the shards that a step reads, then those of the next window."""
        shards = self.manifest.split(self.split).shards
        return [shards[number].name for number in self._order.windows.ahead(self._positions(step), epoch)]

    def _positions(self, step: int) -> Integers:
        ranks = {"rank": self.rank, "world_size": self.world_size}
        return step_positions(step, self.num_samples, self.global_batch_size, **ranks, pad=self.tail == "pad")

    def indices(self, epoch: int, step: int) -> Integers:
        """(N,) the samples of a step of an epoch on this rank."""
        return self._order.indices(self._positions(step), epoch)

    def _put(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == self.device.type:
            return tensor
        with torch.cuda.device(self.device):  # or pinning takes memory of another GPU, the current one
            return tensor.pin_memory().to(self.device, non_blocking=True)

    def set_augment(self, augment: Augment) -> None:
        """Draw from another distribution from the next `for` on; images that are kept stay."""
        self._check_mix(augment)
        self.augment = augment
        self._backend = self._backend.with_augment(augment)

    def set_epoch(self, epoch: int) -> None:
        """Begin the next `for` in this epoch: at its start, or, right after `load_state_dict`, where that stands in it."""
        if epoch != self._next[0] and self._restored:
            told = "set_epoch(%d): begins at the start of that epoch; the loaded position, step %d of epoch %d, is discarded"
            _log.warning(told, epoch, self._next[1], self._next[0])
        self._next = self._position = (epoch, self._next[1] if epoch == self._next[0] else 0)
        self._restored = False

    def state_dict(self) -> dict[str, Any]:
        """Where feeding stands, a few plain values: after k batches of an epoch, a restored loader begins with batch k."""
        epoch, step = self._position
        return {"epoch": epoch, "step": step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next `for` where `state_dict` was taken, also on another world size with the same global batch.

        Raises ShardError naming what differs when the state belongs to other shards, another seed or global batch.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ShardError(
                    f"load_state_dict: the state has {name} {state.get(name)!r}, this loader {value!r}; "
                    f"resume with the same shards, split, seed and batch_size * world_size."
                )
        self._next = self._position = (int(state["epoch"]), int(state["step"]))
        self._restored = True

    def _identity(self) -> dict[str, object]:
        """What the order and the draws depend on, besides the position."""
        checksums = "".join(shard.sha256 for shard in self.manifest.split(self.split).shards)
        return {
            "shards": hashlib.sha256(checksums.encode()).hexdigest()[:16],
            "split": self.split,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "shuffle": self.shuffle,
            "window": self.window,
            "tail": self.tail,
        }


def _asked_for(backend: Name | None, executor: Name | None) -> Name | None:
    if executor is None:
        return backend
    if backend is not None:
        raise ArgumentError(f"executor is the former name of backend; pass backend={backend!r} alone.")
    warnings.warn(f"Loader(executor=) is called backend= now; pass backend={executor!r}.", FutureWarning, stacklevel=3)
    return executor
