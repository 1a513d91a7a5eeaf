"""What people report of other loaders when they change to one, tried on ours."""

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from packs import drawn
from torch.utils.data import DataLoader

from fastflower import Augment, Loader, pack

OPTIONS: dict[str, Any] = {"augment": Augment(size=32), "batch_size": 4, "device": "cpu", "workers": 1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of 33 images of three classes to train on; the val split lacks the first class."""
    root = tmp_path_factory.mktemp("partly")
    drawn(root / "images" / "train", a=11, b=11, c=11)
    drawn(root / "images" / "val", b=3, c=2)
    pack(root / "images", root / "shards")
    return root / "shards"


def test_a_class_that_val_lacks_changes_no_label(shards: Path) -> None:
    """ImageFolder numbers the classes of each folder anew."""
    train, val = (Loader(shards, split, **OPTIONS) for split in ("train", "val"))
    assert train.classes == val.classes == ("a", "b", "c")
    pairs = [
        (val.paths[i], val.classes[label]) for batch in val for i, label in zip(batch.index, batch.labels, strict=True)
    ]
    assert all(path.split("/")[1] == name for path, name in pairs)
    assert {name for _, name in pairs} == {"b", "c"}


def test_more_ranks_than_shards_have_the_same_number_of_steps(shards: Path) -> None:
    """Where ranks take whole shards, a rank without one makes the others wait forever."""
    steps = [len(list(Loader(shards, **OPTIONS, rank=rank, world_size=8))) for rank in range(8)]
    assert steps == [1] * 8


def test_training_meets_no_batch_of_one_image(shards: Path) -> None:
    """Batch norm raises an error for one; 33 images leave one over."""
    norm = torch.nn.BatchNorm1d(3)
    loader = Loader(shards, **OPTIONS)
    for images, _, _ in loader:
        norm(images.mean(dim=(2, 3)))
    assert {len(batch.index) for batch in loader} == {4}


def test_the_length_is_the_number_of_batches_also_through_a_dataloader(shards: Path) -> None:
    for split in ("train", "val"):
        loader = Loader(shards, split, **OPTIONS)
        wrapped = DataLoader(loader, batch_size=None)
        assert len(wrapped) == len(loader) == len(list(wrapped)) == len(list(loader))


def test_each_epoch_after_a_resumed_one_has_an_order_of_its_own(shards: Path) -> None:
    """Some loaders repeat the order of the resumed epoch in the next."""
    whole, first, later = (Loader(shards, **OPTIONS) for _ in range(3))
    orders = [[batch.index.tolist() for batch in whole] for _ in range(3)]
    for _ in islice(first, 5):
        pass
    later.load_state_dict(first.state_dict())
    assert [[batch.index.tolist() for batch in later] for _ in range(3)] == [orders[0][5:], *orders[1:]]
    assert len({str(order) for order in orders}) == 3


def test_the_global_generators_change_nothing_and_stay_as_they_are(shards: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = [batch.index.tolist() for batch in Loader(shards, **OPTIONS)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert [batch.index.tolist() for batch in Loader(shards, **OPTIONS)] == one


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_stands_where_the_loader_stands_and_goes_its_own_way(shards: Path, copied: Any) -> None:
    loader = Loader(shards, **OPTIONS)
    for _ in islice(loader, 3):
        pass
    other = copied(loader)
    assert other.state_dict() == loader.state_dict()
    assert len(list(other)) == len(loader)
    assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (0, 3)


def test_loaders_in_a_zip_and_iterators_that_nobody_uses_end(shards: Path) -> None:
    train, val = (Loader(shards, split, **OPTIONS) for split in ("train", "val"))
    assert len(list(zip(train, val, strict=False))) == len(val)
    unused = [iter(train) for _ in range(3)]
    assert len(list(train)) == len(train)
    del unused
    assert train.state_dict()["epoch"] == 2
