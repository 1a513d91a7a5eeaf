"""Plans: complete, with whole groups, fair splits and even shards. Saved plans load unchanged."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plans import OPTIONS, VERSIONS, numbered, planned, write

from fastflower.packing.folder import scan
from fastflower.packing.plan import PLAN, Options, Plan, PlannedShard, load_plan, make_plan, save_plan


def shards(plan: Plan) -> Iterator[tuple[PlannedShard, list[int]]]:
    return ((shard, plan.order[shard.start : shard.stop].tolist()) for shard in plan.shards)


def split_of(plan: Plan) -> dict[int, str]:
    return {number: shard.split for shard, numbers in shards(plan) for number in numbers}


def drawn(root: Path, seed: int) -> Path:
    """Make 150 files of up to 300 bytes in three classes. A third are copies of files of any class."""
    rng = np.random.default_rng(seed)
    contents: list[bytes] = []
    for _ in range(150):
        copied = contents and rng.random() < 0.3
        contents.append(contents[rng.integers(len(contents))] if copied else rng.bytes(int(rng.integers(300))))
    names = [f"{'abc'[min(2, number * number // 5000)]}/{number:03d}.jpg" for number in range(150)]
    return write(root, dict(zip(names, contents, strict=True)))


def kept_images(plan: Plan) -> list[int]:
    """Return the images that a plan must contain, from reading all files in full."""
    found = plan.folder
    contents = [(found.root / found.path(number)).read_bytes() for number in range(len(found))]
    labels: dict[bytes, set[int]] = defaultdict(set)
    for content, label in zip(contents, found.files["label"].tolist(), strict=True):
        labels[content].add(label)
    drop = plan.options.on_conflict == "drop"
    return [number for number, content in enumerate(contents) if len(labels[content]) == 1 or not drop]


LAWS = [
    {"split_by": split_by, "on_conflict": on_conflict, "seed": seed, "shard_bytes": (400, 5000, 1 << 20)[seed]}
    for split_by in ("class", "random")
    for on_conflict in ("keep", "drop")
    for seed in range(3)
]


@pytest.mark.parametrize("options", LAWS)
def test_every_kept_image_is_planned_once_and_groups_are_not_divided(tmp_path: Path, options: dict[str, Any]) -> None:
    plan = planned(drawn(tmp_path, options["seed"]), **options)
    kept = kept_images(plan)
    assert plan.order.dtype == np.int64
    assert sorted(plan.order.tolist()) == kept
    assert (len(kept) < 150) == (options["on_conflict"] == "drop")
    split = split_of(plan)
    assert len(list(plan.groups)) > 10
    for group in plan.groups:
        assert len({split[number] for number in group.tolist() if number in split}) <= 1


@pytest.mark.parametrize("options", LAWS)
def test_the_validation_share_exceeds_the_fraction_by_less_than_a_group(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    plan = planned(drawn(tmp_path, options["seed"]), **options)
    labels, split = plan.folder.files["label"], split_of(plan)
    slack = max(len(group) for group in plan.groups) - 1
    together = {number for group in plan.conflicts() for number in group.tolist()}
    for label in range(3) if options["split_by"] == "class" else [None]:
        numbers = [number for number in split if label is None or labels[number] == label]
        val = [number for number in numbers if split[number] == "val"]
        forced = 0 if label is None else len(together.intersection(val))  # by an identical image of another class
        wanted = round(len(numbers) * 0.25)
        assert wanted <= len(val) <= wanted + slack + forced


@pytest.mark.parametrize("fraction", [0, 0.01, 0.2, 0.5, 0.99])
def test_without_copies_the_share_is_exact(tmp_path: Path, fraction: float) -> None:
    plan = planned(numbered(tmp_path, a=1, b=10, c=37), val_fraction=fraction)
    by_class = Counter((split, int(plan.folder.files["label"][number])) for number, split in split_of(plan).items())
    for label, count in enumerate((1, 10, 37)):
        val = min(max(round(count * fraction), fraction > 0), count - 1)
        assert (by_class["val", label], by_class["train", label]) == (val, count - val)
    at_random = Counter(split_of(planned(tmp_path, val_fraction=fraction, split_by="random")).values())
    assert at_random["val"] == min(max(round(48 * fraction), fraction > 0), 48 - 3) == 48 - at_random["train"]


@pytest.mark.parametrize("split_by", ["class", "random"])
def test_every_image_is_equally_likely_to_be_in_val(tmp_path: Path, split_by: str) -> None:
    """With 12 of 48 images and 200 seeds, each count is binomial (mean 50, deviation 6.1) and within four deviations."""
    found = scan(numbered(tmp_path, a=16, b=32))
    counts = Counter[int]()
    for seed in range(200):
        plan = make_plan(found, Options(**(OPTIONS | {"split_by": split_by, "seed": seed})), VERSIONS)
        counts.update(number for number, split in split_of(plan).items() if split == "val")
    assert sum(counts.values()) == 200 * 12
    assert all(26 <= counts[number] <= 74 for number in range(48))


def test_copies_count_in_each_of_their_classes_and_are_equally_likely_in_val(tmp_path: Path) -> None:
    """Two classes have the same eight images, so any validation image counts for both."""
    found = scan(write(tmp_path, {f"{name}/{number}.jpg": b"%d" % number for name in "ab" for number in range(8)}))
    seen = set[int]()
    for seed in range(40):
        split = split_of(make_plan(found, Options(**(OPTIONS | {"seed": seed})), VERSIONS))
        val = {number for number in split if split[number] == "val"}
        assert len(val) == 4
        seen |= val
    assert seen == set(range(16))


def test_a_folders_own_splits_are_kept_or_redrawn(tmp_path: Path) -> None:
    numbered(tmp_path / "train", a=9, b=9)
    numbered(tmp_path / "validation", a=3, b=2)
    numbered(tmp_path / "test", a=2)  # copies of training images; the folder's own splits are kept all the same
    plan = planned(tmp_path, split_by="folder", val_fraction=None)
    assert plan.splits == plan.folder.splits == ("train", "val", "test")
    top = {"train": "train", "val": "validation", "test": "test"}
    assert len(split_of(plan)) == 25
    assert all(plan.folder.path(number).startswith(top[split]) for number, split in split_of(plan).items())
    redrawn = planned(tmp_path, split_by="random")
    assert redrawn.splits == ("train", "val")
    assert (
        len({redrawn.folder.path(n).partition("/")[0] for n, split in split_of(redrawn).items() if split == "train"})
        > 1
    )


def test_conflicts_are_the_groups_with_several_labels(tmp_path: Path) -> None:
    names = ["a/1.jpg", "a/2.jpg", "a/3.jpg", "b/1.jpg", "b/2.jpg"]
    plan = planned(write(tmp_path, dict(zip(names, [b"1", b"2", b"2", b"1", b"3"], strict=True))))
    assert [group.tolist() for group in plan.groups] == [[0, 3], [1, 2]]
    assert [group.tolist() for group in plan.conflicts()] == [[0, 3]]


@pytest.mark.parametrize("shard_bytes", [1, 100, 777, 5000, 30_000])
def test_shards_are_consecutive_about_equal_and_as_few_as_fit(tmp_path: Path, shard_bytes: int) -> None:
    plan = planned(drawn(tmp_path, 1), shard_bytes=shard_bytes)
    starts = [0, *(shard.stop for shard in plan.shards)]
    assert [shard.start for shard in plan.shards] == starts[:-1]
    assert starts[-1] == len(plan.order)
    assert all(shard.stop > shard.start for shard in plan.shards)
    for split in ("train", "val"):
        mine = [(shard, plan.folder.files["size"][numbers]) for shard, numbers in shards(plan) if shard.split == split]
        assert [shard.name for shard, _ in mine] == [f"{split}-{number:06d}" for number in range(len(mine))]
        sizes = [int(size.sum()) for _, size in mine]
        total, largest = sum(sizes), max(int(size.max()) for _, size in mine)
        few = -(-total // shard_bytes)
        assert len(sizes) == few if total / few > largest else len(sizes) <= few
        assert all(abs(size - total / few) < largest for size in sizes) or total / few <= largest
    assert [shard.split for shard in plan.shards] == sorted(shard.split for shard in plan.shards)


def test_empty_files_make_no_shard_of_their_own(tmp_path: Path) -> None:
    contents = {f"{name}/{number}.jpg": b"" for name in "ab" for number in range(9)}
    plan = planned(write(tmp_path / "empty", contents), val_fraction=0)
    assert plan.shards == (PlannedShard("train", "train-000000", 0, 18),)
    contents |= {"a/9.jpg": b"1" * 700, "b/9.jpg": b"2" * 700}
    found = scan(write(tmp_path / "some", contents))
    for seed in range(20):
        plan = make_plan(found, Options(**(OPTIONS | {"val_fraction": 0, "seed": seed})), VERSIONS)
        assert [found.files["size"][numbers].sum() for _, numbers in shards(plan)] == [700, 700]


def test_shards_mix_the_classes(tmp_path: Path) -> None:
    plan = planned(numbered(tmp_path, a=200, b=200), shard_bytes=1000)
    assert len(plan.shards) == 8
    for _, numbers in shards(plan):
        assert 0.2 < plan.folder.files["label"][numbers].mean() < 0.8


def test_this_plan_never_changes(tmp_path: Path) -> None:
    """If it changed, every folder would be packed to other bytes."""
    plan = planned(numbered(tmp_path, a=8, b=8), shard_bytes=100)
    assert [shard.stop for shard in plan.shards] == [4, 8, 12, 16]
    assert plan.order.tolist() == [15, 4, 7, 14, 8, 13, 5, 0, 12, 2, 10, 6, 1, 3, 11, 9]


def test_the_seed_changes_the_split_and_the_order(tmp_path: Path) -> None:
    root = numbered(tmp_path, a=20, b=20)
    plans = [planned(root, seed=seed) for seed in range(20)]
    assert len({tuple(plan.order.tolist()) for plan in plans}) == 20
    assert len({frozenset(plan.order.tolist()[-10:]) for plan in plans}) == 20  # validation images
    assert planned(root, seed=3).order.tolist() == plans[3].order.tolist()


def same_plan(left: Plan, right: Plan) -> None:
    for name in ("options", "versions", "shards", "splits", "folder.classes", "folder.splits", "folder.ignored"):
        assert attrgetter(name)(left) == attrgetter(name)(right)
    assert left.folder.root.absolute() == right.folder.root.absolute()
    for name in ("folder.files", "folder.paths", "order", "groups.members", "groups.ends"):
        one, other = attrgetter(name)(left), attrgetter(name)(right)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_threads_and_the_file_systems_order_do_not_change_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = drawn(tmp_path / "data", 0)
    (root / "a/linked").symlink_to(root / "c")
    (root / "a/again").symlink_to(root / "c")
    before, listed, opened = planned(root), os.listdir, os.scandir
    rng, orders = np.random.default_rng(0), set[str]()

    def shuffled(items: list[Any]) -> list[Any]:
        mixed = [items[place] for place in rng.permutation(len(items))]
        orders.add(str(mixed))
        return mixed

    for _ in range(5):
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", lambda path: shuffled(listed(path)))
            patch.setattr(os, "scandir", lambda path: nullcontext(shuffled(list(opened(path)))))
            same_plan(planned(root), before)
    assert len(orders) > 25
    with ThreadPoolExecutor(4) as pool:
        same_plan(make_plan(scan(root), Options(**OPTIONS), VERSIONS, pool.map), before)


STRANGE = os.fsdecode(b"not UTF-8 \xff\n") + "🌹 é"
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "groups": lambda root: drawn(root, 0),
    "no groups": lambda root: numbered(root, a=5, b=5),
    "strange names": lambda root: write(
        root, dict.fromkeys([f"{STRANGE}/{STRANGE}.jpg", "b/1.jpg", f"b/{STRANGE}"], b"")
    ),
    "splits": lambda root: numbered(numbered(root / "train", a=3, b=3).parent / "val", a=1).parent,
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_saved_plan_loads_unchanged(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This also holds for a relative path to the folder and another current folder."""
    FOLDERS[kind](tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    plan = planned(Path("data"), split_by="folder" if kind == "splits" else "class")
    save_plan(plan, tmp_path)
    monkeypatch.chdir("/")
    loaded = load_plan(tmp_path, tmp_path / "data", whole=True)
    assert loaded.folder.root == tmp_path / "data"
    for number in range(len(loaded.folder)):
        assert (loaded.folder.root / loaded.folder.path(number)).is_file()
    monkeypatch.chdir(tmp_path)
    same_plan(loaded, plan)
    assert isinstance(loaded.folder.files, np.memmap)  # workers share the memory
    assert not loaded.order.flags.writeable


def test_a_partly_saved_plan_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(numbered(tmp_path / "data", a=5, b=5))
    real, count = np.save, iter(range(9))

    def save(*arguments: Any) -> None:
        if next(count) == 4:
            raise OSError("No space left on device")
        real(*arguments)

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(OSError, match="No space left"):
        save_plan(plan, tmp_path)
    assert not (tmp_path / PLAN).exists()
