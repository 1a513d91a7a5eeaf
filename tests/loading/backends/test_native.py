"""The native kernel: present on supported systems, equal to OpenCV's renderer, and within its memory."""

import colorsys
import ctypes
import faulthandler
import mmap
import platform
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import forked
from numpy.typing import NDArray

from fastflower import Augment, Loader
from fastflower.errors import ArgumentError
from fastflower.loading.backends import native
from fastflower.loading.backends.native import NativeRenderer, available
from fastflower.loading.backends.opencv import OpencvRenderer
from fastflower.loading.batch import as_numpy
from fastflower.loading.request import Request

DTYPES = [torch.uint8, torch.float32, torch.float16, torch.bfloat16]


def request(augment: Augment, images: list[NDArray[np.uint8]], seed: int = 0) -> Request:
    indices = np.arange(len(images))
    sizes = np.array([image.shape[:2] for image in images])
    return Request.drawn(augment, indices, sizes, seed=seed, epoch=0, step=0)


def render(kind: Any, augment: Augment, images: list[NDArray[np.uint8]], dtype: torch.dtype) -> torch.Tensor:
    """Render images to (N, H, W, 3) of `dtype`."""
    renderer = kind(augment, dtype)
    out = torch.empty((len(images), *augment.output_size, 3), dtype=dtype)
    for image, job, row in zip(images, renderer.jobs(request(augment, images)), as_numpy(out), strict=True):
        renderer(image, job, row)
    return out


def smooth(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Return an image with smooth colors."""
    y, x = np.mgrid[:height, :width]
    waves = rng.uniform(0.01, 0.08, (3, 2))
    return np.stack([127 + 120 * np.sin(a * x + b * y) for a, b in waves], axis=2).astype(np.uint8)


def test_linux_on_x86_64_with_avx2_has_the_kernel() -> None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("no kernel is built for this system")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor lacks AVX2")
    assert available(), "the package was built without kernel.so"


def test_a_kernel_compiled_from_a_different_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(native._Numbers):
        _fields_ = (("grayscale", ctypes.c_float),)

    native._kernel.cache_clear()
    monkeypatch.setattr(native, "_Numbers", Longer)
    with pytest.raises(
        ImportError, match=r"kernel\.so: was compiled from another kernel\.c; run make install, or reinstall"
    ):
        NativeRenderer(Augment(), torch.uint8)
    assert native._kernel.cache_info().currsize == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (37, 50), (5, 3)])
def test_it_renders_what_opencv_renders(size: tuple[int, int], dtype: torch.dtype, rng: np.random.Generator) -> None:
    # Without black areas and hue: OpenCV blurs the edge of black areas, and rotates hues in 256 steps.
    augment = Augment(size=size, crop=(0.2, 1.0), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4)
    images = [smooth(rng, *rng.integers(20, 300, 2)) for _ in range(24)]
    one, other = (render(kind, augment, images, dtype).float() for kind in (NativeRenderer, OpencvRenderer))
    level = 1.0 if dtype == torch.uint8 else 1 / 255 / 0.225
    assert (one - other).abs().mean() < 0.4 * level
    assert (one - other).abs().max() < 4 * level


def test_halves_are_rounded_as_torch_rounds_them(rng: np.random.Generator) -> None:
    augment, images = Augment(size=32, resize=40, hue=0.1), [smooth(rng, 60, 60) for _ in range(4)]
    exact = render(NativeRenderer, augment, images, torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(render(NativeRenderer, augment, images, dtype), exact.to(dtype))


def test_hue_is_rotated_as_by_colorsys(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image[0, :4] = [[0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 0]]
    augment = Augment(size=16, resize=16, hue=0.5)
    turns = float(request(augment, [image]).draw.hue[0])
    made = render(NativeRenderer, augment, [image], torch.float32)[0].numpy()
    mean, std = map(np.array, augment.normalization)
    levels = 255 * (made * std + mean)
    for pixel, found in zip(image.reshape(-1, 3), levels.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255).tolist())
        wanted = 255 * np.array(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value))
        assert np.abs(found - wanted).max() < 0.01


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 1000), (700, 2)])
def test_images_of_a_few_pixels(shape: tuple[int, int], rng: np.random.Generator) -> None:
    augment = Augment(size=24, crop=(0.1, 1.0), rotate=30)
    images = [np.full((*shape, 3), 200, np.uint8), rng.integers(0, 256, (*shape, 3), dtype=np.uint8)]
    one, other = (render(kind, augment, images, torch.uint8).float() for kind in (NativeRenderer, OpencvRenderer))
    assert one[0].max() <= 200
    assert (one - other).abs().mean() < 8


def test_an_image_need_not_be_contiguous(rng: np.random.Generator) -> None:
    augment, image = Augment(size=24, resize=30, rotate=10), smooth(rng, 80, 90)
    backwards = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    assert backwards.strides[1] < 0
    expected = render(NativeRenderer, augment, [image], torch.uint8)
    assert torch.equal(render(NativeRenderer, augment, [backwards], torch.uint8), expected)


# The image and the output each end where accessible memory ends.
def guarded(size: int) -> NDArray[np.uint8]:
    """Return memory that is followed by a page which nobody may touch."""
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    beyond = ctypes.c_void_p(address + pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(beyond, mmap.PAGESIZE, 0) == 0
    return np.frombuffer(memory, np.uint8, size, pages * mmap.PAGESIZE - size)


def render_guarded() -> None:
    for seed, (height, width) in enumerate([(40, 50), (2, 2), (7, 33), (130, 90), (64, 64)]):
        for size in (24, 21, 64):
            augment = Augment(size=size, crop=(0.5, 1.0), rotate=20, flip=0.5, flip_vertical=0.5)
            image = guarded(height * width * 3).reshape(height, width, 3)
            image[...] = seed
            for dtype, kind in ((torch.uint8, np.uint8), (torch.float32, np.float32), (torch.float16, np.uint16)):
                out = guarded(size * size * 3 * np.dtype(kind).itemsize).view(kind).reshape(size, size, 3)
                renderer = NativeRenderer(augment, dtype)
                for draw in range(4):
                    renderer(image, renderer.jobs(request(augment, [image], draw))[0], out)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.usefixtures("nothing_to_collect")
def test_nothing_beyond_the_image_is_read_and_nothing_beyond_the_output_is_written() -> None:
    assert forked(render_guarded) == 0

    def read_beyond() -> None:
        faulthandler.disable()
        memory = guarded(10)
        ctypes.string_at(memory.ctypes.data + 10, 1)

    assert forked(read_beyond) == -signal.SIGSEGV, "it would be noticed"


def test_without_the_kernel_opencv_is_the_default(
    shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    augment = Augment(size=32, resize=36, hue=0.1)
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "kernel.so")
    assert not available()
    options: dict[str, Any] = {"augment": augment, "batch_size": 8, "device": "cpu", "dtype": torch.uint8}
    (made, *_), (expected, *_) = Loader(shards, **options), Loader(shards, backend="opencv", **options)
    assert torch.equal(made.images, expected.images)
    with pytest.raises(ArgumentError, match=r"backend='native' needs a Linux wheel .* pass backend='opencv'"):
        Loader(shards, backend="native", **options)


def test_as_numpy_shares_the_memory() -> None:
    for dtype in DTYPES:
        tensor = torch.arange(6).to(dtype)
        assert as_numpy(tensor).dtype == {torch.uint8: np.uint8, torch.float32: np.float32}.get(dtype, np.uint16)
        assert as_numpy(tensor).__array_interface__["data"][0] == tensor.data_ptr()
