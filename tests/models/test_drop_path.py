"""Stochastic depth: probabilities compared with those of the libraries' constructors, and what does not have it."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES
from torch import nn
from torchvision import models
from torchvision.models import swin_transformer
from torchvision.ops import StochasticDepth

from fastflower import Recipe
from fastflower.errors import ArgumentError
from fastflower.models.backbone import build, skeleton_of
from fastflower.models.recomputation import require_options
from fastflower.models.skeleton import Skeleton


def probabilities(network: nn.Module) -> list[float]:
    found = [module.p for module in network.modules() if isinstance(module, StochasticDepth)]
    return found or [module.drop_prob for module in network.modules() if type(module).__name__ == "DropPath"]  # pyright: ignore[reportReturnType]


SWIN: dict[str, Any] = {"patch_size": [4, 4], "embed_dim": 96, "num_heads": [3, 6, 12, 24], "window_size": [7, 7]}
MAXVIT: dict[str, Any] = {
    "input_size": (224, 224),
    "stem_channels": 64,
    "partition_size": 7,
    "block_channels": [64, 128, 256, 512],
    "block_layers": [2, 2, 5, 2],
    "head_dim": 32,
}
THEIRS: dict[str, Callable[[float], nn.Module]] = {
    "convnext_tiny": lambda rate: models.convnext_tiny(stochastic_depth_prob=rate),
    "efficientnet_b0": lambda rate: models.efficientnet_b0(stochastic_depth_prob=rate),
    "efficientnet_v2_s": lambda rate: models.efficientnet_v2_s(stochastic_depth_prob=rate),
    "swin_t": lambda rate: models.SwinTransformer(depths=[2, 2, 6, 2], stochastic_depth_prob=rate, **SWIN),
    "swin_v2_t": lambda rate: models.SwinTransformer(
        depths=[2, 2, 6, 2],
        stochastic_depth_prob=rate,
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
        **SWIN,
    ),
    "maxvit_t": lambda rate: models.MaxVit(stochastic_depth_prob=rate, **MAXVIT),
    **{
        f"timm/{name}": lambda rate, name=name: timm.create_model(name, drop_path_rate=rate)
        for name in ("vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224", "resnet50")
    },
}


@pytest.mark.parametrize("name", THEIRS)
def test_probabilities_are_those_of_the_librarys_constructor(name: str) -> None:
    with Skeleton():
        expected = probabilities(THEIRS[name](0.35))
    found = probabilities(skeleton_of(name, drop_path=0.35))
    assert found == pytest.approx(expected)
    assert found == sorted(found)
    assert 0.3 < found[-1] <= 0.35 + 1e-12


@pytest.mark.parametrize("name", ["convnext_tiny", "efficientnet_b0", "timm/resnet10t", "timm/vit_tiny_patch16_224"])
def test_none_leaves_the_networks_own_and_zero_disables_it(name: str) -> None:
    own = timm.create_model(name[5:]) if name.startswith("timm/") else models.get_model(name)
    assert probabilities(skeleton_of(name)) == probabilities(own)
    assert not any(probabilities(skeleton_of(name, drop_path=0.0)))


@pytest.mark.parametrize(("name", "side"), [("efficientnet_b0", 32), ("swin_t", 32), ("timm/vit_tiny_patch16_224", 32)])
def test_it_drops_blocks_in_training_and_changes_neither_weights_nor_evaluation(name: str, side: int) -> None:
    networks: list[nn.Module] = []
    for rate in (0.0, 0.5):
        torch.manual_seed(0)
        networks.append(build(name, 3, weights=None, size=(side, side), drop_path=rate))
    plain, dropping = networks
    assert plain.state_dict().keys() == dropping.state_dict().keys()
    assert all(torch.equal(value, dropping.state_dict()[key]) for key, value in plain.state_dict().items())
    images = torch.rand(4, 3, side, side)
    with torch.inference_mode():
        assert torch.equal(plain.eval()(images), dropping.eval()(images))
    outcomes: list[torch.Tensor] = []
    dropping.train()
    for module in dropping.modules():  # what else is random
        if isinstance(module, nn.Dropout):
            module.eval()
    nn.init.normal_(list(dropping.parameters())[-2])  # timm's heads start at zero
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outcomes.append(dropping(images))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


def test_exactly_the_families_that_the_message_names_have_it_in_torchvision() -> None:
    able: set[str] = set()
    for name in FAMILIES:
        try:
            skeleton_of(name, drop_path=0.1)
            able.add(name)
        except ArgumentError:
            pass
    assert able == {name for name in FAMILIES if re.match("convnext|efficientnet|maxvit|swin", name)}


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "timm/vgg11", "timm/hrnet_w18_small"])
def test_a_backbone_without_it_is_refused_before_training(name: str) -> None:
    message = (
        f"drop_path must be None with backbone {name}, which has no stochastic depth, got 0.1. convnext, efficientnet, maxvit "
        "and swin networks have it, and most of timm, such as timm/resnet50 and timm/vit_base_patch16_224; pass one of these as "
        "backbone (--backbone convnext_tiny), or omit drop_path."
    )
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        require_options(Recipe(backbone=name, drop_path=0.1))
    require_options(Recipe(backbone=name))


@pytest.mark.parametrize("value", [1.0, -0.1])
def test_a_probability_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ArgumentError, match=rf"^Recipe\.drop_path must be a number in \[0, 1\), got {value}\.$"):
        Recipe(drop_path=value)
