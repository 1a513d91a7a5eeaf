"""Weights files of other programs: their nesting, prefixes, averaged weights, projection heads and other objects."""

import enum
import logging
import os
import re
import sys
import types
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from timm.utils.checkpoint_saver import CheckpointSaver
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision import models

from fastflower import Checkpoint, Recipe
from fastflower.errors import CheckpointError
from fastflower.models.backbone import build
from fastflower.models.weights_file import load_file

pytestmark = pytest.mark.usefixtures("narrow")
State = dict[str, Tensor]


class Color(enum.Enum):
    RED = 1


class Options(dict[str, Any]):
    """A dict that only its own program has."""


def network(seed: int = 0, classes: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    return models.resnet18(num_classes=classes)


def renamed(state: State, *prefixes: str) -> State:
    return {prefix + name: value for prefix in prefixes for name, value in state.items()}


def with_projection(prefix: str, seed: int = 0) -> State:
    """A ResNet of self-supervised training: its head is a perceptron."""
    model = network(seed)
    model.fc = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32))
    return renamed(model.state_dict(), prefix)


def trained_by(model: nn.Module) -> dict[str, Any]:
    """What programs save beside the weights."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        "args": Namespace(lr=0.1, output=Path("runs"), color=Color.RED, norm=partial(nn.LayerNorm, eps=1e-6)),
        "best_acc1": np.float64(0.5),
        "hyper_parameters": Options(width=3),
        "meters": defaultdict(list, loss=[1.0]),
    }


def averaged(seed: int) -> State:
    return AveragedModel(network(seed)).state_dict()


def body_only(layers: int) -> nn.Module:
    return nn.Sequential(*list(network().children())[:layers])


def fastai() -> State:
    """vision_learner: the layers of the network by number, then a head of its own."""
    head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 7, bias=False))
    return nn.Sequential(body_only(-2), head).state_dict()


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "torchvision": (lambda: {"model": network().state_dict()}, " from model.*"),
    "torchvision, EMA": (
        lambda: {"model": network(1).state_dict(), "model_ema": averaged(0)},
        " from model_ema.module.* (not from model.*); left out model_ema.n_averaged",
    ),
    "timm": (lambda: {"arch": "resnet18", "state_dict": network().state_dict(), "version": 2}, " from state_dict.*"),
    "timm, EMA": (
        lambda: {"state_dict": network(1).state_dict(), "state_dict_ema": network().state_dict()},
        " from state_dict_ema.* (not from state_dict.*)",
    ),
    "EMA within": (
        lambda: {"ema": {"module": network().state_dict()}, "net": network(1).state_dict()},
        " from ema.module.* (not from net.*)",
    ),
    "DataParallel": (lambda: nn.DataParallel(network()).state_dict(), " from module.*"),
    "compiled": (lambda: renamed(network().state_dict(), "_orig_mod."), " from _orig_mod.*"),
    "compiled, DataParallel": (
        lambda: {"net": renamed(network().state_dict(), "module._orig_mod.")},
        " from net.module._orig_mod.*",
    ),
    "Lightning module": (
        lambda: {"state_dict": renamed(network().state_dict(), "model.") | {"criterion.weight": torch.ones(7)}},
        " from state_dict.model.*; left out state_dict.criterion.weight",
    ),
    "Lightning, children": (
        lambda: {"state_dict": renamed(body_only(-1).state_dict(), "backbone.") | {"classifier.weight": torch.ones(7)}},
        " from state_dict.backbone.*; left out state_dict.classifier.weight",
    ),
    "MoCo": (
        lambda: {
            "arch": "resnet18",
            "state_dict": with_projection("module.encoder_k.", 1)
            | with_projection("module.encoder_q.")
            | {"module.queue": torch.rand(32, 8), "module.queue_ptr": torch.zeros(1)},
        },
        " from state_dict.module.encoder_q.* (not from state_dict.module.encoder_k.*); "
        "left out state_dict.module.encoder_q.fc.0.weight and 5 more",
    ),
    "MoCo v3": (
        lambda: with_projection("module.momentum_encoder.", 1) | with_projection("module.base_encoder."),
        " from module.base_encoder.* (not from module.momentum_encoder.*); left out module.base_encoder.fc.0.weight and 3 more",
    ),
    "SimCLR": (
        lambda: {"state_dict": with_projection("backbone.")},
        " from state_dict.backbone.*; left out state_dict.backbone.fc.0.weight and 3 more",
    ),
    "SwAV": (
        lambda: renamed({**network().state_dict(), "projection_head.0.weight": torch.rand(8, 8)}, "module."),
        " from module.*; left out module.projection_head.0.weight",
    ),
    "DINO": (
        lambda: {
            "student": renamed(network(1).state_dict(), "module.backbone."),
            "teacher": renamed(network().state_dict(), "backbone.") | {"head.mlp.0.weight": torch.rand(8, 8)},
            "dino_loss": OrderedDict(center=torch.zeros(1, 8)),
        },
        " from teacher.backbone.* (not from student.module.backbone.*); left out teacher.head.mlp.0.weight and 1 more",
    ),
    "BYOL": (
        lambda: (
            renamed(network().state_dict(), "online_encoder.net.")
            | renamed(network(1).state_dict(), "target_encoder.net.")
        ),
        " from online_encoder.net.* (not from target_encoder.net.*)",
    ),
    "fastai": (lambda: {"model": fastai()}, " from model.0.*; left out model.1.1.weight and 5 more"),
    "whole network": (lambda: {"model": network()}, " from model.*"),
}


def assert_loaded(path: Path, told: str, caplog: pytest.LogCaptureFixture, dtype: torch.dtype = torch.float32) -> None:
    """Check that the body of `network` was loaded, and what the log says."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "fastflower"):
        own = build("resnet18", 5, weights=str(path)).state_dict()
    for name, value in network().state_dict().items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            assert torch.equal(own[name], value.to(dtype).float()), name
    (line,) = caplog.messages
    assert line.rpartition("; ")[0] == f"{path}: loaded into resnet18{told}"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Any, str]:
    make, told = KINDS[request.param]
    return make(), told


def test_weights_of_another_program_are_found(
    kind: tuple[Any, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content, told = kind
    torch.save(content, tmp_path / "weights.pth")
    assert_loaded(tmp_path / "weights.pth", told, caplog)
    if any(isinstance(value, dict) for value in content.values()):
        torch.save({**trained_by(network()), **content}, tmp_path / "checkpoint.pth.tar")
        assert_loaded(tmp_path / "checkpoint.pth.tar", told, caplog)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_safetensors_file_of_any_dtype_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    state = {name: value.to(dtype) for name, value in network().state_dict().items()}
    save_file(renamed(state, "model."), tmp_path / "model")
    assert_loaded(tmp_path / "model", " from model.*", caplog, dtype)


def test_a_runs_folder_is_its_best_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = Checkpoint(recipe=Recipe(), classes=("a", "b", "c", "d", "e"), model=network().state_dict(), epoch=1)
    saved.save(tmp_path / "checkpoint-best.pt")
    assert_loaded(tmp_path, "", caplog)


def test_what_accelerate_saves_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Accelerator(cpu=True).save_model(network(), tmp_path / "saved")
    assert_loaded(tmp_path / "saved" / "model.safetensors", "", caplog)
    message = f"{tmp_path / 'saved'}: is a folder; pass {tmp_path / 'saved' / 'model.safetensors'}."
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        build("resnet18", 5, weights=str(tmp_path / "saved"))


def test_what_timm_saves_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = network(1)
    args, optimizer = Namespace(model="resnet18", output=""), torch.optim.SGD(model.parameters())
    ema = ModelEmaV3(network())
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=np.float64(0.5))
    assert_loaded(tmp_path / "last.pth.tar", " from state_dict_ema.* (not from state_dict.*)", caplog)


def test_what_lightning_saves_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, options: Options) -> None:  # noqa: ARG002  (saved as a hyperparameter)
            super().__init__()
            self.save_hyperparameters()
            self.model = network()

    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=0)
    trainer.strategy.connect(Module(Options(folder=Path("runs"))))
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert_loaded(tmp_path / "last.ckpt", " from state_dict.model.*", caplog)


def test_a_network_that_was_saved_whole_is_read_without_its_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if its class does not exist here."""
    module = types.ModuleType("their_program")
    module.Net = type("Net", (models.ResNet,), {"__module__": "their_program"})  # pyright: ignore[reportAttributeAccessIssue]
    model = network()
    model.__class__ = module.Net
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "their_program", module)
        torch.save(nn.DataParallel(model), tmp_path / "whole.pt")
    assert_loaded(tmp_path / "whole.pt", " from module.*", caplog)


class Runs:
    """Runs code when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def touched(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize("zip_file", [True, False])
@pytest.mark.parametrize("function", [exec, eval, touched, os.system])
def test_code_in_a_file_is_never_run(tmp_path: Path, function: Callable[..., object], zip_file: bool) -> None:
    ran, path = tmp_path / "ran", tmp_path / "weights.pth"
    code = {"touched": str(ran), "system": f"touch {ran}"}.get(
        function.__name__, f"__import__('os').mkdir({str(ran)!r})"
    )
    content = {"evil": Runs(function, code), "state_dict": network().state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=zip_file)
    if zip_file and function.__name__ != "system":
        build("resnet18", 5, weights=str(path))
    else:
        with pytest.raises(CheckpointError, match=r"weights\.pth: "):
            build("resnet18", 5, weights=str(path))
    assert not ran.exists()
    torch.load(path, weights_only=False)  # would have
    assert ran.exists()


def test_an_older_file_with_an_unknown_type_names_it_and_how_to_convert(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    content = {"model": network().state_dict(), "args": Namespace(lr=0.1), "best": np.float32(0.5)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    build("resnet18", 5, weights=str(path))
    torch.save({**content, "color": Color.RED}, path, _use_new_zipfile_serialization=False)
    message = (
        f"{path}: holds test_foreign_weights.Color, which could run code; pass its weights, if you trust the file: python -c "
        f""""import torch; torch.save(torch.load('{path}', weights_only=False)['model'], 'weights.pth')"."""
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        build("resnet18", 5, weights=str(path))


def test_a_torchscript_archive_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pt"
    with pytest.warns(FutureWarning):
        torch.jit.save(torch.jit.trace(network().eval(), torch.rand(1, 3, 32, 32)), str(path))
    message = (
        f"{path}: is a TorchScript archive, which holds code; pass its weights: "
        f"""python -c "import torch; torch.save(torch.jit.load('{path}').state_dict(), 'weights.pth')"."""
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        build("resnet18", 5, weights=str(path))


@pytest.mark.parametrize(
    ("file", "into"),
    [("resnet34", "resnet18"), ("vgg11", "resnet50")],
)
def test_a_file_of_another_backbone_names_it_and_the_first_tensors(tmp_path: Path, file: str, into: str) -> None:
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in models.get_model(file, weights=None).state_dict().items()}
    torch.save({"model": {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}}, tmp_path / "w.pth")
    shape = r"\(\d+(, \d+)*,?\)"
    tensor = rf"[\w.]+ (is {shape} instead of {shape}|{shape} is (missing|unexpected))"
    message = (
        rf"w\.pth: does not fit {into}: \d+ of its tensors are missing, unexpected or differ in shape "
        rf"\({tensor}; {tensor}; {tensor}; \.\.\.\); it fits {file}: pass --backbone {file} \(backbone={file!r}\)\.$"
    )
    with pytest.raises(CheckpointError, match=message):
        build(into, 5, weights=str(tmp_path / "w.pth"))


def test_a_file_that_fits_no_known_backbone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastflower.models.backbone.NAMES", ("squeezenet1_1", "resnet18"))  # all take seconds
    torch.save({"encoder.weight": torch.rand(3, 4)}, tmp_path / "w.pth")
    wanted = (
        r"w\.pth: does not fit resnet18: 100 of its tensors are missing, unexpected or differ in shape "
        r"\(conv1\.weight \(16, 3, 7, 7\) is missing; .*\); pass the file's backbone \(--backbone\)\.$"
    )
    with pytest.raises(CheckpointError, match=wanted):
        build("resnet18", 5, weights=str(tmp_path / "w.pth"))


def test_only_the_tensors_that_are_taken_must_be_finite(tmp_path: Path) -> None:
    content = {"model": network(1).state_dict(), "ema": network().state_dict()}
    content["model"]["conv1.weight"][0] = torch.nan
    torch.save(content, tmp_path / "w.pth")
    build("resnet18", 5, weights=str(tmp_path / "w.pth"))
    content["ema"]["bn1.weight"][0] = torch.inf
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"w\.pth: weights are not finite \('bn1\.weight'\); pass another file\.$"
    ):
        build("resnet18", 5, weights=str(tmp_path / "w.pth"))


def test_a_checkpoint_of_fastflower_may_hold_only_tensors_and_plain_values(tmp_path: Path) -> None:
    torch.save({"format": "fastflower", "args": Namespace()}, tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values; pass another file"):
        load_file(tmp_path / "mine.pt")
