"""Recipes are frozen, survive a dictionary and JSON, and refuse invalid fields."""

import json
import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from fastflower.draws.augment import Augment
from fastflower.errors import ArgumentError
from fastflower.models.backbone import build
from fastflower.recipes.presets import PRESETS
from fastflower.recipes.recipe import Recipe

UNUSUAL = Recipe(
    backbone="densenet121",
    weights="weights/mine.pth",
    freeze=2,
    sizes=(64, 96),
    patience=4,
    ema=0.99,
    checkpointing=True,
    graph=False,
    sync_batchnorm=True,
    tta=True,
    augment=Augment(
        size=(96, 128),
        resize=(100, 140),
        crop=(0.3, 0.7),
        crop_ratio=(0.9, 1.1),
        flip_vertical=0.25,
        rotate=15,
        affine_rotate=5,
        translate=(0.1, 0.2),
        scale=(0.8, 1.2),
        shear=(3.0, 4.0),
        hue=0.1,
        erase=0.5,
        erase_value=(0.1, 0.2, 0.3),
        fill="photo",
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.3, 0.4),
        fixed=True,
    ),
    epochs=3,
    batch_size=7,
    balanced=True,
    optimizer="adamw",
    clip_norm=1.5,
    accumulate=2,
    warmup_epochs=0.5,
    lr=0.3,
    layer_decay=0.75,
    head_lr=0.5,
    drop_path=0.1,
    momentum=0.0,
    weight_decay=0.01,
    schedule="cosine",
    step_epochs=2,
    gamma=0.5,
    label_smoothing=0.2,
    precision="float16",
    seed=11,
)
RECIPES = [pytest.param(preset(), id=name) for name, preset in PRESETS.items()]


@pytest.mark.parametrize(
    "recipe", [*RECIPES, pytest.param(UNUSUAL, id="unusual"), pytest.param(Recipe(soup=5, recalibrate=True), id="soup")]
)
def test_a_recipe_survives_a_dictionary_and_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    through_json = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert through_json == recipe
    assert through_json.augment.draw(0, 0, [3], [[300, 400]]).size == recipe.augment.output_size
    assert hash(through_json) == hash(recipe)  # no list is left in it


def test_the_unusual_recipe_differs_from_the_default_in_every_field() -> None:
    same = [field.name for field in fields(Recipe) if getattr(UNUSUAL, field.name) == getattr(Recipe(), field.name)]
    assert same == ["soup", "recalibrate", "compile"]  # not allowed with patience, nor with checkpointing


BUILT = {
    (made.backbone, made.freeze or 0, made.augment.output_size) for made in (preset() for preset in PRESETS.values())
}


@pytest.mark.parametrize(("backbone", "freeze", "size"), sorted(BUILT))
def test_presets_name_backbones_that_can_be_built(backbone: str, freeze: int, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        network = build(backbone, 5, weights=None, freeze=freeze)
        logits = network.eval()(torch.empty(1, 3, *size))
    assert logits.shape == (1, 5)


def test_sizes_may_be_a_list() -> None:
    assert replace(Recipe(), sizes=[64, 96]) == replace(Recipe(), sizes=(64, 96))  # pyright: ignore[reportArgumentType]


def test_presets_differ() -> None:
    assert len({preset() for preset in PRESETS.values()}) == len(PRESETS)


def test_a_recipe_is_frozen_and_can_be_replaced() -> None:
    recipe = Recipe()
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'epochs'"):
        recipe.epochs = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert replace(recipe, epochs=3) == Recipe(epochs=3)
    assert recipe.epochs == 15


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("freeze", -1, "an integer, at least 0"),
        ("epochs", 0, "an integer, at least 1"),
        ("batch_size", 0, "an integer, at least 1"),
        ("lr", 0.0, "a number above 0"),
        ("lr", float("nan"), "a number above 0"),
        ("momentum", 1.0, "a number in [0, 1)"),
        ("momentum", -0.1, "a number in [0, 1)"),
        ("weight_decay", -1e-4, "a number, 0 or more"),
        ("schedule", "linear", "one of constant, step, cosine, one_cycle, exponential_cosine, three_phase"),
        ("step_epochs", 0, "an integer, at least 1"),
        ("gamma", 0.0, "a number above 0"),
        ("label_smoothing", 1.0, "a number in [0, 1)"),
        ("label_smoothing", -0.1, "a number in [0, 1)"),
        ("sizes", (128, 0), "sizes in pixels, or fractions of the size above 0 and up to 1"),
        ("patience", 0, "an integer, at least 1"),
        ("ema", 1.0, "a number in (0, 1)"),
        ("ema", 0.0, "a number in (0, 1)"),
        ("soup", 0, "an integer, at least 1"),
        ("soup", 4, "a divisor of epochs"),
        ("precision", "double", "one of auto, bfloat16, float16, float32"),
        ("precision", "bf16", "one of auto, bfloat16, float16, float32 (did you mean 'bfloat16'?)"),
        ("optimizer", "AdamW", "one of sgd, adam, adamw (did you mean 'adamw'?)"),
    ],
)
def test_a_field_outside_its_rule_is_refused(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ArgumentError, match="Recipe") as error:
        Recipe(**{field: value})
    assert str(error.value) == f"Recipe.{field} must be {rule}, got {value!r}."


def test_recalibrate_excludes_early_stopping() -> None:
    with pytest.raises(ArgumentError, match=r"^Recipe\.recalibrate must be False if patience is set, got True\.$"):
        Recipe(recalibrate=True, patience=2)


@pytest.mark.parametrize("other", [{"ema": 0.9}, {"patience": 2}])
def test_a_soup_excludes_ema_and_early_stopping(other: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"^Recipe\.soup must be 1 if ema or patience is set, got 3\.$"):
        Recipe(soup=3, **other)


def test_a_stored_augment_outside_its_rule_is_refused() -> None:
    values = Recipe().to_dict()
    values["augment"]["flip"] = 2
    with pytest.raises(ArgumentError, match=r"Augment\.flip must be a probability in \[0, 1\], got 2\."):
        Recipe.from_dict(values)


JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1}
SHIFT = {"translate": (0.1, 0.1)}
# From the reports: (backbone, optimizer, epochs, batch size, frozen stages, batches per update) and augmentation.
A = ("resnet18", "sgd", 15, 32, 0, 1), {"flip": 0.5, "rotate": 10, **SHIFT, **JITTER}
B = {"flip": 0.1, "rotate": 30, **SHIFT, **JITTER}
C = {"flip": 0.5, "flip_vertical": 0.5, **JITTER}
REPORTED: dict[str, tuple[tuple[str, str, int, int, int, int], dict[str, Any]]] = {
    "report-a": A,
    "report-b": (("resnet18", "sgd", 20, 32, 0, 1), B),
    "report-b-batch64": (("resnet18", "sgd", 20, 64, 0, 1), B),
    "report-b-resnet34": (("resnet34", "sgd", 20, 32, 0, 1), B),
    "report-c": (("resnet18", "sgd", 15, 32, 0, 1), C),
    "report-c-batch64": (("resnet18", "sgd", 15, 64, 0, 1), C),
    "report-c-batch128": (("resnet18", "sgd", 15, 128, 0, 1), C),
    "report-c-resnet50": (("resnet50", "sgd", 15, 128, 0, 1), C),
    "report-c-resnet50-frozen": (("resnet50", "sgd", 15, 128, 2, 1), C),
    "report-c-densenet121": (("densenet121", "sgd", 15, 128, 0, 1), C),
    "report-d": (("resnet18", "adam", 25, 32, 0, 1), A[1]),
    "report-d-50": (("resnet18", "adam", 50, 32, 0, 1), A[1]),
    **{
        f"report-e-{backbone}-freeze{freeze}-{kind}": (
            (backbone, "adam", 10, 32, freeze, 2),
            {"flip": 0.5, "erase": 0.5, "fixed": kind == "fixed"},
        )
        for backbone in ("resnet101", "resnet152", "vgg11")
        for freeze in (2, 3)
        for kind in ("fixed", "mixed")
    },
    "report-e-resnet101-40": (("resnet101", "adam", 40, 32, 2, 2), {"flip": 0.5, "erase": 0.5, "fixed": False}),
}


def test_every_recipe_of_a_report_is_in_the_table() -> None:
    assert {name for name in PRESETS if name.startswith("report-")} == set(REPORTED)


@pytest.mark.parametrize("name", REPORTED)
def test_the_recipe_of_a_report_is_what_the_report_says(name: str) -> None:
    expected, drawn = REPORTED[name]
    recipe = PRESETS[name]()
    found = (
        recipe.backbone,
        recipe.optimizer,
        recipe.epochs,
        recipe.batch_size,
        recipe.freeze,
        recipe.accumulate,
    )
    assert found == expected
    assert recipe.resolved.augment == Augment(crop=(0.08, 1.0), **drawn).resolved
    assert (recipe.momentum, recipe.weights, recipe.weight_decay) == (0.9, "DEFAULT", 0)
    assert (recipe.sizes, recipe.ema, recipe.tta, recipe.patience) == ((), None, False, None)


def rates(recipe: Recipe, steps_per_epoch: int = 1) -> list[float]:
    """Return the learning rate of each step of a run."""
    return [recipe.lr_at(step, steps_per_epoch) for step in range(recipe.epochs * steps_per_epoch)]


@pytest.mark.parametrize("name", [name for name in REPORTED if name[7] in "abc"])
def test_reports_a_to_c_have_the_learning_rates_of_step_lr(name: str) -> None:
    recipe = PRESETS[name]()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.001, momentum=0.9)
    scheduler = StepLR(optimizer, 7, 0.1)
    expected: list[float] = []
    for _ in range(recipe.epochs):
        expected += 3 * [optimizer.param_groups[0]["lr"]]
        optimizer.step()
        scheduler.step()
    assert rates(recipe, 3) == pytest.approx(expected)


def test_report_d_divides_the_learning_rate_by_ten_after_25_epochs() -> None:
    assert rates(PRESETS["report-d"](), 3) == pytest.approx([0.001] * 75)
    assert rates(PRESETS["report-d-50"](), 3) == pytest.approx([0.001] * 75 + [0.0001] * 75)


def test_report_e_warms_up_for_an_epoch_and_its_long_run_decays_to_zero() -> None:
    found = rates(PRESETS["report-e-vgg11-freeze3-mixed"](), 10)
    assert found[:10] == sorted(found[:10])
    assert found[0] == pytest.approx(1e-6)
    assert found[10:] == pytest.approx([1e-4] * 90)
    long = rates(PRESETS["report-e-resnet101-40"](), 10)
    assert long[::100] == pytest.approx([1e-6, 1e-4, 1e-4 * 0.9**10, 1e-4 * 0.9**10 / 2])
    assert long[50] == pytest.approx(1e-4 * (0.01 + 0.99 / 2))
    assert long[150] == pytest.approx(1e-4 * 0.9**5)
    assert long[:100] == sorted(long[:100])
    assert long[100:] == sorted(long[100:], reverse=True)
    assert 0 <= long[-1] < 1e-8


def test_the_fifth_reports_formula_as_printed_gives_what_its_docstring_says() -> None:
    """The phases of the recipe equal the printed ones, each up to its scale."""
    first, last, gamma, total = 1e-6, 1e-4, 0.9, 40

    def printed(epoch: float) -> float:
        if epoch < 10:
            return first / last + (1 - first / last) * epoch / 10
        if epoch <= 20:
            return last / first * gamma ** (epoch - 10)
        return last / first * math.cos(math.pi * (epoch - 20) / (total - 20)) + last

    values = [printed(epoch) for epoch in (0, 10 - 1e-9, 10, 20, 20 + 1e-9, 40)]
    assert values == pytest.approx([0.01, 1, 100, 34.87, 100, -100], rel=1e-3)
    recipe = PRESETS["report-e-resnet101-40"]()
    found = [rate / recipe.lr for rate in rates(recipe, 10)]
    assert found[:100] == pytest.approx([printed(step / 10) for step in range(100)])
    assert found[100:201] == pytest.approx([printed(step / 10) / printed(10) for step in range(100, 201)])
    cosines = [(printed(step / 10) - last) / printed(10) for step in range(201, 400)]  # from 1 to -1
    assert found[201:] == pytest.approx([gamma**10 * (1 + value) / 2 for value in cosines])


@pytest.mark.parametrize("epochs", range(1, 14))
def test_sizes_are_spread_evenly_over_the_epochs_in_order(epochs: int) -> None:
    for count in range(1, epochs + 1):
        sizes = tuple(range(32, 32 + count))
        recipe = Recipe(epochs=epochs, sizes=sizes)
        found = [recipe.augment_at(epoch).output_size for epoch in range(epochs)]
        assert found == sorted(found)
        assert {found.count((side, side)) for side in sizes} <= {epochs // count, -(-epochs // count)}


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 12])
def test_the_last_epoch_has_the_last_size_even_with_more_sizes_than_epochs(epochs: int) -> None:
    recipe = Recipe(epochs=epochs, sizes=(96, 112, 128, 144, 160))
    assert recipe.augment_at(epochs - 1).output_size == (160, 160)


def test_a_size_scales_resize_and_keeps_proportions_and_everything_else() -> None:
    augment = replace(UNUSUAL.augment, size=(96, 128), resize=(100, 140))
    recipe = Recipe(augment=augment, epochs=2, sizes=(48, 96))
    assert recipe.augment_at(0) == replace(augment, size=(48, 64), resize=(50, 70))
    assert recipe.augment_at(1) == augment
    square = Recipe(augment=Augment(size=224, resize=256, flip=0.5), epochs=1, sizes=(112,))
    assert square.augment_at(0) == Augment(size=112, resize=128, flip=0.5)
    crops = Recipe(augment=Augment(size=32, resize="off", random_crop=True, padding=4), epochs=1, sizes=(24,))
    assert crops.augment_at(0) == replace(crops.augment, size=24)


def test_without_sizes_every_epoch_has_the_augment_itself() -> None:
    recipe = Recipe()
    assert all(recipe.augment_at(epoch) is recipe.augment for epoch in range(recipe.epochs))
