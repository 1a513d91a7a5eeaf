"""Learning rates by layer: compared with timm's, with one optimizer per rate, over the schedule, and when a run resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn
from training_runs import RECIPE, assert_same, assert_same_run, killed, narrow_resnets, small, written_history

from fastflower import Checkpoint, Recipe, train
from fastflower.errors import ArgumentError
from fastflower.models.backbone import skeleton_of
from fastflower.models.stages import heads_of
from fastflower.training.optimizer import optimizer_of, plain_state, set_rate
from fastflower.training.run import Run

CPU = torch.device("cpu")


def rates(network: nn.Module, recipe: Recipe) -> dict[str, tuple[float, float]]:
    """The learning rate and weight decay of each parameter, by name."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = optimizer_of(network, recipe).param_groups
    return {names[id(one)]: (group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "beit_base_patch16_224",
        "eva02_tiny_patch14_224",
        "convnext_atto",
        "swin_tiny_patch4_window7_224",
        "resnet50",
        "efficientnet_b0",
        "mobilenetv3_small_100",
        "vgg11_bn",
        "hrnet_w18_small",
        "levit_128s",
    ],
)
def test_learning_rates_and_weight_decay_of_timms_networks_are_timms(name: str) -> None:
    network = skeleton_of(f"timm/{name}", 5)
    names = {id(parameter): key for key, parameter in network.named_parameters()}
    groups = param_groups_layer_decay(network, weight_decay=0.05, layer_decay=0.7)
    expected = {
        names[id(one)]: (0.01 * group["lr_scale"], group["weight_decay"]) for group in groups for one in group["params"]
    }
    found = rates(network, Recipe(lr=0.01, layer_decay=0.7, weight_decay=0.05, optimizer="adamw"))
    assert found.keys() == expected.keys()
    for key, pair in expected.items():
        assert found[key] == pytest.approx(pair, rel=1e-12), key


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("resnet50", "resnet50"),
        ("vit_b_16", "vit_base_patch16_224"),
        ("convnext_tiny", "convnext_tiny"),
        ("swin_t", "swin_tiny_patch4_window7_224"),
    ],
)
def test_learning_rates_of_torchvisions_networks_are_those_of_timms_twins(ours: str, theirs: str) -> None:
    network, twin = skeleton_of(ours), skeleton_of(f"timm/{theirs}")
    found = rates(network, Recipe(lr=1.0, layer_decay=0.7))
    expected = {name: rate for name, (rate, _) in rates(twin, Recipe(lr=1.0, layer_decay=0.7)).items()}
    pairs = sorted((network.get_parameter(name).numel(), round(rate, 12)) for name, (rate, _) in found.items())
    assert pairs == sorted((twin.get_parameter(name).numel(), round(rate, 12)) for name, rate in expected.items())


def test_the_rate_falls_from_the_head_to_the_stem() -> None:
    found = rates(skeleton_of("resnet18", 5), Recipe(lr=0.1, layer_decay=0.5))
    assert {rate for name, (rate, _) in found.items() if name.startswith("fc.")} == {0.1}
    assert {rate for name, (rate, _) in found.items() if name.startswith("layer4.1.")} == {0.05}
    assert found["conv1.weight"][0] == pytest.approx(0.1 * 0.5**9)


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "squeezenet1_1", "timm/deit_tiny_distilled_patch16_224"])
def test_head_lr_is_that_of_the_head_only(name: str) -> None:
    network = skeleton_of(name, 5)
    heads = tuple(f"{head}." for head in heads_of(network))
    found = rates(network, Recipe(lr=0.01, head_lr=0.3, weight_decay=0.1))
    for key, (rate, decay) in found.items():
        assert rate == pytest.approx(0.3 if key.startswith(heads) else 0.01), key
        assert decay == (0.1 if network.get_parameter(key).ndim > 1 else 0.0), key
    both = rates(network, Recipe(lr=0.01, head_lr=0.3, layer_decay=0.5))
    assert {rate for key, (rate, _) in both.items() if key.startswith(heads)} == {0.3}
    assert max(rate for key, (rate, _) in both.items() if not key.startswith(heads)) <= 0.01


def test_frozen_stages_do_not_change_the_rates_of_the_others() -> None:
    network = skeleton_of("resnet18", 5)
    whole = rates(network, Recipe(layer_decay=0.5))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "bn1", "layer1", "layer2")))
    rest = rates(network, Recipe(layer_decay=0.5))
    assert rest == {name: whole[name] for name in rest}
    assert all(name.startswith(("layer3", "layer4", "fc")) for name in rest)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_an_update_equals_that_of_an_optimizer_for_each_layer(optimizer: Any) -> None:
    """At a rate of the schedule, not only at its peak."""
    recipe = Recipe(lr=0.01, head_lr=0.05, layer_decay=0.5, optimizer=optimizer, weight_decay=0.1)
    torch.manual_seed(0)
    ours = small("", 5)
    theirs = small("", 5)
    theirs.load_state_dict(ours.state_dict())
    together = optimizer_of(ours, recipe)
    set_rate(together, 0.004)
    scales = {"features.0": 0.5, "features.1": 0.5, "classifier.1": 5.0}
    alone = [
        optimizer_of(theirs.get_submodule(name), replace(recipe, head_lr=None, layer_decay=None, lr=0.004 * scale))
        for name, scale in scales.items()
    ]
    images, labels = torch.rand(6, 3, 16, 16), torch.arange(6) % 5
    for _ in range(3):
        for network, optimizers in ((ours, [together]), (theirs, alone)):
            torch.manual_seed(1)
            nn.functional.cross_entropy(network(images), labels).backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_factors_of_one_give_the_run_without_them(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastflower.models.defaults.build", small)
    recipe = replace(RECIPE, epochs=1)
    folders: list[Path] = []
    for name, changes in (("plain", {}), ("one", {"layer_decay": 1.0, "head_lr": RECIPE.lr})):
        folders.append(train(shards, replace(recipe, **changes), out=tmp_path / name, device="cpu").folder)
    one, other = (Checkpoint.load(folder) for folder in folders)
    assert_same(one.model, other.model)
    assert [len(each.optimizer["param_groups"]) for each in (one, other)] == [2, 2]


def test_the_history_has_the_rate_of_the_recipe(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastflower.models.defaults.build", small)
    recipe = replace(RECIPE, epochs=1, schedule="constant", lr=0.01, head_lr=0.02, layer_decay=0.5)
    report = train(shards, recipe, out=tmp_path / "run", device="cpu")
    assert [row["lr"] for row in written_history(report.folder)] == [0.01]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_with_rates_by_layer_resumes_as_if_uninterrupted(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any
) -> None:
    narrow_resnets(monkeypatch)
    monkeypatch.setattr("fastflower.training.run.write_report", lambda *_: None)
    recipe = replace(RECIPE, optimizer=optimizer, layer_decay=0.6, head_lr=0.03, weight_decay=0.01)
    whole = train(shards, recipe, out=tmp_path / "whole", device="cpu").folder
    killed(shards, recipe, tmp_path / "run", (Run, "step", 4), save_steps=2)
    killed(shards, recipe, tmp_path / "run", (Run, "step", 5), save_steps=2)
    train(shards, recipe, out=tmp_path / "run", resume=True, device="cpu")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_checkpoint_without_the_fields_resumes_as_before(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any
) -> None:
    """Its recipe lacks them, and its optimizer has two groups without a factor."""
    monkeypatch.setattr("fastflower.models.defaults.build", small)
    recipe, out = replace(RECIPE, optimizer=optimizer), tmp_path / "run"
    whole = train(shards, recipe, out=tmp_path / "whole", device="cpu").folder
    killed(shards, recipe, out, (Run, "step", 4), save_steps=2)
    content = torch.load(out / "checkpoint-last.pt", weights_only=True)
    for name in ("layer_decay", "head_lr"):
        del content["recipe"][name]
    assert all("lr_scale" not in group for group in content["optimizer"]["param_groups"])
    assert len(content["optimizer"]["param_groups"]) == 2
    torch.save(content, out / "checkpoint-last.pt")
    train(shards, recipe, out=out, resume=True, device="cpu")
    assert_same_run(out, whole)


def test_rates_in_tensors_are_set_in_place_and_saved_as_numbers() -> None:
    """A CUDA graph reads the rate of each group from a tensor of its own."""
    recipe = Recipe(lr=0.25, head_lr=1.0, layer_decay=0.5)
    optimizer = optimizer_of(small("", 5), recipe)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    tensors: list[Tensor] = [group["lr"] for group in optimizer.param_groups]
    set_rate(optimizer, 0.125)
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors, strict=True))
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert sorted(set(scales)) == [0.5, 4.0]
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.125 * scale for scale in scales]
    state = plain_state(optimizer)
    assert [(type(group["lr"]), group["lr"]) for group in state["param_groups"]] == [
        (float, 0.125 * scale) for scale in scales
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_decay": 0.0}, r"^Recipe\.layer_decay must be a number in \(0, 1\], got 0\.0\.$"),
        ({"layer_decay": 1.5}, r"^Recipe\.layer_decay must be a number in \(0, 1\], got 1\.5\.$"),
        ({"head_lr": 0.0}, r"^Recipe\.head_lr must be a number above 0, got 0\.0\.$"),
    ],
)
def test_rates_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Recipe(**changes)
