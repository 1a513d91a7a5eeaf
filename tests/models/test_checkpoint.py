"""Checkpoints: round trips, safe loading, atomic writes, and errors for unusable files."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastflower.draws.augment import Augment
from fastflower.errors import CheckpointError
from fastflower.models.backbone import build
from fastflower.models.checkpoint import FORMAT_VERSION, Checkpoint
from fastflower.recipes.recipe import Recipe

CLASSES = ("daisy", "dandelion", "roses")
RECIPE = Recipe(weights=None, augment=Augment(size=64, resize=(70, 80), crop=(0.25, 1.0), rotate=10), epochs=4, lr=0.02)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A ResNet-18 with batch norm statistics that differ from a new one's."""
    torch.manual_seed(0)
    network = build("resnet18", len(CLASSES), weights=None)
    network(torch.rand(4, 3, 64, 64))
    return network


@pytest.fixture(scope="module")
def checkpoint(network: nn.Module) -> Checkpoint:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    # With fewer values, batch norms make gradients explode.
    network(torch.rand(4, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    return Checkpoint(
        recipe=RECIPE,
        classes=CLASSES,
        model=network.state_dict(),
        epoch=2,
        history=[{"epoch": 1, "loss": 1.5, "accuracy": 0.25}, {"epoch": 2, "loss": 1.25, "accuracy": 0.5}],
        optimizer=optimizer.state_dict(),
        trained={"weight": torch.arange(3.0)},
        tally={"losses": torch.tensor([1.5, 0.5], dtype=torch.float64), "hits": 3, "seconds": 1.0, "waited": 0.5},
        environment={"torch": str(torch.__version__), "device": "cpu"},
    )


@pytest.fixture
def small() -> Checkpoint:
    """A tiny checkpoint that is written quickly."""
    return Checkpoint(recipe=RECIPE, classes=CLASSES, model={"weight": torch.arange(3.0)}, epoch=1)


def assert_equal(one: Any, other: Any) -> None:
    """Assert equal values of equal types; tensors must be bitwise equal."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert one == other


def test_a_loaded_checkpoint_equals_the_saved_one(tmp_path: Path, checkpoint: Checkpoint) -> None:
    checkpoint.save(tmp_path / "checkpoint.pt")
    loaded = Checkpoint.load(tmp_path / "checkpoint.pt")
    assert loaded.recipe == checkpoint.recipe.resolved
    assert dict(loaded.model).keys() == dict(checkpoint.model).keys()
    for name in ("classes", "epoch", "step", "history", "trained", "tally", "environment"):
        assert_equal(getattr(loaded, name), getattr(checkpoint, name))
    assert_equal(dict(loaded.model), dict(checkpoint.model))
    assert_equal(loaded.optimizer, checkpoint.optimizer)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_paths_may_be_strings_and_other_fields_are_optional(tmp_path: Path, small: Checkpoint) -> None:
    small.save(str(tmp_path / "checkpoint.pt"))
    loaded = Checkpoint.load(str(tmp_path / "checkpoint.pt"))
    assert (loaded.history, loaded.optimizer, loaded.step, loaded.environment) == ([], {}, 0, {})


def test_the_file_loads_without_running_code(tmp_path: Path, checkpoint: Checkpoint) -> None:
    checkpoint.save(tmp_path / "checkpoint.pt")
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert content["format"] == "fastflower"
    assert content["version"] == FORMAT_VERSION
    assert content["recipe"] == RECIPE.to_dict()


def test_a_restored_network_gives_the_same_logits(tmp_path: Path, network: nn.Module, checkpoint: Checkpoint) -> None:
    checkpoint.save(tmp_path / "checkpoint.pt")
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        expected = network.eval()(images)
        assert expected.isfinite().all()
        restored = Checkpoint.load(tmp_path / "checkpoint.pt").network()
        assert not restored.training
        assert torch.equal(restored(images), expected)
        assert not torch.allclose(build("resnet18", 3, weights=None).eval()(images), expected)


def test_saving_replaces_an_existing_file(tmp_path: Path, small: Checkpoint) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"something else")
    with path.open("rb") as reader:  # a reader of the old file is not disturbed
        small.save(path)
        assert reader.read() == b"something else"
    assert Checkpoint.load(path).epoch == 1


def test_a_full_disk_leaves_the_old_file_unchanged(tmp_path: Path, small: Checkpoint) -> None:
    resource = pytest.importorskip("resource")  # Unix only
    path = tmp_path / "checkpoint.pt"
    small.save(path)
    before = path.read_bytes()
    large = Checkpoint(recipe=RECIPE, classes=CLASSES, model={"weight": torch.zeros(10**6)}, epoch=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(
            CheckpointError,
            match=r"checkpoint\.pt: could not be written \(\[Errno 27\] File too large\); any previous file is unchanged\. "
            rf"Make {tmp_path} writable, then resume\.$",
        ):
            large.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_failed_write_leaves_the_old_file_unchanged(
    tmp_path: Path, small: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    small.save(path)
    before = path.read_bytes()

    def fail(_: object, file: Any) -> None:
        file.write(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(
        CheckpointError, match=r"could not be written \(\[Errno 28\] No space left on device\); any previous"
    ):
        small.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_saving_to_a_missing_folder_names_the_path(tmp_path: Path, small: Checkpoint) -> None:
    with pytest.raises(
        CheckpointError, match=r"nowhere.checkpoint\.pt: could not be written \(.*No such file or directory"
    ):
        small.save(tmp_path / "nowhere" / "checkpoint.pt")


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: does not exist; check the path\\.$"):
        Checkpoint.load(path)


@pytest.mark.parametrize("content", [{"weight": torch.zeros(3)}, {}, {"format": "webdataset", "version": 1}])
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(
        CheckpointError,
        match=r"weights\.pth: is not a fastflower checkpoint; pass a checkpoint-best\.pt from train\.$",
    ):
        Checkpoint.load(tmp_path / "weights.pth")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, None])
def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, small: Checkpoint, version: int | None) -> None:
    path = tmp_path / "checkpoint.pt"
    small.save(path)
    content = torch.load(path, weights_only=True)
    if version is None:
        del content["version"]
    else:
        content["version"] = version
    torch.save(content, path)
    with pytest.raises(
        CheckpointError,
        match=rf"checkpoint\.pt: has checkpoint version {version}, but this fastflower reads version {FORMAT_VERSION}; train",
    ):
        Checkpoint.load(path)


def without(name: str) -> Any:
    return lambda content: content.pop(name)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(without("recipe"), "'recipe'", id="no recipe"),
        pytest.param(without("classes"), "'classes'", id="no classes"),
        pytest.param(without("model"), "'model'", id="no model"),
        pytest.param(lambda content: content.update(more=1), "more: Checkpoint has", id="a name too many"),
        pytest.param(lambda content: content["recipe"].update(speed=1), "speed: Recipe has", id="an unknown field"),
        pytest.param(
            lambda content: content["recipe"].update(epochs=0),
            "Recipe.epochs must be an integer, at least 1",
            id="rule",
        ),
        pytest.param(lambda content: content["recipe"]["augment"].update(flip=2), "Augment.flip must be", id="flip"),
        pytest.param(lambda content: content["recipe"].pop("augment"), "'augment'", id="no augment"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, small: Checkpoint, damage: Any, reason: str) -> None:
    path = tmp_path / "checkpoint.pt"
    small.save(path)
    content = torch.load(path, weights_only=True)
    damage(content)
    torch.save(content, path)
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint\.pt: is damaged or from another version of fastflower "
        rf"\(.*{re.escape(reason)}.*\); pass another one\.$",
    ):
        Checkpoint.load(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, small: Checkpoint, share: float) -> None:
    path = tmp_path / "checkpoint.pt"
    small.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint\.pt: was not written by torch\.save, is truncated, or holds more .*; pass another file\.$",
    ):
        Checkpoint.load(path)


def test_two_names_of_one_checkpoint_are_written_once(tmp_path: Path, small: Checkpoint) -> None:
    """A later save to either name leaves the other file unchanged."""
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    last.write_bytes(b"something else")
    small.save(best)
    small.save(last, twin=best)
    assert best.samefile(last)
    kept = best.read_bytes()
    replace(small, epoch=2).save(last)
    assert best.read_bytes() == kept
    assert [Checkpoint.load(path).epoch for path in (best, last)] == [1, 2]
    small.save(last, twin=best)
    small.save(last, twin=best)
    replace(small, epoch=3).save(best)
    assert [Checkpoint.load(path).epoch for path in (best, last)] == [3, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "last.pt"}


def test_after_a_kill_between_two_names_the_next_save_writes_only_one(tmp_path: Path, small: Checkpoint) -> None:
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    small.save(best)
    last.with_name("last.pt.part").hardlink_to(best)  # left behind by a kill before the rename
    kept = best.read_bytes()
    replace(small, epoch=2).save(last)
    assert best.read_bytes() == kept
    last.with_name("last.pt.part").hardlink_to(best)
    small.save(last, twin=best)
    assert best.samefile(last)
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "last.pt"}


def test_without_hard_links_two_files_are_written(
    tmp_path: Path, small: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    small.save(best)
    small.save(last, twin=best)
    assert not best.samefile(last)
    assert Checkpoint.load(last).epoch == Checkpoint.load(best).epoch == 1
