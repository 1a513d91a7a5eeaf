"""Converts a torchvision `Compose`, v1 or v2, to the fields of an `Augment`.

Transforms are recognized by class name and read by attribute, so torchvision need not be imported. Differences that
leave the distribution unchanged (bilinear instead of nearest, color after geometry) are logged, each once per call.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from fastflower.draws.color import FACTORS
from fastflower.errors import ArgumentError

_log = logging.getLogger("fastflower")

_CONVERSIONS = {"ToTensor", "PILToTensor", "ToImage", "ToPureTensor", "ToDtype", "ConvertImageDtype", "Identity"}
_ALTERNATIVES = {
    "RandomCrop": "RandomResizedCrop(size, scale=(0.5, 1))",
    "RandomPerspective": "RandomAffine(shear=...)",
    "Grayscale": "ColorJitter(saturation=...)",
    "RandomGrayscale": "ColorJitter(saturation=1), which draws a random saturation",
    "TrivialAugmentWide": "RandomRotation, ColorJitter and RandomAffine",
    "RandAugment": "RandomRotation, ColorJitter and RandomAffine",
    "AutoAugment": "RandomRotation, ColorJitter and RandomAffine",
    "MixUp": "the field mixup=alpha, which mixes neighbors in a batch",
    "CutMix": "the field cutmix=alpha, which mixes neighbors in a batch",
}


def fields_of(transform: object) -> dict[str, Any]:
    """Return keyword arguments for `Augment` from a torchvision transform or a Compose of transforms.

    Raises ArgumentError if a transform is unsupported. The message names it and the closest alternative, if any.
    """
    reading = _Reading()
    for step in _steps(transform):
        if step.name in _CONVERSIONS:
            _convert(reading, step)
            continue
        reader = _READERS.get(step.name)
        if reader is None:
            closest = f" The closest alternative is {_ALTERNATIVES[step.name]}." if step.name in _ALTERNATIVES else ""
            raise ArgumentError(
                f"{step.name} has no equivalent in Augment, which supports {', '.join(_READERS)}.{closest}"
            )
        step.require(step.name not in reading.seen, "appears twice; keep one")
        reader(reading, step)
        reading.seen.append(step.name)
    return reading.finish()


@dataclass(frozen=True)
class _Step:
    """A torchvision transform, with its name and its attributes as plain values."""

    transform: object

    @property
    def name(self) -> str:
        return type(self.transform).__name__

    def get(self, attribute: str) -> object:
        """Return an attribute, or None if missing: v1 and v2 transforms have different attributes."""
        return getattr(self.transform, attribute, None)

    def numbers(self, attribute: str, default: tuple[float, ...] = ()) -> tuple[float, ...]:
        """Return an attribute, which may be one number or more, as a tuple. Returns `default` if it is missing."""
        value = self.get(attribute)
        if isinstance(value, int | float):
            return (value,)
        return tuple(cast("Iterable[float] | None", value) or default)

    def size(self) -> tuple[int, int]:
        """Return (height, width). One number means a square."""
        height, *width = map(int, self.numbers("size"))
        return height, width[0] if width else height

    def require(self, holds: bool, rule: str) -> None:
        if not holds:
            raise ArgumentError(f"{self.name} {rule}.")

    def symmetric(self, what: str, low: float, high: float, about: float = 0.0) -> float:
        """Return half the width of the range (low, high), which must be symmetric about `about`."""
        wanted = f"({about:g} - x, {about:g} + x)" if about else "(-x, x)"
        rule = f"with {what} ({low}, {high}) is not symmetric; use {wanted}"
        self.require(abs(low + high - 2 * about) < 1e-9, rule)
        return round(float(high - about), 12)  # 1.2 - 1 is not exactly 0.2


def _steps(transform: object) -> Iterator[_Step]:
    if type(transform).__name__ in ("Compose", "Sequential"):
        for inner in cast("Iterable[object]", getattr(transform, "transforms", transform)):
            yield from _steps(inner)
    else:
        yield _Step(transform)


@dataclass
class _Reading:
    """Fields of the Augment, collected from the transforms read so far."""

    fields: dict[str, Any] = field(default_factory=lambda: {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    seen: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    """Differences from torchvision, to log."""
    floating: bool = True
    """True if pixel values are floats in [0, 1] at this point."""

    def finish(self) -> dict[str, Any]:
        fields = self.fields
        if "size" not in fields:
            if "resize" in fields:
                raise ArgumentError("Resize with one number gives images of different sizes; add CenterCrop(size).")
            raise ArgumentError("The transform sets no output size; start it with RandomResizedCrop(size).")
        if [name for name in self.seen if name in ("RandomErasing", "Normalize")] == ["RandomErasing", "Normalize"]:
            channels = zip(fields["erase_value"], fields["mean"], fields["std"], strict=True)
            fields["erase_value"] = tuple((value - mean) / std for value, mean, std in channels)
        for note in self.notes:
            _log.warning("Augment.from_torchvision: %s", note)
        return fields

    def view_first(self, step: _Step) -> None:
        """Check that a resize or crop comes before any transform that moves or erases pixels, except flips."""
        late = set(self.seen) & {"RandomRotation", "RandomAffine", "RandomErasing"}
        step.require(not late, f"comes after {', '.join(sorted(late))}; crop first")
        step.require("size" not in self.fields, "is a second crop; keep one")
        self.geometry_after_color(step)

    def must_precede(self, step: _Step, later: str, remedy: str) -> None:
        """Check that a step comes before `later`. Order matters: for example, black is not 0 after normalization."""
        step.require(later not in self.seen, f"comes after {later}; {remedy}")

    def geometry_after_color(self, step: _Step) -> None:
        if "ColorJitter" in self.seen:
            order = f"({step.name} follows ColorJitter)"
            self.notes.append(f"color is drawn as specified but applied after all geometry {order}")
        self.must_precede(step, "RandomErasing", "erase last")

    def bilinear(self, step: _Step) -> None:
        rule = "with antialias=False is not supported; omit antialias"
        step.require(step.get("antialias") is not False, rule)
        mode = getattr(step.get("interpolation"), "value", step.get("interpolation"))
        if mode not in ("bilinear", 2):
            self.notes.append(f"{step.name} uses bilinear interpolation instead of {mode}")

    def moves(self, step: _Step) -> None:
        """Check the options that rotations and affine transforms share."""
        self.must_precede(step, "Normalize", "normalize later")
        self.geometry_after_color(step)
        self.bilinear(step)
        step.require(step.get("center") is None, f"with center={step.get('center')!r} is not supported; omit center")
        remedy = "omit fill for black, or set fill='photo' on the Augment for the image's own pixels"
        step.require(not any(step.numbers("fill")), f"with fill={step.get('fill')!r} is not supported; {remedy}")


def _convert(reading: _Reading, step: _Step) -> None:
    dtype = step.get("dtype")
    # v2 also accepts a dictionary from input types to dtypes.
    dtypes = cast("dict[object, object]", dtype).values() if isinstance(dtype, dict) else [dtype]
    floating = step.name == "ToTensor" or any(getattr(one, "is_floating_point", False) for one in dtypes)
    unscaled = floating and not getattr(step.transform, "scale", True)
    step.require(not unscaled, "with scale=False leaves pixel values in [0, 255]; pass scale=True")
    reading.floating = floating or (reading.floating and step.name not in ("ToImage", "PILToTensor"))


def _resize(reading: _Reading, step: _Step) -> None:
    reading.view_first(step)
    reading.bilinear(step)
    step.require(step.get("max_size") is None, "with max_size is not supported; omit max_size")
    if len(step.numbers("size")) == 1:
        reading.fields["resize"] = step.size()[0]
    else:
        reading.fields["resize"] = reading.fields["size"] = step.size()


def _center_crop(reading: _Reading, step: _Step) -> None:
    step.require("resize" in reading.fields, "without a Resize before it is not supported; add Resize(256)")
    reading.fields.pop("size", None)  # set by Resize((h, w))
    reading.view_first(step)
    reading.fields["size"] = step.size()


def _resized_crop(reading: _Reading, step: _Step) -> None:
    step.require("size" not in reading.fields, "comes after a resize to a fixed size; remove that Resize")
    reading.view_first(step)
    reading.bilinear(step)
    if reading.fields.pop("resize", None):
        share = "the crop takes the same fraction of the original image"
        reading.notes.append(f"ignored Resize before {step.name}: {share}")
    reading.fields |= {"size": step.size(), "crop": step.numbers("scale"), "crop_ratio": step.numbers("ratio")}


def _flip(reading: _Reading, step: _Step) -> None:
    reading.geometry_after_color(step)
    reading.fields["flip" if step.name == "RandomHorizontalFlip" else "flip_vertical"] = float(step.numbers("p")[0])


def _rotation(reading: _Reading, step: _Step) -> None:
    reading.must_precede(step, "RandomAffine", "rotate first")
    reading.moves(step)
    step.require(not step.get("expand"), "with expand=True changes the output size; omit expand")
    reading.fields["rotate"] = step.symmetric("degrees", *step.numbers("degrees"))


def _affine(reading: _Reading, step: _Step) -> None:
    reading.moves(step)
    shear = (*step.numbers("shear", (0, 0)), 0, 0)
    reading.fields |= {
        "affine_rotate": step.symmetric("degrees", *step.numbers("degrees")),
        "translate": step.numbers("translate", (0.0, 0.0)),
        "scale": step.numbers("scale", (1.0, 1.0)),
        "shear": (step.symmetric("shear", *shear[:2]), step.symmetric("shear", *shear[2:4])),
    }


def _jitter(reading: _Reading, step: _Step) -> None:
    reading.must_precede(step, "RandomErasing", "erase last")
    reading.must_precede(step, "Normalize", "normalize later")
    for what in ("brightness", "contrast", "saturation"):
        low, high = step.numbers(what, (1.0, 1.0))
        clipped = low == 0 and high >= 2  # torchvision clips 1 - strength at 0
        reading.fields[what] = round(high - 1, 12) if clipped else step.symmetric(what, low, high, about=1)
    reading.fields["hue"] = step.symmetric("hue", *step.numbers("hue", (0.0, 0.0)))
    if sum(reading.fields[what] != 0 for what in FACTORS) > 1:
        reading.notes.append("ColorJitter's operations run in a fixed order: brightness, contrast, saturation, hue")


def _normalize(reading: _Reading, step: _Step) -> None:
    for what in ("mean", "std"):
        values = tuple(map(float, step.numbers(what)))
        reading.fields[what] = values * 3 if len(values) == 1 else values  # torchvision broadcasts a single number


def _erasing(reading: _Reading, step: _Step) -> None:
    random = step.get("value") is None or isinstance(step.get("value"), str)
    step.require(not random, "with random values is not supported; use value=0")
    values = tuple(map(float, step.numbers("value")))
    late = "with a nonzero value is applied to integer pixels (up to 255); erase after the conversion to float"
    step.require(reading.floating or not any(values), late)
    reading.fields |= {
        "erase": float(step.numbers("p")[0]),
        "erase_area": step.numbers("scale"),
        "erase_ratio": step.numbers("ratio"),
        "erase_value": values * 3 if len(values) == 1 else values,
    }


_READERS: dict[str, Callable[[_Reading, _Step], None]] = {
    "RandomResizedCrop": _resized_crop,
    "Resize": _resize,
    "CenterCrop": _center_crop,
    "RandomHorizontalFlip": _flip,
    "RandomVerticalFlip": _flip,
    "RandomRotation": _rotation,
    "RandomAffine": _affine,
    "ColorJitter": _jitter,
    "Normalize": _normalize,
    "RandomErasing": _erasing,
}
