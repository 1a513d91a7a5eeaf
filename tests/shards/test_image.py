"""Decoding, transcoding and fingerprinting, compared with Pillow and DALI."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps, JpegImagePlugin

from fastflower.errors import SampleError
from fastflower.shards import image as module
from fastflower.shards.image import Prepared, decode, perceptual_hash, prepare

# Mean difference in gray levels between an image and its JPEG of quality 95. Swapped channels differ ten times as much.
TOLERANCE = 3.0
ORIENTATION, RESOLUTION_UNIT = 0x0112, 0x0128  # EXIF tags


def smooth_colors(width: int = 64, height: int = 48, seed: int = 0) -> NDArray[np.uint8]:
    """Return smooth colors without any symmetry, (height, width, 3)."""
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


def unchanged(data: bytes) -> Prepared:
    return prepare(data, max_side=None, quality=None)


def with_orientation(value: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return {"exif": exif}


RGB = Image.fromarray(smooth_colors())
GRAY = RGB.convert("L")
WIDE_GRAY = (
    np.asarray(GRAY).astype(np.uint16) * 257 - np.asarray(GRAY) // 2
)  # 16 bits; the low byte differs from the high
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
    "gray png": encode(GRAY, "PNG"),
    "black and white": encode(GRAY.resize((8, 6)).convert("1").resize((64, 48)), "PNG"),
    "palette": encode(PALETTE, "PNG"),
    "palette, one transparent color": encode(PALETTE, "PNG", transparency=3),
    "palette, alpha for each color": encode(PALETTE, "PNG", transparency=bytes(range(0, 256, 4))),
    "alpha": encode(Image.merge("RGBA", (*RGB.split(), GRAY)), "PNG"),
    "gray with alpha": encode(Image.merge("LA", (GRAY, GRAY)), "PNG"),
    "cmyk jpeg": CMYK,
}
WIDE: dict[str, bytes] = {
    "png": encode(Image.fromarray(WIDE_GRAY), "PNG"),
    "tiff": encode(Image.fromarray(WIDE_GRAY), "TIFF"),
    "pgm": b"P5 64 48 65535\n" + WIDE_GRAY.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_decodes(kind: Callable[[bytes], Any]) -> None:
    np.testing.assert_array_equal(decode(kind(JPEG)), decode(JPEG))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_transcoding_rotates_upright_and_drops_the_orientation(kind: str, orientation: int) -> None:
    source = encode(RGB, kind, **with_orientation(orientation))
    upright = pixels(ImageOps.exif_transpose(opened(source)))
    made, size, _ = prepare(source, max_side=None, quality=95)
    assert size == upright.shape[:2]
    assert ORIENTATION not in opened(made).getexif()
    assert distance(decode(made), upright) < TOLERANCE


@pytest.mark.parametrize("image", [RGB, GRAY])
def test_a_jpeg_in_rgb_or_gray_is_kept_byte_for_byte(image: Image.Image) -> None:
    data = encode(image, "JPEG", quality=70, comment=b"kept", dpi=(72, 72))
    assert unchanged(data)[:2] == (data, (48, 64))
    assert prepare(data, max_side=64, quality=None) == unchanged(data)


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_become_an_rgb_jpeg_close_to_pillows(name: str) -> None:
    data = OTHER_FORMATS[name]
    image = opened(data)
    # Without RGBA in between, Pillow warns about a palette with alpha; the colors are the same.
    expected = pixels(image.convert("RGBA") if image.mode == "P" else image)
    made, size, _ = unchanged(data)
    result = opened(made)
    assert (result.format, result.mode, result.size[::-1], size) == ("JPEG", "RGB", size, (48, 64))
    assert distance(decode(made), expected) < TOLERANCE
    np.testing.assert_array_equal(decode(made), pixels(result))


def test_the_tolerance_detects_swapped_channels() -> None:
    for data in (OTHER_FORMATS["png"], CMYK):
        assert distance(decode(unchanged(data).encoded)[..., ::-1], pixels(opened(data))) > 10 * TOLERANCE


@pytest.mark.parametrize("name", WIDE)
def test_sixteen_bit_gray_is_scaled_to_eight(name: str) -> None:
    made = unchanged(WIDE[name]).encoded
    assert distance(decode(made), np.repeat(WIDE_GRAY[..., None] / 257, 3, axis=2)) < TOLERANCE
    assert decode(made).std() > 10  # Pillow's own conversion clips nearly all of it to white


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_color_is_scaled_to_eight(channels: int) -> None:
    levels = np.dstack([smooth_colors()[..., ::-1], smooth_colors(seed=1)])[..., :channels].astype(np.uint16) * 257
    made = unchanged(cv2.imencode(".png", levels)[1].tobytes())
    assert distance(decode(made.encoded), smooth_colors()) < TOLERANCE


KINDS: list[dict[str, Any]] = [{"quality": 30}, {"quality": 95, "subsampling": 0}, {"subsampling": "4:2:2"}]
KINDS += [{"progressive": True}, {"restart_marker_rows": 1}, *map(with_orientation, range(1, 9))]
SIZES = (RGB, GRAY, RGB.crop((0, 0, 33, 17)), RGB.crop((0, 0, 1, 1)))
JPEGS = [encode(image, "JPEG", **options) for options in KINDS for image in SIZES]


def decoded_by_dali(encoded: list[bytes]) -> list[NDArray[np.uint8]]:
    from nvidia.dali import fn as untyped_fn
    from nvidia.dali import types as untyped_types
    from nvidia.dali.pipeline import Pipeline

    fn: Any = untyped_fn  # its names are created at run time
    types: Any = untyped_types
    pipe = Pipeline(batch_size=len(encoded), num_threads=1, device_id=None, prefetch_queue_depth=1)
    source = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    with pipe:
        pipe.set_outputs(fn.decoders.image(source, device="cpu", output_type=types.RGB, jpeg_fancy_upsampling=True))
    pipe.build()
    pipe.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
    (images,) = pipe.run()
    return [np.asarray(images.at(number)) for number in range(len(encoded))]


@pytest.mark.dali
def test_packed_images_decode_alike_in_opencv_pillow_and_dali(flowers: Path) -> None:
    """With DALI 2.4, OpenCV 5.0 and Pillow 13.0 all pixels are equal; other versions may round by a level or two."""
    kept = [*JPEGS, *(path.read_bytes() for path in sorted(flowers.rglob("*5.jpg")))]
    assert [unchanged(data).encoded for data in kept] == kept
    packed = [unchanged(data) for data in (*kept, *OTHER_FORMATS.values(), *WIDE.values())]
    for made, by_dali in zip(packed, decoded_by_dali([made.encoded for made in packed]), strict=True):
        by_opencv, by_pillow = decode(made.encoded), pixels(ImageOps.exif_transpose(opened(made.encoded)))
        assert by_opencv.shape == by_pillow.shape == by_dali.shape == (*made.size, 3)
        np.testing.assert_array_equal(by_opencv, by_pillow)
        assert np.abs(by_opencv.astype(int) - by_dali).max() <= 2


def damaged(rng: np.random.Generator, kind: int, whole: bytes) -> bytes:
    """Truncate a file, splice it with another, cut out a piece, flip bits, insert zeros or insert a marker."""
    cut, other = int(rng.integers(2, len(whole))), JPEGS[rng.integers(len(JPEGS))]
    if kind == 3:
        bits = np.unpackbits(np.frombuffer(whole, np.uint8))
        bits[rng.integers(8 * 160, len(bits), rng.integers(1, 6))] ^= 1
        return np.packbits(bits).tobytes()
    zeros, marker = bytes(int(rng.integers(1, 30))), bytes([0xFF, rng.integers(0xC0, 0xFF)])
    middle = [b"", other[rng.integers(len(other)) :], b"", b"", zeros, marker][kind]
    return whole[:cut] + middle + [b"", b"", whole[cut + 20 :], b"", whole[cut:], whole[cut + 2 :]][kind]


def gray_levels(data: bytes) -> Any:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)


def fails_in_pillow(data: bytes) -> bool:
    """Return whether Pillow fails to decode a file."""
    try:
        opened(data).load()
    except Exception:  # Pillow's readers raise many kinds of exceptions
        return True
    return False


@pytest.mark.dali
def test_a_damaged_jpeg_is_kept_only_if_opencv_pillow_and_dali_read_it() -> None:
    """The gray decode that checks a file rejects every file that the color decode rejects, in 12,000 tries."""
    rng, kept, counts = np.random.default_rng(0), list[Prepared](), {True: 0, False: 0}
    for number in range(1500):
        data = damaged(rng, number % 6, JPEGS[number // 6 % len(JPEGS)])
        try:
            with opened(data) as image:
                plain = image.format == "JPEG" and image.mode in ("L", "RGB") and max(image.size) < 1000
        except Exception:  # Pillow's readers raise many kinds of exceptions
            plain = False
        if plain:
            bad = is_rejected(decode, data) or fails_in_pillow(data)
            empty = not bad and (gray_levels(data) != 128).mean() < 0.05
            counts[bad] += 1
            assert is_rejected(unchanged, data) == (bad or empty)
        if not is_rejected(unchanged, data) and unchanged(data).encoded == data and max(unchanged(data).size) < 1000:
            kept.append(unchanged(data))
    assert min(*counts.values(), len(kept)) > 300
    for made, by_dali in zip(kept, decoded_by_dali([made.encoded for made in kept]), strict=True):
        assert by_dali.shape == decode(made.encoded).shape == (*made.size, 3)


SCREEN = encode(Image.new("L", (2000, 10)), "JPEG")
TABLE = JPEG.index(b"\xff\xc4")  # after the frame's header, before the first scan
HEADERS = {
    "preview in a segment": JPEG[:2] + b"\xff\xe5" + (len(SCREEN) + 2).to_bytes(2, "big") + SCREEN + JPEG[2:],
    "fill bytes": JPEG[:TABLE] + b"\xff\xff" + JPEG[TABLE:],
    "data after its end": JPEG + SCREEN,
    "several images, the first one counts": encode(RGB, "MPO", save_all=True, append_images=[GRAY]),
    "stray bytes, which DALI rejects": JPEG[:TABLE] + b"stray" + JPEG[TABLE:],
}


@pytest.mark.dali
@pytest.mark.parametrize("name", HEADERS)
def test_the_header_decides_whether_a_jpeg_is_kept(name: str) -> None:
    made = prepare(HEADERS[name], max_side=64, quality=None)
    assert (made.encoded == HEADERS[name]) == ("stray" not in name)
    (by_dali,) = decoded_by_dali([made.encoded])
    assert distance(by_dali, pixels(RGB)) < 2 * TOLERANCE


CUTS = (1, 2, 3, 20, 200, len(JPEG) // 2, len(JPEG) - 700)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("max_side", [None, 16])
def test_a_truncated_jpeg_is_rejected_with_a_reason(cut: int, max_side: int | None) -> None:
    with pytest.raises(SampleError, match=r"[Tt]runcated"):
        prepare(JPEG[:-cut], max_side=max_side, quality=None)
    with pytest.raises(SampleError, match=r"^cannot be decoded as an image or is truncated$"):
        decode(JPEG[:-cut])


def test_a_jpeg_without_its_last_two_bytes_is_rejected(flowers: Path) -> None:
    for whole in (*JPEGS, next(flowers.glob("rose/*.jpg")).read_bytes()):
        with pytest.raises(SampleError, match="image file is truncated"):
            unchanged(whole[:-2])


@pytest.mark.parametrize("name", ["png", "webp", "tiff", "bmp", "gif"])
def test_truncated_files_of_other_formats_are_rejected(name: str) -> None:
    data = OTHER_FORMATS[name]
    with pytest.raises(SampleError, match=r"\w+ \w+"):
        unchanged(data[: len(data) // 2])


@pytest.mark.parametrize(
    "data", [b"", b"not an image", b"\xff\xd8", bytes(1000), b"<html></html>", b"\x89PNG\r\n\x1a\n"]
)
def test_data_that_is_not_an_image_is_rejected(data: bytes) -> None:  # test_kinds.py has the reasons
    with pytest.raises(SampleError, match=r"^(is|contains) "):
        unchanged(data)
    with pytest.raises(SampleError, match=r"^cannot be decoded as an image or is truncated$"):
        decode(data)


def is_rejected(function: Callable[[bytes], object], data: bytes) -> bool:
    try:
        function(data)
    except SampleError:
        return True
    return False


def check_only_sample_errors(data: bytes) -> None:
    """Check that only SampleError is raised: one damaged file must not stop the packing of a million good ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about damaged metadata
        if not is_rejected(unchanged, data):
            made = unchanged(data)
            assert decode(made.encoded).shape == (*made.size, 3)


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
        check_only_sample_errors(bytes(data))


def test_damaged_exif_does_not_stop_packing() -> None:
    """If a tag's type does not match its value, Pillow's exif_transpose raises struct.error."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[RESOLUTION_UNIT] = 2
    whole = encode(RGB, "WEBP", exif=exif)
    entry = whole.index(RESOLUTION_UNIT.to_bytes(2, "big") + b"\x00\x03")  # tag, then 3: a short
    for kind in range(256):
        check_only_sample_errors(whole[: entry + 2] + bytes([0, kind]) + whole[entry + 4 :])


def test_more_pixels_than_the_limit_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 64 * 48)
    assert not is_rejected(unchanged, JPEG)
    monkeypatch.setattr(module, "MAX_PIXELS", 64 * 48 - 1)
    for data, max_side in ((JPEG, None), (JPEG, 8), (OTHER_FORMATS["png"], None)):
        with pytest.raises(SampleError, match=r"^has 64 x 48 pixels, more than the limit of 3071$"):
            prepare(data, max_side=max_side, quality=None)


def test_a_decompression_bomb_is_rejected_before_it_is_decoded() -> None:
    header = b"P6 20000 20000 255\n"  # 400 million pixels: Pillow's own limit applies first
    with pytest.raises(SampleError, match="400000000 pixels"):
        unchanged(header)


def test_a_side_too_long_for_jpeg_is_rejected_unless_max_side_shrinks_it() -> None:
    data = encode(Image.new("RGB", (70_000, 2)), "PNG")
    with pytest.raises(
        SampleError, match=r"^has 70000 x 2 pixels, but JPEG allows at most 65500 per side; set max_side$"
    ):
        unchanged(data)
    assert prepare(data, max_side=1000, quality=None).size == (1, 1000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64), (60, 60), (120, 30)])
def test_max_side_shrinks_the_longer_side(kind: str, width: int, height: int) -> None:
    source = Image.fromarray(smooth_colors(width, height))
    made, size, _ = prepare(encode(source, kind), max_side=24, quality=None)
    assert max(size) == 24
    assert decode(made).shape == (*size, 3)
    assert size[0] == pytest.approx(height * 24 / max(width, height), abs=1)
    assert size[1] == pytest.approx(width * 24 / max(width, height), abs=1)
    resized = source.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    assert distance(decode(made), pixels(resized)) < 2 * TOLERANCE


def test_max_side_never_enlarges() -> None:
    for data in (JPEG, OTHER_FORMATS["png"]):
        assert prepare(data, max_side=1000, quality=None) == unchanged(data)


@pytest.mark.parametrize("data", [CMYK, OTHER_FORMATS["png"]])
@pytest.mark.parametrize("quality", [None, 1, 40, 75, 95])
def test_quality_is_pillows_and_by_default_95_with_full_chroma(data: bytes, quality: int | None) -> None:
    made = opened(prepare(data, max_side=None, quality=quality).encoded)
    reference = opened(encode(RGB, "JPEG", quality=quality or 95))
    assert isinstance(made, JpegImagePlugin.JpegImageFile)
    assert isinstance(reference, JpegImagePlugin.JpegImageFile)
    assert made.quantization == reference.quantization
    assert JpegImagePlugin.get_sampling(made) == (0 if quality is None else 2)  # 4:4:4 or 4:2:0


def test_an_error_without_a_message_is_reported_by_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "upright_rgb", Mock(side_effect=ValueError))
    with pytest.raises(SampleError, match=r"^ValueError$"):
        unchanged(OTHER_FORMATS["png"])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_hash_of_a_kept_or_transcoded_file_is_that_of_the_upright_image(orientation: int) -> None:
    data = encode(RGB, "JPEG", **with_orientation(orientation))
    upright = perceptual_hash(np.asarray(ImageOps.exif_transpose(opened(data)).convert("L")))
    for max_side, quality in ((None, None), (None, 60), (40, None)):
        assert (prepare(data, max_side=max_side, quality=quality).hash ^ upright).bit_count() <= 4
