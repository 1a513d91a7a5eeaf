"""What a Loader takes, and what it says to arguments that it does not take."""

import inspect
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packs import exactly
from torch.utils.data import DataLoader, DistributedSampler, random_split
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from fastflower import Augment, Loader, pack
from fastflower.errors import ArgumentError, DeviceError, ShardError

SMALL = Augment(size=32, resize=36)


def make(shards: Path, **options: Any) -> Loader:
    return Loader(shards, **{"augment": SMALL, "batch_size": 16, "device": "cpu", **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ArgumentError, "batch_size must be an integer, at least 1, got 0"),
        (
            {"batch_size": 121},
            ArgumentError,
            r"batch_size: the global batch of 121 samples exceeds the 120 samples .* lower batch_size \(--batch-size\)",
        ),
        ({"workers": 0}, ArgumentError, "workers must be an integer, at least 1, got 0"),
        ({"window": 0}, ArgumentError, "window must be an integer, at least 1 shard, got 0"),
        ({"tail": "cut"}, ArgumentError, "tail must be 'drop', 'keep' or 'pad', got 'cut'"),
        ({"on_bad": "ignore"}, ArgumentError, "on_bad must be 'fail' or 'skip', got 'ignore'"),
        ({"dtype": torch.int32}, ArgumentError, "dtype must be one of torch.float32"),
        ({"rank": 0}, ArgumentError, "rank and world_size belong together"),
        ({"rank": 2, "world_size": 2}, ArgumentError, "rank must be from 0 to world_size - 1 = 1, got 2"),
        ({"backend": "pil"}, ArgumentError, "backend must be one of native, opencv, dali, triton, got 'pil'"),
        ({"split": "test"}, ShardError, "has no samples in split 'test'; choose from train, val"),
    ],
)
def test_arguments_outside_their_rule_are_named(
    shards: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(shards, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_a_gpu_is_an_error_with_the_remedy(shards: Path) -> None:
    with pytest.raises(DeviceError, match=r"device='cuda': this machine.*has no CUDA; omit device to use the CPU"):
        make(shards, device="cuda")
    with pytest.raises(DeviceError, match=r"^device=0: this machine.*has no CUDA; omit device"):
        make(shards, device=0)


NO_INTEGER: list[Any] = [None, 1.0, True, np.inf, -1, 2**64, "4", [4], np.float32(4), torch.tensor(4)]
INTEGERS = {
    "batch_size": "an integer, at least 1",
    "seed": "an integer within 64 bits",
    "workers": "an integer, at least 1",
    "window": "an integer, at least 1 shard",
    "cache": "'auto', None or a number of bytes",
    "rank": "from 0 to world_size - 1 = 7",
    "world_size": "an integer, at least 1",
    "fold": "from 0 to 2",
}
OTHERS: dict[str, tuple[str, list[Any]]] = {
    "split": ("a name such as 'train' or 'val'", [None, 0, ["train"], b"train"]),
    "shuffle": ("True, False or 'balanced'", ["yes", 1, 0, 1.0, "Balanced", []]),
    "tail": ("'drop', 'keep' or 'pad'", [True, 0, ["keep"], "KEEP", np.arange(3)]),
    "on_bad": ("'fail' or 'skip'", [None, True, "warn"]),
    "dtype": ("one of torch.float32", ["float32", np.float32, torch.int64, float, 0]),
    "device": ("cpu, cuda or cuda:NUMBER", [True, 1.5, "", "gpu", "mps", "meta", [0], -1, 2**64]),
    "backend": ("one of native, opencv, dali, triton", ["Native", True, 0, ["opencv"]]),
}


@pytest.fixture(scope="module")
def folds(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "folds"
    pack(flowers, out, folds=3)
    return out


@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_no_integer_or_out_of_range_is_named_with_the_rule(folds: Path, name: str) -> None:
    optional = ("workers", "window", "cache", "fold")
    options = {"rank": 0, "world_size": 8} if name in ("rank", "world_size") else {}
    for value in NO_INTEGER[name in optional or bool(options) :]:
        if name == "seed" and value == -1:
            continue
        with pytest.raises(ArgumentError, match=f"^{name} must be {INTEGERS[name]}.*, got "):
            make(folds, **{**options, name: value})


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_choice_is_named_with_the_rule(shards: Path, name: str) -> None:
    rule, values = OTHERS[name]
    for value in values:
        with pytest.raises(ArgumentError, match=f"^{name} must be {rule}.*, got "):
            make(shards, **{name: value})


def test_a_gpu_that_the_machine_lacks_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=exactly("device='cuda:2': this machine has only 2 GPUs; omit device.")):
        make(shards, device="cuda:2")
    with pytest.raises(DeviceError, match=exactly("device=2: this machine has only 2 GPUs; omit device.")):
        make(shards, device=2)


def test_numpys_numbers_are_plain_in_the_state_and_in_a_pickle(folds: Path, tmp_path: Path) -> None:
    """A checkpoint with weights_only=True loads only plain values."""
    numbers: dict[str, Any] = {
        "batch_size": np.int64(4), "seed": np.int32(7), "fold": np.uint8(1), "rank": np.int64(1), "workers": np.int16(2),
        "world_size": np.int64(2), "window": np.int64(1), "cache": np.int64(1 << 20), "shuffle": np.bool_(True),
    }  # fmt: skip
    loader, plain = make(folds, **numbers), make(folds, **{name: value.item() for name, value in numbers.items()})
    loader.set_epoch(np.int64(3))  # pyright: ignore[reportArgumentType]  (numpy's integers do not say that they are integers)
    plain.set_epoch(3)
    assert repr(loader.state_dict()) == repr(plain.state_dict())
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    plain.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    kept = [[getattr(one, name) for name in numbers] for one in (loader, plain, pickle.loads(pickle.dumps(loader)))]
    assert repr(kept[0]) == repr(kept[1]) == repr(kept[2])


WORDS = {
    name
    for kind in (DataLoader, DistributedSampler, ImageFolder)
    for name in inspect.signature(kind.__init__).parameters
} - {"allow_empty"}
OURS = set(inspect.signature(Loader.__init__).parameters)
SAID = {
    "num_workers": "pass workers, a number of threads, or leave it out for one more than the cores",
    "drop_last": "pass tail='drop' for drop_last=True, tail='keep' for drop_last=False",
    "sampler": "pass shuffle=True, False or 'balanced'; each rank takes its share (rank, world_size)",
    "collate_fn": "leave it out: a batch is always (images, labels, index)",
    "pin_memory": "leave it out: batches are on `device` already",
    "generator": "pass seed, on which order and augmentation depend",
    "transform": "pass it as augment, which takes an Augment or a torchvision transform",
}


@pytest.mark.parametrize("name", sorted(WORDS - OURS | {"pin_memory_device", "in_order"}))
def test_the_arguments_of_a_dataloader_are_answered_with_what_stands_for_them(shards: Path, name: str) -> None:
    said = rf"{name}: Loader has no such argument; (pass|leave it out:|change) .*\."
    with pytest.raises(
        ArgumentError, match=exactly(f"{name}: Loader has no such argument; {SAID[name]}.") if name in SAID else said
    ):
        make(shards, **{name: 2})


def test_all_unknown_arguments_are_named_at_once(shards: Path) -> None:
    foreign = {"num_workers": 4, "pin_memory": True, "drop_last": True, "collate_fn": list, "sampler": None}
    with pytest.raises(ArgumentError) as told:
        make(shards, **foreign)
    assert str(told.value).splitlines() == [f"{name}: Loader has no such argument; {SAID[name]}." for name in foreign]
    with pytest.raises(
        ArgumentError, match=r"^x: Loader.from_files has .*\ntimeout: Loader.from_files has no such argument"
    ):
        Loader.from_files("data", x=2, timeout=3)  # pyright: ignore[reportCallIssue]  (what a user may try)


def test_an_unknown_argument_is_answered_with_the_near_one(shards: Path) -> None:
    with pytest.raises(ArgumentError, match=exactly("windows: Loader has no such argument; did you mean window?")):
        make(shards, windows=2)
    with pytest.raises(
        ArgumentError, match=r"^x: Loader has no such argument; it has shards, split, fold, .*, workers\.$"
    ):
        make(shards, x=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bs": 16}, "bs: Loader has no such argument; did you mean batch_size?"),
        ({"size": 64}, "size: Loader has no such argument; did you mean augment=Augment(size=...)?"),
        ({"image_size": 64}, "image_size: Loader has no such argument; did you mean augment=Augment(size=...)?"),
        ({"transforms": None}, f"transforms: Loader has no such argument; {SAID['transform']}."),
    ],
)
def test_words_of_other_tools_are_answered(shards: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=exactly(said)):
        make(shards, **options)
    said = said.replace("Loader has", "Loader.from_files has")
    with pytest.raises(ArgumentError, match=exactly(said)):
        Loader.from_files("data", **options)


def test_shards_by_another_name_or_none_are_asked_for(shards: Path) -> None:
    said = "dataset: Loader has no such argument; pass shards, the folder that pack wrote, in its place."
    with pytest.raises(ArgumentError, match=exactly(said)):
        Loader(dataset=shards, batch_size=16)  # pyright: ignore[reportCallIssue]  (what a user may try)
    with pytest.raises(
        ArgumentError, match=exactly("Loader needs shards, the folder that pack wrote, as in Loader('shards').")
    ):
        Loader(batch_size=16)  # pyright: ignore[reportCallIssue]  (as above)
    assert Loader(shards=shards, device="cpu").num_samples == 120


def test_a_split_in_the_place_of_shards_and_one_by_another_name_are_answered(shards: Path) -> None:
    said = f"{shards}/train: is a split of the pack {shards}; pass Loader({str(shards)!r}, 'train')."
    with pytest.raises(ShardError, match=exactly(said)):
        make(shards / "train")
    for name, near in (("valid", "val"), ("Validation", "val"), ("training", "train")):
        with pytest.raises(ShardError, match=exactly(f"{shards}: has no split '{name}'; did you mean '{near}'?")):
            make(shards, split=name)


def test_a_folder_of_images_is_answered_with_calls_that_work(
    flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(flowers)
    with pytest.raises(
        ShardError, match=r"^data: is a folder of images, not shards; pack it once, then load it:\n"
    ) as told:
        Loader("data")
    first, second = str(told.value).splitlines()[1:]
    assert (first, second) == ("  pack('data', 'shards')", "  Loader('shards', 'train')")
    assert eval(f"{first.strip()} and {second.strip()}").num_samples == 120


def test_a_type_checker_still_refuses_unknown_arguments() -> None:
    parameter = inspect.signature(Loader.__init__).parameters["unknown"]
    assert (parameter.kind, str(parameter.annotation)) == (inspect.Parameter.VAR_KEYWORD, "typing.Never")


def test_shards_that_are_no_place_are_refused(flowers: Path) -> None:
    for place in (None, 3, ["a.jpg"], ImageFolder(str(flowers))):
        said = f"shards must be a folder that pack wrote, its URL or a Remote, got an object of type {type(place).__name__}"
        with pytest.raises(ArgumentError, match=f"^{said}"):
            Loader(place)  # pyright: ignore[reportArgumentType]  (what a user may try)


STEPS = [transforms.RandomResizedCrop(32, scale=(0.3, 1.0)), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
STEPS_V2 = [v2.RandomResizedCrop(32, scale=(0.3, 1.0)), v2.RandomHorizontalFlip(), v2.ToImage()]


@pytest.mark.parametrize(
    "transform",
    [
        transforms.Compose(STEPS),
        v2.Compose([*STEPS_V2, v2.ToDtype(torch.float32, scale=True)]),
        torch.nn.Sequential(*STEPS_V2),
    ],
    ids=["v1", "v2", "Sequential"],
)
def test_a_torchvision_transform_is_taken_as_augment(shards: Path, transform: Any) -> None:
    loader, other = make(shards, augment=transform), make(shards)
    other.set_augment(transform)
    expected = Augment(size=(32, 32), crop=(0.3, 1.0), flip=0.5, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert loader.augment == other.augment == expected
    assert torch.equal(next(iter(loader)).images, next(iter(other)).images)


def test_the_transforms_of_pretrained_weights_are_taken_as_augment(shards: Path) -> None:
    taken = make(shards, augment=ResNet18_Weights.DEFAULT.transforms()).augment
    assert taken == Augment(size=(224, 224), resize=256).resolved


@pytest.mark.parametrize("made", [ResNet18_Weights.DEFAULT.transforms, ResNet18_Weights.DEFAULT, transforms.RandomCrop])
def test_what_only_makes_a_transform_is_answered_with_the_call(shards: Path, made: Any) -> None:
    said = r"only makes a transform; pass what it makes, such as weights\.transforms\(\), with parentheses\.$"
    with pytest.raises(ArgumentError, match=said):
        make(shards, augment=made)


@pytest.mark.parametrize(
    "augment", [{"flip": 0.5}, lambda image: image, Augment, "auto", [transforms.ToTensor()], 0, False]
)
def test_what_is_no_augment_is_refused_with_what_stands_for_it(shards: Path, augment: Any) -> None:
    loader = make(shards)
    for use in (lambda: make(shards, augment=augment), lambda: loader.set_augment(augment)):
        with pytest.raises(
            ArgumentError,
            match=r"^augment must be an Augment or a torchvision transform, got .*; a Loader calls no Python function for "
            r"each image: write Augment\(.*\), or call the function on batch.images\.$",
        ):
            use()


def test_epochs_steps_and_indices_outside_their_range_are_named(shards: Path) -> None:
    loader = make(shards)
    for value in (None, 1.0, True, -1, 2**64, "1"):
        with pytest.raises(ArgumentError, match=r"^epoch must be an integer, at least 0.*, got "):
            loader.set_epoch(value)  # pyright: ignore[reportArgumentType]  (what a user may pass)
        with pytest.raises(ArgumentError, match=r"^epoch must be an integer, at least 0.*, got "):
            loader.indices(value, 0)  # pyright: ignore[reportArgumentType]  (as above)
    for step in (1.0, -1, 7):
        with pytest.raises(ArgumentError, match=rf"^step must be an integer from 0 to 6, got {step}\.$"):
            loader.indices(0, step)  # pyright: ignore[reportArgumentType]  (as above)
    for call in (loader.image, loader.where, loader.path_of):
        for index in (1.0, True, -1, 120, torch.tensor(1.0)):
            with pytest.raises(ArgumentError, match=r"^index must be an integer from 0 to 119, got "):
                call(index)  # pyright: ignore[reportArgumentType]  (as above)


def test_the_index_of_a_batch_gives_the_names_of_its_files(shards: Path) -> None:
    loader = make(shards, split="val")
    index = next(iter(loader)).index
    paths = [loader.path_of(i) for i in index]
    assert paths == [loader.path_of(np.int64(i)) for i in index.tolist()]
    assert paths == [loader.paths[i] for i in index] == list(loader.paths[:16])
    assert loader.image(index[3]).shape == loader.image(3).shape
    assert loader.where(index[3]) == loader.where(3)


def test_a_state_of_something_else_is_refused(shards: Path) -> None:
    loader = make(shards)
    state = loader.state_dict()
    for other, missing in (
        (None, "epoch"),
        ([1, 2], "epoch"),
        ({}, "epoch"),
        (torch.nn.Linear(1, 1).state_dict(), "epoch"),
        ({"epoch": 3, "step": 2, "model": {}}, "shards"),
    ):
        said = f"load_state_dict: state must be what state_dict of a Loader returned, but it has no '{missing}': "
        with pytest.raises(ArgumentError, match=f"^{said}"):
            loader.load_state_dict(other)  # pyright: ignore[reportArgumentType]  (what a user may pass)
    for name, value, rule in (
        ("epoch", -1, "at least 0"),
        ("epoch", 1.5, "at least 0"),
        ("step", -1, "from 0 to 7"),
        ("step", 8, "from 0 to 7"),
        ("step", None, "from 0 to 7"),
    ):
        with pytest.raises(ArgumentError, match=rf"^state\['{name}'\] must be an integer,? {rule}, got {value}\.$"):
            loader.load_state_dict({**state, name: value})
    assert loader.state_dict() == state


def test_a_batch_that_is_too_large_for_all_ranks_is_named_with_its_parts(shards: Path) -> None:
    said = r"^batch_size: the global batch of 132 samples \(33 on each of 4 ranks\) exceeds the 120 samples of split 'train'"
    with pytest.raises(ArgumentError, match=said):
        make(shards, batch_size=33, rank=0, world_size=4)


def test_a_loader_names_its_classes_and_what_images_are_normalized_with(shards: Path) -> None:
    loader = make(shards, augment=Augment(size=32, resize=36, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    raw = make(shards, dtype=torch.uint8)
    assert loader.classes == loader.manifest.classes
    assert (loader.mean, loader.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (raw.mean, raw.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's
    images, levels = next(iter(loader)).images, next(iter(raw)).images.float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (loader.mean, loader.std))
    torch.testing.assert_close(images, (levels / 255 - mean) / std, atol=0.02, rtol=0)


def test_attributes_of_a_dataloader_and_its_data_set_are_answered(shards: Path) -> None:
    loader = make(shards, split="val")
    said = "a Loader has no attribute 'dataset': len(loader.dataset) is loader.num_samples; the classes are loader.classes, "
    with pytest.raises(AttributeError, match=f"^{re.escape(said)}"):
        len(loader.dataset)  # pyright: ignore[reportAttributeAccessIssue]  (what a user may try)
    names = ["sampler", "class_to_idx", "samples", "imgs", "targets", "num_workers", "drop_last"]
    names += ["batch_sampler", "collate_fn", "pin_memory", "epoch", "transform"]
    for name in names:
        with pytest.raises(AttributeError, match=rf"^a Loader has no attribute '{name}': .*loader\.\w+"):
            getattr(loader, name)
    with pytest.raises(AttributeError, match=exactly("a Loader has no attribute 'length'")):
        getattr(loader, "length")  # noqa: B009  (which a type checker would report)
    assert not any(hasattr(loader, name) for name in names)
    labels = loader.manifest.index(loader.split)["label"].tolist()
    assert labels == [label for batch in loader for label in batch.labels.tolist()]


def test_a_loader_is_not_indexed_nor_split(shards: Path) -> None:
    part, _ = random_split(make(shards), [0.5, 0.5])  # pyright: ignore[reportArgumentType]  (what a user may try)
    said = "a Loader yields batches in a for loop; image(index) is one image, and paths[index] its path."
    with pytest.raises(ArgumentError, match=exactly(said)):
        part[0]


def test_a_loader_is_no_iterator(shards: Path) -> None:
    """Libraries ask for that, and would take one batch after another without an epoch's end."""
    assert not isinstance(make(shards), Iterator)


def test_a_loader_is_one_line(shards: Path) -> None:
    options = f"batch_size=16, device='cpu', backend='{make(shards).backend}'"
    assert repr(make(shards)) == f"Loader({str(shards)!r}, 'train', {options}): 120 samples, 7 steps"
    ranks = make(shards, split="val", rank=1, world_size=2)
    assert repr(ranks) == f"Loader({str(shards)!r}, 'val', {options}, rank=1, world_size=2): 30 samples, 1 steps"
