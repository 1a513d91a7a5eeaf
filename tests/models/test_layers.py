"""Layers of a network for layer-wise decay: in all networks of torchvision, and compared with timm's."""

from collections import Counter

import pytest
import torch
from torch import nn
from torchvision import models

from fastflower.models.backbone import NAMES, skeleton_of
from fastflower.models.stages import blocks_of, heads_of, layers_of, stages_of


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_one_layer_and_no_layer_crosses_a_stage(name: str) -> None:
    network = skeleton_of(name, 5)
    layers = layers_of(network)
    counts = Counter(key for layer in layers for key in layer)
    assert counts == Counter(dict.fromkeys(dict(network.named_parameters()), 1))
    assert all(layers)
    assert {f"{heads_of(network)[0]}.weight"} <= set(layers[-1])
    assert [key for layer in layers[:-1] for key in layer] == [key for stage in stages_of(network) for key in stage]
    starts = {stage[0] for stage in stages_of(network)}
    assert starts <= {layer[0] for layer in layers}
    blocks = blocks_of(network)
    assert bool(blocks) == (not name.startswith(("vgg", "alexnet")))
    # The stem, the blocks and the head; without blocks, the convolutions and the head.
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert len(layers) == (len(blocks) + 2 if blocks else convolutions + 1)


# Where torchvision's and timm's networks are the same and timm's groups are blocks.
TWINS = {
    "resnet50": "resnet50",
    "vit_b_16": "vit_base_patch16_224",
    "convnext_tiny": "convnext_tiny",
    "swin_t": "swin_tiny_patch4_window7_224",
    "efficientnet_b0": "efficientnet_b0",
    "regnet_y_400mf": "regnety_004",
}


def sizes(network: nn.Module) -> list[Counter[int]]:
    """The sizes of the parameters of each layer. Some have another shape or order."""
    return [Counter(network.get_parameter(name).numel() for name in layer) for layer in layers_of(network)]


@pytest.mark.parametrize("name", TWINS)
def test_equal_networks_of_torchvision_and_timm_have_equal_layers(name: str) -> None:
    assert sizes(skeleton_of(name)) == sizes(skeleton_of(f"timm/{TWINS[name]}"))


def test_the_last_norm_of_a_densenet_is_in_its_last_layer_and_not_with_the_head_as_in_timm() -> None:
    ours, timms = sizes(skeleton_of("densenet121")), sizes(skeleton_of("timm/densenet121"))
    assert ours[:-2] == timms[:-2]
    norm = Counter({1024: 2})
    assert (ours[-2] - norm, ours[-1] + norm) == (timms[-2], timms[-1])


def test_blocks_do_not_contain_blocks() -> None:
    with torch.device("meta"):
        network = models.maxvit_t()
    blocks = blocks_of(network)
    assert len(blocks) == 11
    assert {type(network.get_submodule(name)).__name__ for name in blocks} == {"MaxVitLayer"}
