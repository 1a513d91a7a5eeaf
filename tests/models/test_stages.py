"""Stages: which parameters are frozen, in all networks of torchvision and one of each of many families of timm."""

import re
from collections import Counter

import pytest
import torch
from torch import nn
from torchvision import models

from fastflower.models.backbone import NAMES, build, skeleton_of
from fastflower.models.stages import frozen_modules, heads_of, stages_of, train_mode

TIMM = (
    "resnet18",
    "resnetv2_50",
    "seresnet50",
    "regnety_002",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "convnext_atto",
    "vgg11_bn",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224",
    "maxvit_tiny_tf_224",
    "mixer_s16_224",
    "xcit_nano_12_p16_224",
    "levit_128s",
    "nfnet_f0",
    "poolformer_s12",
    "mobilevit_xs",
    "dla34",
    "hrnet_w18_small",
    "densenet121",
    "inception_v4",
    "fastvit_t8",
    "convmixer_768_32",
    "caformer_s18",
    "tiny_vit_5m_224",
    "pvt_v2_b0",
    "ghostnet_100",
)

# Layers after the pooling.
HEAD = re.compile(r"(fc|classifier|heads?|last_linear|head_dist|pre_logits|conv_head|norm_head|fc_norm)\.")


@pytest.mark.parametrize("name", [*NAMES, *(f"timm/{name}" for name in TIMM)])
def test_every_parameter_but_the_heads_is_in_exactly_one_stage(name: str) -> None:
    network = skeleton_of(name, 5)
    stages = stages_of(network)
    counts = Counter(key for stage in stages for key in stage)
    assert set(counts.values()) == {1}
    others = {key for key, _ in network.named_parameters()} - counts.keys()
    assert {f"{head}.weight" for head in heads_of(network)} <= others
    assert all(HEAD.match(key) for key in others), others
    assert 3 <= len(stages) <= 6
    assert all(stages)


# Where torchvision's and timm's networks are the same.
TWINS = {
    "resnet50": "resnet50",
    "wide_resnet50_2": "wide_resnet50_2",
    "densenet121": "densenet121",
    "convnext_tiny": "convnext_tiny",
    "efficientnet_b0": "efficientnet_b0",
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "regnet_y_400mf": "regnety_004",
    "vgg11_bn": "vgg11_bn",
    "swin_t": "swin_tiny_patch4_window7_224",
    "vit_b_16": "vit_base_patch16_224",
    "inception_v3": "inception_v3",
}


def sizes(network: nn.Module) -> list[Counter[int]]:
    """The sizes of the parameters of each stage. Some are stored in two parts, or in another shape."""
    return [Counter(network.get_parameter(name).numel() for name in stage) for stage in stages_of(network)]


@pytest.mark.parametrize("name", TWINS)
def test_equal_networks_of_torchvision_and_timm_have_equal_stages(name: str) -> None:
    ours, timms = skeleton_of(name), skeleton_of(f"timm/{TWINS[name]}")
    assert sizes(ours) == sizes(timms)


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("resnet50", ["conv1.weight", "layer2.0.conv1.weight", "layer3.0.conv1.weight", "layer4.0.conv1.weight"]),
        ("alexnet", ["features.0.weight", "features.3.weight", "features.6.weight"]),
        ("squeezenet1_0", ["features.0.weight", "features.7.squeeze.weight", "features.12.squeeze.weight"]),
        ("googlenet", ["conv1.conv.weight", *(f"inception{stage}a.branch1.conv.weight" for stage in (3, 4, 5))]),
        ("vit_b_32", ["class_token", *(f"encoder.layers.encoder_layer_{block}.ln_1.weight" for block in (3, 6, 9))]),
        ("swin_t", ["features.0.0.weight", *(f"features.{block}.reduction.weight" for block in (2, 4, 6))]),
        ("timm/vit_tiny_patch16_224", ["cls_token", *(f"blocks.{block}.norm1.weight" for block in (3, 6, 9))]),
    ],
)
def test_stages_begin_where_the_resolution_changes_or_with_a_quarter_of_the_blocks(
    name: str, begins: list[str]
) -> None:
    assert [stage[0] for stage in stages_of(skeleton_of(name))] == begins


@pytest.mark.parametrize(
    "name", ["vit_b_16", "efficientnet_b0", "swin_t", "timm/vit_tiny_patch16_224", "timm/resnet18"]
)
def test_frozen_stages_hold_still(name: str) -> None:
    """Their norms and dropout are in evaluation mode, and exactly their parameters are not trained."""
    with torch.device("meta"):
        network = build(name, 5, weights=None, freeze=2)
    train_mode(network, 2)
    frozen = {key for stage in stages_of(network)[:2] for key in stage}
    assert {key for key, value in network.named_parameters() if not value.requires_grad} == frozen
    still = {key for key, module in network.named_modules() if not module.training and list(module.parameters())}
    for key, module in network.named_modules():
        inside = {f"{key}.{name}".lstrip(".") for name, _ in module.named_parameters()}
        assert (key in still) == bool(inside and inside <= frozen), key
    assert list(frozen_modules(network, 2))
    assert not list(frozen_modules(models.resnet18(), 0))
