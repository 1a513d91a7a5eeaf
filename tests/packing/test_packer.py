"""Packing: reproducible bytes, fair splits and a correct manifest."""

import io
import itertools
import os
import random
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import pytest
from kill_packer import checksums
from packs import draw_image, drawn, exactly, images, paths, samples
from PIL import Image

from fastflower import Manifest, pack
from fastflower.errors import ArgumentError, FolderError
from fastflower.packing.folder import scan
from fastflower.packing.packer import _bounded_map
from fastflower.shards.image import perceptual_hash


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return drawn(tmp_path / "small", a=7, b=10, c=13)


def test_two_packs_of_one_folder_have_the_same_bytes(flowers: Path, shards: Path, tmp_path: Path) -> None:
    """A copy of the folder elsewhere, with newer files, also gives the same bytes."""
    moved = shutil.copytree(flowers, tmp_path / "moved", copy_function=shutil.copy)
    manifest = pack(moved, tmp_path / "again", shard_bytes=1 << 20)
    assert checksums(tmp_path / "again") == checksums(shards)
    tars = [shard.name for split in manifest.splits.values() for shard in split.shards]
    others = ["manifest.json", "_info.json", "train.index.npy", "val.index.npy"]
    assert sorted(checksums(shards)) == sorted([*tars, *(name.replace(".tar", ".idx") for name in tars), *others])


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_do_not_change_the_bytes(flowers: Path, shards: Path, tmp_path: Path, workers: int) -> None:
    pack(flowers, tmp_path / "out", shard_bytes=1 << 20, workers=workers)
    assert checksums(tmp_path / "out") == checksums(shards)


class Shuffled(list[Any]):
    def __enter__(self) -> "Shuffled":
        return self

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None: ...


def test_the_file_systems_order_does_not_change_the_bytes(
    flowers: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing, orders = random.Random(0), set[tuple[str, ...]]()

    def shuffled(listing: Callable[..., Any], *folder: Any) -> Any:
        entries = Shuffled(listing(*folder))
        drawing.shuffle(entries)
        orders.add(tuple(getattr(entry, "name", entry) for entry in entries))
        return entries

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, partial(shuffled, getattr(os, name)))
    for attempt in range(2):
        pack(flowers, tmp_path / str(attempt), shard_bytes=1 << 20)
    monkeypatch.undo()
    assert len([order for order in orders if order[0].endswith(".jpg")]) > 10
    assert checksums(tmp_path / "0") == checksums(tmp_path / "1") == checksums(shards)


def test_relative_paths_give_the_same_bytes(
    flowers: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(flowers.parent)
    pack(flowers.name, os.path.relpath(tmp_path / "out"), shard_bytes=1 << 20)
    assert checksums(tmp_path / "out") == checksums(shards)


def test_a_process_pool_makes_the_same_bytes(
    flowers: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes have another current folder, so relative paths must be resolved first."""
    monkeypatch.chdir(flowers.parent)
    with ProcessPoolExecutor(2, get_context("spawn"), os.chdir, ("/",)) as executor:
        pack(flowers.name, os.path.relpath(tmp_path / "out"), shard_bytes=1 << 20, executor=executor)
        assert executor.submit(abs, -1).result() == 1  # pack does not shut down the caller's executor
    assert checksums(tmp_path / "out") == checksums(shards)


class Recorded(ProcessPoolExecutor):
    """Records the futures of its tasks."""

    def submit(self, *args: Any, **options: Any) -> Future[Any]:
        self.futures = [*getattr(self, "futures", []), super().submit(*args, **options)]
        return self.futures[-1]


def test_an_error_in_another_process_is_raised_after_all_have_stopped(
    flowers: Path, shards: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(flowers, tmp_path / "data"))
    bad = folder / next(samples(shards, "train")).path
    bad.write_bytes(bytes(bad.stat().st_size))  # the size stays the same, so it is again the first image in a shard
    text = f"{bad}: contains only zero bytes; remove or replace it, or skip damaged images:\n  pack("
    with Recorded(2, mp_context=get_context("spawn")) as executor:
        with pytest.raises(FolderError, match=re.escape(text)):
            pack(folder, tmp_path / "out", on_bad="fail", quality=90, shard_bytes=1 << 20, executor=executor)
        assert [future.done() for future in executor.futures] == [True] * len(executor.futures)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_bounded_map_starts_few_items_early_and_keeps_the_order(depth: int) -> None:
    started, lock = itertools.count(1), threading.Lock()
    most = taken = 0

    def square(number: int) -> int:
        nonlocal most
        with lock:
            most = max(most, next(started) - taken)
        return number * number

    with ThreadPoolExecutor(8) as pool:
        for number, result in enumerate(itertools.islice(_bounded_map(pool, depth, square, itertools.count()), 100)):
            assert result == number * number
            taken += 1
    assert most <= depth
    assert next(started) - 1 <= 100 + depth
    with ThreadPoolExecutor(8) as pool:
        assert list(_bounded_map(pool, depth, abs, iter(range(20)))) == list(range(20))


def test_the_seed_changes_the_packed_split_and_order(small: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        pack(small, tmp_path / f"split-{seed}", seed=seed)
        pack(small, tmp_path / f"whole-{seed}", seed=seed, val_fraction=0)
    assert paths(tmp_path / "split-0", "val") != paths(tmp_path / "split-1", "val")
    orders = [[sample.path for sample in samples(tmp_path / f"whole-{seed}", "train")] for seed in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.05])
def test_a_split_by_class_takes_the_fraction_of_each_class(small: Path, tmp_path: Path, fraction: float) -> None:
    manifest = pack(small, tmp_path / "out", val_fraction=fraction)
    expected = tuple(max(1, round(count * fraction)) for count in (7, 10, 13))
    assert manifest.splits["val"].class_counts == expected
    assert manifest.splits["train"].class_counts == tuple(np.subtract((7, 10, 13), expected))
    for split in ("train", "val"):
        counts = Counter(sample.label for sample in samples(tmp_path / "out", split))
        assert tuple(counts[label] for label in range(3)) == manifest.splits[split].class_counts
    assert not paths(tmp_path / "out", "train") & paths(tmp_path / "out", "val")


def test_a_random_split_takes_the_fraction_of_all_images(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=20, b=20, c=20)
    options: dict[str, Any] = {"split_by": "random", "val_fraction": 0.3}
    of_val = [pack(folder, tmp_path / str(seed), seed=seed, **options).splits["val"] for seed in range(4)]
    assert [split.samples for split in of_val] == [18] * 4
    assert {split.class_counts for split in of_val} - {(6, 6, 6)}


def test_with_val_fraction_0_all_images_are_for_training(small: Path, tmp_path: Path) -> None:
    empty = pack(small, tmp_path / "out", val_fraction=0).splits["val"]
    assert (empty.samples, empty.class_counts, empty.shards) == (0, (0, 0, 0), ())
    assert paths(tmp_path / "out", "train") == images(scan(small))
    assert not list((tmp_path / "out").glob("val*.tar"))
    assert len(np.load(tmp_path / "out/val.index.npy")) == 0


def test_identical_images_stay_in_one_split(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=30, b=30)
    for number in range(10):
        for copied in range(1 + number % 3):
            shutil.copy(folder / f"a/{number:03d}.jpg", folder / f"a/again-{number}-{copied}.jpg")
    groups = [{f"a/{n:03d}.jpg", *(f"a/again-{n}-{c}.jpg" for c in range(1 + n % 3))} for n in range(10)]
    for seed in range(3):
        out = tmp_path / str(seed)
        manifest = pack(folder, out, val_fraction=0.5, seed=seed)
        assert sorted(map(sorted, manifest.duplicates)) == sorted(map(sorted, groups))
        train, val = paths(out, "train"), paths(out, "val")
        assert [group for group in groups if not (group <= train or group <= val)] == []
        assert any(group <= train for group in groups)
        assert any(group <= val for group in groups)
        assert manifest.label_conflicts == ()
        assert manifest.near_duplicates == ()
        assert len(train) + len(val) == 60 + sum(len(group) - 1 for group in groups)
        # The share may exceed the fraction by less than a group.
        assert 0 <= manifest.splits["val"].class_counts[0] - round(49 * 0.5) <= 3


@pytest.fixture
def conflicting(small: Path) -> Path:
    """A folder with two copies of a/000 under b and one copy of c/000 under c."""
    for source, target in (("a/000", "b/x"), ("a/000", "b/y"), ("c/000", "c/x")):
        shutil.copy(small / f"{source}.jpg", small / f"{target}.jpg")
    return small


def test_one_image_under_two_labels_is_reported_and_kept_in_one_split(conflicting: Path, tmp_path: Path) -> None:
    manifest = pack(conflicting, tmp_path / "out", val_fraction=0.5)
    assert manifest.label_conflicts == (("a/000.jpg", "b/x.jpg", "b/y.jpg"),)
    assert manifest.duplicates == (("a/000.jpg", "b/x.jpg", "b/y.jpg"), ("c/000.jpg", "c/x.jpg"))
    assert manifest.skipped == ()
    train, val = paths(tmp_path / "out", "train"), paths(tmp_path / "out", "val")
    group = set(manifest.label_conflicts[0])
    assert group <= train or group <= val


def test_images_with_conflicting_labels_can_be_dropped(conflicting: Path, tmp_path: Path) -> None:
    manifest = pack(conflicting, tmp_path / "out", on_conflict="drop")
    dropped = ("a/000.jpg", "b/x.jpg", "b/y.jpg")
    assert manifest.label_conflicts == (dropped,)
    reason = "is identical to an image with another label"
    assert manifest.skipped == tuple({"path": path, "reason": reason} for path in dropped)
    both = paths(tmp_path / "out", "train") | paths(tmp_path / "out", "val")
    assert both == images(scan(conflicting)) - set(dropped)
    assert manifest.source_bytes == sum((conflicting / path).stat().st_size for path in both)


def hash_of(encoded: bytes) -> int:
    gray: Any = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_GRAYSCALE)
    return perceptual_hash(gray)


def test_near_duplicates_in_another_split_are_reported_with_the_closest_training_image(
    flowers: Path, tmp_path: Path
) -> None:
    """Ten validation images are half-size copies of training images. Train also has slightly cropped copies."""
    originals = sorted(flowers.glob("*/*.jpg"))[::5]
    for path in originals:
        (tmp_path / "data/train" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "data/train" / path.parent.name)
    for kind in {path.parent.name for path in originals}:
        (tmp_path / "data/val" / kind).mkdir(parents=True)
    again: dict[str, str] = {}
    for path in originals[::3]:
        with Image.open(path) as image:
            half = image.reduce(2)
            name = f"{path.parent.name}/{path.name}"
            half.save(tmp_path / "data/val" / name, quality=60)
            half.crop((1, 1, half.width - 1, half.height)).save(
                tmp_path / "data/train" / path.parent.name / "cut.jpg", quality=50
            )
            again[f"val/{name}"] = f"train/{name}"
    draw_image(1, 300).save(tmp_path / "data/val" / originals[0].parent.name / "unrelated.jpg")
    manifest = pack(tmp_path / "data", tmp_path / "out", shard_bytes=1 << 19)
    known = {sample.path: hash_of(sample.image) for sample in samples(tmp_path / "out", "train")}
    expected: dict[str, int] = {}
    for sample in samples(tmp_path / "out", "val"):
        distance = min((hash_of(sample.image) ^ other).bit_count() for other in known.values())
        if distance <= 6:
            expected[sample.path] = distance
    found = {item["path"]: item for item in manifest.near_duplicates}
    assert {path: item["distance"] for path, item in found.items()} == expected
    assert list(found) == sorted(found)
    for path, item in found.items():
        assert set(item) == {"split", "path", "train_path", "distance"}
        assert item["split"] == "val"
        own = hash_of((tmp_path / "data" / path).read_bytes())
        assert (own ^ known[item["train_path"]]).bit_count() == item["distance"]
    assert again.keys() <= found.keys()
    for path, other in again.items():
        assert found[path]["train_path"] in (other, f"{Path(other).parent}/cut.jpg")
    assert not any("unrelated" in path for path in found)
    assert Manifest.load(tmp_path / "out").near_duplicates == manifest.near_duplicates


def test_the_manifest_records_source_and_packed_bytes(small: Path, tmp_path: Path) -> None:
    draw_image(1, size=200).save(small / "a/large.png")
    (small / "a/bad.jpg").write_bytes(b"text" * 1000)
    sizes: list[int] = []
    for number, options in enumerate([{}, {"max_side": 20}, {"max_side": 20, "quality": 30}]):
        out = tmp_path / str(number)
        manifest = pack(small, out, **options)  # pyright: ignore[reportArgumentType]
        packed = [sample for split in ("train", "val") for sample in samples(out, split)]
        assert manifest.source_bytes == sum((small / sample.path).stat().st_size for sample in packed)
        assert manifest.packed_bytes == sum(len(sample.image) for sample in packed)
        sizes.append(manifest.packed_bytes)
    assert sizes[0] > sizes[1] > sizes[2]


def test_images_are_transcoded_to_the_requested_size_and_quality(small: Path, tmp_path: Path) -> None:
    draw_image(1, size=100).save(small / "a/large.png")
    pack(small, tmp_path / "out", max_side=50, quality=80)
    found = [sample for split in ("train", "val") for sample in samples(tmp_path / "out", split)]
    assert len(found) == 31
    index = np.concatenate([Manifest.load(tmp_path / "out").index(split) for split in ("train", "val")])
    assert {(int(row["height"]), int(row["width"])) for row in index} == {(24, 24), (50, 50)}
    assert all(sample.image.startswith(b"\xff\xd8") for sample in found)
    assert not [sample for sample in found if sample.image == (small / sample.path).read_bytes()]
    as_asked = io.BytesIO()
    draw_image(0).save(as_asked, "JPEG", quality=80)
    tables = {str(Image.open(io.BytesIO(sample.image)).quantization) for sample in found}  # pyright: ignore[reportAttributeAccessIssue]
    assert tables == {str(Image.open(as_asked).quantization)}  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("shard_bytes", [200_000, 1 << 20, 1 << 30])
def test_shards_are_of_about_equal_size_and_as_few_as_fit(flowers: Path, tmp_path: Path, shard_bytes: int) -> None:
    pack(flowers, tmp_path / "out", shard_bytes=shard_bytes)
    for split in ("train", "val"):
        sizes: Counter[str] = Counter()
        found = list(samples(tmp_path / "out", split))
        for sample in found:
            sizes[sample.shard] += len(sample.image)
        total, largest = sum(sizes.values()), max(len(sample.image) for sample in found)
        assert len(sizes) == -(-total // shard_bytes)
        assert max(sizes.values()) <= shard_bytes + largest
        assert max(sizes.values()) - min(sizes.values()) <= 2 * largest


RULES: list[tuple[str, Any, str]] = [
    ("split_by", "label", "one of class, random, folder"),
    *(
        ("val_fraction", value, "a number, at least 0 and less than 1")
        for value in (1.0, -0.1, float("nan"), False, "0.2")
    ),
    *(("test_fraction", value, "a number, at least 0 and less than 1") for value in (1.0, None, "0.2", True)),
    ("test_fraction", 0.9, "at least 0 and, added to val_fraction, less than 1"),
    *(("seed", value, "an integer") for value in (1.5, None, "1", True)),
    *(("seed", value, "an integer and within 64 bits") for value in (2**64, -(2**64))),
    *(("shard_bytes", value, "an integer, at least 1") for value in (0, 1e6, None)),
    *(("max_side", value, "an integer, at least 1 pixel") for value in (0, "64", True)),
    *(("quality", value, "an integer from 1 to 95") for value in (0, 96, 90.0)),
    *(("folds", value, "an integer, at least 2") for value in (1, 2.5, True)),
    ("on_bad", "ignore", "one of skip, fail"),
    ("on_conflict", "dropped", "one of keep, drop (did you mean 'drop'?)"),
    *((name, 1, "True or False") for name in ("lists", "drop_empty_classes")),
    *(("workers", value, "an integer, at least 1") for value in (0, 2.0, "2", True)),
    ("executor", "dask", "a concurrent.futures.Executor"),
    ("labels", 3, "a path"),
    ("label_column", 1.5, "a column's name or, from 1, its number"),
]


@pytest.mark.parametrize(("name", "value", "rule"), RULES)
def test_an_invalid_argument_of_pack_is_refused(tmp_path: Path, name: str, value: Any, rule: str) -> None:
    with pytest.raises(ArgumentError, match=exactly(f"{name} must be {rule}, got {value!r}.")):
        pack(tmp_path / "nowhere", tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_the_manifest_records_options_and_versions(small: Path, tmp_path: Path) -> None:
    options = {"split_by": "random", "val_fraction": 0.3, "seed": 5, "shard_bytes": 9999, "max_side": 20, "quality": 70}
    options |= {"on_bad": "fail", "on_conflict": "drop", "lists": True, "ignore": ["*.gif"], "test_fraction": 0.1}
    options["drop_empty_classes"] = True
    options["as_split"] = None
    recorded = options | {"folds": None}
    returned = pack(small, tmp_path / "out", **options)  # pyright: ignore[reportArgumentType]
    assert returned.options == Manifest.load(tmp_path / "out").options == recorded
    assert returned == Manifest.load(tmp_path / "out")
    versions = {"fastflower": version("fastflower"), "pillow": PIL.__version__, "opencv": cv2.__version__}
    assert returned.versions == versions


def test_the_manifest_records_the_default_options(small: Path, tmp_path: Path) -> None:
    assert pack(small, tmp_path / "out").options == {
        "split_by": "class",
        "val_fraction": 0.2,
        "seed": 0,
        "shard_bytes": 64 << 20,
        "max_side": None,
        "quality": None,
        "on_bad": "skip",
        "on_conflict": "keep",
        "lists": False,
        "ignore": [],
        "test_fraction": 0.0,
        "folds": None,
        "drop_empty_classes": False,
        "as_split": None,
    }
    assert not re.search("classes.txt|meta", " ".join(checksums(tmp_path / "out")))
