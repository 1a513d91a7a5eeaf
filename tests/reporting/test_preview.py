"""The preview shows the images that training and validation get."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastflower import Augment, Loader, Recipe
from fastflower.cli import main
from fastflower.errors import ArgumentError
from fastflower.models.inference import view_of
from fastflower.reporting.preview import preview, views

AUGMENT = Augment(size=48, resize=56, crop=(0.3, 1.0), flip=0.5, rotate=20, hue=0.1, erase=0.5)
RECIPE = Recipe(augment=AUGMENT, epochs=5, sizes=(32, 48), seed=4)


def levels(images: np.ndarray) -> np.ndarray:
    """Convert normalized images (N, 3, H, W) to pixel values (N, H, W, 3)."""
    mean, std = AUGMENT.normalization
    return np.rint(255 * np.clip(images.transpose(0, 2, 3, 1) * std + mean, 0, 1))


@pytest.mark.parametrize("count", [3, 4])
def test_columns_equal_the_images_that_training_and_validation_get(count: int, shards: Path) -> None:
    classes, columns = views(shards, RECIPE, count, 3)
    assert list(columns) == ["validation", "epoch 1", "epoch 3", "epoch 5"]
    for title, found in columns.items():
        epoch = 0 if title == "validation" else int(title.removeprefix("epoch ")) - 1
        augment = view_of(RECIPE) if title == "validation" else RECIPE.augment_at(epoch)
        loader = Loader(shards, batch_size=8, augment=augment, seed=RECIPE.seed, device="cpu")  # as in train
        loader.set_epoch(epoch)
        loaded: dict[int, Any] = {}
        for images, labels, indices in loader:
            loaded |= dict(zip(indices.tolist(), zip(images, labels, strict=True), strict=True))
        expected = levels(np.stack([loaded[index][0].numpy() for index in range(count)]))
        assert found.dtype == np.uint8
        assert np.abs(found - expected).max() <= 1  # sums in another order round differently
        assert classes == [loader.manifest.classes[loaded[index][1]] for index in range(count)]


def test_mixup_works_with_an_odd_number_of_images(shards: Path) -> None:
    recipe = replace(RECIPE, augment=replace(AUGMENT, mixup=0.4))
    _, mixed = views(shards, recipe, 5, 1)
    _, plain = views(shards, RECIPE, 5, 1)
    assert np.array_equal(mixed["validation"], plain["validation"])
    assert not np.array_equal(mixed["epoch 1"], plain["epoch 1"])


def test_no_image_and_no_epoch_is_shown_twice(shards: Path) -> None:
    classes, columns = views(shards, replace(RECIPE, epochs=2), 200, 9)
    assert len(classes) == 120
    assert {title: len(images) for title, images in columns.items()} == {
        "validation": 120, "epoch 1": 120, "epoch 2": 120,
    }  # fmt: skip


def test_the_preview_command_writes_a_png(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "seen.png"
    flags = ["--images", "2", "--draws", "3", "--augment.size", "64", "--augment.hue", "0.2", "--out", str(out)]
    assert main(["preview", str(shards), "--recipe", "scratch", *flags]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width / image.height == pytest.approx((4 * 1.6 + 0.4) / (2 * 1.6 + 0.3), rel=0.02)
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 1000  # not blank
    first = out.read_bytes()
    assert main(["preview", str(shards), "--recipe", "scratch", *flags]) == 0
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"images": 0}, "images must be an integer from 1 to 100, got 0."),
        ({"draws": 101}, "draws must be an integer from 1 to 100, got 101."),
        ({"out": "seen.jpg"}, "out must be a .png file, got 'seen.jpg'."),
        (
            {"out": "no/seen.png"},
            f"out: no/seen.png cannot be written ({os.strerror(2)}); choose a file in an existing, writable folder (--out).",
        ),
    ],
)
def test_invalid_arguments_of_preview_are_explained(
    arguments: dict[str, Any], text: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError) as error:
        preview(shards, RECIPE, **{"draws": 1, "images": 1, **arguments})
    assert str(error.value) == text
    assert list(tmp_path.iterdir()) == []
