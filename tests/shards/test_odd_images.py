"""Images with decoder warnings, half images, damaged EXIF and more than 8 bits, compared with Pillow and libjpeg."""

import io
import json
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nasty_files import TURNED, encode, segment, smooth, tiff
from numpy.typing import NDArray
from packs import drawn, exactly
from PIL import Image, ImageOps

from fastflower import Loader, Manifest, pack
from fastflower.errors import SampleError
from fastflower.packing.worker import MadeShard
from fastflower.shards import libjpeg
from fastflower.shards.image import decode, prepare

WHOLE = encode(smooth(90, 500, 333), "JPEG", quality=90)
HALF = WHOLE[: len(WHOLE) // 2]
OTHER = encode(smooth(91), "JPEG")
END = b"\xff\xd9"
PREMATURE = "Corrupt JPEG data: premature end of data segment"


def prepared(data: bytes, **options: Any) -> tuple[bytes, list[str]]:
    warnings = list[str]()
    made = prepare(data, **{"max_side": None, "quality": None, **options}, warn=warnings.append)
    return made.encoded, warnings


def decodes_in_pillow(data: bytes) -> bool:
    """Return whether Pillow decodes it."""
    try:
        Image.open(io.BytesIO(data)).load()
    except Exception:  # Pillow's readers raise many kinds of exceptions
        return False
    return True


FOLLOWED = {
    "SOI": b"\xff\xd8",
    "another image": OTHER,
    "a broken table": segment(0xC4, b"\0" + 17 * b"\xff") + END,
    "a table past the end": b"\xff\xc4\xff\xff",
    "a table and the end": segment(0xC4, b"\0\1" + bytes(15) + b"\0") + END,
    "a frame": segment(0xC0, b"\x08" + bytes(12)),
    "its scan again": WHOLE[WHOLE.index(b"\xff\xda") :],
    "the end": END,
    "a restart and the end": b"\xff\xd3" + END,
    "nothing": b"",
    **{f"marker {code:x}": bytes([0xFF, code]) + tail for code in range(1, 255, 23) for tail in (b"", OTHER)},
}


@pytest.mark.parametrize("quality", [None, 80])
@pytest.mark.parametrize("name", FOLLOWED)
def test_half_an_image_is_accepted_only_if_pillow_accepts_it_and_with_a_warning(name: str, quality: Any) -> None:
    data = HALF + FOLLOWED[name]
    if decodes_in_pillow(data):
        made, warnings = prepared(data, quality=quality)
        assert decodes_in_pillow(made)
        assert PREMATURE in warnings
    else:
        with pytest.raises(SampleError, match=r"broken data stream|truncated|\w+ \w+"):
            prepared(data, quality=quality)


def test_a_whole_image_without_its_end_marker_is_rejected() -> None:
    for rest in (b"\xff\xd8", OTHER):
        with pytest.raises(SampleError, match="broken data stream"):
            prepared(WHOLE[:-2] + rest)
    assert prepared(WHOLE[:-2] + b"\xff\xff\xff" + END) == (WHOLE[:-2] + b"\xff\xff\xff" + END, [])  # fill bytes


@pytest.mark.parametrize(("side", "share"), [(13_000, "0.1%"), (2000, "4.3%")])
@pytest.mark.parametrize("options", [{}, {"quality": 80}, {"max_side": 100}])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_that_declares_another_image_is_rejected(side: int, share: str, options: dict[str, Any]) -> None:
    if side > 10_000 and options:
        pytest.skip("Pillow needs a second and half a gigabyte")
    frame = WHOLE.index(b"\xff\xc0") + 5
    data = WHOLE[:frame] + struct.pack(">HH", side, side) + WHOLE[frame + 4 :]
    with pytest.raises(
        SampleError,
        match=exactly(f"declares {side} x {side} pixels, but has data for only {share} of them"),
    ):
        prepared(data, **options)


RESTARTS = encode(smooth(92, 256, 192), "JPEG", restart_marker_blocks=4)
PROGRESSIVE = encode(smooth(93, 256, 192), "JPEG", progressive=True)
DAMAGED = {
    "extraneous": WHOLE[:-2] + b"abcdefgh" + END,
    "cut": WHOLE[: len(WHOLE) * 9 // 10] + END,
    "zeros": WHOLE[: len(WHOLE) // 2] + bytes(500) + WHOLE[len(WHOLE) // 2 + 500 :],
    "a restart left out": RESTARTS.replace(b"\xff\xd2", b"", 1),
    "progressive": PROGRESSIVE[: len(PROGRESSIVE) * 2 // 3] + END,
    "smaller header": WHOLE.replace(struct.pack(">HH", 333, 500), struct.pack(">HH", 200, 300), 1),
}
PRINT_WARNINGS = "import sys, cv2, numpy; assert cv2.imdecode(numpy.fromfile(sys.argv[1], numpy.uint8), 1) is not None"


def test_warnings_are_libjpegs_own_and_appear_only_in_the_manifest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = drawn(tmp_path / "data", a=6, b=6)
    expected = dict[str, str]()
    for name, data in DAMAGED.items():
        (folder / f"a/{name}.jpg").write_bytes(data)
        command = [sys.executable, "-c", PRINT_WARNINGS, folder / f"a/{name}.jpg"]
        warns = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        expected[f"a/{name}.jpg"] = warns.strip()
    assert len(set(expected.values())) >= 4
    manifest = pack(folder, tmp_path / "out", shard_bytes=20_000)
    assert {item["path"]: item["warning"] for item in manifest.warnings} == expected
    assert [item["path"] for item in manifest.warnings] == sorted(expected)
    assert Manifest.load(tmp_path / "out").warnings == manifest.warnings
    assert capfd.readouterr().err.count("JPEG") == 0
    assert f"{tmp_path / 'out'}: decoded 6 images with warnings; see `warnings` in manifest.json" in caplog.messages
    again = pack(folder, tmp_path / "transcoded", quality=80)
    assert {item["path"]: item["warning"] for item in again.warnings} == expected


def test_each_thread_captures_only_its_own_warnings_and_others_still_print(capfd: pytest.CaptureFixture[str]) -> None:
    def warns(number: int) -> bool:
        return bool(prepared(DAMAGED["cut"] if number % 3 else WHOLE)[1])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(warns, range(240))) == [number % 3 > 0 for number in range(240)]
    assert capfd.readouterr().err == ""
    decode(DAMAGED["cut"])
    assert capfd.readouterr().err == PREMATURE + "\n"


def test_loading_a_pack_does_not_repeat_the_warnings_of_its_manifest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = drawn(tmp_path / "data", a=4, b=4)
    for name, data in DAMAGED.items():
        (folder / f"a/{name}.jpg").write_bytes(data)
    assert len(pack(folder, tmp_path / "out", val_fraction=0).warnings) == len(DAMAGED)
    assert sum(len(batch.index) for batch in Loader(tmp_path / "out", batch_size=4, tail="keep")) == 8 + len(DAMAGED)
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_can_capture_warnings_and_print_them(capfd: pytest.CaptureFixture[str]) -> None:
    with libjpeg.warnings() as captured:
        child = os.fork()
        if not child:  # no assert: the child would run pytest's error handling too
            decode(DAMAGED["cut"])
            os._exit(prepared(DAMAGED["cut"])[1] != [PREMATURE])
        assert os.waitpid(child, 0)[1] == 0
        decode(DAMAGED["cut"])
    assert captured.decode() == capfd.readouterr().err == PREMATURE + "\n"


def test_packs_and_shards_of_older_versions_have_no_warnings(tmp_path: Path) -> None:
    pack(drawn(tmp_path / "data", a=2, b=2), tmp_path / "out")
    stored = json.loads((tmp_path / "out/manifest.json").read_text())
    assert stored.pop("warnings") == []
    (tmp_path / "out/manifest.json").write_text(json.dumps(stored | {"version": 1}))
    assert Manifest.load(tmp_path / "out").warnings == ()
    work = tmp_path / "record.npz"
    rest = {"shard": {"name": "a", "samples": 0, "bytes": 0, "sha256": ""}, "skipped": []}
    empty = np.zeros(0, np.int64)
    data = np.frombuffer(json.dumps(rest).encode(), np.uint8)
    np.savez(work, rows=empty, numbers=empty, hashes=empty, rest=data)
    assert MadeShard.load(work).warnings == []


EXIFS = {
    "cut": TURNED[:27],
    "garbage": b"Exif\0\0" + bytes(range(200, 250)),
    "half a header": b"Exif\0\0II",
    "a loop": b"Exif\0\0" + tiff("<", [(0x8769, 4, 1, 8)], following=8),
    "orientation as text": b"Exif\0\0" + tiff("<", [(0x112, 2, 4, 0x36)]),
    "no directory there": b"Exif\0\0" + struct.pack("<4sI", b"II*\0", 1 << 31),
    "another tag of a wrong type": b"Exif\0\0" + tiff("<", [(0x112, 3, 1, 1), (0x128, 2, 1, 0)]),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("name", EXIFS)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_is_ignored(kind: str, name: str) -> None:
    data = encode(smooth(5), kind, exif=EXIFS[name])
    made, _ = prepared(data)
    upright = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(decode(made).astype(int) - upright).mean() < 3


def test_an_orientation_next_to_a_damaged_tag_still_counts() -> None:
    data = encode(smooth(5), "PNG", exif=b"Exif\0\0" + tiff("<", [(0x112, 3, 1, 6), (0x128, 2, 1, 0)]))
    assert prepare(data, max_side=None, quality=None).size == (64, 48)


LEVELS = np.asarray(smooth(80).convert("L")).astype(np.int64)


def gray_tiff(levels: NDArray[Any], *extra: tuple[int, int, int, int], bits: int = 16, white: int = 0) -> bytes:
    """Return an uncompressed file of 64 x 48 pixels."""
    entries = [(256, 3, 1, 64), (257, 3, 1, 48), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, 1 - white)]
    place = 14 + 12 * (9 + len(extra))
    entries += [(273, 4, 1, place), (277, 3, 1, 1), (278, 3, 1, 48), (279, 4, 1, levels.nbytes), *extra]
    return tiff("<", sorted(entries), levels.tobytes())


def packed_12(levels: NDArray[np.int64]) -> NDArray[np.uint8]:
    left, right = levels[:, ::2], levels[:, 1::2]
    return np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], -1).astype(np.uint8)


def as_tiff(array: NDArray[Any], **options: Any) -> bytes:
    return encode(Image.fromarray(array), "TIFF", **options)


SIGNED = (339, 3, 1, 2)
WIDE = {
    "12 bits": gray_tiff(packed_12(LEVELS * 16), bits=12),
    "16 bits": gray_tiff((LEVELS * 257).astype("<u2")),
    "16 bits, white is zero": gray_tiff((65_535 - LEVELS * 257).astype("<u2"), white=1),
    "MaxSampleValue": gray_tiff((LEVELS * 16).astype("<u2"), (281, 3, 1, 4080)),
    "SMaxSampleValue": gray_tiff((LEVELS * 4).astype("<u2"), (341, 3, 1, 1020)),
    "both ends": gray_tiff((LEVELS * 4 + 500).astype("<u2"), (340, 3, 1, 500), (341, 3, 1, 1520)),
    "a maximum that the levels exceed": gray_tiff((LEVELS * 257).astype("<u2"), (281, 3, 1, 1)),
    "a maximum of nothing": gray_tiff((LEVELS * 257).astype("<u2"), (281, 3, 1, 0)),
    "signed": gray_tiff((LEVELS * 16).astype("<i2"), SIGNED),
    "signed, half below zero": gray_tiff(((LEVELS - 127.5) * 32).astype("<i2"), SIGNED),
    "signed bytes": gray_tiff((LEVELS - 128).astype(np.int8), SIGNED, bits=8),
    "signed bytes above zero": gray_tiff((LEVELS // 2).astype(np.int8), SIGNED, bits=8),
    "32 bits of bytes": as_tiff(LEVELS.astype(np.int32)),
    "32 bits of 16": as_tiff((LEVELS * 257).astype(np.int32)),
    "fractions": as_tiff((LEVELS / 255).astype(np.float32)),
    "fractions on both sides of zero": as_tiff((LEVELS / 127.5 - 1).astype(np.float32)),
    "fractions that overshoot": as_tiff(np.where(LEVELS.max() == LEVELS, 1.05, LEVELS / 255).astype(np.float32)),
    "floats of millions": as_tiff((np.where(LEVELS.max() == LEVELS, 255, LEVELS) * 4000).astype(np.float32)),
    "floats of bytes": as_tiff(LEVELS.astype(np.float32)),
    "floats of 16 bits": as_tiff((LEVELS * 257).astype(np.float32)),
    "ImageJ": as_tiff((LEVELS * 3 + 7).astype(np.uint16), description="ImageJ=1.53t\nimages=1\nmin=7.0\nmax=772.0\n"),
    "OME": as_tiff((LEVELS * 4).astype(np.uint16), description='<OME><Pixels SignificantBits="10"/></OME>'),
    "png": encode(Image.fromarray((LEVELS * 257).astype(np.uint16)), "PNG"),
}


@pytest.mark.parametrize("name", WIDE)
def test_levels_are_scaled_by_the_range_that_the_file_states(name: str) -> None:
    made, warnings = prepared(WIDE[name])
    assert np.abs(decode(made) - LEVELS[..., None]).mean() < 2
    assert warnings == []


def test_nan_and_infinity_are_black_and_do_not_darken_the_rest() -> None:
    levels = (LEVELS / 255).astype(np.float32)
    levels[:8, :8], levels[:8, 8:16] = np.nan, np.inf
    found = decode(prepared(as_tiff(levels))[0])
    assert found[:8, :16].mean() < 5
    assert np.abs(found[16:] - LEVELS[16:, :, None]).mean() < 2


def test_images_with_next_to_no_contrast_get_a_warning(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=4, b=4)
    (folder / "a/microscopy.tif").write_bytes(as_tiff((LEVELS + 300).astype(np.uint16)))
    (folder / "b/detector.png").write_bytes(encode(Image.fromarray((LEVELS * 16).astype(np.uint16)), "PNG"))
    (folder / "b/blank.png").write_bytes(encode(Image.new("RGB", (9, 9), (77, 77, 77)), "PNG"))
    (folder / "b/blank.jpg").write_bytes(encode(Image.new("L", (9, 9), 77), "JPEG"))
    flat = "has almost no contrast: its gray levels range from {} (out of 0 to 255)"
    assert pack(folder, tmp_path / "out").warnings == (
        {"path": "a/microscopy.tif", "warning": flat.format("1 to 2")},
        {"path": "b/blank.jpg", "warning": flat.format("77 to 77")},
        {"path": "b/blank.png", "warning": flat.format("77 to 77")},
        {"path": "b/detector.png", "warning": flat.format("3 to 13")},
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_wide_levels_are_rotated_upright_too(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encode(Image.fromarray((LEVELS * 257).astype(np.uint16)), "PNG", exif=exif)
    small = Image.fromarray(LEVELS.astype(np.uint8))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encode(small, "PNG", exif=exif)))))
    assert np.abs(decode(prepared(data)[0]) - upright[..., None].astype(int)).mean() < 2


# Both headers declare more pixels than fit in memory. The second fits in gray, but Pillow then decodes it in color.
SHORT_OF_MEMORY = r"""
import io, resource
from functools import partial
from PIL import Image
from fastflower.shards.image import decode, prepare
files = []
for mode, side in (("L", 9000), ("RGB", 5500)):
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, "JPEG")
    head, frame = file.getvalue().split(b"\xff\xc0\0")
    files.append(head + b"\xff\xc0\0" + frame[:2] + 2 * side.to_bytes(2, "big") + frame[6:])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), -1))
for data in files:
    for call in (decode, partial(prepare, max_side=None, quality=None), partial(prepare, max_side=9, quality=None)):
        try:
            call(data)
        except MemoryError:
            print("MemoryError")
"""


def test_a_lack_of_memory_is_not_reported_as_a_damaged_image() -> None:
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, check=True)
    assert done.stdout == "MemoryError\n" * 6
