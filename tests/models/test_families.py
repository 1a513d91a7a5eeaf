"""One network of each family: trained for a step, saved, loaded and used; image sizes, views and the table of backbones."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torchvision import models
from try_backbone import use

from fastflower import Augment, Checkpoint, Recipe, train
from fastflower.cli import main
from fastflower.errors import ArgumentError, CheckpointError
from fastflower.models import sizes
from fastflower.models.backbone import build, skeleton_of
from fastflower.models.catalog import at_hand, backbones
from fastflower.models.sizes import Sizes, require_sizes, sizes_of
from fastflower.models.views import View, view_of_weights

QUICK = {
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "timm/resnet10t": 32,
    "timm/vit_tiny_patch16_224": 32,
    "timm/deit_tiny_distilled_patch16_224": 32,
    "timm/convnext_atto": 32,
    "timm/mobilenetv3_small_050": 32,
}
LARGE = {"alexnet": 64, "maxvit_t": 224, "swin_v2_t": 64, "vgg11": 32, "vit_b_32": 224, "resnet50_v1": 64}
LARGE |= {
    "timm/swin_tiny_patch4_window7_224": 56,
    "timm/levit_128s": 224,
    "timm/nfnet_f0": 64,
    "timm/mixer_s16_224": 224,
}


@pytest.mark.parametrize(("name", "side"), QUICK.items())
def test_a_network_trains_and_is_saved_loaded_and_used(name: str, side: int, tmp_path: Path) -> None:
    use(name, side, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "side"), LARGE.items())
def test_a_large_network_trains_and_is_saved_loaded_and_used(name: str, side: int, tmp_path: Path) -> None:
    use(name, side, tmp_path)


@pytest.mark.parametrize(
    "name", ["alexnet", "densenet121", "googlenet", "inception_v3", "resnet18", "squeezenet1_1", "vgg11"]
)
def test_the_least_size_is_torchvisions(name: str) -> None:
    weights: Any = models.get_model_weights(name)
    assert sizes_of(name) == Sizes(weights.DEFAULT.meta["min_size"][0])


def test_networks_for_one_size_and_for_multiples_are_recognized() -> None:
    assert sizes_of("vit_h_14") == Sizes(224, 224)
    assert sizes_of("maxvit_t") == Sizes(224, 224)
    assert sizes_of("timm/maxvit_tiny_tf_224") == Sizes(224, step=224)
    assert sizes_of("timm/vit_small_patch14_dinov2") == Sizes(518, 518)
    assert [Sizes(32, step=32).nearest(side) for side in (1, 100, 640)] == [32, 96, 640]
    assert [Sizes(224, 224).nearest(side) for side in (1, 999)] == [224, 224]
    assert Sizes(63).nearest(32) == 63


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            Recipe(backbone="vit_b_16", augment=Augment(size=96)),
            "augment.size must be 224 pixels with backbone vit_b_16, got 96; pass for example --augment.size 224.",
        ),
        (
            Recipe(backbone="inception_v3", augment=Augment(size=(64, 96))),
            "augment.size must be at least 75 pixels with backbone inception_v3, got (64, 96); pass for example "
            "--augment.size 75.",
        ),
        (
            Recipe(backbone="timm/maxvit_tiny_tf_224", augment=Augment(size=100)),
            "augment.size must be a multiple of 224 pixels with backbone timm/maxvit_tiny_tf_224, got 100; pass for example "
            "--augment.size 224.",
        ),
        (
            Recipe(backbone="timm/vit_tiny_patch16_224", augment=Augment(size=64), sizes=(32, 64), epochs=2),
            "sizes must be 64 pixels with backbone timm/vit_tiny_patch16_224, got 32; pass for example --sizes 64.",
        ),
    ],
)
def test_an_image_size_that_the_backbone_does_not_take_is_refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        require_sizes(recipe)


def test_training_and_using_check_the_image_size_first(shards: Path, tmp_path: Path) -> None:
    recipe = Recipe(backbone="vit_b_32", weights=None, augment=Augment(size=64))
    with pytest.raises(ArgumentError, match=r"^augment\.size must be 224 pixels with backbone vit_b_32, got 64; "):
        train(shards, recipe, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ArgumentError, match=r"^augment\.size must be 224 pixels"):
        Checkpoint(recipe=recipe, classes=("a", "b"), model={"x": torch.zeros(1)}, epoch=1).network()


def test_a_network_that_cannot_be_tried_out_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "takes", lambda *_: False)
    sizes_of.cache_clear()
    try:
        require_sizes(Recipe(backbone="resnet34", augment=Augment(size=57)))
    finally:
        sizes_of.cache_clear()
        sizes.takes_size.cache_clear()


def test_timms_networks_are_built_for_the_size_of_the_images() -> None:
    with torch.inference_mode():
        for side in (32, 64):
            network = build("timm/vit_tiny_patch16_224", 3, weights=None, size=(side, side)).eval()
            assert network(torch.rand(1, 3, side, side)).shape == (1, 3)


def test_a_run_with_timms_network_resumes_and_predicts(shards: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        backbone="timm/vit_tiny_patch16_224", weights=None, augment=Augment(size=16), epochs=1, batch_size=24
    )
    train(shards, recipe, out=tmp_path / "run", device="cpu")
    report = train(shards, recipe, out=tmp_path / "run", resume=True, device="cpu")
    checkpoint = Checkpoint.load(report.checkpoint)
    assert checkpoint.recipe.backbone == "timm/vit_tiny_patch16_224"
    assert checkpoint.network()(torch.rand(1, 3, 16, 16)).shape == (1, 5)


def test_timms_own_file_loads_into_its_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=7)
    torch.save({"arch": "mobilenetv3_small_050", "state_dict": theirs.state_dict()}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "fastflower"):
        ours = build("timm/mobilenetv3_small_050", 7, weights=str(tmp_path / "w.pth")).eval()
    assert caplog.messages[-1].endswith(
        "loaded into timm/mobilenetv3_small_050 from state_dict.*; kept its head for 7 classes"
    )
    images = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(ours(images), theirs.eval()(images))


def test_auxiliary_heads_in_a_file_are_left_out_and_the_input_is_transformed(tmp_path: Path) -> None:
    theirs = models.inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = build("inception_v3", 1000, weights=str(tmp_path / "w.pth")).eval()
    images = torch.rand(1, 3, 75, 75)
    with torch.inference_mode():
        assert torch.equal(ours(images), theirs(images))


def test_a_missing_timm_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    message = "backbone='timm/resnet18' needs the package timm; run pip install 'fastflower[timm]'."
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        build("timm/resnet18", 5, weights=None)


def test_timms_names_tags_and_weights_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        "backbone: timm has no network 'resnet19'; fastflower backbones 'timm/*' lists all. Did you mean timm/resnet1"
    )
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}"):
        build("timm/resnet19", 5, weights=None)
    with pytest.raises(
        CheckpointError, match=r"^backbone='timm/resnet18.best': timm's weights for resnet18 are timm/resnet18\.a"
    ):
        build("timm/resnet18.best", 5, weights="DEFAULT")
    with pytest.raises(
        CheckpointError, match=r"^weights='a1_in1k': .* pass backbone timm/resnet18\.a1_in1k and weights DEFAULT"
    ):
        build("timm/resnet18", 5, weights="a1_in1k")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    with pytest.raises(
        CheckpointError,
        match=r"^weights: timm's weights for timm/resnet18 could not be downloaded \(no route to host\)\. Without internet "
        r"access, start from .* --recipe finetune-small .* --weights FILE .* --recipe scratch or --weights None ",
    ):
        build("timm/resnet18", 5, weights="DEFAULT")


def test_the_view_of_pretrained_weights_is_theirs() -> None:
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert view_of_weights("resnet50", "DEFAULT") == View(224, 232, *imagenet, "bilinear")
    assert view_of_weights("resnet50", "IMAGENET1K_V1") == View(224, 256, *imagenet, "bilinear")
    swag = "ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1"
    assert view_of_weights("vit_h_14", swag) == View(518, 518, *imagenet, "bicubic")
    assert view_of_weights("timm/resnet50.a1_in1k", "DEFAULT") == View(224, 235, *imagenet, "bicubic")
    half = (0.5, 0.5, 0.5)
    assert view_of_weights("timm/vit_base_patch16_224", "DEFAULT") == View(224, 248, half, half, "bicubic")
    for name, weights in (
        ("resnet50", None),
        ("resnet50_v1", "DEFAULT"),
        ("timm/resnet50", None),
    ):
        assert view_of_weights(name, weights) is None


@pytest.mark.parametrize("name", ["resnet50.a1_in1k", "convnext_tiny.fb_in22k", "vit_small_patch14_dinov2.lvd142m"])
def test_the_view_of_timms_weights_is_that_of_timms_transform(name: str) -> None:
    view, known = view_of_weights(f"timm/{name}", "DEFAULT"), timm.get_pretrained_cfg(name)
    assert view
    assert known
    config = resolve_data_config(pretrained_cfg=known.to_dict())
    resize, crop, *_, normalize = create_transform(**config).transforms  # pyright: ignore[reportAttributeAccessIssue]
    assert (view.resize, (view.size, view.size)) == (resize.size, tuple(crop.size))
    assert view.interpolation == resize.interpolation.value
    torch.testing.assert_close(torch.tensor([view.mean, view.std]), torch.stack([normalize.mean, normalize.std]))


def test_backbones_are_listed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = backbones("resnet18")
    assert (row.parameters, row.stages, row.native, row.sizes) == (11_689_512, 4, 224, "at least 1 pixels")
    assert main(["backbones", "squeezenet1_?"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "parameters", "stages", "trained", "at", "weights", "image", "sizes"]
    assert [line.split()[0] for line in rows] == ["squeezenet1_0", "squeezenet1_1"]
    assert main(["backbones", "timm/mobilenetv3_small_05?"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["backbones", "nothing"]) == 1
    message = "error: pattern: no backbone is named 'nothing'; pass for example 'resnet*' or 'timm/convnext*'.\n"
    assert capsys.readouterr() == ("", message)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    assert not at_hand("resnet18")
    assert not at_hand("timm/resnet18.a1_in1k")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]).touch()
    assert at_hand("resnet18")


def test_a_skeleton_takes_no_memory_and_no_random_numbers() -> None:
    state = torch.random.get_rng_state()
    network = skeleton_of("vit_h_14")
    assert all(value.is_meta for value in network.state_dict().values())
    assert sum(value.numel() for value in network.parameters()) == 632_045_800
    assert torch.equal(torch.random.get_rng_state(), state)
