"""Scales the pixel values of gray images with more than 8 bits to 8 bits, using the range that the file states."""

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

# Conventional maxima, for files that do not state a range: fractions, bytes, 12-bit detectors and integers.
_RANGES = (1, 255, 4095, 65_535, (1 << 31) - 1, (1 << 32) - 1)
_SAMPLE_FORMAT, _MIN, _MAX, _S_MIN, _S_MAX = 339, 280, 281, 340, 341  # TIFF tags
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2
_Value = float | str | bytes | tuple[float, ...]  # of a TIFF tag


def is_wide(image: Image.Image) -> bool:
    """Return whether pixel values must be scaled to 8 bits: Pillow's modes "I;16", "I" and "F", and signed bytes."""
    return image.mode == "F" or image.mode.startswith("I") or _is_signed_bytes(image)


def _is_signed_bytes(image: Image.Image) -> bool:
    """Return whether the file stores signed bytes, which Pillow reads as unsigned."""
    return image.mode == "L" and _tags(image).get(_SAMPLE_FORMAT) == (_SIGNED,)


def to_eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Return the gray levels of a loaded wide image, from 0 (black) to 255 (white)."""
    array = np.asarray(image)
    values = (array.view(np.int8) if _is_signed_bytes(image) else array).astype(np.float32)
    values[~np.isfinite(values)] = 0
    low, high = _range(image, values)
    np.clip(values, low, high, out=values)
    values -= np.float32(low)
    values *= np.float32(255 / (high - low))
    scaled = np.rint(values, out=values).astype(np.uint8)
    return 255 - scaled if _tags(image).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO else scaled


def _range(image: Image.Image, values: NDArray[np.float32]) -> tuple[float, float]:
    """Return the pixel values of black and white, from the file's tags, its description or its number of bits.

    For floats, 32-bit integers and signed values wider than one byte, never assume the full range of the type. If the file
    states no range, use the smallest conventional range that contains the values, symmetric about zero if any is negative.
    """
    tags = _tags(image)
    whole = "F" not in image.mode and _first(tags, _SAMPLE_FORMAT) in (None, _UNSIGNED)
    bits = int(_first(tags, TiffImagePlugin.BITSPERSAMPLE) or 16)
    least, most = float(values.min()), float(values.max())
    for low, high in ((_first(tags, _S_MIN), _first(tags, _S_MAX)), (_first(tags, _MIN), _first(tags, _MAX))):
        if high is not None and (low or 0) < high and (low or 0) <= least and most <= high:  # else the tags are wrong
            return low or 0, high
    if (described := _described_range(tags)) is not None:
        return described
    if whole and bits <= 16:
        return 0, (1 << bits) - 1
    if _is_signed_bytes(image):
        return (-128 if least < 0 else 0), 127
    floats, furthest = "F" in image.mode, max(most, -least)
    slack = 1.1 if floats else 1  # resampling can overshoot; the excess is clipped
    high = next((full for full in (_RANGES[:4] if floats else _RANGES[1:]) if furthest <= slack * full), furthest)
    return (-high if least < 0 else 0), high


def _tags(image: Image.Image) -> Mapping[int, _Value]:
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def _first(tags: Mapping[int, _Value], tag: int) -> float | None:
    """Return a tag's first number, or None if it has none."""
    value = tags.get(tag)
    first = value[0] if isinstance(value, tuple) and value else value
    return float(first) if isinstance(first, (int, float)) else None


def _described_range(tags: Mapping[int, _Value]) -> tuple[float, float] | None:
    """Return the range in the description tag: ImageJ's display range, or the bit depth in a microscope's OME-XML."""
    text = str(tags.get(TiffImagePlugin.IMAGEDESCRIPTION, ""))
    if text.startswith("ImageJ="):
        low, high = (re.search(rf"^{name}=(-?\d+\.?\d*)\s*$", text, re.MULTILINE) for name in ("min", "max"))
        return (float(low[1]), float(high[1])) if low and high and float(low[1]) < float(high[1]) else None
    bits = re.search(r'SignificantBits="([1-9]\d?)"', text)
    return (0, (1 << int(bits[1])) - 1) if bits else None
