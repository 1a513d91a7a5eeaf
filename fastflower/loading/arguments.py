"""Checks the arguments of a Loader, and says what stands for those of a DataLoader."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from pathlib import Path
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Literal, Never, ParamSpec, TypedDict, TypeVar, cast

import torch

from fastflower.draws.augment import Augment
from fastflower.draws.torchvision_steps import is_transform
from fastflower.errors import ArgumentError, MissingArgumentError, ShardError, boolean, integer, quoted, require
from fastflower.loading.backends.base import Name
from fastflower.loading.cache import Cache
from fastflower.loading.image_files import ImageFiles
from fastflower.loading.steps import Shuffle, Steps, Tail
from fastflower.packing.folder import images_in
from fastflower.shards.manifest import FILE, WORK, Manifest
from fastflower.shards.remote import Remote
from fastflower.suggestions import called_directly, refuse_unknown

_log = logging.getLogger("fastflower")

Choice = TypeVar("Choice")
Params = ParamSpec("Params")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)

AugmentLike = Augment | Callable[..., object] | None
"""An Augment, a torchvision transform, or None for the validation view."""

# What stands for an argument of DataLoader, DistributedSampler or ImageFolder, by its name.
INSTEAD = {
    "num_workers": "pass workers, a number of threads, or leave it out for one more than the cores",
    "drop_last": "pass tail='drop' for drop_last=True, tail='keep' for drop_last=False",
    "sampler": "pass shuffle=True, False or 'balanced'; each rank takes its share (rank, world_size)",
    "batch_sampler": "pass batch_size, shuffle and tail",
    "num_replicas": "pass world_size, or leave it out under torch.distributed",
    "collate_fn": "leave it out: a batch is always (images, labels, index)",
    "pin_memory": "leave it out: batches are on `device` already",
    "pin_memory_device": "leave it out: batches are on `device` already",
    "in_order": "leave it out: batches always come in the same order",
    "persistent_workers": "leave it out: workers are threads, and decoded images stay cached over the epochs",
    "prefetch_factor": "leave it out: the next batches are always loaded ahead",
    "multiprocessing_context": "leave it out: workers are threads",
    "timeout": "leave it out: workers are threads",
    "generator": "pass seed, on which order and augmentation depend",
    "worker_init_fn": "pass seed, on which order and augmentation depend; workers are threads",
    "transform": "pass it as augment, which takes an Augment or a torchvision transform",
    "target_transform": "change batch.labels in the loop",
    "transforms": "pass it as augment, which takes an Augment or a torchvision transform",
    **dict.fromkeys(
        ("dataset", "root", "data", "folder", "path", "data_dir"),
        "pass shards, the folder that pack wrote, in its place",
    ),
    "loader": "leave it out: images are decoded to RGB",
    "is_valid_file": "leave it out: pack skips damaged images, and pack takes a list of the files to pack",
}

# The same for attributes of a DataLoader and its data set.
_ATTRIBUTES = {
    "dataset": "len(loader.dataset) is loader.num_samples; the classes are loader.classes, the paths loader.paths",
    "batch_sampler": "loader.indices(epoch, step) are the indices of a batch",
    "collate_fn": "a batch is always (images, labels, index), of loader.batch_size samples",
    "pin_memory": "batches are on loader.device already",
    "epoch": "loader.state_dict()['epoch'] is the epoch of the next batch, and loader.set_epoch(epoch) jumps to one",
    "transform": "the augmentation is loader.augment, and loader.set_augment changes it",
    "sampler": "loader.set_epoch(epoch) jumps to an epoch, and without it each loop is the next one",
    "class_to_idx": "the label of a class is loader.classes.index(name)",
    "samples": "the paths are loader.paths",
    "imgs": "the paths are loader.paths",
    "targets": "all labels are loader.manifest.index(loader.split)['label']",
    "num_workers": "the number of threads is loader.workers",
    "drop_last": "loader.tail says what happens to the last samples",
}


class FileOptions(TypedDict, total=False):
    """Arguments of Loader.from_files: those of Loader except for those that only concern shards."""

    batch_size: int
    augment: AugmentLike
    seed: int
    device: str | torch.device | None
    dtype: torch.dtype | None
    cache: Cache
    rank: int | None
    world_size: int | None
    shuffle: bool | None
    tail: Tail | None
    on_bad: Literal["fail", "skip"]
    backend: Name | None
    workers: int | None


class Answers:
    """Says what stands for the ways to use a DataLoader that a Loader does not have."""

    if not TYPE_CHECKING:  # a type checker reports these itself

        def __getattr__(self, name: str) -> Never:
            instead = f": {_ATTRIBUTES[name]}" if name in _ATTRIBUTES else ""
            raise AttributeError(f"a Loader has no attribute {name!r}{instead}", name=name, obj=self)

    def __getitem__(self, index: object) -> Never:
        raise ArgumentError(
            "a Loader yields batches in a for loop; image(index) is one image, and paths[index] its path."
        )


def needs_shards(make: Callable[Params, None]) -> Callable[Params, None]:
    """Decorate Loader.__init__: without shards, arguments that it does not have are answered all the same."""

    @wraps(make)
    def checked(*args: Params.args, **options: Params.kwargs) -> None:
        if len(args) < 2 and "shards" not in options:  # the first is the loader
            refuse_unknown("Loader", options, [name for name in signature(make).parameters if name != "self"], INSTEAD)
            raise MissingArgumentError("Loader needs shards, the folder that pack wrote, as in Loader('shards').")
        make(*args, **options)

    return checked


def check_shards(shards: object, split: object) -> None:
    """Raise ArgumentError unless these are a place and a name."""
    if not isinstance(shards, (str, Path, Remote, ImageFiles)):
        raise ArgumentError(
            f"shards must be a folder that pack wrote, its URL or a Remote, got an object of type {type(shards).__name__}; "
            f"for image files, call Loader.from_files."
        )
    batch = f" (for batches of {split}, pass batch_size={split})" if isinstance(split, int) else ""
    require(isinstance(split, str), "split", f"a name such as 'train' or 'val'{batch}", split)


def manifest_of(shards: str) -> Manifest:
    """Read the manifest. For the name of a split below a pack, and for a folder of images, the error shows the call."""
    try:
        return Manifest.load(shards)
    except ShardError:
        place = Path(shards)
        if any((place / name).exists() for name in (FILE, WORK)) or not called_directly("Loader"):
            raise
        above = str(place.parent)
        if (place.parent / FILE).exists() and place.name in Manifest.load(above).splits:
            what = f"is a split of the pack {above}; pass Loader({above!r}, {place.name!r})."
            raise ShardError(f"{place}: {what}") from None
        if place.is_dir() and len(images_in(place)):
            calls = f"  pack({str(place)!r}, 'shards')\n  Loader('shards', 'train')"
            raise ShardError(
                f"{place}: is a folder of images, not shards; pack it once, then load it:\n{calls}"
            ) from None
        raise


def integer_or_none(name: str, value: object, at_least: int, *, unit: str = "") -> int | None:
    """Return None, or the integer as `integer` does."""
    return None if value is None else integer(name, value, at_least, unit=unit)


def as_augment(augment: AugmentLike) -> Augment:
    """Return the Augment that is meant. Raises ArgumentError for what is neither an Augment nor a torchvision transform."""
    if augment is None or isinstance(augment, Augment):
        return augment or Augment()
    if is_transform(augment):
        return Augment.from_torchvision(augment)
    raise ArgumentError(
        f"augment must be an Augment or a torchvision transform, got {quoted(augment)}; a Loader calls no Python function for "
        f"each image: write Augment(crop=(0.08, 1.0), flip=0.5), or call the function on batch.images."
    )


def backend_of(backend: Name | None, executor: Name | None) -> Name | None:
    """Return the backend, also if it was passed by its deprecated name."""
    if executor is None:
        return backend
    if backend is not None:
        raise ArgumentError(f"executor is a deprecated alias for backend; pass only backend={backend!r}.")
    warnings.warn(f"Loader(executor=) is deprecated; pass backend={executor!r}.", FutureWarning, stacklevel=4)
    return executor


def as_cache(cache: object) -> Cache:
    """Return the cache's budget, with plain numbers. Raises ArgumentError if it is invalid."""
    if cache is None or (isinstance(cache, str) and cache == "auto"):
        return cast("Cache", cache)
    return integer("cache", cache, 0, rule="'auto', None or a number of bytes")


def as_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Return the data type of the images. Raises ArgumentError if it is none."""
    require(dtype is None or dtype in _DTYPES, "dtype", f"one of {', '.join(map(str, _DTYPES))}", dtype)
    return dtype or torch.float32


def as_shuffle(shuffle: object) -> Shuffle:
    """Return how to shuffle, with plain booleans. Raises ArgumentError if it is invalid."""
    if isinstance(shuffle, str) and shuffle == "balanced":
        return "balanced"
    return boolean("shuffle", shuffle, rule="True, False or 'balanced'")


def one_of(name: str, value: Choice, choices: Sequence[str]) -> Choice:
    """Return the value. Raises ArgumentError unless it is one of the choices."""
    rule = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
    require(isinstance(value, str) and value in choices, name, rule, value)
    return value


def check_window(window: int | None, shuffle: Shuffle) -> None:
    """Raise ArgumentError for a window of an order that needs all shards."""
    if shuffle == "balanced" and window is not None:
        raise ArgumentError(
            "window must be None with shuffle='balanced', which needs all shards; omit window, and pass a local folder."
        )


def check_labels(shards: object, augment: Augment, shuffle: Shuffle) -> None:
    """Raise ArgumentError if images without labels are to be mixed or balanced."""
    if isinstance(shards, ImageFiles):
        uses = {
            "shuffle='balanced'": shuffle == "balanced",
            "augment: mixup": augment.mixup,
            "augment: cutmix": augment.cutmix,
        }
        for what, used in uses.items():
            if used:
                raise ArgumentError(f"{what} needs labels, which Loader.from_files does not have; pack class folders.")


def check_mix(augment: Augment, batch_size: int, tail: Tail, dtype: torch.dtype) -> None:
    """Raise ArgumentError if the augment mixes the samples of a batch, which these arguments do not allow."""
    if (augment.mixup or augment.cutmix) and (batch_size % 2 or tail == "keep" or dtype == torch.uint8):
        raise ArgumentError(
            "augment: mixup and cutmix pair the samples within a batch, so they require an even batch_size, tail='drop' or "
            f"'pad', and a floating-point dtype; got {batch_size}, {tail!r} and {dtype}."
        )


def check_steps(steps: Steps, split: str) -> None:
    """Raise ArgumentError if an epoch would have no steps. Log that a balanced epoch repeats samples."""
    order, total = steps.order, steps.batch_size * steps.world_size
    if not steps.count and steps.tail == "drop":
        ranks = f" ({steps.batch_size} on each of {steps.world_size} ranks)" if steps.world_size > 1 else ""
        raise ArgumentError(
            f"batch_size: the global batch of {total} samples{ranks} exceeds the {len(order.labels)} samples of split "
            f"{split!r}, so an epoch would have no steps; lower batch_size (--batch-size), or pass tail='keep' to Loader."
        )
    if order.shuffle == "balanced":
        _log.info("shuffle: drawing all classes equally often; an epoch repeats some samples and skips others")


def position_in(state: Mapping[str, object], identity: Mapping[str, object], num_steps: int) -> tuple[int, int]:
    """Return (epoch, step) from the state of a loader that has this identity.

    Raises ArgumentError if it is no loader's state, and ShardError if it is that of another order of samples.
    """
    keys = state.keys() if hasattr(state, "keys") else ()
    if missing := [name for name in ("epoch", "step", "shards") if name not in keys]:
        raise ArgumentError(
            f"load_state_dict: state must be what state_dict of a Loader returned, but it has no {missing[0]!r}: "
            f"{shortened(state)}."
        )
    for name, value in identity.items():
        if state.get(name) != value:
            raise ShardError(
                f"load_state_dict: the state has {name} {state.get(name)!r}, but this loader has {value!r}; "
                f"resume with the same shards, split, fold, seed and batch_size * world_size."
            )
    # num_steps: all are done, so the next `for` yields nothing; a run that stopped in its validation goes on there.
    step = integer("state['step']", state["step"], 0, at_most=num_steps)
    return integer("state['epoch']", state["epoch"], 0), step


def carried(position: tuple[int, int], num_steps: int) -> tuple[int, int]:
    """Return a position (epoch, step). The one after the last step is the start of the next epoch."""
    epoch, step = position
    return (epoch + 1, 0) if 0 < step == num_steps else position


def resumed_step(epoch: int, loaded: tuple[int, int], num_steps: int) -> int:
    """Return the step at which `epoch` starts if set_epoch follows load_state_dict. It is num_steps if the epoch is finished.

    Logs if the loop yields nothing, or begins elsewhere than at the loaded position.
    """
    at, step = carried(loaded, num_steps)
    if epoch == at:
        return step
    if (epoch + 1, 0) == (at, step):
        _log.info(
            "set_epoch(%d): the state was saved after epoch %d, so the next loop over it has no batch", epoch, epoch
        )
        return num_steps
    _log.warning(
        "set_epoch(%d): starting at the first step of epoch %d, and not at the loaded position, step %d of epoch %d; to "
        "resume there, start the loop over the epochs at state['epoch'], which is %d",
        *(epoch, epoch, step, at, at),
    )
    return 0
