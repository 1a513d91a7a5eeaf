"""Calls of other libraries, in Python: an unknown argument is refused with the one that is meant; short reprs."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastflower import Augment, Checkpoint, Loader, Predictor, Recipe, evaluate, pack, predict, train
from fastflower.draws.color import IMAGENET_MEAN, IMAGENET_STD
from fastflower.errors import ArgumentError
from fastflower.models.predictor import Prediction
from fastflower.recipes.presets import PRESETS
from fastflower.reporting.preview import preview
from fastflower.training.diagnosis import diagnose


@pytest.mark.parametrize(
    ("call", "name", "answer"),
    [
        (Recipe, "learning_rate", "did you mean lr?"),
        (Recipe, "scheduler", "did you mean schedule?"),
        (Recipe, "epoch", "did you mean epochs?"),
        (Recipe, "warmup_epoch", "did you mean warmup_epochs?"),
        (Recipe, "rotation", "did you mean Recipe(augment=Augment(rotate=...))?"),
        (Recipe, "flip", "did you mean Recipe(augment=Augment(flip=...))?"),
        (Recipe, "output_dir", "did you mean train(out=...)?"),
        (
            Recipe,
            "pretrained",
            "weights are pretrained by default; weights=None starts from random ones, weights=FILE from a file.",
        ),
        (Augment, "rotation", "did you mean rotate?"),
        (Augment, "horizontal_flip", "did you mean flip?"),
        (Augment, "bananas", "it has size, resize, crop,"),
        (Augment, "epochs", "did you mean Recipe(epochs=...)?"),
        (Checkpoint, "class_names", "did you mean "),
        (train, "epochs", "did you mean Recipe(epochs=...)?\nType:\n"),
        (train, "num_epochs", "did you mean Recipe(epochs=...)?\nType:\n"),
        (train, "soup", "it is a field of Recipe.\nType:\n"),
        (train, "num_workers", "all cores that the process may use are used."),
        (Recipe, "contrast", "it is a field of Augment."),
        (Augment, "soup", "it is a field of Recipe."),
        (train, "output_dir", "did you mean out?"),
        (pack, "test_size", "did you mean test_fraction?"),
        (pack, "val_fractoin", "did you mean val_fraction?"),
        (predict, "batch_size", "the batch size does not change the result and cannot be set."),
        (predict, "model", "did you mean checkpoint?"),
        (predict, "source", "did you mean images?"),
        (train, "data_dir", "did you mean shards?"),
        (Predictor, "batch_size", "the batch size does not change the result and cannot be set."),
        (Predictor, "model", "did you mean checkpoint?"),
        (Predictor, "bf16", "did you mean precision?"),
        (preview, "flip", "did you mean Recipe(augment=Augment(flip=...))?"),
        (diagnose, "num_epochs", "did you mean Recipe(epochs=...)?"),
        (evaluate, "batch_size", "the batch size does not change the result and cannot be set."),
    ],
)
def test_an_unknown_argument_is_refused_with_the_one_that_is_meant(
    call: Callable[..., Any], name: str, answer: str
) -> None:
    if call is Checkpoint:
        name, answer = "class", "did you mean classes?"
    with pytest.raises(ArgumentError) as error:
        call(**{name: 1})
    assert str(error.value).startswith(f"{name}: {call.__name__} has no such argument; {answer}")
    assert isinstance(error.value, TypeError)  # which Python raises elsewhere


@pytest.mark.parametrize(
    ("call", "given", "message"),
    [
        (evaluate, ["runs/x"], "evaluate needs shards, as in evaluate('runs/x', 'data')."),
        (evaluate, [], "evaluate needs checkpoint and shards, as in evaluate('runs/a', 'data')."),
        (predict, ["runs/x"], "predict needs images, as in predict('runs/x', 'photo.jpg')."),
        (train, [], "train needs shards, as in train('data')."),
        (pack, [], "pack needs folder, as in pack('data')."),
        (Predictor, [], "Predictor needs checkpoint, as in Predictor('runs/a')."),
        (
            train,
            ["data", "scratch", "runs/x"],
            "train takes only shards and recipe without a name; pass 'runs/x' by its name, one of fold, out, resume, save_steps, "
            "device.",
        ),
    ],
)
def test_a_missing_argument_is_answered_with_a_call(call: Callable[..., Any], given: list[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$") as error:
        call(*given)
    assert isinstance(error.value, TypeError)


@pytest.mark.parametrize(
    ("given", "call", "recipe"),
    [
        ({"epochs": 2}, "train('shards', Recipe(epochs=2))", Recipe(epochs=2)),
        (
            {"num_epochs": 2, "bs": 16},
            "train('shards', Recipe(epochs=2, batch_size=16))",
            Recipe(epochs=2, batch_size=16),
        ),
        (
            {"flip": 0.1, "out": "runs/x"},
            "train('shards', Recipe(augment=Augment(crop=(0.08, 1.0), flip=0.1)), out='runs/x')",
            Recipe(augment=replace(Recipe().augment, flip=0.1)),
        ),
        (
            {"recipe": "scratch", "epochs": 2},
            "train('shards', replace(recipe, epochs=2))",
            replace(PRESETS["scratch"](), epochs=2),
        ),
        (
            {"recipe": "scratch", "hflip": 0.1, "lr": 0.1, "save_dir": Path("x"), "gpu": 0},
            "train('shards', replace(recipe, lr=0.1, augment=replace(recipe.augment, flip=0.1)), out='x', device='cuda')",
            replace(PRESETS["scratch"](), lr=0.1, augment=replace(PRESETS["scratch"]().augment, flip=0.1)),
        ),
        (
            {"recipe": Recipe(lr=0.1), "epochs": 2},
            "train('shards', Recipe(epochs=2, lr=0.1))",
            Recipe(epochs=2, lr=0.1),
        ),
        (
            {"config": "scratch", "lr": 0.1},
            "train('shards', replace(recipe, lr=0.1))",
            replace(PRESETS["scratch"](), lr=0.1),
        ),
        ({"amp": False, "fp16": True}, "train('shards', Recipe(precision='float16'))", Recipe(precision="float16")),
        ({"warmup_steps": 500, "lr": 0.1}, "train('shards', Recipe(lr=0.1))", Recipe(lr=0.1)),
        ({"epohcs": 2, "foo": 1}, "train('shards', Recipe(epochs=2))", Recipe(epochs=2)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_fields_of_a_recipe_that_are_passed_to_train_are_answered_with_the_call_that_works(
    given: dict[str, Any], call: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines are run, with a `train` that only returns its recipe."""
    with pytest.raises(ArgumentError) as error:
        train("shards", **given)
    lines = [line.strip() for line in str(error.value).partition("\nType:\n")[2].splitlines()]
    assert lines[-1] == call
    monkeypatch.setattr("fastflower.train", lambda shards, recipe, **_: (shards, recipe))
    names = dict[str, Any]()
    exec("\n".join([*lines[:-1], f"made = {lines[-1]}"]), names)
    assert names["made"] == ("shards", recipe)


@pytest.mark.parametrize("given", [{"hflip": True}, {"epochs": "two"}, {"foo": 1}, {"output_dir": "x"}])
def test_a_keyword_whose_value_does_not_fit_is_answered_without_a_call(given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError) as error:
        train("shards", **given)
    assert "Type:" not in str(error.value)


def test_a_missing_argument_is_seen_beside_those_that_are_given_by_name() -> None:
    with pytest.raises(ArgumentError, match=r"^evaluate needs checkpoint, as in evaluate\('runs/a', 'flowers'\)\.$"):
        evaluate(shards="flowers")  # pyright: ignore[reportCallIssue]


def test_replace_is_answered_too() -> None:
    with pytest.raises(ArgumentError, match=r"^learning_rate: Recipe has no such argument; did you mean lr\?$"):
        replace(Recipe(), learning_rate=0.1)


def test_fields_come_by_name_and_checkpoints_are_loaded() -> None:
    with pytest.raises(ArgumentError, match=r"^Recipe takes its fields by name, got 'resnet50'\.$"):
        Recipe("resnet50")  # pyright: ignore[reportCallIssue]  (wrong on purpose)
    with pytest.raises(ArgumentError, match=r"; to load a file, call Checkpoint\.load\('runs/x'\)\.$"):
        Checkpoint("runs/x")  # pyright: ignore[reportCallIssue]  (wrong on purpose)


def test_a_batch_size_in_place_of_the_split_is_told() -> None:
    with pytest.raises(ArgumentError, match=r"^split must be .* \(for batches of 8, pass batch_size=8\), got 8\.$"):
        Loader("shards", 8)  # pyright: ignore[reportArgumentType]  (wrong on purpose)


def test_swapped_arguments_of_train_are_told(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^shards come first: train\(shards, recipe\)\.$"):
        train(Recipe(), tmp_path)  # pyright: ignore[reportArgumentType]  (wrong on purpose)


def test_train_takes_the_name_of_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"for example 'scratch', got 'scrath'\.$"):
        train(tmp_path, "scrath")
    with pytest.raises(ArgumentError, match=r"for example Recipe\(epochs=2\), got \{'epochs': 2\}\.$"):
        train(tmp_path, {"epochs": 2})  # pyright: ignore[reportArgumentType]  (wrong on purpose)
    from fastflower.recipes.presets import checked

    assert checked("scratch") == PRESETS["scratch"]()


VALUES = [Recipe(), Augment(), *(make() for make in PRESETS.values())]
VALUES += [Augment(mean=(0.1, 0.2, 0.3), size=(32, 48), resize="off"), Recipe(augment=Augment(), weights=None)]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_the_repr_of_recipes_is_short_and_evaluates_to_them(value: Recipe | Augment) -> None:
    assert eval(repr(value)) == value


def test_reprs() -> None:
    assert repr(Recipe(epochs=3)) == "Recipe(epochs=3)"
    assert repr(Augment()) == "Augment()"
    prediction = Prediction(Path("a.jpg"), "rose", 0.9312, {}, "a.jpg", 2)
    assert repr(prediction) == "Prediction(path='a.jpg', class_name='rose', probability=0.9312, index=2)"
    assert repr(Prediction(None, "rose", 1.0, {}, "image 0")).startswith("Prediction(name='image 0', class_name='rose'")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    augment = Augment(size=32, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    predictor = Predictor(network, classes=("a", "b"), augment=augment, device="cpu")
    assert repr(predictor) == "Predictor('Sequential', classes=2, size=32x32, device='cpu')"
