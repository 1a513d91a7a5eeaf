"""Shards on disk: tar, WebDataset and DALI read them as we do, and damage is named."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import fn as untyped_fn
from nvidia.dali.pipeline import Pipeline
from webdataset.compat import WebDataset

from fastflower import Manifest
from fastflower.errors import SampleError, ShardError
from fastflower.image import decode
from fastflower.packing import key_of
from fastflower.shard import ShardReader, ShardWriter, describe

fn: Any = untyped_fn  # DALI makes their names at run time
SPLITS = ["train", "val"]


def tars(folder: Path, split: str) -> list[Path]:
    return [folder / shard.name for shard in Manifest.load(folder).split(split).shards]


def packed(folder: Path, split: str) -> list[tuple[bytes, int]]:
    """(JPEG file, label) of every sample, in the order of the index."""
    reader = ShardReader(Manifest.load(folder), split)
    return [(bytes(reader.encoded(number)), int(row["label"])) for number, row in enumerate(reader.index)]


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """A pack to damage."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.mark.parametrize("split", SPLITS)
def test_every_sample_is_its_source_file(flowers: Path, shards: Path, split: str) -> None:
    manifest = Manifest.load(shards)
    reader = ShardReader(manifest, split)
    paths = [reader.path(number) for number in range(manifest.split(split).samples)]
    for number, path in enumerate(paths):
        assert reader.encoded(number) == (flowers / path).read_bytes()
        assert manifest.classes[reader.index[number]["label"]] == path.partition("/")[0]
    assert len(set(paths)) == len(paths)


def test_the_splits_hold_every_photograph_once(flowers: Path, shards: Path) -> None:
    manifest = Manifest.load(shards)
    found = [ShardReader(manifest, split).path(n) for split in SPLITS for n in range(manifest.split(split).samples)]
    assert sorted(found) == sorted(path.relative_to(flowers).as_posix() for path in flowers.glob("*/*.jpg"))


def test_shards_are_shuffled_over_all_classes(shards: Path) -> None:
    for split in SPLITS:
        rows = Manifest.load(shards).index(split)
        assert all(len(set(rows["label"][rows["shard"] == shard])) >= 4 for shard in np.unique(rows["shard"]))
    reader = ShardReader(Manifest.load(shards), "train")
    order = [reader.path(number) for number in range(120)]
    assert order != sorted(order)


def test_info_agrees_with_the_manifest(shards: Path) -> None:
    manifest = Manifest.load(shards)
    info = json.loads((shards / "_info.json").read_text())["splits"]
    assert set(info) == {"train", "val"}
    for name, split in manifest.splits.items():
        assert info[name] == {
            "name": name,
            "num_samples": split.samples,
            "filenames": [shard.name for shard in split.shards],
            "shard_lengths": [shard.samples for shard in split.shards],
        }


def test_the_manifest_tells_the_truth(shards: Path) -> None:
    for split in Manifest.load(shards).splits.values():
        for shard in split.shards:
            data = (shards / shard.name).read_bytes()
            assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
            with tarfile.open(shards / shard.name) as tar:
                assert shard.samples == sum(name.endswith(".jpg") for name in tar.getnames())
        assert split.samples == sum(shard.samples for shard in split.shards) == sum(split.class_counts)


@pytest.mark.parametrize("split", SPLITS)
def test_the_index_tells_the_size_of_the_decoded_image(shards: Path, split: str) -> None:
    reader = ShardReader(Manifest.load(shards), split)
    for number in range(0, len(reader.index), 7):
        height, width, _ = decode(reader.encoded(number)).shape
        assert (reader.index[number]["height"], reader.index[number]["width"]) == (height, width)


def test_dalis_index_is_what_wds2idx_writes(shards: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "wds2idx"
    for tar in sorted(shards.glob("*.tar")):
        subprocess.run([program, tar, tmp_path / "other.idx"], check=True, capture_output=True)
        assert tar.with_suffix(".idx").read_text() == (tmp_path / "other.idx").read_text()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its tars to be closed
@pytest.mark.parametrize("split", SPLITS)
def test_webdataset_reads_every_sample(shards: Path, split: str) -> None:
    names = [str(path) for path in tars(shards, split)]
    samples = list(WebDataset(names, shardshuffle=False))
    assert [(sample["jpg"], int(sample["cls"])) for sample in samples] == packed(shards, split)
    reader = ShardReader(Manifest.load(shards), split)
    assert [json.loads(sample["json"]) for sample in samples] == [
        {"filename": reader.path(number)} for number in range(len(samples))
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_dali_reads_every_sample(shards: Path, split: str) -> None:
    paths, expected = tars(shards, split), packed(shards, split)
    pipeline = Pipeline(batch_size=30, num_threads=2, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        outputs = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
            name="reader",
        )
        pipeline.set_outputs(*outputs)
    pipeline.build()
    assert pipeline.epoch_size("reader") == len(expected)
    found: list[tuple[bytes, int]] = []
    for _ in range(len(expected) // 30):
        images, labels = pipeline.run()
        found += [
            (np.asarray(images.at(position)).tobytes(), int(np.asarray(labels.at(position)).tobytes()))
            for position in range(30)
        ]
    assert found == expected


def test_tar_lists_cls_jpg_and_json_of_each_sample_together_in_order(shards: Path) -> None:
    for path in sorted(shards.glob("*.tar")):
        listed = subprocess.run(["tar", "tf", path], check=True, capture_output=True, text=True).stdout.split()
        keys = [name.rpartition(".")[0] for name in listed[::3]]
        assert listed == [f"{key}.{ending}" for key in keys for ending in ("cls", "jpg", "json")]
        assert len(set(keys)) == len(keys)


def test_keys_depend_on_the_whole_path_and_say_what_they_stand_for() -> None:
    assert key_of("a/x.jpg") == key_of("a/x.jpg")
    assert (
        len({key_of(path) for path in ("a/x.jpg", "a/x.png", "b/x.jpg", "a_x.jpg", "a/x.JPG", "a/é.jpg", "a/è.jpg")})
        == 7
    )
    assert key_of("rose/red 12.jpg").startswith("rose_red_12-")
    assert len(key_of("c/" + "long" * 100 + "-end.jpg")) + len(".json") <= 100  # what a tar header holds


def test_members_carry_no_time_owner_or_mode_of_this_machine(shards: Path) -> None:
    with tarfile.open(tars(shards, "train")[0]) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert (member.mode, member.type) == (0o644, tarfile.REGTYPE)


def write(path: Path, *images: bytes) -> ShardWriter:
    with ShardWriter(path) as writer:
        for number, image in enumerate(images):
            writer.add(f"key-{number}", image, number, (2, 3), f"class/{number}.jpg")
    return writer


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024, 100_000])
def test_offsets_hold_at_the_edges_of_tars_blocks(tmp_path: Path, size: int) -> None:
    images = [bytes([number]) * size for number in (1, 2, 3)]
    rows = write(tmp_path / "x.tar", *images).rows
    whole = (tmp_path / "x.tar").read_bytes()
    assert [whole[offset : offset + length] for offset, length, *_ in rows] == images
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert [member.offset_data for member in tar if member.name.endswith(".jpg")] == [row[0] for row in rows]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write(tmp_path / name, b"one", b"two")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert describe(tmp_path / "a.tar", "x", 2) == describe(tmp_path / "b.tar", "x", 2)


def test_a_path_that_is_no_utf8_is_read_back(tmp_path: Path) -> None:
    path = b"class/caf\xe9 \xc3\xb6.jpg".decode("utf-8", "surrogateescape")
    with ShardWriter(tmp_path / "x.tar") as writer:
        writer.add("key", b"image", 0, (1, 1), path)
    with tarfile.open(tmp_path / "x.tar") as tar:
        note = tar.extractfile("key.json")
        assert note is not None
        text = note.read().decode("utf-8")
    assert json.loads(text) == {"filename": path}
    assert "ö" in text


def test_reading_is_by_any_index_and_does_not_copy(shards: Path) -> None:
    reader = ShardReader(Manifest.load(shards), "train")
    forwards = [bytes(reader.encoded(number)) for number in range(120)]
    assert [bytes(reader.encoded(number)) for number in reversed(range(120))] == forwards[::-1]
    view = reader.encoded(5)
    assert isinstance(view, memoryview)
    assert view.readonly


@pytest.mark.parametrize("number", [0, 57, 119])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_named_with_shard_key_and_path(copy: Path, number: int, share: float) -> None:
    manifest = Manifest.load(copy)
    row = manifest.index("train")[number]
    path = tars(copy, "train")[row["shard"]]
    with tarfile.open(path) as tar:
        key = next(m.name for m in tar if m.offset_data == row["offset"]).removesuffix(".jpg")
        note = json.load(io.BytesIO(tar.extractfile(f"{key}.json").read()))  # pyright: ignore[reportOptionalMemberAccess]
    with path.open("r+b") as file:
        file.seek(int(row["offset"]) + int((int(row["size"]) - 1) * share))
        (value,) = file.read(1)
        file.seek(-1, io.SEEK_CUR)
        file.write(bytes([value ^ 1]))
    reader = ShardReader(manifest, "train")
    text = (
        f"{path}: sample {key} ({note['filename']}): its bytes have changed since it was packed (checksum mismatch); "
        f"restore the shard from a copy, or pack again."
    )
    with pytest.raises(SampleError, match=f"^{re.escape(text)}$"):
        reader.encoded(number)
    untouched = {0, 57, 119} - {number}
    assert all(reader.encoded(other) for other in untouched)


def test_a_shard_of_zeros_is_still_named(copy: Path) -> None:
    path = tars(copy, "train")[0]
    path.write_bytes(bytes(path.stat().st_size))
    reader = ShardReader(Manifest.load(copy), "train")
    with pytest.raises(
        SampleError, match=rf"^{re.escape(str(path))}: sample 0: its bytes have changed .*pack again\.$"
    ):
        reader.encoded(0)


def test_a_missing_shard_is_named(copy: Path) -> None:
    path = tars(copy, "train")[-1]
    path.unlink()
    text = f"{path}: is missing; restore the shard from a copy, or pack again."
    with pytest.raises(ShardError, match=f"^{re.escape(text)}$"):
        ShardReader(Manifest.load(copy), "train")
    assert ShardReader(Manifest.load(copy), "val").encoded(0)


@pytest.mark.parametrize("change", [-512, 1])
def test_a_shard_of_another_size_is_named(copy: Path, change: int) -> None:
    path = tars(copy, "val")[0]
    size = path.stat().st_size
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    text = f"{path}: has {size + change} bytes, the manifest says {size}; restore the shard from a copy, or pack again."
    with pytest.raises(ShardError, match=f"^{re.escape(text)}$"):
        ShardReader(Manifest.load(copy), "val")
