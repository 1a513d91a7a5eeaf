"""Levels of more than 8 bits to 8, by the range that the file states."""

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

# Ranges of levels that state none: of fractions, bytes, detectors of 12 bits, and integers.
_RANGES = (1, 255, 4095, 65_535, (1 << 31) - 1, (1 << 32) - 1)
_SAMPLE_FORMAT, _MIN, _MAX, _S_MIN, _S_MAX = 339, 280, 281, 340, 341  # tags of TIFF
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2
_Value = float | str | bytes | tuple[float, ...]  # of a tag


def is_wide(image: Image.Image) -> bool:
    """Whether its levels are not those of bytes: in one of Pillow's modes "I;16", "I" and "F", or signed."""
    return image.mode == "F" or image.mode.startswith("I") or _is_signed_bytes(image)


def _is_signed_bytes(image: Image.Image) -> bool:
    """Pillow reads them as unsigned ones."""
    return image.mode == "L" and _tags(image).get(_SAMPLE_FORMAT) == (_SIGNED,)


def to_eight_bits(image: Image.Image) -> NDArray[np.uint8]:
    """The gray levels of a loaded image that is wide, from black 0 to white 255."""
    array = np.asarray(image)
    levels = (array.view(np.int8) if _is_signed_bytes(image) else array).astype(np.float32)
    levels[~np.isfinite(levels)] = 0
    low, high = _range(image, levels)
    np.clip(levels, low, high, out=levels)
    levels -= np.float32(low)
    levels *= np.float32(255 / (high - low))
    made = np.rint(levels, out=levels).astype(np.uint8)
    return 255 - made if _tags(image).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO else made


def _range(image: Image.Image, levels: NDArray[np.float32]) -> tuple[float, float]:
    """(level of black, level of white): by the file's tags, or its program's note, or its number of bits.

    Signed levels of more than a byte, floats and integers of 32 bits fill their type in no file. Without a note theirs is the
    smallest of a few usual ranges that holds them, on both sides of zero where some are negative.
    """
    tags = _tags(image)
    whole = "F" not in image.mode and _first(tags, _SAMPLE_FORMAT) in (None, _UNSIGNED)
    bits = int(_first(tags, TiffImagePlugin.BITSPERSAMPLE) or 16)
    least, most = float(levels.min()), float(levels.max())
    for low, high in ((_first(tags, _S_MIN), _first(tags, _S_MAX)), (_first(tags, _MIN), _first(tags, _MAX))):
        if high is not None and (low or 0) < high and (low or 0) <= least and most <= high:  # or the tags are wrong
            return low or 0, high
    if (noted := _noted(tags)) is not None:
        return noted
    if whole and bits <= 16:
        return 0, (1 << bits) - 1
    if _is_signed_bytes(image):
        return (-128 if least < 0 else 0), 127
    floats, furthest = "F" in image.mode, max(most, -least)
    slack = 1.1 if floats else 1  # resampling overshoots; it is clipped
    high = next((full for full in (_RANGES[:4] if floats else _RANGES[1:]) if furthest <= slack * full), furthest)
    return (-high if least < 0 else 0), high


def _tags(image: Image.Image) -> Mapping[int, _Value]:
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def _first(tags: Mapping[int, _Value], tag: int) -> float | None:
    """The number that a tag has, or the first of several."""
    value = tags.get(tag)
    first = value[0] if isinstance(value, tuple) and value else value
    return float(first) if isinstance(first, (int, float)) else None


def _noted(tags: Mapping[int, _Value]) -> tuple[float, float] | None:
    """What ImageJ, or a microscope's OME-XML, writes into the description: a range to show, or a number of bits."""
    text = str(tags.get(TiffImagePlugin.IMAGEDESCRIPTION, ""))
    if text.startswith("ImageJ="):
        low, high = (re.search(rf"^{name}=(-?\d+\.?\d*)\s*$", text, re.MULTILINE) for name in ("min", "max"))
        return (float(low[1]), float(high[1])) if low and high and float(low[1]) < float(high[1]) else None
    bits = re.search(r'SignificantBits="([1-9]\d?)"', text)
    return (0, (1 << int(bits[1])) - 1) if bits else None
