"""Labels, offsets and sizes in SPLIT.index.npy: as packed, or an error that names the row; old and new packs."""

import json
import logging
import random
import shlex
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
from fastflower.cli import main
from fastflower.errors import SampleError, ShardError
from fastflower.shards.manifest import Split
from fastflower.shards.remote import Remote
from fastflower.shards.verification import verify

SMALL = Augment(size=16, resize=16)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of 22 training images in several shards and 6 validation images. Do not modify."""
    root = tmp_path_factory.mktemp("new")
    pack(drawn(root / "data", a=9, b=10, c=9), root / "out", shard_bytes=9000)
    return root / "out"


def as_first_version(folder: Path) -> Path:
    """Rewrite a manifest as the first version of the format wrote it."""
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
    """The same pack, written by the first version."""
    return as_first_version(copy)


def make_loader(folder: Path | Remote, split: str = "train", **options: Any) -> Loader:
    return Loader(folder, split, batch_size=4, augment=SMALL, device="cpu", **options)


def load_all(folder: Path, split: str = "train") -> list[Any]:
    return [[batch.images.tolist(), batch.labels.tolist()] for batch in make_loader(folder, split)]


def edit_index(folder: Path, edit: Callable[[NDArray[Any]], object], split: str = "train") -> None:
    rows = np.load(folder / f"{split}.index.npy")
    edit(rows)
    np.save(folder / f"{split}.index.npy", rows)


def remedy(folder: Path) -> str:
    return f"restore it from a backup, or rebuild it with fastflower verify {folder} --repair."


def test_the_first_version_still_loads_and_its_manifest_is_written_unchanged(new: Path, old: Path) -> None:
    manifest = Manifest.load(old)
    assert (manifest.version, manifest.splits["train"].index_sha256) == (1, None)
    assert manifest.to_json() == (old / "manifest.json").read_text()
    assert verify(old) == []
    for split in ("train", "val"):
        assert load_all(old, split) == load_all(new, split)


def test_a_repair_adds_checksums_to_the_first_version(new: Path, old: Path) -> None:
    assert verify(old, repair=True) == []
    assert checksums(old) == checksums(new)


def test_any_flipped_bit_of_an_index_stops_a_loader_before_the_first_batch(copy: Path) -> None:
    path = copy / "train.index.npy"
    good, places = path.read_bytes(), random.Random(0)
    for _ in range(60):
        bit = places.randrange(8 * len(good))
        path.write_bytes(good[: bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1 :])
        with pytest.raises(
            ShardError, match=r"train\.index\.npy: (has changed since it was packed|cannot be read|has shape)"
        ):
            make_loader(copy)
    path.write_bytes(good)
    make_loader(copy)


def swap(rows: NDArray[Any]) -> None:
    first = rows["label"][0]
    other = int(np.flatnonzero(rows["label"] != first)[0])
    rows["label"][[0, other]] = rows["label"][[other, 0]]


def test_the_repair_is_typed_as_the_message_says_it_also_if_the_folder_has_a_space(copy: Path) -> None:
    folder = copy.rename(copy.with_name("my shards"))
    edit_index(folder, swap)
    with pytest.raises(ShardError) as error:
        make_loader(folder)
    _, _, line = str(error.value).removesuffix(".").partition("rebuild it with fastflower ")
    assert main(shlex.split(line)) == 0
    make_loader(folder)


@pytest.mark.parametrize(
    "edit", [swap, lambda rows: rows["label"].__setitem__(3, -100), lambda rows: rows[::-1].sort()]
)
def test_changed_labels_are_not_loaded_and_a_repair_restores_them(new: Path, copy: Path, edit: Any) -> None:
    edit_index(copy, edit)
    text = f"{copy / 'train.index.npy'}: has changed since it was packed (checksum mismatch); {remedy(copy)}"
    with pytest.raises(ShardError, match=exactly(text)):
        make_loader(copy)
    assert verify(copy) == [
        f"{copy / 'train.index.npy'}: does not match the tars; rebuild it with fastflower verify {copy} --repair."
    ]
    assert verify(copy, repair=True) == []
    assert checksums(copy) == checksums(new)


def setting(field: str, value: Any, row: int = 3) -> Callable[[NDArray[Any]], None]:
    return lambda rows: rows[field].__setitem__(row, value)


SIZE = "row 3: size must be at least 1 byte and at most the size of its shard"
OFFSET = "row 3: offset must be a positive multiple of 512 with room for the image in its shard"
PIXELS = "row 3: width x height must be 1 .. 178956970 pixels"
WRONG: list[tuple[Callable[[NDArray[Any]], object], str]] = [
    (setting("label", -100), "row 3: label must be 0 .. 2, got -100"),
    (setting("label", -1), "row 3: label must be 0 .. 2, got -1"),
    (setting("label", 3), "row 3: label must be 0 .. 2, got 3"),
    (
        lambda rows: setting("label", (rows["label"][3] + 1) % 3)(rows),
        r"has \d+ samples of class '.', but the manifest says \d+",
    ),
    (setting("shard", 7), "disagrees with the manifest on the number of samples in each shard"),
    (
        lambda rows: rows["shard"].__setitem__(slice(None), rows["shard"][::-1].copy()),
        "disagrees with the manifest on the number of samples in each shard",
    ),
    (setting("size", 0), f"{SIZE}, got 0"),
    (setting("size", 2**32 - 1), f"{SIZE}, got {2**32 - 1}"),
    (setting("offset", 2**64 - 512), f"{OFFSET}, got {2**64 - 512}"),
    (setting("offset", 0), f"{OFFSET}, got 0"),
    (lambda rows: setting("offset", rows["offset"][3] + 1)(rows), rf"{OFFSET}, got \d+"),
    (
        lambda rows: setting("offset", rows["offset"][2])(rows),
        r"row 3: offset must be after the image of row 2, got \d+",
    ),
    (setting("width", 0), f"{PIXELS}, got 0"),
    (setting("height", 2**31), f"{PIXELS}, got {24 * 2**31}"),
]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("edit", "message"), WRONG)
def test_an_invalid_row_is_reported_despite_a_valid_checksum(copy: Path, version: int, edit: Any, message: str) -> None:
    edit_index(copy, edit)
    as_first_version(copy) if version == 1 else resealed(copy)
    with pytest.raises(ShardError, match=rf"train\.index\.npy: {message}.*; restore it .*verify .*copy --repair\.$"):
        make_loader(copy)


@pytest.mark.parametrize("values", [{"class_counts": (7, 8, 6)}, {"class_counts": (7, 8)}, {"samples": 21}])
def test_counts_in_the_manifest_are_checked_too(old: Path, values: dict[str, Any]) -> None:
    manifest = Manifest.load(old)
    train: Split = replace(manifest.splits["train"], **values)
    (old / "manifest.json").write_text(replace(manifest, splits={**manifest.splits, "train": train}).to_json())
    messages = (
        r"has \d+ samples of class",
        "cannot be checked: the manifest has counts for 2 classes",
        r"has shape \(22,\)",
    )
    with pytest.raises(ShardError, match=rf"train\.index\.npy: ({'|'.join(messages)})"):
        make_loader(old)


def test_a_manifest_that_lists_a_class_twice_is_rejected_before_training(old: Path) -> None:
    """A checkpoint trained on it would be unusable."""
    path = old / "manifest.json"
    good = path.read_text()
    path.write_text(good.replace('"b",', '"a",', 1))
    with pytest.raises(ShardError, match=exactly(f"{path}: lists class 'a' twice; {remedy(old)}")):
        make_loader(old)
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
    edit_index(tmp_path / "out", setting("width", 102))
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


def test_a_damaged_index_in_the_cache_is_downloaded_again(source: Remote, caplog: pytest.LogCaptureFixture) -> None:
    loader = make_loader(source)
    expected = loader._samples.labels.tolist()
    path = loader.manifest.folder / "train.index.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-13] + bytes([good[-13] ^ 1]) + good[-12:])
    (loader.manifest.folder / "manifest.json").write_bytes(b"{}")
    with caplog.at_level(logging.WARNING, "fastflower"):
        assert make_loader(source)._samples.labels.tolist() == expected
    assert caplog.messages == [f"{path}: has changed since it was packed (checksum mismatch); downloading it again"]
    assert path.read_bytes() == good


def test_an_index_that_changed_at_its_url_is_rejected_and_not_cached(
    source: Remote, server: BadServer, shards: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "bad"))
    edit_index(folder, swap)
    server.folder = folder
    text = f"{source.url}/train.index.npy: has changed since it was packed (checksum mismatch); {remedy(Path('X'))}"
    with pytest.raises(ShardError, match=exactly(text.replace("X", source.url))):
        make_loader(source)
    assert not list(Path(source.folder).glob("*/*.npy"))


def test_a_pack_begun_by_the_first_version_is_finished_by_this_one(new: Path, tmp_path: Path) -> None:
    """The pack was killed when all files but the manifest were in place."""
    folder = drawn(tmp_path / "data", a=9, b=10, c=9)
    out = killed(folder, tmp_path / "out", BEFORE_MANIFEST, shard_bytes=9000)
    (out / ".packing/manifest.json").write_text('{"format": "fastflower", "version": 1}')
    pack(folder, out, shard_bytes=9000)
    assert checksums(out) == checksums(new)


@pytest.mark.parametrize("what", ["seed", "skipped", "pillow", "a/000.jpg"])
def test_a_changed_manifest_is_reported_and_a_repair_keeps_its_options_and_lists(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = drawn(tmp_path / "data", a=4, b=4), tmp_path / "out"
    shutil.copyfile(folder / "a/000.jpg", folder / "a/copy.jpg")
    (folder / "b/text.jpg").write_text("not an image")
    pack(folder, out)
    good = (out / "manifest.json").read_text()
    before, after = {"skipped": ("is plain text", "is an image"), "seed": ('"seed": 0', '"seed": 1')}.get(
        what, (what, "xyz")
    )
    (out / "manifest.json").write_text(good.replace(before, after))
    text = f"{out / 'manifest.json'}: has changed since it was written (checksum mismatch)"
    with pytest.raises(ShardError, match=exactly(f"{text}; {remedy(out)}")):
        Loader(out)
    changed = Manifest.load(out, sealed=False)
    assert verify(out) == [f"{text}; rebuild it with fastflower verify {out} --repair."]
    caplog.clear()
    assert verify(out, repair=True) == verify(out) == []
    assert Manifest.load(out) == changed
    kept = "kept entries that the tars cannot confirm, such as options and skipped files"
    assert caplog.messages[-1] == f"{out / 'manifest.json'}: {kept}"


def test_a_repair_logs_what_it_writes_and_writes_nothing_else(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    times = {path: path.stat().st_mtime_ns for path in [copy, *copy.iterdir()]}
    with caplog.at_level(logging.INFO, "fastflower"):
        assert verify(copy, repair=True) == []
        assert {path: path.stat().st_mtime_ns for path in [copy, *copy.iterdir()]} == times
        assert caplog.messages == []
        (copy / "train.index.npy").unlink()
        assert verify(copy, repair=True) == []
    assert caplog.messages == [f"rebuilt {copy / 'train.index.npy'}"]
