"""Unusable checkpoints: weights or outputs that are not finite, and duplicate class names."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_runs import LAST, RECIPE

from fastflower import Checkpoint, Loader, Report, evaluate, predict, train
from fastflower.cli import main
from fastflower.errors import CheckpointError
from fastflower.models.backbone import build

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

Use = Callable[[Path | Checkpoint], object]


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return train(shards, replace(RECIPE, epochs=1), out=tmp_path_factory.mktemp("runs") / "run", device="cpu")


@pytest.fixture(params=["evaluate", "predict"])
def use(request: pytest.FixtureRequest, shards: Path, flowers: Path) -> Use:
    image = next(flowers.glob("*/*.jpg"))
    verbs: dict[str, Use] = {
        "evaluate": lambda checkpoint: evaluate(checkpoint, shards, device="cpu"),
        "predict": lambda checkpoint: predict(checkpoint, image, device="cpu"),
    }
    return verbs[request.param]


def changed(checkpoint: Checkpoint, **tensors: float) -> Checkpoint:
    """Return a copy with the first value of some tensors changed."""
    model: dict[str, Tensor] = {name: value.clone() for name, value in checkpoint.model.items()}
    for name, value in tensors.items():
        tensor = model[name.replace("__", ".")]
        tensor[(0,) * tensor.ndim] = value
    return replace(checkpoint, model=model)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["conv1__weight", "layer4__0__bn1__running_var", "fc__bias"])
def test_weights_that_are_not_finite_are_refused_by_name(run: Report, tmp_path: Path, name: str, value: float) -> None:
    """Batch norm statistics count as weights."""
    path = tmp_path / "broken.pt"
    changed(Checkpoint.load(run.checkpoint), **{name: value}).save(path)
    message = (
        f"{path}: weights are not finite ({name.replace('__', '.')!r}), so it cannot predict; pass another "
        f"checkpoint, or train again with a lower lr."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        Checkpoint.load(path)


def test_a_checkpoint_in_memory_is_checked_too(run: Report, use: Use) -> None:
    broken = changed(Checkpoint.load(run.checkpoint), fc__weight=math.nan, fc__bias=math.nan)
    with pytest.raises(CheckpointError, match=r"^checkpoint: weights are not finite \('fc\.weight' and 1 more\)"):
        use(broken)


def test_outputs_that_are_not_finite_are_refused(run: Report, use: Use, tmp_path: Path) -> None:
    """Large finite weights make outputs overflow."""
    checkpoint, path = Checkpoint.load(run.checkpoint), tmp_path / "large.pt"
    model = {**checkpoint.model, "fc.weight": torch.full_like(checkpoint.model["fc.weight"], 3e38)}
    replace(checkpoint, model=model).save(path)
    message = (
        r"the network's outputs for .*\.jpg.* are not finite, so it cannot predict; pass another checkpoint, or train"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: {message}"):
        use(path)


def test_images_with_outputs_that_are_not_finite_are_counted(run: Report, shards: Path) -> None:
    """An infinitely low logit of one class counts as well."""
    checkpoint = Checkpoint.load(run.checkpoint)
    first = Loader(shards, "val", device="cpu").path_of(0)
    for value in (3e38, -3e38):
        model = {**checkpoint.model, "fc.bias": torch.tensor([value, -value, 0.0, 0.0, 0.0])}
        with pytest.raises(
            CheckpointError, match=rf"^checkpoint: .* outputs for {re.escape(first)} and 29 more are not fi"
        ):
            evaluate(replace(checkpoint, model=model), shards, device="cpu")


def test_duplicate_class_names_are_refused(run: Report, use: Use, tmp_path: Path) -> None:
    """One name would hide a probability, so the probabilities would not sum to one."""
    checkpoint, path = Checkpoint.load(run.checkpoint), tmp_path / "duplicates.pt"
    first, _, *rest = checkpoint.classes
    duplicates = replace(checkpoint, classes=(first, first, *rest))
    told = f"two of its classes are named {first!r}, so their probabilities are ambiguous; pass another checkpoint"
    with pytest.raises(CheckpointError, match=f"^checkpoint: {re.escape(told)}"):
        duplicates.network()
    duplicates.save(path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{path}: {told}')}"):
        use(path)


def test_a_wrong_number_of_classes_is_refused(run: Report) -> None:
    checkpoint = Checkpoint.load(run.checkpoint)
    with pytest.raises(CheckpointError, match=r"^checkpoint: weights do not fit resnet18 with 4 classes \("):
        predict(replace(checkpoint, classes=checkpoint.classes[:4]), [], device="cpu")


def test_training_does_not_start_or_resume_from_weights_that_are_not_finite(
    run: Report, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise the first loss would not be finite, and the learning rate would get the blame."""
    out, weights = tmp_path / "run", tmp_path / "weights.pth"
    out.mkdir()
    changed(Checkpoint.load(run.checkpoint), conv1__weight=math.nan).save(out / LAST)
    recipe = replace(RECIPE, epochs=1)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(out / LAST))}: weights are not finite"):
        train(shards, recipe, out=out, resume=True, device="cpu")
    assert main(["predict", str(out / LAST), "x.jpg"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {out / LAST}: weights are not finite ('conv1.weight'), so it")
    state = build("resnet18", 5, weights=None).state_dict()
    state["bn1.running_var"][3] = math.inf
    for dtype in (torch.float32, torch.float16):
        torch.save({name: value.to(dtype) for name, value in state.items()}, weights)
        told = f"{weights}: weights are not finite ('bn1.running_var'); pass another file."
        with pytest.raises(CheckpointError, match=f"^{re.escape(told)}$"):
            train(shards, replace(recipe, weights=str(weights)), out=tmp_path / "new", device="cpu")
    assert not (tmp_path / "new").exists()
