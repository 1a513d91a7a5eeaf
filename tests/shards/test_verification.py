"""Every kind of damage to a pack is reported, nothing else is, and indexes and manifest can be rebuilt from the tars."""

import io
import json
import random
import re
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packs import drawn, exactly

from fastflower import Augment, Loader, Manifest, pack
from fastflower.errors import ShardError
from fastflower.shards import verification
from fastflower.shards.manifest import INDEX_DTYPE
from fastflower.shards.verification import verify
from fastflower.shards.writer import Samples, ShardWriter, npy

FIRST, SECOND, IDX, INDEX = "train-000000.tar", "train-000001.tar", "train-000000.idx", "train.index.npy"
INFO, MANIFEST = "_info.json", "manifest.json"

RESTORE = "restore it from a backup, or run fastflower pack again."
REPAIR = "rebuild it with fastflower verify FOLDER --repair."
REBUILD = f"does not match the tars; {REPAIR}"
CHECKSUM = f"has changed since it was written (checksum mismatch); {REPAIR}"
MISSING = f"is missing; {REPAIR}"
LOST_TAR = f"is missing; {RESTORE}"
OUTSIDE = f"is damaged outside its images; {RESTORE}"
ONE_OF_THE_TWO = "restore one of the two from a backup, or run fastflower pack again."
WRONG_SHARD = f"is not the shard that {MANIFEST} describes (sha256 differs); {ONE_OF_THE_TWO}"
FOREIGN = "is not a shard of this pack; move it to another folder, or restore manifest.json from a backup."
NO_MANIFEST = (
    f"has no {MANIFEST}, so it is not a finished pack; pass a folder that pack wrote (fastflower pack FOLDER)."
)
RESTORE_MANIFEST = "restore manifest.json from a backup, or run fastflower pack again."
NO_TRUTH = f"does not match the tars, and manifest.json is missing, so nothing says which of them is correct; {RESTORE_MANIFEST}"

# Neither tars nor indexes contain this, so a manifest that is rebuilt without the old one lacks it.
LISTS = ("skipped", "duplicates", "label_conflicts", "near_duplicates")
ONLY_THE_MANIFEST: dict[str, Any] = {name: [] for name in LISTS} | {"options": {}, "versions": {}, "source_bytes": None}

Change = Callable[[bytes], bytes | None]
"""Old contents of a file to new ones; None removes the file."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images, a copy of one image, and a text file."""
    folder = drawn(tmp_path_factory.mktemp("few"), a=8, b=8, c=8)
    shutil.copyfile(folder / "a/000.jpg", folder / "a/copy.jpg")
    (folder / "b/text.jpg").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def few(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed images, in several shards. Do not modify."""
    out = tmp_path_factory.mktemp("packed") / "few"
    pack(data, out, shard_bytes=9000)
    assert len(list(out.glob("train-*.tar"))) >= 3
    return out


@pytest.fixture
def copy(few: Path, tmp_path: Path) -> Path:
    """A pack to damage."""
    return Path(shutil.copytree(few, tmp_path / "copy"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def problems(folder: Path, **options: bool) -> list[str]:
    """Return what is wrong. Every line begins with the folder or a file in it."""
    lines = verify(folder, **options)
    assert all(line.startswith((f"{folder}/", f"{folder}: ")) for line in lines)
    return [line.replace(f"{folder}", "FOLDER").removeprefix("FOLDER").lstrip("/: ") for line in lines]


def damage(path: Path, change: Change) -> None:
    after = change(path.read_bytes())
    assert after != path.read_bytes()
    path.unlink()
    if after is not None:
        path.write_bytes(after)


def delete(_: bytes) -> None:
    return None


def write(after: bytes) -> Change:
    return lambda _: after


def flipped(place: int, bit: int = 0) -> Change:
    return lambda before: before[:place] + bytes([before[place] ^ 1 << bit]) + before[place:][1:]


def replaced(pattern: bytes, after: bytes) -> Change:
    return lambda before: re.sub(pattern, after, before, count=1)


def member(tar: bytes, name: str) -> tarfile.TarInfo:
    """Return the member of a tar: "2.jpg" is the image of sample 2."""
    number, ending = name.split(".")
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return [one for one in opened if one.name.endswith(f".{ending}")][int(number)]


def key(path: Path, number: int) -> str:
    return member(path.read_bytes(), f"{number}.jpg").name.removesuffix(".jpg")


def inside(name: str, place: int = 0, bit: int = 0) -> Change:
    return lambda tar: flipped(member(tar, name).offset_data + place, bit)(tar)


@pytest.mark.parametrize("options", [{}, {"val_fraction": 0}, {"quality": 60, "lists": True}])
def test_a_good_pack_has_no_problems(data: Path, shards: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    pack(data, tmp_path / "out", **options)
    assert problems(tmp_path / "out") == problems(shards) == []
    damage(tmp_path / "out" / MANIFEST, replaced(b'"val": ', b'"vaL": '))  # val may be empty
    assert problems(tmp_path / "out") == [f"{MANIFEST}: {CHECKSUM}"]


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test"), ("train", "validation", "test")])
def test_other_splits_and_names_that_are_not_utf8_are_rebuilt(tmp_path: Path, splits: tuple[str, ...]) -> None:
    for split in splits:
        drawn(tmp_path / "own" / split, **{b"caf\xe9".decode("utf-8", "surrogateescape"): 3, "b\n": 3})
    out = tmp_path / "out"
    before = pack(tmp_path / "own", out, shard_bytes=2000)
    assert problems(out) == []
    others = contents(out)
    damage(out / MANIFEST, delete)
    assert problems(out, repair=True) == []
    after = Manifest.load(out)
    assert (after.classes, [*after.splits.items()]) == (before.classes, [*before.splits.items()])
    assert {**others, MANIFEST: b""} == {**contents(out), MANIFEST: b""}


def damaged_at(reason: str) -> str:
    return rf"is damaged at or after \S.+ \(({reason})\); {re.escape(RESTORE)}"


def last_pixels(number: int) -> Change:
    return lambda tar: inside(f"{number}.jpg", member(tar, f"{number}.jpg").size - 20)(tar)


TAR_DAMAGE: dict[str, tuple[Change, str]] = {
    "an image": (last_pixels(0), "the image of {0} has changed since it was packed; .*"),
    "a later image": (last_pixels(2), "the image of {2} has changed since it was packed; .*"),
    "not an image": (inside("0.jpg"), r"is damaged at or after {0} \(is not an image\); .*"),
    "a later file is not an image": (inside("2.jpg"), r"is damaged at or after {2} \(is not an image\); .*"),
    "another label": (inside("0.cls"), re.escape(WRONG_SHARD)),
    "not a label": (inside("0.cls", bit=6), damaged_at(r"\S+\.cls must contain a label, got b'.'")),
    "the path in the .json": (inside("0.json", 15), re.escape(WRONG_SHARD)),
    "not JSON": (inside("0.json"), damaged_at("Expecting value: .*")),
    "a key of the .json": (inside("0.json", 3), damaged_at(r"\S+\.json must contain a filename and a class")),
    "the first header": (inside("0.cls", -512), damaged_at("bad checksum")),
    "an image's header": (inside("0.jpg", -512), damaged_at(r"\S+\.jpg is missing")),
    "the header of a later sample": (inside("1.cls", -512), re.escape(OUTSIDE)),
    "the end of a header's checksum": (inside("0.cls", 155 - 512), re.escape(OUTSIDE)),
    "the padding of a label": (inside("0.cls", 300), re.escape(OUTSIDE)),
    "the padding at the end": (flipped(-1), re.escape(OUTSIDE)),
    "cut in the padding": (lambda tar: tar[:-512], re.escape(OUTSIDE)),
    "cut in a sample": (lambda tar: tar[: member(tar, "1.jpg").offset_data + 700], damaged_at(".+")),
    "cut in a header": (lambda tar: tar[: member(tar, "1.jpg").offset + 100], damaged_at(".+")),
    "cut at a sample": (lambda tar: tar[: member(tar, "1.cls").offset], re.escape(OUTSIDE)),
    "appended": (lambda tar: tar + b"x", re.escape(OUTSIDE)),
    "empty": (write(b""), damaged_at("empty file")),
    "only zeros": (write(bytes(10240)), re.escape(WRONG_SHARD)),
    "removed": (delete, re.escape(LOST_TAR)),
}


@pytest.mark.parametrize("name", TAR_DAMAGE)
def test_damage_to_a_tar_is_reported_and_remains_after_a_repair(copy: Path, name: str) -> None:
    change, message = TAR_DAMAGE[name]
    message = message.format(*(key(copy / FIRST, number) for number in range(3)))
    damage(copy / FIRST, change)
    before = contents(copy)
    (line,) = problems(copy)
    assert re.fullmatch(f"{FIRST}: {message}", line)
    assert problems(copy, repair=True) == [line]
    assert contents(copy) == before


def test_swapped_and_foreign_tars_are_reported(copy: Path) -> None:
    first, second = (copy / name for name in (FIRST, SECOND))
    first.rename(copy / "other.tar")
    assert problems(copy) == [f"{FIRST}: {LOST_TAR}", f"other.tar: {FOREIGN}"]
    second.rename(first)
    (copy / "other.tar").rename(second)
    assert problems(copy) == [f"{FIRST}: {WRONG_SHARD}", f"{SECOND}: {WRONG_SHARD}"]
    shutil.copyfile(second, first)
    assert problems(copy) == [f"{SECOND}: {WRONG_SHARD}"]
    shutil.copyfile(first, copy / "train-000009.tar")
    assert problems(copy, repair=True) == [f"{SECOND}: {WRONG_SHARD}", f"train-000009.tar: {FOREIGN}"]
    first.unlink()
    first.mkdir()
    assert problems(copy)[0].startswith(f"{FIRST}: is damaged at or after its first sample ([Errno 21] Is a directory")


NOTE = b'{"filename": "a/x.jpg", "class": "a"}'
STRANGE = [(label, NOTE) for label in (b"99999999999", b"-1", b"", b"\xb2")]
STRANGE += [(b"0", note) for note in (b"", b"[]", b"{}", b"\xff", NOTE.replace(b'"a"', b"1"))]


@pytest.mark.parametrize(("label", "note"), STRANGE)
def test_a_tar_that_fastflower_did_not_write_is_reported(data: Path, copy: Path, label: bytes, note: bytes) -> None:
    files = {"cls": label, "jpg": (data / "a/000.jpg").read_bytes(), "json": note}
    with tarfile.open(copy / FIRST, "w", format=tarfile.USTAR_FORMAT) as tar:
        for ending, content in files.items():
            info = tarfile.TarInfo(f"key.{ending}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (line,) = problems(copy)
    assert re.fullmatch(f"{FIRST}: {damaged_at('.+')}", line)


HEAD = len(npy(np.zeros(0, INDEX_DTYPE)))
FIELDS = [HEAD + 3 * 32 + offset for _, offset, *_ in (INDEX_DTYPE.fields or {}).values()]  # of row 3
# All of this is rebuilt from the tars, byte for byte.
REPAIRABLE: dict[str, Sequence[Change]] = {
    IDX: [delete, flipped(40), lambda idx: idx[:-1], write(b"v1.2 0\n")],
    INDEX: [
        delete,
        lambda index: index[:-40],
        write(b"\x93NUMPY"),
        flipped(10),  # numpy's reader raises TokenError
        lambda before: before + bytes(32),  # one more row
        lambda before: bytes(npy(np.frombuffer(before[HEAD:-32], INDEX_DTYPE))),
        replaced(b"<u4", b">u4"),
        *map(flipped, FIELDS),
    ],
    "val.index.npy": [delete],
    INFO: [delete, write(b"\xff"), replaced(rb'_samples": \d+', b'_samples": 5')],
    MANIFEST: [
        replaced(rb'"samples": \d+', b'"samples": 5'),
        replaced(rb"counts\": \[\s+\d+", b'counts": [5'),
        replaced(rb'(\.tar",\s+"samples": )\d+', rb"\g<1>999"),
        replaced(rb'"bytes": \d+', b'"bytes": 999'),
        replaced(b"train-000000", b"train-000007"),
        replaced(b'"b"', b'"B"'),
        replaced(rb'"classes": \[[^]]+\]', b'"classes": []'),
        replaced(rb'packed_bytes": \d+', b'packed_bytes": 5'),
        lambda before: before + b" ",
    ],
}


@pytest.mark.parametrize(("name", "change"), [(name, one) for name, some in REPAIRABLE.items() for one in some])
def test_indexes_and_manifest_are_rebuilt_byte_for_byte(few: Path, copy: Path, name: str, change: Change) -> None:
    damage(copy / name, change)
    what = REBUILD if (copy / name).exists() else MISSING
    if name == MANIFEST and json.loads((few / name).read_text()) != json.loads((copy / name).read_text()):
        what = CHECKSUM
    assert problems(copy) == [f"{name}: {what}"]
    assert problems(copy, repair=True) == []
    assert contents(copy) == contents(few)


def test_a_manifest_of_another_pack_does_not_change_the_tars(copy: Path) -> None:
    damage(copy / MANIFEST, replaced(rb'(1\.tar"[^}]+"sha256": ")\w+', rb"\g<1>0"))
    (copy / MANIFEST).write_text(Manifest.load(copy, sealed=False).to_json())  # its own checksum is right
    before = contents(copy)
    assert problems(copy) == problems(copy, repair=True) == [f"{SECOND}: {WRONG_SHARD}"]
    assert contents(copy) == before


def batches(folder: Path, split: str) -> list[Any]:
    loader = Loader(folder, split, batch_size=4, augment=Augment(size=16, resize=16), device="cpu", shuffle=False)
    return [[batch.images.tolist(), batch.labels.tolist(), batch.index.tolist()] for batch in loader]


DAMAGED = [*map(write, (b"{", b"[]", b"\xff")), replaced(b'"skipped"', b"0"), replaced(b"fastflower", b"other")]
NO_INFO = [write(text) for text in (b"{}", b"[]", b'{"splits": "x"}', b'{"splits": {"train": {}}}', b"\xff")]
LOST: list[dict[str, Change]] = [
    *({MANIFEST: change} for change in (delete, *DAMAGED)),
    *({INFO: change, MANIFEST: delete} for change in (delete, *NO_INFO)),
]


@pytest.mark.parametrize("changes", LOST)
def test_a_lost_manifest_is_rebuilt_except_for_what_only_it_contains(few: Path, copy: Path, changes: Any) -> None:
    for name, change in changes.items():
        damage(copy / name, change)
    assert problems(copy) == [f"{name}: {MISSING if change is delete else REBUILD}" for name, change in changes.items()]
    assert problems(copy, repair=True) == problems(copy) == []
    old, new = (json.loads((folder / MANIFEST).read_bytes()) for folder in (few, copy))
    assert new == old | ONLY_THE_MANIFEST | {"sha256": new["sha256"]}
    assert {**contents(few), MANIFEST: b""} == {**contents(copy), MANIFEST: b""}
    for split in ("train", "val"):
        assert batches(copy, split) == batches(few, split)


CHANGED = f"the image of {{}} has changed since it was packed; {RESTORE}"
AMBIGUOUS = f"{MANIFEST}: is missing, and the tars disagree about the label of a class; {RESTORE_MANIFEST}"
MORE_DAMAGE: dict[str, tuple[str, Change, list[str]]] = {
    "an image": (FIRST, last_pixels(0), [f"{FIRST}: {CHANGED}", NO_MANIFEST]),
    "a tar": (FIRST, delete, [f"{FIRST}: {LOST_TAR}", NO_MANIFEST]),
    "a label": (FIRST, inside("0.cls"), [AMBIGUOUS]),
    "an index": (INDEX, flipped(FIELDS[4]), [f"{INDEX}: {NO_TRUTH}"]),
}


@pytest.mark.parametrize("name", MORE_DAMAGE)
def test_nothing_is_rebuilt_if_the_manifest_is_lost_and_more_is_damaged(copy: Path, name: str) -> None:
    file, change, lines = MORE_DAMAGE[name]
    lines = [line.format(key(copy / FIRST, 0)) for line in lines]
    damage(copy / file, change)
    damage(copy / MANIFEST, delete)
    damage(copy / IDX, delete)
    before = contents(copy)
    assert problems(copy) == problems(copy, repair=True) == lines
    assert contents(copy) == before


def test_missing_tars_are_reported_without_a_list_of_tars(copy: Path) -> None:
    for name in (MANIFEST, INFO, max(path.name for path in copy.glob("train-*.tar"))):
        damage(copy / name, delete)
    assert problems(copy, repair=True) == [f"{INDEX}: {NO_TRUTH}"]
    (copy / FIRST).rename(copy / "copy-000000.tar")
    assert problems(copy, repair=True) == [f"{FIRST}: {LOST_TAR}", f"copy-000000.tar: {FOREIGN}", NO_MANIFEST]


@pytest.mark.parametrize(("labels", "unknown"), [((0, 2), 1), ((1, 2), 0), ((0, 2_000_000_000), 1)])
def test_a_lost_manifest_needs_a_sample_of_every_class(data: Path, tmp_path: Path, labels: Any, unknown: int) -> None:
    samples, image = Samples(), (data / "a/000.jpg").read_bytes()
    for label in labels:
        samples.add(f"key-{label}", image, label, (24, 24), f"{label}/x.jpg", f"class {label}")
    with (tmp_path / FIRST).open("wb") as file, ShardWriter(file) as writer:
        writer.extend(samples)
    text = f"{MANIFEST}: is missing, and no sample gives the name of class {unknown}; {RESTORE_MANIFEST}"
    assert problems(tmp_path) == problems(tmp_path, repair=True) == [text]
    assert [path.name for path in tmp_path.iterdir()] == [FIRST]


def assert_rejected(folder: Path, text: str) -> None:
    for repair in (False, True):
        with pytest.raises(ShardError, match=exactly(text)):
            verify(folder, repair=repair)


def test_a_folder_without_a_repairable_pack_is_rejected_and_left_alone(copy: Path, tmp_path: Path) -> None:
    damage(copy / IDX, delete)
    damage(copy / MANIFEST, replaced(b'"version": 2', b'"version": 3'))
    upgrade = "but this one reads versions 1 to 2; upgrade fastflower (pip install --upgrade fastflower)."
    assert_rejected(copy, f"{copy / MANIFEST}: has format version 3, written by a newer fastflower, {upgrade}")
    damage(copy / MANIFEST, delete)
    (tmp_path / "copy/.packing").mkdir()  # the last tars may not be in place yet
    (tmp_path / "copy/.packing/plan.json").touch()
    before = contents(copy)
    assert_rejected(copy, f"{copy}: is an unfinished pack; run the same fastflower pack command again.")
    assert contents(copy) == before
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "no", copy / INDEX):
        assert_rejected(folder, f"{folder}: has no shards; pass a folder that pack wrote (fastflower pack FOLDER).")


def test_a_repair_that_cannot_be_written_leaves_the_old_files(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (IDX, INDEX, INFO):
        damage(copy / name, write(b"damaged"))
    before, written = contents(copy), verification.write_atomically

    def full(path: Path, data: bytes) -> None:
        if path.name == INDEX:
            raise OSError(28, "No space left on device")
        written(path, data)

    monkeypatch.setattr(verification, "write_atomically", full)
    what = "cannot be written (No space left on device); free up space, or check what is at this path"
    text = f"{copy / INDEX}: {what} and that its folder is writable, then run fastflower verify {copy} --repair again."
    with pytest.raises(ShardError, match=exactly(text)):
        verify(copy, repair=True)
    assert {name for name, text in contents(copy).items() if text != before[name]} == {IDX}


def test_any_flipped_bit_is_found_and_its_file_reported(copy: Path) -> None:
    places = random.Random(0)
    for path in sorted(copy.iterdir()):
        good = path.read_bytes()
        for _ in range(80 if path.name == MANIFEST else 12):
            bit = places.randrange(8 * len(good))
            damage(path, flipped(bit // 8, bit % 8))
            try:
                lines = verify(copy)
            except ShardError as error:
                lines = [str(error)]
            assert any(path.name in line for line in lines), bit
            path.write_bytes(good)
    assert problems(copy) == []
