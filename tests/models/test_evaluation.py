"""`evaluate` on folders, on test sets, and on shards with some of the checkpoint's classes."""

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from math import isnan
from pathlib import Path

import numpy as np
import pytest
import torch
from packs import drawn, exactly, paths
from training_runs import RECIPE

from fastflower import Checkpoint, evaluate, pack, predict, train
from fastflower.cli import main
from fastflower.errors import ArgumentError, CheckpointError, ShardError
from fastflower.models.backbone import build
from fastflower.models.metrics import Scores, score

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

CLASSES = ("daisy", "lily", "rose", "tulip")


@pytest.fixture(scope="module")
def checkpoint(narrow: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001  (is set up first)
    """An untrained network for four classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("runs") / "run" / "checkpoint-best.pt"
    path.parent.mkdir()
    Checkpoint(recipe=RECIPE, classes=CLASSES, model=build("resnet18", 4, weights=None).state_dict(), epoch=1).save(
        path
    )
    return path


def by_hand(scores: Scores, data: Path, checkpoint: Path) -> None:
    """Compare scores with counts over what `predict` says of each file, by name."""
    files = sorted(data.rglob("*.jpg"))
    said = [
        (path.parent.name, one.class_name)
        for path, one in zip(files, predict(checkpoint, files, device="cpu"), strict=True)
    ]
    assert scores.num_samples == len(files)
    assert scores.accuracy == pytest.approx(sum(true == found for true, found in said) / len(said))
    harmonic: list[float] = []
    for number, name in enumerate(CLASSES):
        support, found = (sum(pair[side] == name for pair in said) for side in (0, 1))
        both = said.count((name, name))
        assert scores.support[number] == support
        for value, total in ((scores.recall[number], support), (scores.precision[number], found)):
            assert isnan(value) if total == 0 else value == pytest.approx(both / total)
        if support + found:
            harmonic.append(2 * both / (support + found))
    assert scores.macro_f1 == pytest.approx(sum(harmonic) / len(harmonic))


@pytest.mark.parametrize("counts", [{"tulip": 7, "daisy": 6}, {"rose": 5}, dict.fromkeys(CLASSES, 3)])
def test_a_folder_is_evaluated_wholly_over_the_classes_of_the_checkpoint(
    counts: dict[str, int], checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = drawn(tmp_path / "data", **counts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = evaluate(checkpoint, data, device="cpu")
    assert scores.classes == CLASSES
    by_hand(scores, data, checkpoint)
    assert caplog.messages == []
    assert (checkpoint.parent.parent / "packs").is_dir()


def test_classes_in_another_order_are_matched_by_name(checkpoint: Path, tmp_path: Path) -> None:
    data = drawn(tmp_path / "data", tulip=4, daisy=3, lily=2)
    (tmp_path / "data/classes.txt").write_text("tulip\nlily\ndaisy\n")
    files = sorted(data.rglob("*.jpg"))
    lines = [f"{path.relative_to(data)} {path.parent.name}\n" for path in files]
    (tmp_path / "list.txt").write_text("".join(lines))
    manifest = pack(data, tmp_path / "out", labels=tmp_path / "list.txt", as_split="test")
    assert manifest.classes == ("tulip", "lily", "daisy")
    scores = evaluate(checkpoint, tmp_path / "out", device="cpu")
    by_hand(scores, data, checkpoint)
    for path, label in zip(scores.paths, scores.labels, strict=True):
        assert CLASSES[label] == Path(path).parent.name


def test_a_class_that_the_checkpoint_does_not_know_is_named(checkpoint: Path, tmp_path: Path) -> None:
    pack(drawn(tmp_path / "data", orchid=2, rose=2, violet=2), tmp_path / "out", as_split="test")
    what = (
        f"{tmp_path / 'out'}: has the classes orchid, violet, which the checkpoint was not trained on; pass shards or "
    )
    with pytest.raises(
        CheckpointError, match=exactly(f"{what}images with some or all of its classes: {', '.join(CLASSES)}.")
    ):
        evaluate(checkpoint, tmp_path / "out", device="cpu")


@pytest.mark.parametrize("archive", [False, True])
def test_a_folder_with_a_class_that_the_checkpoint_does_not_know_is_refused_before_packing(
    archive: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, packs = drawn(tmp_path / "data", lilies=2, rose=2), checkpoint.parent.parent / "packs"
    data = Path(shutil.make_archive(str(data), "zip", data)) if archive else data
    monkeypatch.setattr("fastflower.packing.packer.load_or_make_plan", None)
    before = sorted(packs.glob("*"))
    what = (
        f"{data}: has the class lilies, which the checkpoint was not trained on; pass shards or images with some or all"
    )
    with pytest.raises(CheckpointError, match=exactly(f"{what} of its classes: {', '.join(CLASSES)}.")):
        evaluate(checkpoint, data, device="cpu")
    assert sorted(packs.glob("*")) == before


def test_absent_classes_count_in_the_macro_f1_only_if_they_are_predicted() -> None:
    certain = np.log(np.eye(4, dtype=np.float32)[[0, 0, 1, 2]] * 0.97 + 0.01)
    scores = score(CLASSES, np.array([0, 0, 1, 1]), certain)
    assert scores.support.tolist() == [2, 2, 0, 0]
    # F1 of daisy 1, lily 2 / (2 + 1), rose 0 because one lily is taken for it; tulip does not count.
    assert scores.macro_f1 == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert np.isnan(scores.recall).tolist() == [False, False, True, True]
    assert np.isnan(scores.precision).tolist() == [False, False, False, True]


def divided(root: Path, *splits: str) -> Path:
    for number, split in enumerate(splits):
        drawn(root / split, **dict.fromkeys(CLASSES, number + 1))
    return root


@pytest.mark.parametrize(
    ("splits", "samples"), [(("train", "val", "test"), 8), (("train", "val"), 8), (("test",), 4), (("val",), 4)]
)
def test_the_default_split_is_val_or_the_only_one(
    splits: tuple[str, ...], samples: int, checkpoint: Path, tmp_path: Path
) -> None:
    assert evaluate(checkpoint, divided(tmp_path / "data", *splits), device="cpu").num_samples == samples


def test_several_splits_without_val_need_a_choice(checkpoint: Path, tmp_path: Path) -> None:
    data, out = divided(tmp_path / "data", "train", "test"), tmp_path / "out"
    pack(data, out)
    rule = f"split must be one of train, test, got None: {out} has no val split."
    with pytest.raises(ArgumentError, match=exactly(rule)):
        evaluate(checkpoint, out, device="cpu")
    assert evaluate(checkpoint, out, split="test", device="cpu").num_samples == 8
    with pytest.raises(ShardError, match=exactly(f"{out}: has no samples in split 'val'; choose from train, test.")):
        evaluate(checkpoint, out, split="val", device="cpu")


def test_the_val_split_that_train_drew_is_evaluated(
    flowers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores are those of the report, and `evaluate` packs nothing anew."""
    shutil.copytree(flowers, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    report = train("data", replace(RECIPE, epochs=1), device="cpu")
    assert report.folder == Path("runs/resnet18")
    assert report.scores is not None
    scores = evaluate(report.checkpoint, "data", device="cpu")
    assert scores.confusion.tolist() == report.scores.confusion.tolist()
    (used,) = Path("runs/packs").iterdir()
    assert caplog.messages == []
    (tmp_path / "data/rose").rename(tmp_path / "rose")
    scores = evaluate(report.checkpoint, "data", device="cpu")
    assert (scores.num_samples, scores.support.tolist()) == (120, [30, 30, 0, 30, 30])
    seen = sum(not path.startswith("rose/") for path in paths(used, "train"))
    what = f"was trained on {seen} of these 120 images, so the scores say little about new images"
    assert caplog.messages == [f"{report.checkpoint}: {what}"]
    assert used in Path("runs/packs").iterdir()


@pytest.fixture(scope="module")
def trained(narrow: None, flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001  (is set up first)
    """A folder with data and runs/a, which was trained on data."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(flowers, home / "data")
    train(home / "data", replace(RECIPE, epochs=1), out=home / "runs/a", device="cpu")
    return home


def linked(place: str, name: str) -> str:
    Path(name).symlink_to(place)
    return name


SPELLINGS: dict[str, Callable[[], str | Path | Checkpoint]] = {
    "the run": lambda: "runs/a",
    "the file": lambda: "runs/a/checkpoint-best.pt",
    "the working folder": lambda: os.chdir("runs/a") or ".",
    "absolute": lambda: Path("runs/a").absolute(),
    "up and down": lambda: "runs/../runs/a/checkpoint-best.pt",
    "a link to the file": lambda: linked("runs/a/checkpoint-best.pt", "best.pt"),
    "a link to the run": lambda: linked("runs/a", "link"),
    "a copy": lambda: shutil.copy("runs/a/checkpoint-best.pt", "model.pt"),
    "an object from a run": lambda: Checkpoint.load("runs/a"),
    "an object from a file": lambda: Checkpoint.load("runs/a/checkpoint-best.pt"),
    "an object without a file": lambda: replace(Checkpoint.load("runs/a"), file=None),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_way_to_name_a_checkpoint_gives_the_same_scores(
    spelling: str, trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The law: the scores are those on the val split that `train` drew, and nothing is packed anew."""
    monkeypatch.chdir(trained)
    scores = evaluate(SPELLINGS[spelling](), trained / "data", device="cpu")
    assert scores.num_samples == 30
    assert scores.confusion.tolist() == evaluate(trained / "runs/a", trained / "data").confusion.tolist()
    assert len(list((trained / "runs/packs").iterdir())) == 1
    assert not any((place / "packs").exists() for place in (trained, trained.parent))
    assert caplog.messages == []


def test_images_of_the_training_in_another_folder_are_counted(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pack_,) = (trained / "runs/packs").iterdir()
    mixed, known, new = (
        drawn(tmp_path / "mixed", rose=3),
        *(sorted(paths(pack_, split))[:4] for split in ("train", "val")),
    )
    for number, path in enumerate([*known, *new]):
        (mixed / Path(path).parent).mkdir(exist_ok=True)
        shutil.copy(trained / "data" / path, mixed / Path(path).with_stem(f"copy{number}"))
    assert evaluate(trained / "runs/a", mixed, device="cpu").num_samples == 11
    what = "was trained on 4 of these 11 images, so the scores say little about new images"
    assert caplog.messages == [f"{trained / 'runs/a'}: {what}"]


def test_a_checkpoint_whose_shards_are_not_found_says_so(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained / "runs/a/checkpoint-best.pt", "model.pt")
    for checkpoint, name in (("model.pt", "model.pt"), (Checkpoint.load("model.pt"), "checkpoint")):
        caplog.clear()
        assert evaluate(checkpoint, trained / "data", device="cpu").num_samples == 150
        what = "nothing here tells which images it was trained on; if they are among these, the scores are too good"
        assert caplog.messages == [f"{name}: {what}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "runs"]


def test_the_shards_that_the_run_records_tell_what_it_was_trained_on(
    flowers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack(flowers, tmp_path / "shards")
    report = train(tmp_path / "shards", replace(RECIPE, epochs=1), out=tmp_path / "runs/a", device="cpu")
    caplog.clear()
    evaluate(report.checkpoint, flowers, device="cpu")
    what = "was trained on 120 of these 150 images, so the scores say little about new images"
    assert caplog.messages == [f"{report.checkpoint}: {what}"]


def test_a_train_split_that_was_not_asked_for_is_remarked(
    flowers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack(flowers, tmp_path / "out", val_fraction=0.0)
    report = train(tmp_path / "out", replace(RECIPE, epochs=1), out=tmp_path / "run", device="cpu")
    caplog.clear()
    evaluate(report.checkpoint, tmp_path / "out", device="cpu", split="train")
    assert caplog.messages == []
    evaluate(report.checkpoint, tmp_path / "out", device="cpu")
    what = "was trained on these images, which are the only split, so the scores say little about new images"
    assert caplog.messages == [f"{report.checkpoint}: {what}"]


def test_the_command_prints_each_class(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = drawn(tmp_path / "data", rose=2, tulip=1)
    assert main(["evaluate", str(checkpoint), str(data), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("test: 3 images, accuracy ")
    assert [line.rpartition(", ")[2] for line in lines[1:]] == ["0 images", "0 images", "2 images", "1 images"]
    assert lines[1].endswith("recall undefined, 0 images")
