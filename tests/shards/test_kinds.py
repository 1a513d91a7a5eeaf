"""A file that is no image is named by its bytes. The files are written by the libraries of their formats where we have them."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from fastflower.errors import SampleError
from fastflower.shards.image import prepare
from fastflower.shards.kinds import kind_of, reason

ARRAY = np.arange(6)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))


def written(write: Callable[[io.BytesIO], Any]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def zipped(file: io.BytesIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("photos/1.jpg", b"x")


def tarred(file: io.BytesIO) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("photos/1.jpg"))


def encoded(kind: str) -> bytes:
    return written(lambda file: IMAGE.save(file, kind))


IDX = b"\0\0\x08\x03" + struct.pack(">III", 2, 28, 28) + bytes(1568)  # yann.lecun.com/exdb/mnist
# A record of 5 bytes: its length, and the masked checksum of the length by a CRC-32C that gives e3069283 for "123456789".
TFRECORD = bytes.fromhex("0500000000000000eab2043e") + b"hello"

FILES = {
    "is empty": [b""],
    "contains only zero bytes": [bytes(1), bytes(5000)],
    "is HTML, a web page, named .jpg": [
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b"\xef\xbb\xbf\n<!-- a --> <!-- b -->\n<HTML lang=en>",
        b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Strict//EN">',
        b"<script>window.location = '/login'</script>",
    ],
    "is SVG, a vector drawing, named .jpg": [b"<svg width='9'/>", b'<?xml version="1.0"?><!-- a -->\n<svg xmlns="x">'],
    "is XML, named .jpg": [b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'],
    "is JSON, named .jpg": [json.dumps(value, indent=indent).encode() for value in ({"a": 1}, [{"a": 1}]) for indent in (0, 2)],
    "is plain text, named .jpg": [
        *(b"Not Found\n", "Odepřen přístup".encode() * 99, b"b'\\xff\\xd8\\xff'"),
        *("Nicht gefunden: für".encode("latin-1"), "přístup".encode("utf-16")),
    ],
    "is a Git LFS pointer (run git lfs pull)": [b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 9\n"],
    "is a git-annex pointer (run git annex get)": [b"/annex/objects/SHA256E-s9--4d7a2146.jpg\n"],
    "is a checkpoint or other file of PyTorch, named .jpg": [written(lambda file: torch.save({"a": torch.zeros(2)}, file))],
    "is a ZIP archive, named .jpg": [written(zipped)],
    "is a tar archive, named .jpg": [written(tarred)],
    "is a tar archive, compressed by gzip, named .jpg": [gzip.compress(written(tarred))],
    "is a gzip archive, named .jpg": [gzip.compress(bytes(range(256)))],
    "is a bzip2 archive, named .jpg": [bz2.compress(b"x")],
    "is an xz archive, named .jpg": [lzma.compress(b"x")],
    "is a 7z archive, named .jpg": [b"7z\xbc\xaf\x27\x1c\0\4" + bytes(24)],
    "is a RAR archive, named .jpg": [b"Rar!\x1a\7\0" + bytes(9), b"Rar!\x1a\7\1\0" + bytes(9)],
    "is a NumPy array, named .jpg": [written(lambda file: np.save(file, ARRAY))],
    "is a NumPy archive (.npz), named .jpg": [written(lambda file: np.savez(file, images=ARRAY, labels=ARRAY))],
    "is a MATLAB file, named .jpg": [written(lambda file: scipy.io.savemat(file, {"images": ARRAY}))],
    "is a Python pickle, named .jpg": [pickle.dumps({"data": ARRAY}, level) for level in (2, 3, 4, 5)],
    "is IDX, an array as in MNIST, named .jpg": [IDX, b"\0\0\x08\x01" + struct.pack(">I", 60_000) + bytes(9)],
    "is IDX, an array as in MNIST, compressed by gzip, named .jpg": [gzip.compress(IDX)],
    "is TFRecord, named .jpg": [TFRECORD],
    "is Parquet, a table, named .jpg": [b"PAR1" + bytes(99) + b"PAR1"],
    "is HDF5, arrays, named .jpg": [b"\x89HDF\r\n\x1a\n" + bytes(88)],
    "is DICOM, a medical image, named .jpg": [bytes(128) + b"DICM\2\0\0\0UL" + bytes(99)],
    "is a PDF document, named .jpg": [encoded("PDF")],
    "is PostScript, named .jpg": [encoded("EPS")],
    "is a Photoshop document, named .jpg": [b"8BPS\0\1" + bytes(30)],
    "is a camera's raw image, named .jpg": [b"II*\0\x10\0\0\0CR\2\0" + bytes(99), b"\0\0\0\x18ftypcrx \0\0\0\1" + bytes(99)],
    "is a video or sound (MP4 or MOV), named .jpg": [
        b"\0\0\0\x18ftyp" + brand + bytes(99) for brand in (b"mp42", b"qt  ", b"isom")
    ] + [b"\0\0\0\x08wide\0\1\2\3mdat" + bytes(99), b"\1\2\3\4mdat" + bytes(99), b"\0\0\4\0moov" + bytes(99)],
    "is a video (Flash), named .jpg": [b"FLV\x01\5\0\0\0\x09" + bytes(99)],
    "is sound (MP3), named .jpg": [b"ID3\4\0\0\0\0\1\0" + bytes(99), b"\xff\xfb\x90\x64" + bytes(99)],
    "is a Windows program (EXE), named .jpg": [b"MZ\x90" + bytes(57) + b"\x80\0\0\0" + bytes(64) + b"PE\0\0"],
    "is a document of Microsoft Office (OLE), named .jpg": [b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99)],
    "is a video (AVI), named .jpg": [b"RIFF\x24\0\0\0AVI LIST" + bytes(99)],
    "is JPEG XL, named .jpg": [b"\xff\x0a\xfa\x1f" + bytes(99), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99)],
    "is a macOS resource fork, named .jpg": [b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(100)],
    "is a damaged PNG image": [encoded("PNG")[:30], b"\x89PNG\r\n\x1a\n"],
    "is a damaged GIF image": [encoded("GIF")[:100]],
    "is a damaged AVIF image": [encoded("AVIF")[:200]],
    "is a damaged WebP image": [encoded("WEBP")[:size] for size in (12, 100)],
    "image file is truncated": [encoded("JPEG")[:100], encoded("PNG")[:20], encoded("PNG")[:100]],
    "is not an image": [np.random.default_rng(2).bytes(100_000), b"\xff\xd8"],
}  # fmt: skip


@pytest.mark.parametrize("expected", FILES)
def test_what_is_no_image_is_named(expected: str) -> None:
    for data in FILES[expected]:
        with pytest.raises(SampleError) as caught:
            prepare(data, max_side=None, quality=None, name="a/1.jpg")
        assert str(caught.value) == expected


def test_the_reason_names_the_extension_if_there_is_one() -> None:
    page = FILES["is HTML, a web page, named .jpg"][0]
    named = {"x.PNG": "named .PNG", "a.b/x": "not an image", "": "not an image", "x.\x1b": "not an image"}
    assert {name: reason(page, name) for name in named} == {
        name: f"is HTML, a web page, {end}" for name, end in named.items()
    }


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "JPEG2000", "AVIF", "ICO", "PCX", "TGA"]
)
def test_no_image_is_taken_for_another_file(kind: str) -> None:
    assert kind_of(encoded(kind)) is None


@pytest.mark.parametrize("piece", [b"<!---->", b"<!--", b" ", b"<?xml ", b"[", b"{ ", b"\n"])
def test_repetitive_text_takes_no_time(piece: bytes) -> None:
    start = time.perf_counter()
    reason((piece * 1024)[:1023] + b"x", "1.jpg")
    assert time.perf_counter() - start < 0.1


def test_heic_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    text = r"^is HEIC, which needs pip install pillow-heif \(its libheif and libde265 are LGPL, its x265 is GPL\)$"
    with pytest.raises(SampleError, match=text):
        prepare(HEIC, max_side=None, quality=None, name="1.heic")


def test_heic_is_read_by_the_package_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is imported when the first such file is met, and an undecodable one is damaged."""
    from PIL import ImageFile

    class Opened(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            assert self.fp is not None
            if self.fp.read() != HEIC:
                raise SyntaxError("truncated")
            self._size, self._mode = IMAGE.size, "RGB"

        def load(self) -> Any:
            self.im = IMAGE.im
            self.tile = []
            return super().load()

    package = ModuleType("pillow_heif")
    registered: list[str] = []

    def register() -> None:
        registered.append("HEIF")
        Image.register_open("HEIF", Opened, lambda data: data[4:12] == b"ftypheic")

    package.register_heif_opener = register  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    prepare(encoded("AVIF"), max_side=None, quality=None)
    assert registered == []
    assert prepare(HEIC, max_side=None, quality=None).size == (16, 24)
    with pytest.raises(SampleError, match=r"^is a damaged HEIC image$"):
        prepare(HEIC[:-1], max_side=None, quality=None)
