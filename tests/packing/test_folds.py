"""Folds: the laws of their assignment, and packs that have them."""

import json
import logging
import shutil
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kill_packer import checksums
from packs import draw_image, drawn, exactly, interrupted, paths, samples

from fastflower import Manifest, pack
from fastflower.cli import main
from fastflower.errors import ArgumentError, FolderError
from fastflower.packing.duplicates import NEAR_BITS, near_groups
from fastflower.packing.folds import assign_folds
from fastflower.shards.image import prepare
from fastflower.shards.verification import verify

COUNT = 3


def sizes_of(labels: Any, folds: Any, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the number of images of each class in each fold, (C, K)."""
    sizes = np.zeros((int(np.max(labels)) + 1, count), np.int64)
    np.add.at(sizes, (labels, folds), 1)
    return sizes


@settings(deadline=None, max_examples=30, derandomize=True)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), count=st.integers(2, 9))
def test_without_groups_sizes_differ_by_at_most_one(labels: list[int], count: int) -> None:
    folds = assign_folds(np.array(labels), np.arange(len(labels)), count)
    sizes = sizes_of(labels, folds, count)
    assert np.ptp(sizes, axis=1).max() <= 1
    assert np.ptp(sizes.sum(axis=0)) <= 1


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    images=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=60), count=st.integers(2, 5)
)
def test_groups_are_not_divided(images: list[tuple[int, int]], count: int) -> None:
    labels, groups = np.transpose(images)
    folds = assign_folds(labels, groups, count)
    assert len(folds) == len(images)
    assert folds.max() < count
    assert len(set(zip(groups.tolist(), folds.tolist(), strict=True))) == len(set(groups.tolist()))


def test_small_groups_leave_the_sizes_of_classes_equal() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    groups = np.arange(200)
    for label in range(4):  # ten pairs and a group of four in each class
        groups[50 * label : 50 * label + 20] = 50 * label + np.arange(20) // 2
        groups[50 * label + 20 : 50 * label + 24] = 50 * label + 20
    order = rng.permutation(200)
    assert np.ptp(sizes_of(labels[order], assign_folds(labels[order], groups[order], 7), 7), axis=1).max() <= 1


def test_a_group_that_is_too_large_fills_a_fold_alone() -> None:
    groups = np.where(np.arange(20) < 12, 0, np.arange(20))
    folds = assign_folds(np.zeros(20, np.int64), groups, 3)
    assert sorted(np.bincount(folds)) == [4, 4, 12]


def grouped(hashes: list[int]) -> list[int]:
    """Group hashes by comparing every pair, with a search in the graph of near pairs."""
    group = [-1] * len(hashes)
    for start in range(len(hashes)):
        reached = [start] if group[start] < 0 else []
        while reached:
            one = reached.pop()
            group[one] = start
            reached += [
                k for k, other in enumerate(hashes) if group[k] < 0 and (hashes[one] ^ other).bit_count() <= NEAR_BITS
            ]
    return group


@settings(deadline=None, max_examples=30, derandomize=True)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 60), chunk=st.sampled_from([1, 50, 1 << 17]))
def test_near_groups_match_a_comparison_of_every_pair(seed: int, count: int, chunk: int) -> None:
    """Hashes walk away from three starts, so groups are chains of near hashes with ends that are far apart."""
    rng = np.random.default_rng(seed)
    hashes = [0, 2**64 - 1, 0x123456789ABCDEF0][: min(3, count)]
    while len(hashes) < count:
        bits = rng.choice(64, rng.integers(0, 10), replace=False)
        hashes.append(hashes[rng.integers(len(hashes))] ^ sum(1 << int(bit) for bit in bits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.packing.duplicates._CHUNK", chunk)
        found = near_groups(np.array(hashes, np.uint64)).tolist()
    expected = grouped(hashes)
    assert len(set(zip(found, expected, strict=True))) == len(set(found)) == len(set(expected))


def test_many_equal_or_close_hashes_are_not_compared_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of these would be 25 million."""
    compared, count_bits = [0], np.bitwise_count

    def counting(values: Any) -> Any:
        compared[0] += len(values)
        return count_bits(values)

    monkeypatch.setattr("fastflower.packing.duplicates.np.bitwise_count", counting)
    assert len(set(near_groups(np.full(5_000, 7, np.uint64)).tolist())) == 1
    assert compared[0] == 0
    bits = np.random.default_rng(0).integers(0, 64, (5_000, 3), np.uint64)
    close = np.bitwise_xor.reduce(np.uint64(1) << bits, axis=1)
    assert len(set(near_groups(close).tolist())) == 1
    assert compared[0] < 2_000_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes of 11, 9 and 4 images; three of "a" have copies: bit for bit, as a small PNG, and both in another class."""
    root = drawn(tmp_path_factory.mktemp("folds") / "data", a=8, b=7, c=4)
    shutil.copy(root / "a/000.jpg", root / "a/copy.jpg")
    draw_image(1, 24).resize((48, 48)).save(root / "a/twice.png")
    draw_image(2, 24).resize((48, 48)).save(root / "a/larger.png")
    shutil.copy(root / "a/002.jpg", root / "b/copy.jpg")
    draw_image(2, 24).resize((36, 36)).save(root / "b/larger.png")
    return root


COPIES = [("a/000.jpg", "a/copy.jpg"), ("a/001.jpg", "a/twice.png")]
COPIES += [("a/002.jpg", "a/larger.png", "b/copy.jpg", "b/larger.png")]


@pytest.fixture(scope="module")
def packed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    pack(data, out, folds=COUNT, shard_bytes=6000, workers=1)
    return out


def fold_of(out: Path) -> dict[str, int]:
    names = [sample.path for sample in samples(out, "train")]
    return dict(zip(names, Manifest.load(out).fold_numbers().tolist(), strict=True))


def test_every_image_is_in_one_fold_and_copies_share_it(packed: Path, data: Path) -> None:
    folds = fold_of(packed)
    assert sorted(folds) == sorted(str(path.relative_to(data)) for path in data.glob("*/*"))
    assert set(folds.values()) == set(range(COUNT))
    for group in COPIES:
        hashes = [prepare((data / name).read_bytes(), max_side=None, quality=None).hash for name in group]
        assert max((one ^ other).bit_count() for one, other in pairwise(hashes)) <= NEAR_BITS
        assert len({folds[name] for name in group}) == 1
    labels = ["abc".index(name[0]) for name in folds]
    assert np.ptp(sizes_of(labels, list(folds.values()), COUNT), axis=1).max() <= 1


def test_the_manifest_describes_the_folds(packed: Path) -> None:
    manifest = Manifest.load(packed)
    assert manifest.folds
    assert (manifest.folds.count, manifest.options["folds"]) == (COUNT, COUNT)
    assert manifest.folds.sha256 == sha256((packed / "train.folds.npy").read_bytes()).hexdigest()
    assert (list(manifest.splits), manifest.options["val_fraction"]) == (["train"], None)
    assert np.load(packed / "train.folds.npy").dtype == "<u4"


def test_the_bytes_depend_only_on_folder_options_and_seed(data: Path, packed: Path, tmp_path: Path) -> None:
    pack(data, tmp_path / "again", folds=COUNT, shard_bytes=6000, workers=3)
    stopped = interrupted(data, tmp_path / "stopped", shards=1, folds=COUNT, shard_bytes=6000)
    pack(data, stopped, folds=COUNT, shard_bytes=6000)
    assert checksums(tmp_path / "again") == checksums(stopped) == checksums(packed)
    pack(data, tmp_path / "seed", folds=COUNT, shard_bytes=6000, seed=1)
    assert fold_of(tmp_path / "seed") != fold_of(packed)
    pack(data, tmp_path / "bytes", folds=COUNT)  # the size of shards is not a random seed
    assert fold_of(tmp_path / "bytes") == fold_of(packed)


def test_a_pack_without_folds_has_no_key_for_them(data: Path, packed: Path, tmp_path: Path) -> None:
    """A fastflower that does not know folds ignores the key. Its checksum covers all keys."""
    pack(data, tmp_path / "out", val_fraction=0)
    assert "folds" not in json.loads((tmp_path / "out/manifest.json").read_bytes())
    assert not (tmp_path / "out/train.folds.npy").exists()
    older = Manifest.load(tmp_path / "out")  # a manifest of an older version has neither the key nor the option
    older = replace(older, options={name: value for name, value in older.options.items() if name != "folds"})
    (tmp_path / "out/manifest.json").write_text(older.to_json())
    assert verify(tmp_path / "out") == []
    stored = json.loads((packed / "manifest.json").read_bytes())
    digest = stored.pop("sha256")
    assert sha256(json.dumps(stored, sort_keys=True, separators=(",", ":")).encode()).hexdigest() == digest


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train, val and test splits."""
    root = tmp_path_factory.mktemp("split")
    for number, name in enumerate(f"{split}/{label}" for split in ("train", "val", "test") for label in "ab"):
        drawn(root, **{name: 3})
        for path in (root / name).glob("*.jpg"):
            draw_image(10 * number + int(path.stem)).save(path)
    return root


def test_a_test_split_stays_and_a_val_split_joins_train(
    split: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = pack(split, tmp_path / "out", folds=2, lists=True)
    assert {name: part.samples for name, part in manifest.splits.items()} == {"train": 12, "test": 6}
    assert {name.partition("/")[0] for name in paths(tmp_path / "out", "train")} == {"train", "val"}
    assert {name.partition("/")[0] for name in paths(tmp_path / "out", "test")} == {"test"}
    assert f"{split}: its val split is divided into folds together with its train split" in caplog.text
    manifest = pack(split, tmp_path / "class", folds=2, split_by="class")
    assert {name: part.samples for name, part in manifest.splits.items()} == {"train": 18}


def copies(folder: Path, seed: int) -> None:
    """Add four near-duplicates of a drawn image."""
    for number in range(4):
        draw_image(seed).resize((40 + number, 40)).save(folder / f"copy{number}.png")


def test_a_test_split_can_be_drawn_beside_folds(data: Path, tmp_path: Path) -> None:
    manifest = pack(data, tmp_path / "out", folds=2, test_fraction=0.25)
    assert {name: part.samples for name, part in manifest.splits.items()} == {"train": 18, "test": 6}
    assert len(manifest.fold_numbers()) == 18


def logged(folder: Path, out: Path, caplog: pytest.LogCaptureFixture, folds: int) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pack(folder, out, folds=folds)
    return [record.getMessage().partition(": ")[2] for record in caplog.records]


def test_classes_that_cannot_be_spread_evenly_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = drawn(tmp_path / "data", a=6, b=1, c=6, one=1, two=2)
    for name, seed in (("a", 0), ("b", 1000)):
        copies(root / name, seed)
    assert logged(root, tmp_path / "out", caplog, 3) == [
        "all images of 'b', 'one' are in one fold, so training without it sees none: add images",
        "some folds have no images of 'two': add images, or pack fewer folds",
        "folds differ by more than one image of 'a', 'b', because copies and near-duplicates share a fold",
    ]
    assert logged(drawn(tmp_path / "even", a=6, b=7), tmp_path / "evenly", caplog, 3) == []


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"folds": 1}, "folds must be an integer, at least 2, got 1."),
    ({"folds": 2.5}, "folds must be an integer, at least 2, got 2.5."),
    ({"folds": 12}, "folds must be at most 11, the number of images of the largest class, got 12."),
    (
        {"folds": 3, "val_fraction": 0.2},
        "val_fraction must be omitted with folds, because each fold is the val split in turn, got 0.2.",
    ),
    (
        {"folds": 3, "split_by": "random"},
        "split_by must be 'class' or 'folder' with folds, which are stratified, got 'random'.",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_impossible_folds_are_refused(data: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=exactly(message)):
        pack(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_folds_that_would_be_empty_are_refused(tmp_path: Path) -> None:
    root = drawn(tmp_path / "data", a=1, b=1)
    copies(root / "a", 0)
    what = "has too few images for 3 folds: only 2 would have images, because near-duplicates stay together"
    with pytest.raises(FolderError, match=exactly(f"{root}: {what}; pack with fewer folds, or add images.")):
        pack(root, tmp_path / "out", folds=3)
    assert not (tmp_path / "out").exists()


def test_the_command_line_prints_the_number_of_folds(
    split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", str(split), "--out", str(tmp_path / "out"), "--folds", "3"]) == 0
    assert capsys.readouterr().out.startswith("train: 12 images in 1 shards, 3 folds\ntest: 6 images in 1 shards\n")


def test_verify_checks_the_folds(packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert verify(packed) == []
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    numbers = out / "train.folds.npy"
    intact = numbers.read_bytes()
    remedy = "restore it from a backup, or run fastflower pack again, because the tars do not record folds."
    numbers.write_bytes(intact[:-4] + b"\1\0\0\0")
    for repair in (False, True):
        changed = "has changed since it was packed (checksum mismatch)"
        assert verify(out, repair=repair) == [f"{numbers}: {changed}; {remedy}"]
    numbers.unlink()
    (problem,) = verify(out)
    assert problem.startswith(f"{numbers}: cannot be read (")
    assert problem.endswith(f"; {remedy}")
    numbers.write_bytes(intact)
    (out / "train.index.npy").unlink()
    assert verify(out, repair=True) == []
    (out / "manifest.json").unlink()
    assert verify(out, repair=True) == []
    assert Manifest.load(out).folds is None
    what = "the rebuilt manifest has no folds, because the tars do not record them"
    assert f"{numbers}: {what}; to use this file, restore manifest.json from a backup" in caplog.text
