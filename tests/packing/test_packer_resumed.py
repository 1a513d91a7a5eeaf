"""An interrupted pack resumes only with the same options, versions and folder. Errors name the difference."""

import inspect
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import PIL
import pytest
from kill_packer import checksums
from packs import (
    BEFORE_CLEARING,
    BEFORE_MANIFEST,
    NINE,
    draw_image,
    drawn,
    exactly,
    interrupted,
    killed,
    nine,
    paths,
    uninterrupted,
)

from fastflower import Manifest, pack
from fastflower.errors import FolderError
from fastflower.packing import worker, workspace
from fastflower.packing.plan import load_plan

OPTIONS = NINE


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Nine images in two training shards and one validation shard."""
    return nine(tmp_path / "small")


@pytest.fixture
def expected(small: Path, tmp_path: Path) -> dict[str, str]:
    """Checksums of an uninterrupted pack."""
    return uninterrupted(small, tmp_path / "expected")


CHANGED: dict[str, Any] = {
    "split_by": "random",
    "val_fraction": 0.3,
    "seed": 1,
    "shard_bytes": 5000,
    "max_side": 20,
    "quality": 50,
    "on_bad": "fail",
    "on_conflict": "drop",
    "lists": False,
    "ignore": ("b/000.jpg",),
    "test_fraction": 0.1,
    "folds": 2,
}
TABLES = {
    "labels",
    "split",
    "path_column",
    "label_column",
    "split_column",
}  # the labels and splits themselves are compared


def changed(name: str) -> dict[str, Any]:
    return OPTIONS | {name: CHANGED[name]}


def test_a_changed_option_is_refused_and_changes_nothing(small: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    assert CHANGED.keys() == inspect.signature(pack).parameters.keys() - TABLES - {
        *("folder", "out", "workers", "executor"),
        "as_split",  # contradicts others
        "drop_empty_classes",  # may be added, see test_lost_classes.py
    }
    out = interrupted(small, tmp_path / "out", shards=2, **OPTIONS)
    before = checksums(out)
    former = asdict(load_plan(out / ".packing", small).options)
    for name, value in CHANGED.items():
        text = (
            f"{out / '.packing'}: holds an interrupted pack with {name} {former[name]!r}, not {value!r}; "
            f"use {name} {former[name]!r} to resume, or remove {out / '.packing'} to start over."
        )
        with pytest.raises(FolderError, match=exactly(text)):
            pack(small, out, **changed(name))
        assert checksums(out) == before
    pack(small, out, workers=1, **OPTIONS)
    assert checksums(out) == expected


def test_another_version_is_refused_and_changes_nothing(
    small: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = interrupted(small, tmp_path / "out", shards=1, **OPTIONS)
    before = checksums(out)
    former = load_plan(out / ".packing", small).versions
    places = {"fastflower": (workspace, "version_of", lambda _: "9.9"), "pillow": (PIL, "__version__", "9.9")}
    places["opencv"] = (cv2, "__version__", "9.9")
    assert places.keys() == former.keys()
    for name, place in places.items():
        text = (
            f"{out / '.packing'}: holds an interrupted pack with {name} {former[name]!r}, not '9.9'; "
            f"use {name} {former[name]!r} to resume, or remove {out / '.packing'} to start over."
        )
        with monkeypatch.context() as patch:
            patch.setattr(*place)
            with pytest.raises(FolderError, match=exactly(text)):
                pack(small, out, **OPTIONS)
        assert checksums(out) == before
    pack(small, out, **OPTIONS)
    assert checksums(out) == expected


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "has been changed": ("a/003.jpg", lambda path: draw_image(77).save(path)),
    "has been removed": ("a/004.jpg", Path.unlink),
    "has been added": ("b/0000.jpg", lambda path: draw_image(78).save(path)),
    "has been added or removed": ("b/notes.txt", lambda path: path.write_text("mine")),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_changed_folder_is_refused_and_changes_nothing(
    small: Path, tmp_path: Path, expected: dict[str, str], how: str
) -> None:
    name, change = CHANGES[how]
    out = interrupted(small, tmp_path / "out", shards=1, **OPTIONS)
    before = checksums(out)
    shutil.copytree(small, tmp_path / "copy")
    change(small / name)
    text = (
        f"{small / name}: {how} since the pack into {out} was interrupted; "
        f"undo this change to resume, or remove {out / '.packing'} to start over."
    )
    with pytest.raises(FolderError, match=exactly(text)):
        pack(small, out, **OPTIONS)
    assert checksums(out) == before
    shutil.rmtree(small)
    (tmp_path / "copy").rename(small)
    pack(small, out, **OPTIONS)
    assert checksums(out) == expected


def test_a_pack_of_a_moved_folder_resumes_from_another_current_folder(
    small: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    interrupted(Path("small"), Path("out"), shards=1, **OPTIONS)
    (tmp_path / "elsewhere").mkdir()
    small.rename(tmp_path / "elsewhere/moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pack("moved", "../out", **OPTIONS).skipped == ()
    assert checksums(tmp_path / "out") == expected


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return a list that collects the images prepared from now on."""
    prepared: list[bytes] = []
    prepare = worker.prepare

    def noted(data: bytes, **options: Any) -> Any:
        prepared.append(data)
        return prepare(data, **options)

    monkeypatch.setattr(worker, "prepare", noted)
    return prepared


def test_published_shards_are_moved_back_and_not_made_again(
    small: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = killed(small, tmp_path / "out", BEFORE_MANIFEST, **OPTIONS)
    prepared = counted(monkeypatch)
    pack(small, out, **OPTIONS)
    assert prepared == []
    assert checksums(out) == expected


def test_finished_shards_are_not_made_again(
    small: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = interrupted(small, tmp_path / "out", shards=2, **OPTIONS)
    tars = {path.name: path.stat() for path in (out / ".packing").glob("*.tar")}
    missing = load_plan(out / ".packing", small).shards[2]
    prepared = counted(monkeypatch)
    pack(small, out, **OPTIONS)
    assert len(prepared) == missing.stop - missing.start == 2
    assert {name: (out / name).stat().st_mtime_ns for name in tars} == {
        name: stat.st_mtime_ns for name, stat in tars.items()
    }
    assert checksums(out) == expected


@pytest.mark.parametrize("size", [0, 100, 700])
@pytest.mark.parametrize("placed", [False, True])
def test_a_shard_with_a_damaged_record_is_made_again(
    small: Path, tmp_path: Path, expected: dict[str, str], size: int, placed: bool
) -> None:
    """This also holds if its shard was already published."""
    out = killed(small, tmp_path / "out", BEFORE_MANIFEST if placed else "'index.npy' in paths[0]", **OPTIONS)
    assert (out / "train-000000.tar").exists() == placed
    os.truncate(out / ".packing/train-000000.npz", size)
    pack(small, out, **OPTIONS)
    assert checksums(out) == expected


@pytest.mark.parametrize(
    ("stop", "planned"),
    [(BEFORE_CLEARING, True), ("event == 'os.rmdir' and paths[0] == '.packing'", False)],
)
def test_a_pack_killed_after_publishing_is_finished(
    small: Path, tmp_path: Path, expected: dict[str, str], stop: str, planned: bool
) -> None:
    out = killed(small, tmp_path / "out", stop, **OPTIONS)
    assert (out / ".packing").exists()
    assert (out / ".packing/plan.json").exists() == planned
    assert pack(small, out, **OPTIONS) == Manifest.load(out)
    assert checksums(out) == expected


def test_a_pack_killed_after_publishing_is_not_taken_for_another(
    small: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    out = killed(small, tmp_path / "out", BEFORE_CLEARING, **OPTIONS)
    one_more, other_class = drawn(tmp_path / "one-more", a=5, b=5), drawn(tmp_path / "other-class", a=5, c=4)
    others = [*((small, changed(name)) for name in CHANGED), (one_more, OPTIONS), (other_class, OPTIONS)]
    text = f"{out}: already contains packed shards; remove them, or choose another folder:\n  pack("
    for folder, options in others:
        with pytest.raises(FolderError, match=re.escape(text)):
            pack(folder, out, **options)
    assert pack(small, out, **OPTIONS) == Manifest.load(out)
    assert checksums(out) == expected


def test_an_error_in_the_images_of_a_resumed_pack_removes_it(small: Path, tmp_path: Path) -> None:
    pack(small, tmp_path / "expected", **OPTIONS)
    bad = small / next(iter(paths(tmp_path / "expected", "val")))
    bad.write_bytes(bytes(bad.stat().st_size))  # the size stays the same, so it is again in the third shard
    options = changed("on_bad")
    out = interrupted(small, tmp_path / "out", shards=2, **options)
    reason = "contains only zero bytes"
    text = f"{bad}: {reason}; remove or replace it, or skip damaged images:\n  pack("
    with pytest.raises(FolderError, match=re.escape(text)):
        pack(small, out, **options)
    assert not out.exists()


def test_leftover_files_without_a_plan_do_no_harm(small: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    out = tmp_path / "out"
    (out / ".packing/meta").mkdir(parents=True)
    for name in (
        "train-000000.tar",
        "train-000000.npz",
        "train-000007.tar",
        "lock",
        "stop",
        "files.npy",
        "meta/val.txt",
    ):
        (out / ".packing" / name).write_bytes(b"half")
    pack(small, out, **OPTIONS)
    assert checksums(out) == expected
