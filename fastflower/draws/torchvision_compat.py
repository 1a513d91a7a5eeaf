"""Reads a torchvision `Compose`, v1 or v2, as the fields of an `Augment`.

Transforms are recognised by class name and read by attribute, so that torchvision need not be imported. What differs from
torchvision without changing what is drawn (bilinear for nearest, colour after geometry) is logged, each difference once.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastflower.errors import ArgumentError

_log = logging.getLogger("fastflower")

_CONVERSIONS = {"ToTensor", "PILToTensor", "ToImage", "ToPureTensor", "ToDtype", "ConvertImageDtype", "Identity"}
_NEAREST_KIN = {
    "RandomCrop": "RandomResizedCrop(size, scale=(0.5, 1))",
    "RandomPerspective": "RandomAffine(shear=...)",
    "Grayscale": "ColorJitter(saturation=...)",
    "RandomGrayscale": "ColorJitter(saturation=1)",
    "TrivialAugmentWide": "RandomRotation, ColorJitter and RandomAffine",
    "RandAugment": "RandomRotation, ColorJitter and RandomAffine",
    "AutoAugment": "RandomRotation, ColorJitter and RandomAffine",
    "MixUp": "the field mixup=alpha, which mixes neighbours of a batch",
    "CutMix": "the field cutmix=alpha, which mixes neighbours of a batch",
}


def fields_of(transform: object) -> dict[str, Any]:
    """Keyword arguments for `Augment` from a torchvision transform or a Compose of them.

    Raises ArgumentError naming the transform that cannot be expressed, and the nearest that can where there is one.
    """
    reading = _Reading()
    for step in _flatten(transform):
        name = type(step).__name__
        if name in _CONVERSIONS:
            dtype: Any = getattr(step, "dtype", None)  # v2 takes one by kind of input, too
            dtypes: list[Any] = list(dtype.values()) if isinstance(dtype, dict) else [dtype]  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
            floating = name == "ToTensor" or any(getattr(one, "is_floating_point", False) for one in dtypes)
            scaled = getattr(step, "scale", True)
            _require(not floating or scaled, name, "with scale=False leaves levels at 0 .. 255; pass scale=True")
            reading.floating = floating or (reading.floating and name not in ("ToImage", "PILToTensor"))
            continue
        reader = _READERS.get(name)
        if reader is None:
            kin = f" The nearest that can is {_NEAREST_KIN[name]}." if name in _NEAREST_KIN else ""
            raise ArgumentError(f"{name} cannot be expressed by Augment, which knows {', '.join(_READERS)}.{kin}")
        _require(name not in reading.seen, name, "stands twice; draw it once")
        reader(reading, name, step)
        reading.seen.append(name)
    return reading.finish()


def _flatten(transform: object) -> Iterator[object]:
    if type(transform).__name__ in ("Compose", "Sequential"):
        parts: Any = getattr(transform, "transforms", transform)
        for part in parts:
            yield from _flatten(part)
    else:
        yield transform


def _require(holds: bool, name: str, rule: str) -> None:
    if not holds:
        raise ArgumentError(f"{name} {rule}.")


@dataclass
class _Reading:
    seen: list[str] = field(default_factory=list)
    floating: bool = True
    found: dict[str, Any] = field(default_factory=lambda: {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    notes: dict[str, None] = field(default_factory=dict)  # an ordered set

    def finish(self) -> dict[str, Any]:
        if "size" not in self.found:
            _require("resize" not in self.found, "Resize", "to one number leaves sizes unequal; add CenterCrop(size)")
            raise ArgumentError("The transform fixes no output size; start it with RandomResizedCrop(size).")
        if [name for name in self.seen if name in ("RandomErasing", "Normalize")] == ["RandomErasing", "Normalize"]:
            triples = zip(self.found["erase_value"], self.found["mean"], self.found["std"], strict=True)
            self.found["erase_value"] = tuple((value - mean) / std for value, mean, std in triples)
        for note in self.notes:
            _log.warning("Augment.from_torchvision: %s", note)
        return self.found

    def view_first(self, name: str) -> None:
        """A crop must come before everything that moves or erases pixels, but for flips, which commute with it."""
        late = set(self.seen) & {"RandomRotation", "RandomAffine", "RandomErasing"}
        _require(not late, name, f"stands after {', '.join(sorted(late))}; crop first")
        _require("size" not in self.found, name, "is a second crop; keep one")
        self.colour_last(name)

    def before_normalising(self, name: str) -> None:
        """What fills with black or jitters colour does another thing to levels that are normalised."""
        _require("Normalize" not in self.seen, name, "stands after Normalize; normalise behind it")

    def colour_last(self, name: str) -> None:
        if "ColorJitter" in self.seen:
            self.notes[f"colour is drawn as written but applied after all geometry ({name} follows ColorJitter)"] = None
        _require("RandomErasing" not in self.seen, name, "stands after RandomErasing; erase last")

    def bilinear(self, name: str, step: Any) -> None:
        antialias = getattr(step, "antialias", None)
        _require(antialias is not False, name, "with antialias=False cannot be expressed; leave antialias out")
        mode = getattr(step.interpolation, "value", step.interpolation)
        if mode not in ("bilinear", 2):
            self.notes[f"{name} interpolates bilinearly, not {mode}"] = None


def _size(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def _resize(reading: _Reading, name: str, step: Any) -> None:
    reading.view_first(name)
    reading.bilinear(name, step)
    _require(getattr(step, "max_size", None) is None, name, "with max_size cannot be expressed; leave max_size out")
    size = step.size if isinstance(step.size, int) or len(step.size) > 1 else step.size[0]
    if isinstance(size, int):
        reading.found["resize"] = size
    else:
        reading.found["resize"] = reading.found["size"] = _size(size)


def _centre_crop(reading: _Reading, name: str, step: Any) -> None:
    _require("resize" in reading.found, name, "without Resize before it cuts sizes unequally; add Resize(256)")
    reading.found.pop("size", None)  # Resize((h, w)) alone had set it
    reading.view_first(name)
    reading.found["size"] = _size(step.size)


def _resized_crop(reading: _Reading, name: str, step: Any) -> None:
    _require("size" not in reading.found, name, "stands after a resize to a fixed size; drop that Resize")
    reading.view_first(name)
    reading.bilinear(name, step)
    if reading.found.pop("resize", None):
        reading.notes[f"Resize before {name} is left out: the crop takes the same share of the photograph itself"] = (
            None
        )
    reading.found |= {"size": _size(step.size), "crop": tuple(step.scale), "crop_ratio": tuple(step.ratio)}


def _flip(reading: _Reading, name: str, step: Any) -> None:
    reading.colour_last(name)
    reading.found["flip" if name == "RandomHorizontalFlip" else "flip_vertical"] = float(step.p)


def _symmetric(name: str, what: str, low: float, high: float, about: float = 0.0) -> float:
    drawn = f"({about:g} - x, {about:g} + x)" if about else "(-x, x)"
    _require(
        abs(low + high - 2 * about) < 1e-9, name, f"with {what} ({low}, {high}) is not symmetric; draw from {drawn}"
    )
    return round(float(high - about), 12)  # 1.2 - 1 is not quite 0.2


def _about_centre(name: str, step: Any) -> None:
    _require(getattr(step, "center", None) is None, name, "about another centre cannot be expressed; leave center out")
    fill = getattr(step, "fill", None)
    blank = fill is None or fill == 0 or (isinstance(fill, (list, tuple)) and not any(fill))
    _require(
        blank,
        name,
        f"with fill={fill!r} cannot be expressed; Augment fills black, or with the photograph (fill='photo')",
    )


def _rotation(reading: _Reading, name: str, step: Any) -> None:
    _require("RandomAffine" not in reading.seen, name, "stands after RandomAffine; rotate first")
    reading.before_normalising(name)
    reading.colour_last(name)
    reading.bilinear(name, step)
    _about_centre(name, step)
    _require(not step.expand, name, "with expand=True changes the size; leave expand out")
    reading.found["rotate"] = _symmetric(name, "degrees", *step.degrees)


def _affine(reading: _Reading, name: str, step: Any) -> None:
    reading.before_normalising(name)
    reading.colour_last(name)
    reading.bilinear(name, step)
    _about_centre(name, step)
    shear = (*tuple(step.shear or (0, 0)), 0, 0)
    reading.found |= {
        "affine_rotate": _symmetric(name, "degrees", *step.degrees),
        "translate": tuple(step.translate or (0.0, 0.0)),
        "scale": tuple(step.scale or (1.0, 1.0)),
        "shear": (_symmetric(name, "shear", *shear[:2]), _symmetric(name, "shear", *shear[2:4])),
    }


def _jitter(reading: _Reading, name: str, step: Any) -> None:
    _require("RandomErasing" not in reading.seen, name, "stands after RandomErasing; erase last")
    reading.before_normalising(name)
    for what in ("brightness", "contrast", "saturation"):
        low, high = getattr(step, what) or (1.0, 1.0)
        clipped = low == 0 and high >= 2  # torchvision clips 1 - strength at 0
        reading.found[what] = round(high - 1, 12) if clipped else _symmetric(name, what, low, high, about=1)
    reading.found["hue"] = _symmetric(name, "hue", *(step.hue or (0.0, 0.0)))
    if sum(reading.found[what] != 0 for what in ("brightness", "contrast", "saturation", "hue")) > 1:
        reading.notes["ColorJitter's operations run in one order: brightness, contrast, saturation, hue"] = None


def _normalize(reading: _Reading, _: str, step: Any) -> None:
    for what in ("mean", "std"):
        values = tuple(map(float, getattr(step, what)))
        reading.found[what] = values * 3 if len(values) == 1 else values  # torchvision broadcasts one


def _erasing(reading: _Reading, name: str, step: Any) -> None:
    _require(
        not isinstance(step.value, str) and step.value is not None,
        name,
        "with random values cannot be expressed; use value=0",
    )
    value: list[Any] = list(step.value) if isinstance(step.value, (list, tuple)) else [step.value]
    late = "with a value but 0 stands before the conversion to float, where levels end at 255; erase behind it"
    _require(reading.floating or not any(value), name, late)
    reading.found |= {
        "erase": float(step.p),
        "erase_area": tuple(step.scale),
        "erase_ratio": tuple(step.ratio),
        "erase_value": tuple(float(part) for part in (value * 3 if len(value) == 1 else value)),
    }


_READERS: dict[str, Callable[[_Reading, str, Any], None]] = {
    "RandomResizedCrop": _resized_crop,
    "Resize": _resize,
    "CenterCrop": _centre_crop,
    "RandomHorizontalFlip": _flip,
    "RandomVerticalFlip": _flip,
    "RandomRotation": _rotation,
    "RandomAffine": _affine,
    "ColorJitter": _jitter,
    "Normalize": _normalize,
    "RandomErasing": _erasing,
}
