"""Damage of every kind to a pack is named, nothing else is, and what the tars tell can be rebuilt."""

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

RESTORE = "restore it from a copy, or pack again."
REBUILD = "does not say what the tars hold; rebuild it with --repair."
OTHERWISE = "has changed since it was written (checksum mismatch); rebuild it with --repair."
MISSING = "is missing; rebuild it with --repair."
GONE = f"is missing; {RESTORE}"
OUTSIDE = f"is damaged outside its images; {RESTORE}"
OTHER = f"is not the shard that {MANIFEST} describes (sha256 differs); restore one of them from a copy, or pack again."
AWAY = "is no shard of this pack, as far as manifest.json tells; move it away, or restore manifest.json from a copy."
NO_MANIFEST = "has no manifest.json, so it is no finished pack; name a folder that pack wrote (fastflower pack FOLDER)."
AGAIN = "restore manifest.json from a copy, or pack again."
UNSURE = f"does not say what the tars hold, and manifest.json, which would tell what is right, is lost; {AGAIN}"

# What no tar and no index tells: a manifest that is rebuilt from nothing lacks it.
LISTS = ("skipped", "duplicates", "label_conflicts", "near_duplicates")
ONLY_THE_MANIFEST: dict[str, Any] = {name: [] for name in LISTS} | {"options": {}, "versions": {}, "source_bytes": None}

Change = Callable[[bytes], bytes | None]
"""What becomes of a file; None when it is removed."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images, two of them identical, and a file that is none."""
    folder = drawn(tmp_path_factory.mktemp("few"), a=8, b=8, c=8)
    shutil.copyfile(folder / "a/000.jpg", folder / "a/twin.jpg")
    (folder / "b/text.jpg").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def few(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images packed, in several shards. Not to be written to."""
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


def found(folder: Path, **options: bool) -> list[str]:
    """What is wrong; every line begins with a file of the folder, or the folder."""
    lines = verify(folder, **options)
    assert all(line.startswith((f"{folder}/", f"{folder}: ")) for line in lines)
    return [line.removeprefix(f"{folder}").lstrip("/: ") for line in lines]


def damage(path: Path, change: Change) -> None:
    after = change(path.read_bytes())
    assert after != path.read_bytes()
    path.unlink()
    if after is not None:
        path.write_bytes(after)


def gone(_: bytes) -> None:
    return None


def became(after: bytes) -> Change:
    return lambda _: after


def flipped(place: int, bit: int = 0) -> Change:
    return lambda before: before[:place] + bytes([before[place] ^ 1 << bit]) + before[place:][1:]


def replaced(pattern: bytes, after: bytes) -> Change:
    return lambda before: re.sub(pattern, after, before, count=1)


def member(tar: bytes, name: str) -> tarfile.TarInfo:
    """A file in a tar: "2.jpg" is that of sample 2."""
    number, ending = name.split(".")
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return [one for one in opened if one.name.endswith(f".{ending}")][int(number)]


def key(path: Path, number: int) -> str:
    return member(path.read_bytes(), f"{number}.jpg").name.removesuffix(".jpg")


def inside(name: str, place: int = 0, bit: int = 0) -> Change:
    return lambda tar: flipped(member(tar, name).offset_data + place, bit)(tar)


@pytest.mark.parametrize("options", [{}, {"val_fraction": 0}, {"quality": 60, "lists": True}])
def test_nothing_is_wrong_with_a_good_pack(data: Path, shards: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    pack(data, tmp_path / "out", **options)
    assert found(tmp_path / "out") == found(shards) == []
    damage(tmp_path / "out" / MANIFEST, replaced(b'"val": ', b'"vaL": '))  # which may be empty
    assert found(tmp_path / "out") == [f"{MANIFEST}: {OTHERWISE}"]


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test"), ("train", "validation", "test")])
def test_other_splits_and_names_that_are_no_utf8_are_rebuilt(tmp_path: Path, splits: tuple[str, ...]) -> None:
    for split in splits:
        drawn(tmp_path / "own" / split, **{b"caf\xe9".decode("utf-8", "surrogateescape"): 3, "b\n": 3})
    out = tmp_path / "out"
    before = pack(tmp_path / "own", out, shard_bytes=2000)
    assert found(out) == []
    others = contents(out)
    damage(out / MANIFEST, gone)
    assert found(out, repair=True) == []
    after = Manifest.load(out)
    assert (after.classes, [*after.splits.items()]) == (before.classes, [*before.splits.items()])
    assert {**others, MANIFEST: b""} == {**contents(out), MANIFEST: b""}


def near(reason: str) -> str:
    return rf"is damaged at or behind \S.+ \(({reason})\); {re.escape(RESTORE)}"


def last_pixels(number: int) -> Change:
    return lambda tar: inside(f"{number}.jpg", member(tar, f"{number}.jpg").size - 20)(tar)


OF_A_TAR: dict[str, tuple[Change, str]] = {
    "an image": (last_pixels(0), "the image of {0} has changed since it was packed; .*"),
    "a later image": (last_pixels(2), "the image of {2} has changed since it was packed; .*"),
    "an image is none": (inside("0.jpg"), r"is damaged at or behind {0} \(is no image\); .*"),
    "a later image is none": (inside("2.jpg"), r"is damaged at or behind {2} \(is no image\); .*"),
    "a label is another": (inside("0.cls"), re.escape(OTHER)),
    "a label is none": (inside("0.cls", bit=6), near(r"\S+ has no label")),
    "the path in a note": (inside("0.json", 15), re.escape(OTHER)),
    "a note is no JSON": (inside("0.json"), near("Expecting value: .*")),
    "a note's key": (inside("0.json", 3), near(r"\S+ does not name its path and class")),
    "the first header": (inside("0.cls", -512), near("bad checksum")),
    "an image's header": (inside("0.jpg", -512), near(r"\S+ lacks its \.jpg")),
    "the header of a later sample": (inside("1.cls", -512), re.escape(OUTSIDE)),
    "what ends a header's checksum": (inside("0.cls", 155 - 512), re.escape(OUTSIDE)),
    "the padding of a label": (inside("0.cls", 300), re.escape(OUTSIDE)),
    "the padding at the end": (flipped(-1), re.escape(OUTSIDE)),
    "cut in the padding": (lambda tar: tar[:-512], re.escape(OUTSIDE)),
    "cut in a sample": (lambda tar: tar[: member(tar, "1.jpg").offset_data + 700], near(".+")),
    "cut in a header": (lambda tar: tar[: member(tar, "1.jpg").offset + 100], near(".+")),
    "cut at a sample": (lambda tar: tar[: member(tar, "1.cls").offset], re.escape(OUTSIDE)),
    "appended": (lambda tar: tar + b"x", re.escape(OUTSIDE)),
    "nothing is left": (became(b""), near("empty file")),
    "only zeros are left": (became(bytes(10240)), re.escape(OTHER)),
    "removed": (gone, re.escape(GONE)),
}


@pytest.mark.parametrize("name", OF_A_TAR)
def test_damage_to_a_tar_is_named_and_stays_after_a_repair(copy: Path, name: str) -> None:
    change, message = OF_A_TAR[name]
    message = message.format(*(key(copy / FIRST, number) for number in range(3)))
    damage(copy / FIRST, change)
    before = contents(copy)
    (line,) = found(copy)
    assert re.fullmatch(f"{FIRST}: {message}", line)
    assert found(copy, repair=True) == [line]
    assert contents(copy) == before


def test_tars_in_the_place_of_others_are_named(copy: Path) -> None:
    first, second = (copy / name for name in (FIRST, SECOND))
    first.rename(copy / "other.tar")
    assert found(copy) == [f"{FIRST}: {GONE}", f"other.tar: {AWAY}"]
    second.rename(first)
    (copy / "other.tar").rename(second)
    assert found(copy) == [f"{FIRST}: {OTHER}", f"{SECOND}: {OTHER}"]
    shutil.copyfile(second, first)
    assert found(copy) == [f"{SECOND}: {OTHER}"]
    shutil.copyfile(first, copy / "train-000009.tar")
    assert found(copy, repair=True) == [f"{SECOND}: {OTHER}", f"train-000009.tar: {AWAY}"]
    first.unlink()
    first.mkdir()
    assert found(copy)[0].startswith(f"{FIRST}: is damaged at or behind its first sample ([Errno 21] Is a directory")


NOTE = b'{"filename": "a/x.jpg", "class": "a"}'
STRANGE = [(label, NOTE) for label in (b"99999999999", b"-1", b"", b"\xb2")]
STRANGE += [(b"0", note) for note in (b"", b"[]", b"{}", b"\xff", NOTE.replace(b'"a"', b"1"))]


@pytest.mark.parametrize(("label", "note"), STRANGE)
def test_a_tar_by_somebody_else_is_named(data: Path, copy: Path, label: bytes, note: bytes) -> None:
    files = {"cls": label, "jpg": (data / "a/000.jpg").read_bytes(), "json": note}
    with tarfile.open(copy / FIRST, "w", format=tarfile.USTAR_FORMAT) as tar:
        for ending, content in files.items():
            info = tarfile.TarInfo(f"key.{ending}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (line,) = found(copy)
    assert re.fullmatch(f"{FIRST}: {near('.+')}", line)


HEAD = len(npy(np.zeros(0, INDEX_DTYPE)))
FIELDS = [HEAD + 3 * 32 + offset for _, offset, *_ in (INDEX_DTYPE.fields or {}).values()]  # of row 3
# What the tars tell comes back byte for byte.
REPAIRABLE: dict[str, Sequence[Change]] = {
    IDX: [gone, flipped(40), lambda idx: idx[:-1], became(b"v1.2 0\n")],
    INDEX: [
        gone,
        lambda index: index[:-40],
        became(b"\x93NUMPY"),
        flipped(10),  # where numpy's reader raises a TokenError
        lambda before: before + bytes(32),  # a row more
        lambda before: bytes(npy(np.frombuffer(before[HEAD:-32], INDEX_DTYPE))),
        replaced(b"<u4", b">u4"),
        *map(flipped, FIELDS),
    ],
    "val.index.npy": [gone],
    INFO: [gone, became(b"\xff"), replaced(rb'_samples": \d+', b'_samples": 5')],
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
def test_what_the_tars_tell_is_rebuilt_byte_for_byte(few: Path, copy: Path, name: str, change: Change) -> None:
    damage(copy / name, change)
    what = REBUILD if (copy / name).exists() else MISSING
    if name == MANIFEST and json.loads((few / name).read_text()) != json.loads((copy / name).read_text()):
        what = OTHERWISE
    assert found(copy) == [f"{name}: {what}"]
    assert found(copy, repair=True) == []
    assert contents(copy) == contents(few)


def test_a_manifest_of_another_pack_is_not_taken_for_the_truth(copy: Path) -> None:
    damage(copy / MANIFEST, replaced(rb'(1\.tar"[^}]+"sha256": ")\w+', rb"\g<1>0"))
    (copy / MANIFEST).write_text(Manifest.load(copy, sealed=False).to_json())  # its own checksum is right
    before = contents(copy)
    assert found(copy) == found(copy, repair=True) == [f"{SECOND}: {OTHER}"]
    assert contents(copy) == before


def batches(folder: Path, split: str) -> list[Any]:
    loader = Loader(folder, split, batch_size=4, augment=Augment(size=16, resize=16), device="cpu", shuffle=False)
    return [[batch.images.tolist(), batch.labels.tolist(), batch.index.tolist()] for batch in loader]


DAMAGED = [*map(became, (b"{", b"[]", b"\xff")), replaced(b'"skipped"', b"0"), replaced(b"fastflower", b"other")]
NO_INFO = [became(text) for text in (b"{}", b"[]", b'{"splits": "x"}', b'{"splits": {"train": {}}}', b"\xff")]
LOST: list[dict[str, Change]] = [
    *({MANIFEST: change} for change in (gone, *DAMAGED)),
    *({INFO: change, MANIFEST: gone} for change in (gone, *NO_INFO)),
]


@pytest.mark.parametrize("changes", LOST)
def test_a_lost_manifest_is_rebuilt_but_for_what_it_alone_knew(few: Path, copy: Path, changes: Any) -> None:
    for name, change in changes.items():
        damage(copy / name, change)
    assert found(copy) == [f"{name}: {MISSING if change is gone else REBUILD}" for name, change in changes.items()]
    assert found(copy, repair=True) == found(copy) == []
    old, new = (json.loads((folder / MANIFEST).read_bytes()) for folder in (few, copy))
    assert new == old | ONLY_THE_MANIFEST | {"sha256": new["sha256"]}
    assert {**contents(few), MANIFEST: b""} == {**contents(copy), MANIFEST: b""}
    for split in ("train", "val"):
        assert batches(copy, split) == batches(few, split)


CHANGED = f"the image of {{}} has changed since it was packed; {RESTORE}"
NEITHER = f"{MANIFEST}: is lost, and the tars do not agree which label is which class; {AGAIN}"
AND_LOST: dict[str, tuple[str, Change, list[str]]] = {
    "an image": (FIRST, last_pixels(0), [f"{FIRST}: {CHANGED}", NO_MANIFEST]),
    "a tar": (FIRST, gone, [f"{FIRST}: {GONE}", NO_MANIFEST]),
    "a label": (FIRST, inside("0.cls"), [NEITHER]),
    "an index": (INDEX, flipped(FIELDS[4]), [f"{INDEX}: {UNSURE}"]),
}


@pytest.mark.parametrize("name", AND_LOST)
def test_nothing_is_written_while_the_manifest_is_lost_and_more_is_damaged(copy: Path, name: str) -> None:
    file, change, lines = AND_LOST[name]
    lines = [line.format(key(copy / FIRST, 0)) for line in lines]
    damage(copy / file, change)
    damage(copy / MANIFEST, gone)
    damage(copy / IDX, gone)
    before = contents(copy)
    assert found(copy) == found(copy, repair=True) == lines
    assert contents(copy) == before


def test_tars_that_are_missing_are_named_without_a_list_of_them(copy: Path) -> None:
    for name in (MANIFEST, INFO, max(path.name for path in copy.glob("train-*.tar"))):
        damage(copy / name, gone)
    assert found(copy, repair=True) == [f"{INDEX}: {UNSURE}"]
    (copy / FIRST).rename(copy / "copy-000000.tar")
    assert found(copy, repair=True) == [f"{FIRST}: {GONE}", f"copy-000000.tar: {AWAY}", NO_MANIFEST]


@pytest.mark.parametrize(("labels", "unknown"), [((0, 2), 1), ((1, 2), 0), ((0, 2_000_000_000), 1)])
def test_a_class_without_a_sample_is_not_named(data: Path, tmp_path: Path, labels: Any, unknown: int) -> None:
    samples, image = Samples(), (data / "a/000.jpg").read_bytes()
    for label in labels:
        samples.add(f"key-{label}", image, label, (24, 24), f"{label}/x.jpg", f"class {label}")
    with (tmp_path / FIRST).open("wb") as file, ShardWriter(file) as writer:
        writer.extend(samples)
    text = f"{MANIFEST}: is lost, and no sample tells the name of class {unknown}; {AGAIN}"
    assert found(tmp_path) == found(tmp_path, repair=True) == [text]
    assert [path.name for path in tmp_path.iterdir()] == [FIRST]


def refuse(folder: Path, text: str) -> None:
    for repair in (False, True):
        with pytest.raises(ShardError, match=exactly(text)):
            verify(folder, repair=repair)


def test_what_is_no_pack_to_repair_is_refused_and_left_alone(copy: Path, tmp_path: Path) -> None:
    damage(copy / IDX, gone)
    damage(copy / MANIFEST, replaced(b'"version": 2', b'"version": 3'))
    upgrade = "this one reads versions 1 to 2: upgrade it (pip install --upgrade fastflower)."
    refuse(copy, f"{copy / MANIFEST}: is version 3 of the format, written by a newer fastflower; {upgrade}")
    damage(copy / MANIFEST, gone)
    (tmp_path / "copy/.packing").mkdir()  # of the tars the last may not be in place yet
    (tmp_path / "copy/.packing/plan.json").touch()
    before = contents(copy)
    refuse(copy, f"{copy}: is a pack that was not finished; run the same pack again.")
    assert contents(copy) == before
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "no", copy / INDEX):
        refuse(folder, f"{folder}: has no shards; name a folder that pack wrote.")


def test_a_repair_that_cannot_be_written_leaves_what_was_there(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (IDX, INDEX, INFO):
        damage(copy / name, became(b"damaged"))
    before, written = contents(copy), verification.write_atomically

    def full(path: Path, data: bytes) -> None:
        if path.name == INDEX:
            raise OSError(28, "No space left on device")
        written(path, data)

    monkeypatch.setattr(verification, "write_atomically", full)
    what = "cannot be written (No space left on device); make room, or check what stands there, and repair again."
    with pytest.raises(ShardError, match=exactly(f"{copy / INDEX}: {what}")):
        verify(copy, repair=True)
    assert {name for name, text in contents(copy).items() if text != before[name]} == {IDX}


def test_any_flipped_bit_is_found_and_its_file_named(copy: Path) -> None:
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
    assert found(copy) == []
