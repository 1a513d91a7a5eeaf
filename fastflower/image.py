"""Decoding and transcoding single image files."""

import io
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastflower.errors import SampleError

# Twice Pillow's warning threshold, where Pillow itself raises DecompressionBombError.
MAX_PIXELS = 178_956_970
# Without a quality of the caller's: 95, full chroma, is the most that Pillow recommends.
_QUALITY = 95
_MAX_SIDE = 65_500  # pixels: of libjpeg


def decode(encoded: Any) -> NDArray[np.uint8]:
    """Decode an image file's bytes to RGB, (H, W, 3) uint8, upright by its EXIF orientation.

    Identical to Pillow's decoding of JPEG files. Raises SampleError when the bytes are no image, or not all of one.
    """
    data = np.frombuffer(encoded, np.uint8)
    image: Any = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) if data.size else None
    if image is None:
        raise SampleError("cannot be decoded as an image, or is cut short")
    return image


def prepare(data: bytes, *, max_side: int | None, quality: int | None) -> tuple[bytes, tuple[int, int]]:
    """The JPEG file to pack for an image file, proven by a full decode, and its upright (height, width).

    The same bytes where they are a JPEG file in grey or RGB that needs no change; otherwise a transcoded RGB image.
    max_side  pixels, the longer side is reduced to it; quality  1 .. 95, every image is transcoded with it.
    Raises SampleError with the reason when the image does not decode, or would have more than MAX_PIXELS pixels.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise SampleError(f"has {width} x {height} pixels, more than the limit of {MAX_PIXELS}")
            too_large = max_side is not None and max(width, height) > max_side
            if image.format == "JPEG" and image.mode in ("L", "RGB") and quality is None and not too_large:
                decoded_size = decode(data).shape[:2]
                return data, (decoded_size[0], decoded_size[1])
            upright = _upright_rgb(image)
    except SampleError as error:
        raise SampleError(_reason(data) or str(error)) from None
    except Exception as error:  # Pillow's readers raise whatever struct, zlib and they themselves raise
        raise SampleError(_plain(error)) from None
    if max_side is not None:
        upright.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    if max(upright.size) > _MAX_SIDE:
        raise SampleError(f"has {width} x {height} pixels, more a side than a JPEG file's {_MAX_SIDE}; set max_side")
    target = io.BytesIO()
    upright.save(target, "JPEG", quality=quality or _QUALITY, subsampling=0 if quality is None else "4:2:0")
    return target.getvalue(), (upright.height, upright.width)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """As Pillow's convert("RGB") makes it, but 16-bit greys are scaled to 8 bits; Pillow clips them, most of them to white."""
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    upright = ImageOps.exif_transpose(image)
    if wide:
        upright = Image.fromarray(np.rint(np.asarray(upright) / 257).astype(np.uint8))
    upright.info.pop("transparency", None)  # dropped like every alpha; of a palette's, Pillow would warn
    return upright.convert("RGB")


def _reason(data: bytes) -> str | None:
    """What Pillow says of a file that does not decode; None when Pillow decodes it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception as error:
        return _plain(error)
    return None


def _plain(error: BaseException) -> str:
    return "is no image" if "cannot identify" in str(error) else str(error) or type(error).__name__
