"""The errors that a caller can act on, and the checks of arguments.

Each message names the file or argument, the rule and the remedy.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class FastflowerError(Exception):
    """Base of every error that fastflower raises on purpose."""


class ArgumentError(FastflowerError, ValueError):
    """An argument, or a field of `Augment` or `Recipe`, is outside its rule."""


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Raise ArgumentError for an argument that is outside its rule."""
    if not holds:
        raise ArgumentError(f"{name} must be {rule}, got {value!r}.")


def make_plain(instance: "DataclassInstance") -> None:
    """Make a frozen dataclass's fields what a checkpoint may hold: numpy's numbers Python's, lists tuples, paths text."""
    for item in fields(instance):
        object.__setattr__(instance, item.name, _plain(getattr(instance, item.name)))


def _plain(value: object) -> object:
    import numpy as np  # takes a third of the time of `fastflower --help`, which comes to no dataclass

    if type(value) in (list, tuple):
        return tuple(map(_plain, cast("Sequence[object]", value)))
    if isinstance(value, np.generic):
        return value.item()  # pyright: ignore[reportUnknownVariableType]
    return str(value) if isinstance(value, Path) else value


class FolderError(FastflowerError):
    """A folder of images cannot be packed as it stands."""


class ShardError(FastflowerError):
    """Shards, their manifest or their index are missing, damaged or do not belong together."""


class SampleError(FastflowerError):
    """One image cannot be decoded, or its bytes are not those that were packed."""


class CheckpointError(FastflowerError):
    """A checkpoint or a file of weights cannot be used, or not be written."""


class DeviceError(FastflowerError):
    """The device that was asked for is not there, or its memory does not suffice."""


class TrainingError(FastflowerError):
    """Training cannot go on: a loss or weights that are not finite, a rank that is gone, a folder that refuses a file."""


class HeldError(FastflowerError):
    """Another process holds a lock; the message says which."""


class ResourceError(FastflowerError):
    """The system refuses another open file, or memory: nothing is wrong with what was to be read."""


class StoppedError(FastflowerError):
    """SIGTERM ended training; its state was saved."""
