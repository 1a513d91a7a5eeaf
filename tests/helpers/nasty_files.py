"""Make the nastiest folder of images: python tests/helpers/nasty_files.py FOLDER

Each file is listed with what packing must do with it. This follows docs/format.md, not the code.
"""

import base64
import io
import os
import socket
import struct
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Expectation = Literal["kept", "transcoded", "skipped"]
Files = dict[str, bytes]

# 16 x 8 pixels, made with cjpeg -arithmetic of libjpeg-turbo 2.1.5, because no library here writes such files.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAYEBQYFBAYGBQYHBwYIChAKCgkJChQODwwQFxQYGBcUFhYaHSUfGhsjHBYWICwgIyYnKSopGR8tMC0oMCUoKSj/"
    "2wBDAQcHBwoIChMKChMoGhYaKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCj/yQARCAAIABADASIAAhEBAxEB/8wA"
    "CgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AGYIwGwrKTPvHcKWKaT3olwrsMVQyK48iWvX6Hj/2Q=="
)
TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"  # orientation 6
SIDES = (0, 13_000, 20_000, 65_535)
NO_UTF8 = b"caf\xe9".decode("utf-8", "surrogateescape")


def main() -> int:
    print(*(f"{expectation:10} {path!a}" for path, expectation in make(Path(sys.argv[1])).items()), sep="\n")
    return 0


def make(folder: Path) -> dict[str, Expectation]:
    """Write the files to a new folder and return what packing must do with each, by path in the folder."""
    expected: dict[str, Expectation] = {"names.jpg": "skipped"}  # it holds hidden images
    twice = [segment(0xE1, TURNED[:25] + bytes([value]) + TURNED[26:]) for value in (6, 3)]
    groups: list[tuple[str, Expectation, Files]] = [
        ("jpeg", "kept", jpegs() | exifs()),
        ("formats", "transcoded", formats() | pngs() | tiffs()),
        ("broken", "kept", {"one good.jpg": encode(smooth(1), "JPEG")}),
        ("broken", "skipped", broken_jpegs() | broken_others() | bombs() | not_images()),
        ("names.jpg", "kept", {name: encode(smooth(100 + number), "JPEG") for number, name in enumerate(NAMES)}),
        ("formats", "transcoded", {"exif, twice.jpg": with_segments(encode(smooth(31), "JPEG"), *twice)}),
        ("names.jpg", "transcoded", {"same.png": encode(smooth(2), "PNG")}),
        *((name, "kept", {"x.jpg": encode(smooth(200 + number), "JPEG")}) for number, name in enumerate(CLASSES)),
        (".hidden", "kept", {"seen.jpg": encode(smooth(3), "JPEG")}),
    ]
    for name, expectation, files in groups:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            assert f"{name}/{file}" not in expected, f"{name}/{file} is listed twice"
            (folder / name / file).write_bytes(data)
            if "." not in (file[0], name[0]) and file != "Thumbs.db":
                expected[f"{name}/{file}"] = expectation
    expected.update((f"no files/{path}", what) for path, what in not_files(folder / "no files").items())
    return expected


def smooth(seed: int = 0, width: int = 64, height: int = 48) -> Image.Image:
    """Return an image of smooth colors without symmetry."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (5, 6, 3)).astype(np.float32)
    return Image.fromarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def by_opencv(ending: str, image: NDArray[Any], *options: int) -> bytes:
    return cv2.imencode(ending, image, options)[1].tobytes()


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def patched(data: bytes, place: int, *values: int) -> bytes:
    return data[:place] + bytes(values) + data[place + len(values) :]


def tiff(order: str, entries: Sequence[tuple[int, int, int, int]], rest: bytes = b"", following: int = 0) -> bytes:
    """Return a TIFF file (or EXIF block) with one directory of (tag, type, count, value) entries, followed by `rest`."""

    def line(tag: int, kind: int, count: int, value: int) -> bytes:
        short = kind == 3 and count == 1
        return struct.pack(f"{order}HHI{'HH' if short else 'I'}", tag, kind, count, value, *[0][:short])

    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + b"".join(line(*entry) for entry in entries) + struct.pack(f"{order}I", following) + rest


def jpegs() -> Files:
    """Return Huffman-coded 8-bit JPEGs, gray or in three colors, which are kept as they are."""
    color, gray = smooth(10), smooth(11).convert("L")
    plain = encode(color, "JPEG", quality=90)
    frame = plain.index(b"\xff\xc0")
    garbage = np.random.default_rng(0).bytes(100_000)
    return {
        "plain.jpg": plain,
        "progressive.jpg": encode(color, "JPEG", progressive=True),
        "gray.jpg": encode(gray, "JPEG"),
        **{f"{factor:x}.jpg": by_opencv(".jpg", np.asarray(smooth(14)), cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor)
           for factor in (0x411111, 0x211111, 0x121111, 0x221111)},
        "restarts.jpg": encode(smooth(15, 200, 160), "JPEG", restart_marker_blocks=1),
        "extended.jpg": patched(plain, frame + 1, 0xC1),
        "rgb.jpg": encode(color, "JPEG", keep_rgb=True),
        "one pixel.jpg": encode(smooth(16, 1, 1), "JPEG"),
        "odd.jpg": encode(smooth(17, 17, 33), "JPEG"),
        "wide.jpg": encode(smooth(18, 65_500, 1), "JPEG"),
        "high.jpg": encode(smooth(19, 1, 65_500), "JPEG"),
        "neither JFIF nor Adobe.jpg": plain[:2] + plain[20:],
        "fill bytes.jpg": plain[:2] + 50 * b"\xff" + plain[2:],
        "300 KB of profile.jpg": encode(color, "JPEG", icc_profile=garbage * 3),
        "300 KB of comments.jpg": with_segments(plain, *5 * [segment(0xFE, garbage[:60_000])]),
        "a picture in a comment.jpg": with_segments(plain, segment(0xFE, encode(smooth(20, 8, 8), "JPEG"))),
        "garbage behind.jpg": plain + garbage,
        "zeros behind.jpg": plain + bytes(4096),
        "another behind.jpg": plain + encode(smooth(21), "JPEG"),
        "several pictures.jpg": encode(smooth(12), "MPO", save_all=True, append_images=[smooth(13)]),
        "JPEG named png.png": encode(smooth(22), "JPEG"),
        "JPEG named tiff.TIFF": encode(smooth(23), "JPEG"),
        **{f"other name.{end}": encode(smooth(24 + n), "JPEG") for n, end in enumerate(("jfif", "jpe", "gif"))},
    }  # fmt: skip


def exifs() -> Files:
    """Return JPEGs with EXIF of every orientation, or damaged or strange EXIF, which are kept as they are."""
    thumbnail = encode(smooth(30, 16, 12), "JPEG")
    orientation = (0x0112, 3, 1)
    made = {
        **{f"orientation {value}": tiff("<", [(*orientation, value)]) for value in (*range(10), 65_535)},
        **{f"orientation {value}, big-endian": tiff(">", [(*orientation, value)]) for value in (3, 6)},
        "garbage": np.random.default_rng(1).bytes(500),
        "nothing": b"",
        "half a header": b"II*",
        "cut": tiff("<", [(*orientation, 6)])[:14],
        "no directory there": struct.pack("<4sI", b"II*\0", 1 << 31),
        "65535 entries": b"II*\0" + struct.pack("<IH", 8, 65_535) + bytes(60),
        "a loop": tiff("<", [(*orientation, 1), (0x8769, 4, 1, 8)], following=8),
        "orientation as text": tiff("<", [(0x0112, 2, 4, 0x36)]),
        "orientation far away": tiff("<", [(0x0112, 3, 1 << 30, 1 << 30)]),
        "a thumbnail": tiff("<", [(*orientation, 8), (0x0201, 4, 1, 50), (0x0202, 4, 1, len(thumbnail))], thumbnail),
    }
    return {
        f"exif, {name}.jpg": with_segments(encode(smooth(40 + number), "JPEG"), segment(0xE1, b"Exif\0\0" + data))
        for number, (name, data) in enumerate(made.items())
    }


def formats() -> Files:
    """Return files in the other formats that Pillow reads, with image file names."""
    color, other, gray = smooth(60), smooth(61), smooth(62).convert("L")
    clear = Image.merge("RGBA", (*color.split(), gray))
    cmyk = encode(color.convert("CMYK"), "JPEG")
    adobe = cmyk.index(b"Adobe")
    lossless = b"\xff\xd8" + segment(0xC3, bytes([8, 0, 8, 0, 8, 1, 1, 0x11, 0])) + segment(0xC4, b"\0\1" + bytes(16))
    lossless += segment(0xDA, bytes([1, 1, 0, 1, 0, 0])) + bytes(8) + b"\xff\xd9"
    return {
        "arithmetic.jpg": ARITHMETIC,
        "lossless.jpg": lossless,
        "stray bytes.jpg": encode(other, "JPEG").replace(b"\xff\xdb", bytes(20) + b"\xff\xdb", 1),
        "cmyk.jpg": cmyk,
        "ycck.jpg": patched(cmyk, adobe + 11, 2),
        "cmyk turned.jpg": encode(color.convert("CMYK"), "JPEG", exif=TURNED),
        "lossy.webp": encode(color, "WEBP"),
        "lossless.webp": encode(clear, "WEBP", lossless=True),
        "animated.webp": encode(color, "WEBP", save_all=True, append_images=[other]),
        "turned.webp": encode(color, "WEBP", exif=TURNED),
        "24 bits.bmp": encode(color, "BMP"),
        "8 bits.bmp": encode(color.quantize(64), "BMP"),
        "1 bit.bmp": encode(blocks().convert("1"), "BMP"),
        "32 bits.bmp": by_opencv(".bmp", np.asarray(clear)),
        **dict.fromkeys(("gif.png", "plain.gif"), encode(color.quantize(64), "GIF")),
        **{f"plain.{kind}": encode(color, kind) for kind in ("avif", "pcx", "tga")},
        "animated gif.jpg": encode(color.quantize(64), "GIF", save_all=True, append_images=[other.quantize(64)]),
        "clear gif.png": encode(color.quantize(64), "GIF", transparency=3),
        **dict.fromkeys(("jpeg 2000.jpg", "plain.jp2"), encode(color, "JPEG2000")),
        "avif.jpg": encode(color, "AVIF"),
        "icon.png": encode(color, "ICO"),
        "targa.bmp": encode(color, "TGA", rle=True),
        "pcx.bmp": encode(color, "PCX"),
        "6.ppm": encode(color, "PPM"),
        "16 bits.pgm": b"P5 64 48 65535\n" + wide_gray().astype(">u2").tobytes(),
        "text.ppm": b"P3 2 1 255\n200 100 50  40 90 160\n",
        "png.jpg": encode(color, "PNG"),
    }


def wide_gray() -> NDArray[np.uint16]:
    """Return 16-bit levels that are not just repeated bytes."""
    gray = np.asarray(smooth(63).convert("L")).astype(np.uint16)
    return gray * 257 - gray // 2


def blocks() -> Image.Image:
    return (
        smooth(64).convert("L").resize((8, 6)).point([255 * (value > 127) for value in range(256)]).resize((64, 48), 0)
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, depth: int, color: int, packed: bytes, *extra: bytes, interlaced: bool = False
) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def rows(image: NDArray[Any]) -> bytes:
    return b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in image)


ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def pngs() -> Files:
    color, gray = smooth(70), smooth(71).convert("L")
    pixels = np.asarray(color)
    clear = Image.merge("RGBA", (*color.split(), gray))
    palette = color.quantize(64)
    wide = pixels.astype(np.uint16) * 257
    passes = b"".join(rows(pixels[y::down, x::across]) for x, y, across, down in ADAM7)
    good = png(64, 48, 8, 2, zlib.compress(rows(pixels)))
    return {
        "rgb.png": encode(color, "PNG"),
        "gray.png": encode(gray, "PNG"),
        "1 bit.png": encode(blocks().convert("1"), "PNG"),
        "2 bits.png": png(64, 48, 2, 0, zlib.compress(rows(np.full((48, 16), 0b00011011, np.uint8)))),
        "palette.png": encode(palette, "PNG"),
        "palette, one clear.png": encode(palette, "PNG", transparency=3),
        "palette, many clear.png": encode(palette, "PNG", transparency=bytes(range(0, 256, 4))),
        "rgba.png": encode(clear, "PNG"),
        "gray and clear.png": encode(Image.merge("LA", (gray, gray)), "PNG"),
        "rgb, one clear.png": encode(color, "PNG", transparency=(1, 2, 3)),
        "16-bit gray.png": encode(Image.fromarray(wide_gray()), "PNG"),
        "16-bit rgb.png": by_opencv(".png", wide),
        "16-bit rgba.png": by_opencv(".png", np.dstack([wide, wide[..., 0]])),
        "interlaced.png": png(64, 48, 8, 2, zlib.compress(passes), interlaced=True),
        "animated.png": encode(color, "PNG", save_all=True, append_images=[smooth(72)]),
        "turned.png": encode(color, "PNG", exif=TURNED),
        "checksum of the pixels.png": patched(good, good.index(b"IEND") - 8, *4 * [0]),  # zlib has its own
        "no end.png": good[:-12],
        "garbage behind.png": good + b"garbage",
    }


def tiffs() -> Files:
    color, gray = smooth(80), smooth(81).convert("L")
    level = np.asarray(gray)
    wide = wide_gray()
    entries = [(256, 3, 1, 64), (257, 3, 1, 48), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 122)]
    entries += [(277, 3, 1, 1), (278, 3, 1, 48), (279, 4, 1, 2 * wide.size)]
    kinds = {"lzw": "tiff_lzw", "deflate": "tiff_adobe_deflate", "packbits": "packbits", "jpeg": "jpeg"}
    return {
        "plain.tif": encode(color, "TIFF"),
        "pages.tiff": encode(color, "TIFF", save_all=True, append_images=[smooth(82)]),
        **{f"{name}.tif": encode(color, "TIFF", compression=kind) for name, kind in kinds.items()},
        "fax.tif": encode(blocks().convert("1"), "TIFF", compression="group4"),
        "16 bits.tif": encode(Image.fromarray(wide), "TIFF"),
        "16 bits, big-endian.tif": tiff(">", entries, wide.astype(">u2").tobytes()),
        "float.tif": encode(Image.fromarray(level.astype(np.float32)), "TIFF"),
        "32 bits.tif": encode(Image.fromarray(level.astype(np.int32)), "TIFF"),
        "cmyk.tif": encode(color.convert("CMYK"), "TIFF"),
        "palette.tif": encode(color.quantize(64), "TIFF"),
        "rgba.tif": encode(Image.merge("RGBA", (*color.split(), gray)), "TIFF"),
        "lab.tif": encode(Image.merge("LAB", color.split()), "TIFF"),
        "big.tif": encode(color, "TIFF", big_tiff=True),
        "turned.tif": encode(color, "TIFF", exif=TURNED),
    }


def broken_jpegs() -> Files:
    whole = encode(smooth(90, 256, 192), "JPEG", quality=90)
    restarts = encode(smooth(91, 256, 192), "JPEG", restart_marker_blocks=4)
    progressive = encode(smooth(92, 256, 192), "JPEG", progressive=True)
    frame, scan = whole.index(b"\xff\xc0"), whole.index(b"\xff\xda")
    places = {"start": 2, "first segment": 9, "tables": 60, "frame": frame + 5, "codes": frame + 40, "scan": scan + 3}
    places |= {"scan's end": scan + 14, "middle": len(whole) // 2, "last block": len(whole) - 9, "end": len(whole) - 2}
    marker = restarts.index(b"\xff\xd3")
    middle = len(restarts) // 2
    return {
        **{f"cut in its {name}.jpg": whole[:place] for name, place in places.items()},
        "progressive, cut.jpg": progressive[: len(progressive) // 2],
        "cut at a restart and ended.jpg": restarts[:marker] + b"\xff\xd9",
        "zeros in the middle.jpg": restarts[:middle] + bytes(1000) + restarts[middle + 1000 :],
        "zeros to the end.jpg": whole[: len(whole) // 2] + bytes(len(whole) // 2),
        "12 bits.jpg": patched(whole, frame + 4, 12),
        "no height.jpg": patched(whole, frame + 5, 0, 0),
        **{f"{side} pixels.jpg": patched(whole, frame + 5, *2 * divmod(side, 256)) for side in SIDES},
    }


def broken_others() -> Files:
    color = smooth(95, 256, 192)
    kinds = {"png": "PNG", "webp": "WEBP", "bmp": "BMP", "ppm": "PPM", "tif": "TIFF"}
    stored = {ending: encode(color, kind) for ending, kind in kinds.items()}
    stored |= {"gif.png": encode(color.quantize(64), "GIF"), "lzw.tif": encode(color, "TIFF", compression="tiff_lzw")}
    made = {f"cut.{ending}": data[: len(data) // 2] for ending, data in stored.items()}
    made |= {f"only its header.{ending}": data[:30] for ending, data in stored.items()}
    whole = stored["png"]
    middle = len(whole) // 2
    pixels = rows(np.asarray(color))
    wrong = patched(zlib.compress(pixels, 0), 50_000, 1)  # detected by zlib's own checksum
    return made | {
        "zeros in the middle.png": whole[:middle] + bytes(1000) + whole[middle + 1000 :],
        "checksum of the header.png": patched(whole, 29, *4 * [0]),
        "too few pixels.png": png(256, 192, 8, 2, zlib.compress(pixels[:-50_000])),
        "changed pixels.png": png(256, 192, 8, 2, wrong),
        "no compression.png": png(256, 192, 8, 2, pixels),
        "a thousand million values.tif": tiff("<", [(256, 4, 1 << 30, 8), (257, 3, 1, 48), (273, 4, 1, 8)]),
    }


def bombs() -> Files:
    few = zlib.compress(bytes(1000))
    side = [(256, 4, 1, 60_000), (257, 4, 1, 60_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    webp = b"\x30\1\0\x9d\1\x2a" + struct.pack("<HH", 16_383, 16_383) + bytes(100)
    return {
        "bomb.png": png(50_000, 50_000, 8, 2, few),
        "bomb with text.png": png(8, 8, 8, 0, few, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20)))),
        "bomb.tif": tiff("<", [*side, (277, 3, 1, 1), (278, 4, 1, 60_000), (279, 4, 1, 60_000)]),
        "bomb gif.png": b"GIF89a" + 4 * b"\xff" + bytes(3) + b"," + bytes(4) + 4 * b"\xff" + b"\0\2\2\x4c\1\0;",
        "bomb.webp": b"RIFF" + struct.pack("<I", len(webp) + 12) + b"WEBPVP8 " + struct.pack("<I", len(webp)) + webp,
        "bomb.bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "bomb.ppm": b"P6 99999 99999 255\n",
    }


def not_images() -> Files:
    """Return other files with image names, and images with other names."""
    image = encode(smooth(97), "JPEG")
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as opened:
        opened.writestr("photo.jpg", image)
    return {
        "empty.jpg": b"",
        "text.jpg": b"no picture",
        "html.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
        "pdf.jpg": b"%PDF-1.4\n%%EOF\n",
        **dict.fromkeys(("notes.txt", "Thumbs.db", ".DS_Store"), b"notes"),
        **dict.fromkeys((f"photo.{end}" for end in ("ico", "jpg~", "jpg.txt", "jpg ")), image),
        "heic.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        "zip.jpg": archive.getvalue(),
        "noise.jpg": np.random.default_rng(2).bytes(100_000),
        "._photo.jpg": b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(100),
    }


NAMES = [
    "with space.jpg", " space first.jpg", "space last .jpg", "two.dots.here.jpg", "...jpg", ".jpg", ".hidden.jpg",
    "-rf.jpg", "--help.jpg", "UPPER.JPG", "case.jpg", "Case.jpg", "CASE.jpg", "case.JPG", "\u00e9.jpg", "e\u0301.jpg",
    "日本語.jpg", "🌻.jpg", f"{NO_UTF8}.jpg", "\udcff\udcfe.jpg", "new\nline.jpg", "return\r.jpg", "tab\t.jpg", "\x1b[2J.jpg",
    "\x7f\x01.jpg", "quote'.jpg", 'quote".jpg', "back\\slash.jpg", 251 * "a" + ".jpg", 62 * "🌻" + "abc.jpg", "same.jpg",
    "%s%n.jpg", "{0}{x}.jpg", "$HOME.jpg", "`id`.jpg", "*.jpg", "?.jpg", "[a-z].jpg", "a|b;c&d.jpg", "CON.jpg", "x.cls.jpg",
    "x.json.jpg", "__key__.jpg", "\u202egpj.jpg", "zero\u200bwidth.jpg", "#.jpg", "~.jpg", "a 7.jpg", "same.jpeg",
]  # fmt: skip
CLASSES = ["two words", "-rf", "🌻", NO_UTF8, "new\nline", "x.y", "Jpeg", "e\u0301", "\u00e9", "100%"]


def not_files(folder: Path) -> dict[str, Expectation]:
    """Make pipes, sockets, devices, links and folders with image names, and return what packing must do with each."""
    folder.mkdir()
    os.mkfifo(folder / "pipe.jpg")
    handle = os.open(folder, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{handle}/socket.jpg")  # a socket address has at most 107 bytes
    os.close(handle)
    links = {"itself.jpg": "itself.jpg", "nothing.jpg": "no such file", "too long.jpg": 300 * "x", "around": "."}
    links |= {f"{name}.jpg": f"/dev/{name}" for name in ("zero", "null")} | {"kernel.jpg": "/proc/version"}
    links |= {"hidden": "../.hidden", "link.jpg": "inside.jpg/x.jpg", "folder.jpg": "inside.jpg"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    for name in ("inside.jpg", "empty.jpg"):
        (folder / name).mkdir()
    (folder / "inside.jpg/x.jpg").write_bytes(encode(smooth(99), "JPEG"))
    kept = ("inside.jpg/x.jpg", "link.jpg", "hidden/seen.jpg")
    skipped = ("pipe.jpg", "socket.jpg", *(name for name in links if name not in ("link.jpg", "hidden")))
    return {**dict.fromkeys(kept, "kept"), **dict.fromkeys(skipped, "skipped")}


if __name__ == "__main__":
    sys.exit(main())
