"""Classifiers of torchvision and timm with a new head, optional pretrained weights and optional frozen stages."""

import logging
import re
from collections.abc import Sequence
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn

from fastflower.errors import ArgumentError, CheckpointError
from fastflower.models import timm_networks
from fastflower.models.matching import Match, broken, match
from fastflower.models.packaged import PACKAGED, load_packaged, require_packaged
from fastflower.models.skeleton import Skeleton
from fastflower.models.stages import freeze_stages, heads_of
from fastflower.models.torchvision_networks import (
    NAMES,
    blame_the_cache,
    downloaded,
    empty,
    require_weights,
    set_drop_path,
    weights_of,
)
from fastflower.models.weights_file import read_weights

_log = logging.getLogger("fastflower")


def build(
    name: str,
    num_classes: int,
    *,
    weights: str | None,
    freeze: int = 0,
    classes: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    quiet: bool = False,
    drop_path: float | None = None,
) -> nn.Module:
    """Build a network on the CPU that maps images (N, 3, H, W) to logits (N, num_classes).

    name  A classifier of torchvision.models, resnet50_v1, 101_v1 or 152_v1, or timm/NAME or timm/NAME.TAG.
    weights  The name of pretrained weights ("DEFAULT": the best of torchvision, or those of timm's TAG; "lite0": those of the
    extra `demo`); the path of a file that holds the network's weights (of any program and floating-point dtype), or its URL as
    https://HOST/FILE#sha256=CHECKSUM (downloaded once); or None for random weights. The head is replaced if it does not have
    `num_classes` outputs or comes from a checkpoint for other `classes`.
    size  Height and width of the images, for networks of timm that are built for one size.
    quiet  Whether not to log what the weights are.
    drop_path  Probability of stochastic depth in the last block; None: the network's own.

    Raises ArgumentError if the backbone's name is unknown, `freeze` exceeds the number of stages, or a URL has no checksum.
    Raises CheckpointError if the weights cannot be used.
    """
    require_network(name, weights)
    told = logging.DEBUG if quiet else logging.INFO
    if weights is None:
        model = _empty(name, num_classes, size, drop_path)
        _fit_head(model, num_classes)
    elif weights in PACKAGED:
        model = _empty(name, 1000, size, drop_path)
        load_packaged(model, name, weights)
        _log.log(told, "%s: %s", name, _fit_head(model, num_classes))
    elif path := local_file(weights):
        model = _empty(name, num_classes, size, drop_path)
        _log.log(told, "%s: loaded into %s%s", path, name, _load_file(model, name, path, num_classes, classes))
    elif name.startswith(timm_networks.PREFIX):
        model = _of_timm(name, num_classes, size, drop_path, pretrained=True)
        _log.log(told, "%s: timm's weights, with a new head for %d classes", name, num_classes)
    else:
        model = _with_drop_path(name, downloaded(name, weights), drop_path)
        _log.log(told, "%s: %s", name, _fit_head(model, num_classes))
    freeze_stages(model, freeze)
    return model


def require_network(name: str, weights: str | None = None) -> None:
    """Raise ArgumentError if a backbone's name is unknown, or CheckpointError if the name of its weights is."""
    of_timm = name.startswith(timm_networks.PREFIX)
    if name not in NAMES and not of_timm:
        near = "".join(f" Did you mean {one}?" for one in get_close_matches(name, NAMES, 1))
        raise ArgumentError(
            f"backbone must be a classifier of torchvision or timm/NAME, which fastflower backbones lists, got {name!r}.{near}"
        )
    if weights in PACKAGED:
        require_packaged(name, weights)
    elif weights is None or "://" in weights or _is_file_name(weights):
        return
    elif not of_timm:
        require_weights(name, weights)
    elif weights != "DEFAULT":
        raise CheckpointError(
            f"weights={weights!r}: timm's weights are part of the backbone's name; pass backbone {name.partition('.')[0]}"
            f".{weights} and weights DEFAULT, a path or None."
        )


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device in channels-last memory format, and return it."""
    network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (missing in torch's types)
    return network


def skeleton_of(
    name: str, num_classes: int = 1000, *, size: tuple[int, int] | None = None, drop_path: float | None = None
) -> nn.Module:
    """Build a network on the meta device, quickly and without memory for its weights."""
    with Skeleton():
        return _empty(name, num_classes, size, drop_path).to("meta")


def _empty(name: str, num_classes: int, size: tuple[int, int] | None, drop_path: float | None) -> nn.Module:
    """Build a network with random weights. One of torchvision has a head for 1,000 classes."""
    if name.startswith(timm_networks.PREFIX):
        return _of_timm(name, num_classes, size, drop_path)
    return _with_drop_path(name, empty(name), drop_path)


def _of_timm(
    name: str, num_classes: int, size: tuple[int, int] | None, drop_path: float | None, *, pretrained: bool = False
) -> nn.Module:
    try:
        return timm_networks.create(name, num_classes, pretrained=pretrained, size=size, drop_path=drop_path)
    except TypeError as error:
        if drop_path is None or "drop_path_rate" not in str(error):
            raise
        raise _no_drop_path(name, drop_path) from None


def _with_drop_path(name: str, model: nn.Module, drop_path: float | None) -> nn.Module:
    if drop_path is not None and not set_drop_path(model, drop_path):
        raise _no_drop_path(name, drop_path)
    return model


def _no_drop_path(name: str, drop_path: float) -> ArgumentError:
    return ArgumentError(
        f"drop_path must be None with backbone {name}, which has no stochastic depth, got {drop_path}. convnext, efficientnet, "
        f"maxvit and swin networks have it, and most of timm, such as timm/resnet50 and timm/vit_base_patch16_224; pass one "
        f"of these as backbone (--backbone convnext_tiny), or omit drop_path."
    )


def _fit_head(model: nn.Module, num_classes: int, *, keep: bool = True) -> str:
    """Replace the head if it does not have `num_classes` outputs or `keep` is False; return a description for the log."""
    name = heads_of(model)[0]
    outputs = len(model.get_parameter(f"{name}.weight"))
    if outputs == num_classes and keep:
        return f"kept its head for {num_classes} classes"
    model.set_submodule(name, _head_like(model.get_submodule(name), num_classes))
    other = " other" if outputs == num_classes else ""
    return f"replaced its head for {outputs} classes with a new one for {num_classes}{other} classes"


def _head_like(head: nn.Module, num_classes: int) -> nn.Linear | nn.Conv2d:
    """Return a new head of the same kind for another number of classes."""
    if isinstance(head, nn.Conv2d):  # of a SqueezeNet
        return nn.Conv2d(head.in_channels, num_classes, kernel_size=1, bias="bias" in dict(head.named_parameters()))
    assert isinstance(head, nn.Linear)
    return nn.Linear(head.in_features, num_classes, bias="bias" in dict(head.named_parameters()))


def local_file(weights: str) -> Path | None:
    """Return the file that `weights` names as a path, or as a URL, which is downloaded; None if it is another name."""
    if weights.startswith(("https://", "http://")):
        return _fetched(weights)
    return Path(weights) if weights not in PACKAGED and _is_file_name(weights) else None


def _is_file_name(weights: str) -> bool:
    named = "_Weights." in weights  # for example ResNet18_Weights.IMAGENET1K_V1
    return (Path(weights).suffix != "" and not named) or "/" in weights or Path(weights).exists()


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
            blame_the_cache(address, error)
            raise CheckpointError(
                f"weights: {url} could not be downloaded ({str(error).strip()}); check the URL, or pass a file's path."
            ) from None
    return path


def _load_file(model: nn.Module, name: str, path: Path, num_classes: int, classes: Sequence[str]) -> str:
    """Load a file's weights, including its head if it fits; return a description for the log."""
    tensors, file_classes = read_weights(path)
    heads = heads_of(model)
    found = match(model, heads, tensors)
    if wrong := found.problems:
        other = _that_fits(tensors, name)
        remedy = (
            f"it fits {other}: pass --backbone {other} (backbone={other!r})"
            if other
            else "pass the file's backbone (--backbone)"
        )
        raise CheckpointError(
            f"{path}: does not fit {name}: {len(wrong)} of its tensors are missing, unexpected or differ in shape "
            f"({'; '.join(wrong[:3])}{'; ...' * (len(wrong) > 3)}); {remedy}."
        )
    if where := broken(found):
        raise CheckpointError(f"{path}: weights are not finite ({where}); pass another file.")
    found.own.update(found.fitting)
    model.load_state_dict(found.own)
    return (
        f"{found}; {_load_heads(model, found, num_classes, keep=not classes or file_classes in (None, tuple(classes)))}"
    )


def _load_heads(model: nn.Module, found: Match, num_classes: int, *, keep: bool) -> str:
    """Load a file's head if it fits, or both heads of a network for distillation; return a description for the log."""
    first, *others = heads_of(model)
    own = {key: value for key, value in found.own.items() if key.startswith(found.heads)}
    theirs = {key: value for key in own if (value := found.get(key)) is not None}
    fits = theirs.keys() == own.keys() and all(theirs[key].shape[1:] == value.shape[1:] for key, value in own.items())
    outputs = {len(value) for value in theirs.values()}
    if not fits or len(outputs) > 1 or (others and (outputs != {num_classes} or not keep)):
        _fit_head(model, num_classes)
        return f"found no head that fits, so added a new one for {num_classes} classes"
    if not others:
        model.set_submodule(first, _head_like(model.get_submodule(first), *outputs))
    state = model.state_dict()
    state.update(theirs)
    model.load_state_dict(state)
    return _fit_head(model, num_classes, keep=keep)


def _that_fits(tensors: dict[str, Tensor], name: str) -> str | None:
    """Return the backbone other than `name` that a file's tensors fit, or None."""
    count = sum(value.numel() for value in tensors.values())
    sizes = {other: weights_of(other)["DEFAULT"].meta["num_params"] for other in NAMES if weights_of(other)}
    for other in sorted(sizes.keys() - {name}, key=lambda other: (abs(sizes[other] - count), other)):
        model = skeleton_of(other)
        if not match(model, heads_of(model), tensors).problems:
            return other
    return None
