"""What `predict` accepts as images: files, folders, URLs, bytes, file objects, PIL images and arrays."""

import logging
import os
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from time import monotonic
from typing import Protocol, cast, runtime_checkable
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastflower.errors import ArgumentError, SampleError
from fastflower.files import blame_the_system
from fastflower.loading.batch import Pixels
from fastflower.loading.image_files import images_below
from fastflower.machine import version_of
from fastflower.shards import libjpeg
from fastflower.shards.image import check_pixels, decode, prepared_pixels, reduced, upright_rgb

_log = logging.getLogger("fastflower")

_PIECE = 1 << 16  # bytes per read of a download

_ACCEPTED = (
    "a path, an http(s) URL, bytes, a binary file object, a PIL image, an (H, W, 3) uint8 array, or an iterable of them"
)


class Readable(Protocol):
    """A binary file object, such as `open(path, "rb")` or `io.BytesIO`."""

    def read(self) -> bytes:
        """Return the rest of the file."""
        ...


@runtime_checkable
class SupportsTell(Protocol):
    """A file object that knows its position."""

    def tell(self) -> int:
        """Return the position in bytes."""
        ...


OneImage = str | os.PathLike[str] | bytes | bytearray | memoryview | Readable | Image.Image | NDArray[np.uint8]
Images = OneImage | Iterable[OneImage]


@dataclass(frozen=True, slots=True)
class Source:
    """One image to classify, not read yet."""

    image: Path | str | bytes | Readable | Image.Image | NDArray[np.uint8]
    """A str is a URL."""
    index: int
    """Position among all images, from 0."""
    found: bool = False
    """Whether the image was found in a folder."""

    @property
    def path(self) -> Path | None:
        """Path of the file, or None if the image was not passed as a path."""
        return self.image if isinstance(self.image, Path) else None

    @property
    def name(self) -> str:
        """The path, the URL, or "image NUMBER"."""
        return str(self.image) if isinstance(self.image, (Path, str)) else f"image {self.index}"

    @property
    def file(self) -> Path | None:
        """The path, or the path in the URL. None if the image has neither."""
        return Path(unquote(urlsplit(self.image).path)) if isinstance(self.image, str) else self.path


@dataclass(frozen=True, slots=True)
class Upright:
    """The pixels of an image, upright and RGB."""

    pixels: Pixels
    """(H, W, 3) uint8."""
    jpeg: bytes | None = None
    """The file that they were decoded from, if any."""

    def at(self, decode_scale: int) -> Pixels:
        """Return the pixels that a loader decodes at this scale."""
        if decode_scale == 1 or self.jpeg is None:
            return reduced(self.pixels, decode_scale)
        with libjpeg.warnings():  # they were logged when the file was read
            return decode(self.jpeg, decode_scale)


def sources(images: Images) -> list[Source] | Iterator[Source]:
    """Return each image of `images`, and those in folders, in order. An iterator is read one by one, not in advance.

    Raises ArgumentError if one is not an image, and SampleError if a folder has none.
    """
    one = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, torch.Tensor)
    if isinstance(images, one) or hasattr(images, "read"):
        images = cast("list[OneImage]", [images])
    elif not isinstance(images, Iterable):
        raise ArgumentError(f"images must be {_ACCEPTED}, got {_described(images)}.")
    found = _numbered(images)
    return found if isinstance(images, Iterator) else list(found)


def _numbered(images: Iterable[object]) -> Iterator[Source]:
    number = 0
    for place, image in enumerate(images):
        checked = _checked(image, f"images[{place}]")
        if isinstance(checked, Path) and checked.is_dir():
            for path in images_below(checked):
                yield Source(path, number, found=True)
                number += 1
        else:
            yield Source(checked, number)
            number += 1


def _checked(image: object, name: str) -> Path | str | bytes | Readable | Image.Image | NDArray[np.uint8]:
    """Return an image in one of the types of `Source.image`. Raises ArgumentError if it is none."""
    if isinstance(image, str) and "://" in image:
        if not image.startswith(("https://", "http://")):
            what = "pass a path, or for other addresses a file object: fsspec.open(URL).open()"
            raise ArgumentError(f"{image}: only http:// and https:// are downloaded; {what}.")
        try:
            urlsplit(image)
        except ValueError as error:
            raise ArgumentError(f"{image}: is not a URL ({error}); pass another one.") from None
        return image
    if isinstance(image, (str, os.PathLike)):
        return Path(cast("str | os.PathLike[str]", image))
    if isinstance(image, (bytearray, memoryview)):
        return bytes(cast("bytearray", image))
    if isinstance(image, np.ndarray):
        return _checked_array(cast("NDArray[np.generic]", image), name)
    if isinstance(image, (bytes, Image.Image)):
        return image
    if callable(getattr(image, "read", None)):
        return cast("Readable", image)
    if isinstance(image, torch.Tensor):
        how = "as uint8 in 0 .. 255, for example with torchvision.transforms.functional.to_pil_image(tensor)"
        raise ArgumentError(f"{name} is a tensor; pass an (H, W, 3) uint8 array, or a PIL image: {how}.")
    raise ArgumentError(f"{name} must be {_ACCEPTED}, got {_described(image)}.")


def _checked_array(array: NDArray[np.generic], name: str) -> NDArray[np.uint8]:
    """Return the array, contiguous. Raises ArgumentError unless it is (H, W, 3) uint8."""
    shape = array.shape
    if array.dtype == np.uint8 and array.ndim == 3 and shape[2] == 3 and array.size:
        return np.ascontiguousarray(cast("NDArray[np.uint8]", array))
    if array.dtype != np.uint8:
        how = f"convert it: {_as_uint8(array)}"
    elif array.ndim == 2:
        how = "repeat the gray levels: np.stack([array] * 3, axis=2)"
    elif array.ndim == 3 and shape[2] in (1, 4):
        how = (
            "drop the alpha channel: array[:, :, :3]" if shape[2] == 4 else "repeat the gray levels: array.repeat(3, 2)"
        )
    elif array.ndim == 3 and shape[0] == 3:
        how = "move the channels last: array.transpose(1, 2, 0)"
    elif array.ndim == 4:
        how = "pass the images of a batch one by one: list(array)"
    else:
        how = "pass another image"
    raise ArgumentError(f"{name} must be an (H, W, 3) uint8 array of RGB, got {shape} {array.dtype}; {how}.")


def _as_uint8(array: NDArray[np.generic]) -> str:
    """Return how an array of another dtype becomes uint8, judged by its values."""
    kind, most = array.dtype.kind, array.max() if array.size and array.dtype.kind in "fiu" else 0
    if kind == "b":
        return "255 * array.astype('uint8')"
    if kind in "iu":
        plain = "for integers in 0 .. 255, array.astype('uint8')"
        return "for 16-bit levels, (array / 257).round().astype('uint8')" if most > 255 else plain
    if most > 1:
        return "for floats in 0 .. 255, array.round().astype('uint8')"
    return "for floats in 0 .. 1, (255 * array).round().astype('uint8')"


def _described(image: object) -> str:
    return repr(image) if image is None or isinstance(image, (bool, int, float)) else f"a {type(image).__qualname__}"


def read(source: Source, *, url_seconds: float, url_bytes: int, max_pixels: int) -> Upright:
    """Read and decode an image, rotated upright by its EXIF orientation. Raises SampleError with the reason if it is unusable.

    Prepares files as `pack` does: those other than JPEG are transcoded. PIL images and arrays are used as they are.
    """
    image = source.image
    try:
        if isinstance(image, np.ndarray):
            check_pixels(image.shape[1], image.shape[0], max_pixels)
            return Upright(image)
        if isinstance(image, Image.Image):
            return Upright(_pixels_of(image, max_pixels))
        if isinstance(image, Path):
            data = image.read_bytes()
        elif isinstance(image, str):
            data = _downloaded(image, url_seconds, url_bytes)
        else:
            data = image if isinstance(image, bytes) else _content(image)
    except OSError as error:
        blame_the_system(error, source.name)
        raise SampleError(error.strerror or str(error)) from None
    warn = partial(_log.warning, "%s: %s", source.name)
    name = source.file.name if source.file else ""
    jpeg, pixels = prepared_pixels(data, warn=warn, name=name, max_pixels=max_pixels)
    return Upright(pixels, jpeg)


def _pixels_of(image: Image.Image, max_pixels: int) -> Pixels:
    check_pixels(*image.size, max_pixels)
    try:
        pixels = np.asarray(upright_rgb(image), np.uint8)
    except (OSError, ValueError, SyntaxError) as error:  # a file that is damaged or closed; a mode like La
        raise SampleError(f"a PIL image of mode {image.mode} that cannot be converted to RGB ({error})") from None
    if not pixels.size:
        raise SampleError("a PIL image without pixels")
    return pixels


def _content(file: Readable) -> bytes:
    data = cast("object", file.read())
    if not isinstance(data, bytes):
        kind = type(data).__name__
        if isinstance(data, Coroutine):
            cast("Coroutine[object, object, object]", data).close()  # otherwise Python warns that it was never awaited
        how = "open it with mode 'rb'; of an upload to FastAPI, pass its .file"
        raise ArgumentError(f"images: read() of a file object must return bytes, got {kind}; {how}.")
    if not data and isinstance(file, SupportsTell) and file.tell():
        raise SampleError("is a file object at its end, because it was read before", remedy="it after file.seek(0)")
    return data


def _downloaded(url: str, seconds: float, most: int) -> bytes:
    """Return the bytes at an http(s) URL. Raises SampleError if it takes longer than `seconds` or has more than `most` bytes."""
    deadline = monotonic() + seconds
    data = bytearray()
    try:
        # Some servers refuse Python's own user agent.
        request = Request(url, headers={"User-Agent": f"fastflower/{version_of('fastflower')}"})
        with urlopen(request, timeout=seconds) as response:
            while piece := response.read1(_PIECE):
                data += piece
                if len(data) > most:
                    raise SampleError(f"has more than {most} bytes", remedy="a larger url_bytes (--url-bytes)")
                if monotonic() > deadline:
                    raise TimeoutError
            if response.length:
                raise SampleError(f"ended {response.length} bytes too early", remedy="it again")
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()
        cause = getattr(error, "reason", None)
        reason = cause if isinstance(cause, OSError) else error
        blame_the_system(reason, url)
        if isinstance(reason, TimeoutError):
            remedy = "a larger url_seconds (--url-seconds)"
            raise SampleError(f"did not arrive within {seconds:g} seconds", remedy=remedy) from None
        raise SampleError(f"could not be downloaded ({reason})") from None
    return bytes(data)
