"""Recipes by name, as functions: the reports' experiments, and ours."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

from fastflower.draws.augment import Augment
from fastflower.recipes.recipe import Recipe


def report_a() -> Recipe:
    """ResNet-18 as in the first student report: 15 epochs of SGD 0.9 at 0.001, StepLR(7, 0.1), batch 32.

    Its augmentations are resized crop, flip, rotation 10, jitter and affine. The report leaves open: the amounts of jitter
    and affine (here 0.2, hue 0.1 and a shift of 10%, as in the second report).
    """
    augment = Augment(crop=(0.08, 1.0), flip=0.5, rotate=10, translate=(0.1, 0.1))
    return Recipe(augment=replace(augment, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1))


def report_b(batch_size: int = 32, backbone: str = "resnet18") -> Recipe:
    """As in the second student report: 20 epochs of SGD 0.9 at 0.001, StepLR(7, 0.1); its batch sizes and networks compared.

    Resized crop, flip with probability 0.1, rotation 30, jitter 0.2 and hue 0.1, a shift of 10%. The report leaves open: the
    crop's scale (torchvision's 0.08 .. 1).
    """
    augment = replace(report_a().augment, flip=0.1, rotate=30)
    return Recipe(augment=augment, epochs=20, batch_size=batch_size, backbone=backbone)


def report_c(batch_size: int = 32, backbone: str = "resnet18", freeze: int = 0) -> Recipe:
    """As in the third student report: SGD with a decaying rate; crop, flips both ways, jitter.

    The report leaves open: the amounts of jitter (here 0.2, hue 0.1), momentum, rate, schedule and epochs (here those of the
    first report), and the batch of its comparison of networks: ResNet-18 stands there with what it reached at 128, so that the
    others are trained at 128 too.
    """
    augment = replace(report_a().augment, rotate=0.0, translate=(0.0, 0.0), flip_vertical=0.5)
    return Recipe(augment=augment, batch_size=batch_size, backbone=backbone, freeze=freeze)


def report_d(epochs: int = 25) -> Recipe:
    """As in the fourth student report: ResNet-18, Adam at 0.001 for 25 epochs, batch 32; of 50 epochs the rest at 0.0001.

    Crop, flip, rotation, jitter and affine. The report leaves open: the step of its "step schedule" (here the one that its two
    runs describe: by 0.1 after 25 epochs), whether Adam's moments began anew with the second half (here they go on), and the
    amounts of rotation, jitter and affine (those of the first report).
    """
    return replace(report_a(), optimizer="adam", epochs=epochs, step_epochs=25)


def report_e(backbone: str = "resnet101", freeze: int = 2, *, fixed: bool = False) -> Recipe:
    """As in the fifth student report: 10 epochs of Adam, the first 2 or 3 stages frozen; crop, flip and random erasing.

    fixed: the same draw for a sample in every epoch, otherwise ("mixed") a new one. The report leaves open: the rate (here
    0.0001, usual for Adam on pretrained weights), the batch (32) and how many of them an update takes (2), the schedule of
    these ten epochs (here a linear warm-up over one, then constant), and the amounts of cropping and erasing (torchvision's).
    """
    augment = Augment(crop=(0.08, 1.0), flip=0.5, erase=0.5, fixed=fixed)
    return Recipe(
        backbone=backbone,
        freeze=freeze,
        augment=augment,
        epochs=10,
        accumulate=2,
        lr=1e-4,
        optimizer="adam",
        schedule="constant",
        warmup_epochs=1,
    )


def report_e_long() -> Recipe:
    """The fifth report's ResNet-101 over 40 epochs: linear warm-up, exponential decay, cosine.

    It prints, of lr_init, lr_final, gamma and epoch_tot, without a value for any:
        epoch < 10          lr_init/lr_final + (1 - lr_init/lr_final) * epoch/10
        10 <= epoch <= 20   (lr_final/lr_init) * gamma^(epoch - 10)
        epoch > 20          (lr_final/lr_init) * cos(pi * (epoch - 20)/(epoch_tot - 20)) + lr_final
    The first line is a share of lr_final, the others are multiples of lr_init: from 1e-6 to 1e-4 that would be 0.01 up to 1, then
    100 at epoch 10, 35 at epoch 20 (gamma 0.9), 100 right after it, and -100 at the end. It is read as one rate without jumps:
    a linear warm-up over 10 epochs to lr, decay by gamma an epoch until epoch 20, and half a cosine from there to 0 at epoch 40.
    Left open: gamma (here 0.9), where the warm-up starts (here a hundredth) and all that `report_e` names; two stages are frozen.
    """
    return replace(report_e(), epochs=40, schedule="exponential_cosine", warmup_epochs=10, gamma=0.9)


def scratch() -> Recipe:
    """ResNet-18 from random weights at 128 pixels: the demo's recipe, chosen to be quick without a GPU."""
    augment = Augment(size=128, crop=(0.25, 1.0), flip=0.5, rotate=10, brightness=0.2, contrast=0.2, saturation=0.2)
    return Recipe(
        weights=None, augment=augment, epochs=10, lr=0.01, weight_decay=5e-4, schedule="one_cycle", label_smoothing=0.1
    )


def finetune(freeze: int = 2) -> Recipe:
    """Pretrained ResNet-50, two stages frozen, five epochs of one-cycle SGD to 0.01 at growing sizes: half of the pixels.

    The last epoch is trained near the size of validation, and batch norms' statistics are computed anew at that: a network that
    saw no more than 160 pixels is less sure of itself at 224 (Touvron et al. 2019; docs/log.md has the measurements).
    """
    return Recipe(
        backbone="resnet50",
        freeze=freeze,
        augment=Augment(crop=(0.25, 1.0), flip=0.5),
        sizes=(128, 128, 144, 160, 192),
        epochs=5,
        lr=0.01,
        weight_decay=1e-4,
        schedule="one_cycle",
        label_smoothing=0.1,
        recalibrate=True,
    )


def finetune_long(freeze: int = 2) -> Recipe:
    """The mean of two trainings of ten epochs at larger sizes; images are also turned, recolored, erased and mixed."""
    short = finetune(freeze)
    augment = replace(
        short.augment, rotate=15, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, erase=0.25, mixup=0.2
    )
    return replace(short, augment=augment, epochs=20, soup=2, sizes=(160, 160, 192, 192, 224))


PRESETS: dict[str, Callable[[], Recipe]] = {
    "default": Recipe,
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
    "finetune": finetune,
    "finetune-unfrozen": partial(finetune, freeze=0),
    "finetune-long": finetune_long,
    "finetune-long-unfrozen": partial(finetune_long, freeze=0),
}
"""What `--recipe NAME` names on the command line."""
