"""Named recipes, as functions: the experiments of the student reports, and our own."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from inspect import signature
from itertools import product
from typing import Any, cast

from fastflower.draws.augment import Augment
from fastflower.draws.color import IMAGENET_MEAN, IMAGENET_STD
from fastflower.errors import ArgumentError, require
from fastflower.recipes.recipe import Recipe

# The view of the reports' own programs, whatever the weights expect.
_VIEW = Augment(size=224, crop=(0.08, 1.0), flip=0.5, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def default() -> Recipe:
    """Return the default: ResNet-18 from ImageNet weights, SGD, 15 epochs, random crop and flip."""
    return Recipe()


def report_a() -> Recipe:
    """Return the first student report's recipe: ResNet-18, 15 epochs, batch size 32.

    SGD with momentum 0.9, lr 0.001, StepLR(7, 0.1). Augmentations: resized crop, flip, rotation by 10 degrees, color
    jitter and an affine transform. The report does not state the strengths of the last two. We use the second report's:
    jitter 0.2, hue 0.1 and a shift of 10%.
    """
    augment = replace(_VIEW, rotate=10, translate=(0.1, 0.1), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
    return Recipe(augment=augment)


def report_b(batch_size: int = 32, backbone: str = "resnet18") -> Recipe:
    """Return the second student report's recipe: SGD, 20 epochs, rotation, jitter.

    SGD with momentum 0.9, lr 0.001, StepLR(7, 0.1). Augmentations: resized crop, flip with probability 0.1,
    rotation by 30 degrees, jitter 0.2, hue 0.1 and a shift of 10%. The report does not state the area of the crop. We
    use torchvision's default, 0.08 to 1.
    """
    augment = replace(report_a().augment, flip=0.1, rotate=30)
    return Recipe(augment=augment, epochs=20, batch_size=batch_size, backbone=backbone)


def report_c(batch_size: int = 32, backbone: str = "resnet18", freeze: int = 0) -> Recipe:
    """Return the third student report's recipe: SGD, 15 epochs, flips in both directions, jitter.

    The learning rate decays. The report does not state the strength of jitter (here 0.2, hue 0.1), or the momentum,
    learning rate, schedule and number of epochs (here the first report's). It does not state the batch size of its
    architecture comparison either. We use 128: in that comparison, ResNet-18 is as accurate as in the run at batch size 128.
    """
    augment = replace(report_a().augment, rotate=0.0, translate=(0.0, 0.0), flip_vertical=0.5)
    return Recipe(augment=augment, batch_size=batch_size, backbone=backbone, freeze=freeze)


def report_d(epochs: int = 25) -> Recipe:
    """Return the fourth student report's recipe: ResNet-18, Adam, rotation, jitter.

    Batch size 32, 25 epochs at lr 0.001. With 50 epochs, the last 25 are at lr 0.0001. Augmentations: resized crop, flip,
    rotation, color jitter and an affine transform. The report does not define its "step schedule" (here a factor of 0.1
    after 25 epochs, as its two runs suggest). It does not say whether Adam's moments were reset after 25 epochs (here they
    are not), and it does not state the strengths of rotation, jitter and affine transform (here the first report's).
    """
    return replace(report_a(), optimizer="adam", epochs=epochs, step_epochs=25)


def report_e(backbone: str = "resnet101", freeze: int = 2, *, fixed: bool = False) -> Recipe:
    """Return the fifth student report's recipe: Adam, 10 epochs, random erasing.

    fixed  True: use the same draw for a sample in every epoch. False ("mixed"): use a new draw in every epoch.

    Other augmentations: resized crop and flip. The report does not state the learning rate (here 0.0001, common for
    Adam with pretrained weights), the batch size (here 32), batches per update (here 2), the schedule (here one
    epoch of linear warm-up, then constant), or the strengths of crop and erasing (here torchvision's defaults).
    """
    return Recipe(
        backbone=backbone,
        freeze=freeze,
        augment=replace(_VIEW, erase=0.5, fixed=fixed),
        epochs=10,
        accumulate=2,
        lr=1e-4,
        optimizer="adam",
        schedule="constant",
        warmup_epochs=1,
    )


def report_e_long() -> Recipe:
    """Return the fifth student report's long recipe: ResNet-101, 40 epochs, warm-up, exponential decay, then cosine.

    The report prints this formula, without values for lr_init, lr_final, gamma and epoch_tot:
        epoch < 10          lr_init/lr_final + (1 - lr_init/lr_final) * epoch/10
        10 <= epoch <= 20   (lr_final/lr_init) * gamma^(epoch - 10)
        epoch > 20          (lr_final/lr_init) * cos(pi * (epoch - 20)/(epoch_tot - 20)) + lr_final
    The first line is a fraction of lr_final; the others are multiples of lr_init. With lr_init 1e-6 and lr_final 1e-4,
    the formula would rise from 0.01 to 1, jump to 100 at epoch 10, decay to 35 at epoch 20 (gamma 0.9), jump to 100
    again, and end at -100. We implement it without the jumps: 10 epochs of linear warm-up to lr, decay by gamma per
    epoch until epoch 20, then half a cosine down to 0 at epoch 40. The report does not state gamma (here 0.9), the
    start of the warm-up (here 1%), or the values that `report_e` lists. Two stages are frozen.
    """
    return replace(report_e(), epochs=40, schedule="exponential_cosine", warmup_epochs=10, gamma=0.9)


def scratch() -> Recipe:
    """Return the demo's recipe: ResNet-18 from random weights, 128 pixels, 10 epochs, fast without a GPU."""
    augment = Augment(size=128, crop=(0.25, 1.0), flip=0.5, rotate=10, brightness=0.2, contrast=0.2, saturation=0.2)
    return Recipe(
        weights=None, augment=augment, epochs=10, lr=0.01, weight_decay=5e-4, schedule="one_cycle", label_smoothing=0.1
    )


def finetune(freeze: int | None = None) -> Recipe:
    """Return our fine-tuning recipe: ResNet-50, 5 epochs of one-cycle SGD, growing sizes.

    It suits other backbones too: half of the stages are frozen, and sizes do not grow if the backbone takes only one.
    Image sizes grow, which halves the number of pixels to process. The last epoch trains near the validation size, and
    batch norm statistics are recomputed at that size. Otherwise, a network trained only at up to 160 pixels would be
    less confident at 224 (Touvron et al. 2019; measurements in docs/log.md).
    """
    return Recipe(
        backbone="resnet50",
        freeze=freeze,
        augment=Augment(crop=(0.25, 1.0), flip=0.5),
        sizes=(0.57, 0.57, 0.64, 0.71, 0.86),  # 128, 128, 144, 160, 192 of 224
        epochs=5,
        lr=0.01,
        weight_decay=1e-4,
        schedule="one_cycle",
        label_smoothing=0.1,
        recalibrate=True,
    )


def finetune_long(freeze: int | None = None) -> Recipe:
    """Return our long fine-tuning recipe: the mean of two runs of 10 epochs, larger sizes, more augmentation.

    finetune with rotation, jitter, erasing and mixup.
    """
    short = finetune(freeze)
    augment = replace(_varied(short.augment), erase=0.25)
    return replace(short, augment=augment, epochs=20, soup=2, sizes=(0.71, 0.71, 0.86, 0.86, 1.0))


def _varied(augment: Augment) -> Augment:
    return replace(augment, rotate=15, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, mixup=0.2)


def finetune_small() -> Recipe:
    """Return our fine-tuning recipe for a small network: EfficientNet-Lite0, 8 epochs, weights from a Python package.

    `finetune` with no stage frozen, a higher rate, rotation, jitter, mixup, test-time augmentation, and the sizes 128, 128,
    160, 160, 160, 192, 192, 192. The weights are those of the extra `demo`.
    """
    small = replace(finetune(freeze=0), backbone="timm/tf_efficientnet_lite0", weights="lite0", lr=0.02, tta=True)
    sizes = (0.57, 0.57, 0.71, 0.71, 0.71, 0.86, 0.86, 0.86)
    return replace(small, augment=_varied(small.augment), epochs=8, sizes=sizes)


PRESETS: dict[str, Callable[[], Recipe]] = {
    "default": default,
    "report-a": report_a,
    "report-b": report_b,
    "report-b-batch64": partial(report_b, 64),
    "report-b-resnet34": partial(report_b, backbone="resnet34"),
    "report-c": report_c,
    "report-c-batch64": partial(report_c, 64),
    "report-c-batch128": partial(report_c, 128),
    "report-c-resnet50": partial(report_c, 128, "resnet50"),
    "report-c-resnet50-frozen": partial(report_c, 128, "resnet50", freeze=2),
    "report-c-densenet121": partial(report_c, 128, "densenet121"),
    "report-d": report_d,
    "report-d-50": partial(report_d, 50),
    **{
        f"report-e-{backbone}-freeze{freeze}-{'fixed' if fixed else 'mixed'}": partial(
            report_e, backbone, freeze, fixed=fixed
        )
        for backbone, freeze, fixed in product(("resnet101", "resnet152", "vgg11"), (2, 3), (True, False))
    },
    "report-e-resnet101-40": report_e_long,
    "scratch": scratch,
    "finetune-small": finetune_small,
    "finetune": finetune,
    "finetune-unfrozen": partial(finetune, freeze=0),
    "finetune-long": finetune_long,
    "finetune-long-unfrozen": partial(finetune_long, freeze=0),
}
"""Recipes by name on the command line (`--recipe NAME`)."""


def phrase(name: str) -> str:
    """Return what a recipe is, in one phrase: its function's first line and arguments."""
    preset = PRESETS[name]
    made = cast("partial[Recipe]", preset if isinstance(preset, partial) else partial(preset))
    first = (made.func.__doc__ or "").partition("\n")[0].removeprefix("Return ").removesuffix(".")
    values = signature(made.func).bind(*made.args, **made.keywords)
    values.apply_defaults()
    said = {key.replace("_", " "): value for key, value in values.arguments.items() if value is not None}
    return ", ".join([first, *(f"{key} {value}" for key, value in said.items())])


def checked(recipe: object) -> Recipe:
    """Return a recipe, also that of a name, and the default one for None. Raises ArgumentError for anything else."""
    recipe = Recipe() if recipe is None else recipe
    recipe = PRESETS[recipe]() if isinstance(recipe, str) and recipe in PRESETS else recipe
    rule = f"a Recipe, or the name of one, for example {_example(recipe)}"
    require(isinstance(recipe, Recipe), "recipe", rule, recipe)
    return cast("Recipe", recipe)


def _example(recipe: object) -> str:
    """Return what was meant in place of a name that is not known, or of a dictionary of fields."""
    if isinstance(recipe, dict) and recipe:
        with suppress(ArgumentError):
            return repr(Recipe(**cast("dict[str, Any]", recipe)))
    near = get_close_matches(recipe, PRESETS, 3, 0.5) if isinstance(recipe, str) else []
    return " or ".join(map(repr, near or ["finetune"]))
