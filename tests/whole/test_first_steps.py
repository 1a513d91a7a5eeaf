"""What beginners do and expect: small images, small folders, wrong paths, other classes."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packs import draw_image, drawn, exactly
from torchvision import transforms
from training_runs import RECIPE

from fastflower import Augment, Checkpoint, Manifest, Recipe, pack, train
from fastflower.cli import main
from fastflower.errors import ArgumentError, CheckpointError, ShardError
from fastflower.models.backbone import build
from fastflower.models.inference import view_of
from fastflower.recipes.presets import scratch
from fastflower.shards.verification import verify

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (64, 73), (128, 146), ((96, 128), 146), ((128, 96), 146)])
def test_the_validation_view_follows_the_size(size: Any, resized: int) -> None:
    assert Augment(size=size).resized == replace(scratch().augment, size=size).resized == resized
    view = view_of(replace(scratch(), augment=replace(scratch().augment, size=size)))
    assert (view.output_size, view.resized) == (Augment(size=size).output_size, resized)
    assert not view.uncovers
    assert Augment(size=size, resize=300).resized == 300
    sizes = [[300, 400], [500, 350]]
    drawn_by_default, drawn_as_said = (
        Augment(size=size, resize=side).draw(0, 0, [0, 1], sizes) for side in (None, resized)
    )
    assert (drawn_by_default.roi == drawn_as_said.roi).all()


def test_the_validation_view_follows_a_torchvision_crop_and_each_epochs_size() -> None:
    augment = Augment.from_torchvision(transforms.RandomResizedCrop(64))
    assert augment.resized == 73
    recipe = Recipe(weights=None, augment=augment, epochs=2, sizes=(32, 64))
    assert [recipe.augment_at(epoch).resized for epoch in range(2)] == [37, 73]
    recipe = replace(recipe, augment=replace(augment, resize=(80, 100)))
    assert [recipe.augment_at(epoch).resized for epoch in range(2)] == [(40, 50), (80, 100)]


def test_skipped_files_and_classes_without_validation_images_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = drawn(tmp_path / "data", a=8, b=1)
    (folder / "a/bad.jpg").write_text("no image")
    draw_image(3).save(folder / "stray.jpg")
    (folder / "notes.txt").touch()
    manifest = pack(folder, tmp_path / "out")
    assert [(item["path"], item["reason"]) for item in manifest.skipped] == [
        ("a/bad.jpg", "is plain text, named .jpg"),
        ("stray.jpg", "is not in a class folder"),
    ]
    assert caplog.messages == [
        f"{tmp_path / 'out'}: skipped 2 files; `skipped` in manifest.json lists all:"
        "\n  is plain text, named .jpg: a/bad.jpg\n  is not in a class folder: stray.jpg",
        f"{tmp_path / 'out'}: the val split has no images of 'b': these classes will not be evaluated",
    ]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert verify(tmp_path / "out") == []


def test_stray_files_in_splits_are_listed(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "data", **{"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    for name in ("1.jpg", "train/2.jpg", "val/3.png"):
        draw_image(3).save(folder / name)
    assert [item["path"] for item in pack(folder, tmp_path / "out").skipped] == ["1.jpg", "train/2.jpg", "val/3.png"]


NAME = "pass a folder that pack wrote (fastflower pack FOLDER)."


def unfinished(folder: Path) -> None:
    (folder / ".packing").mkdir(parents=True)
    (folder / ".packing" / "plan.json").touch()


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda _: None, f"does not exist; {NAME}"),
        (Path.mkdir, f"has no manifest.json, so it is not a finished pack; {NAME}"),
        (unfinished, "is an unfinished pack; run the same fastflower pack command again."),
    ],
)
def test_folders_that_are_no_pack_get_different_messages(
    tmp_path: Path, make: Callable[[Path], object], what: str
) -> None:
    make(tmp_path / "out")
    with pytest.raises(ShardError, match=exactly(f"{tmp_path / 'out'}: {what}")):
        Manifest.load(tmp_path / "out")


def test_verify_takes_no_address(shards: Path) -> None:
    rule = "shards must be a local folder, not a URL (download the shards first), got 's3://bucket/a'."
    with pytest.raises(ArgumentError, match=exactly(rule)):
        verify("s3://bucket/a")
    assert verify(f"file://{shards}") == []


def test_the_head_of_a_checkpoint_with_other_classes_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("resnet18", 5, weights=None)
    path = tmp_path / "checkpoint-best.pt"
    Checkpoint(recipe=Recipe(weights=None), classes=tuple("abcde"), model=model.state_dict(), epoch=1).save(path)
    caplog.set_level(logging.INFO, "fastflower")
    kept, new = (build("resnet18", 5, weights=str(path), classes=classes) for classes in ("abcde", "abced"))
    assert torch.equal(kept.fc.weight, model.fc.weight)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    assert not torch.equal(new.fc.weight, model.fc.weight)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    assert torch.equal(new.conv1.weight, model.conv1.weight)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    assert [message.rpartition("; ")[2] for message in caplog.messages] == [
        "kept its head for 5 classes",
        "replaced its head for 5 classes with a new one for 5 other classes",
    ]


def test_scores_of_a_class_without_validation_images_are_undefined_in_the_report(tmp_path: Path) -> None:
    pack(drawn(tmp_path / "data", a=8, b=1), tmp_path / "out")
    recipe = replace(RECIPE, epochs=1, batch_size=4)
    report = train(tmp_path / "out", recipe, out=tmp_path / "run", device="cpu")
    text = (report.folder / "report.html").read_text()
    assert "undefined" in text
    assert "nan" not in text


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fastflower 0.")


def test_resize_none_resumes_a_run_with_the_equal_explicit_value(shards: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=1, augment=replace(RECIPE.augment, resize=None))
    said = replace(recipe, augment=replace(recipe.augment, resize=37))
    train(shards, said, out=tmp_path / "run", device="cpu")
    assert len(train(shards, recipe, out=tmp_path / "run", resume=True, device="cpu").history) == 1
    other = replace(recipe, augment=replace(recipe.augment, resize=40))
    with pytest.raises(CheckpointError, match=r"was trained with augment\.resize 37 \(now 40\); resume with that"):
        train(shards, other, out=tmp_path / "run", resume=True, device="cpu")


def test_resuming_names_the_differing_option(shards: Path, tmp_path: Path) -> None:
    """The difference here is the window: shards at a URL have one, a folder has none."""
    train(shards, replace(RECIPE, epochs=1), out=tmp_path, device="cpu")
    checkpoint = Checkpoint.load(tmp_path / "checkpoint-last.pt")
    checkpoint.feeding["window"] = 8
    checkpoint.save(tmp_path / "checkpoint-last.pt")
    remedy = "resume with the same shards, split, fold, seed and batch_size"
    rule = f"load_state_dict: the state has window 8, but this loader has None; {remedy}"
    with pytest.raises(
        CheckpointError, match=re.escape(f"{tmp_path / 'checkpoint-last.pt'}: {rule} * world_size.") + "$"
    ):
        train(shards, replace(RECIPE, epochs=1), out=tmp_path, resume=True, device="cpu")


@pytest.mark.parametrize("together", [True, False])
def test_resuming_on_another_number_of_ranks_warns(
    together: bool, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = replace(RECIPE, epochs=1)
    train(shards, recipe, out=tmp_path, device="cpu")
    checkpoint = Checkpoint.load(tmp_path / "checkpoint-last.pt")
    recipe = replace(recipe, epochs=2, sync_batchnorm=together)  # an epoch is left
    checkpoint.environment["ranks"] = "2"
    replace(checkpoint, recipe=recipe).save(tmp_path / "checkpoint-last.pt")
    caplog.clear()
    train(shards, recipe, out=tmp_path, resume=True, device="cpu")
    parts = (
        "" if together else ", or more if batch norms are trained, because they see only their rank's part of a batch"
    )
    told = f"{tmp_path / 'checkpoint-last.pt'}: ranks changed from 2 to 1; results will differ in the last bits{parts}"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [told]


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("arguments", [["verify"], ["--version"]])
def test_a_closed_output_causes_no_traceback(arguments: list[str], closed: bool, tmp_path: Path) -> None:
    """A closed output causes no traceback, even if shards are damaged or the output was closed from the start."""
    pack(drawn(tmp_path / "data", a=2, b=2), tmp_path / "out")
    (tmp_path / "out" / "_info.json").unlink()
    command = [sys.executable, "-c", "import sys; from fastflower.cli import main; sys.exit(main())", *arguments]
    command += [str(tmp_path / "out")] * (arguments == ["verify"])
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        before = (lambda: os.close(1)) if closed else None
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, preexec_fn=before, check=False)
    assert done.returncode == (141 if not closed else 1 if arguments == ["verify"] else 0)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
