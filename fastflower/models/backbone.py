"""torchvision classifiers with a new head, optional pretrained weights and optional frozen stages."""

import errno
import logging
import re
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models  # pyright: ignore[reportMissingTypeStubs]

from fastflower.errors import ArgumentError, CheckpointError
from fastflower.files import is_full, remedy_for
from fastflower.models.matching import broken, match
from fastflower.models.skeleton import Skeleton
from fastflower.models.weights_file import read_weights

_log = logging.getLogger("fastflower")

# The original ResNets (He et al. 2015) downsample in a block's first 1x1 convolution, torchvision's in the 3x3 convolution.
# The tensor shapes match, but Caffe or Keras weights lose accuracy in torchvision's variant. GluonCV calls the original "v1".
_V1 = {f"resnet{depth}_v1": f"resnet{depth}" for depth in (50, 101, 152)}
NAMES = (*(name for name in models.list_models(models) if re.match(r"(densenet|resnet|vgg)\d", name)), *_V1)


def build(
    name: str, num_classes: int, *, weights: str | None, freeze: int = 0, classes: Sequence[str] = ()
) -> nn.Module:
    """Build a network on the CPU that maps images (N, 3, H, W) to logits (N, num_classes).

    weights  The name of pretrained torchvision weights; the path of a file that holds the network's weights (of any program
    and floating-point dtype), or its URL as https://HOST/FILE#sha256=CHECKSUM (downloaded once); or None for random weights.
    The head is replaced if it does not have `num_classes` outputs or comes from a checkpoint for other `classes`.

    Raises ArgumentError if the backbone's name is unknown, `freeze` exceeds the number of stages, or a URL has no checksum.
    Raises CheckpointError if the weights cannot be used.
    """
    if name not in NAMES:
        raise ArgumentError(f"backbone must be one of {', '.join(NAMES)}, got {name!r}.")
    if weights is None:
        model = _empty(name)
        _fit_head(model, num_classes)
    elif weights.startswith(("https://", "http://")) or _is_file_name(weights):
        model, path = _empty(name), _fetched(weights) if "://" in weights else Path(weights)
        _log.info("%s: loaded into %s%s", path, name, _load_file(model, name, path, num_classes, classes))
    else:
        model = _downloaded(name, weights)
        _log.info("%s: %s", name, _fit_head(model, num_classes))
    for module in frozen_modules(model, freeze):
        module.requires_grad_(requires_grad=False)
    return model


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device in channels-last memory format, and return it."""
    network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (missing in torch's types)
    return network


def frozen_modules(model: nn.Module, stages: int) -> list[nn.Module]:
    """Return the modules of the first `stages` stages.

    The stem of a ResNet or DenseNet belongs to the first stage. Each stage of a VGG ends with a max-pool.
    """
    if isinstance(model, models.ResNet):
        known = [[model.conv1, model.bn1, model.layer1], [model.layer2], [model.layer3], [model.layer4]]
    else:
        known = _feature_stages(model.get_submodule("features"))  # DenseNet or VGG
    if stages > len(known):
        raise ArgumentError(f"freeze must be at most {len(known)} (the stages of this backbone), got {stages}.")
    return [module for stage in known[:stages] for module in stage]


def train_mode(model: nn.Module, freeze: int) -> None:
    """Switch to training mode, but keep the batch norms and dropout of frozen stages in evaluation mode."""
    model.train()
    for module in frozen_modules(model, freeze):
        module.eval()


def _feature_stages(features: nn.Module) -> list[list[nn.Module]]:
    """Split layers into stages after each DenseNet transition or VGG max-pool, but not after pool0 in a DenseNet's stem."""
    stages: list[list[nn.Module]] = [[]]
    for name, module in features.named_children():
        stages[-1].append(module)
        if name.startswith("transition") or (isinstance(module, nn.MaxPool2d) and name != "pool0"):
            stages.append([])
    return [stage for stage in stages if stage]


def _head_name(model: nn.Module) -> str:
    """Return the name of the head: the last layer with a weight matrix."""
    return [name for name, weight in model.named_parameters() if weight.ndim == 2][-1].removesuffix(".weight")


def _fit_head(model: nn.Module, num_classes: int, *, keep: bool = True) -> str:
    """Replace the head if it does not have `num_classes` outputs or `keep` is False; return a description for the log."""
    name = _head_name(model)
    outputs, inputs = model.get_parameter(f"{name}.weight").shape
    if outputs == num_classes and keep:
        return f"kept its head for {num_classes} classes"
    model.set_submodule(name, nn.Linear(inputs, num_classes))
    other = " other" if outputs == num_classes else ""
    return f"replaced its head for {outputs} classes with a new one for {num_classes}{other} classes"


def _is_file_name(weights: str) -> bool:
    named = "_Weights." in weights  # for example ResNet18_Weights.IMAGENET1K_V1
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
            f"weights={weights!r}: torchvision has no weights for {name}; pass a path or None, or use backbone {_V1[name]}."
        )
    try:
        return models.get_model(name, weights=weights)
    except OSError as error:  # urllib's errors are OSErrors
        _blame_the_cache(weights, error)
        raise CheckpointError(
            f"weights={weights!r}: pretrained weights for {name} could not be downloaded ({error}). Download them on a machine "
            f"with internet access and pass the path, or train from scratch (--recipe scratch; weights=None, freeze=0)."
        ) from error
    except (KeyError, ValueError) as error:
        known = ", ".join(entry.name for entry in models.get_model_weights(name))  # pyright: ignore[reportUnknownMemberType]
        raise CheckpointError(
            f"weights={weights!r}: the weights for {name} are {known}; pass one of these, a path or None."
        ) from error


def _fetched(address: str) -> Path:
    """Return the local path of https://HOST/FILE#sha256=CHECKSUM, downloading it into torch's hub folder if needed."""
    url, _, checksum = address.partition("#sha256=")
    if not re.fullmatch("[0-9a-f]{64}", checksum):
        raise ArgumentError(
            f"weights={address!r}: a URL must include the file's checksum; pass {url.partition('#')[0]}#sha256=CHECKSUM "
            f"(sha256sum FILE prints it)."
        )
    path = Path(torch.hub.get_dir(), "checkpoints", f"{checksum[:16]}-{Path(url).name}")
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), checksum, progress=False)
        except RuntimeError:
            raise CheckpointError(
                f"weights: the SHA-256 of {url} is not {checksum}; check the URL and the checksum. The download was deleted."
            ) from None
        except (OSError, HTTPException, ValueError) as error:
            _blame_the_cache(address, error)
            raise CheckpointError(
                f"weights: {url} could not be downloaded ({str(error).strip()}); check the URL, or pass a file's path."
            ) from None
    return path


def _blame_the_cache(weights: str, error: Exception) -> None:
    """Raise CheckpointError if `error` means that torch's cache of downloaded weights cannot be written."""
    unwritable = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    if unwritable or is_full(error):
        what = f"cannot be downloaded to {torch.hub.get_dir()} ({getattr(error, 'strerror', None)})"
        remedy = remedy_for(error, "set TORCH_HOME to a writable folder, or pass a file (--weights PATH)")
        raise CheckpointError(f"weights={weights!r}: {what}; {remedy}.") from None


def _load_file(model: nn.Module, name: str, path: Path, num_classes: int, classes: Sequence[str]) -> str:
    """Load a file's weights, including its head if it fits; return a description for the log."""
    tensors, file_classes = read_weights(path)
    head = _head_name(model)
    found = match(model, head, tensors)
    if wrong := found.problems:
        others = [other for other in NAMES if other != name and _fits(other, tensors)]
        remedy = (
            f"it fits {others[0]}: pass --backbone {others[0]}" if others else "pass the file's backbone (--backbone)"
        )
        raise CheckpointError(
            f"{path}: does not fit {name}: {len(wrong)} of its tensors are missing, unexpected or differ in shape "
            f"({'; '.join(wrong[:3])}{'; ...' * (len(wrong) > 3)}); {remedy}."
        )
    if where := broken(found):
        raise CheckpointError(f"{path}: weights are not finite ({where}); pass another file.")
    model.load_state_dict(found.own | found.fitting)
    weight, bias = found.get(f"{head}.weight"), found.get(f"{head}.bias")
    inputs = found.own[f"{head}.weight"].shape[1]
    if weight is None or bias is None or weight.shape[1:] != (inputs,) or len(weight) != len(bias):
        _fit_head(model, num_classes)
        return f"{found}; found no head that fits, so added a new one for {num_classes} classes"
    layer = nn.Linear(inputs, len(weight))
    layer.load_state_dict({"weight": weight, "bias": bias})
    model.set_submodule(head, layer)
    return f"{found}; {_fit_head(model, num_classes, keep=not classes or file_classes in (None, tuple(classes)))}"


def _fits(name: str, tensors: dict[str, Tensor]) -> bool:
    with Skeleton():
        model = _empty(name)
    return not match(model, _head_name(model), tensors).problems
