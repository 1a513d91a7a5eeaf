"""Networks of torchvision: their names, how they are built, and their pretrained weights."""

import errno
from collections.abc import Mapping

import torch
from torch import nn
from torchvision import models  # pyright: ignore[reportMissingTypeStubs]
from torchvision.models import WeightsEnum  # pyright: ignore[reportMissingTypeStubs]
from torchvision.ops import StochasticDepth  # pyright: ignore[reportMissingTypeStubs]

from fastflower.errors import CheckpointError
from fastflower.files import is_full, remedy_for
from fastflower.models.weights_file import OFFLINE

# The original ResNets (He et al. 2015) downsample in a block's first 1x1 convolution, torchvision's in the 3x3 convolution.
# The tensor shapes match, but Caffe or Keras weights lose accuracy in torchvision's variant. GluonCV calls the original "v1".
V1 = {f"resnet{depth}_v1": f"resnet{depth}" for depth in (50, 101, 152)}
NAMES = (*models.list_models(models), *V1)
"""Names of backbones, without timm's."""

# These normalize images as their weights expect, and have further heads for training, which are left out.
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def empty(name: str) -> nn.Module:
    """Build a network with random weights and a head for 1,000 classes."""
    options = {"transform_input": True, "init_weights": True} if name in _WITH_AUXILIARY_HEADS else {}
    network = models.get_model(V1.get(name, name), weights=None, **options)
    for layer in ("layer2", "layer3", "layer4") if name in V1 else ():
        conv1, conv2 = network.get_submodule(f"{layer}.0.conv1"), network.get_submodule(f"{layer}.0.conv2")
        conv1.stride, conv2.stride = conv2.stride, conv1.stride
    return _without_auxiliary_heads(network)


def arguments_of(name: str) -> dict[str, bool]:
    """Return the arguments with which torchvision's function builds what `empty` builds, beside num_classes."""
    if name not in _WITH_AUXILIARY_HEADS:
        return {}
    return {"transform_input": True, "aux_logits": False, "init_weights": False}


def set_drop_path(network: nn.Module, rate: float) -> bool:
    """Set the probabilities of stochastic depth as the constructor's stochastic_depth_prob does; return whether there are any.

    They grow linearly over the blocks. The arguments of Swin's and MaxViT's functions do not include stochastic_depth_prob.
    """
    found = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    if found:
        # An EfficientNet's last block of N has (N - 1) / N of the rate; that of the others has the rate.
        last = rate * (1 - 1 / len(found)) if isinstance(network, models.EfficientNet) else rate
        factor = last / found[-1].p
        for module in found:
            module.p *= factor
    return bool(found)


def weights_of(name: str) -> Mapping[str, WeightsEnum]:
    """Return the pretrained weights of a network by name, also under "DEFAULT" if there are any."""
    return {} if name in V1 else models.get_model_weights(name).__members__  # pyright: ignore[reportUnknownMemberType]


def require_weights(name: str, weights: str) -> None:
    """Raise CheckpointError if torchvision has no weights of this name for a network."""
    if name in V1:
        raise CheckpointError(
            f"weights={weights!r}: torchvision has no weights for {name}; pass a path or None, or use backbone {V1[name]}."
        )
    known = weights_of(name)
    if weights not in {text for key, one in known.items() for text in (key, f"{type(one).__name__}.{key}")}:
        names = ", ".join(each for each in known if each != "DEFAULT")
        which = (
            f"the weights for {name} are {names}; pass one of these," if names else f"there are none for {name}; pass"
        )
        raise CheckpointError(f"weights={weights!r}: {which} a path or None.")


def downloaded(name: str, weights: str) -> nn.Module:
    """Build a network with torchvision's weights. Raises CheckpointError if they cannot be downloaded."""
    try:
        return _without_auxiliary_heads(models.get_model(name, weights=weights))
    except OSError as error:  # urllib's errors are OSErrors
        blame_the_cache(weights, error)
        raise CheckpointError(
            f"weights={weights!r}: pretrained weights for {name} could not be downloaded ({error}). {OFFLINE}"
        ) from error


def _without_auxiliary_heads(network: nn.Module) -> nn.Module:
    if isinstance(network, models.GoogLeNet | models.Inception3):
        network.aux_logits = False
        for name in ("aux1", "aux2", "AuxLogits"):
            setattr(network, name, None)
    return network


def blame_the_cache(weights: str, error: Exception) -> None:
    """Raise CheckpointError if `error` means that torch's cache of downloaded weights cannot be written."""
    unwritable = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    if unwritable or is_full(error):
        what = f"cannot be downloaded to {torch.hub.get_dir()} ({getattr(error, 'strerror', None)})"
        remedy = remedy_for(error, "set TORCH_HOME to a writable folder, or pass a file (--weights PATH)")
        raise CheckpointError(f"weights={weights!r}: {what}; {remedy}.") from None
