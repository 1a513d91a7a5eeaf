"""Decodes, transcodes and fingerprints single image files."""

import io
import re
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import cv2
import numpy as np
from cv2.typing import MatLike
from numpy.typing import NDArray
from PIL import ExifTags, Image

from fastflower.errors import SampleError
from fastflower.shards import kinds, libjpeg
from fastflower.shards.levels import is_wide, to_eight_bits

# Pillow raises DecompressionBombError above this, which is twice its warning threshold.
MAX_PIXELS = 178_956_970
_QUALITY = 95  # the default, used with full chroma resolution; the highest quality that Pillow recommends
_MAX_SIDE = 65_500  # pixels; libjpeg's limit
_NO_DATA = 128  # the gray level that libjpeg assigns to pixels without data
_MIN_DATA = 0.05  # minimum fraction of pixels with data; below it, header and data belong to different images
_MIN_CONTRAST = 17  # gray levels; 12-bit data in a 16-bit file without a stated range spans only 16
_REDUCED = {  # IMREAD_REDUCED_COLOR_* includes IMREAD_COLOR, which means BGR
    factor: getattr(cv2, f"IMREAD_REDUCED_COLOR_{factor}") & ~cv2.IMREAD_COLOR for factor in (2, 4, 8)
}
# Bitmap formats only: some of Pillow's other readers start programs, for example Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "PPM", "TIFF", "JPEG2000", "AVIF", "ICO", "PCX", "TGA")
_HEIF_LICENSES = "its libheif and libde265 are LGPL, its x265 is GPL"
_REGISTERING = threading.Lock()


def decode(encoded: bytes, decode_scale: int = 1) -> NDArray[np.uint8]:
    """Decode an image file to RGB, (H, W, 3) uint8, rotated upright by its EXIF orientation.

    decode_scale  1, 2, 4 or 8. Height and width are divided by it and rounded up. Above 1, JPEG files take a fifth of the
    time of a full decode (a tenth at 8), because only the low frequencies of each block are decoded.

    The pixels of JPEG files are identical to Pillow's. Raises SampleError if the data is not an image or is truncated.
    """
    if decode_scale == 1:
        return _imdecode(encoded, cv2.IMREAD_COLOR_RGB)
    if encoded[:2] == b"\xff\xd8":
        return _imdecode(encoded, cv2.IMREAD_COLOR_RGB | _REDUCED[decode_scale])
    return reduced(_imdecode(encoded, cv2.IMREAD_COLOR_RGB), decode_scale)


def reduced(image: NDArray[np.uint8], decode_scale: int) -> NDArray[np.uint8]:
    """Return an image, (H, W, 3) uint8, as `decode` returns it from a file that is not JPEG."""
    if decode_scale == 1:
        return image
    height, width = (-(-side // decode_scale) for side in image.shape[:2])
    missing = (height * decode_scale - image.shape[0], width * decode_scale - image.shape[1])
    padded = cv2.copyMakeBorder(image, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
    return np.asarray(cv2.resize(padded, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _imdecode(encoded: bytes, flags: int) -> NDArray[np.uint8]:
    data = np.frombuffer(encoded, np.uint8)
    try:
        image = cv2.imdecode(data, flags) if data.size else None
    except cv2.error as error:  # too many pixels for OpenCV; or out of memory, which says nothing about the image
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(error.err) from None
        image = None
    if image is None:
        raise SampleError("cannot be decoded as an image or is truncated")
    return np.asarray(image, np.uint8)  # for the type checker; the dtype is already uint8


class Prepared(NamedTuple):
    """An image ready to pack."""

    encoded: bytes
    """Bytes of a JPEG file."""
    size: tuple[int, int]
    """(height, width) of the upright image, in pixels."""
    hash: int
    """64-bit perceptual hash. The hashes of near-duplicates differ in only a few bits."""


def prepare(
    data: bytes,
    *,
    max_side: int | None,
    quality: int | None,
    warn: Callable[[str], object] = lambda _: None,
    name: str = "",
    max_pixels: int | None = None,
) -> Prepared:
    """Fully decode an image file to check that it is intact, and return the JPEG file to pack.

    Keeps the bytes of a gray or RGB JPEG file that needs no change. Transcodes every other file to an RGB JPEG.
    max_side  Maximum length of the longer side in pixels.  quality  JPEG quality, 1 .. 95; if given, transcodes every image.
    warn  Called with a message if an image is packed despite damage that decoders only warn about, or despite low contrast.
    name  The file's name. If the file is no image, the reason says what it is and how it is named.
    max_pixels  Refuse images with more pixels, before they are decoded. None means MAX_PIXELS.
    Raises SampleError with the reason if the image cannot be decoded or has too many pixels.
    """
    size = _kept_jpeg_size(data) if quality is None else None
    if size is None or (max_side is not None and max(size) > max_side):
        jpeg, gray = _transcode(data, max_side, quality, name, max_pixels)
        if data[:2] == b"\xff\xd8":  # Pillow hides libjpeg's warnings
            _forward_warnings(data, warn)
    else:
        check_pixels(*size, max_pixels)
        jpeg, gray = data, _pixels_if_intact(data, cv2.IMREAD_GRAYSCALE, warn)
    _check_contrast(gray, warn)
    return Prepared(jpeg, (gray.shape[0], gray.shape[1]), perceptual_hash(gray))


def prepared_pixels(
    data: bytes, *, warn: Callable[[str], object], name: str, max_pixels: int | None = None
) -> tuple[bytes, NDArray[np.uint8]]:
    """Return the JPEG file that `prepare` returns without max_side and quality, and its pixels, (H, W, 3) RGB uint8.

    A JPEG file is decoded only once. The arguments and errors are those of `prepare`.
    """
    if (size := _kept_jpeg_size(data)) is None:
        jpeg = prepare(data, max_side=None, quality=None, warn=warn, name=name, max_pixels=max_pixels).encoded
        return jpeg, decode(jpeg)
    check_pixels(*size, max_pixels)
    pixels = _pixels_if_intact(data, cv2.IMREAD_COLOR_RGB, warn)
    some = np.ascontiguousarray(pixels[::8, ::8])  # which almost always have enough contrast, in a tenth of the time
    if np.ptp(cv2.cvtColor(some, cv2.COLOR_RGB2GRAY)) < _MIN_CONTRAST:
        _check_contrast(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), warn)
    return data, pixels


def _check_contrast(gray: MatLike, warn: Callable[[str], object]) -> None:
    low, high, *_ = cv2.minMaxLoc(gray)
    if high - low < _MIN_CONTRAST:
        warn(f"has almost no contrast: its gray levels range from {low:.0f} to {high:.0f} (out of 0 to 255)")


def read_size(path: Path) -> tuple[int, int]:
    """Return the (height, width) that `prepare` gives an image file, without decoding it if its header leaves no doubt.

    Raises SampleError like `prepare`, and OSError if the file cannot be read.
    """
    with suppress(Exception), path.open("rb") as file:  # `prepare` says what is wrong
        formats = _formats(file.read(64))
        file.seek(0)
        with Image.open(file, formats=formats) as image:
            (width, height), turned = image.size, _is_turned(image, file)
        if turned is not None and width * height <= MAX_PIXELS:
            return (width, height) if turned else (height, width)
    return prepare(path.read_bytes(), max_side=None, quality=None, name=path.name).size


def _is_turned(image: Image.Image, file: IO[bytes]) -> bool | None:
    """Return whether the orientation of an image that is not loaded yet swaps its sides, or None if readers may disagree."""
    if image.format == "PNG":  # Pillow would decode it, because an orientation may follow the pixels
        return None if _PNG_MAY_TURN & image.info.keys() or _follows_pixels(file) else False
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    orientation = exif.get(ExifTags.Base.Orientation, 1)
    # Pillow also looks in XMP and in TIFF's own tags, OpenCV does not.
    return orientation in _SWAPPED if orientation == image.getexif().get(ExifTags.Base.Orientation, 1) else None


_SWAPPED = (5, 6, 7, 8)  # EXIF orientations
_PNG_MAY_TURN = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}


def _follows_pixels(file: IO[bytes]) -> bool:
    """Return whether a PNG file has a chunk other than its end after the pixels."""
    position, kind, after = 8, b"", b""
    while kind != b"IEND":
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        if after and kind not in (b"IDAT", b"IEND"):
            return True
        after = after or (kind if kind == b"IDAT" else b"")
        position += 12 + length
    return False


def _transcode(
    data: bytes, max_side: int | None, quality: int | None, name: str, max_pixels: int | None
) -> tuple[bytes, NDArray[np.uint8]]:
    """Transcode an image file to JPEG. Return the JPEG bytes and the image in grayscale, (H, W) uint8."""
    try:
        with _opened(data, max_pixels) as image:
            check_pixels(*image.size, max_pixels)
            upright = upright_rgb(image)
    except (SampleError, MemoryError):  # running out of memory says nothing about the image
        raise
    except Exception as error:  # Pillow's readers also raise errors of struct and zlib
        raise SampleError(kinds.reason(data, name) or _message(error, data)) from None
    if max_side is not None:
        upright.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    if max(upright.size) > _MAX_SIDE:
        width, height = upright.size
        reason = f"has {width} x {height} pixels, but JPEG allows at most {_MAX_SIDE} per side"
        raise SampleError(f"{reason}; set max_side", reason=reason)
    target = io.BytesIO()
    upright.save(target, "JPEG", quality=quality or _QUALITY, subsampling=0 if quality is None else "4:2:0")
    return target.getvalue(), np.asarray(upright.convert("L"))


def _opened(data: bytes, max_pixels: int | None) -> Image.Image:
    """Open an image file. The size of a PNG file is checked before Pillow warns about it on stderr."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        check_pixels(*struct.unpack_from(">II", data, 16), max_pixels)
    return Image.open(io.BytesIO(data), formats=_formats(data))


def _formats(data: bytes) -> tuple[str, ...]:
    """Return the formats to try. HEIF needs the package pillow-heif, which is imported when the first such file is met."""
    if not kinds.is_heif(data):
        return _FORMATS
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports, reportUnknownVariableType]
    except ImportError:
        raise SampleError(f"is HEIC, which needs pip install pillow-heif ({_HEIF_LICENSES})") from None
    with _REGISTERING:
        register_heif_opener()
    return ("HEIF",)


def _pixels_if_intact(data: bytes, flags: int, warn: Callable[[str], object]) -> NDArray[np.uint8]:
    """Decode an untranscoded JPEG file to gray or RGB by OpenCV's `flags`. Raises SampleError if the file is damaged.

    Decoding to gray reads all the coded data. It skips only the chroma transform and the color conversion, which cannot
    fail. In a test with 3,960 damaged files, it rejected the same 1,701 files as decoding to color.
    """
    try:
        with libjpeg.warnings() as messages:
            pixels = _imdecode(data, flags)
    except SampleError as error:
        raise SampleError(_pillow_error(data) or str(error)) from None
    if messages and (trailing_error := _pillow_error(data)):  # damage after the last pixel, which OpenCV ignores
        raise SampleError(trailing_error)
    _check_damage(pixels, messages, warn)
    return pixels


def _forward_warnings(data: bytes, warn: Callable[[str], object]) -> None:
    """Forward libjpeg's warnings about a transcoded JPEG file, if OpenCV can read the file."""
    array = np.frombuffer(data, np.uint8)
    with libjpeg.warnings() as messages:
        read = cv2.imdecode(array, cv2.IMREAD_REDUCED_GRAYSCALE_8) is not None  # 1/8 scale is twice as fast
        gray = cv2.imdecode(array, cv2.IMREAD_GRAYSCALE) if read and messages else None
    if gray is not None:
        _check_damage(np.asarray(gray, np.uint8), messages, warn)


def _check_damage(pixels: NDArray[np.uint8], messages: bytearray, warn: Callable[[str], object]) -> None:
    """Forward libjpeg's warnings. Raises SampleError if the file has almost no data for the pixels its header declares."""
    if messages:
        share = np.count_nonzero(pixels != _NO_DATA) / pixels.size
        if share < _MIN_DATA:
            height, width = pixels.shape[:2]
            raise SampleError(f"declares {width} x {height} pixels, but has data for only {share:.1%} of them")
        warn(messages.decode(errors="replace").splitlines()[0])


def _kept_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG file that can be kept unchanged, or None for any other file.

    A file can be kept if it is Huffman-coded, has one or three components of 8 bits, and has neither of these defects:
    - Stray bytes between the segments before the first scan. OpenCV skips them, but DALI rejects the file.
    - No end-of-image marker after the last scan. OpenCV does not look for it, but Pillow rejects some of these files.
    Pillow takes four times as long for these checks and mostly holds the GIL. ITU-T T.81, annex B, defines the markers.
    """
    position, size, orientations = 2, None, 0
    while data[:2] == b"\xff\xd8" and position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker < 0xC0 or marker in _NO_SEGMENT:
            return None
        if marker == 0xDA:  # the first scan
            return size if _scans_are_complete(data, position) else None
        if marker == 0xE1 and data[position + 4 : position + 8] == b"Exif":
            orientations += 1
            if orientations > 1:  # DALI 2.4 crashes if the orientations differ
                return None
        if marker in (0xC0, 0xC1, 0xC2):  # a frame: baseline, extended or progressive
            bits, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            size = (width, height)
            if bits != 8 or not width or not height or components not in (1, 3):
                return None
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


# Not allowed before the first scan: other frames (lossless, hierarchical, arithmetic), restarts, start and end of image.
_NO_SEGMENT = {*range(0xC3, 0xD0), *range(0xD0, 0xDA)} - {0xC4, 0xCC}
# Segments allowed between two scans: tables, the number of lines, application data, comments and the next scan.
_BETWEEN = {0xC4, 0xDA, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE}
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # ends a scan's data; excludes stuffed bytes, restarts, fill bytes


def _scans_are_complete(data: bytes, position: int) -> bool:
    """Return whether the data from the scan at `position` to the end-of-image marker consists of complete segments."""
    while marker := _MARKER.match(data, position):
        kind = marker[0][1]
        if kind == 0xD9:
            return True
        if kind not in _BETWEEN:
            return False
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if kind == 0xDA:
            following = _MARKER.search(data, position)
            position = following.start() if following else len(data)
        while data[position : position + 2] == b"\xff\xff":  # fill bytes
            position += 1
    return False


def check_pixels(width: int, height: int, most: int | None = None) -> None:
    """Raise SampleError if an image has more than `most` pixels. None means MAX_PIXELS."""
    most = MAX_PIXELS if most is None else most
    if width * height > most:
        remedy = "a larger max_pixels (--max-pixels)" if width * height <= MAX_PIXELS else ""
        raise SampleError(f"has {width} x {height} pixels, more than the limit of {most}", remedy=remedy)


def perceptual_hash(gray: NDArray[np.uint8]) -> int:
    """Return the 64-bit perceptual hash of a gray image, (H, W) uint8.

    Resizes the image to 32 x 32. Each bit says whether one of the 8 x 8 lowest frequencies is above their median.
    From Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2.1, but with the
    median over all 64 frequencies, as in the imagehash package.
    """
    image = gray
    while min(image.shape) >= 96:  # halving the image first is twice as fast
        height, width = image.shape
        image = cv2.resize(image[: height & ~1, : width & ~1], (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    frequencies = (_COSINES @ small @ _COSINES.T).ravel()
    return int.from_bytes(np.packbits(frequencies > np.partition(frequencies, 31)[31]).tobytes(), "big")


# The first 8 of the 32 rows of the discrete cosine transform (DCT-II), unscaled.
_COSINES = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1)).astype(np.float32)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to upright RGB, by its EXIF orientation. The image itself stays as it is.

    Unlike Pillow's convert("RGB"), scales values of more than 8 bits instead of clipping them.
    """
    image.load()  # before reading EXIF, so that pixel errors are not mistaken for EXIF errors
    upright = Image.fromarray(to_eight_bits(image)) if is_wide(image) else image
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # damaged EXIF, which every reader ignores
        turn = None
    if turn is not None:
        upright = upright.transpose(turn)
    if "transparency" in upright.info:  # alpha is always dropped; Pillow would warn about a palette's alpha
        upright = upright.copy()
        upright.info.pop("transparency")
    return upright.convert("RGB")


_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _pillow_error(data: bytes) -> str | None:
    """Return Pillow's error for a file that does not decode, or None if Pillow decodes it."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as error:
        return _message(error, data)
    return None


def _message(error: BaseException, data: bytes) -> str:
    text = str(error)
    if "cannot identify" in text or "could not create decoder" in text:
        return kinds.damaged(data) or "is not an image"
    return text.replace("Truncated File Read", "image file is truncated").rstrip(".") or type(error).__name__
