"""Converts a torchvision `Compose`, v1 or v2, to the fields of an `Augment`.

Also takes torchvision's presets, such as `weights.transforms()`, and what timm's `create_transform` returns.
Differences that leave the distribution unchanged (bilinear instead of nearest, color after geometry) are logged, each
once per call.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from math import exp
from typing import Any, cast

from fastflower.draws.color import FACTORS
from fastflower.draws.torchvision_steps import ON_IMAGES, Step, steps_of
from fastflower.errors import ArgumentError
from fastflower.machine import speaks

_log = logging.getLogger("fastflower")

_TO_FLOAT = ("ToTensor", "MaybeToTensor")
_CONVERSIONS = {
    *_TO_FLOAT, "PILToTensor", "ToPILImage", "ToImage", "ToPureTensor", "ToDtype", "ConvertImageDtype", "Identity", "RGB",
}  # fmt: skip
_MOVES = ("RandomRotation", "RandomAffine")
_GRAYS = ("RandomGrayscale", "Grayscale")
_JITTERS = "RandomRotation, ColorJitter and RandomAffine"
_ALTERNATIVES = {
    "RandomPerspective": "RandomAffine(shear=...)",
    "RandomPhotometricDistort": "ColorJitter",
    "TrivialAugmentWide": _JITTERS,
    "RandAugment": _JITTERS,
    "AutoAugment": _JITTERS,
    "AugMix": _JITTERS,
    "FiveCrop": "CenterCrop; evaluate(tta=True) averages each image and its flip",
    "TenCrop": "CenterCrop; evaluate(tta=True) averages each image and its flip",
    "MixUp": "the field mixup=alpha, which mixes neighbors in a batch",
    "CutMix": "the field cutmix=alpha, which mixes neighbors in a batch",
    "RandomChoice": "the one of its transforms that matters most",
    "RandomOrder": "its transforms in a fixed order",
    "list": "Compose, with this list in it",
}
_STRENGTHS: dict[str, object] = {
    "rotate": 15.0,
    "translate": (0.1, 0.1),
    "brightness": 0.2,
    "contrast": 0.2,
    "saturation": 0.2,
}
_NEAREST: dict[str, dict[str, object]] = {  # fields of Augment that come near to a transform
    "RandomPerspective": {"shear": (7.0, 7.0)},  # an edge that moves by an eighth, with distortion_scale=0.5
    "RandomPhotometricDistort": {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05},
    **dict.fromkeys(("TrivialAugmentWide", "RandAugment", "AutoAugment", "AugMix"), _STRENGTHS),
    "MixUp": {"mixup": 1.0},
    "CutMix": {"cutmix": 1.0},
}
# Transforms of image tensors that ON_IMAGES helps with.
_TENSOR_TRANSFORMS = {
    "TrivialAugmentWide", "RandAugment", "AutoAugment", "AugMix", "RandomPerspective", "RandomPhotometricDistort",
    "GaussianBlur", "GaussianNoise", "ElasticTransform", "RandomInvert", "RandomPosterize", "RandomSolarize",
    "RandomEqualize", "RandomAutocontrast", "RandomAdjustSharpness", "RandomChannelPermutation", "JPEG",
}  # fmt: skip


def fields_of(transform: object, *, lenient: bool = False) -> dict[str, Any]:
    """Return keyword arguments for `Augment` from a torchvision transform or a Compose of transforms.

    Raises ArgumentError if a transform is unsupported. The message names it and the closest alternative, if any.
    lenient  Whether to return what comes near instead. Then only what is no transform is refused, and nothing is logged.
    """
    reading = _Reading()
    for step in steps_of(transform, lenient=lenient):
        with suppress(*([ArgumentError, ValueError] if lenient else [])):  # ValueError: no number where one belongs
            _read_any(reading, step)
    fields = reading.finish(lenient=lenient)
    for note in reading.notes if speaks() and not lenient else ():
        _log.warning("Augment.from_torchvision: %s", note)
    return fields


def _read_any(reading: "_Reading", step: Step) -> None:
    if step.name in _CONVERSIONS:
        _convert(reading, step)
    elif step.name == "RandomApply":
        _apply(reading, step)
    else:
        _read(reading, step)


def _read(reading: "_Reading", step: Step) -> None:
    crops = step.lenient and step.name in ("FiveCrop", "TenCrop")
    reader = _center_crop if crops else _READERS.get(step.name)
    if reader is None:
        reading.near |= _NEAREST.get(step.name, {})
        hint = f" The closest alternative is {_ALTERNATIVES[step.name]}." if step.name in _ALTERNATIVES else ""
        hint += f" {ON_IMAGES}" if step.name in _TENSOR_TRANSFORMS else ""
        raise ArgumentError(
            f"{step.name} has no equivalent in Augment, which supports {', '.join((*_READERS, 'RandomApply'))}.{hint}"
        )
    step.require(step.name not in reading.seen, "appears twice; keep one")
    reader(reading, step)
    reading.seen.append(step.name)


@dataclass
class _Reading:
    """Fields of the Augment, collected from the transforms read so far."""

    fields: dict[str, Any] = field(default_factory=lambda: {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    seen: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    """Differences from torchvision, to log."""
    floating: bool = True
    """True if pixel values are floats in [0, 1] at this point."""
    converted: bool = False
    """True if a transform has made them floats."""
    near: dict[str, object] = field(default_factory=dict[str, object])
    """What comes near to transforms that Augment does not have."""
    pad: tuple[int, str] | None = None
    """Padding and padding mode of a Pad, for the next RandomCrop."""

    def finish(self, *, lenient: bool = False) -> dict[str, Any]:
        fields = self.fields
        if lenient:
            side = fields.get("resize", "off")  # without a crop
            return {**({} if side == "off" else {"size": side}), **self.near, **fields}
        if "size" not in fields:
            if "resize" in fields:
                raise ArgumentError("Resize with one number gives images of different sizes; add CenterCrop(size).")
            raise ArgumentError(
                "The transform sets no output size; start it with RandomResizedCrop(size), or with CenterCrop(size) if the "
                "images have this size."
            )
        if self.pad:  # around a resize to a fixed size, which a center crop that is larger does too
            plain = isinstance(fields.get("resize"), tuple) and self.pad[1] == "constant"
            if not plain or fields["size"] != fields["resize"]:
                raise ArgumentError("Pad is supported before RandomCrop(size), or after Resize((height, width)) alone.")
            fields["size"] = tuple(side + 2 * self.pad[0] for side in fields["size"])
        if [name for name in self.seen if name in ("RandomErasing", "Normalize")] == ["RandomErasing", "Normalize"]:
            channels = zip(fields["erase_value"], fields["mean"], fields["std"], strict=True)
            fields["erase_value"] = tuple((value - mean) / std for value, mean, std in channels)
        return fields

    def view_first(self, step: Step) -> None:
        """Check that a resize or crop is the only one. What has moved the image before it then moves the whole image."""
        self.must_precede(step, "RandomErasing", "crop first")
        step.require("size" not in self.fields, "is a second crop; keep one")
        self.geometry_after_color(step)
        if set(self.seen) & set(_MOVES):
            self.fields["move_first"] = True

    def must_precede(self, step: Step, later: str, remedy: str) -> None:
        """Check that a step comes before `later`. Order matters: for example, black is not 0 after normalization."""
        step.require(later not in self.seen, f"comes after {later}; {remedy}")

    def geometry_after_color(self, step: Step) -> None:
        if "ColorJitter" in self.seen:  # gray may follow: it is the same before geometry and after it
            order = f"({step.name} follows ColorJitter)"
            self.notes.append(f"color is drawn as specified but applied after all geometry {order}")
        self.must_precede(step, "RandomErasing", "erase last")

    def bilinear(self, step: Step) -> None:
        rule = "with antialias=False is not supported; omit antialias"
        step.require(step.get("antialias") is not False, rule)
        mode = getattr(step.get("interpolation"), "value", step.get("interpolation"))
        if mode not in ("bilinear", 2):
            self.notes.append(f"{step.name} uses bilinear interpolation instead of {mode}")

    def moves(self, step: Step) -> None:
        """Check the options that rotations and affine transforms share."""
        self.must_precede(step, "Normalize", "normalize later")
        before = "comes after a crop, and another rotation or affine before it; put both on the same side"
        step.require("move_first" not in self.fields or "size" not in self.fields, before)
        self.geometry_after_color(step)
        self.bilinear(step)
        step.require(step.get("center") is None, f"with center={step.get('center')!r} is not supported; omit center")
        self.black(step, "omit fill for black, or set fill='photo' on the Augment for the image's own pixels")

    def black(self, step: Step, remedy: str) -> None:
        fill = step.get("fill")
        if isinstance(fill, dict):  # v2: by type of input
            fill = next(iter(cast("dict[object, object]", fill).values()), 0)
        plain = not fill or (isinstance(fill, Iterable) and not any(cast("Iterable[float]", fill)))
        step.require(plain, f"with fill={step.get('fill')!r} is not supported; {remedy}")


def _convert(reading: _Reading, step: Step) -> None:
    dtype = step.get("dtype")
    # v2 also accepts a dictionary from input types to dtypes.
    dtypes = cast("dict[object, object]", dtype).values() if isinstance(dtype, dict) else [dtype]
    floating = step.name in _TO_FLOAT or any(getattr(one, "is_floating_point", False) for one in dtypes)
    unscaled = floating and not getattr(step.transform, "scale", True) and not reading.converted
    step.require(not unscaled, "with scale=False leaves pixel values in [0, 255]; pass scale=True")
    if step.name not in ("Identity", "ToPureTensor") and not (floating and reading.converted):
        reading.must_precede(step, "Normalize", "convert first, then normalize")
    reading.converted |= floating
    reading.floating = floating or (reading.floating and step.name not in ("ToImage", "PILToTensor"))


_PROBABILITIES = {  # fields with the probability of a transform, and their defaults
    "ColorJitter": ("jitter_probability", 1.0),
    "RandomRotation": ("rotate_probability", 1.0),
    "RandomAffine": ("affine_probability", 1.0),
    "RandomHorizontalFlip": ("flip", 0.0),
    "RandomVerticalFlip": ("flip_vertical", 0.0),
    "RandomGrayscale": ("grayscale", 0.0),
    "Grayscale": ("grayscale", 0.0),
    "RandomErasing": ("erase", 0.0),
}


def _apply(reading: _Reading, step: Step) -> None:
    inner = [
        one for each in cast("Iterable[object]", step.get("transforms")) for one in steps_of(each, lenient=step.lenient)
    ]
    names = ", ".join(one.name for one in inner)
    if step.lenient and len(inner) != 1:
        for one in inner:
            _read(reading, one)
        return
    step.require(len(inner) == 1, f"of {names} switches all of them at once; give each a RandomApply of its own")
    _read(reading, inner[0])
    if step.lenient and names not in _PROBABILITIES:
        return
    step.require(names in _PROBABILITIES, f"of {names} is not supported; it takes {', '.join(_PROBABILITIES)}")
    field, default = _PROBABILITIES[names]
    reading.fields[field] = step.probability() * reading.fields.get(field, default)


def _resize(reading: _Reading, step: Step) -> None:
    step.require("size" not in reading.fields, "comes after a crop; resize first, and crop to the output size")
    if "size" in reading.fields:  # only if what comes near is read
        reading.fields["size"] = step.size()
        return
    reading.view_first(step)
    reading.bilinear(step)
    step.require(step.get("max_size") is None, "with max_size is not supported; omit max_size")
    if len(step.numbers("size")) == 1:
        reading.fields["resize"] = step.size()[0]
    else:
        late = [name for name in reading.seen if name in (*_MOVES, "Pad")]
        step.require(not late, f"to a fixed size comes after {', '.join(late)}; resize first")
        reading.fields["resize"] = reading.fields["size"] = step.size()


def _center_crop(reading: _Reading, step: Step) -> None:
    if not {"CenterCrop", "RandomCrop", "RandomResizedCrop"} & set(reading.seen):
        reading.fields.pop("size", None)  # set by Resize((h, w))
    reading.view_first(step)
    reading.fields |= {"size": step.size(), "resize": reading.fields.get("resize", "off")}


def _preset(reading: _Reading, step: Step) -> None:
    """Read torchvision's ImageClassification: resize, center crop, conversion, normalization."""
    reading.view_first(step)
    reading.bilinear(step)
    resize = step.size("resize_size")
    square = len(step.numbers("resize_size")) == 1
    reading.fields |= {"resize": resize[0] if square else resize, "size": step.size("crop_size")}
    _normalize(reading, step)


def _pad(reading: _Reading, step: Step) -> None:
    step.require("RandomCrop" not in reading.seen, "comes after RandomCrop; pad first")
    reading.pad = _padding(reading, step)


def _padding(reading: _Reading, step: Step) -> tuple[int, str]:
    sides, mode = step.numbers("padding", (0.0,)), step.get("padding_mode")
    step.require(len(set(sides)) == 1, f"with padding={step.get('padding')!r} is not supported; use one number")
    if not (sides[0] or step.get("pad_if_needed")):
        return 0, "constant"
    step.require(mode in ("constant", "edge"), f"with padding_mode={mode!r} is not supported; use constant or edge")
    reading.black(step, "omit fill for black, or use padding_mode='edge'")
    return int(max(sides)), "constant" if mode == "constant" else "edge"


def _random_crop(reading: _Reading, step: Step) -> None:
    padding, mode = own = _padding(reading, step)
    step.require(not (reading.pad and padding), "has padding, and so has the Pad before it; keep one")
    _center_crop(reading, step)
    padding, mode = reading.pad or own
    turned = "move_first" in reading.fields and mode == "edge"
    step.require(not turned, "with padding_mode='edge' comes after a rotation or affine; crop first")
    mode = "constant" if turned else mode
    if "crop" not in reading.fields:  # it is only if what comes near is read
        reading.fields |= {"random_crop": True, "padding": padding, "padding_mode": mode}
    reading.pad = None


def _resized_crop(reading: _Reading, step: Step) -> None:
    step.require("size" not in reading.fields, "comes after a resize to a fixed size; remove that Resize")
    step.require(not reading.pad, "comes after Pad, which changes the crop's share of the image; omit Pad")
    reading.view_first(step)
    reading.bilinear(step)
    if reading.fields.pop("resize", None):
        share = "the crop takes the same fraction of the original image"
        reading.notes.append(f"ignored Resize before {step.name}: {share}")
    reading.fields |= {"size": step.size(), "crop": step.numbers("scale"), "crop_ratio": step.numbers("ratio")}


def _flip(reading: _Reading, step: Step) -> None:
    reading.geometry_after_color(step)
    reading.fields["flip" if step.name == "RandomHorizontalFlip" else "flip_vertical"] = step.probability()


def _rotation(reading: _Reading, step: Step) -> None:
    reading.must_precede(step, "RandomAffine", "rotate first")
    reading.moves(step)
    step.require(not step.get("expand"), "with expand=True changes the output size; omit expand")
    reading.fields["rotate"] = step.symmetric("degrees", *step.numbers("degrees"))


def _affine(reading: _Reading, step: Step) -> None:
    reading.moves(step)
    shear = (*step.numbers("shear", (0, 0)), 0, 0)
    reading.fields |= {
        "affine_rotate": step.symmetric("degrees", *step.numbers("degrees")),
        "translate": step.numbers("translate", (0.0, 0.0)),
        "scale": step.numbers("scale", (1.0, 1.0)),
        "shear": (step.symmetric("shear", *shear[:2]), step.symmetric("shear", *shear[2:4])),
    }


def _grayscale(reading: _Reading, step: Step) -> None:
    reading.must_precede(step, "RandomErasing", "erase last")
    reading.must_precede(step, "Normalize", "normalize later")
    channels = step.get("num_output_channels") or 3  # RandomGrayscale keeps the number of channels
    step.require(channels == 3, "gives one channel, but images here always have three; use Grayscale(3)")
    reading.fields["grayscale"] = 1.0 if step.name == "Grayscale" else step.probability()


def _jitter(reading: _Reading, step: Step) -> None:
    reading.must_precede(step, "RandomErasing", "erase last")
    reading.must_precede(step, "Normalize", "normalize later")
    if set(reading.seen) & set(_GRAYS):
        reading.notes.append("gray is drawn as specified but applied after ColorJitter")
    for what in ("brightness", "contrast", "saturation"):
        low, high = step.numbers(what, (1.0, 1.0))
        clipped = low == 0 and high >= 2  # torchvision clips 1 - strength at 0
        reading.fields[what] = round(high - 1, 12) if clipped else step.symmetric(what, low, high, about=1)
    reading.fields["hue"] = step.symmetric("hue", *step.numbers("hue", (0.0, 0.0)))
    if sum(reading.fields[what] != 0 for what in FACTORS) > 1:
        reading.notes.append("ColorJitter's operations run in a fixed order: brightness, contrast, saturation, hue")


def _normalize(reading: _Reading, step: Step) -> None:
    for what in ("mean", "std"):
        values = tuple(map(float, step.numbers(what)))
        reading.fields[what] = values * 3 if len(values) == 1 else values  # torchvision broadcasts a single number


def _erasing(reading: _Reading, step: Step) -> None:
    if step.get("probability") is not None:  # timm's, which erases normalized images
        simple = not (step.get("rand_color") or step.get("per_pixel")) and step.get("max_count") == 1
        step.require(simple, "of timm is supported with mode='const' and one rectangle only; use re_mode='const'")
        low, high = (round(exp(value), 12) for value in step.numbers("log_aspect_ratio"))
        area = (*step.numbers("min_area"), *step.numbers("max_area"))
        reading.fields |= {"erase": step.numbers("probability")[0], "erase_area": area, "erase_ratio": (low, high)}
        return
    random = step.get("value") is None or isinstance(step.get("value"), str)
    step.require(not random, "with random values is not supported; use value=0")
    values = (0.0,) if random else tuple(map(float, step.numbers("value")))
    late = "with a nonzero value is applied to integer pixels (up to 255); erase after the conversion to float"
    step.require(reading.floating or not any(values), late)
    reading.fields |= {
        "erase": step.probability(),
        "erase_area": step.numbers("scale"),
        "erase_ratio": step.numbers("ratio"),
        "erase_value": values * 3 if len(values) == 1 else values,
    }


_READERS: dict[str, Callable[[_Reading, Step], None]] = {
    "RandomResizedCrop": _resized_crop,
    "Resize": _resize,
    "CenterCrop": _center_crop,
    "RandomCrop": _random_crop,
    "Pad": _pad,
    "RandomHorizontalFlip": _flip,
    "RandomVerticalFlip": _flip,
    "RandomRotation": _rotation,
    "RandomAffine": _affine,
    "ColorJitter": _jitter,
    "RandomGrayscale": _grayscale,
    "Grayscale": _grayscale,
    "Normalize": _normalize,
    "RandomErasing": _erasing,
    "ImageClassification": _preset,
    "RandomResizedCropAndInterpolation": _resized_crop,
}
