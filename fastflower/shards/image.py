"""Decoding, transcoding and fingerprinting single image files."""

import io
import re
import struct
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastflower.errors import SampleError
from fastflower.shards import libjpeg
from fastflower.shards.levels import is_wide, to_eight_bits

# Twice Pillow's warning threshold, where Pillow itself raises DecompressionBombError.
MAX_PIXELS = 178_956_970
# Without a quality of the caller's: 95, full chroma, is the most that Pillow recommends.
_QUALITY = 95
_MAX_SIDE = 65_500  # pixels: of libjpeg
_NO_DATA = 128  # the gray that libjpeg gives pixels for which a file has no data
_LEAST_DATA = 0.05  # of the pixels: a file with less is another image's data under this header
_CONTRAST = 17  # gray levels: 12 bits in a file of 16 that does not say so span 16
_REDUCED = {  # the flags' constants include IMREAD_COLOR, which means BGR
    factor: getattr(cv2, f"IMREAD_REDUCED_COLOR_{factor}") & ~cv2.IMREAD_COLOR for factor in (2, 4, 8)
}
# Pictures only: some of Pillow's other readers start programs, such as Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "PPM", "TIFF", "JPEG2000", "AVIF", "ICO", "PCX", "TGA")


def decode(encoded: bytes, decode_scale: int = 1) -> NDArray[np.uint8]:
    """Decode an image file's bytes to RGB, (H, W, 3) uint8, upright by its EXIF orientation.

    reduce  1, 2, 4 or 8: a pixel for each box of so many, rounded up. In a JPEG file the low frequencies of its blocks give
    them, for a fifth of the time that the whole takes (a tenth at 8).

    Identical to Pillow's decoding of JPEG files. Raises SampleError when the bytes are no image, or not all of one.
    """
    if decode_scale == 1:
        return _decoded(encoded, cv2.IMREAD_COLOR_RGB)
    if encoded[:2] == b"\xff\xd8":
        return _decoded(encoded, cv2.IMREAD_COLOR_RGB | _REDUCED[decode_scale])
    image = _decoded(encoded, cv2.IMREAD_COLOR_RGB)
    height, width = (-(-side // decode_scale) for side in image.shape[:2])
    missing = (height * decode_scale - image.shape[0], width * decode_scale - image.shape[1])
    whole_boxes = cv2.copyMakeBorder(image, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
    return np.asarray(cv2.resize(whole_boxes, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _decoded(encoded: bytes, flags: int) -> NDArray[np.uint8]:
    data = np.frombuffer(encoded, np.uint8)
    try:
        image = cv2.imdecode(data, flags) if data.size else None
    except cv2.error as error:  # more pixels than OpenCV takes; or no memory, which says nothing about the image
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(error.err) from None
        image = None
    if image is None:
        raise SampleError("cannot be decoded as an image, or is cut short")
    return np.asarray(image, np.uint8)  # which it is


class Prepared(NamedTuple):
    """An image as it is packed."""

    encoded: bytes
    """A JPEG file."""
    size: tuple[int, int]
    """Upright (height, width), pixels."""
    hash: int
    """Perceptual, 64 bits: images that look alike differ in few of them."""


def prepare(
    data: bytes, *, max_side: int | None, quality: int | None, warn: Callable[[str], object] = lambda _: None
) -> Prepared:
    """The JPEG file to pack for an image file, proven by a full decode.

    The same bytes where they are a JPEG file in gray or RGB that needs no change; otherwise a transcoded RGB image.
    max_side  pixels, the longer side is reduced to it; quality  1 .. 95, every image is transcoded with it.
    warn  is told what is odd about an image that is packed all the same: damage that decoders only warn of, or no contrast.
    Raises SampleError with the reason when the image does not decode, or would have more than MAX_PIXELS pixels.
    """
    size = _kept_jpeg_size(data) if quality is None else None
    if size is None or (max_side is not None and max(size) > max_side):
        made, gray = _transcoded(data, max_side, quality)
        if data[:2] == b"\xff\xd8":  # Pillow keeps to itself what libjpeg warns of
            _pass_on_warnings(data, warn)
    else:
        _check_pixels(*size)
        made, gray = data, _gray_if_intact(data, warn)
    low, high, *_ = cv2.minMaxLoc(gray)
    if high - low < _CONTRAST:
        warn(f"has next to no contrast: its gray levels are {low:.0f} to {high:.0f} of 255")
    return Prepared(made, (gray.shape[0], gray.shape[1]), perceptual_hash(gray))


def _transcoded(data: bytes, max_side: int | None, quality: int | None) -> tuple[bytes, NDArray[np.uint8]]:
    """The JPEG file of an image, and its gray levels."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_pixels(*image.size)
            upright = _upright_rgb(image)
    except (SampleError, MemoryError):  # the latter says nothing about the image
        raise
    except Exception as error:  # Pillow's readers raise whatever struct, zlib and they themselves raise
        raise SampleError(_message(error)) from None
    if max_side is not None:
        upright.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    if max(upright.size) > _MAX_SIDE:
        width, height = upright.size
        raise SampleError(f"has {width} x {height} pixels, more a side than a JPEG file's {_MAX_SIDE}; set max_side")
    target = io.BytesIO()
    upright.save(target, "JPEG", quality=quality or _QUALITY, subsampling=0 if quality is None else "4:2:0")
    return target.getvalue(), np.asarray(upright.convert("L"))


def _gray_if_intact(data: bytes, warn: Callable[[str], object]) -> NDArray[np.uint8]:
    """The gray levels of a JPEG file that is kept as it is.

    In gray every code of the file is read and nothing is refused less (3,960 damaged files, 1,701 refused by both); what is
    left out, the transform of chroma and the conversion of colors, cannot fail.
    """
    try:
        with libjpeg.warnings() as heard:
            gray = _decoded(data, cv2.IMREAD_GRAYSCALE)
    except SampleError as error:
        raise SampleError(_pillow_error(data) or str(error)) from None
    if heard and (behind := _pillow_error(data)):  # the damage, where OpenCV has its pixels already
        raise SampleError(behind)
    _judge_damage(gray, heard, warn)
    return gray


def _pass_on_warnings(data: bytes, warn: Callable[[str], object]) -> None:
    """What libjpeg warns of in a JPEG file that is transcoded, of which OpenCV does not read every kind."""
    array = np.frombuffer(data, np.uint8)
    with libjpeg.warnings() as heard:
        read = cv2.imdecode(array, cv2.IMREAD_REDUCED_GRAYSCALE_8) is not None  # an eighth: in half of the time
        gray = cv2.imdecode(array, cv2.IMREAD_GRAYSCALE) if read and heard else None
    if gray is not None:
        _judge_damage(np.asarray(gray, np.uint8), heard, warn)


def _judge_damage(gray: NDArray[np.uint8], heard: bytearray, warn: Callable[[str], object]) -> None:
    """Pass on what libjpeg warns of. Raises SampleError where it has next to no data for what the header promises."""
    if heard:
        share = np.count_nonzero(gray != _NO_DATA) / gray.size
        if share < _LEAST_DATA:
            height, width = gray.shape
            raise SampleError(f"promises {width} x {height} pixels, and has data for {share:.1%} of them")
        warn(heard.decode(errors="replace").splitlines()[0])


def _kept_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG file that is kept as it is: gray or three colors of 8 bits, Huffman-coded. Else None.

    Also None where anything else stands between the segments before the first scan: OpenCV skips it, DALI refuses the file.
    And None where the last scan is not followed by the image's end: OpenCV has its pixels by then, Pillow refuses some.
    Pillow tells the same in four times the time, most of it holding Python's lock. Markers: ITU-T T.81, annex B.
    """
    place, size, orientations = 2, None, 0
    while data[:2] == b"\xff\xd8" and place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        if marker < 0xC0 or marker in _NO_SEGMENT:
            return None
        if marker == 0xDA:  # the first scan
            return size if _leads_to_end(data, place) else None
        if marker == 0xE1 and data[place + 4 : place + 8] == b"Exif":
            orientations += 1
            if orientations > 1:  # DALI 2.4 crashes where they differ
                return None
        if marker in (0xC0, 0xC1, 0xC2):  # a frame: baseline, extended, progressive
            bits, height, width, components = struct.unpack_from(">BHHB", data, place + 4)
            size = (width, height)
            if bits != 8 or not width or not height or components not in (1, 3):
                return None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


# Other frames (lossless, hierarchical, arithmetic), restarts, start and end of image: no frame of ours follows.
_NO_SEGMENT = {*range(0xC3, 0xD0), *range(0xD0, 0xDA)} - {0xC4, 0xCC}
# Tables, the number of lines, comments, other scans: what may stand between two scans.
_BETWEEN = {0xC4, 0xDA, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE}
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in a scan's data: no stuffed byte, restart or fill byte


def _leads_to_end(data: bytes, place: int) -> bool:
    """Whether the scan at `place`, and those after it, lead by whole segments to the end of the image."""
    while marker := _MARKER.match(data, place):
        kind = marker[0][1]
        if kind == 0xD9:
            return True
        if kind not in _BETWEEN:
            return False
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if kind == 0xDA:
            following = _MARKER.search(data, place)
            place = following.start() if following else len(data)
        while data[place : place + 2] == b"\xff\xff":  # fill bytes
            place += 1
    return False


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError(f"has {width} x {height} pixels, more than the limit of {MAX_PIXELS}")


def perceptual_hash(gray: NDArray[np.uint8]) -> int:
    """64 bits, one for each of the 8 x 8 lowest frequencies of the image's 32 x 32 reduction: is it above their median?

    gray  (H, W) uint8. The hash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010,
    section 3.2.1, with the median over all 64 as in the imagehash package.
    """
    image = gray
    while min(image.shape) >= 96:  # halving first takes half of the time
        height, width = image.shape
        image = cv2.resize(image[: height & ~1, : width & ~1], (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    frequencies = (_COSINES @ small @ _COSINES.T).ravel()
    return int.from_bytes(np.packbits(frequencies > np.partition(frequencies, 31)[31]).tobytes(), "big")


# The first 8 of 32 rows of the discrete cosine transform (DCT-II), unscaled.
_COSINES = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1)).astype(np.float32)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """As Pillow's convert("RGB") makes it, but upright, and with levels of more than 8 bits scaled; Pillow clips them."""
    image.load()  # before EXIF is read, so that what this raises is about the pixels
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF: every reader takes such an image as it stands
        pass
    upright = Image.fromarray(to_eight_bits(image)) if is_wide(image) else image
    upright.info.pop("transparency", None)  # dropped like every alpha; of a palette's, Pillow would warn
    return upright.convert("RGB")


def _pillow_error(data: bytes) -> str | None:
    """What Pillow says of a file that does not decode; None when Pillow decodes it."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as error:
        return _message(error)
    return None


def _message(error: BaseException) -> str:
    return "is no image" if "cannot identify" in str(error) else str(error) or type(error).__name__
