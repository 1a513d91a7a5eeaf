"""User mistakes that made a pack fail late or give an unintended result."""

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
from fastflower.errors import FolderError
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
    rule = "has more than one folder for the same split ('Training', 'train'). This layout is ambiguous; choose one:"
    with pytest.raises(FolderError, match="^" + re.escape(f"{tmp_path}: {rule}")):
        scan(tmp_path)


@pytest.mark.parametrize("name", ["train", "photos"])
def test_the_error_for_a_single_folder_points_at_class_folders_inside_it(tmp_path: Path, name: str) -> None:
    rule = f"has one class, {name!r}; a classifier needs at least two class folders."
    remedy = f"If they are in {tmp_path / name}, pass that folder."
    with pytest.raises(FolderError, match=exactly(f"{tmp_path}: {rule} {remedy}")):
        scan(touch(tmp_path, f"{name}/a/1.jpg", f"{name}/b/1.jpg"))


@pytest.mark.parametrize("split_by", ["class", "random"])
def test_every_class_keeps_a_training_image(tmp_path: Path, split_by: Any) -> None:
    """This also holds for a rare class in a random split, and for a class with only a copy of another class's image."""
    folder = drawn(tmp_path / "data", a=20, b=1, c=1)
    (folder / "c/000.jpg").write_bytes((folder / "a/003.jpg").read_bytes())
    for seed in range(12):
        manifest = pack(folder, tmp_path / str(seed), seed=seed, split_by=split_by, val_fraction=0.5)
        assert manifest.splits["train"].class_counts[1:] == (1, 1)
        assert manifest.splits["val"].samples == {"class": 10, "random": 11}[split_by]


def test_a_class_with_all_images_dropped_is_reported_before_any_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = drawn(tmp_path / "data", a=4, b=1)
    (folder / "b/000.jpg").write_bytes((folder / "a/003.jpg").read_bytes())
    monkeypatch.setattr(worker, "prepare", None)
    what = "has no images left for training (files dropped for conflicting labels in total: 2)"
    text = f"class 'b': {what}; add images, because a classifier needs at least two classes."
    with pytest.raises(FolderError, match=exactly(text)):
        pack(folder, tmp_path / "out", on_conflict="drop")
    assert not (tmp_path / "out").exists()


def test_numpy_numbers_pack_the_same_bytes(small: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"seed": 3, "max_side": 20, "quality": 80, "shard_bytes": 5000, "val_fraction": 0.25}
    pack(small, tmp_path / "plain", **options)
    for name in options:
        options[name] = (np.float32 if name == "val_fraction" else np.int64)(options[name])
    pack(small, tmp_path / "numpy", **options)
    assert checksums(tmp_path / "numpy") == checksums(tmp_path / "plain")


def test_running_out_of_memory_is_explained_and_the_pack_resumes(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(worker, "prepare", full)
        rule = "packing ran out of memory; to resume with fewer workers:"
        again = f"pack({str(small)!r}, '{tmp_path / 'out'}', workers=1)"
        with pytest.raises(FolderError, match=exactly(f"{tmp_path / 'out'}: {rule}\n  {again}")):
            pack(small, tmp_path / "out")
    assert pack(small, tmp_path / "out").splits["train"].samples == 24


def test_an_executors_process_loads_the_plan_once_per_pack_and_without_ignored_files(
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


def test_an_executor_does_not_reuse_the_plan_of_an_earlier_pack(tmp_path: Path) -> None:
    first, second = drawn(tmp_path / "first", a=9, b=9), drawn(tmp_path / "second", b=9, c=9)
    pack(second, tmp_path / "expected", shard_bytes=5000)
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        for folder in (first, second):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            pack(folder, tmp_path / "out", shard_bytes=5000, executor=executor)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "expected")


def test_a_class_that_is_only_in_classes_txt_is_refused(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=2, b=2)
    (folder / "classes.txt").write_text("a\nb\nc\n")
    (folder / "train.txt").write_text("a/000.jpg 0\nb/000.jpg 1\n")
    again = f"pack({str(folder)!r}, '{tmp_path / 'out'}', drop_empty_classes=True)"
    remedy = f"add images, or leave out such classes:\n  {again}"
    with pytest.raises(FolderError, match=exactly(f"class 'c': has no images left for training; {remedy}")):
        pack(folder, tmp_path / "out")


def test_an_interrupt_ends_verify_without_the_waiting_shards(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(small, tmp_path / "out", shard_bytes=2000)
    started = list[Path]()
    monkeypatch.setattr(verification, "cores", lambda: 1)
    monkeypatch.setattr(verification, "_read", _interrupted(started))
    with pytest.raises(KeyboardInterrupt):
        verification.verify(tmp_path / "out")
    assert len(started) <= 2 < len(list((tmp_path / "out").glob("*.tar")))


def _interrupted(started: list[Path]) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        started.append(path)
        if len(started) == 1:
            raise KeyboardInterrupt
        sleep(1)  # the pool's only thread starts another shard before the rest is cancelled

    return read
