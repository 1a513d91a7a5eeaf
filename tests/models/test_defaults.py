"""What a recipe leaves out is filled from its weights and backbone, once, and stays as it was in a checkpoint."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models  # pyright: ignore[reportMissingTypeStubs]

from fastflower import Augment, Recipe, train
from fastflower.cli import main
from fastflower.errors import CheckpointError
from fastflower.models.backbone import skeleton_of
from fastflower.models.checkpoint import Checkpoint
from fastflower.models.defaults import brief, complete
from fastflower.models.stages import stages_of
from fastflower.recipes.presets import PRESETS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


def view(recipe: Recipe) -> tuple[object, ...]:
    augment = recipe.augment
    return augment.size, augment.resize, augment.mean, augment.std


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_v2_s", "inception_v3", "vit_b_16", "swin_v2_t"])
def test_a_view_that_is_left_out_is_that_of_torchvisions_weights(name: str) -> None:
    transform: Any = models.get_model_weights(name).DEFAULT.transforms()  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]
    own = (*transform.crop_size, *transform.resize_size, tuple(transform.mean), tuple(transform.std))
    assert view(complete(Recipe(backbone=name))) == own


def test_random_weights_and_files_of_others_keep_what_a_loader_has(tmp_path: Path) -> None:
    lone = (224, 256, MEAN, STD)
    assert view(complete(Recipe(backbone="efficientnet_v2_s", weights=None))) == lone
    torch.save(models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    assert view(complete(Recipe(backbone="resnet50", weights=str(tmp_path / "resnet50.pth")))) == lone
    assert view(complete(Recipe(backbone="resnet50_v1", weights=str(tmp_path / "resnet50.pth")))) == lone
    timms = Recipe(backbone="timm/vit_tiny_patch16_224", weights=str(tmp_path / "resnet50.pth"))
    assert view(complete(timms)) == (224, 248, HALF, HALF)


def test_what_is_given_stays(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastflower")
    given = Augment(size=96, resize=100, mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    recipe = Recipe(augment=given, freeze=1, sizes=(64, 96))
    assert complete(recipe) == recipe
    assert not caplog.records
    assert view(complete(replace(recipe, augment=Augment(mean=(0, 0, 0))))) == (224, 256, (0, 0, 0), STD)
    assert view(complete(replace(recipe, augment=Augment(size=256, resize="off"))))[:2] == (256, "off")


def test_a_given_size_has_the_resize_of_a_loader() -> None:
    recipe = Recipe(backbone="resnet50", weights="IMAGENET1K_V2")  # 224 of 232
    for size, resize in ((160, 183), ((96, 160), 183), (224, 256)):
        augment = Augment(size=size)
        assert view(complete(replace(recipe, augment=augment)))[:2] == (size, augment.resized) == (size, resize)
    assert complete(complete(recipe)) == complete(recipe)


TWELVE = [
    "resnet18", "resnet34", "resnet50", "resnet101", "densenet121", "vgg16", "mobilenet_v3_large", "efficientnet_b0",
    "efficientnet_v2_s", "convnext_tiny", "swin_t", "vit_b_16",
]  # fmt: skip


@pytest.mark.parametrize("name", TWELVE)
def test_finetune_suits_the_most_used_backbones(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastflower")
    recipe = complete(replace(PRESETS["finetune"](), backbone=name))
    network = skeleton_of(name).eval()  # shapes without their numbers
    assert recipe.freeze == len(stages_of(network)) // 2
    side = recipe.augment.output_size[0]
    grown = [round(share * side / 16) * 16 for share in (0.57, 0.57, 0.64, 0.71, 0.86)]
    assert list(recipe.sizes) == ([] if name == "vit_b_16" else grown)
    for epoch in range(recipe.epochs):
        with torch.inference_mode():
            images = torch.rand(1, 3, *recipe.augment_at(epoch).output_size, device="meta")
            assert network(images).shape == (1, 1000)
    (record,) = caplog.records
    assert f"the first {recipe.freeze} stages are frozen" in record.getMessage()


def test_finetune_is_what_it_was_for_its_own_backbone_and_a_file(tmp_path: Path) -> None:
    torch.save(models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    recipe = complete(replace(PRESETS["finetune"](), weights=str(tmp_path / "resnet50.pth")))
    assert (recipe.freeze, recipe.sizes) == (2, (128, 128, 144, 160, 192))
    assert view(recipe) == (224, 256, MEAN, STD)
    long = complete(replace(PRESETS["finetune-long"](), weights=str(tmp_path / "resnet50.pth")))
    assert (long.freeze, long.sizes) == (2, (160, 160, 192, 192, 224))
    assert complete(replace(PRESETS["finetune"](), weights=None)).freeze == 0


def test_the_reports_presets_are_complete() -> None:
    for name in [name for name in PRESETS if name.startswith("report-")]:
        assert complete(PRESETS[name]()) == PRESETS[name]().resolved, name
        assert view(complete(PRESETS[name]())) == (224, 256, MEAN, STD)


@pytest.mark.parametrize(
    "name", ["default", "finetune", "finetune-long", "report-a", "report-c-resnet50-frozen", "scratch"]
)
def test_a_complete_preset_is_repeated_as_the_preset(name: str) -> None:
    """So messages and run.json of a resumed run name no field that the user left out."""
    assert brief(complete(PRESETS[name]())) == PRESETS[name]()
    other = replace(PRESETS[name](), lr=0.123)
    assert brief(complete(other)) == other


def test_only_what_comes_from_the_weights_is_said_to(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastflower")
    complete(Recipe(augment=Augment(size=160)))
    (record,) = caplog.records
    assert record.getMessage() == "resnet18: ImageNet's mean and std, as its weights expect"


def test_what_was_filled_in_is_said_once(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "fastflower")
    name = "timm/vit_tiny_patch16_224"
    start = Recipe(backbone=name, weights=None, augment=Augment(size=32, mean=HALF, std=HALF), epochs=1, batch_size=24)
    first = train(shards, start, out=tmp_path / "first", device="cpu")
    caplog.clear()
    recipe = Recipe(
        backbone=name, weights=str(first.checkpoint), freeze=None, sizes=(0.5, 1.0), epochs=1, batch_size=24
    )
    report = train(shards, recipe, out=tmp_path / "second", device="cpu")
    told = [record.getMessage() for record in caplog.records if "as its weights expect" in record.getMessage()]
    assert told == [
        f"{name}: images of 32 pixels after a resize to 37, mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5], as its weights "
        f"expect; the first 2 stages are frozen; training sizes 32"
    ]
    trained = Checkpoint.load(report.checkpoint).recipe
    assert (trained.freeze, trained.sizes, view(trained)) == (2, (), (32, 37, HALF, HALF))
    caplog.clear()
    train(shards, recipe, out=tmp_path / "second", resume=True, device="cpu")  # is the same recipe
    assert not any("expect" in record.getMessage() for record in caplog.records)
    flags = ["--backbone", name, "--weights", str(first.checkpoint), "--images", "1", "--draws", "1"]
    assert main(["preview", str(shards), *flags, "--out", str(tmp_path / "seen.png")]) == 0
    assert "images of 32 pixels after a resize to 37" in capsys.readouterr().err + caplog.text


def test_an_old_checkpoint_keeps_its_view(shards: Path, tmp_path: Path) -> None:
    recipe = Recipe(weights=None, augment=Augment(size=32), sizes=(16, 32), epochs=1, batch_size=24)
    report = train(shards, recipe, out=tmp_path / "run", device="cpu")
    content = torch.load(report.folder / "checkpoint-last.pt", weights_only=True)
    content["recipe"]["augment"] |= {"resize": None}  # as older versions wrote it
    torch.save(content, report.folder / "checkpoint-last.pt")
    loaded = Checkpoint.load(report.folder / "checkpoint-last.pt").recipe
    assert view(loaded) == (32, 37, MEAN, STD)
    assert train(shards, recipe, out=report.folder, resume=True, device="cpu").history == report.history


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"weights": "IMAGENET1K_V7"},
            r"^weights='IMAGENET1K_V7': the weights for resnet18 are IMAGENET1K_V1; pass one",
        ),
        ({"weights": "none.pth"}, r"^none\.pth: does not exist; check the path\.$"),
        (
            {"weights": "lite0"},
            r"^weights='lite0': are for timm/tf_efficientnet_lite0, not for resnet18; pass --backbone timm/tf_efficientnet_lite0 "
            r"\(backbone='timm/tf_efficientnet_lite0'\)\.$",
        ),
    ],
)
def test_weights_that_do_not_exist_are_named_before_training(values: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        complete(Recipe(**values))  # pyright: ignore[reportArgumentType]
