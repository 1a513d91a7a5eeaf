"""Transforms that Augment cannot draw are refused by name, with what to do."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models, transforms
from torchvision.transforms import v2 as transforms_v2

from fastflower.draws.augment import Augment
from fastflower.errors import ArgumentError

# torchvision accepts more than its annotations allow.
v1: Any = transforms
v2: Any = transforms_v2
WEIGHTS: Any = models.ResNet18_Weights.DEFAULT
ON_IMAGES = "To apply it to the images of a batch, see docs/augmentation.md."


def to_rgb(image: Any) -> Any:
    return image.convert("RGB")


CROP = v1.RandomResizedCrop(64)
ERASING = v1.RandomErasing()
NORMALIZE = v1.Normalize((0.5,), (0.5,))
REFUSED: list[tuple[list[Any], str]] = [
    (
        [CROP, v1.GaussianBlur(3)],
        "GaussianBlur has no equivalent in Augment, which supports RandomResizedCrop, Resize, CenterCrop, RandomCrop, Pad, ",
    ),
    ([CROP, v1.RandomApply([v1.GaussianBlur(3)])], f"RandomApply. {ON_IMAGES}"),
    ([CROP, nn.ReLU()], "ReLU has no equivalent in Augment, which supports "),
    (
        [v1.Lambda(to_rgb), CROP],
        "Lambda of torchvision.transforms.transforms is code that Augment cannot read; leave it out. Images are always RGB "
        f"here, so no code needs to convert them. {ON_IMAGES}",
    ),
    (
        [CROP, to_rgb],
        f"to_rgb of {__name__} is code that Augment cannot read; leave it out. Images are always RGB here",
    ),
    ([[CROP]], "The closest alternative is Compose, with this list in it."),
    ([v1.RandomResizedCrop], "RandomResizedCrop'> only makes a transform; pass what it makes, such as "),
    (
        [WEIGHTS],
        "ResNet18_Weights.IMAGENET1K_V1 only makes a transform; pass what it makes, such as weights.transforms(), with "
        "parentheses.",
    ),
    (
        [partial(v1.RandomCrop, 64)],
        "only makes a transform; pass what it makes, such as weights.transforms(), with parentheses.",
    ),
    ([v1.Resize(70), v1.FiveCrop(64)], "CenterCrop; evaluate(tta=True) averages each image and its flip."),
    ([v1.Resize(70), v1.TenCrop(64)], "CenterCrop; evaluate(tta=True) averages each image and its flip."),
    ([CROP, v1.RandomPerspective()], "The closest alternative is RandomAffine(shear=...)."),
    ([CROP, v1.Grayscale()], "Grayscale gives one channel, but images here always have three; use Grayscale(3)."),
    ([CROP, NORMALIZE, v1.RandomGrayscale()], "RandomGrayscale comes after Normalize; normalize later."),
    ([CROP, v1.RandomErasing(), v1.Grayscale(3)], "Grayscale comes after RandomErasing; erase last."),
    (
        [CROP, v1.TrivialAugmentWide()],
        f"The closest alternative is RandomRotation, ColorJitter and RandomAffine. {ON_IMAGES}",
    ),
    (
        [CROP, v1.RandomChoice([v1.RandomRotation(5)])],
        "The closest alternative is the one of its transforms that matters",
    ),
    ([CROP, v1.RandomOrder([v1.RandomRotation(5)])], "The closest alternative is its transforms in a fixed order."),
    ([CROP, v1.RandAugment()], "RandAugment has no equivalent in Augment"),
    ([CROP, v1.AutoAugment()], "AutoAugment has no equivalent in Augment"),
    (
        [CROP, v2.MixUp(num_classes=5)],
        "The closest alternative is the field mixup=alpha, which mixes neighbors in a batch.",
    ),
    ([CROP, v2.CutMix(num_classes=5)], "The closest alternative is the field cutmix=alpha, which mixes neighbors in"),
    ([v2.RandomResizedCrop(64, antialias=False)], "RandomResizedCrop with antialias=False is not supported; omit"),
    ([v1.Resize((64, 64), antialias=False)], "Resize with antialias=False is not supported; omit antialias."),
    ([CROP, v2.ToDtype(torch.float32)], "ToDtype with scale=False leaves pixel values in [0, 255]; pass scale=True."),
    (
        [CROP, v1.RandomApply([v1.ColorJitter(0.5), v1.RandomRotation(5)])],
        "RandomApply of ColorJitter, RandomRotation switches all of them at once; give each a RandomApply of its own.",
    ),
    (
        [CROP, v1.RandomApply([NORMALIZE])],
        "RandomApply of Normalize is not supported; it takes ColorJitter, RandomRotation, RandomAffine, ",
    ),
    ([CROP, v1.ColorJitter(0.5), v1.RandomApply([v1.ColorJitter(0.5)])], "ColorJitter appears twice; keep one."),
    ([CROP, NORMALIZE, v1.ToTensor()], "ToTensor comes after Normalize; convert first, then normalize."),
    (
        [CROP, v1.ToTensor(), NORMALIZE, v1.ToPILImage()],
        "ToPILImage comes after Normalize; convert first, then normalize.",
    ),
    (
        [CROP, v2.ToDtype(torch.float32, scale=True), NORMALIZE, v2.ToDtype(torch.uint8, scale=True)],
        "ToDtype comes after Normalize; convert first, then normalize.",
    ),
    ([CROP, v1.RandomCrop(60)], "RandomCrop is a second crop; keep one."),
    ([v1.Resize((80, 80)), v1.RandomCrop(64), v1.CenterCrop(60)], "CenterCrop is a second crop; keep one."),
    (
        [v1.CenterCrop(80), v1.Resize(64)],
        "Resize comes after a crop; resize first, and crop to the output size.",
    ),
    ([v1.RandomCrop(64, padding=(1, 2))], "RandomCrop with padding=(1, 2) is not supported; use one number."),
    (
        [v1.RandomCrop(64, padding=4, fill=9)],
        "RandomCrop with fill=9 is not supported; omit fill for black, or use padding_mode",
    ),
    ([v2.RandomCrop(64, padding=4, fill=(9, 0, 0))], "RandomCrop with fill=(9, 0, 0) is not supported; omit fill"),
    (
        [v1.RandomCrop(64, padding=4, padding_mode="symmetric")],
        "RandomCrop with padding_mode='symmetric' is not supported; use constant or edge.",
    ),
    ([v1.Pad(4), v1.RandomCrop(64, padding=4)], "RandomCrop has padding, and so has the Pad before it; keep one."),
    ([v1.Pad(4), v1.Pad(4), v1.RandomCrop(64)], "Pad appears twice; keep one."),
    ([v1.RandomCrop(64), v1.Pad(4)], "Pad comes after RandomCrop; pad first."),
    ([v1.Pad(4), v1.Resize((64, 64))], "Resize to a fixed size comes after Pad; resize first."),
    ([v1.Pad(4), CROP], "RandomResizedCrop comes after Pad, which changes the crop's share of the image; omit Pad."),
    ([CROP, v1.Pad(4)], "Pad is supported before RandomCrop(size), or after Resize((height, width)) alone."),
    ([v1.Resize((9, 9)), v1.Pad(4, padding_mode="edge")], "Pad is supported before RandomCrop(size), or after Resize("),
    ([v1.RandomRotation(5), v1.Resize((64, 64))], "Resize to a fixed size comes after RandomRotation; resize first."),
    (
        [v1.RandomRotation(5), CROP, v1.RandomAffine(5)],
        "RandomAffine comes after a crop, and another rotation or affine before it; put both on the same side.",
    ),
    (
        [v1.RandomRotation(5), v1.RandomCrop(64, padding=4, padding_mode="edge")],
        "RandomCrop with padding_mode='edge' comes after a rotation or affine; crop first.",
    ),
    ([CROP, v1.RandomHorizontalFlip(), v1.RandomHorizontalFlip()], "RandomHorizontalFlip appears twice; keep one."),
    ([v1.Resize(256)], "Resize with one number gives images of different sizes; add CenterCrop(size)."),
    *(
        (
            steps,
            "sets no output size; start it with RandomResizedCrop(size), or with CenterCrop(size) if the images have",
        )
        for steps in ([v1.RandomHorizontalFlip()], [v1.ToTensor(), NORMALIZE], [])
    ),
    ([ERASING, v1.Resize((64, 64))], "Resize comes after RandomErasing; crop first."),
    ([ERASING, v1.RandomCrop(64)], "RandomCrop comes after RandomErasing; crop first."),
    ([CROP, v1.Resize((64, 64))], "Resize comes after a crop; resize first, and crop to the output size."),
    ([v1.Resize((70, 70)), CROP], "RandomResizedCrop comes after a resize to a fixed size; remove that Resize."),
    (
        [v1.Resize(70), v1.CenterCrop(64), CROP],
        "RandomResizedCrop comes after a resize to a fixed size; remove that Resize.",
    ),
    ([CROP, ERASING, v1.RandomHorizontalFlip()], "RandomHorizontalFlip comes after RandomErasing; erase last."),
    ([CROP, ERASING, v1.RandomRotation(5)], "RandomRotation comes after RandomErasing; erase last."),
    ([CROP, ERASING, v1.RandomAffine(5)], "RandomAffine comes after RandomErasing; erase last."),
    ([CROP, ERASING, v1.ColorJitter(0.5)], "ColorJitter comes after RandomErasing; erase last."),
    (
        [v1.Resize(70, max_size=90), v1.CenterCrop(64)],
        "Resize with max_size is not supported; omit max_size.",
    ),
    (
        [v2.Resize(None, max_size=90), v2.CenterCrop(64)],
        "Resize with max_size is not supported; omit max_size.",
    ),
    ([CROP, v1.CenterCrop(64)], "CenterCrop is a second crop; keep one."),
    (
        [CROP, v1.RandomRotation((0, 30))],
        "RandomRotation with degrees (0.0, 30.0) is not symmetric; use (-x, x).",
    ),
    ([CROP, v1.RandomAffine((-5, 30))], "RandomAffine with degrees (-5.0, 30.0) is not symmetric; use (-x, x)."),
    ([CROP, v1.RandomAffine(0, shear=(0, 9))], "RandomAffine with shear (0.0, 9.0) is not symmetric"),
    ([CROP, v1.RandomAffine(0, shear=(-9, 9, 1, 2))], "RandomAffine with shear (1.0, 2.0) is not symmetric"),
    (
        [CROP, v1.ColorJitter((0.5, 1.2))],
        "ColorJitter with brightness (0.5, 1.2) is not symmetric; use (1 - x, 1 + x).",
    ),
    ([CROP, v1.ColorJitter(brightness=(0, 1))], "ColorJitter with brightness (0.0, 1.0) is not symmetric"),
    ([CROP, v1.ColorJitter(saturation=(0, 1.5))], "ColorJitter with saturation (0.0, 1.5) is not symmetric"),
    ([CROP, NORMALIZE, v1.ColorJitter(0.5)], "ColorJitter comes after Normalize; normalize later."),
    ([CROP, NORMALIZE, v1.RandomRotation(5)], "RandomRotation comes after Normalize; normalize later."),
    ([CROP, NORMALIZE, v1.RandomAffine(5)], "RandomAffine comes after Normalize; normalize later."),
    (
        [CROP, v2.ToImage(), v2.RandomErasing(value=255), v2.ToDtype(torch.float32, scale=True), NORMALIZE],
        "RandomErasing with a nonzero value is applied to integer pixels (up to 255); erase after the conversion to float.",
    ),
    ([CROP, v1.ColorJitter(contrast=(1.5, 2.0))], "ColorJitter with contrast (1.5, 2.0) is not symmetric"),
    ([CROP, v1.ColorJitter(saturation=(0.0, 0.5))], "ColorJitter with saturation (0.0, 0.5) is not symmetric"),
    ([CROP, v1.ColorJitter(hue=(0.0, 0.1))], "ColorJitter with hue (0.0, 0.1) is not symmetric; use (-x, x)."),
    (
        [CROP, v1.RandomRotation(5, center=(1, 1))],
        "RandomRotation with center=(1, 1) is not supported; omit center.",
    ),
    (
        [CROP, v2.RandomAffine(5, center=[1, 1])],
        "RandomAffine with center=[1, 1] is not supported; omit center.",
    ),
    (
        [CROP, v1.RandomRotation(5, fill=128)],
        "RandomRotation with fill=128 is not supported; omit fill for black, or set fill='photo' on the Augment for the image's",
    ),
    ([CROP, v1.RandomAffine(5, fill=(0, 0, 1))], "RandomAffine with fill=(0, 0, 1) is not supported"),
    ([CROP, v1.RandomAffine(5), v1.RandomRotation(5)], "RandomRotation comes after RandomAffine; rotate first."),
    (
        [CROP, v1.RandomRotation(5, expand=True)],
        "RandomRotation with expand=True changes the output size; omit expand.",
    ),
    ([CROP, v1.RandomErasing(value="random")], "RandomErasing with random values is not supported; use value=0."),
    ([CROP, v2.RandomErasing(value="random")], "RandomErasing with random values is not supported; use value=0."),
]


@pytest.mark.parametrize(("steps", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_an_unsupported_transform_is_refused_by_name(
    steps: list[Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        Augment.from_torchvision(v1.Compose(steps))
    assert not caplog.records


@pytest.mark.parametrize(("steps", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_comes_nearest_works_when_pasted(steps: list[Any], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Augment.from_torchvision(v1.Compose(steps))
    told, _, pasted = str(error.value).rpartition(" What comes nearest is:\n  ")
    if "only makes a transform" in message:
        assert not told
        return
    near = eval(pasted)
    assert isinstance(near, Augment)
    sizes = [side for step in steps for side in _sides(step)]
    assert not sizes or ("size=" in pasted and set(near.output_size) <= {*sizes, sizes[0] + 8})  # a Pad of 4 pixels


def _sides(step: Any) -> list[int]:
    size = getattr(step, "size", ())
    return [size] if isinstance(size, int) else list(size or ())


@pytest.mark.parametrize(
    ("step", "near"),
    [
        (v1.GaussianBlur(3), {}),
        (v1.Lambda(to_rgb), {}),
        (v1.RandomApply([v1.GaussianBlur(3)], 0.3), {}),
        (v1.RandomPerspective(), {"shear": (7.0, 7.0)}),
        (v1.RandomRotation((0, 30)), {"rotate": 30.0}),
        (v1.RandomRotation(30, expand=True), {"rotate": 30.0}),
        (v1.RandomRotation(30, fill=128), {"rotate": 30.0}),
        (v1.RandomAffine(0, shear=(0, 9)), {"shear": (9.0, 0.0)}),
        (v1.ColorJitter(brightness=(0.5, 1.2)), {"brightness": 0.5}),
        (v1.RandomErasing(value="random"), {"erase": 0.5}),
        (v1.RandomChoice([v1.RandomRotation(5), v1.GaussianBlur(3)]), {"rotate": 5.0}),
        (v1.RandomOrder([v1.RandomRotation(5), v1.RandomGrayscale(0.2)]), {"rotate": 5.0, "grayscale": 0.2}),
        (v1.RandomApply([v1.RandomRotation(5), v1.ColorJitter(0.5)]), {"rotate": 5.0, "brightness": 0.5}),
        (v2.CutMix(num_classes=5), {"cutmix": 1.0}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_comes_nearest_keeps_the_rest(step: Any, near: dict[str, Any]) -> None:
    """The oracle is the transform without this step, which is taken as it is."""
    rest = [
        v1.RandomResizedCrop(64, scale=(0.5, 1.0)),
        v1.RandomHorizontalFlip(0.3),
        v1.ToTensor(),
        v1.Normalize(*[(0.5,)] * 2),
    ]
    with pytest.raises(ArgumentError) as error:
        Augment.from_torchvision(v1.Compose([*rest[:2], step, *rest[2:]]))
    pasted = eval(str(error.value).partition(" What comes nearest is:\n  ")[2])
    assert pasted == replace(Augment.from_torchvision(v1.Compose(rest)), **near)


@pytest.mark.parametrize("mode", ["reflect", "symmetric"])
def test_the_padding_that_comes_nearest_to_a_reflection_is_the_edge(mode: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Augment.from_torchvision(v1.RandomCrop(32, padding=4, padding_mode=mode))
    pasted = eval(str(error.value).partition(" What comes nearest is:\n  ")[2])
    assert pasted == Augment.from_torchvision(v1.RandomCrop(32, padding=4, padding_mode="edge"))


@pytest.mark.parametrize("transform", [WEIGHTS, WEIGHTS.transforms])
def test_weights_are_no_transform(transform: Any) -> None:
    with pytest.raises(
        ArgumentError, match=re.escape("only makes a transform; pass what it makes, such as weights.transf")
    ):
        Augment.from_torchvision(transform)


def test_transforms_of_albumentations_are_refused() -> None:
    """Some have the names of torchvision's, but other attributes."""
    foreign: Any = type("Compose", (), {"__module__": "albumentations.core.composition", "transforms": []})
    message = (
        "Compose of albumentations: from_torchvision reads torchvision's transforms only. Set the fields of Augment, for "
        "example Augment(crop=(0.08, 1.0), flip=0.5) for RandomResizedCrop and HorizontalFlip."
    )
    with pytest.raises(ArgumentError, match=re.escape(message)):
        Augment.from_torchvision(foreign())


def test_a_class_with_the_name_of_a_transform_is_not_taken_for_it() -> None:
    class RandomHorizontalFlip:
        p = 0.5

    with pytest.raises(ArgumentError, match=f"RandomHorizontalFlip of {__name__} is code that Augment cannot read"):
        Augment.from_torchvision(v1.Compose([CROP, RandomHorizontalFlip()]))


def test_random_erasing_of_timm_is_taken_with_mode_const_only() -> None:
    from timm.data.random_erasing import RandomErasing

    several: list[dict[str, Any]] = [{"mode": "pixel"}, {"mode": "const", "max_count": 3}]
    for options in several:
        with pytest.raises(
            ArgumentError, match="RandomErasing of timm is supported with mode='const' and one rectangle on"
        ):
            Augment.from_torchvision(v1.Compose([CROP, RandomErasing(0.5, device="cpu", **options)]))
