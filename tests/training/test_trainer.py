"""`train`, `evaluate` and `predict` together."""

import csv
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import timeless

from fastflower import Augment, Checkpoint, Recipe, Report, evaluate, pack, predict, train
from fastflower.devices import precision_of
from fastflower.errors import ArgumentError, CheckpointError, DeviceError, FolderError, SampleError
from fastflower.loading.loader import Loader
from fastflower.models.backbone import build
from fastflower.models.inference import view_of

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

TINY = Recipe(
    weights=None,
    augment=Augment(size=48, resize=54, crop=(0.5, 1.0), flip=0.5),
    epochs=3,
    batch_size=24,
    lr=0.005,
    schedule="one_cycle",
    precision="float32",
)


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return train(shards, TINY, out=tmp_path_factory.mktemp("runs") / "tiny", device="cpu")


def test_a_run_writes_the_documented_files(run: Report) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        "history.csv",
        "run.json",
        "checkpoint-best.pt",
        "checkpoint-last.pt",
        "report.html",
        "curves.png",
        "confusion.png",
        "tensorboard",
    }
    with (run.folder / "history.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == run.history
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(0 <= row["wait_seconds"] <= row["train_seconds"] for row in rows)
    recipe = Checkpoint.load(run.checkpoint).recipe
    samples = json.loads((run.folder / "run.json").read_text())["data"]["samples"]["train"]
    assert {row["images"] for row in rows} == {samples - samples % recipe.batch_size}


def test_training_learns(shards: Path, tmp_path: Path) -> None:
    """Chance is 20%; a network that sees the same 120 views ten times knows most of them."""
    recipe = replace(TINY, augment=Augment(size=32, resize=36), epochs=10, lr=0.01, schedule="cosine")
    assert train(shards, recipe, out=tmp_path / "run", device="cpu").history[-1]["train_accuracy"] > 0.6


def test_the_same_seed_gives_the_same_history_and_another_does_not(run: Report, shards: Path, tmp_path: Path) -> None:
    assert timeless(train(shards, TINY, out=tmp_path / "again", device="cpu").history) == timeless(run.history)
    other = train(shards, replace(TINY, seed=1, epochs=1), out=tmp_path / "other", device="cpu")
    assert other.history[0]["train_loss"] != run.history[0]["train_loss"]


def test_training_does_not_change_the_callers_random_state(shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    train(shards, replace(TINY, epochs=1), out=tmp_path / "run", device="cpu")
    assert torch.equal(torch.rand(3), wanted)


def test_the_best_checkpoint_scores_what_the_history_says(run: Report, shards: Path) -> None:
    scores = evaluate(run.checkpoint, shards, device="cpu")
    best = max(run.history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert best == run.history[run.best_epoch - 1]
    assert scores.accuracy == best["val_accuracy"]
    assert scores.loss == pytest.approx(best["val_loss"], rel=1e-5)
    assert run.scores is not None
    assert np.array_equal(run.scores.confusion, scores.confusion)
    assert scores.num_samples == 30


def test_evaluation_agrees_with_a_plain_loop(run: Report, shards: Path) -> None:
    checkpoint = Checkpoint.load(run.checkpoint)
    network = checkpoint.network()
    correct = 0
    with torch.inference_mode():
        for images, labels, _ in Loader(shards, "val", augment=view_of(TINY), batch_size=7, device="cpu"):
            correct += int((network(images).argmax(1) == labels).sum())
    assert evaluate(checkpoint, shards, device="cpu").accuracy == correct / 30


def test_evaluation_accepts_the_training_split(run: Report, shards: Path) -> None:
    assert evaluate(run.checkpoint, shards, split="train", device="cpu").num_samples == 120


def test_prediction_agrees_with_evaluation(run: Report, shards: Path, flowers: Path) -> None:
    loader = Loader(shards, "val", device="cpu")
    paths = [flowers / loader.path_of(index) for index in range(30)]
    found = predict(run.checkpoint, paths, device="cpu")
    scores = evaluate(run.checkpoint, shards, device="cpu")
    assert [prediction.path for prediction in found] == paths
    table = np.array([[prediction.probabilities[name] for name in scores.classes] for prediction in found])
    assert np.allclose(table, scores.probabilities, atol=1e-5)
    assert all(prediction.probability == max(prediction.probabilities.values()) for prediction in found)


def test_prediction_accepts_a_file_or_a_folder(run: Report, flowers: Path) -> None:
    one = next((flowers / "rose").iterdir())
    assert [prediction.path for prediction in predict(run.checkpoint, one, device="cpu")] == [one]
    assert len(predict(run.checkpoint, flowers / "rose", device="cpu")) == 30


def test_prediction_accepts_what_pack_accepts(run: Report, flowers: Path, tmp_path: Path) -> None:
    """This includes linked folders and any image format under a known suffix, but not folders and pipes with such a name."""
    images = sorted((flowers / "rose").iterdir())[:3]
    (tmp_path / "all/sub.jpg").mkdir(parents=True)
    (tmp_path / "linked").mkdir()
    (tmp_path / "all/more").symlink_to(tmp_path / "linked")
    os.mkfifo(tmp_path / "all/pipe.jpg")
    shutil.copy(images[0], tmp_path / "all/1.jpg")
    Image.open(images[1]).save(tmp_path / "linked/2.png", format="TGA")
    found = predict(run.checkpoint, tmp_path / "all", device="cpu")
    assert [prediction.path for prediction in found] == [tmp_path / "all/1.jpg", tmp_path / "all/more/2.png"]
    expected = predict(run.checkpoint, images[:2], device="cpu")
    assert [prediction.class_name for prediction in found] == [prediction.class_name for prediction in expected]
    assert [prediction.probability for prediction in found] == pytest.approx(
        [one.probability for one in expected], abs=0.02
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_prediction_has_the_pixel_limit_of_pack(run: Report, tmp_path: Path) -> None:
    Image.new("1", (14000, 14000)).save(tmp_path / "large.png")
    with pytest.raises(SampleError, match=r"large\.png: .* limit of 178956970;"):
        predict(run.checkpoint, tmp_path / "large.png", device="cpu")


def test_prediction_names_a_bad_file(run: Report, flowers: Path, tmp_path: Path) -> None:
    note, half = tmp_path / "note.jpg", tmp_path / "half.jpg"
    note.write_text("not an image")
    half.write_bytes(next((flowers / "rose").iterdir()).read_bytes()[:3000])
    remedy = r"; pass image files or folders, or on_bad='skip' \(--on-bad skip\)\.$"
    with pytest.raises(SampleError, match=r"note\.jpg: is plain text, named \.jpg" + remedy):
        predict(run.checkpoint, note)
    with pytest.raises(SampleError, match=r"half\.jpg: .*truncated.*" + remedy):
        predict(run.checkpoint, half)
    with pytest.raises(SampleError, match=r"gone\.jpg: No such file or directory" + remedy):
        predict(run.checkpoint, tmp_path / "gone.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SampleError, match=r"empty: holds no images .*; pass image files or another folder"):
        predict(run.checkpoint, tmp_path / "empty")
    rule = "on_bad must be 'fail' or 'skip', got 'drop'"
    with pytest.raises(ArgumentError, match=rule):
        predict(run.checkpoint, note, on_bad="drop")  # pyright: ignore[reportArgumentType]


def test_prediction_skips_bad_files_and_names_each(
    run: Report, flowers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = sorted((flowers / "rose").iterdir())
    bad = [tmp_path / f"{number}.jpg" for number in range(33)]  # more than a batch
    for path in bad[1:]:
        path.write_text("not an image")
    found = predict(run.checkpoint, [*bad, good[0], bad[1], good[1], good[0]], on_bad="skip", device="cpu")
    assert found == predict(run.checkpoint, [good[0], good[1], good[0]], device="cpu")
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    expected = [f"skipped {path}: is plain text, named .jpg" for path in [*bad[1:], bad[1]]]
    assert sorted(told) == sorted(
        [f"skipped {bad[0]}: No such file or directory", *expected]
    )  # threads log in any order
    assert predict(run.checkpoint, bad, on_bad="skip", device="cpu") == []


def test_prediction_logs_images_that_decode_with_warnings(
    run: Report, flowers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    data = next((flowers / "rose").iterdir()).read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) * 2 // 3] + b"\xff\xd9")
    assert len(predict(run.checkpoint, tmp_path, device="cpu")) == 1
    assert caplog.messages == [f"{tmp_path / 'half.jpg'}: Corrupt JPEG data: premature end of data segment"]
    assert "JPEG" not in capfd.readouterr().err


def test_predictions_are_written_as_csv(run: Report, flowers: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b'a,"\xff.jpg')
    shutil.copy(flowers / "rose/0001.jpg", odd)
    found = predict(run.checkpoint, [flowers / "tulip", odd], out=tmp_path / "found.csv", device="cpu")
    with (tmp_path / "found.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["path", "class", "probability", *Checkpoint.load(run.checkpoint).classes]
    assert rows[-1][0] == str(odd).replace("\udcff", "\\udcff")
    for row, one in zip(rows, found, strict=True):
        assert row[:2] == [str(one.path).replace("\udcff", "\\udcff"), one.class_name]
        assert list(map(float, row[2:])) == [one.probability, *one.probabilities.values()]


@pytest.mark.parametrize("out", ["", "no/found.csv"])
def test_a_csv_file_that_cannot_be_written_is_refused_before_prediction(run: Report, tmp_path: Path, out: str) -> None:
    rule = f"out: {tmp_path / out} cannot be written; choose a file in an existing folder."
    with pytest.raises(ArgumentError, match=re.escape(rule)):
        predict(run.checkpoint, tmp_path / "not.jpg", out=tmp_path / out)


def test_shards_without_a_validation_split_can_be_trained_on(flowers: Path, tmp_path: Path) -> None:
    pack(flowers, tmp_path / "shards", val_fraction=0)
    report = train(tmp_path / "shards", replace(TINY, epochs=2), out=tmp_path / "run", device="cpu")
    assert report.scores is None
    assert report.best_epoch == 2
    assert "no validation split" in (report.folder / "report.html").read_text()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_stays_close(shards: Path, tmp_path: Path, precision: str) -> None:
    tiny = replace(TINY, augment=replace(TINY.augment, size=32, resize=36), epochs=1)
    recipe = replace(tiny, precision=precision)  # pyright: ignore[reportArgumentType]
    low = train(shards, recipe, out=tmp_path / "run", device="cpu")
    high = train(shards, tiny, out=tmp_path / "high", device="cpu")
    assert low.history[0]["train_loss"] == pytest.approx(high.history[0]["train_loss"], rel=0.05)


def test_auto_precision_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    if (path := Path("/proc/cpuinfo")).exists():  # Linux's flag names; float32 if oneDNN would emulate bfloat16
        fast = {"avx512_bf16", "amx_bf16", "bf16"} & set(path.read_text().split())
        assert precision_of("auto", cpu) == (torch.bfloat16 if fast else torch.float32)
    for name, expected in (("avx512_bf16", torch.bfloat16), ("bf16", torch.bfloat16), ("avx512_bw", torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"architecture": "any", name: True})
        assert precision_of("auto", cpu) == expected
    assert precision_of("bfloat16", cpu) == torch.bfloat16
    for ampere, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda found=ampere, **_: found)
        assert precision_of("auto", cuda) == expected
        assert precision_of("float32", cuda) == torch.float32


def test_a_frozen_stage_does_not_change(shards: Path, tmp_path: Path) -> None:
    start = build("resnet18", 5, weights=None).state_dict()
    torch.save(start, tmp_path / "weights.pth")
    recipe = replace(TINY, epochs=1, freeze=1, weights=str(tmp_path / "weights.pth"))
    report = train(shards, recipe, out=tmp_path / "run", device="cpu")
    trained = Checkpoint.load(report.checkpoint).model
    frozen = [name for name in start if name.startswith(("conv1", "bn1", "layer1"))]
    assert all(torch.equal(start[name], trained[name]) for name in frozen)
    assert not torch.equal(start["layer2.0.conv1.weight"], trained["layer2.0.conv1.weight"])


def test_out_folders_are_new_or_refused(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = replace(TINY, epochs=1)
    assert train(shards, recipe, device="cpu").folder == Path("runs/resnet18")
    assert train(shards, recipe, device="cpu").folder == Path("runs/resnet18-2")
    with pytest.raises(
        CheckpointError,
        match=r"resnet18: already holds a run\. To train on from its weights:\n  train\(.*\nTo start another:\n  train\(.*-3'",
    ):
        train(shards, recipe, out="runs/resnet18", device="cpu")
    with pytest.raises(ArgumentError, match="resume: pass the run's folder as out"):
        train(shards, recipe, resume=True, device="cpu")
    other = replace(recipe, lr=1.0, augment=replace(recipe.augment, flip=0.25))
    with pytest.raises(
        CheckpointError,
        match=r"was trained with lr 0\.005 \(now 1\.0\), augment\.flip 0\.5 \(now 0\.25\); resume with that "
        r"recipe, or pass none\. To train on from its weights:\n  train\(",
    ):
        train(shards, other, out="runs/resnet18", resume=True, device="cpu")


def test_resuming_on_fewer_classes_is_refused_but_evaluating_is_not(
    shards: Path, flowers: Path, tmp_path: Path
) -> None:
    train(shards, replace(TINY, epochs=1), out=tmp_path / "run", device="cpu")
    other = tmp_path / "other"
    for name in ("rose", "tulip"):
        (other / name).symlink_to(flowers / name) if other.exists() else (
            other.mkdir(),
            (other / name).symlink_to(flowers / name),
        )
    pack(other, tmp_path / "shards")
    with pytest.raises(
        CheckpointError,
        match=r"was trained on classes daisy, .*, tulip, but these shards have rose, tulip; resume with the original",
    ):
        train(tmp_path / "shards", replace(TINY, epochs=1), out=tmp_path / "run", resume=True, device="cpu")
    assert evaluate(tmp_path / "run" / "checkpoint-best.pt", tmp_path / "shards", device="cpu").num_samples == 12


def test_an_unknown_backbone_or_weights_name_is_refused_before_images_are_packed(flowers: Path, tmp_path: Path) -> None:
    known = r"the weights for resnet18 are IMAGENET1K_V1; pass one of these, a path or None\."
    for recipe, text in (
        (replace(TINY, backbone="resnet51"), r"backbone must be a classifier .*, got 'resnet51'\. Did you mean resnet"),
        (replace(TINY, weights="BEST"), rf"weights='BEST': {known}"),
        (replace(TINY, weights="ResNet34_Weights.DEFAULT"), rf"weights='ResNet34_Weights\.DEFAULT': {known}"),
    ):
        with pytest.raises((ArgumentError, CheckpointError), match=f"^{text}"):
            train(flowers, recipe, out=tmp_path / "run", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_when_training_cannot_begin(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        ArgumentError, match=r"^backbone must be a classifier .*, got 'resnet19'\. Did you mean resnet18\?"
    ):
        train(shards, replace(TINY, backbone="resnet19"), out=out, device="cpu")
    with pytest.raises(
        ArgumentError,
        match=r"recipe must be a Recipe, or the name of one, for example 'scratch', got 'scratsh'\.",
    ):
        train(shards, "scratsh", out=out, device="cpu")
    with pytest.raises(ArgumentError, match="device must be cpu, cuda or cuda:NUMBER, got 'gpu'; omit it to use CUDA"):
        train(shards, TINY, out=out, device="gpu")
    (tmp_path / "file").touch()
    message = rf"out: cannot create {tmp_path}/file/run: {tmp_path}/file is not a writable folder; pass a different folder as out"
    with pytest.raises(ArgumentError, match=message):
        train(shards, TINY, out=tmp_path / "file" / "run", device="cpu")
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: does not exist; check the path"):
        train(shards, replace(TINY, weights=str(tmp_path / "nowhere.pth")), out=out, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="has no CUDA; omit device to use the CPU"):
            train(shards, TINY, out=out, device="cuda")
    with pytest.raises(FolderError, match="does not exist; pass a folder that contains one folder of images per class"):
        pack(tmp_path / "missing", out)
    assert not out.exists()


def test_evaluate_refuses_other_files(shards: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.pt"
    text.write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.pt: was not written by torch\.save, is truncated"):
        evaluate(text, shards)
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt: is not a fastflower checkpoint; pass a checkpoint-best\.pt"):
        evaluate(tmp_path / "other.pt", shards)


def test_a_compiled_network_trains_like_an_eager_one(
    run: Report, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses the eager backend of torch.compile, because generating C++ takes a minute."""
    compile_ = torch.compile
    modes: list[str | None] = []

    def traced(model: Any, mode: str | None = None) -> Any:
        modes.append(mode)
        return compile_(model, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    found = train(shards, replace(TINY, compile=True), out=tmp_path / "run", device="cpu")
    assert modes == [None]
    for one, other in zip(timeless(found.history), timeless(run.history), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert evaluate(found.checkpoint, shards, device="cpu").accuracy == max(
        row["val_accuracy"] for row in found.history
    )


def test_a_run_resumes_only_on_its_own_shards(flowers: Path, shards: Path, tmp_path: Path) -> None:
    recipe = replace(TINY, epochs=1)
    train(shards, recipe, out=tmp_path / "run", device="cpu")
    pack(flowers, tmp_path / "others", seed=1)
    rule = r"checkpoint-last\.pt: was trained on other shards; resume with those\. To train on from its weights:"
    with pytest.raises(CheckpointError, match=rule):
        train(tmp_path / "others", recipe, out=tmp_path / "run", resume=True, device="cpu")
