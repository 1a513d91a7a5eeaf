"""Gradient checkpointing gives the same gradients and statistics, bit for bit, from fewer saved tensors."""

import re
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from fastflower import Augment, Recipe
from fastflower.errors import ArgumentError
from fastflower.models.backbone import build, on_device, skeleton_of
from fastflower.models.recomputation import (
    bytes_per_image,
    kept_bytes,
    recompute_blocks,
    require_options,
    still_statistics,
)
from fastflower.training.optimizer import optimizer_of
from fastflower.training.step import Stepper

CPU = torch.device("cpu")
SIDES = {
    "resnet18": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "mnasnet0_5": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "timm/resnet10t": 64,
    "timm/vit_tiny_patch16_224": 64,
    "timm/convnext_atto": 64,
    "timm/efficientnet_b0": 64,
    "timm/mobilenetv3_small_050": 64,
}


def stepper(network: nn.Module, **changes: Any) -> Stepper:
    recipe = Recipe(weights=None, precision="float32", lr=0.01, **changes)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Stepper(network, optimizer_of(network, recipe), scaler, recipe, CPU, torch.float32)


@pytest.mark.parametrize(("name", "side"), SIDES.items())
def test_losses_weights_and_statistics_are_the_same_and_less_is_kept(name: str, side: int) -> None:
    """With dropout and stochastic depth, where the network has them."""
    torch.manual_seed(0)
    plain = on_device(build(name, 3, weights=None, size=(side, side)), CPU).train()
    frugal = deepcopy(plain)
    images = torch.rand(4, 3, side, side).contiguous(memory_format=torch.channels_last)
    labels = torch.tensor([0, 1, 2, 0])
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    states: list[tuple[list[Tensor], dict[str, Tensor]]] = []
    for network, checkpointing in ((plain, False), (frugal, True)):
        step, losses = stepper(network, backbone=name, checkpointing=checkpointing), list[Tensor]()
        for number in range(2):
            torch.manual_seed(number)
            losses.append(step(images, labels)[0])
        states.append((losses, {key: value.clone() for key, value in network.state_dict().items()}))
    (one_losses, one), (other_losses, other) = states
    assert all(map(torch.equal, one_losses, other_losses))
    assert one.keys() == other.keys() == before.keys()
    different = [key for key, value in one.items() if not torch.equal(value, other[key])]
    assert not different
    assert any(not torch.equal(value, before[key]) for key, value in one.items())
    assert kept_bytes(frugal, images) < 0.8 * kept_bytes(plain, images)


def test_the_statistics_of_a_resnet_are_updated_once() -> None:
    torch.manual_seed(0)
    network = build("resnet18", 3, weights=None).train()
    step = stepper(network, checkpointing=True)
    step(torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))
    counters = {name: value.item() for name, value in network.named_buffers() if name.endswith("num_batches_tracked")}
    assert len(counters) == 20
    assert set(counters.values()) == {1}
    assert {module.momentum for module in network.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}


def test_without_still_statistics_torch_updates_them_twice() -> None:
    """The reason for still_statistics; if this fails, torch does it itself."""
    network = build("resnet18", 3, weights=None).train()
    assert recompute_blocks(network)
    network(torch.rand(4, 3, 64, 64)).sum().backward()
    assert network.get_buffer("layer1.0.bn1.num_batches_tracked").item() == 2


def test_statistics_hold_still_only_inside_the_block_and_if_it_fails() -> None:
    norm = nn.BatchNorm2d(4, momentum=0.3)
    norm(torch.rand(2, 4, 3, 3))
    before = {name: value.clone() for name, value in norm.named_buffers()}
    with pytest.raises(ValueError, match="expected 4D input"), still_statistics(norm):
        norm(norm(torch.rand(2, 4, 3, 3)).sum())
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())
    norm(torch.rand(2, 4, 3, 3))
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 2
    assert not torch.equal(norm.get_buffer("running_mean"), before["running_mean"])


def test_a_copy_of_a_network_computes_with_its_own_weights() -> None:
    network = build("resnet18", 3, weights=None).eval()
    recompute_blocks(network)
    twin = deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    images = torch.rand(1, 3, 32, 32)
    assert not torch.equal(network(images), twin(images))


def test_frozen_stages_are_allowed() -> None:
    network = build("resnet18", 3, weights=None, freeze=2).train()
    before = network.get_parameter("layer3.0.conv1.weight").clone()
    stepper(network, checkpointing=True)(torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))
    assert network.get_parameter("layer1.0.conv1.weight").grad is None
    assert not torch.equal(network.get_parameter("layer3.0.conv1.weight"), before)


def test_all_families_of_torchvision_but_plain_stacks_have_it() -> None:
    lacking = [name for name in FAMILIES if not recompute_blocks(skeleton_of(name))]
    assert lacking == ["alexnet", "vgg11_bn"]


@pytest.mark.parametrize("name", ["vgg11", "timm/vgg11", "timm/inception_v4"])
def test_a_backbone_without_blocks_is_refused_before_training(name: str) -> None:
    message = (
        f"checkpointing must be False with backbone {name}, which has no blocks that can be computed again, got True; omit it "
        "(--no-checkpointing), or pass a backbone with residual blocks (--backbone resnet50)."
    )
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        require_options(Recipe(backbone=name, checkpointing=True, augment=Augment(size=64)))
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        stepper(build(name, 3, weights=None), backbone=name, checkpointing=True)


def test_checkpointing_is_refused_with_compile() -> None:
    with pytest.raises(ArgumentError, match=r"^Recipe\.checkpointing must be False if compile is True, got True\.$"):
        Recipe(checkpointing=True, compile=True)


def test_kept_tensors_are_counted_once_and_without_weights() -> None:
    """The input, and the output of the sigmoid; the linear layers share what they keep with these."""
    network = nn.Sequential(nn.Linear(10, 20), nn.Sigmoid(), nn.Linear(20, 30))
    for device in ("cpu", "meta"):
        images = torch.zeros(4, 10, device=device)
        assert kept_bytes(network.to(device), images) == 4 * (4 * 10 + 4 * 20)


def test_an_estimate_without_memory_is_what_a_step_keeps() -> None:
    recipe = Recipe(backbone="resnet18", weights=None, augment=Augment(size=64), sizes=(32, 64), epochs=2)
    expected = kept_bytes(build("resnet18", 1000, weights=None).train(), torch.rand(2, 3, 64, 64)) // 2
    assert bytes_per_image(recipe) == pytest.approx(expected, rel=0.01)
    assert bytes_per_image(replace(recipe, checkpointing=True)) < 0.7 * expected
    assert bytes_per_image(replace(recipe, freeze=2)) < 0.7 * expected
