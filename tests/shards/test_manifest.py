"""The manifest: round trip, damage, and writing that is seen whole or not at all."""

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
    skipped=({"path": "röse/x.jpg", "reason": "is no image"},),
    duplicates=(("daisy/1.jpg", "daisy/2.jpg"), ("daisy/3.jpg", "röse/1.jpg")),
    label_conflicts=(("daisy/3.jpg", "röse/1.jpg"),),
    near_duplicates=({"split": "val", "path": "daisy/4.jpg", "train_path": "daisy/5.jpg", "distance": 3},),
    source_bytes=12_345_678_901,
    packed_bytes=30_000,
    versions={"fastflower": "1.2.3", "pillow": "12.0", "opencv": "4.11"},
)


def stored(folder: Path, text: str | bytes | None = None) -> Path:
    data = MANIFEST.to_json() if text is None else text
    (folder / "manifest.json").write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    values = json.loads(MANIFEST.to_json())
    change(values)
    return stored(folder, json.dumps(values))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    loaded = Manifest.load(stored(tmp_path))
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
def test_what_is_written_in_a_pack_is_read_back(tmp_path: Path, change: dict[str, Any]) -> None:
    """As packing encodes it, for names need not be UTF-8."""
    manifest = replace(MANIFEST, folder=tmp_path, **change)
    text = manifest.to_json().encode("utf-8", "backslashreplace")
    assert Manifest.load(stored(tmp_path, text)) == manifest
    assert json.loads(text)["classes"] == list(manifest.classes)


def test_the_same_manifest_gives_the_same_bytes(tmp_path: Path) -> None:
    assert Manifest.load(stored(tmp_path)).to_json() == MANIFEST.to_json()
    assert replace(MANIFEST, folder=Path("elsewhere")).to_json() == MANIFEST.to_json()
    assert replace(MANIFEST, classes=("a", "b", "c")).to_json() != MANIFEST.to_json()


def test_the_file_is_json_that_people_can_read() -> None:
    text = MANIFEST.to_json()
    values = json.loads(text)
    assert (values["format"], values["version"]) == ("fastflower", 2)
    assert "röse" in text
    told = [item.name for item in fields(Manifest) if item.name not in ("folder", "version")]
    assert list(values) == ["format", "version", *told, "sha256"]
    assert values["splits"]["train"]["shards"][1] == {"name": "b.tar", "samples": 1, "bytes": 10240, "sha256": "1" * 64}
    assert values["near_duplicates"] == list(MANIFEST.near_duplicates)
    assert (values["source_bytes"], values["packed_bytes"]) == (12_345_678_901, 30_000)
    assert text.endswith("}\n")


def test_a_pack_loads_as_pack_returned_it(shards: Path) -> None:
    loaded = Manifest.load(shards)
    assert loaded.to_json().encode() == (shards / "manifest.json").read_bytes()
    assert {name: split.samples for name, split in loaded.splits.items()} == {"train": 120, "val": 30}


@pytest.mark.parametrize("text", ["", "{", MANIFEST.to_json()[:-20], b"\xff\xfe\x00", "no JSON"])
def test_damaged_text_is_refused(tmp_path: Path, text: str | bytes) -> None:
    pattern = f"^{re.escape(str(tmp_path / 'manifest.json'))}: cannot be read \\(.+\\); restore it from a copy or pack again\\.$"
    with pytest.raises(ShardError, match=pattern):
        Manifest.load(stored(tmp_path, text))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.tar").write_bytes(b"x")
    with pytest.raises(ShardError, match=r"file\.tar/manifest\.json: cannot be read \(.+\); restore it from a copy"):
        Manifest.load(tmp_path / "file.tar")


@pytest.mark.parametrize(("key", "value"), [("version", "2"), ("version", 0), ("format", "others")])
def test_another_format_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    is_now = {"format": "fastflower", "version": 2, key: value}
    text = (
        f"{tmp_path / 'manifest.json'}: is format {is_now['format']} version {is_now['version']}, "
        f"this fastflower reads versions 1 to 2; restore it from a copy or pack again."
    )
    with pytest.raises(ShardError, match=exactly(text)):
        Manifest.load(changed(tmp_path, lambda values: values.update({key: value})))


def test_a_newer_version_asks_for_a_newer_fastflower(tmp_path: Path) -> None:
    text = (
        f"{tmp_path / 'manifest.json'}: is version 3 of the format, written by a newer fastflower; this one reads versions 1 "
        f"to 2: upgrade it (pip install --upgrade fastflower)."
    )
    with pytest.raises(ShardError, match=exactly(text)):
        Manifest.load(changed(tmp_path, lambda values: values.update(version=3)))


@pytest.mark.parametrize("key", json.loads(MANIFEST.to_json()))
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    text = f"{tmp_path / 'manifest.json'}: lacks {key!r}; restore it from a copy or pack again."
    with pytest.raises(ShardError, match=exactly(text)):
        Manifest.load(changed(tmp_path, lambda values: values.pop(key)))


@pytest.mark.parametrize("path", [("samples",), ("class_counts",), ("shards",), ("shards", 0, "sha256")])
def test_a_missing_key_further_down_is_named(tmp_path: Path, path: tuple[Any, ...]) -> None:
    def remove(values: dict[str, Any]) -> None:
        place = values["splits"]["train"]
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]

    with pytest.raises(ShardError, match=rf"lacks .*'{path[-1]}'; restore it from a copy or pack again\.$"):
        Manifest.load(changed(tmp_path, remove))


@pytest.mark.parametrize("text", ["[]", "null", "3", '"text"'])
def test_json_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ShardError, match=r"manifest\.json: lacks .+; restore it from a copy or pack again\.$"):
        Manifest.load(stored(tmp_path, text))


@pytest.mark.parametrize("name", ["test", "val", "Train"])
def test_an_unknown_or_empty_split_names_those_there_are(tmp_path: Path, name: str) -> None:
    manifest = Manifest.load(stored(tmp_path))
    text = f"{tmp_path}: has no samples in split '{name}'; it has train."
    with pytest.raises(ShardError, match=exactly(text)):
        manifest.split(name)
    with pytest.raises(ShardError, match=exactly(text)):
        manifest.index(name)


def test_the_index_has_a_row_a_sample_and_is_not_read_into_memory(shards: Path) -> None:
    manifest = Manifest.load(shards)
    for name in ("train", "val"):
        rows = manifest.index(name)
        assert isinstance(rows, np.memmap)
        assert (rows.dtype, rows.shape) == (INDEX_DTYPE, (manifest.split(name).samples,))
        counts = np.bincount(rows["label"], minlength=5)
        assert tuple(counts) == manifest.split(name).class_counts
        assert tuple(np.bincount(rows["shard"])) == tuple(shard.samples for shard in manifest.split(name).shards)


INDEX = np.zeros(3, INDEX_DTYPE)


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    pattern = (
        r"train\.index\.npy: cannot be read \(.*No such file.*\); restore it from a copy, or rebuild it with fastflower"
    )
    with pytest.raises(ShardError, match=pattern):
        Manifest.load(stored(tmp_path)).index("train")


@pytest.mark.parametrize("kept", [0, 3, 30, -1])
def test_an_index_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    path = stored(tmp_path) / "train.index.npy"
    np.save(path, INDEX)
    path.write_bytes(path.read_bytes()[:kept])
    pattern = (
        rf"^{re.escape(str(path))}: cannot be read \(.+\); restore it from a copy, or rebuild it with fastflower verify"
    )
    with pytest.raises(ShardError, match=pattern):
        Manifest.load(tmp_path).index("train")


@pytest.mark.parametrize("rows", [INDEX[:2], np.zeros(4, INDEX_DTYPE), np.zeros(3), np.zeros((3, 1), INDEX_DTYPE)])
def test_an_index_that_does_not_fit_the_manifest_is_refused(tmp_path: Path, rows: Any) -> None:
    path = stored(tmp_path) / "train.index.npy"
    np.save(path, rows)
    text = (
        f"{path}: has {rows.shape} rows of {rows.dtype}, the manifest says 3 samples; "
        f"restore it from a copy, or rebuild it with fastflower verify {tmp_path} --repair."
    )
    with pytest.raises(ShardError, match=exactly(text)):
        Manifest.load(tmp_path).index("train")


def test_writing_replaces_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for content in (b"old and long", b"new"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_writing_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError, match="bytes-like"):
        write_atomically(path, cast(bytes, "text"))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_many_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    contents = [bytes([number]) * 100_000 for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(write_atomically, [path] * 24, contents)) == [None] * 24
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_pack_that_cannot_be_finished_shows_no_shard_and_goes_on_later(tmp_path: Path) -> None:
    """A folder stands where one of the last files is to go: what was in place already is taken back."""
    folder, out = drawn(tmp_path / "data", a=5, b=4), tmp_path / "out"
    pack(folder, tmp_path / "expected", shard_bytes=4000)
    interrupted(folder, out, shards=1, shard_bytes=4000)
    (out / "_info.json").mkdir()
    text = (
        f"{out}: cannot be written (Is a directory); free up space, or choose another folder with --out. "
        f"Run the same command again to resume."
    )
    with pytest.raises(FolderError, match=exactly(text)):
        pack(folder, out, shard_bytes=4000)
    assert sorted(path.name for path in out.iterdir()) == [".packing", "_info.json"]
    (out / "_info.json").rmdir()
    pack(folder, out, shard_bytes=4000)
    assert checksums(out) == checksums(tmp_path / "expected")


def test_versions_of_what_is_only_on_the_path_are_said_to_be_missing() -> None:
    assert version_of("numpy") == version("numpy")
    assert version_of("fastflower-of-nobody") == "not installed"
