"""Packing: the same bytes every time, fair splits, nothing lost in silence, nothing left behind."""

import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from webdataset.compat import WebDataset

from fastflower import Manifest, pack
from fastflower.errors import ArgumentError, FolderError
from fastflower.folder import scan


def photo(seed: int, size: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def drawn(root: Path, **counts: int) -> Path:
    """A folder with so many different JPEG files in each class."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            photo(1000 * label + number).save(root / name / f"{number:03d}.jpg")
    return root


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return drawn(tmp_path / "small", a=7, b=10, c=13)


class Sample(NamedTuple):
    shard: str
    key: str
    label: int
    image: bytes
    path: str


def samples(out: Path, split: str) -> Iterator[Sample]:
    """What tarfile finds in the shards that the manifest names."""
    for shard in Manifest.load(out).splits[split].shards:
        with tarfile.open(out / shard.name) as tar:
            data = {member.name: tar.extractfile(member).read() for member in tar}  # pyright: ignore[reportOptionalMemberAccess]
        for key in [name.removesuffix(".jpg") for name in data if name.endswith(".jpg")]:
            note = json.loads(data[f"{key}.json"])
            yield Sample(shard.name, key, int(data[f"{key}.cls"]), data[f"{key}.jpg"], note["filename"])


def paths(out: Path, split: str) -> set[str]:
    return {sample.path for sample in samples(out, split)}


def checksums(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def test_two_packs_of_one_folder_are_the_same_bytes(flowers: Path, shards: Path, tmp_path: Path) -> None:
    """Also of a copy elsewhere, whose files are younger."""
    moved = shutil.copytree(flowers, tmp_path / "moved", copy_function=shutil.copy)
    manifest = pack(moved, tmp_path / "again", shard_bytes=1 << 20)
    assert checksums(tmp_path / "again") == checksums(shards)
    tars = [shard.name for split in manifest.splits.values() for shard in split.shards]
    others = ["manifest.json", "_info.json", "train.index.npy", "val.index.npy"]
    assert sorted(checksums(shards)) == sorted([*tars, *(name.replace(".tar", ".idx") for name in tars), *others])


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_the_bytes(flowers: Path, shards: Path, tmp_path: Path, workers: int) -> None:
    pack(flowers, tmp_path / "out", shard_bytes=1 << 20, workers=workers)
    assert checksums(tmp_path / "out") == checksums(shards)


def test_an_executor_of_processes_makes_the_same_bytes(flowers: Path, shards: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        pack(flowers, tmp_path / "out", shard_bytes=1 << 20, executor=executor)
        assert executor.submit(abs, -1).result() == 1  # it is the caller's, and still open
    assert checksums(tmp_path / "out") == checksums(shards)


class Recorded(ProcessPoolExecutor):
    """Remembers what it was given."""

    def submit(self, *args: Any, **options: Any) -> Future[Any]:
        self.futures = [*getattr(self, "futures", []), super().submit(*args, **options)]
        return self.futures[-1]


def test_an_error_in_another_process_arrives_when_all_have_stopped(flowers: Path, shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(flowers, tmp_path / "data"))
    bad = folder / next(samples(shards, "train")).path
    bad.write_bytes(bytes(bad.stat().st_size))  # of the same size, so that it is the first in a shard again
    text = f"{bad}: is no image; remove or replace it, or pack with --on-bad skip."
    with Recorded(2, mp_context=get_context("spawn")) as executor:
        with pytest.raises(FolderError, match=exactly(text)):
            pack(folder, tmp_path / "out", on_bad="fail", quality=90, shard_bytes=1 << 20, executor=executor)
        assert [future.done() for future in executor.futures] == [True] * len(executor.futures)
    assert not (tmp_path / "out").exists()


def test_the_seed_changes_split_and_order(small: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        pack(small, tmp_path / f"split-{seed}", seed=seed)
        pack(small, tmp_path / f"whole-{seed}", seed=seed, val_fraction=0)
    assert paths(tmp_path / "split-0", "val") != paths(tmp_path / "split-1", "val")
    orders = [[sample.path for sample in samples(tmp_path / f"whole-{seed}", "train")] for seed in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.05])
def test_a_split_by_class_takes_the_share_of_each_class(small: Path, tmp_path: Path, fraction: float) -> None:
    manifest = pack(small, tmp_path / "out", val_fraction=fraction)
    expected = tuple(round(count * fraction) for count in (7, 10, 13))
    assert manifest.splits["val"].class_counts == expected
    assert manifest.splits["train"].class_counts == tuple(np.subtract((7, 10, 13), expected))
    for split in ("train", "val"):
        counts = Counter(sample.label for sample in samples(tmp_path / "out", split))
        assert tuple(counts[label] for label in range(3)) == manifest.splits[split].class_counts
    assert not paths(tmp_path / "out", "train") & paths(tmp_path / "out", "val")


def test_a_random_split_takes_the_share_of_all(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=20, b=20, c=20)
    options: dict[str, Any] = {"split_by": "random", "val_fraction": 0.3}
    of_val = [pack(folder, tmp_path / str(seed), seed=seed, **options).splits["val"] for seed in range(4)]
    assert [split.samples for split in of_val] == [18] * 4
    assert {split.class_counts for split in of_val} - {(6, 6, 6)}


def test_without_validation_all_is_for_training(small: Path, tmp_path: Path) -> None:
    empty = pack(small, tmp_path / "out", val_fraction=0).splits["val"]
    assert (empty.samples, empty.shards) == (0, ())
    assert paths(tmp_path / "out", "train") == {found.path for found in scan(small).photos}
    assert not list((tmp_path / "out").glob("val*.tar"))


def test_identical_images_stay_in_one_split(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", a=30, b=30)
    for number in range(10):
        for copied in range(1 + number % 3):
            shutil.copy(folder / f"a/{number:03d}.jpg", folder / f"a/again-{number}-{copied}.jpg")
    twins = [{f"a/{n:03d}.jpg", *(f"a/again-{n}-{c}.jpg" for c in range(1 + n % 3))} for n in range(10)]
    for seed in range(4):
        out = tmp_path / str(seed)
        manifest = pack(folder, out, val_fraction=0.5, seed=seed)
        assert sorted(map(sorted, manifest.duplicates)) == sorted(map(sorted, twins))
        train, val = paths(out, "train"), paths(out, "val")
        assert [group for group in twins if not (group <= train or group <= val)] == []
        assert any(group <= train for group in twins)
        assert any(group <= val for group in twins)
        assert manifest.label_conflicts == ()
        assert len(train) + len(val) == 60 + sum(len(group) - 1 for group in twins)
        # A group may take more than is left of the share, by less than itself.
        assert 0 <= manifest.splits["val"].class_counts[0] - round(49 * 0.5) <= 3


@pytest.fixture
def conflicting(small: Path) -> Path:
    """a/000 also stands under b, twice; c/000 twice under c."""
    for source, target in (("a/000", "b/x"), ("a/000", "b/y"), ("c/000", "c/x")):
        shutil.copy(small / f"{source}.jpg", small / f"{target}.jpg")
    return small


def test_one_picture_under_two_labels_is_reported_and_kept_in_one_split(conflicting: Path, tmp_path: Path) -> None:
    manifest = pack(conflicting, tmp_path / "out", val_fraction=0.5)
    assert manifest.label_conflicts == (("a/000.jpg", "b/x.jpg", "b/y.jpg"),)
    assert manifest.duplicates == (("a/000.jpg", "b/x.jpg", "b/y.jpg"), ("c/000.jpg", "c/x.jpg"))
    assert manifest.skipped == ()
    train, val = paths(tmp_path / "out", "train"), paths(tmp_path / "out", "val")
    group = set(manifest.label_conflicts[0])
    assert group <= train or group <= val


def test_conflicting_pictures_can_be_left_out(conflicting: Path, tmp_path: Path) -> None:
    manifest = pack(conflicting, tmp_path / "out", on_conflict="drop")
    left_out = ("a/000.jpg", "b/x.jpg", "b/y.jpg")
    assert manifest.label_conflicts == (left_out,)
    assert manifest.skipped == tuple({"path": path, "reason": "stands under two labels"} for path in left_out)
    both = paths(tmp_path / "out", "train") | paths(tmp_path / "out", "val")
    assert both == {found.path for found in scan(conflicting).photos} - set(left_out)


NASTY = [
    "with space", "two.dots.here", ".dot", "..", "-dash", "ümläut", "日本語", "🌻", "quote'\"", "new\nline", "tab\there",
    "a" * 200, "b" * 200, "semi;colon&", "%41", "back\\slash", "UPPER", "upper", "__key__", "x.cls", "x.json", "*?[]",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its tars to be closed
def test_nasty_names_get_plain_unique_keys_and_are_all_read_back(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", **{"plain": 2, "with space.and dot": 2})
    no_utf8 = b"caf\xe9".decode("utf-8", "surrogateescape")
    names = [*NASTY, no_utf8]
    for number, name in enumerate(names):
        photo(5000 + number).save(folder / f"plain/{name}.jpg", "JPEG")
        photo(6000 + number).save(folder / f"plain/{name}.png", "PNG")
    manifest = pack(folder, tmp_path / "out", val_fraction=0)
    assert manifest.skipped == ()
    found = list(samples(tmp_path / "out", "train"))
    assert {sample.path for sample in found} == {entry.path for entry in scan(folder).photos}
    assert len(found) == len({sample.key for sample in found}) == 2 * len(names) + 4
    assert [sample.key for sample in found if not re.fullmatch(r"[0-9A-Za-z_-]+", sample.key)] == []
    read = WebDataset(str(tmp_path / "out/train-000000.tar"), shardshuffle=False)
    assert [(sample["__key__"], sample["jpg"], int(sample["cls"])) for sample in read] == [
        (sample.key, sample.image, sample.label) for sample in found
    ]


def test_bad_files_are_listed_with_path_and_reason_and_the_others_packed(small: Path, tmp_path: Path) -> None:
    good = {found.path for found in scan(small).photos}
    whole = (small / "a/000.jpg").read_bytes()
    (small / "a/half.jpg").write_bytes(whole[: len(whole) // 2])
    (small / "b/text.jpg").write_text("not a picture")
    (small / "b/empty.png").write_bytes(b"")
    (small / "c/notes.txt").write_text("not named as one")
    (small / "c/gone.jpg").symlink_to(small / "nowhere")
    manifest = pack(small, tmp_path / "out")
    reasons = {item["path"]: item["reason"] for item in manifest.skipped}
    assert "runcated" in reasons.pop("a/half.jpg")
    assert reasons == {
        "b/text.jpg": "is no image",
        "b/empty.png": "is no image",
        "c/notes.txt": "is not named as an image",
        "c/gone.jpg": "No such file or directory",
    }
    assert paths(tmp_path / "out", "train") | paths(tmp_path / "out", "val") == good


@pytest.mark.filterwarnings("error")
def test_shards_without_a_good_image_are_not_written(small: Path, tmp_path: Path) -> None:
    """One image a shard, and DALI refuses to read a shard of none."""
    for number in range(20):
        (small / f"a/bad-{number}.jpg").write_bytes(b"bad" * 300)
        (small / f"b/empty-{number}.jpg").write_bytes(b"")
    manifest = pack(small, tmp_path / "out", shard_bytes=1, val_fraction=0.5)
    for split, part in manifest.splits.items():
        assert [shard.samples for shard in part.shards] == [1] * part.samples
        assert [shard.name for shard in part.shards] == [f"{split}-{number:06d}.tar" for number in range(part.samples)]
        assert len(list(samples(tmp_path / "out", split))) == part.samples
    assert len(list((tmp_path / "out").glob("*.tar"))) == len(list((tmp_path / "out").glob("*.idx"))) == 30
    assert {path.read_text().splitlines()[0] for path in (tmp_path / "out").glob("*.idx")} == {"v1.2 1"}


def test_transcoding_is_what_was_asked(small: Path, tmp_path: Path) -> None:
    photo(1, size=100).save(small / "a/large.png")
    pack(small, tmp_path / "out", max_side=50, quality=80)
    found = [sample for split in ("train", "val") for sample in samples(tmp_path / "out", split)]
    assert len(found) == 31
    index = np.concatenate([Manifest.load(tmp_path / "out").index(split) for split in ("train", "val")])
    assert {(int(row["height"]), int(row["width"])) for row in index} == {(24, 24), (50, 50)}
    assert all(sample.image.startswith(b"\xff\xd8") for sample in found)
    assert not [sample for sample in found if sample.image == (small / sample.path).read_bytes()]


RULES: list[tuple[str, Any, str]] = [
    ("split_by", "label", "'class' or 'random'"),
    ("val_fraction", 1.0, "0 or more and less than 1"),
    ("val_fraction", -0.1, "0 or more and less than 1"),
    ("val_fraction", float("nan"), "0 or more and less than 1"),
    ("shard_bytes", 0, "at least 1"),
    ("max_side", 0, "at least 1 pixel"),
    ("quality", 0, "1 .. 95"),
    ("quality", 96, "1 .. 95"),
    ("on_bad", "ignore", "'skip' or 'fail'"),
    ("on_conflict", "merge", "'keep' or 'drop'"),
    ("workers", 0, "at least 1"),
]


@pytest.mark.parametrize(("name", "value", "rule"), RULES)
def test_an_argument_outside_its_rule_is_refused(small: Path, tmp_path: Path, name: str, value: Any, rule: str) -> None:
    with pytest.raises(ArgumentError, match=exactly(f"{name} must be {rule}, got {value!r}.")):
        pack(small, tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def one_bad(folder: Path) -> str:
    (folder / "b/004.jpg").write_bytes(b"text")
    return f"{folder / 'b/004.jpg'}: is no image; remove or replace it, or pack with --on-bad skip."


def all_bad(folder: Path) -> str:
    for path in (folder / "b").iterdir():
        path.write_bytes(b"text")
    remedy = "add images, or remove the class folder. 10 files were skipped in all."
    return f"class 'b': none of its images is left for training; {remedy}"


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("spoil", "on_bad"), [(one_bad, "fail"), (all_bad, "skip")])
def test_after_an_error_nothing_is_left_behind(
    small: Path, tmp_path: Path, spoil: Callable[[Path], str], on_bad: Any, kept: bool
) -> None:
    out = tmp_path / "out"
    if kept:  # what others put there stays
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match=exactly(spoil(small))):
        pack(small, out, on_bad=on_bad)
    assert ([path.name for path in out.iterdir()] if out.exists() else []) == ["notes.txt"] * kept
    assert out.exists() == kept


def test_a_disk_that_is_full_is_explained_and_leaves_nothing(small: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    program = (
        "import resource, sys; from fastflower.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, "pack", small, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = f"error: {out}: cannot be written (File too large); make room, or name another folder with --out."
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == text
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_out_below_a_file_is_explained(small: Path) -> None:
    out = small / "a/000.jpg" / "out"
    text = f"{out}: cannot be written (Not a directory); make room, or name another folder with --out."
    with pytest.raises(FolderError, match=exactly(text)):
        pack(small, out)


def test_a_pack_is_not_overwritten(small: Path, tmp_path: Path) -> None:
    pack(small, tmp_path / "out")
    before = checksums(tmp_path / "out")
    text = f"{tmp_path / 'out'}: holds a pack already; name another folder with --out, or remove this one."
    with pytest.raises(FolderError, match=exactly(text)):
        pack(small, tmp_path / "out", seed=1)
    assert checksums(tmp_path / "out") == before


def test_two_packs_at_a_time_do_not_mix(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".packing").mkdir(parents=True)
    text = f"{out}: another pack is writing here; wait for it, or name another folder with --out."
    with (out / ".packing/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(FolderError, match=exactly(text)):
            pack(small, out)
        assert [path.name for path in out.rglob("*")] == [".packing", "lock"]
    pack(small, out)
    assert not (out / ".packing").exists()


def test_what_a_killed_pack_left_does_no_harm(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out/.packing").mkdir(parents=True)
    for name in ("train-000000.tar", "train-000007.tar", "lock"):
        (tmp_path / "out/.packing" / name).write_bytes(b"half")
    pack(small, tmp_path / "out")
    pack(small, tmp_path / "clean")
    assert checksums(tmp_path / "out") == checksums(tmp_path / "clean")


@pytest.mark.parametrize("shard_bytes", [200_000, 1 << 20, 1 << 30])
def test_shards_are_of_about_equal_size_and_as_few_as_fit(flowers: Path, tmp_path: Path, shard_bytes: int) -> None:
    pack(flowers, tmp_path / "out", shard_bytes=shard_bytes)
    for split in ("train", "val"):
        sizes: Counter[str] = Counter()
        found = list(samples(tmp_path / "out", split))
        for sample in found:
            sizes[sample.shard] += len(sample.image)
        total, largest = sum(sizes.values()), max(len(sample.image) for sample in found)
        assert len(sizes) == -(-total // shard_bytes)
        assert max(sizes.values()) <= shard_bytes + largest
        assert max(sizes.values()) - min(sizes.values()) <= 2 * largest


def test_the_manifest_tells_the_options(small: Path, tmp_path: Path) -> None:
    options = {"split_by": "random", "val_fraction": 0.3, "seed": 5, "shard_bytes": 9999, "max_side": 20, "quality": 70}
    options |= {"on_bad": "fail", "on_conflict": "drop"}
    returned = pack(small, tmp_path / "out", **options)  # pyright: ignore[reportArgumentType]
    assert returned.options == Manifest.load(tmp_path / "out").options == options
    assert returned == Manifest.load(tmp_path / "out")
