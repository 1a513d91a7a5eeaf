"""Reads a torchvision `Compose`, v1 or v2, as the fields of an `Augment`.

Transforms are recognized by class name and read by attribute, so that torchvision need not be imported. What differs from
torchvision without changing what is drawn (bilinear for nearest, color after geometry) is logged, each difference once.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from fastflower.draws.color import FACTORS
from fastflower.errors import ArgumentError

_log = logging.getLogger("fastflower")

_CONVERSIONS = {"ToTensor", "PILToTensor", "ToImage", "ToPureTensor", "ToDtype", "ConvertImageDtype", "Identity"}
_NEAREST_KIN = {
    "RandomCrop": "RandomResizedCrop(size, scale=(0.5, 1))",
    "RandomPerspective": "RandomAffine(shear=...)",
    "Grayscale": "ColorJitter(saturation=...)",
    "RandomGrayscale": "ColorJitter(saturation=1), which draws how gray an image becomes",
    "TrivialAugmentWide": "RandomRotation, ColorJitter and RandomAffine",
    "RandAugment": "RandomRotation, ColorJitter and RandomAffine",
    "AutoAugment": "RandomRotation, ColorJitter and RandomAffine",
    "MixUp": "the field mixup=alpha, which mixes neighbors of a batch",
    "CutMix": "the field cutmix=alpha, which mixes neighbors of a batch",
}


def fields_of(transform: object) -> dict[str, Any]:
    """Keyword arguments for `Augment` from a torchvision transform or a Compose of them.

    Raises ArgumentError naming the transform that cannot be expressed, and the nearest that can where there is one.
    """
    reading = _Reading()
    for step in _steps(transform):
        if step.name in _CONVERSIONS:
            _convert(reading, step)
            continue
        reader = _READERS.get(step.name)
        if reader is None:
            kin = f" The nearest that can is {_NEAREST_KIN[step.name]}." if step.name in _NEAREST_KIN else ""
            raise ArgumentError(f"{step.name} cannot be expressed by Augment, which knows {', '.join(_READERS)}.{kin}")
        step.require(step.name not in reading.seen, "stands twice; draw it once")
        reader(reading, step)
        reading.seen.append(step.name)
    return reading.finish()


@dataclass(frozen=True)
class _Step:
    """One transform of torchvision: its name, and its attributes as plain values."""

    transform: object

    @property
    def name(self) -> str:
        return type(self.transform).__name__

    def get(self, attribute: str) -> object:
        """An attribute, or None: v1 and v2 have not all of them in common."""
        return getattr(self.transform, attribute, None)

    def numbers(self, attribute: str, default: tuple[float, ...] = ()) -> tuple[float, ...]:
        """What may be one number, several, or nothing: then `default`."""
        value = self.get(attribute)
        if isinstance(value, int | float):
            return (value,)
        return tuple(cast("Iterable[float] | None", value) or default)

    def size(self) -> tuple[int, int]:
        """(height, width), or a square of one number."""
        height, *width = map(int, self.numbers("size"))
        return height, width[0] if width else height

    def require(self, holds: bool, rule: str) -> None:
        if not holds:
            raise ArgumentError(f"{self.name} {rule}.")

    def symmetric(self, what: str, low: float, high: float, about: float = 0.0) -> float:
        """How far a range reaches either way from `about`."""
        wanted = f"({about:g} - x, {about:g} + x)" if about else "(-x, x)"
        rule = f"with {what} ({low}, {high}) is not symmetric; draw from {wanted}"
        self.require(abs(low + high - 2 * about) < 1e-9, rule)
        return round(float(high - about), 12)  # 1.2 - 1 is not quite 0.2


def _steps(transform: object) -> Iterator[_Step]:
    if type(transform).__name__ in ("Compose", "Sequential"):
        for inner in cast("Iterable[object]", getattr(transform, "transforms", transform)):
            yield from _steps(inner)
    else:
        yield _Step(transform)


@dataclass
class _Reading:
    """What the steps so far come to."""

    fields: dict[str, Any] = field(default_factory=lambda: {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    seen: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    """What is drawn otherwise than torchvision draws it."""
    floating: bool = True
    """Whether levels are floats in 0 .. 1 by now."""

    def finish(self) -> dict[str, Any]:
        fields = self.fields
        if "size" not in fields:
            if "resize" in fields:
                raise ArgumentError("Resize to one number leaves sizes unequal; add CenterCrop(size).")
            raise ArgumentError("The transform fixes no output size; start it with RandomResizedCrop(size).")
        if [name for name in self.seen if name in ("RandomErasing", "Normalize")] == ["RandomErasing", "Normalize"]:
            channels = zip(fields["erase_value"], fields["mean"], fields["std"], strict=True)
            fields["erase_value"] = tuple((value - mean) / std for value, mean, std in channels)
        for note in self.notes:
            _log.warning("Augment.from_torchvision: %s", note)
        return fields

    def view_first(self, step: _Step) -> None:
        """A crop must come before everything that moves or erases pixels, but for flips, which commute with it."""
        late = set(self.seen) & {"RandomRotation", "RandomAffine", "RandomErasing"}
        step.require(not late, f"stands after {', '.join(sorted(late))}; crop first")
        step.require("size" not in self.fields, "is a second crop; keep one")
        self.geometry_after_color(step)

    def must_precede(self, step: _Step, later: str, remedy: str) -> None:
        """Behind the later one a step would do another thing: fill with black, say, levels that are normalized."""
        step.require(later not in self.seen, f"stands after {later}; {remedy}")

    def geometry_after_color(self, step: _Step) -> None:
        if "ColorJitter" in self.seen:
            order = f"({step.name} follows ColorJitter)"
            self.notes.append(f"color is drawn as written but applied after all geometry {order}")
        self.must_precede(step, "RandomErasing", "erase last")

    def bilinear(self, step: _Step) -> None:
        rule = "with antialias=False cannot be expressed; leave antialias out"
        step.require(step.get("antialias") is not False, rule)
        mode = getattr(step.get("interpolation"), "value", step.get("interpolation"))
        if mode not in ("bilinear", 2):
            self.notes.append(f"{step.name} interpolates bilinearly, not {mode}")

    def moves(self, step: _Step) -> None:
        """What rotations and affines have in common."""
        self.must_precede(step, "Normalize", "normalize behind it")
        self.geometry_after_color(step)
        self.bilinear(step)
        step.require(step.get("center") is None, "about another center cannot be expressed; leave center out")
        fill = f"fill={step.get('fill')!r} cannot be expressed; Augment fills black, or with the image (fill='photo')"
        step.require(not any(step.numbers("fill")), f"with {fill}")


def _convert(reading: _Reading, step: _Step) -> None:
    dtype = step.get("dtype")
    # v2 takes one by kind of input, too.
    dtypes = cast("dict[object, object]", dtype).values() if isinstance(dtype, dict) else [dtype]
    floating = step.name == "ToTensor" or any(getattr(one, "is_floating_point", False) for one in dtypes)
    unscaled = floating and not getattr(step.transform, "scale", True)
    step.require(not unscaled, "with scale=False leaves levels at 0 .. 255; pass scale=True")
    reading.floating = floating or (reading.floating and step.name not in ("ToImage", "PILToTensor"))


def _resize(reading: _Reading, step: _Step) -> None:
    reading.view_first(step)
    reading.bilinear(step)
    step.require(step.get("max_size") is None, "with max_size cannot be expressed; leave max_size out")
    if len(step.numbers("size")) == 1:
        reading.fields["resize"] = step.size()[0]
    else:
        reading.fields["resize"] = reading.fields["size"] = step.size()


def _center_crop(reading: _Reading, step: _Step) -> None:
    step.require("resize" in reading.fields, "without Resize before it cuts sizes unequally; add Resize(256)")
    reading.fields.pop("size", None)  # Resize((h, w)) alone had set it
    reading.view_first(step)
    reading.fields["size"] = step.size()


def _resized_crop(reading: _Reading, step: _Step) -> None:
    step.require("size" not in reading.fields, "stands after a resize to a fixed size; drop that Resize")
    reading.view_first(step)
    reading.bilinear(step)
    if reading.fields.pop("resize", None):
        share = "the crop takes the same share of the image itself"
        reading.notes.append(f"Resize before {step.name} is left out: {share}")
    reading.fields |= {"size": step.size(), "crop": step.numbers("scale"), "crop_ratio": step.numbers("ratio")}


def _flip(reading: _Reading, step: _Step) -> None:
    reading.geometry_after_color(step)
    reading.fields["flip" if step.name == "RandomHorizontalFlip" else "flip_vertical"] = float(step.numbers("p")[0])


def _rotation(reading: _Reading, step: _Step) -> None:
    reading.must_precede(step, "RandomAffine", "rotate first")
    reading.moves(step)
    step.require(not step.get("expand"), "with expand=True changes the size; leave expand out")
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
    reading.must_precede(step, "Normalize", "normalize behind it")
    for what in ("brightness", "contrast", "saturation"):
        low, high = step.numbers(what, (1.0, 1.0))
        clipped = low == 0 and high >= 2  # torchvision clips 1 - strength at 0
        reading.fields[what] = round(high - 1, 12) if clipped else step.symmetric(what, low, high, about=1)
    reading.fields["hue"] = step.symmetric("hue", *step.numbers("hue", (0.0, 0.0)))
    if sum(reading.fields[what] != 0 for what in FACTORS) > 1:
        reading.notes.append("ColorJitter's operations run in one order: brightness, contrast, saturation, hue")


def _normalize(reading: _Reading, step: _Step) -> None:
    for what in ("mean", "std"):
        values = tuple(map(float, step.numbers(what)))
        reading.fields[what] = values * 3 if len(values) == 1 else values  # torchvision broadcasts one


def _erasing(reading: _Reading, step: _Step) -> None:
    random = step.get("value") is None or isinstance(step.get("value"), str)
    step.require(not random, "with random values cannot be expressed; use value=0")
    values = tuple(map(float, step.numbers("value")))
    late = "with a value but 0 stands before the conversion to float, where levels end at 255; erase behind it"
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
