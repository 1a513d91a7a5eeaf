"""Labels, places and sizes in SPLIT.index.npy: what was packed, or an error that names the row; old packs and new ones."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_server import BadServer
from kill_packer import checksums
from numpy.typing import NDArray
from packs import BEFORE_MANIFEST, drawn, exactly, killed, resealed
from PIL import Image

from fastflower import Augment, Loader, Manifest, pack
from fastflower.errors import SampleError, ShardError
from fastflower.shards.manifest import Split
from fastflower.shards.remote import Remote
from fastflower.shards.verification import verify

SMALL = Augment(size=16, resize=16)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of 22 images to train on in several shards, and 6 to validate. Not to be written to."""
    root = tmp_path_factory.mktemp("new")
    pack(drawn(root / "data", a=9, b=10, c=9), root / "out", shard_bytes=9000)
    return root / "out"


def as_first_version(folder: Path) -> Path:
    """What the first version of the format wrote of the same images."""
    stored = json.loads((folder / "manifest.json").read_text())
    del stored["sha256"]
    del stored["warnings"]
    for split in stored["splits"].values():
        del split["index_sha256"]
    text = json.dumps({**stored, "version": 1}, indent=1, ensure_ascii=False)
    (folder / "manifest.json").write_text(f"{text}\n")
    return folder


@pytest.fixture
def copy(new: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(new, tmp_path / "copy"))


@pytest.fixture
def old(copy: Path) -> Path:
    """The same pack by the first version."""
    return as_first_version(copy)


def make(folder: Path | Remote, split: str = "train", **options: Any) -> Loader:
    return Loader(folder, split, batch_size=4, augment=SMALL, device="cpu", **options)


def fed(folder: Path, split: str = "train") -> list[Any]:
    return [[batch.images.tolist(), batch.labels.tolist()] for batch in make(folder, split)]


def change(folder: Path, act: Callable[[NDArray[Any]], object], split: str = "train") -> None:
    rows = np.load(folder / f"{split}.index.npy")
    act(rows)
    np.save(folder / f"{split}.index.npy", rows)


def again(folder: Path) -> str:
    return f"restore it from a copy, or rebuild it with fastflower verify {folder} --repair."


def test_the_first_version_still_loads_and_its_manifest_is_written_as_it_was(new: Path, old: Path) -> None:
    manifest = Manifest.load(old)
    assert (manifest.version, manifest.splits["train"].index_sha256) == (1, None)
    assert manifest.to_json() == (old / "manifest.json").read_text()
    assert verify(old) == []
    for split in ("train", "val"):
        assert fed(old, split) == fed(new, split)


def test_a_repair_gives_the_first_version_its_checksums(new: Path, old: Path) -> None:
    assert verify(old, repair=True) == []
    assert checksums(old) == checksums(new)


def test_any_flipped_bit_of_an_index_stops_a_loader_before_it_feeds(copy: Path) -> None:
    path = copy / "train.index.npy"
    good, places = path.read_bytes(), random.Random(0)
    for _ in range(60):
        bit = places.randrange(8 * len(good))
        path.write_bytes(good[: bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1 :])
        with pytest.raises(
            ShardError, match=r"train\.index\.npy: (has changed since it was packed|cannot be read|has \()"
        ):
            make(copy)
    path.write_bytes(good)
    make(copy)


def swap(rows: NDArray[Any]) -> None:
    first = rows["label"][0]
    other = int(np.flatnonzero(rows["label"] != first)[0])
    rows["label"][[0, other]] = rows["label"][[other, 0]]


@pytest.mark.parametrize("act", [swap, lambda rows: rows["label"].__setitem__(3, -100), lambda rows: rows[::-1].sort()])
def test_labels_that_changed_are_not_fed_and_a_repair_brings_them_back(new: Path, copy: Path, act: Any) -> None:
    change(copy, act)
    text = f"{copy / 'train.index.npy'}: has changed since it was packed (checksum mismatch); {again(copy)}"
    with pytest.raises(ShardError, match=exactly(text)):
        make(copy)
    assert verify(copy) == [f"{copy / 'train.index.npy'}: does not say what the tars hold; rebuild it with --repair."]
    assert verify(copy, repair=True) == []
    assert checksums(copy) == checksums(new)


def of(field: str, value: Any, row: int = 3) -> Callable[[NDArray[Any]], None]:
    return lambda rows: rows[field].__setitem__(row, value)


PIXELS = "that of an image of 1 .. 178956970 pixels"
OFFSET = "a multiple of 512 with room for the size"
WRONG: list[tuple[Callable[[NDArray[Any]], object], str]] = [
    (of("label", -100), "row 3 has label -100, which must be 0 .. 2"),
    (of("label", -1), "row 3 has label -1, which must be 0 .. 2"),
    (of("label", 3), "row 3 has label 3, which must be 0 .. 2"),
    (
        lambda rows: of("label", (rows["label"][3] + 1) % 3)(rows),
        r"has \d+ samples of class '.', the manifest says \d+",
    ),
    (of("shard", 7), "counts other samples of each shard than the manifest does"),
    (
        lambda rows: rows["shard"].__setitem__(slice(None), rows["shard"][::-1].copy()),
        "counts other samples of each shard",
    ),
    (of("size", 0), "row 3 has size 0, which must be at least 1 byte, and not more than its shard has"),
    (of("size", 2**32 - 1), f"row 3 has size {2**32 - 1}, which must be at least 1 byte, and not more than its shard"),
    (of("offset", 2**64 - 512), f"row 3 has offset {2**64 - 512}, which must be {OFFSET}"),
    (of("offset", 0), f"row 3 has offset 0, which must be {OFFSET}"),
    (lambda rows: of("offset", rows["offset"][3] + 1)(rows), rf"row 3 has offset \d+, which must be {OFFSET}"),
    (
        lambda rows: of("offset", rows["offset"][2])(rows),
        r"row 3 has offset \d+, in or before the image of the row above",
    ),
    (of("width", 0), f"row 3 has width 0, which must be {PIXELS}"),
    (of("height", 2**31), f"row 3 has width 24, which must be {PIXELS}"),
]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("act", "message"), WRONG)
def test_a_row_that_cannot_be_is_named_whatever_checksums_say(copy: Path, version: int, act: Any, message: str) -> None:
    change(copy, act)
    as_first_version(copy) if version == 1 else resealed(copy)
    with pytest.raises(ShardError, match=rf"train\.index\.npy: {message}.*; restore it .*verify .*copy --repair\.$"):
        make(copy)


@pytest.mark.parametrize("told", [{"class_counts": (7, 8, 6)}, {"class_counts": (7, 8)}, {"samples": 21}])
def test_counts_of_the_manifest_are_not_trusted_either(old: Path, told: dict[str, Any]) -> None:
    manifest = Manifest.load(old)
    train: Split = replace(manifest.splits["train"], **told)
    (old / "manifest.json").write_text(replace(manifest, splits={**manifest.splits, "train": train}).to_json())
    with pytest.raises(
        ShardError, match=r"train\.index\.npy: (has \d+ samples of class|is of 2 classes|has \(22,\) rows)"
    ):
        make(old)


def test_a_manifest_that_names_a_class_twice_is_refused_before_training(old: Path) -> None:
    """The checkpoint that is trained on it could not be used."""
    path = old / "manifest.json"
    good = path.read_text()
    path.write_text(good.replace('"b",', '"a",', 1))
    with pytest.raises(ShardError, match=exactly(f"{path}: names two classes 'a'; {again(old)}")):
        make(old)
    assert verify(old, repair=True) == []
    assert Manifest.load(old).classes == ("a", "b", "c")


@pytest.mark.parametrize("backend", ["native", "opencv"])
@pytest.mark.parametrize(
    ("size", "told"),
    [
        (64, "97 x 65 pixels, but the index says 102 x 65"),
        (16, "49 x 33 pixels at decode scale 1/2, but the index says 102 x 65"),
    ],
)
def test_an_image_of_another_size_than_its_row_says_is_a_damaged_sample(
    tmp_path: Path, backend: Any, size: int, told: str
) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(6):
            Image.effect_noise((97, 65), 40 + number).save(tmp_path / "data" / name / f"{number}.jpg")
    pack(tmp_path / "data", tmp_path / "out", val_fraction=0)
    change(tmp_path / "out", of("width", 102))
    resealed(tmp_path / "out")
    augment = Augment(size=size, resize=size)
    how: dict[str, Any] = {"batch_size": 4, "augment": augment, "shuffle": False, "device": "cpu", "backend": backend}
    with pytest.raises(
        SampleError, match=rf"sample .* \(.*jpg\): decodes to {told}; rebuild the index with .*--repair"
    ):
        list(Loader(tmp_path / "out", **how))
    loader = Loader(tmp_path / "out", on_bad="skip", **how)
    list(loader)
    assert list(loader.replaced) == [3]


def test_of_a_mirror_that_is_used_again_a_damaged_index_is_downloaded_again(
    source: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    loader = make(source)
    expected = loader._samples.labels.tolist()
    path = loader.manifest.folder / "train.index.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-13] + bytes([good[-13] ^ 1]) + good[-12:])
    (loader.manifest.folder / "manifest.json").write_bytes(b"{}")
    with caplog.at_level(logging.WARNING, "fastflower"):
        assert make(source)._samples.labels.tolist() == expected
    assert caplog.messages == [f"{path}: has changed since it was packed (checksum mismatch); it is downloaded again"]
    assert path.read_bytes() == good


def test_an_index_that_changed_at_its_address_is_refused_and_not_kept(
    source: Remote, server: BadServer, shards: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "bad"))
    change(folder, swap)
    server.folder = folder
    text = f"{source.url}/train.index.npy: has changed since it was packed (checksum mismatch); {again(Path('X'))}"
    with pytest.raises(ShardError, match=exactly(text.replace("X", source.url))):
        make(source)
    assert not list(Path(source.folder).glob("*/*.npy"))


def test_a_pack_that_the_first_version_began_is_finished_by_this_one(new: Path, tmp_path: Path) -> None:
    """Killed when all but its manifest was in place."""
    folder = drawn(tmp_path / "data", a=9, b=10, c=9)
    out = killed(folder, tmp_path / "out", BEFORE_MANIFEST, shard_bytes=9000)
    (out / ".packing/manifest.json").write_text('{"format": "fastflower", "version": 1}')
    pack(folder, out, shard_bytes=9000)
    assert checksums(out) == checksums(new)


@pytest.mark.parametrize("what", ["seed", "skipped", "pillow", "a/000.jpg"])
def test_a_manifest_that_changed_is_named_and_keeps_what_it_alone_knows(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = drawn(tmp_path / "data", a=4, b=4), tmp_path / "out"
    shutil.copyfile(folder / "a/000.jpg", folder / "a/twin.jpg")
    (folder / "b/text.jpg").write_text("no image")
    pack(folder, out)
    good = (out / "manifest.json").read_text()
    before, after = {"skipped": ("is no image", "is an image"), "seed": ('"seed": 0', '"seed": 1')}.get(
        what, (what, "xyz")
    )
    (out / "manifest.json").write_text(good.replace(before, after))
    text = f"{out / 'manifest.json'}: has changed since it was written (checksum mismatch)"
    with pytest.raises(ShardError, match=exactly(f"{text}; {again(out)}")):
        Loader(out)
    changed = Manifest.load(out, sealed=False)
    assert verify(out) == [f"{text}; rebuild it with --repair."]
    caplog.clear()
    assert verify(out, repair=True) == verify(out) == []
    assert Manifest.load(out) == changed
    stays = "what the tars do not tell, such as options and skipped files, stays as it stood"
    assert caplog.messages[-1] == f"{out / 'manifest.json'}: {stays}"


def test_a_repair_says_what_it_wrote_and_writes_no_more(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    times = {path: path.stat().st_mtime_ns for path in [copy, *copy.iterdir()]}
    with caplog.at_level(logging.INFO, "fastflower"):
        assert verify(copy, repair=True) == []
        assert {path: path.stat().st_mtime_ns for path in [copy, *copy.iterdir()]} == times
        assert caplog.messages == []
        (copy / "train.index.npy").unlink()
        assert verify(copy, repair=True) == []
    assert caplog.messages == [f"rebuilt {copy / 'train.index.npy'}"]
