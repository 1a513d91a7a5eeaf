"""What `predict` accepts as images and what it says of everything else; downloads; folders with other files."""

import asyncio
import errno
import io
import logging
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nasty_files
import numpy as np
import pytest
import torch
from bad_server import BadServer, serving
from looking import looking, smooth
from PIL import Image

from fastflower import Predictor
from fastflower.errors import ArgumentError, ResourceError, SampleError
from fastflower.models import sources as module
from fastflower.models.predictor import Prediction
from fastflower.shards import image as image_module

ARRAY = np.asarray(smooth())
ACCEPTED = r"a path, an http\(s\) URL, bytes, .* PIL image, an \(H, W, 3\) uint8 array, or an iterable of them"
NEEDED = r"^images\[0\] must be an \(H, W, 3\) uint8 array of RGB, got "


class Later:
    """An upload, whose `read` must be awaited."""

    async def read(self) -> bytes:
        return b""


WRONG: list[tuple[Any, str]] = [
    (
        ARRAY.astype(np.float32) / 255,
        NEEDED + r"\(48, 64, 3\) float32; convert it: for floats in 0 \.\. 1, \(255 \* arr",
    ),
    (
        ARRAY.astype(np.float32),
        NEEDED + r".* float32; .*: for floats in 0 \.\. 255, array\.round\(\)\.astype\('uint8'\)\.$",
    ),
    (ARRAY.astype(np.int64), NEEDED + r".* int64; .*: for integers in 0 \.\. 255, array\.astype\('uint8'\)\.$"),
    (ARRAY.astype(np.uint16) * 257, NEEDED + r".* uint16; .*: for 16-bit levels, \(array / 257\)\.round\(\)\.astype"),
    (ARRAY > 9, NEEDED + r".* bool; convert it: 255 \* array\.astype\('uint8'\)\.$"),
    (ARRAY.transpose(2, 0, 1), NEEDED + r"\(3, 48, 64\) uint8; move the channels last: array\.transpose\(1, 2, 0\)\.$"),
    (ARRAY[:, :, 0], NEEDED + r"\(48, 64\) uint8; repeat the gray levels: np\.stack\(\[array\] \* 3, axis=2\)\.$"),
    (ARRAY[:, :, :1], NEEDED + r"\(48, 64, 1\) uint8; repeat the gray levels: array\.repeat\(3, 2\)\.$"),
    (np.dstack([ARRAY, ARRAY[:, :, 0]]), NEEDED + r"\(48, 64, 4\) uint8; drop the alpha channel: array\[:, :, :3\]\.$"),
    (ARRAY[None], NEEDED + r"\(1, 48, 64, 3\) uint8; pass the images of a batch one by one: list\(array\)\.$"),
    (ARRAY[:0], NEEDED + r"\(0, 64, 3\) uint8; pass another image\.$"),
    (
        torch.zeros(3, 8, 8),
        r"^images\[0\] is a tensor; pass an \(H, W, 3\) uint8 array, or a PIL image: .*to_pil_image",
    ),
    ([ARRAY, torch.zeros(3, 8, 8)], r"^images\[1\] is a tensor"),
    (None, f"^images must be {ACCEPTED}, got None\\.$"),
    (3, f"^images must be {ACCEPTED}, got 3\\.$"),
    ([ARRAY, True], rf"^images\[1\] must be {ACCEPTED}, got True\.$"),
    ([ARRAY, [ARRAY]], rf"^images\[1\] must be {ACCEPTED}, got a list\.$"),
    (io.StringIO("text"), r"^images: read\(\) of a file object must return bytes, got str; open it with mode 'rb'"),
    (Later(), r"^images: read\(\) .* got coroutine; .* of an upload to FastAPI, pass its \.file\.$"),
    (
        "s3://bucket/1.jpg",
        r"^s3://bucket/1\.jpg: only http:// and https:// are downloaded; .*fsspec\.open\(URL\)\.open",
    ),
    ("http://[x/1.jpg", r"^http://\[x/1\.jpg: is not a URL \(.*\); pass another one\.$"),
    ("file:///1.jpg", r"^file:///1\.jpg: only http:// and https:// are downloaded; pass a path"),
]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return looking(url_seconds=0.5, url_bytes=100_000)


@pytest.mark.parametrize(("images", "message"), WRONG)
def test_what_is_no_image_is_an_error_that_says_how_to_convert_it(
    predictor: Predictor, images: Any, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        predictor(images)


def test_what_the_messages_advise_works(predictor: Predictor) -> None:
    from torchvision.transforms.functional import to_pil_image, to_tensor

    gray, tensor = ARRAY[:, :, 0], to_tensor(ARRAY.copy())
    advised = [
        *(
            (255 * (ARRAY / 255)).round().astype("uint8"),
            ARRAY.astype(np.int64).astype("uint8"),
            (ARRAY.astype(np.uint16) * 257 / 257).round().astype("uint8"),
            ARRAY.transpose(2, 0, 1).transpose(1, 2, 0),
            to_pil_image(tensor),
        ),
        *(np.dstack([ARRAY, gray])[:, :, :3], *list(ARRAY[None]), ARRAY[:, :, ::-1][:, :, ::-1]),
    ]
    expected = predictor(ARRAY)[0].probabilities
    assert all(one.probabilities == expected for one in predictor(advised))
    repeated = predictor([np.stack([gray] * 3, axis=2), gray[:, :, None].repeat(3, 2), Image.fromarray(gray)])
    assert repeated[0].probabilities == repeated[1].probabilities == repeated[2].probabilities


def test_a_list_is_checked_before_anything_is_predicted() -> None:
    with pytest.raises(ArgumentError, match=r"^images\[1\] must be "):
        module.sources([ARRAY, None])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]
)
def test_pil_images_of_any_mode_are_read(predictor: Predictor, mode: str) -> None:
    small = Image.new("RGB", (9, 7), (200, 40, 90))
    image = Image.new(mode, (9, 7), 200) if mode in ("I", "F", "I;16") else small.convert(mode)
    assert len(predictor(image)) == 1
    assert (image.mode, image.size) == (mode, (9, 7))


def test_pil_images_that_cannot_be_used_are_named(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"^image 0: a PIL image of mode La that cannot be converted to RGB \("):
        predictor(Image.new("La", (8, 8)))
    with pytest.raises(SampleError, match=r"^image 0: a PIL image without pixels; pass another image"):
        predictor(Image.new("RGB", (0, 8)))
    smooth().save(tmp_path / "1.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:500])
    with Image.open(tmp_path / "1.png") as half, pytest.raises(SampleError, match=r"^image 0: a PIL image .*truncated"):
        predictor(half)
    large = Image.new("1", (14000, 14000))
    with pytest.raises(
        SampleError, match=r"^image 0: has 14000 x 14000 pixels, more than the limit of 178956970; pass ano"
    ):
        predictor(large)
    asyncio.run(Later().read())


@pytest.fixture
def web(tmp_path: Path) -> Iterator[BadServer]:
    smooth().save(tmp_path / "a b.png")
    (tmp_path / "page.jpg").write_bytes(b"<html>no image</html>")
    (tmp_path / "long.jpg").write_bytes(b"x" * 100_001)
    with serving(tmp_path) as server:
        yield server


def test_an_image_at_a_url_is_downloaded(predictor: Predictor, web: BadServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((tmp_path / "a b.png").read_bytes())
    (found,) = predictor(f"{web.url}/a.png")
    assert found == Prediction(None, found.class_name, found.probability, found.probabilities, f"{web.url}/a.png")
    assert found.probabilities == predictor(tmp_path / "a.png")[0].probabilities


def test_what_goes_wrong_at_a_url_is_named(predictor: Predictor, web: BadServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((tmp_path / "a b.png").read_bytes())
    faults = {"stalled.png": "stall", "cut.png": "truncate", "busy.png": "503"}
    for name in faults:
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
    web.fault = lambda name, _: faults.get(name)
    url = "http://127.0.0.1:1/gone.jpg"
    reasons = {
        f"{web.url}/missing.jpg": r"could not be downloaded \(HTTP Error 404: Not Found\)",
        f"{web.url}/busy.png": r"could not be downloaded \(HTTP Error 503: Service Unavailable\)",
        f"{web.url}/long.jpg": r"has more than 100000 bytes; pass a larger url_bytes \(--url-bytes\)",
        f"{web.url}/stalled.png": r"did not arrive within 0\.5 seconds; pass a larger url_seconds \(--url-seconds\)",
        f"{web.url}/cut.png": r"ended \d+ bytes too early; pass it again",
        f"{web.url}/page.jpg": r"is HTML, a web page, named \.jpg",
        url: r"could not be downloaded \(\[Errno 111\] Connection refused\)",
        "http://127.0.0.1:x/1.jpg": r"could not be downloaded \(nonnumeric port: 'x'\)",
    }
    for address, reason in reasons.items():
        with pytest.raises(SampleError, match=f"^{re.escape(address)}: {reason}(, |; pass )another image, or on_bad"):
            predictor(address)
    assert len(predictor([*reasons, f"{web.url}/a.png"], on_bad="skip")) == 1


def test_a_url_that_takes_too_long_to_answer_is_named(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.4, 0.6])
    monkeypatch.setattr(module, "monotonic", lambda: next(clock))

    class Slow(io.BytesIO):
        length = 1

        def read1(self, _size: int | None = -1) -> bytes:
            return b"x"

    monkeypatch.setattr(module, "urlopen", lambda *_, **__: Slow())
    with pytest.raises(SampleError, match=r"did not arrive within 0\.5 seconds"):
        predictor("https://example.org/1.jpg")


def test_a_folder_names_damaged_images_and_counts_other_files(
    predictor: Predictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Damaged images in folders are skipped, also if those passed by themselves are not."""
    caplog.set_level(logging.INFO)
    (tmp_path / "in").mkdir()
    for name in ("1.png", "in/3.png"):
        smooth().save(tmp_path / name)
    (tmp_path / "2.jpg").write_bytes(b"no image")
    for name in (".DS_Store", "in/.DS_Store", "notes.txt", "in/labels.csv", "in/more.txt"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    found = predictor([tmp_path, tmp_path / "1.png"])
    assert [str(one.path.relative_to(tmp_path)) for one in found if one.path] == ["1.png", "in/3.png", "1.png"]
    assert [one.index for one in found] == [0, 2, 3]
    first, second = caplog.records
    assert first.getMessage() == (
        f"{tmp_path}: left out 6 that are no images (has no image extension (.txt): 2, is hidden or added by a system: 2, "
        f"is a pipe, socket or device: 1, has no image extension (.csv): 1)"
    )
    assert (second.getMessage(), second.levelname) == (
        f"skipped {tmp_path}/2.jpg: is plain text, named .jpg",
        "WARNING",
    )
    assert first.levelname == "WARNING"
    with pytest.raises(
        SampleError, match=rf"^{tmp_path}/2\.jpg: is plain text, .*; pass image files or folders, or on_b"
    ):
        predictor([tmp_path, tmp_path / "2.jpg"])


def test_a_file_object_at_its_end_says_to_seek(predictor: Predictor) -> None:
    file = io.BytesIO()
    smooth().save(file, "PNG")
    said = r"^image 0: is a file object at its end, because it was read before; pass it after file\.seek\(0\), another image,"
    with pytest.raises(SampleError, match=said):
        predictor(file)
    file.seek(0)
    assert len(predictor(file)) == 1
    with pytest.raises(SampleError, match=r"^image 0: is empty; pass another image"):
        predictor(io.BytesIO())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_large_image_is_refused_before_it_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limited, data = looking(max_pixels=64 * 48 - 1), io.BytesIO()
    smooth().save(data, kind)
    forms = [data.getvalue(), smooth(), np.asarray(smooth())]
    assert len(looking(max_pixels=64 * 48)(forms)) == 3
    for name in ("upright_rgb", "_pixels_if_intact", "decode"):
        monkeypatch.setattr(image_module, name, None)
    said = r"^image 0: has 64 x 48 pixels, more than the limit of 3071; pass a larger max_pixels \(--max-pixels\), another image,"
    for form in forms:
        with pytest.raises(SampleError, match=said) as caught:
            limited(form)
        assert caught.value.reason == "has 64 x 48 pixels, more than the limit of 3071"


@pytest.mark.filterwarnings("error")
def test_a_png_file_with_too_many_pixels_is_refused_without_a_warning_of_pillow(predictor: Predictor) -> None:
    head = nasty_files.chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    with pytest.raises(
        SampleError, match=r"^image 0: has 20000 x 20000 pixels, more than the limit of 178956970; pass another"
    ):
        predictor(b"\x89PNG\r\n\x1a\n" + head)


def test_hidden_files_alone_are_no_warning(
    predictor: Predictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    smooth().save(tmp_path / "1.png")
    (tmp_path / ".DS_Store").touch()
    predictor(tmp_path)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", f"{tmp_path}: left out 1 that are no images (is hidden or added by a system: 1)")
    ]


@pytest.mark.parametrize("spread", [16, 17])
def test_images_almost_without_contrast_are_named(
    predictor: Predictor, caplog: pytest.LogCaptureFixture, spread: int
) -> None:
    """As `pack` names them, though few pixels are looked at first."""
    gray = np.full((64, 64), 100, np.uint8)
    gray[8:16, 17:24] += spread
    target = io.BytesIO()
    Image.fromarray(gray).save(target, "JPEG", quality=100)
    predictor(target.getvalue())
    text = "image 0: has almost no contrast: its gray levels range from 100 to 116 (out of 0 to 255)"
    assert caplog.messages == ([text] if spread == 16 else [])


def test_a_refusal_by_the_system_is_no_damaged_image(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(module, "urlopen", refuse)
    with pytest.raises(
        ResourceError, match=r"^https://example\.org/1\.jpg: cannot be opened or read: this process has"
    ):
        predictor("https://example.org/1.jpg", on_bad="skip")
