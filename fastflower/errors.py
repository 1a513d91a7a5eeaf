"""The errors that a caller can handle, and helpers that check arguments.

Each message names the file or argument, the rule and the remedy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from math import isfinite, nan
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, cast, get_args, get_origin

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class FastflowerError(Exception):
    """Base class of all errors that fastflower raises on purpose. Catch it to report any expected failure."""


class ArgumentError(FastflowerError, ValueError):
    """Raised if an argument, or a field of `Augment` or `Recipe`, is invalid. The message states the rule."""


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Raise ArgumentError with the argument's name, rule and value unless `holds` is True."""
    if not holds:
        raise ArgumentError(f"{name} must be {rule}, got {quoted(value)}.")


def quoted(value: object) -> str:
    """Return a value's repr for a message. A long one is cut in the middle; of long bytes, only the size is named."""
    text = repr(value)
    if len(text) <= _MOST_CHARACTERS:
        return text
    if isinstance(value, (bytes, bytearray)):
        return f"{type(value).__name__} ({len(value)} bytes)"
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"


_MOST_CHARACTERS = 80


def integer(
    name: str, value: object, at_least: int, *, at_most: int = 2**63 - 1, unit: str = "", rule: str | None = None
) -> int:
    """Return an integer, also one of numpy's, as a plain int. Raises ArgumentError if it is none or is out of range.

    unit  Follows the smallest value in the message, for example " pixel".  rule  Stands for the whole rule.
    """
    truth = isinstance(value, bool)  # which Python counts among the integers
    whole = int(value) if isinstance(value, Integral) and not truth else None
    holds = whole is not None and at_least <= whole <= at_most
    if rule is None:
        limited = at_most < 2**63 - 1
        rule = f"an integer from {at_least} to {at_most}{unit}" if limited else f"an integer, at least {at_least}{unit}"
        rule = rule if limited else rule + limit_of(value)
    require(holds, name, rule, value)
    return cast("int", whole)


def limit_of(value: object) -> str:
    """Return the rest of the rule for an integer that does not fit into 64 bits."""
    return " and within 64 bits" if isinstance(value, Integral) and not -(2**63) <= int(value) < 2**63 else ""


def number(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> float:
    """Return a finite number, also one of numpy's, as a plain float. Raises ArgumentError unless it is one and `holds`."""
    truth = isinstance(value, bool)
    try:
        real = float(value) if isinstance(value, Real) and not truth else nan
    except OverflowError:  # an integer of more than 308 digits
        real = nan
    require(isfinite(real) and holds(real), name, rule, value)
    return real


def boolean(name: str, value: object, rule: str = "True or False") -> bool:
    """Return True or False, also one of numpy's, as a plain bool. Raises ArgumentError for anything else."""
    plain = bool(value) if type(value).__name__ == "bool" and type(value).__module__ == "numpy" else value
    require(isinstance(plain, bool), name, rule, value)
    return cast("bool", plain)


Rules = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""By field of a dataclass: what it must be, as text, and a test of a value that has the field's type and is not None."""


def check_fields(instance: "DataclassInstance", rules: Rules, *, owner: str | None = None) -> None:
    """Check the fields of a frozen dataclass against their types and `rules`, and make their values plain.

    numpy scalars become Python numbers, integers become floats where the type is float, lists, arrays and tensors become
    tuples, and paths become strings. Raises ArgumentError with the field, its rule and the value. A field without a rule
    of its own has that of its type. owner  Stands before the field's name; by default the class and a dot.
    """
    owner = f"{type(instance).__name__}." if owner is None else owner
    for item in fields(instance):
        kind, value = item.type, getattr(instance, item.name)
        choices = [text for one in (kind, *get_args(kind)) if get_origin(one) is Literal for text in get_args(one)]
        rule, holds = rules.get(item.name, (_RULES.get(kind) or f"one of {', '.join(choices)}", _anything))
        close = get_close_matches(value.lower(), choices, 1) if isinstance(value, str) else []
        near = "".join(f" (did you mean {one!r}?)" for one in close)
        plain = fitted(kind, value)
        right = plain is not MISFIT and (plain is None or holds(plain))
        require(right, f"{owner}{item.name}", rule + near + limit_of(value), value)
        object.__setattr__(instance, item.name, plain)


MISFIT = object()
"""What `fitted` returns for a value that does not have the type."""
_RULES: dict[object, str] = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}


def _anything(_: object) -> bool:
    return True


def listed(value: object) -> object:
    """Return an array or tensor as a list of plain numbers, or as a number if it has no dimension; all else as it is.

    A float32 becomes the shortest decimal that rounds to it: 0.485, not 0.48500001430511475.
    """
    if not hasattr(value, "tolist"):
        return value
    plain = cast("Any", value).tolist()
    if not str(getattr(value, "dtype", "")).endswith("float32"):
        return plain
    import numpy as np  # an array or tensor has imported it

    return np.float32(plain).astype(str).astype(float).tolist()


def fitted(kind: object, value: object) -> object:
    """Return a value as a plain one of a type, for example int | None or tuple[float, float]; or MISFIT."""
    kinds = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return next((plain for one in kinds if (plain := fitted(one, value)) is not MISFIT), MISFIT)
    if get_origin(kind) is tuple:
        value = listed(value)
        if not isinstance(value, (tuple, list)):
            return MISFIT
        values = list(map(listed, cast("Sequence[object]", value)))
        kinds = kinds[:1] * len(values) if kinds[-1] is ... else kinds
        plain = tuple(map(fitted, kinds, values))
        return plain if len(kinds) == len(values) and MISFIT not in plain else MISFIT
    if get_origin(kind) is Literal or kind is str:
        text = str(value) if isinstance(value, Path) else value
        right = isinstance(text, str) and (kind is str or text in kinds)
        return str.__str__(cast("str", text)) if right else MISFIT
    try:
        if kind in _PLAIN:
            return _PLAIN[kind](value)
    except ArgumentError:
        return MISFIT
    return value if isinstance(kind, type) and isinstance(value, kind) else MISFIT


_PLAIN: dict[object, Callable[[object], object]] = {
    int: lambda value: integer("", value, -(2**63)),
    float: lambda value: number("", value, "", _anything),
    bool: lambda value: boolean("", value),
}


class UnknownArgumentError(ArgumentError, TypeError):
    """Raised for a keyword argument that a function or class does not have. The message names the one that is meant."""


class MissingArgumentError(ArgumentError, TypeError):
    """Raised if an argument that a function needs is missing. The message shows a call with it."""


def shown(instance: "DataclassInstance") -> str:
    """Return the repr of a dataclass with defaults, without the fields that have these."""
    default = type(instance)()
    values = {item.name: getattr(instance, item.name) for item in fields(instance)}
    text = (f"{name}={value!r}" for name, value in values.items() if value != getattr(default, name))
    return f"{type(instance).__name__}({', '.join(text)})"


class FolderError(FastflowerError):
    """Raised if a folder of images cannot be packed. Fix the folder, or pass other options or a different `out`."""


class ShardError(FastflowerError):
    """Raised if shards, manifest or index are missing, damaged or inconsistent. Restore or repair them, or repack."""


class SampleError(FastflowerError):
    """Raised if an image cannot be decoded or has changed since it was packed. Replace it, or skip damaged images."""

    def __init__(self, message: str, *, reason: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message
        """What is wrong, without what to do. A `Predictor` also leaves out the image's name: it is fit for who sent the image."""
        self.remedy = remedy
        """What may be passed besides another image, or "": for example a larger limit."""


class ExportError(FastflowerError):
    """Raised if an exported file does not answer as `predict` does. No file is left."""


class CheckpointError(FastflowerError):
    """Raised if a checkpoint or weights file cannot be read, used or written. Pass another file or a different `out`."""


class DeviceError(FastflowerError):
    """Raised if the requested device is missing or out of memory. Pass another device, or lower the batch size."""


class TrainingError(FastflowerError):
    """Raised if training cannot continue: non-finite loss or weights, a lost rank, or a file that cannot be written.

    Saved checkpoints stay valid. Fix the cause and resume, or train again with the changes that the message names.
    """


class HeldError(FastflowerError):
    """Raised if another process holds a lock. The message names the process. Wait for it, or use another folder."""


class ResourceError(FastflowerError):
    """Raised when memory or file descriptors run out. The data is intact: free resources and run again."""


class StoppedError(FastflowerError):
    """Raised when SIGTERM stops training, after its state is saved. Pass `resume=True` to continue."""
