"""The manifest: round trips, damage and atomic writes."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from kill_packer import checksums
from packs import drawn, exactly, interrupted

from fastflower import Manifest, pack
from fastflower.errors import FolderError, ShardError
from fastflower.files import write_atomically
from fastflower.machine import version_of
from fastflower.shards.manifest import INDEX_DTYPE, Shard, Split

MANIFEST = Manifest(
    folder=Path("nowhere"),
    classes=("daisy", "röse", "tulip 🌷"),
    splits={
        "train": Split(
            3, (1, 1, 1), (Shard("train-000000.tar", 2, 20480, "0" * 64), Shard("b.tar", 1, 10240, "1" * 64))
        ),
        "val": Split(0, (0, 0, 0), ()),
    },
    options={"seed": 7, "val_fraction": 0.2, "max_side": None, "split_by": "class"},
    skipped=({"path": "röse/x.jpg", "reason": "is not an image"},),
    duplicates=(("daisy/1.jpg", "daisy/2.jpg"), ("daisy/3.jpg", "röse/1.jpg")),
    label_conflicts=(("daisy/3.jpg", "röse/1.jpg"),),
    near_duplicates=({"split": "val", "path": "daisy/4.jpg", "train_path": "daisy/5.jpg", "distance": 3},),
    source_bytes=12_345_678_901,
    packed_bytes=30_000,
    versions={"fastflower": "1.2.3", "pillow": "12.0", "opencv": "4.11"},
)


def write_manifest(folder: Path, text: str | bytes | None = None) -> Path:
    data = MANIFEST.to_json() if text is None else text
    (folder / "manifest.json").write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def write_changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    values = json.loads(MANIFEST.to_json())
    change(values)
    return write_manifest(folder, json.dumps(values))


def test_a_manifest_is_read_back_as_written(tmp_path: Path) -> None:
    loaded = Manifest.load(write_manifest(tmp_path))
    assert loaded == replace(MANIFEST, folder=tmp_path)
    assert Manifest.load(str(tmp_path)) == loaded


@pytest.mark.parametrize(
    "change",
    [
        {"source_bytes": None},
        {"classes": ("caf\udce9", "new\nline", '"quoted"\\')},
        {"near_duplicates": (), "skipped": (), "duplicates": (), "label_conflicts": ()},
    ],
)
def test_a_manifest_encoded_like_in_a_pack_is_read_back_as_written(tmp_path: Path, change: dict[str, Any]) -> None:
    """Packing uses backslashreplace, because names need not be UTF-8."""
    manifest = replace(MANIFEST, folder=tmp_path, **change)
    text = manifest.to_json().encode("utf-8", "backslashreplace")
    assert Manifest.load(write_manifest(tmp_path, text)) == manifest
    assert json.loads(text)["classes"] == list(manifest.classes)


def test_the_same_manifest_gives_the_same_bytes(tmp_path: Path) -> None:
    assert Manifest.load(write_manifest(tmp_path)).to_json() == MANIFEST.to_json()
    assert replace(MANIFEST, folder=Path("elsewhere")).to_json() == MANIFEST.to_json()
    assert replace(MANIFEST, classes=("a", "b", "c")).to_json() != MANIFEST.to_json()


def test_the_file_is_human_readable_json() -> None:
    text = MANIFEST.to_json()
    values = json.loads(text)
    assert (values["format"], values["version"]) == ("fastflower", 2)
    assert "röse" in text
    names = [item.name for item in fields(Manifest) if item.name not in ("folder", "version", "folds")]
    assert list(values) == ["format", "version", *names, "sha256"]
    assert values["splits"]["train"]["shards"][1] == {"name": "b.tar", "samples": 1, "bytes": 10240, "sha256": "1" * 64}
    assert values["near_duplicates"] == list(MANIFEST.near_duplicates)
    assert (values["source_bytes"], values["packed_bytes"]) == (12_345_678_901, 30_000)
    assert text.endswith("}\n")


def test_the_loaded_manifest_equals_the_one_that_pack_returned(shards: Path) -> None:
    loaded = Manifest.load(shards)
    assert loaded.to_json().encode() == (shards / "manifest.json").read_bytes()
    assert {name: split.samples for name, split in loaded.splits.items()} == {"train": 120, "val": 30}


@pytest.mark.parametrize("text", ["", "{", MANIFEST.to_json()[:-20], b"\xff\xfe\x00", "not JSON"])
def test_damaged_text_is_rejected(tmp_path: Path, text: str | bytes) -> None:
    path = re.escape(str(tmp_path / "manifest.json"))
    pattern = rf"^{path}: cannot be read \(.+\); restore it from a backup, or run fastflower pack again\.$"
    with pytest.raises(ShardError, match=pattern):
        Manifest.load(write_manifest(tmp_path, text))


def test_a_file_in_place_of_the_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file.tar").write_bytes(b"x")
    with pytest.raises(
        ShardError, match=r"file\.tar: is a file, not a folder of shards; pass a folder that pack wrote"
    ):
        Manifest.load(tmp_path / "file.tar")


@pytest.mark.parametrize(("key", "value"), [("version", "2"), ("version", 0), ("format", "others")])
def test_another_format_is_rejected(tmp_path: Path, key: str, value: Any) -> None:
    is_now = {"format": "fastflower", "version": 2, key: value}
    text = (
        f"{tmp_path / 'manifest.json'}: has format {is_now['format']} version {is_now['version']}, "
        f"but this fastflower only reads format fastflower, versions 1 to 2; "
        f"restore it from a backup, or run fastflower pack again."
    )
    with pytest.raises(ShardError, match=exactly(text)):
        Manifest.load(write_changed(tmp_path, lambda values: values.update({key: value})))


def test_a_newer_format_version_asks_for_a_newer_fastflower(tmp_path: Path) -> None:
    text = (
        f"{tmp_path / 'manifest.json'}: has format version 3, written by a newer fastflower, but this one reads versions 1 "
        f"to 2; upgrade fastflower (pip install --upgrade fastflower)."
    )
    with pytest.raises(ShardError, match=exactly(text)):
        Manifest.load(write_changed(tmp_path, lambda values: values.update(version=3)))


@pytest.mark.parametrize("key", json.loads(MANIFEST.to_json()))
def test_a_missing_key_is_reported(tmp_path: Path, key: str) -> None:
    what = f"has a missing or invalid key ({key!r}); restore it from a backup, or run fastflower pack again."
    text = f"{tmp_path / 'manifest.json'}: {what}"
    with pytest.raises(ShardError, match=exactly(text)):
        Manifest.load(write_changed(tmp_path, lambda values: values.pop(key)))


@pytest.mark.parametrize("path", [("samples",), ("class_counts",), ("shards",), ("shards", 0, "sha256")])
def test_a_missing_nested_key_is_reported(tmp_path: Path, path: tuple[Any, ...]) -> None:
    def remove(values: dict[str, Any]) -> None:
        place = values["splits"]["train"]
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]

    with pytest.raises(ShardError, match=rf"key \(.*'{path[-1]}'\); restore it .*pack again\.$"):
        Manifest.load(write_changed(tmp_path, remove))


@pytest.mark.parametrize("text", ["[]", "null", "3", '"text"'])
def test_json_of_another_shape_is_rejected(tmp_path: Path, text: str) -> None:
    with pytest.raises(ShardError, match=r"has a missing or invalid key \(.+\); restore it .*pack again\.$"):
        Manifest.load(write_manifest(tmp_path, text))


@pytest.mark.parametrize("name", ["test", "val", "Train"])
def test_an_unknown_or_empty_split_lists_the_available_ones(tmp_path: Path, name: str) -> None:
    manifest = Manifest.load(write_manifest(tmp_path))
    text = f"{tmp_path}: has no samples in split '{name}'; choose from train."
    if name == "Train":
        text = f"{tmp_path}: has no split 'Train'; did you mean 'train'?"
    with pytest.raises(ShardError, match=exactly(text)):
        manifest.split(name)
    with pytest.raises(ShardError, match=exactly(text)):
        manifest.index(name)


def test_the_index_has_one_row_per_sample_and_is_memory_mapped(shards: Path) -> None:
    manifest = Manifest.load(shards)
    for name in ("train", "val"):
        rows = manifest.index(name)
        assert isinstance(rows, np.memmap)
        assert (rows.dtype, rows.shape) == (INDEX_DTYPE, (manifest.split(name).samples,))
        counts = np.bincount(rows["label"], minlength=5)
        assert tuple(counts) == manifest.split(name).class_counts
        assert tuple(np.bincount(rows["shard"])) == tuple(shard.samples for shard in manifest.split(name).shards)


INDEX = np.zeros(3, INDEX_DTYPE)


def test_a_missing_index_is_reported(tmp_path: Path) -> None:
    pattern = r"train\.index\.npy: cannot be read \(.*No such file.*\); restore it from a backup, or rebuild it with fastflower"
    with pytest.raises(ShardError, match=pattern):
        Manifest.load(write_manifest(tmp_path)).index("train")


@pytest.mark.parametrize("kept", [0, 3, 30, -1])
def test_a_truncated_index_is_rejected(tmp_path: Path, kept: int) -> None:
    path = write_manifest(tmp_path) / "train.index.npy"
    np.save(path, INDEX)
    path.write_bytes(path.read_bytes()[:kept])
    pattern = rf"^{re.escape(str(path))}: cannot be read \(.+\); restore it from a backup, or rebuild it with fastflower verify"
    with pytest.raises(ShardError, match=pattern):
        Manifest.load(tmp_path).index("train")


@pytest.mark.parametrize("rows", [INDEX[:2], np.zeros(4, INDEX_DTYPE), np.zeros(3), np.zeros((3, 1), INDEX_DTYPE)])
def test_an_index_that_does_not_match_the_manifest_is_rejected(tmp_path: Path, rows: Any) -> None:
    path = write_manifest(tmp_path) / "train.index.npy"
    np.save(path, rows)
    text = (
        f"{path}: has shape {rows.shape} and dtype {rows.dtype}, but the manifest says 3 samples; "
        f"restore it from a backup, or rebuild it with fastflower verify {tmp_path} --repair."
    )
    with pytest.raises(ShardError, match=exactly(text)):
        Manifest.load(tmp_path).index("train")


def test_write_atomically_replaces_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for content in (b"old and long", b"new"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError, match="bytes-like"):
        write_atomically(path, cast(bytes, "text"))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_replace_leaves_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_concurrent_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    contents = [bytes([number]) * 100_000 for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(write_atomically, [path] * 24, contents)) == [None] * 24
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_pack_that_cannot_be_finished_shows_no_shard_and_can_be_resumed(tmp_path: Path) -> None:
    """A folder blocks one of the last files, so the files that were already in place are removed again."""
    folder, out = drawn(tmp_path / "data", a=5, b=4), tmp_path / "out"
    pack(folder, tmp_path / "expected", shard_bytes=4000)
    interrupted(folder, out, shards=1, shard_bytes=4000)
    (out / "_info.json").mkdir()
    text = (
        f"{out}: cannot be written (Is a directory); choose another folder as out (--out). "
        f"To resume:\n  pack({str(folder)!r}, {str(out)!r}, shard_bytes=4000)"
    )
    with pytest.raises(FolderError, match=exactly(text)):
        pack(folder, out, shard_bytes=4000)
    assert sorted(path.name for path in out.iterdir()) == [".packing", "_info.json"]
    (out / "_info.json").rmdir()
    pack(folder, out, shard_bytes=4000)
    assert checksums(out) == checksums(tmp_path / "expected")


def test_a_missing_package_is_reported_as_not_installed() -> None:
    assert version_of("numpy") == version("numpy")
    assert version_of("no-such-package") == "not installed"
