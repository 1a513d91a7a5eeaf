"""What users give that once cost a pack, or made another of it than they meant."""

import re
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from kill_packer import checksums
from packs import drawn, exactly, touch

from fastflower import pack
from fastflower.errors import ArgumentError, FolderError
from fastflower.packing import worker
from fastflower.packing.folder import scan
from fastflower.packing.plan import Plan, load_plan
from fastflower.shards import verification


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return drawn(tmp_path / "small", a=7, b=10, c=13)


def test_splits_may_have_longer_names_and_capitals(tmp_path: Path) -> None:
    found = scan(touch(tmp_path, "Training/a/1.jpg", "Training/b/1.jpg", "Testing/b/2.jpg"))
    assert (found.classes, found.splits) == (("a", "b"), ("train", "test"))
    assert [found.path(number) for number in range(3)] == ["Training/a/1.jpg", "Training/b/1.jpg", "Testing/b/2.jpg"]
    assert found.files["split"].tolist() == [0, 0, 1]
    touch(tmp_path, "train/a/1.jpg")
    rule = "has two folders for the same split (Training, train). What to do if"
    with pytest.raises(FolderError, match="^" + re.escape(f"{tmp_path}: {rule}")):
        scan(tmp_path)


@pytest.mark.parametrize("name", ["train", "photos"])
def test_class_folders_one_level_down_are_pointed_at(tmp_path: Path, name: str) -> None:
    rule = f"has one class, {name!r}; a classifier needs at least two class folders."
    remedy = f"If those in it are the classes, name {tmp_path / name}."
    with pytest.raises(FolderError, match=exactly(f"{tmp_path}: {rule} {remedy}")):
        scan(touch(tmp_path, f"{name}/a/1.jpg", f"{name}/b/1.jpg"))


@pytest.mark.parametrize("split_by", ["class", "random"])
def test_something_of_every_class_is_left_for_training(tmp_path: Path, split_by: Any) -> None:
    """Also of a rare one in a split at random, and of one whose only image stands in another class, too."""
    folder = drawn(tmp_path / "data", a=20, b=1, c=1)
    (folder / "c/000.jpg").write_bytes((folder / "a/003.jpg").read_bytes())
    for seed in range(12):
        manifest = pack(folder, tmp_path / str(seed), seed=seed, split_by=split_by, val_fraction=0.5)
        assert manifest.splits["train"].class_counts[1:] == (1, 1)
        assert manifest.splits["val"].samples == {"class": 10, "random": 11}[split_by]


def test_a_class_of_which_all_is_dropped_is_named_before_an_image_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = drawn(tmp_path / "data", a=4, b=1)
    (folder / "b/000.jpg").write_bytes((folder / "a/003.jpg").read_bytes())
    monkeypatch.setattr(worker, "prepare", None)
    remedy = "add images, or remove the class folder. 2 files were under two labels in all."
    with pytest.raises(FolderError, match=exactly(f"class 'b': none of its images is left for training; {remedy}")):
        pack(folder, tmp_path / "out", on_conflict="drop")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seed": 1.5}, "seed must be an integer, got 1.5."),
        ({"seed": None}, "seed must be an integer, got None."),
        ({"quality": 90.0}, "quality must be an integer, got 90.0."),
        ({"max_side": "64"}, "max_side must be an integer, got '64'."),
        ({"shard_bytes": 1e6}, "shard_bytes must be an integer, got 1000000.0."),
    ],
)
def test_numbers_that_are_not_whole_are_refused(
    small: Path, tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ArgumentError, match=exactly(text)):
        pack(small, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_numpys_numbers_pack_the_same_bytes(small: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"seed": 3, "max_side": 20, "quality": 80, "shard_bytes": 5000, "val_fraction": 0.25}
    pack(small, tmp_path / "plain", **options)
    for name in options:
        options[name] = (np.float32 if name == "val_fraction" else np.int64)(options[name])
    pack(small, tmp_path / "numpy", **options)
    assert checksums(tmp_path / "numpy") == checksums(tmp_path / "plain")


def test_memory_that_runs_out_is_explained_and_the_pack_goes_on(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(worker, "prepare", full)
        rule = "is not finished: memory ran out; pack with fewer workers (--workers 1)."
        again = "Run the same command again to resume."
        with pytest.raises(FolderError, match=exactly(f"{tmp_path / 'out'}: {rule} {again}")):
            pack(small, tmp_path / "out")
    assert pack(small, tmp_path / "out").splits["train"].samples == 24


def test_an_executors_process_reads_the_plan_once_a_pack_and_not_what_is_listed_as_no_image(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"a/{number}.txt" for number in range(3)]
    touch(small, *names)
    loaded = list[int]()

    def counting(work: Path, root: Path) -> Plan:
        plan = load_plan(work, root)
        loaded.append(len(plan.folder.ignored))
        return plan

    monkeypatch.setattr(worker, "load_plan", counting)
    with ThreadPoolExecutor(4) as executor:
        for count in (1, 2):
            manifest = pack(small, tmp_path / "out", shard_bytes=5000, executor=executor)
            assert [item["path"] for item in manifest.skipped] == names
            assert sum(len(split.shards) for split in manifest.splits.values()) > 4
            assert loaded == [0] * count
            shutil.rmtree(tmp_path / "out")


def test_an_executor_that_packs_another_folder_to_the_same_place_has_no_plan_left_of_the_first(tmp_path: Path) -> None:
    first, second = drawn(tmp_path / "first", a=9, b=9), drawn(tmp_path / "second", b=9, c=9)
    pack(second, tmp_path / "expected", shard_bytes=5000)
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        for folder in (first, second):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            pack(folder, tmp_path / "out", shard_bytes=5000, executor=executor)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "expected")


def test_a_class_that_only_the_list_of_classes_has_is_named(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=2, b=2)
    (folder / "classes.txt").write_text("a\nb\nc\n")
    (folder / "train.txt").write_text("a/000.jpg 0\nb/000.jpg 1\n")
    remedy = "add images, or remove the class folder."
    with pytest.raises(FolderError, match=exactly(f"class 'c': none of its images is left for training; {remedy}")):
        pack(folder, tmp_path / "out")


def test_verify_ends_at_an_interrupt_without_the_shards_that_wait(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(small, tmp_path / "out", shard_bytes=2000)
    began = list[Path]()
    monkeypatch.setattr(verification, "cores", lambda: 1)
    monkeypatch.setattr(verification, "_read", _interrupted(began))
    with pytest.raises(KeyboardInterrupt):
        verification.verify(tmp_path / "out")
    assert len(began) <= 2 < len(list((tmp_path / "out").glob("*.tar")))


def _interrupted(began: list[Path]) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        began.append(path)
        if len(began) == 1:
            raise KeyboardInterrupt
        sleep(1)  # the pool's one thread goes on with another, until the rest is cancelled

    return read
