"""Reads a torchvision `Compose` as a list of steps: transforms with their attributes. Refuses code that cannot be read.

Transforms are recognized by library and class name and read by attribute, so torchvision need not be imported.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import cast

from fastflower.errors import ArgumentError, listed

_LIBRARIES = ("torchvision", "timm", "torch")  # torch's Sequential holds transforms
_MODULES = ("torchvision.", "torch.nn.", "timm.", "albumentations.")
ON_IMAGES = "To apply it to the images of a batch, see docs/augmentation.md."


@dataclass(frozen=True)
class Step:
    """A torchvision transform, with its name and its attributes as plain values."""

    transform: object
    lenient: bool = False
    """Whether what Augment cannot do is read as what comes near to it."""

    @property
    def name(self) -> str:
        return type(self.transform).__name__

    def get(self, attribute: str) -> object:
        """Return an attribute, or None if missing: v1 and v2 transforms have different attributes."""
        return getattr(self.transform, attribute, None)

    def numbers(self, attribute: str, default: tuple[float, ...] = ()) -> tuple[float, ...]:
        """Return an attribute, which may be one number or more, as a tuple. Returns `default` if it is missing."""
        value = listed(self.get(attribute))
        if isinstance(value, int | float):
            return (value,)
        return default if value is None else tuple(map(float, cast("Iterable[float]", value)))

    def size(self, attribute: str = "size") -> tuple[int, int]:
        """Return (height, width). One number means a square."""
        height, *width = map(int, self.numbers(attribute))
        return height, width[0] if width else height

    def probability(self) -> float:
        """Return the transform's p."""
        return float(self.numbers("p")[0])

    def require(self, holds: bool, rule: str) -> None:
        """Raise ArgumentError with the transform's name and the rule unless `holds`."""
        if not (holds or self.lenient):
            raise ArgumentError(f"{self.name} {rule}.")

    def symmetric(self, what: str, low: float, high: float, about: float = 0.0) -> float:
        """Return half the width of the range (low, high), which must be symmetric about `about`."""
        wanted = f"({about:g} - x, {about:g} + x)" if about else "(-x, x)"
        rule = f"with {what} ({low}, {high}) is not symmetric; use {wanted}"
        self.require(abs(low + high - 2 * about) < 1e-9, rule)
        return round(float(max(high - about, about - low)), 12)  # 1.2 - 1 is not exactly 0.2


def is_transform(value: object) -> bool:
    """Return whether a value comes from a library of transforms, also if it only makes one, as weights.transforms does."""
    made = cast("partial[object]", value).func if isinstance(value, partial) else value
    return str(getattr(made, "__module__", "")).startswith(_MODULES)


def steps_of(transform: object, *, lenient: bool = False) -> Iterator[Step]:
    """Yield the transforms of a Compose or Sequential, which may be nested, or a transform alone.

    Raises ArgumentError for code that is not a transform of torchvision or timm. lenient  Whether to leave out such code.
    """
    name = type(transform).__name__
    if lenient and name in ("Lambda", "function"):
        return
    _require_known(transform)
    if name in ("Compose", "Sequential") or (lenient and name in ("list", "RandomOrder", "RandomChoice")):
        parts = cast("Iterable[object]", getattr(transform, "transforms", transform))
        for inner in islice(parts, 1 if name == "RandomChoice" else None):
            yield from steps_of(inner, lenient=lenient)
    else:
        yield Step(transform, lenient)


def _require_known(transform: object) -> None:
    """Check that a transform is one of torchvision's or timm's, and not code that cannot be read."""
    kind = type(transform)
    library = kind.__module__.partition(".")[0]
    if library == "albumentations":
        raise ArgumentError(
            f"{kind.__name__} of albumentations: from_torchvision reads torchvision's transforms only. Set the fields of "
            f"Augment, for example Augment(crop=(0.08, 1.0), flip=0.5) for RandomResizedCrop and HorizontalFlip."
        )
    if isinstance(transform, type) or kind.__name__ == "partial" or hasattr(kind, "get_state_dict"):
        raise ArgumentError(
            f"{transform!r} only makes a transform; pass what it makes, such as weights.transforms(), with parentheses."
        )
    if (library not in _LIBRARIES and kind is not list) or kind.__name__ == "Lambda":
        name = getattr(transform, "__qualname__", kind.__name__)
        raise ArgumentError(
            f"{name} of {getattr(transform, '__module__', library)} is code that Augment cannot read; leave it out. Images "
            f"are always RGB here, so no code needs to convert them. {ON_IMAGES}"
        )
