"""Loaders of folds: a fold and the rest of the train split, from a folder and from a URL."""

import pickle
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_server import serving
from packs import drawn, exactly, samples

from fastflower import Loader, Manifest, pack
from fastflower.errors import ArgumentError, ShardError
from fastflower.shards.remote import Remote

COUNT = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("folds") / "data", a=10, b=8, c=6)


@pytest.fixture(scope="module")
def shards(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images in several shards and three folds. Read-only."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    assert len(pack(data, out, folds=COUNT, shard_bytes=6000).splits["train"].shards) > COUNT
    return out


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images without folds. Read-only."""
    pack(data, out := tmp_path_factory.mktemp("packed") / "plain")
    return out


def make(shards: Any, split: str = "train", fold: int | None = 0, **options: Any) -> Loader:
    return Loader(shards, split, fold=fold, **{"batch_size": 4, "device": "cpu", "backend": "opencv", **options})


def seen(loader: Loader) -> list[tuple[str, int, bytes]]:
    """Return (path, label, pixels of the validation view) of every sample that an epoch yields."""
    found: list[tuple[str, int, bytes]] = []
    for images, labels, index in loader:
        paths = [loader.path_of(number) for number in index.tolist()]
        found += zip(paths, labels.tolist(), (image.numpy().tobytes() for image in images), strict=True)
    return found


def test_the_folds_are_the_splits_of_the_loaders(shards: Path, data: Path) -> None:
    """The pixels, labels and paths are those that a loader without folds yields; tarfile tells which images there are."""
    everything = sorted(seen(make(shards, fold=None, tail="keep")))
    assert [path for path, _, _ in everything] == sorted(str(path.relative_to(data)) for path in data.glob("*/*"))
    numbers = Manifest.load(shards).fold_numbers()
    names = [sample.path for sample in samples(shards, "train")]
    for fold in range(COUNT):
        val, rest = make(shards, "val", fold), make(shards, "train", fold, tail="keep")
        assert list(val.paths) == [name for name, number in zip(names, numbers, strict=True) if number == fold]
        held_out, trained = seen(val), seen(rest)
        assert [path for path, _, _ in held_out] == list(val.paths)
        assert sorted([*held_out, *trained]) == everything
        assert (len(held_out), len(trained)) == (val.num_samples, rest.num_samples)
        for loader, found in ((val, held_out), (rest, trained)):
            counts = np.bincount([label for _, label, _ in found], minlength=3).tolist()
            assert loader.manifest.splits[loader.split].class_counts == tuple(counts)


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"shuffle": "balanced"}, {"tail": "pad"}])
def test_epochs_resume_on_other_ranks(shards: Path, options: dict[str, Any]) -> None:
    whole = make(shards, fold=1, **options)
    steps = [batch.index.tolist() for batch in whole]
    if not options:
        assert len(set(chain(*steps))) == sum(map(len, steps)) == 16
    begun = make(shards, fold=1, **options)
    next(iter(begun))
    ranks = [make(shards, fold=1, batch_size=2, rank=rank, world_size=2, **options) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(begun.state_dict())
    rest = zip(*([batch.index.tolist() for batch in rank] for rank in ranks), strict=True)
    assert [list(chain(*parts)) for parts in rest] == steps[1:]


def test_a_state_of_another_fold_or_pack_is_refused(shards: Path, data: Path, tmp_path: Path) -> None:
    loader = make(shards, fold=1)
    with pytest.raises(ShardError, match=r"the state has fold 2, but this loader has 1; resume with the same shards, "):
        loader.load_state_dict(make(shards, fold=2).state_dict())
    with pytest.raises(ShardError, match=r"the state has fold None, but this loader has 1; "):
        loader.load_state_dict(make(shards, fold=None).state_dict())
    with pytest.raises(ShardError, match=r"the state has fold 1, but this loader has None; "):
        make(shards, fold=None).load_state_dict(loader.state_dict())
    pack(data, tmp_path / "more", folds=COUNT + 1, shard_bytes=6000)  # the same tars
    with pytest.raises(ShardError, match=r"the state has folds '\w+', but this loader has '\w+'; "):
        make(tmp_path / "more", fold=1).load_state_dict(loader.state_dict())


def test_a_pickled_loader_keeps_its_fold(shards: Path) -> None:
    loader = make(shards, "val", np.int64(2))  # pyright: ignore[reportArgumentType]
    state = loader.state_dict()
    assert (state["fold"], type(state["fold"])) == (2, int)
    assert seen(pickle.loads(pickle.dumps(loader))) == seen(loader)


@pytest.mark.parametrize("cache", ["auto", None, 100_000])
def test_caches_hold_the_images_of_the_loaders_part(shards: Path, cache: Any) -> None:
    loader = make(shards, "val", 2, cache=cache)
    assert seen(loader) == seen(loader) == seen(make(shards, "val", 2, cache=None))
    names = [sample.path for sample in samples(shards, "train")]
    sizes = np.load(shards / "train.index.npy")[[names.index(path) for path in loader.paths]]
    assert loader.image(3).shape[:2] == (sizes["height"][3], sizes["width"][3])


def test_a_damaged_sample_is_replaced_by_one_of_the_same_part(shards: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(shards, tmp_path / "out"))
    row = np.load(out / "train.index.npy")[np.flatnonzero(Manifest.load(out).fold_numbers() == 0)[-1]]
    tar = out / f"train-{row['shard']:06d}.tar"
    data = bytearray(tar.read_bytes())
    data[int(row["offset"]) + 300] ^= 1
    tar.write_bytes(data)
    loader = make(out, "val", 0, on_bad="skip")
    found = [path for path, _, _ in seen(loader)]
    assert list(loader.replaced) == [loader.num_samples - 1]
    assert found == [*loader.paths[:-1], loader.paths[0]]


@pytest.mark.parametrize(("fold", "split", "rule"), [
    (3, "val", "from 0 to 2, got 3"),
    (-1, "train", "from 0 to 2, got -1"),
    ("1", "train", "from 0 to 2, got '1'"),
    (0, "test", "None with split 'test', which is not divided into folds, got 0"),
])  # fmt: skip
def test_an_invalid_fold_is_refused(shards: Path, fold: Any, split: str, rule: str) -> None:
    with pytest.raises(ArgumentError, match=exactly(f"fold must be {rule}.")):
        make(shards, split, fold)


def test_a_pack_without_folds_says_how_to_get_them(plain: Path, shards: Path) -> None:
    again = "pack the images again, with folds:\n  pack(folder, 'folds', folds=5)"
    rule = f"None, because these shards have no folds, got 0; {again}"
    with pytest.raises(ArgumentError, match=exactly(f"fold must be {rule}")):
        make(plain, "val", 0)
    with pytest.raises(ShardError, match=exactly(f"{plain}: has no folds; {again}")):
        Manifest.load(plain).fold_numbers()
    choice = "pass a fold from 0 to 2, or choose from train"
    with pytest.raises(ShardError, match=exactly(f"{shards}: has no samples in split 'val'; {choice}.")):
        make(shards, "val", None)


@pytest.mark.parametrize("window", [None, 1])
def test_a_url_yields_the_same_fold_and_only_its_shards(shards: Path, tmp_path: Path, window: int | None) -> None:
    with serving(shards) as server:
        source = Remote(url=server.url, folder=tmp_path / "cache")
        for split in ("val", "train"):
            expected = make(shards, split, 1, window=window or (8 if split == "train" else None))
            remote = make(source, split, 1, window=window)
            assert [seen(remote) for _ in range(2)] == [seen(expected) for _ in range(2)]
            if split == "val":
                needed = {shard.name for shard in expected.manifest.splits["val"].shards}
                assert len(needed) < len(Manifest.load(shards).splits["train"].shards)
                assert {path.name for path in (tmp_path / "cache").rglob("*.tar")} == needed
        folds = next((tmp_path / "cache").rglob("train.folds.npy"))
        folds.write_bytes(b"damaged")  # in the cache
        assert sorted(make(source, "val", 1).paths) == sorted(make(shards, "val", 1).paths)
        assert folds.read_bytes() == (shards / "train.folds.npy").read_bytes()
