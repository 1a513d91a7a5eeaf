"""Decoding large images at reduced scale: close to exact, the same with and without a cache, the same in prediction."""

import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from fastflower import Augment, Loader, pack, predict
from fastflower.draws import geometry
from fastflower.draws.geometry import decode_scales
from fastflower.loading.backends.base import Setup
from fastflower.loading.backends.selection import create
from fastflower.loading.cache import PixelCache, decoded_bytes
from fastflower.loading.request import Request
from fastflower.loading.samples import EncodedFiles, SampleSource
from fastflower.shards.image import decode


def encoded(image: NDArray[np.uint8], kind: str = "JPEG", **options: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind, **options)
    return data.getvalue()


def boxes(image: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    """Return the means of boxes; the last boxes repeat the edge."""
    height, width = (-(-length // side) for length in image.shape[:2])
    padded = np.pad(image, ((0, height * side - image.shape[0]), (0, width * side - image.shape[1]), (0, 0)), "edge")
    return padded.reshape(height, side, width, side, 3).mean(axis=(1, 3))


@pytest.fixture(scope="module")
def large(image_files: list[Path]) -> list[NDArray[np.uint8]]:
    """Images of about a megapixel with odd sides."""
    return [cv2.resize(decode(path.read_bytes()), (1203, 901)) for path in image_files[::10]]  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def shards(large: list[NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    for number, image in enumerate(large):
        (folder / "data" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (folder / "data" / "ab"[number % 2] / f"{number}.jpg").write_bytes(encoded(image, quality=90))
    pack(folder / "data", folder / "shards", val_fraction=0)
    return folder / "shards"


@pytest.mark.parametrize("decode_scale", [2, 4, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_reduced_pixels_are_the_means_of_boxes(kind: str, decode_scale: int, large: list[NDArray[np.uint8]]) -> None:
    data = [encoded(image, kind, **({"compress_level": 1} if kind == "PNG" else {})) for image in large[::3]]
    pairs = [(decode(item, decode_scale).astype(float), boxes(decode(item), decode_scale)) for item in data]
    assert all(one.shape == other.shape for one, other in pairs)
    assert np.mean([np.abs(one - other).mean() for one, other in pairs]) < 0.6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_images_are_upright(orientation: int, large: list[NDArray[np.uint8]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(large[0][:896, :1200], exif=exif)
    assert np.abs(decode(data, 4) - boxes(decode(data), 4)).mean() < 1


def test_decoding_leaves_a_reduction_by_at_least_two() -> None:
    footprint = np.array([[r**2, 3 * r**2] for r in np.geomspace(0.5, 100, 200)])
    found = decode_scales(footprint)
    assert set(found.tolist()) == {1, 2, 4, 8}
    assert (np.diff(found) >= 0).all()
    left = np.sqrt(footprint.min(axis=1)) / found
    assert (left[found > 1] >= 2 - 1e-9).all()
    assert (left[found < 8] < 4).all()


AUGMENTS = {"views": Augment(size=64, resize=73), "crops": Augment(size=64, crop=(0.02, 1.0), flip=0.5, rotate=10)}


@pytest.mark.parametrize("backend", ["native", "opencv"])
@pytest.mark.parametrize("name", AUGMENTS)
def test_a_partial_cache_changes_no_pixel(name: str, backend: Any, shards: Path) -> None:
    options: dict[str, Any] = {
        "batch_size": 5, "augment": AUGMENTS[name], "device": "cpu", "backend": backend, "tail": "keep",
    }  # fmt: skip
    loaders = [Loader(shards, cache=cache, **options) for cache in (None, "auto", 400_000)]
    for _ in range(3):
        for batches in zip(*loaders, strict=True):
            assert all(torch.equal(batch.images, batches[0].images) for batch in batches)


def test_a_large_image_is_never_decoded_whole_for_a_small_view(shards: Path) -> None:
    loader = Loader(shards, batch_size=5, augment=AUGMENTS["views"], device="cpu", backend="opencv")
    asked: set[int] = set()
    for request in loader.requests(0):
        asked |= set(decode_scales(request.warp.footprint).tolist())
    assert asked == {4}  # 901 to 73 pixels: 12.3 times smaller


def test_auto_estimates_the_memory_of_reduced_images(
    shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[PixelCache] = []
    real = PixelCache.__init__

    def spy(self: PixelCache, *args: Any) -> None:
        real(self, *args)
        kept.append(self)

    monkeypatch.setattr(PixelCache, "__init__", spy)
    caplog.set_level(logging.INFO, "fastflower")
    for augment in AUGMENTS.values():
        loader = Loader(shards, batch_size=5, augment=augment, device="cpu", tail="keep")
        for _ in range(4):
            assert sum(len(batch.labels) for batch in loader) == loader.num_samples
        (cache,) = kept
        held = sum(image.nbytes for image in cache._cached.values())
        whole = loader.num_samples * 901 * 1203 * 3
        estimate = decoded_bytes(loader._samples.sizes, augment, loader.seed)
        assert held < 0.9 * whole
        assert 0.9 * held <= estimate.needed <= 1.1 * held
        assert held < whole < estimate.most
        kept.clear()
    assert len([line for line in caplog.messages if line.startswith("cache: ")]) == len(AUGMENTS), "each logs it once"


class Recording(nn.Module):
    seen: ClassVar[list[torch.Tensor]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return images.flatten(1)[:, :2]


@pytest.mark.parametrize("size", [24, 224, 600])
def test_prediction_sees_what_the_loader_sees(shards: Path, size: int) -> None:
    view = Augment(size=size, mean=(0.4, 0.5, 0.6))
    loader = Loader(shards, batch_size=5, augment=view, device="cpu", shuffle=False)
    batch = next(iter(loader))
    paths = [shards.parent / "data" / loader.path_of(int(index)) for index in batch.index]
    predict(Recording(), paths, classes=("a", "b"), augment=replace(view, crop=(0.5, 1.0), flip=1.0), device="cpu")
    seen = Recording.seen.pop()
    assert torch.equal(seen, batch.images)
    assert seen.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("renderer", ["native", "opencv"])
def test_decoding_at_reduced_scale_shifts_no_pixel(renderer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waves of 60 pixels are seven pixels long at decode scale 1/8, so a shift by half a pixel would be 50 levels off."""
    y, x = np.mgrid[:900, :1203]
    image = np.stack([127 + 120 * np.sin(2 * np.pi * part / 60) for part in (x, y, x + y)], axis=2).astype(np.uint8)
    data = encoded(image, quality=95)
    augment = Augment(
        size=(64, 48), crop=(0.3, 0.9), crop_ratio=(0.4, 2.5), rotate=15, flip=0.5, flip_vertical=0.5, fill="photo"
    )
    indices, sizes = np.arange(24), np.full((24, 2), image.shape[:2])
    request = Request.drawn(augment, indices, sizes, seed=0, epoch=0, step=0)
    samples = SampleSource(EncodedFiles([data] * len(sizes), sizes))

    def render() -> NDArray[Any]:
        backend = create(renderer, augment, samples, Setup(torch.device("cpu"), torch.uint8, len(sizes), 2))
        ((_, images),) = backend.run([request])
        return images.float().numpy()

    reduced = render()
    footprint = request.warp.footprint
    assert set(decode_scales(footprint).tolist()) >= {4, 8}
    monkeypatch.setattr(geometry, "decode_scales", lambda footprint: np.ones(len(footprint), np.int64))
    assert np.abs(reduced - render()).mean() < 3


def test_shrinking_leaves_two_to_four_boxes_per_pixel_on_each_axis() -> None:
    footprint = np.random.default_rng(0).uniform(1, 60, (500, 2)) ** 2
    factors = geometry.shrink_factors(footprint)
    left = np.sqrt(footprint) / factors
    assert (left[factors > 1] >= 2 - 1e-9).all()
    assert (left < 4 + 1e-9).all()
    half = geometry.blur_kernels(geometry.blur_variance(footprint, factors))
    assert np.allclose(2 * half.sum(axis=-1) - half[..., 0], 1), "no weight is cut off"
    assert (half >= -1e-6).all()
