"""Decoding and transcoding: Pillow is the oracle."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps, JpegImagePlugin

from fastflower import image as module
from fastflower.errors import SampleError
from fastflower.image import decode, prepare

# Mean grey levels between a picture and its JPEG of quality 95. Swapped channels are ten times as far off.
TOLERANCE = 3.0
ORIENTATION, RESOLUTION_UNIT = 0x0112, 0x0128  # EXIF tags


def picture(width: int = 64, height: int = 48, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colours without any symmetry, (height, width, 3)."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (5, 6, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return smooth.astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB"))


def distance(left: NDArray[Any], right: NDArray[Any]) -> float:
    return float(np.abs(left.astype(float) - right.astype(float)).mean())


def unchanged(data: bytes) -> tuple[bytes, tuple[int, int]]:
    return prepare(data, max_side=None, quality=None)


def with_orientation(value: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return {"exif": exif}


RGB = Image.fromarray(picture())
GREY = RGB.convert("L")
WIDE_GREY = np.asarray(GREY).astype(np.uint16) * 257 - np.asarray(GREY) // 2  # 16 bits, not all of them repeated
JPEG = encode(RGB, "JPEG", quality=90)
CMYK = encode(RGB.convert("CMYK"), "JPEG", quality=95)
PALETTE = RGB.quantize(64)

OTHER_FORMATS: dict[str, bytes] = {
    "png": encode(RGB, "PNG"),
    "webp": encode(RGB, "WEBP", lossless=True),
    "bmp": encode(RGB, "BMP"),
    "gif": encode(RGB, "GIF"),
    "tiff": encode(RGB, "TIFF"),
    "tiff, compressed": encode(RGB, "TIFF", compression="tiff_lzw"),
    "ppm": encode(RGB, "PPM"),
    "grey png": encode(GREY, "PNG"),
    "black and white": encode(GREY.resize((8, 6)).convert("1").resize((64, 48)), "PNG"),
    "palette": encode(PALETTE, "PNG"),
    "palette, one transparent colour": encode(PALETTE, "PNG", transparency=3),
    "palette, alpha for each colour": encode(PALETTE, "PNG", transparency=bytes(range(0, 256, 4))),
    "alpha": encode(Image.merge("RGBA", (*RGB.split(), GREY)), "PNG"),
    "grey with alpha": encode(Image.merge("LA", (GREY, GREY)), "PNG"),
    "cmyk jpeg": CMYK,
}
WIDE: dict[str, bytes] = {
    "png": encode(Image.fromarray(WIDE_GREY), "PNG"),
    "tiff": encode(Image.fromarray(WIDE_GREY), "TIFF"),
    "pgm": b"P5 64 48 65535\n" + WIDE_GREY.astype(">u2").tobytes(),
}


def test_jpeg_decodes_to_the_very_pixels_of_pillow(flowers: Path) -> None:
    for path in sorted(flowers.glob("*/*.jpg"))[::10]:
        data = path.read_bytes()
        np.testing.assert_array_equal(decode(data), pixels(opened(data)))


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 30},
        {"quality": 95, "subsampling": 0},
        {"subsampling": "4:2:2"},
        {"progressive": True},
        {"restart_marker_rows": 1},
    ],
)
@pytest.mark.parametrize("image", [RGB, GREY, RGB.crop((0, 0, 33, 17)), RGB.crop((0, 0, 1, 1))])
def test_every_kind_of_jpeg_decodes_as_in_pillow(image: Image.Image, options: dict[str, Any]) -> None:
    data = encode(image, "JPEG", **options)
    decoded = decode(data)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels(opened(data)))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_decodes(kind: Callable[[bytes], Any]) -> None:
    np.testing.assert_array_equal(decode(kind(JPEG)), decode(JPEG))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image", [RGB, GREY])
def test_exif_orientation_turns_as_in_pillow(image: Image.Image, orientation: int) -> None:
    data = encode(image, "JPEG", **with_orientation(orientation))
    upright = pixels(ImageOps.exif_transpose(opened(data)))
    np.testing.assert_array_equal(decode(data), upright)
    assert unchanged(data) == (data, upright.shape[:2])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_transcoding_turns_upright_and_drops_the_orientation(kind: str, orientation: int) -> None:
    source = encode(RGB, kind, **with_orientation(orientation))
    upright = pixels(ImageOps.exif_transpose(opened(source)))
    made, size = prepare(source, max_side=None, quality=95)
    assert size == upright.shape[:2]
    assert ORIENTATION not in opened(made).getexif()
    assert distance(decode(made), upright) < TOLERANCE


@pytest.mark.parametrize("image", [RGB, GREY])
def test_jpeg_in_rgb_or_grey_is_kept_byte_for_byte(image: Image.Image) -> None:
    data = encode(image, "JPEG", quality=70, comment=b"kept", dpi=(72, 72))
    assert unchanged(data) == (data, (48, 64))
    assert prepare(data, max_side=64, quality=None) == (data, (48, 64))


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_become_rgb_jpeg_close_to_pillows(name: str) -> None:
    data = OTHER_FORMATS[name]
    image = opened(data)
    # Without the way over RGBA Pillow warns of a palette with alpha; the colours are the same.
    expected = pixels(image.convert("RGBA") if image.mode == "P" else image)
    made, size = unchanged(data)
    result = opened(made)
    assert (result.format, result.mode, result.size[::-1]) == ("JPEG", "RGB", size)
    assert size == (48, 64)
    assert distance(decode(made), expected) < TOLERANCE
    np.testing.assert_array_equal(decode(made), pixels(result))


def test_the_tolerance_tells_swapped_channels_apart() -> None:
    for data in (OTHER_FORMATS["png"], CMYK):
        expected = pixels(opened(data))
        assert distance(decode(unchanged(data)[0])[..., ::-1], expected) > 10 * TOLERANCE


@pytest.mark.parametrize("name", WIDE)
def test_sixteen_bit_grey_is_scaled_to_eight(name: str) -> None:
    made, size = unchanged(WIDE[name])
    assert size == (48, 64)
    assert distance(decode(made), np.repeat(WIDE_GREY[..., None] / 257, 3, axis=2)) < TOLERANCE
    assert decode(made).std() > 10  # Pillow's own conversion clips nearly all of it to white


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colour_is_scaled_to_eight(channels: int) -> None:
    levels = np.dstack([picture()[..., ::-1], picture(seed=1)])[..., :channels].astype(np.uint16) * 257
    made, _ = unchanged(cv2.imencode(".png", levels)[1].tobytes())
    assert distance(decode(made), picture()) < TOLERANCE


CUTS = (1, 2, 3, 20, 200, len(JPEG) // 2, len(JPEG) - 700)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("max_side", [None, 16])
def test_a_jpeg_cut_short_is_refused_with_a_reason(cut: int, max_side: int | None) -> None:
    with pytest.raises(SampleError, match=r"[Tt]runcated"):
        prepare(JPEG[:-cut], max_side=max_side, quality=None)
    with pytest.raises(SampleError, match=r"^cannot be decoded as an image, or is cut short$"):
        decode(JPEG[:-cut])


@pytest.mark.parametrize("kind", ["grey", "progressive", "drawn"])
def test_a_jpeg_without_its_last_two_bytes_is_refused(kind: str, flowers: Path) -> None:
    drawn = next(flowers.glob("rose/*.jpg")).read_bytes()
    whole = {"grey": encode(GREY, "JPEG"), "progressive": encode(RGB, "JPEG", progressive=True), "drawn": drawn}[kind]
    assert unchanged(whole)[0] == whole
    assert whole.endswith(b"\xff\xd9")
    with pytest.raises(SampleError, match="image file is truncated"):
        unchanged(whole[:-2])


@pytest.mark.parametrize("name", ["png", "webp", "tiff", "bmp", "gif"])
def test_other_formats_cut_short_are_refused(name: str) -> None:
    data = OTHER_FORMATS[name]
    with pytest.raises(SampleError, match=r"\w+ \w+"):
        unchanged(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"no picture", b"\xff\xd8", bytes(1000), b"<html></html>", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_called_so(data: bytes) -> None:
    with pytest.raises(SampleError, match=r"^is no image$"):
        unchanged(data)
    with pytest.raises(SampleError, match=r"^cannot be decoded as an image, or is cut short$"):
        decode(data)


def made_or_refused(data: bytes) -> None:
    """Nothing else may escape: one damaged file must not end the packing of a million good ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged metadata
        try:
            made, size = unchanged(data)
        except SampleError as refusal:
            made, size, reason = b"", None, str(refusal)
        else:
            reason = ""
    if size is None:
        assert reason
    else:
        assert decode(made).shape == (*size, 3)


@pytest.mark.parametrize("name", ["jpeg", *OTHER_FORMATS, *(f"16 bits, {name}" for name in WIDE)])
def test_damaged_bytes_give_an_image_or_a_sample_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 1 << 20)
    wide = {f"16 bits, {name}": data for name, data in WIDE.items()}
    whole = {"jpeg": encode(RGB, "JPEG", **with_orientation(6)), **OTHER_FORMATS, **wide}[name]
    rng = np.random.default_rng(len(whole))
    for attempt in range(60):
        data = bytearray(whole)
        for position in rng.integers(0, len(data) if attempt % 2 else min(300, len(data)), 4):
            data[position] = rng.integers(256)
        made_or_refused(bytes(data))


def test_damaged_exif_does_not_end_the_packing() -> None:
    """Where a tag is of another type than its value, Pillow's turning raises struct.error."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[RESOLUTION_UNIT] = 2
    whole = encode(RGB, "WEBP", exif=exif)
    entry = whole.index(RESOLUTION_UNIT.to_bytes(2, "big") + b"\x00\x03")  # tag, then 3: a short
    for kind in range(256):
        made_or_refused(whole[: entry + 2] + bytes([0, kind]) + whole[entry + 4 :])


def test_more_pixels_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 64 * 48)
    assert unchanged(JPEG) == (JPEG, (48, 64))
    monkeypatch.setattr(module, "MAX_PIXELS", 64 * 48 - 1)
    for data in (JPEG, OTHER_FORMATS["png"]):
        with pytest.raises(SampleError, match=r"^has 64 x 48 pixels, more than the limit of 3071$"):
            prepare(data, max_side=8, quality=None)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    header = b"P6 20000 20000 255\n"  # 400 million pixels: Pillow's own limit comes first
    with pytest.raises(SampleError, match="400000000 pixels"):
        unchanged(header)


def test_a_side_too_long_for_jpeg_is_refused_unless_reduced() -> None:
    data = encode(Image.new("RGB", (70_000, 2)), "PNG")
    with pytest.raises(
        SampleError, match=r"^has 70000 x 2 pixels, more a side than a JPEG file's 65500; set max_side$"
    ):
        unchanged(data)
    assert prepare(data, max_side=1000, quality=None)[1] == (1, 1000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64), (60, 60), (120, 30)])
def test_max_side_reduces_the_longer_side_to_it(kind: str, width: int, height: int) -> None:
    source = Image.fromarray(picture(width, height))
    made, size = prepare(encode(source, kind), max_side=24, quality=None)
    assert max(size) == 24
    assert decode(made).shape == (*size, 3)
    assert size[0] == pytest.approx(height * 24 / max(width, height), abs=1)
    assert size[1] == pytest.approx(width * 24 / max(width, height), abs=1)
    reduced = source.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    assert distance(decode(made), pixels(reduced)) < 2 * TOLERANCE


def test_max_side_never_enlarges() -> None:
    assert prepare(JPEG, max_side=1000, quality=None) == (JPEG, (48, 64))
    assert prepare(OTHER_FORMATS["png"], max_side=1000, quality=None)[1] == (48, 64)


@pytest.mark.parametrize("data", [JPEG, OTHER_FORMATS["png"]])
@pytest.mark.parametrize("quality", [1, 40, 75, 95])
def test_quality_is_pillows_quality(data: bytes, quality: int) -> None:
    made = opened(prepare(data, max_side=None, quality=quality)[0])
    assert isinstance(made, JpegImagePlugin.JpegImageFile)
    reference = opened(encode(RGB, "JPEG", quality=quality))
    assert isinstance(reference, JpegImagePlugin.JpegImageFile)
    assert made.quantization == reference.quantization
    assert JpegImagePlugin.get_sampling(made) == 2  # 4:2:0


def test_without_a_quality_transcoding_keeps_full_chroma_at_95() -> None:
    made = opened(unchanged(OTHER_FORMATS["png"])[0])
    reference = opened(encode(RGB, "JPEG", quality=95))
    assert isinstance(made, JpegImagePlugin.JpegImageFile)
    assert isinstance(reference, JpegImagePlugin.JpegImageFile)
    assert made.quantization == reference.quantization
    assert JpegImagePlugin.get_sampling(made) == 0  # 4:4:4


def test_the_same_file_gives_the_same_bytes() -> None:
    for data in OTHER_FORMATS.values():
        assert prepare(data, max_side=40, quality=80) == prepare(data, max_side=40, quality=80)
