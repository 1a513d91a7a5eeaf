"""When a batch does not fit in the memory of a GPU: the batch size that the message names, from an estimate."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastflower import Augment, Recipe
from fastflower.errors import DeviceError
from fastflower.models.backbone import skeleton_of
from fastflower.models.recomputation import bytes_per_image
from fastflower.training.command import Call
from fastflower.training.failures import explaining

CUDA = torch.device("cuda", 0)
RECIPE = Recipe(backbone="resnet18", augment=Augment(size=64), batch_size=64, precision="float32")


def message(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, room: float) -> str:
    """Return the message for a GPU on which `room` bytes are free or ours."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (int(room) // 4, 0))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: int(room) - int(room) // 4)
    call = Call(shards="shards", recipe=recipe, out=Path("runs/none"))
    with pytest.raises(DeviceError) as caught, explaining(call, CUDA):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    return str(caught.value)


def needed(recipe: Recipe, batch: int) -> float:
    """The least memory for which a batch is said to fit."""
    weights = sum(parameter.numel() for parameter in skeleton_of(recipe.backbone).parameters())
    return (16 * weights + batch * bytes_per_image(recipe)) / 0.8 + 8


@pytest.mark.parametrize("batch", [32, 16, 8])
def test_the_batch_size_fits_by_an_estimate_and_keeps_the_images_per_update(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    text = message(monkeypatch, RECIPE, needed(RECIPE, batch))
    start = (
        "batch_size 64 does not fit in the memory of cuda:0 (CUDA out of memory. Tried to allocate 20.00 MiB.); try "
    )
    flags = (
        f"batch_size={batch}, accumulate={64 // batch}, which should fit by an estimate and keeps the number of images "
    )
    assert text.startswith(start + flags)
    found = re.search(r"train\('shards', (.*), out='runs/none'\)$", text)
    assert found
    assert eval(found[1]) == replace(RECIPE, batch_size=batch, accumulate=64 // batch)


def test_bfloat16_takes_half_and_checkpointing_less(monkeypatch: pytest.MonkeyPatch) -> None:
    room = needed(RECIPE, 16)
    assert "batch_size=32," in message(monkeypatch, replace(RECIPE, precision="bfloat16"), room)
    frugal = message(monkeypatch, replace(RECIPE, checkpointing=True), room)
    assert "batch_size=32," in frugal or "batch_size=16," in frugal
    assert "--checkpointing," not in frugal


def test_if_nothing_fits_the_smallest_batch_is_named_without_a_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "try batch_size=1, accumulate=64, which may still be too much" in message(monkeypatch, RECIPE, 1e6)


def test_a_batch_that_cannot_be_halved_leaves_the_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    text = message(monkeypatch, replace(RECIPE, batch_size=33), 1e12)
    assert text.endswith(
        "MiB.); keep fewer activations (--checkpointing, checkpointing=True), or lower augment.size (--augment.size)."
    )


@pytest.mark.parametrize("changes", [{"backbone": "vgg11"}, {"checkpointing": True}, {"compile": True}])
def test_checkpointing_is_named_only_where_it_can_be_added(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    text = message(monkeypatch, Recipe.from_dict(RECIPE.to_dict() | changes), 1e12)
    assert "per update, or lower augment.size (--augment.size)." in text
    assert "--checkpointing," not in text
