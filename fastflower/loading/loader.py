"""The `Loader`: orders, reads, decodes and augments samples, and yields them in batches."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Never, Self, SupportsIndex, Unpack

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fastflower import distributed
from fastflower.devices import resolve_device
from fastflower.draws.augment import Augment
from fastflower.errors import ArgumentError, integer
from fastflower.loading import arguments
from fastflower.loading.backends.base import Name, Setup
from fastflower.loading.backends.selection import create
from fastflower.loading.batch import Batch, Integers, Pixels, mixed
from fastflower.loading.cache import Cache
from fastflower.loading.image_files import SPLIT, ImageFiles, find_images
from fastflower.loading.request import Request
from fastflower.loading.samples import SampleSource
from fastflower.loading.stats import SPENT, Stats
from fastflower.loading.steps import Order, Shuffle, Steps, Tail
from fastflower.loading.transfer import Pacing, put
from fastflower.machine import cores
from fastflower.shards.folds import FoldView, check_fold
from fastflower.shards.mirror import Mirror
from fastflower.shards.reader import Paths, ShardReader
from fastflower.shards.remote import Remote, remote
from fastflower.suggestions import refuse_unknown

_log = logging.getLogger("fastflower")

_REMOTE_WINDOW = 8  # shards: half a gigabyte at the packer's 64 MB per shard, or about ten thousand images


class Loader(arguments.Answers, IterableDataset[Batch]):
    """Iterates over packed shards in batches, one epoch per `for` loop.

    Each `for` starts the next epoch, even after a `break`. The order and the augmentation depend only on the seed and
    the epoch. An epoch yields every sample at most once, and exactly once with tail="keep". Samples repeat only in a
    padded tail or a balanced order.

    Args:
        shards: Folder written by `pack`, a URL such as s3://bucket/shards, or a `fastflower.shards.remote.Remote`.
            Remote shards are prefetched into a bounded cache on disk.
        split: Split to read, for example "train" (the default) or "val".
        batch_size: Number of samples per step on this rank (default 64). The global batch size is batch_size * world_size;
            `Recipe.batch_size` is that of all ranks.
        augment: Distribution of random augmentations, or a torchvision transform, which `Augment.from_torchvision` converts.
            None (the default) means `Augment()`, the validation view.
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

    @arguments.needs_shards
    def __init__(
        self,
        shards: str | Path | Remote | ImageFiles,
        split: str = "train",
        *,
        fold: int | None = None,
        batch_size: int = 64,
        augment: arguments.AugmentLike = None,
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
        **unknown: Never,
    ) -> None:
        refuse_unknown("Loader", unknown, _PARAMETERS, arguments.INSTEAD)
        arguments.check_shards(shards, split)
        self.shards, self.split, self.augment = shards, split, arguments.as_augment(augment)
        self.batch_size = integer("batch_size", batch_size, 1)
        self.seed = integer("seed", seed, -(2**63), rule="an integer within 64 bits")
        self.device, self.dtype = resolve_device(device), arguments.as_dtype(dtype)
        workers, backend = arguments.integer_or_none("workers", workers, 1), arguments.backend_of(backend, executor)
        self.cache, self.workers = arguments.as_cache(cache), workers or cores() + 1
        # Kept as passed, because None may resolve differently in the process that unpickles this loader.
        self._passed = {"device": device, "workers": workers, "backend": backend}
        self.rank, self.world_size = distributed.place(rank, world_size)
        self.shuffle: Shuffle = split == "train" if shuffle is None else arguments.as_shuffle(shuffle)
        self.window = arguments.integer_or_none("window", window, 1, unit=" shard")
        source = None if isinstance(shards, ImageFiles) else remote(shards)
        if source and self.shuffle and window is None:
            self.window = _REMOTE_WINDOW
        arguments.check_window(self.window, self.shuffle)
        default: Tail = "drop" if self.shuffle else "keep"
        self.tail: Tail = arguments.one_of("tail", default if tail is None else tail, ("drop", "keep", "pad"))
        self.on_bad = arguments.one_of("on_bad", on_bad, ("fail", "skip"))
        self._check_mix(self.augment)

        self._mirror = Mirror.connect(source) if source else None
        self._reader = self._opened(shards, fold)
        self._samples = SampleSource(self._reader, replaces=on_bad == "skip")
        order = Order(self.manifest.split(split), self._samples.labels, self.seed, self.shuffle, self.window)
        self._steps = Steps(order, self.batch_size, self.rank, self.world_size, self.tail)
        arguments.check_steps(self._steps, split)
        self.replaced = self._samples.replaced
        """Error message for each damaged sample, by index."""
        setup = Setup(self.device, self.dtype, self.batch_size, self.workers)
        self._backend = create(backend, self.augment, self._samples, setup, self.cache, seed=self.seed)

        self._images = 0
        self._next = (0, 0)  # (epoch, step) at which the next `for` starts
        self._restored = False  # whether load_state_dict set `_next`
        self._position = (0, 0)  # (epoch, step) of the batch after the last one yielded

    def _opened(self, shards: str | Path | Remote | ImageFiles, fold: int | None) -> ShardReader | ImageFiles:
        """Read the manifest, and return the reader of the samples."""
        if isinstance(shards, ImageFiles):
            self.manifest, self.fold = shards.manifest, None
            return shards
        self.manifest = self._mirror.manifest if self._mirror else arguments.manifest_of(str(shards))
        self.fold = check_fold(self.manifest, self.split, fold)
        if self._mirror:
            self._mirror.open_split(self.split, self.window or 1, self.fold)
        if self.fold is not None:
            self.manifest = FoldView.of(self.manifest, self.fold)
        fetch = self._mirror.path if self._mirror else None
        return ShardReader(self.manifest, self.split, strict=self.on_bad == "fail" and not fetch, fetch=fetch)

    def _check_mix(self, augment: Augment) -> None:
        arguments.check_labels(self.shards, augment, self.shuffle)
        arguments.check_mix(augment, self.batch_size, self.tail, self.dtype)

    @classmethod
    def from_files(cls, images: str | Path | Iterable[str | Path], **options: Unpack[arguments.FileOptions]) -> Self:
        """Load image files that have no labels and are not packed, for example to classify them with a network of your own.

        Args:
            images: A list of image files, in the order of the index, or a folder: all images in it and its subfolders, sorted
                by path. Files and folders may be mixed. Takes what `pack` takes; the pixels are those of a pack.
            options: `augment`, `batch_size` and the other arguments of Loader, except `split`, `fold` and `window`. By default
                nothing is shuffled, and every image is loaded exactly once.

        All labels are -1. `paths` are the paths as listed, or those of a folder's images with the folder. Files are read in
        place: they must not change while the loader is used. The sizes are read first, 0.1 ms per file. Files that `pack`
        would transcode, such as PNG, are transcoded each time they are read; pack images that you load many times.

        Raises SampleError for a folder without images, or if a file cannot be read (unless on_bad="skip").

        Example:
            >>> loader = Loader.from_files("flowers/rose", batch_size=8, device="cpu")
            >>> loader.num_samples, loader.paths[0]
            (30, 'flowers/rose/...')
            >>> for images, labels, index in loader:
            ...     names = [loader.paths[i] for i in index]
            >>> labels.tolist()
            [-1, -1, -1, -1, -1, -1]
        """
        refuse_unknown("Loader.from_files", options, list(arguments.FileOptions.__annotations__), arguments.INSTEAD)
        files = ImageFiles(find_images(images), strict=options.get("on_bad") != "skip")
        return cls(files, SPLIT, **options)  # pyright: ignore[reportArgumentType]  (a TypedDict may have other keys)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the arguments and the position, but not the cached images."""
        passed = {name: getattr(self, name) for name in _PARAMETERS} | self._passed
        position = {"_next": self._next, "_position": self._position, "_restored": self._restored}
        return partial(type(self), **passed), (), position

    def __repr__(self) -> str:
        """Return one line: what is read, how, and how much it is."""
        ranks = f", rank={self.rank}, world_size={self.world_size}" if self.world_size > 1 else ""
        return (
            f"Loader({getattr(self.shards, 'url', str(self.shards))!r}, {self.split!r}, batch_size={self.batch_size}, "
            f"device={str(self.device)!r}, backend={self.backend!r}{ranks}): {self.num_samples} samples, {len(self)} steps"
        )

    def image(self, index: SupportsIndex) -> Pixels:
        """Return the entire decoded image of a sample, (H, W, 3) RGB. Do not modify the image."""
        return self._samples.decode(self._checked(index))

    def where(self, index: SupportsIndex) -> str:
        """Return the shard, key and original path of a sample, for use in messages."""
        return self._samples.where(self._checked(index))

    def path_of(self, index: SupportsIndex) -> str:
        """Return the original path of a sample's image: relative to the packed folder, or as `from_files` got it."""
        return self._reader.path(self._checked(index))

    def _checked(self, index: SupportsIndex) -> int:
        plain = index.item() if isinstance(index, Tensor) and index.numel() == 1 else index
        return integer("index", plain, 0, at_most=self.num_samples - 1)

    @property
    def paths(self) -> Paths:
        """Original paths of all samples, by index."""
        return Paths(self.num_samples, self._reader.path)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.manifest.classes

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean (red, green, blue) that images are normalized with: (pixel / 255 - mean) / std. Images in uint8 are not."""
        return self.augment.normalization[0]

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation (red, green, blue) that images are normalized with, like `mean`."""
        return self.augment.normalization[1]

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
        return self._steps.here

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
        waiting_since, pacing = perf_counter(), Pacing(self.device)
        try:
            for request, images in rendered:
                after = request.step + 1
                self._position = (epoch, after) if after < self._steps.count else (epoch + 1, 0)
                labels = torch.as_tensor(self._samples.labels[request.indices])
                index = torch.as_tensor(request.indices)
                batch = self._mixed(request, Batch(*(put(tensor, self.device) for tensor in (images, labels, index))))
                batch.classes, batch.augment = self.classes, request.augment
                yielded_at = perf_counter()
                self._samples.clock.add("wait", yielded_at - waiting_since)
                self._images += len(index)
                yield batch
                pacing.wait()
                waiting_since = perf_counter()
                self._samples.clock.add("consume", waiting_since - yielded_at)
            self._position = (epoch + 1, 0)  # even if this rank has no samples in the last step
        finally:
            with self._mirror.ending_use() if self._mirror else nullcontext():
                rendered.close()
                self._reader.close_all_but(())  # no file stays open between epochs

    def _mixed(self, request: Request, batch: Batch) -> Batch:
        augment = request.augment
        if not (augment.mixup or augment.cutmix):
            return batch
        mix = augment.mix(self.seed, request.epoch, request.indices)
        return mixed(batch, mix, len(self.manifest.classes), partial(put, device=self.device))

    def stats(self) -> Stats:
        """Return how the loader spent its time over all epochs so far."""
        seconds = {f"{name}_seconds": self._samples.clock[name] for name in SPENT}
        return Stats(images=self._images, workers=self.workers, replaced=len(self.replaced), **seconds)

    def requests(self, epoch: int, start: int = 0) -> Iterator[Request]:
        """Yield the requests of an epoch, starting at step `start`."""
        return self._steps.requests(self.augment, self._samples.sizes, epoch, start)

    def _announced(self, requests: Iterator[Request]) -> Iterator[Request]:
        """Yield the requests. Before each one, tell the mirror which shards to prefetch."""
        for request in requests:
            if self._mirror:
                self._reader.close_all_but(self._mirror.prefetch(self._steps.shards_ahead(request.epoch, request.step)))
            yield request

    def indices(self, epoch: int, step: int) -> Integers:
        """Return the indices (N,) of this rank's samples in one step of an epoch."""
        step = integer("step", step, 0, at_most=self._steps.count - 1)
        return self._steps.indices(integer("epoch", epoch, 0), step)

    def set_augment(self, augment: arguments.AugmentLike) -> None:
        """Change the augmentation, starting with the next `for`. Cached images are kept."""
        augment = arguments.as_augment(augment)
        self._check_mix(augment)
        self.augment = augment
        self._backend = self._backend.with_augment(augment)

    def set_epoch(self, epoch: int) -> None:
        """Start the next `for` at this epoch's first step. Right after `load_state_dict`, start it where the state stands.

        If the state was saved after the last batch of `epoch`, the next `for` yields no batch, and the one after it is the
        next epoch.
        """
        epoch, (at, step) = integer("epoch", epoch, 0), self._next
        step = arguments.resumed_step(epoch, self._next, self._steps.count) if self._restored else step * (epoch == at)
        self._next, self._position, self._restored = (epoch, step), (epoch, step), False

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values. After k batches of an epoch, the position is batch k (zero-based)."""
        epoch, step = arguments.carried(self._position, self._steps.count)
        return {"epoch": epoch, "step": step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next `for` at the position in `state`.

        The world size may differ from the saved one if the global batch size is the same.
        Raises ShardError if the state was saved with other shards, or a different split, fold, order, seed or global batch size,
        and ArgumentError if it is no loader's state.
        """
        self._next = self._position = arguments.position_in(state, self._identity(), self._steps.count)
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


_PARAMETERS = [name for name in signature(Loader.__init__).parameters if name not in ("self", "executor", "unknown")]
