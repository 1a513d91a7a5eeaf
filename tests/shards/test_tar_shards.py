"""Shards on disk: tar, WebDataset, DALI and timm read them as fastflower does, and damage is reported."""

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
from packs import NASTY, nasty, read_by_dali, samples
from PIL import Image
from timm.data.readers.reader_factory import create_reader
from webdataset.compat import WebDataset

from fastflower import Manifest, pack
from fastflower.errors import SampleError, ShardError
from fastflower.shards.image import decode
from fastflower.shards.manifest import INDEX_DTYPE
from fastflower.shards.reader import ShardReader
from fastflower.shards.writer import Samples, ShardWriter, index_rows

SPLITS = ["train", "val"]
# WebDataset does not close its tars.
IGNORE_UNCLOSED_FILES = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def tars(folder: Path, split: str) -> list[Path]:
    return [folder / shard.name for shard in Manifest.load(folder).split(split).shards]


def packed(folder: Path, split: str) -> list[tuple[bytes, int]]:
    """Return (JPEG file, label) of every sample, in the order of the index."""
    reader = ShardReader(Manifest.load(folder), split)
    return [(bytes(reader.encoded(number)), int(row["label"])) for number, row in enumerate(reader.index)]


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """A pack to damage."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.fixture(scope="session")
def nasty_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of files with nasty names, in several shards."""
    folder = tmp_path_factory.mktemp("nasty")
    manifest = pack(nasty(folder / "data"), folder / "shards", shard_bytes=1 << 14)
    assert manifest.skipped == ()
    assert sum(split.samples for split in manifest.splits.values()) == 2 * len(NASTY) + 6
    return folder / "shards"


@pytest.fixture(params=["shards", "nasty_shards"])
def both(request: pytest.FixtureRequest) -> Path:
    """Two packs: drawn flowers, and files with nasty names."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("split", SPLITS)
def test_every_sample_equals_its_source_file(flowers: Path, shards: Path, split: str) -> None:
    manifest = Manifest.load(shards)
    reader = ShardReader(manifest, split)
    paths = [reader.path(number) for number in range(manifest.split(split).samples)]
    for number, path in enumerate(paths):
        assert reader.encoded(number) == (flowers / path).read_bytes()
        assert manifest.classes[reader.index[number]["label"]] == path.partition("/")[0]
    assert len(set(paths)) == len(paths)


def test_the_splits_contain_every_image_once(flowers: Path, shards: Path) -> None:
    manifest = Manifest.load(shards)
    found = [ShardReader(manifest, split).path(n) for split in SPLITS for n in range(manifest.split(split).samples)]
    assert sorted(found) == sorted(path.relative_to(flowers).as_posix() for path in flowers.glob("*/*.jpg"))


@pytest.mark.parametrize("split", SPLITS)
def test_tarfile_finds_the_samples_of_the_index(both: Path, split: str) -> None:
    found = list(samples(both, split))
    assert packed(both, split) == [(sample.image, sample.label) for sample in found]
    reader = ShardReader(Manifest.load(both), split)
    assert [reader.path(number) for number in range(len(found))] == [sample.path for sample in found]


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


def test_the_manifest_matches_the_tars(both: Path) -> None:
    for split in Manifest.load(both).splits.values():
        for shard in split.shards:
            data = (both / shard.name).read_bytes()
            assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
            with tarfile.open(both / shard.name) as tar:
                assert shard.samples == sum(name.endswith(".jpg") for name in tar.getnames())
        assert split.samples == sum(shard.samples for shard in split.shards) == sum(split.class_counts)


@pytest.mark.parametrize("split", SPLITS)
def test_the_index_has_the_size_of_the_decoded_image(shards: Path, split: str) -> None:
    reader = ShardReader(Manifest.load(shards), split)
    for number in range(0, len(reader.index), 7):
        height, width, _ = decode(reader.encoded(number)).shape
        assert (reader.index[number]["height"], reader.index[number]["width"]) == (height, width)


@pytest.mark.dali
def test_the_dali_index_equals_the_output_of_wds2idx(both: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "wds2idx"
    for tar in sorted(both.glob("*.tar")):
        subprocess.run([program, tar, tmp_path / "other.idx"], check=True, capture_output=True)
        assert tar.with_suffix(".idx").read_text() == (tmp_path / "other.idx").read_text()


@IGNORE_UNCLOSED_FILES
@pytest.mark.parametrize("split", SPLITS)
def test_webdataset_reads_every_sample(both: Path, split: str) -> None:
    names = [str(path) for path in tars(both, split)]
    read = list(WebDataset(names, shardshuffle=False))
    assert [(sample["jpg"], int(sample["cls"])) for sample in read] == packed(both, split)
    found = list(samples(both, split))
    assert [sample["__key__"] for sample in read] == [sample.key for sample in found]
    classes = Manifest.load(both).classes
    assert [json.loads(sample["json"]) for sample in read] == [
        {"filename": sample.path, "class": classes[sample.label]} for sample in found
    ]


@pytest.mark.dali
@pytest.mark.parametrize("split", SPLITS)
def test_dali_reads_every_sample(both: Path, split: str) -> None:
    paths, expected = tars(both, split), packed(both, split)
    batch = len(expected) // len(paths)  # batches also cross the boundaries of shards
    assert read_by_dali(both, split, batch) == expected


@IGNORE_UNCLOSED_FILES
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("training", [False, True])
def test_timm_reads_every_sample(both: Path, split: str, training: bool) -> None:
    """In the order of the index, or shuffled by timm for training."""
    reader: Any = create_reader("wds/", str(both), split, is_training=training)
    found = [(image.tobytes(), label) for image, label in reader]
    expected = [(Image.open(io.BytesIO(image)).convert("RGB").tobytes(), label) for image, label in packed(both, split)]
    assert len(reader) == len(found)
    assert sorted(found) == sorted(expected)
    assert training or found == expected


def test_tar_lists_cls_jpg_and_json_of_each_sample_together_in_order(both: Path) -> None:
    for split in SPLITS:
        found = list(samples(both, split))
        for path in tars(both, split):
            listed = subprocess.run(["tar", "tf", path], check=True, capture_output=True, text=True).stdout.split()
            keys = [sample.key for sample in found if sample.shard == path.name]
            assert listed == [f"{key}.{extension}" for key in keys for extension in ("cls", "jpg", "json")]
        assert len({sample.key for sample in found}) == len(found)


def test_members_have_no_time_owner_or_mode_of_this_machine(shards: Path) -> None:
    with tarfile.open(tars(shards, "train")[0]) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert (member.mode, member.type) == (0o644, tarfile.REGTYPE)


Item = tuple[str, bytes, int, str, str]  # key, image, label, source, class


def numbered_items(*images: bytes) -> list[Item]:
    return [(f"key-{n}", image, n, f"class/{n}.jpg", "class") for n, image in enumerate(images)]


def build_samples(items: list[Item]) -> Samples:
    made = Samples()
    for key, image, label, source, name in items:
        made.add(key, image, label, (2, 3), source, name)
    return made


def write(path: Path, *groups: list[Item]) -> ShardWriter:
    with path.open("wb") as file, ShardWriter(file) as writer:
        for group in groups:
            writer.extend(build_samples(group))
    return writer


def by_tarfile(items: list[Item]) -> bytes:
    """Return the tar that Python's tarfile writes."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, label, source, name in items:
            note = f'{{"filename": "{source}", "class": "{name}"}}'.encode()
            for extension, content in (("cls", str(label).encode()), ("jpg", image), ("json", note)):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


LONGEST = "k" * (100 - len(".json"))
ITEMS = [
    *([("key", bytes(size), 0, "class/name.jpg", "class")] for size in (0, 1, 511, 512, 513, 1024, 100_000)),
    *([("key", b"image", 0, "n" * size, "class")] for size in range(476, 484)),  # the .json crosses a block's end
    *(numbered_items(*[b"x" * 512] * number) for number in range(1, 12)),  # the end blocks cross a record's end
    [(key, b"image", 7, "name", "class") for key in ("k", "k" * 50, LONGEST)],
    [("key", b"image", label, "name", "class") for label in (0, 9, 10, 12_345, 2**31 - 1)],
    [("key", b"image", 0, "häß/日本 🌻.jpg", "häß")],
    [],
]


@pytest.mark.parametrize("items", ITEMS, ids=range(len(ITEMS)))
def test_a_shard_equals_the_output_of_tarfile_byte_for_byte(tmp_path: Path, items: list[Item]) -> None:
    expected = by_tarfile(items)
    writer = write(tmp_path / "x.tar", items)
    assert (tmp_path / "x.tar").read_bytes() == expected
    assert len(expected) % tarfile.RECORDSIZE == 0
    shard = writer.shard("x.tar")
    assert (shard.name, shard.samples) == ("x.tar", len(items))
    assert (shard.bytes, shard.sha256) == (len(expected), hashlib.sha256(expected).hexdigest())
    rows = writer.rows
    assert rows.dtype == INDEX_DTYPE
    assert [expected[row["offset"] : row["offset"] + row["size"]] for row in rows] == [item[1] for item in items]
    assert rows["label"].tolist() == [item[2] for item in items]


def test_a_shard_does_not_depend_on_how_its_samples_are_grouped(tmp_path: Path) -> None:
    items = numbered_items(*(b"x" * size for size in (0, 700, 512, 3, 2000, 1)))
    whole = write(tmp_path / "whole.tar", items)
    for number, cuts in enumerate([(1,), (3,), (0, 2, 2, 5), (1, 2, 3, 4, 5)]):
        groups = [items[start:stop] for start, stop in zip((0, *cuts), (*cuts, None), strict=True)]
        parts = write(tmp_path / f"{number}.tar", *groups)
        assert (tmp_path / f"{number}.tar").read_bytes() == (tmp_path / "whole.tar").read_bytes()
        assert parts.shard("x") == whole.shard("x")
        assert parts.rows.tolist() == whole.rows.tolist()
        assert parts.dali_index_pieces() == whole.dali_index_pieces()


def test_a_shard_interrupted_by_an_error_has_no_end_blocks(tmp_path: Path) -> None:
    with pytest.raises(KeyError), (tmp_path / "x.tar").open("wb") as file, ShardWriter(file) as writer:  # noqa: PT012  (tests the exit of the context)
        writer.extend(build_samples(numbered_items(b"image")))
        raise KeyError
    whole = by_tarfile(numbered_items(b"image"))
    cut = (tmp_path / "x.tar").read_bytes()
    assert cut == whole[: len(cut)]
    assert len(cut) == 6 * 512


def rows_at(*offsets: int) -> Any:
    rows = np.zeros(len(offsets), INDEX_DTYPE)
    rows["offset"] = offsets
    return rows


@pytest.mark.parametrize(
    ("shards", "expected"),
    [([], []), ([()], []), ([(5, 6)], [0, 0]), ([(5, 6), (7,), (), (8, 9, 10)], [0, 0, 1, 3, 3, 3])],
)
def test_the_rows_of_a_split_are_those_of_its_shards_with_shard_numbers(
    shards: list[tuple[int, ...]], expected: list[int]
) -> None:
    rows = index_rows([rows_at(*offsets) for offsets in shards])
    assert rows.dtype == INDEX_DTYPE
    assert rows["shard"].tolist() == expected
    assert rows["offset"].tolist() == [offset for offsets in shards for offset in offsets]


def test_a_path_that_is_not_utf8_is_read_back(tmp_path: Path) -> None:
    path = b"class/caf\xe9 \xc3\xb6.jpg".decode("utf-8", "surrogateescape")
    write(tmp_path / "x.tar", [("key", b"image", 0, path, "caf\udce9")])
    with tarfile.open(tmp_path / "x.tar") as tar:
        note = tar.extractfile("key.json")
        assert note is not None
        text = note.read().decode("utf-8")
    assert json.loads(text) == {"filename": path, "class": "caf\udce9"}
    assert "ö" in text


def test_samples_can_be_read_in_any_order(shards: Path) -> None:
    reader = ShardReader(Manifest.load(shards), "train")
    forwards = [reader.encoded(number) for number in range(120)]
    assert [reader.encoded(number) for number in reversed(range(120))] == forwards[::-1]


@pytest.mark.parametrize("number", [0, 57, 119])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_reported_with_shard_key_and_path(copy: Path, number: int, share: float) -> None:
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
        f"restore the shard from a backup, or run fastflower pack again."
    )
    with pytest.raises(SampleError, match=f"^{re.escape(text)}$"):
        reader.encoded(number)
    untouched = {0, 57, 119} - {number}
    assert all(reader.encoded(other) for other in untouched)


def test_a_shard_of_zeros_is_reported_without_key_and_path(copy: Path) -> None:
    path = tars(copy, "train")[0]
    path.write_bytes(bytes(path.stat().st_size))
    reader = ShardReader(Manifest.load(copy), "train")
    with pytest.raises(
        SampleError, match=rf"^{re.escape(str(path))}: sample 0: its bytes have changed .*fastflower pack again\.$"
    ):
        reader.encoded(0)


def test_a_missing_shard_is_reported(copy: Path) -> None:
    path = tars(copy, "train")[-1]
    path.unlink()
    text = f"{path}: is missing; restore the shard from a backup, or run fastflower pack again."
    with pytest.raises(ShardError, match=f"^{re.escape(text)}$"):
        ShardReader(Manifest.load(copy), "train")
    assert ShardReader(Manifest.load(copy), "val").encoded(0)


@pytest.mark.parametrize("change", [-512, 1])
def test_a_shard_of_another_size_is_reported(copy: Path, change: int) -> None:
    path = tars(copy, "val")[0]
    size = path.stat().st_size
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    remedy = "restore the shard from a backup, or run fastflower pack again."
    text = f"{path}: has {size + change} bytes, but the manifest says {size}; {remedy}"
    with pytest.raises(ShardError, match=f"^{re.escape(text)}$"):
        ShardReader(Manifest.load(copy), "val")
