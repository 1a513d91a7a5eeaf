"""Transforms of public training code: what Augment.from_torchvision makes of them.

Each is written as its source has it; sizes that a source takes from its options are filled in.
"""

import re
from typing import Any

import pytest
import torch
from timm.data.transforms_factory import create_transform
from torchvision import models, transforms
from torchvision.transforms import v2 as transforms_v2
from torchvision.transforms.functional import InterpolationMode

from fastflower.draws.augment import Augment
from fastflower.draws.color import IMAGENET_MEAN, IMAGENET_STD
from fastflower.errors import ArgumentError

# torchvision accepts more than its annotations allow.
T: Any = transforms
v2: Any = transforms_v2
BICUBIC = InterpolationMode.BICUBIC
END = [T.ToTensor(), T.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD))]
RAW: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CIFAR: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
CROP: dict[str, Any] = {"size": (224, 224), "crop": (0.08, 1.0)}
VIEW: dict[str, Any] = {"size": (224, 224), "resize": 256}
FIXED: dict[str, Any] = {"size": (224, 224), "resize": (224, 224)}
SMALL: dict[str, Any] = {"size": (32, 32), "resize": "off", "random_crop": True, "padding": 4, "flip": 0.5}
JITTER: dict[str, Any] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}


def simclr(size: int, strength: float, *blur: Any) -> list[Any]:
    jitter = T.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    crop = T.RandomResizedCrop(size)
    return [
        crop,
        T.RandomHorizontalFlip(),
        T.RandomApply([jitter], p=0.8),
        T.RandomGrayscale(p=0.2),
        *blur,
        T.ToTensor(),
    ]


TAKEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "torchvision: ResNet50_Weights": (models.ResNet50_Weights.IMAGENET1K_V2.transforms(), {**VIEW, "resize": 232}),
    "torchvision: EfficientNet, bicubic": (models.EfficientNet_B0_Weights.DEFAULT.transforms(), VIEW),
    "torchvision: references, training": (
        [
            v2.RandomResizedCrop(176, interpolation=InterpolationMode.BILINEAR, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            v2.RandomErasing(0.1),
            v2.ToPureTensor(),
        ],
        {**CROP, "size": (176, 176), "flip": 0.5, "erase": 0.1},
    ),
    "timm: ImageNet's mean, as float32": (create_transform(224), VIEW),
    "timm: evaluation": (create_transform(224, mean=(0.5,) * 3, std=(0.5,) * 3), {**VIEW, **HALF}),
    "timm: training": (
        create_transform(224, is_training=True, mean=(0.5,) * 3, std=(0.5,) * 3, re_prob=0.25),
        {
            **CROP,
            **HALF,
            **JITTER,
            "flip": 0.5,
            "erase": 0.25,
            "erase_area": (0.02, 1 / 3),
            "erase_ratio": (0.3, 1 / 0.3),
        },
    ),
    "timm: training with grayscale": (
        create_transform(
            224, is_training=True, mean=(0.5,) * 3, std=(0.5,) * 3, color_jitter_prob=0.8, grayscale_prob=0.2
        ),
        {**CROP, **HALF, **JITTER, "flip": 0.5, "jitter_probability": 0.8, "grayscale": 0.2},
    ),
    "PyTorch's transfer learning tutorial": (
        [T.RandomResizedCrop(224), T.RandomHorizontalFlip(), *END],
        {**CROP, "flip": 0.5},
    ),
    "PyTorch's transfer learning tutorial, validation": ([T.Resize(256), T.CenterCrop(224), *END], VIEW),
    "AlexNet: nn.Sequential": (
        [T.Resize(256), T.RandomCrop(227), T.RandomHorizontalFlip(), T.ToTensor()],
        {**RAW, "size": (227, 227), "resize": 256, "random_crop": True, "flip": 0.5},
    ),
    "image classifier of Udacity": (
        [T.RandomRotation(30), T.RandomHorizontalFlip(), T.RandomResizedCrop(224), *END],
        {**CROP, "rotate": 30.0, "move_first": True, "flip": 0.5},
    ),
    "train-aab: Resize and rotation before the crop": (
        [T.Resize(256), T.RandomRotation(30), T.RandomResizedCrop(224), T.RandomHorizontalFlip(), *END],
        {**CROP, "rotate": 30.0, "move_first": True, "flip": 0.5},
    ),
    "train-aab: crop, jitter, rotation": (
        [
            T.RandomResizedCrop(224),
            T.RandomHorizontalFlip(),
            T.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.05),
            T.RandomRotation(10),
            *END,
        ],
        {**CROP, "flip": 0.5, "brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.05, "rotate": 10.0},
    ),
    "student reports: all geometry before the crop": (
        [
            T.RandomRotation(90),
            T.RandomHorizontalFlip(),
            T.RandomVerticalFlip(),
            T.ColorJitter(contrast=0.2, saturation=0.2, brightness=0.2, hue=0.2),
            T.RandomAffine(degrees=0, translate=(0.1, 0.1)),
            T.RandomResizedCrop((224, 224)),
            *END,
        ],
        {
            **CROP,
            "rotate": 90.0,
            "translate": (0.1, 0.1),
            "move_first": True,
            "flip": 0.5,
            "flip_vertical": 0.5,
            "brightness": 0.2,
            "contrast": 0.2,
            "saturation": 0.2,
            "hue": 0.2,
        },
    ),
    "tensors: conversion first, range of 180 degrees": (
        [
            T.ConvertImageDtype(torch.float32),
            T.RandomRotation(180),
            T.RandomResizedCrop(224, scale=(0.6, 1.0)),
            T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
            END[-1],
        ],
        {**CROP, **JITTER, "crop": (0.6, 1.0), "rotate": 180.0, "move_first": True},
    ),
    "Resize to a fixed size, random crop, rotation": (
        [T.Resize((256, 256)), T.RandomCrop((224, 224)), T.RandomHorizontalFlip(p=0.5), T.RandomRotation(45), *END],
        {**FIXED, "resize": (256, 256), "random_crop": True, "flip": 0.5, "rotate": 45.0},
    ),
    "Resize to a fixed size, flip, rotation": (
        [T.Resize((224, 224)), T.RandomHorizontalFlip(), T.RandomRotation(10), *END],
        {**FIXED, "flip": 0.5, "rotate": 10.0},
    ),
    "chest X-rays: Grayscale(3) after ToTensor": (
        [T.Resize((224, 224)), T.ToTensor(), T.Grayscale(num_output_channels=3), END[-1]],
        {**FIXED, "grayscale": 1.0},
    ),
    "CelebA: center crop of faces": (
        [T.ToPILImage(), T.CenterCrop([300, 250]), T.RandomHorizontalFlip(0.5), T.RandomRotation(10), *END],
        {"size": (300, 250), "resize": "off", "flip": 0.5, "rotate": 10.0},
    ),
    "kuangliu/pytorch-cifar": (
        [
            T.RandomCrop(32, padding=4),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ],
        {**SMALL, **CIFAR},
    ),
    "resnet20-pruning: Pad, then RandomCrop": (
        [T.Pad(4), T.RandomCrop(32), T.RandomHorizontalFlip(), T.ToTensor()],
        {**SMALL, **RAW},
    ),
    "ResNet on CIFAR: Pad, flip, RandomCrop": (
        [T.Pad(padding=4), T.RandomHorizontalFlip(), T.RandomCrop(size=(32, 32)), T.ToTensor(), T.Normalize(0.5, 0.5)],
        {**SMALL, **HALF},
    ),
    "LeNet on MNIST": (
        [T.Resize((28, 28)), T.Pad(2), T.Grayscale(3), T.ToTensor(), T.Normalize((0.1307,), (0.3081,))],
        {"size": (32, 32), "resize": (28, 28), "grayscale": 1.0, "mean": (0.1307,) * 3, "std": (0.3081,) * 3},
    ),
    "SimCLR without blur": (
        simclr(224, 1.0),
        {
            **CROP,
            **RAW,
            "flip": 0.5,
            "jitter_probability": 0.8,
            "grayscale": 0.2,
            "brightness": 0.8,
            "contrast": 0.8,
            "saturation": 0.8,
            "hue": 0.2,
        },
    ),
    "BYOL on CIFAR": (
        [
            T.RandomResizedCrop((32, 32)),
            T.RandomHorizontalFlip(p=0.5),
            T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.ToTensor(),
        ],
        {
            **CROP,
            **RAW,
            "size": (32, 32),
            "flip": 0.5,
            "jitter_probability": 0.8,
            "grayscale": 0.2,
            "brightness": 0.8,
            "contrast": 0.8,
            "saturation": 0.8,
            "hue": 0.2,
        },
    ),
    "v2: conversions on both sides": (
        [
            v2.ToImage(),
            v2.RGB(),
            v2.ToDtype(torch.uint8, scale=True),
            v2.RandomResizedCrop(size=(224, 224), antialias=True),
            v2.RandomHorizontalFlip(p=0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]),
            v2.ToDtype(torch.bfloat16),
        ],
        {**CROP, **HALF, "flip": 0.5},
    ),
    "v2 mixed with v1, ToDtype after ToTensor": (
        [T.ToTensor(), T.Resize(size=(224, 224)), v2.ToDtype(torch.float32), END[-1]],
        FIXED,
    ),
    "v2: CenterCrop of the size of the Resize": (
        [
            v2.Resize(size=(128, 128), antialias=True),
            v2.CenterCrop(size=(128, 128)),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ],
        {**HALF, "size": (128, 128), "resize": (128, 128)},
    ),
}

CODE = "is code that Augment cannot read; leave it out. Images are always RGB here, so no code needs to convert them."
REFUSED: dict[str, tuple[list[Any], str]] = {
    "CIFAR, validation": (
        [T.ToTensor(), T.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))],
        "sets no output size; start it with RandomResizedCrop(size), or with CenterCrop(size) if the images have this size.",
    ),
    "SimCLR, MoCo v2": (simclr(224, 0.5, T.RandomApply([T.GaussianBlur(23)], p=0.5)), "GaussianBlur has no equivalent"),
    "LookMore: Lambda": (
        [T.Lambda(lambda image: image.convert("RGB")), T.Resize((518, 518), interpolation=BICUBIC), *END],
        f"Lambda of torchvision.transforms.transforms {CODE}",
    ),
    "CLIP: a function": (
        [T.Resize(224), T.CenterCrop(224), lambda image: image.convert("RGB"), *END],
        f"<lambda> of {__name__} {CODE}",
    ),
    "image of any size": (
        [T.Resize(256), T.RandomHorizontalFlip(), T.RandomRotation(15), T.Grayscale(3), *END],
        "Resize with one number gives images of different sizes; add CenterCrop(size).",
    ),
    "Resize to a fixed size before RandomResizedCrop": (
        [T.Resize((256, 256)), T.RandomResizedCrop(224, scale=(0.8, 1.0)), T.RandomHorizontalFlip(), T.ToTensor()],
        "RandomResizedCrop comes after a resize to a fixed size; remove that Resize.",
    ),
    "an area above 1": (
        [T.RandomResizedCrop(size=(128, 128), scale=(0.9, 1.1)), T.ToTensor()],
        "Augment.crop must be (min, max) with 0 < min <= max <= 1, got (0.9, 1.1).",
    ),
    "rotation after Normalize": (
        [T.Resize((224, 224)), T.Grayscale(3), *END, T.RandomRotation(degrees=15), T.RandomHorizontalFlip(p=0.5)],
        "RandomRotation comes after Normalize; normalize later.",
    ),
    "jitter that only darkens": (
        [T.RandomRotation(30), T.ColorJitter(contrast=(0.8, 1.4), brightness=(0.8, 1.1)), T.Resize((224, 224))],
        "ColorJitter with brightness (0.8, 1.1) is not symmetric; use (1 - x, 1 + x).",
    ),
    "one color channel": (
        [T.Grayscale(1), T.Resize((28, 28)), T.ToTensor(), T.Normalize([0.5], [0.5])],
        "Grayscale gives one channel, but images here always have three; use Grayscale(3).",
    ),
    "a group with a probability": (
        [
            T.RandomApply([T.RandomAffine(15, (0.1, 0.1), (0.9, 1.1), 10), T.RandomHorizontalFlip(), T.RandomRotation(30)], 0.9),
            T.Resize((260, 260)),
            T.RandomCrop((256, 256)),
        ],
        "RandomApply of RandomAffine, RandomHorizontalFlip, RandomRotation switches all of them at once; give each a Random",
    ),
    "TrivialAugment": (
        [T.Resize((224, 224)), T.TrivialAugmentWide(num_magnitude_bins=31), T.ToTensor()],
        "The closest alternative is RandomRotation, ColorJitter and RandomAffine. To apply it to the images of a batch, see",
    ),
    "CelebA": ([T.CenterCrop(178), T.Resize((112, 112)), *END], "Resize comes after a crop; resize first, and crop to the"),
    "perspective": (
        [T.RandomResizedCrop(256), T.RandomPerspective(distortion_scale=0.3, p=0.5), *END],
        "The closest alternative is RandomAffine(shear=...). To apply it to the images of a batch, see docs/augmentation.md.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", TAKEN)
def test_public_transforms_are_taken(source: str) -> None:
    transform, fields = TAKEN[source]
    taken = Augment.from_torchvision(T.Compose(transform) if isinstance(transform, list) else transform)
    expected = Augment(**fields).resolved
    for name in Augment.__dataclass_fields__:
        value, wanted = getattr(taken.resolved, name), getattr(expected, name)
        assert value == (pytest.approx(wanted, abs=1e-12) if isinstance(wanted, float | tuple) else wanted), name


@pytest.mark.parametrize("source", REFUSED)
def test_public_transforms_that_are_refused_say_why(source: str) -> None:
    steps, message = REFUSED[source]
    with pytest.raises(ArgumentError, match=re.escape(message)):
        Augment.from_torchvision(T.Compose(steps))
