"""Validation splits of small classes, and warnings about unusual or empty ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packs import drawn, paths
from training_runs import RECIPE

from fastflower import Manifest, pack, train
from fastflower.packing.folder import scan
from fastflower.packing.lost_classes import LostClassError
from fastflower.packing.plan import Options, make_plan

OPTIONS: Any = {"split_by": "class", "val_fraction": 0.2, "seed": 0, "shard_bytes": 1 << 20}
OPTIONS |= {"max_side": None, "quality": None, "on_bad": "skip", "on_conflict": "keep", "lists": False}


def classes(root: Path, *counts: int) -> Path:
    """Make class folders with these numbers of different files."""
    for label, count in enumerate(counts):
        (root / f"c{label:05}").mkdir(parents=True)
        for number in range(count):
            (root / f"c{label:05}/{number}.jpg").write_bytes(f"{label} {number}".rjust(12).encode())
    return root


def shares(folder: Path, **options: Any) -> list[int]:
    """Return the number of validation images in each class."""
    plan = make_plan(scan(folder), Options(**(OPTIONS | options)), {})
    (val,) = [plan.order[shard.start : shard.stop] for shard in plan.shards if shard.split == "val"]
    return np.bincount(plan.folder.files["label"][val], minlength=len(plan.folder.classes)).tolist()


@pytest.mark.parametrize("count", [2, 3, 4, 6, 7, 8, 12, 13])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.3, 0.5, 0.9])
def test_small_classes_together_meet_the_fraction(tmp_path: Path, count: int, fraction: float) -> None:
    """Each class gives its fraction, rounded up or down, and at least one image. The total is off by at most one."""
    found, exact = shares(classes(tmp_path, *[count] * 40), val_fraction=fraction), count * fraction
    assert set(found) <= {max(1, int(exact)), max(1, min(count - 1, -int(-exact // 1)))}
    if 1 <= exact <= count - 1:
        assert abs(sum(found) - 40 * exact) <= 1 + 1e-9


def test_other_classes_compensate_for_the_minimum_of_one(tmp_path: Path) -> None:
    """Ten classes of two give 0.6 images too many each, so only two of forty classes of six (1.2 each) are rounded up."""
    found = shares(classes(tmp_path, *[2] * 10, *[6] * 40))
    assert found[:10] == [1] * 10
    assert sum(found) == 52 == round((20 + 240) * 0.2)
    found = shares(classes(tmp_path / "more", 1, 1, 1, *[14] * 10))  # 2.8 each; a single image is never for validation
    assert found[:3] == [0, 0, 0]
    assert sum(found) == 28


def test_the_seed_decides_which_small_classes_give_more(tmp_path: Path) -> None:
    folder = classes(tmp_path, *[7] * 10)
    found = [shares(folder, seed=seed) for seed in range(20)]
    assert {(sum(counts), min(counts), max(counts)) for counts in found} == {(14, 1, 2)}
    assert len({tuple(counts) for counts in found}) > 15
    assert found[3] == shares(folder, seed=3)


def test_thousands_of_classes_of_two_give_one_each(tmp_path: Path) -> None:
    assert shares(classes(tmp_path, *[2] * 2000)) == [1] * 2000


def test_an_unusual_split_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def logged(folder: Path, **options: Any) -> list[str]:
        caplog.clear()
        pack(folder, tmp_path / f"out {folder.name} {options}", **options)
        return [message.rpartition("}: ")[2].partition(" {}-2")[0] for message in caplog.messages]

    nothing = "has no images in split 'val', so training on these shards has nothing to validate on; "
    spare = "no class can spare an image: add images, or pack a folder with its own split"
    assert logged(drawn(tmp_path / "single", a=1, b=1)) == [nothing + spare]
    copies = drawn(tmp_path / "copies", a=1, b=1)
    for name in "ab":
        (copies / name / "copy.jpg").write_bytes((copies / name / "000.jpg").read_bytes())
    again = "classes can only spare copies, which stay together: add images. If an older version planned this pack, pack again"
    assert logged(copies) == [nothing + again]
    splits = drawn(tmp_path / "splits", **{"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1})
    beside = f"draw one from the training images:\n  pack({str(splits)!r}, '{tmp_path}/out splits"
    assert logged(splits) == [nothing + beside]
    why = "each class with two or more images contributes at least one, and copies stay together"
    pairs = drawn(tmp_path / "pairs", a=2, b=2, c=2)
    assert logged(pairs) == [f"the val split holds 50% of the images, more than val_fraction 0.2: {why}"]
    assert logged(pairs, val_fraction=0.5) == logged(pairs, val_fraction=0) == []


@pytest.mark.usefixtures("narrow", "no_figures")
def test_training_logs_once_that_it_validates_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for fraction in (0.0, 0.5):
        shards = tmp_path / f"{fraction}"
        pack(drawn(tmp_path / f"data {fraction}", a=4, b=4), shards, val_fraction=fraction)
        caplog.clear()
        report = train(shards, replace(RECIPE, batch_size=4), out=tmp_path / f"run {fraction}", device="cpu")
        message = f"{shards}: the val split has no images, so nothing is validated; checkpoint-best.pt will hold the last epoch"
        assert caplog.messages.count(message) == (fraction == 0)
        assert (report.scores is None) == (fraction == 0)
    assert Manifest.load(shards).splits["val"].class_counts == (2, 2)


def test_classes_of_similar_names_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pack(drawn(tmp_path / "data", **{"Red rose": 3, "red_rose": 3, "tulip": 3, "C": 3, "C++": 3}), tmp_path / "out")
    said = [message.partition(": ")[2] for message in caplog.messages if "differ only" in message]
    assert said == [
        "classes 'C' and 'C++' differ only in case, spaces, punctuation or Unicode form",
        "classes 'Red rose' and 'red_rose' differ only in case, spaces, punctuation or Unicode form",
    ]


def test_another_seed_is_advised_if_only_the_drawn_images_of_a_class_can_be_read(tmp_path: Path) -> None:
    folder, messages = drawn(tmp_path / "data", a=4, b=2, c=4), set[str]()
    (folder / "b/000.jpg").write_bytes(b"text")
    for seed in range(8):
        try:
            pack(folder, tmp_path / f"{seed}", seed=seed)
        except LostClassError as error:
            messages.add(str(error).replace(f"{tmp_path}/{seed}", "OUT").replace(f"seed={seed}", "seed=0"))
    (message,) = messages
    assert message.split("\n")[2:] == [
        "  1 image that can be read was drawn for the val split; another seed may draw others",
        "Replace the files or choose another seed, remove OUT/.packing, and pack again. Or leave out such classes, which "
        "keeps the finished shards:",
        f"  pack({str(folder)!r}, 'OUT', seed=0, drop_empty_classes=True)",
    ]


def test_a_val_split_without_readable_images_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def logged(folder: Path, val: set[str]) -> str:
        for path in val:
            (folder / path).write_bytes(path.encode())
        caplog.clear()
        pack(folder, tmp_path / f"out {folder.name}")
        (said,) = (message for message in caplog.messages if "in split 'val'" in message)
        return said.partition("; ")[2]

    def again(folder: Path, seed: int) -> str:
        return f"\n  pack({str(folder)!r}, '{tmp_path}/out {folder.name}-2', seed={seed})"

    drawing, own = (
        drawn(tmp_path / "drawn", a=4, b=4),
        drawn(tmp_path / "own", **{"train/a": 2, "train/b": 2, "val/a": 1}),
    )
    pack(drawing, tmp_path / "before")
    cannot = "for it cannot be read: replace damaged files"
    val = paths(tmp_path / "before", "val")
    assert logged(drawing, val) == f"2 images {cannot}, or draw others:{again(drawing, 1)}"
    assert logged(own, {"val/a/000.jpg"}) == f"1 image {cannot}"
