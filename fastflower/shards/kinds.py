"""Says what a file is that does not decode as an image, by its bytes.

The signatures are from the magic database of file(1), the WHATWG standard on MIME sniffing (HTML), and the formats' own
pages: git-lfs docs/spec.md, TensorFlow's record_writer.h, Apache Parquet and Arrow, HDF5's superblock, numpy.lib.format,
MAT-File 5, MNIST's IDX, DICOM part 10, and ISO 14496-12 and 23008-12 for videos and HEIF.
"""

import codecs
import re
import struct
import zlib
from contextlib import suppress
from pathlib import PurePath

_HEAD = 1024  # bytes that decide
_SPACE = rb"(?:\xef\xbb\xbf)?(?>\s|<!--.*?-->)*+(?:<\?xml[^>]*>)?(?>\s|<!--.*?-->)*+"
_HTML = rb"<(?i:!doctype html|html|head|body|title|meta|script|iframe|div|h1|table)\b"
_GZIP = "is a gzip archive"
ANNEX = "is a git-annex pointer (run git annex get)"

# What each file starts with. The first match counts.
_TEXTS = {
    rb"version https://git-lfs\.github\.com/spec/": "is a Git LFS pointer (run git lfs pull)",
    rb"/annex/objects/": ANNEX,
    _SPACE + _HTML: "is HTML, a web page",
    _SPACE + rb"(?:<!DOCTYPE svg[^>]*>\s*)?<svg\b": "is SVG, a vector drawing",
    rb"(?:\xef\xbb\xbf)?\s*+<\?xml\b": "is XML",
    rb"(?:\xef\xbb\xbf)?\s*+(?:\{\s*+[\"}]|\[\s*+[\[{\"\]])": "is JSON",
}
_OTHERS = {
    rb"PK\x03\x04.{26}[^/]{1,80}\.npy": "is a NumPy archive (.npz)",
    rb"PK\x03\x04.{26}[^/]{1,80}/data\.pkl": "is a checkpoint or other file of PyTorch",
    rb"PK(?:\x03\x04|\x05\x06)": "is a ZIP archive",
    rb"\x1f\x8b\x08": _GZIP,
    rb".{257}ustar": "is a tar archive",
    rb"7z\xbc\xaf\x27\x1c": "is a 7z archive",
    rb"Rar!\x1a\x07": "is a RAR archive",
    rb"BZh[1-9]1AY&SY": "is a bzip2 archive",
    rb"\xfd7zXZ\0": "is an xz archive",
    rb"\x28\xb5\x2f\xfd": "is a Zstandard archive",
    rb"PAR1": "is Parquet, a table",
    rb"ARROW1\0\0": "is Arrow, a table",
    rb"\x89HDF\r\n\x1a\n": "is HDF5, arrays",
    rb"MATLAB \d": "is a MATLAB file",
    rb"\x93NUMPY": "is a NumPy array",
    rb"\x80[\x02-\x05][\x95}\](c]": "is a Python pickle",
    rb"\0\0\x08[\x01-\x04]\0": "is IDX, an array as in MNIST",
    rb"SQLite format 3\0": "is an SQLite database",
    rb".{128}DICM": "is DICOM, a medical image",
    rb"%PDF-": "is a PDF document",
    rb"%!PS|\xc5\xd0\xd3\xc6": "is PostScript",
    rb"8BPS": "is a Photoshop document",
    rb"II\*\0.{4}CR|.{4}ftypcrx |FUJIFILMCCD-RAW|IIR[OS]|IIU\0": "is a camera's raw image",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "is JPEG XL",
    rb"v/1\x01": "is OpenEXR",
    rb".{4}ftyp(?!avif|avis|mif1|msf1|he[iv])": "is a video or sound (MP4 or MOV)",
    rb"\x1a\x45\xdf\xa3": "is a video (Matroska or WebM)",
    rb"RIFF.{4}AVI ": "is a video (AVI)",
    rb"\0\0\x01[\xba\xb3]": "is a video (MPEG)",
    rb"[\0-\x08].{3}(?:wide|mdat|moov|free|skip)": "is a video or sound (MP4 or MOV)",
    rb"FLV\x01": "is a video (Flash)",
    rb"ID3[\x02-\x04]|\xff[\xf2\xf3\xfa\xfb][\x10-\xef]": "is sound (MP3)",
    rb"MZ.{58}..\0\0": "is a Windows program (EXE)",
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "is a document of Microsoft Office (OLE)",
    rb"\0\x05\x16\x07": "is a macOS resource fork",
}
_IMAGES = {
    rb"\xff\xd8\xff": "JPEG",
    rb"\x89PNG\r\n": "PNG",
    rb"GIF8[79]a": "GIF",
    rb"RIFF.{4}WEBP": "WebP",
    rb"II\*\0|MM\0\*": "TIFF",
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "JPEG 2000",
    rb".{4}ftypavi[fs]": "AVIF",
    rb".{4}ftyp(?:he[iv]|m[is]f1)": "HEIC",
}
_COMPILED = [(re.compile(start, re.DOTALL), kind) for start, kind in (_TEXTS | _OTHERS).items()]
_TEXT = re.compile(b"|".join(_TEXTS), re.DOTALL)
_LATIN_1 = re.compile(rb"[\t\n\f\r -~\xa0-\xff]+")
_PRINTABLE = re.compile(rb"[\t\n\f\r -~\x80-\xff]+")


def reason(data: bytes, name: str) -> str | None:
    """Return what a file is that does not decode, such as "is HTML, a web page, named .jpg", or None if that is unknown.

    name  The file's name, or "" if it has none.
    """
    if not data:
        return "is empty"
    if not data.strip(b"\0"):
        return "contains only zero bytes"
    kind = kind_of(data)
    if kind is None or "(run " in kind:
        return kind
    suffix = PurePath(name).suffix
    return f"{kind}, named {suffix}" if suffix and suffix.isprintable() else f"{kind}, not an image"


def kind_of(data: bytes) -> str | None:
    """Return what a file is that is no image, such as "is HTML, a web page", by its first 1024 bytes. None if unknown."""
    head = data[:_HEAD]
    kind = next((kind for start, kind in _COMPILED if start.match(head)), None)
    if kind == _GZIP:
        with suppress(zlib.error):
            inside = kind_of(zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, _HEAD))
            kind = f"{inside}, compressed by gzip" if inside else kind
    if kind is None and _is_tfrecord(head):
        return "is TFRecord"
    if kind is None and _is_plain_text(head):
        return "is plain text"
    return kind


def damaged(data: bytes) -> str | None:
    """Return the reason for a file that starts like an image but cannot be opened, or None if it does not start like one."""
    kind = image_kind(data)
    return f"is a damaged {kind} image" if kind else None


def image_kind(data: bytes) -> str | None:
    """Return the format of an image, such as "JPEG", by its first 32 bytes, or None if it does not start like one."""
    return next((name for start, name in _IMAGES.items() if re.match(start, data, re.DOTALL)), None)


def is_empty_or_page(head: bytes) -> bool:
    """Return whether a file is empty, HTML, XML, JSON or a pointer of Git, by its first 1024 bytes."""
    return not head or _TEXT.match(head) is not None


def is_heif(data: bytes) -> bool:
    """Return whether a file is HEIF (HEIC), but not AVIF, by the brands in its first box."""
    brands = data[8 : min(int.from_bytes(data[:4], "big"), _HEAD)]
    return data[4:8] == b"ftyp" and re.match(rb"he[iv]|m[is]f1", brands) is not None and b"avi" not in brands


def _is_plain_text(head: bytes) -> bool:
    """Return whether these are printable UTF-8, Latin-1, or UTF-16 with a byte order mark. PPM files can be, too."""
    if re.match(rb"P[1-7Ff]\s", head):
        return False
    utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = codecs.getincrementaldecoder("utf-16" if utf16 else "utf-8")().decode(head)  # the end may be cut
    except UnicodeDecodeError:
        ascii_share = sum(byte < 128 for byte in head) / len(head)
        return not utf16 and ascii_share > 0.75 and _LATIN_1.fullmatch(head) is not None
    if utf16:
        return bool(text) and all(char.isprintable() or char in "\t\n\f\r\ufeff" for char in text)
    return _PRINTABLE.fullmatch(head) is not None


def _is_tfrecord(head: bytes) -> bool:
    """Return whether the first 12 bytes are a record's length and its masked CRC-32C."""
    if len(head) < 12:
        return False
    crc = 0xFFFFFFFF
    for byte in head[:8]:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    masked = (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF
    return masked == struct.unpack_from("<I", head, 8)[0]
