"""What a Batch shows of itself: a line, its pixels and a figure."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from fastflower import Augment, Batch, Loader
from fastflower.errors import ArgumentError

SMALL = Augment(size=48, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))


def batch_of(shards: Path, **options: Any) -> Batch:
    loader = Loader(shards, **{"augment": SMALL, "batch_size": 20, "device": "cpu", "shuffle": False, **options})
    return next(iter(loader))


def titles(batch: Batch, images: int = 16) -> list[str]:
    return [axes.get_title() for axes in batch.show(images).axes]


def test_a_batch_is_still_a_tuple_of_three_tensors(shards: Path) -> None:
    batch = batch_of(shards)
    images, labels, index = batch
    assert isinstance(batch, tuple)
    assert len(batch) == 3
    assert batch == (images, labels, index)
    assert (batch.images, batch.labels, batch.index) == (images, labels, index)
    moved: Any = pytree.tree_map(torch.clone, batch)  # as torch's own tools move batches
    assert type(moved) is Batch


@pytest.mark.parametrize("copied", [copy.copy, lambda batch: pickle.loads(pickle.dumps(batch))])
def test_a_copy_shows_the_same(shards: Path, copied: Any) -> None:
    batch = batch_of(shards)
    other = copied(batch)
    assert all(torch.equal(one, two) for one, two in zip(batch, other, strict=True))
    np.testing.assert_array_equal(other.pixels(), batch.pixels())
    assert titles(other) == titles(batch)


def test_its_repr_is_one_short_line(shards: Path) -> None:
    line = "images=float32 (20, 3, 48, 48), labels=int64 (20,), index=int64 (20,), device=cpu"
    assert repr(batch_of(shards)) == f"Batch({line})"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixels_are_those_of_a_uint8_batch(shards: Path, dtype: torch.dtype) -> None:
    """Loaders of all dtypes render the same pixels; only the precision of the dtype is lost."""
    expected = batch_of(shards, dtype=torch.uint8).images.permute(0, 2, 3, 1).numpy()
    found = batch_of(shards, dtype=dtype).pixels()
    assert found.dtype == np.uint8
    assert abs(found.astype(int) - expected).max() <= (1 if dtype != torch.bfloat16 else 2)


def test_a_figure_holds_the_first_images_and_the_names_of_their_classes(shards: Path) -> None:
    batch = batch_of(shards)
    assert batch.classes
    figure = batch.show(6)
    assert [axes.get_title() for axes in figure.axes[:6]] == [batch.classes[label] for label in batch.labels[:6]]
    for axes, pixels in zip(figure.axes, batch.pixels()[:6], strict=False):
        np.testing.assert_array_equal(axes.images[0].get_array(), pixels)
    assert [len(axes.images) for axes in figure.axes] == [1] * 6
    assert len(titles(batch, 1000)) == 20
    assert titles(batch_of(shards, dtype=torch.uint8)) == titles(batch)


def test_a_figure_is_a_png_that_pyplot_does_not_keep(shards: Path) -> None:
    from matplotlib import pyplot

    figure: Any = batch_of(shards).show()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []  # a notebook would show those a second time


def test_mixed_classes_have_weights(shards: Path) -> None:
    batch = batch_of(shards, augment=Augment(size=48, mixup=0.4), tail="drop")
    assert batch.classes
    for title, weights in zip(titles(batch), batch.labels, strict=False):
        shares = [(weight, batch.classes[label]) for label, weight in enumerate(weights.tolist()) if weight >= 0.05]
        single = len(shares) == 1
        expected = ", ".join(name if single else f"{name} {weight:.1f}" for weight, name in sorted(shares)[::-1])
        assert title == expected


def test_samples_without_a_label_have_no_title(shards: Path) -> None:
    batch = batch_of(shards)
    batch.labels[1] = -1
    assert [bool(title) for title in titles(batch, 3)] == [True, False, True, False]  # the fourth cell is empty


def test_names_are_drawn_as_they_are_and_shortened(shards: Path) -> None:
    batch = batch_of(shards)
    batch.classes = ("$a_b$", "\udce9", "a" * 100, "c", "d")
    batch.labels[:3] = torch.arange(3)
    assert titles(batch, 3)[:3] == ["$a_b$", "\\udce9", "a" * 27 + "…"]
    batch.show(3)._repr_png_()  # pyright: ignore[reportPrivateUsage]  (what a notebook calls)


def test_a_batch_that_no_loader_made_says_what_it_lacks(shards: Path) -> None:
    loader = Loader(shards, augment=SMALL, batch_size=20, device="cpu")
    batch = Batch(*next(iter(loader)))
    message = (
        "Batch: its normalization is not known, because it is a copy or was not made by a Loader; set "
        "batch.classes and batch.augment to those of the loader."
    )
    with pytest.raises(ArgumentError) as caught:
        batch.show()
    assert str(caught.value) == message
    batch.classes, batch.augment = loader.manifest.classes, loader.augment
    assert titles(batch)[0] in loader.manifest.classes


def test_a_batch_without_names_shows_labels() -> None:
    images, labels = torch.zeros((2, 3, 8, 8), dtype=torch.uint8), torch.tensor([3, 0])
    assert titles(Batch(images, labels, labels)) == ["class 3", "class 0"]


@pytest.mark.parametrize("images", [0, 1.5, "8"])
def test_the_number_of_images_is_checked(shards: Path, images: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^images must be an integer, at least 1, got"):
        batch_of(shards).show(images)
