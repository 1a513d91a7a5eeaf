"""torchvision classifiers with a new head, pretrained or not, with their first stages frozen or not."""

import logging
import re
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torchvision import models  # pyright: ignore[reportMissingTypeStubs]  (it has none)

from fastflower.errors import ArgumentError, CheckpointError
from fastflower.files import blame_the_system

_log = logging.getLogger("fastflower")

# The first ResNets (He et al. 2015) halve the size in a block's 1x1 convolution, torchvision's in its 3x3. The tensors have the
# same shapes; weights of Caffe or Keras are of this kind, and lose accuracy in the other. GluonCV's name.
_V1 = {f"resnet{depth}_v1": f"resnet{depth}" for depth in (50, 101, 152)}
NAMES = (*(name for name in models.list_models(models) if re.match(r"(densenet|resnet|vgg)\d", name)), *_V1)

_DOTTED = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")


def build(
    name: str, num_classes: int, *, weights: str | None, freeze: int = 0, classes: Sequence[str] = ()
) -> nn.Module:
    """A network that maps (N, 3, H, W) to logits (N, num_classes), on the CPU; its head is new.

    weights  torchvision's name of pretrained weights, the path of a state_dict or checkpoint (any floating dtype), its address
    as https://HOST/FILE#sha256=CHECKSUM (downloaded once), or None. Their head stays where it has as many classes and
    they are no checkpoint of other `classes`.
    Raises ArgumentError for an unknown name or more stages than there are, CheckpointError for weights that cannot be used.
    """
    if name not in NAMES:
        raise ArgumentError(f"backbone must be one of {', '.join(NAMES)}, got {name!r}.")
    if weights is None:
        model = _empty(name)
        _fit_head(model, num_classes)
    elif weights.startswith(("https://", "http://")) or _is_file_name(weights):
        model, path = _empty(name), _fetched(weights) if "://" in weights else Path(weights)
        _log.info("%s: loaded into %s; %s", path, name, _load_file(model, name, path, num_classes, classes))
    else:
        model = _downloaded(name, weights)
        _log.info("%s: %s", name, _fit_head(model, num_classes))
    for module in frozen_modules(model, freeze):
        module.requires_grad_(requires_grad=False)
    return model


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """The same network, moved to a device, its weights channels-last."""
    network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's types lack it)
    return network


def frozen_modules(model: nn.Module, stages: int) -> list[nn.Module]:
    """The modules of the first `stages` stages; a ResNet's or DenseNet's stem counts with the first, a VGG's end at max-pools."""
    if isinstance(model, models.ResNet):
        known = [[model.conv1, model.bn1, model.layer1], [model.layer2], [model.layer3], [model.layer4]]
    else:
        known = _feature_stages(model.get_submodule("features"))  # DenseNet and VGG have one
    if stages > len(known):
        raise ArgumentError(f"freeze must be at most {len(known)}, the stages of this backbone, got {stages}.")
    return [module for stage in known[:stages] for module in stage]


def train_mode(model: nn.Module, freeze: int) -> None:
    """Switch to training, but leave frozen stages' batch norms (and dropout) in evaluation mode."""
    model.train()
    for module in frozen_modules(model, freeze):
        module.eval()


def _feature_stages(features: nn.Module) -> list[list[nn.Module]]:
    """Cut after every DenseNet transition or VGG max-pool; DenseNet's own max-pool, pool0, ends its stem."""
    stages: list[list[nn.Module]] = [[]]
    for name, module in features.named_children():
        stages[-1].append(module)
        if name.startswith("transition") or (isinstance(module, nn.MaxPool2d) and name != "pool0"):
            stages.append([])
    return [stage for stage in stages if stage]


def _head_name(model: nn.Module) -> str:
    """Of the last linear layer: only those have matrices for weights."""
    return [name for name, weight in model.named_parameters() if weight.ndim == 2][-1].removesuffix(".weight")


def _fit_head(model: nn.Module, num_classes: int, *, keep: bool = True) -> str:
    """A new head where it has not as many outputs, or is not to be kept; says what was done."""
    name = _head_name(model)
    outputs, inputs = model.get_parameter(f"{name}.weight").shape
    if outputs == num_classes and keep:
        return f"its head of {num_classes} classes was kept"
    model.set_submodule(name, nn.Linear(inputs, num_classes))
    other = " others" if outputs == num_classes else ""
    return f"its head of {outputs} classes was replaced by a new one of {num_classes}{other}"


def _is_file_name(weights: str) -> bool:
    named = "_Weights." in weights  # as ResNet18_Weights.IMAGENET1K_V1
    return (Path(weights).suffix != "" and not named) or "/" in weights or Path(weights).exists()


def _empty(name: str) -> nn.Module:
    model = models.get_model(_V1.get(name, name), weights=None)
    for layer in ("layer2", "layer3", "layer4") if name in _V1 else ():
        conv1, conv2 = model.get_submodule(f"{layer}.0.conv1"), model.get_submodule(f"{layer}.0.conv2")
        conv1.stride, conv2.stride = conv2.stride, conv1.stride
    return model


def _downloaded(name: str, weights: str) -> nn.Module:
    if name in _V1:
        raise CheckpointError(
            f"weights={weights!r}: torchvision has none for {name}; pass the path of a file, None, or backbone {_V1[name]}."
        )
    try:
        return models.get_model(name, weights=weights)
    except OSError as error:  # urllib's errors are OSErrors
        raise CheckpointError(
            f"weights={weights!r}: {name}'s pretrained weights could not be downloaded ({error}). Download them where there "
            f"is a network, pass the file's path as weights, or train from scratch (--recipe scratch; weights=None, freeze=0)."
        ) from error
    except (KeyError, ValueError) as error:
        known = ", ".join(entry.name for entry in models.get_model_weights(name))  # pyright: ignore[reportUnknownMemberType]
        raise CheckpointError(f"weights={weights!r}: {name} has {known}; a file's path or None will do too.") from error


def _fetched(address: str) -> Path:
    """The file at https://HOST/FILE#sha256=CHECKSUM, downloaded into torch's folder of weights unless it lies there."""
    url, _, checksum = address.partition("#sha256=")
    if not re.fullmatch("[0-9a-f]{64}", checksum):
        raise ArgumentError(
            f"weights={address!r}: an address needs the file's checksum, {url.partition('#')[0]}#sha256=CHECKSUM; "
            f"sha256sum FILE prints it."
        )
    path = Path(torch.hub.get_dir(), "checkpoints", f"{checksum[:16]}-{Path(url).name}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), checksum, progress=False)
        except RuntimeError:
            raise CheckpointError(
                f"weights: what {url} holds has another SHA-256 than {checksum}; check both, nothing was kept."
            ) from None
        except (OSError, HTTPException, ValueError) as error:
            raise CheckpointError(
                f"weights: {url} could not be downloaded ({str(error).strip()}); check the address, or pass a file's path."
            ) from None
    return path


def _load_file(model: nn.Module, name: str, path: Path, num_classes: int, classes: Sequence[str]) -> str:
    """Load a file's weights, its head where that fits; says what became of the head."""
    state, file_classes = _read_weights(path)
    head, own = _head_name(model), model.state_dict()
    # The counters of batch norms are missing, or of shape (1,), in files of other origins.
    body = [key for key in own if not key.startswith(f"{head}.") and not key.endswith("num_batches_tracked")]
    wrong = [key for key in body if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]  # ResNet-34 holds all of ResNet-18
    if wrong:
        raise CheckpointError(
            f"{path}: does not fit {name}: {len(wrong)} tensors are missing, left over or of another shape "
            f"(first {wrong[0]!r}); pass the backbone that the file was saved from."
        )
    model.load_state_dict(own | {key: state[key] for key in body})
    weight, bias = state.get(f"{head}.weight"), state.get(f"{head}.bias")
    inputs = own[f"{head}.weight"].shape[1]
    if weight is None or bias is None or weight.shape[1:] != (inputs,) or len(weight) != len(bias):
        _fit_head(model, num_classes)
        return f"it has no head that fits, a new one of {num_classes} classes was made"
    layer = nn.Linear(inputs, len(weight))
    layer.load_state_dict({"weight": weight, "bias": bias})
    model.set_submodule(head, layer)
    return _fit_head(model, num_classes, keep=not classes or file_classes in (None, tuple(classes)))


def _read_weights(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """(state_dict, classes) of a file; the classes are None where it is no checkpoint of ours."""
    content: object = load_file(path)
    classes = None
    if content.get("format") == "fastflower":
        content, classes = content.get("model"), tuple(content.get("classes", ()))
    if not _is_state_dict(content):
        raise CheckpointError(
            f"{path}: is neither a state_dict nor a fastflower checkpoint; pass the path of a file that "
            f"torch.save(model.state_dict(), path) or train wrote."
        )
    if broken := not_finite(content):
        raise CheckpointError(
            f"{path}: weights are not finite ({broken}), and nothing can be trained from them; pass another file."
        )
    # torchvision's own files of DenseNet spell norm1 as norm.1.
    return {_DOTTED.sub(r"\1", key): value for key, value in content.items()}, classes


def _is_state_dict(value: object) -> TypeGuard[dict[str, Tensor]]:
    if not isinstance(value, dict) or not value:
        return False
    items = cast("dict[object, object]", value).items()
    return all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in items)


def not_finite(state: dict[str, Tensor]) -> str:
    """Names the tensors of a state_dict that hold inf or NaN, in words; "" where all are finite."""
    names = [key for key, value in state.items() if value.is_floating_point() and not value.float().isfinite().all()]
    return f"{names[0]!r}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" if names else ""


def load_file(path: Path) -> dict[str, Any]:
    """torch.load of a file from anywhere: tensors and plain values only. Raises CheckpointError."""
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: does not exist; check the path.") from None
    except Exception as error:  # torch.load raises whatever zipfile, pickle and its own reader raise
        blame_the_system(error, path)
        if isinstance(error, IsADirectoryError):
            raise CheckpointError(f"{path}: is a folder; name a file, such as a run's checkpoint-best.pt.") from None
        if isinstance(error, PermissionError):  # not OSError: so is a file that is cut short
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); fix that, or pass another.") from None
        # Not its text: torch's advice is to load with weights_only=False, which runs whatever code a file holds.
        raise CheckpointError(
            f"{path}: is not a file that torch.save wrote, is cut short, or holds more than tensors and plain values; "
            f"pass another file."
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a dictionary; pass another file.")
    return cast("dict[str, Any]", loaded)
