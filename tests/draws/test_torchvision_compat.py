"""torchvision transforms, v1 and v2, converted to an Augment: same draws."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms, tv_tensors
from torchvision.transforms import v2 as transforms_v2
from torchvision.transforms.functional import InterpolationMode

from fastflower.draws.augment import Augment
from fastflower.draws.color import IMAGENET_MEAN, IMAGENET_STD
from fastflower.errors import ArgumentError

# torchvision accepts more than its annotations allow.
v1: Any = transforms
v2: Any = transforms_v2
MEAN, STD = IMAGENET_MEAN, IMAGENET_STD
PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
CROP = v1.RandomResizedCrop(64)
VERSIONS = [pytest.param(v1, id="v1"), pytest.param(v2, id="v2")]
REORDERED = "color is drawn as specified but applied after all geometry"
FIXED_ORDER = "ColorJitter's operations run in a fixed order: brightness, contrast, saturation, hue"


def to_tensor(version: Any) -> list[Any]:
    return [v1.ToTensor()] if version is v1 else [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


def notes(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.name == "fastflower" and record.levelname == "WARNING" for record in caplog.records)
    return [record.getMessage().removeprefix("Augment.from_torchvision: ") for record in caplog.records]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_students_resized_crop_flip_rotation_jitter_and_affine(
    version: Any, caplog: pytest.LogCaptureFixture
) -> None:
    augment = Augment.from_torchvision(
        version.Compose(
            [
                version.RandomResizedCrop(224),
                version.RandomHorizontalFlip(p=0.1),
                version.RandomVerticalFlip(),
                version.RandomRotation(30),
                version.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
                version.RandomAffine(degrees=0, translate=(0.1, 0.1)),
                *to_tensor(version),
                version.Normalize(MEAN, STD),
                version.RandomErasing(p=0.25),
            ]
        )
    )
    assert augment == Augment(
        mean=MEAN,
        std=STD,
        size=(224, 224),
        crop=(0.08, 1.0),
        flip=0.1,
        flip_vertical=0.5,
        rotate=30,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        hue=0.1,
        translate=(0.1, 0.1),
        erase=0.25,
    )
    assert notes(caplog) == [
        "RandomRotation uses bilinear interpolation instead of nearest",
        FIXED_ORDER,
        f"{REORDERED} (RandomAffine follows ColorJitter)",
        "RandomAffine uses bilinear interpolation instead of nearest",
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_is_logged_when_nothing_differs(version: Any, caplog: pytest.LogCaptureFixture) -> None:
    augment = Augment.from_torchvision(
        version.Compose(
            [
                version.RandomResizedCrop((96, 128), scale=(0.25, 0.9), ratio=(0.5, 2.0)),
                version.RandomHorizontalFlip(),
                version.RandomRotation(10, interpolation=InterpolationMode.BILINEAR),
                version.RandomAffine(5, (0.1, 0.2), (0.9, 1.1), (-3, 3, -4, 4), InterpolationMode.BILINEAR),
                version.ColorJitter(saturation=0.5),
                *to_tensor(version),
                version.Normalize(MEAN, STD),
                version.RandomErasing(0.5, (0.1, 0.2), (0.4, 2.0), value=0),
            ]
        )
    )
    assert augment == Augment(
        size=(96, 128),
        mean=MEAN,
        std=STD,
        crop=(0.25, 0.9),
        crop_ratio=(0.5, 2.0),
        flip=0.5,
        rotate=10,
        affine_rotate=5,
        translate=(0.1, 0.2),
        scale=(0.9, 1.1),
        shear=(3, 4),
        saturation=0.5,
        erase=0.5,
        erase_area=(0.1, 0.2),
        erase_ratio=(0.4, 2.0),
    )
    assert notes(caplog) == []


def test_every_call_logs_again(caplog: pytest.LogCaptureFixture) -> None:
    transform = v1.Compose([v1.RandomResizedCrop(64), v1.RandomRotation(5)])
    for _ in range(2):
        Augment.from_torchvision(transform)
    assert notes(caplog) == ["RandomRotation uses bilinear interpolation instead of nearest"] * 2


def test_color_before_geometry_is_logged_for_each_following_transform(caplog: pytest.LogCaptureFixture) -> None:
    Augment.from_torchvision(
        v1.Compose([v1.ColorJitter(0.5), v1.RandomResizedCrop(64), v1.RandomHorizontalFlip(), v1.RandomVerticalFlip()])
    )
    assert notes(caplog) == [
        f"{REORDERED} ({name} follows ColorJitter)"
        for name in ("RandomResizedCrop", "RandomHorizontalFlip", "RandomVerticalFlip")
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_resize_and_center_crop_are_the_validation_view(version: Any, caplog: pytest.LogCaptureFixture) -> None:
    steps = [version.Resize(256), version.CenterCrop(224), *to_tensor(version), version.Normalize(MEAN, STD)]
    assert Augment.from_torchvision(version.Compose(steps)) == Augment(size=(224, 224), resize=256, mean=MEAN, std=STD)
    steps[:2] = [version.Resize([300]), version.CenterCrop((100, 200))]
    assert Augment.from_torchvision(version.Compose(steps)) == Augment(size=(100, 200), resize=300, mean=MEAN, std=STD)
    steps[:2] = [version.Resize((300, 310)), version.CenterCrop([224])]
    assert Augment.from_torchvision(version.Compose(steps)) == Augment(
        size=(224, 224), resize=(300, 310), mean=MEAN, std=STD
    )
    assert notes(caplog) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_resize_to_height_and_width_fixes_the_size(version: Any) -> None:
    augment = Augment.from_torchvision(version.Compose([version.Resize((120, 160)), version.RandomHorizontalFlip()]))
    assert augment == Augment(size=(120, 160), resize=(120, 160), flip=0.5, **PLAIN)
    assert augment.draw(0, 0, [0], [[77, 91]]).roi.tolist() == [[0, 0, 77, 91]]


@pytest.mark.parametrize("version", VERSIONS)
def test_resize_before_a_resized_crop_is_ignored(version: Any, caplog: pytest.LogCaptureFixture) -> None:
    augment = Augment.from_torchvision(version.Compose([version.Resize(256), version.RandomResizedCrop(224)]))
    assert augment == Augment(size=(224, 224), crop=(0.08, 1.0), **PLAIN)
    assert notes(caplog) == [
        "ignored Resize before RandomResizedCrop: the crop takes the same fraction of the original image"
    ]


def test_without_normalize_levels_stay_in_0_to_1() -> None:
    augment = Augment.from_torchvision(v1.Compose([v1.RandomResizedCrop(64), v1.ToTensor()]))
    assert (augment.mean, augment.std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("value", "color"), [(0.25, (0.25, 0.25, 0.25)), ((0.1, 0.5, 0.9), (0.1, 0.5, 0.9))])
def test_a_value_erased_before_normalize_is_normalized(
    version: Any, value: Any, color: tuple[float, float, float]
) -> None:
    erasing, normalize = version.RandomErasing(1.0, value=value), version.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    crop = version.RandomResizedCrop(64)
    before = Augment.from_torchvision(version.Compose([crop, *to_tensor(version), erasing, normalize]))
    after = Augment.from_torchvision(version.Compose([crop, *to_tensor(version), normalize, erasing]))
    assert after.erase_value == color
    expected = version.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))(torch.tensor(color).reshape(3, 1, 1))
    assert before.erase_value == pytest.approx(tuple(expected.flatten().tolist()), abs=1e-6)
    assert replace(before, erase_value=color) == after


def test_a_value_may_be_erased_after_the_conversion_to_float() -> None:
    erasing, normalize = v2.RandomErasing(1.0, value=0.5), v2.Normalize((0.5,), (0.5,))
    to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    for steps in ([CROP, normalize, erasing], [CROP, v2.ToImage(), to_float, normalize, erasing], [CROP, erasing]):
        assert Augment.from_torchvision(v2.Compose(steps)).erase_value == (0.5, 0.5, 0.5)
    with pytest.raises(ArgumentError, match="RandomErasing with a nonzero value is applied to integer pixels"):
        Augment.from_torchvision(v2.Compose([CROP, v2.ToImage(), erasing, to_float]))


@pytest.mark.parametrize("version", VERSIONS)
def test_nested_and_sequential_transforms_are_read_in_order(version: Any) -> None:
    crop, flip = version.RandomResizedCrop(64), version.RandomHorizontalFlip(0.3)
    rotation, jitter = version.RandomRotation(5), version.ColorJitter(0.4)
    expected = Augment.from_torchvision(version.Compose([crop, flip, rotation, jitter]))
    nested = version.Compose([version.Compose([crop, flip]), version.Compose([version.Compose([rotation]), jitter])])
    assert Augment.from_torchvision(nested) == expected
    assert Augment.from_torchvision(nn.Sequential(crop, nn.Sequential(flip, rotation), jitter)) == expected
    assert Augment.from_torchvision(crop) == Augment(size=(64, 64), crop=(0.08, 1.0), **PLAIN)


@pytest.mark.parametrize("version", VERSIONS)
def test_explicit_ranges_are_read(version: Any) -> None:
    augment = Augment.from_torchvision(
        version.Compose(
            [
                version.RandomResizedCrop(64),
                version.RandomAffine((-7, 7), scale=(0.5, 2.0), shear=8),
                version.ColorJitter(brightness=(0.7, 1.3), contrast=(0, 2.5), hue=(-0.2, 0.2)),
            ]
        )
    )
    assert (augment.affine_rotate, augment.scale, augment.shear) == (7, (0.5, 2.0), (8, 0))
    assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.3, 1.5, 0, 0.2)


@pytest.mark.parametrize("version", VERSIONS)
def test_one_number_normalizes_every_channel_as_torchvision_does(version: Any) -> None:
    normalize = version.Normalize((0.5,), (0.25,))
    augment = Augment.from_torchvision(version.Compose([version.RandomResizedCrop(64), normalize]))
    assert (augment.mean, augment.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert (normalize(torch.ones(3, 1, 1)) == 2).all()


@pytest.mark.parametrize("version", VERSIONS)
def test_conversions_and_identities_change_nothing(version: Any) -> None:
    extra = (
        [v1.PILToTensor(), v1.ConvertImageDtype(torch.float32)] if version is v1 else [v2.Identity(), v2.ToPureTensor()]
    )
    steps = [version.RandomResizedCrop(64), *extra]
    assert Augment.from_torchvision(version.Compose(steps)) == Augment(size=(64, 64), crop=(0.08, 1.0), **PLAIN)


@pytest.mark.parametrize("version", VERSIONS)
def test_draws_fill_the_ranges_of_the_transforms(version: Any) -> None:
    augment = Augment.from_torchvision(
        version.Compose(
            [
                version.RandomResizedCrop(100, scale=(0.5, 0.6)),
                version.RandomHorizontalFlip(p=0.1),
                version.RandomRotation(30),
                version.RandomAffine(0, translate=(0.1, 0.3)),
                version.ColorJitter(contrast=0.2),
            ]
        )
    )
    count = 3000
    drawn = augment.draw(0, 0, np.arange(count), np.full((count, 2), 400))
    jitter = version.ColorJitter(contrast=0.2)
    for numbers, low, high in (
        (drawn.rotate, -30, 30),
        (drawn.translate[:, 0], -10, 10),
        (drawn.translate[:, 1], -30, 30),
        (drawn.contrast, *jitter.contrast),
        (drawn.roi[:, 2:].prod(axis=1) / 400**2, 0.5, 0.6),
    ):
        rounding = 0.015 * (high - low)  # a crop's sides are whole pixels
        assert low - rounding <= numbers.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < numbers.max() <= high + rounding
    assert abs(drawn.flip[:, 0].mean() - 0.1) < 0.03
    assert drawn.size == (100, 100)
    assert not drawn.flip[:, 1].any()
    assert (drawn.affine_rotate == 0).all()
    assert (drawn.brightness == 1).all()


def test_black_fill_may_be_explicit(caplog: pytest.LogCaptureFixture) -> None:
    bilinear = InterpolationMode.BILINEAR
    rotation, moved = v1.RandomRotation(5, bilinear, fill=[0, 0, 0]), v1.RandomAffine(5, interpolation=bilinear, fill=0)
    augment = Augment.from_torchvision(v1.Compose([CROP, rotation, moved]))
    assert (augment.rotate, augment.affine_rotate, augment.fill) == (5, 5, "black")
    assert notes(caplog) == []


def test_the_padding_mode_of_a_crop_without_padding_is_ignored() -> None:
    for options in ({"padding": 0}, {"padding": None}):
        augment = Augment.from_torchvision(v1.RandomCrop(9, padding_mode="reflect", **options))
        assert augment == Augment(size=(9, 9), resize="off", random_crop=True, **PLAIN)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_random_apply_multiplies_the_probabilities_inside(version: Any, caplog: pytest.LogCaptureFixture) -> None:
    bilinear = InterpolationMode.BILINEAR
    inner = [
        version.ColorJitter(0.5),
        version.RandomHorizontalFlip(0.4),
        version.RandomRotation(5, interpolation=bilinear),
        nn.Sequential(version.RandomAffine(5, interpolation=bilinear)),
        version.RandomGrayscale(0.5),
        version.RandomErasing(0.8),
    ]
    applied = [version.RandomApply([one], p=0.5) for one in inner]
    augment = Augment.from_torchvision(version.Compose([CROP, *applied]))
    assert (augment.jitter_probability, augment.rotate_probability, augment.affine_probability) == (0.5, 0.5, 0.5)
    assert (augment.flip, augment.grayscale, augment.erase) == (0.2, 0.25, 0.4)
    assert notes(caplog) == [
        f"{REORDERED} ({name} follows ColorJitter)"
        for name in ("RandomHorizontalFlip", "RandomRotation", "RandomAffine")
    ]


def test_gray_before_jitter_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    Augment.from_torchvision(v1.Compose([CROP, v1.Grayscale(3), v1.ColorJitter(0.5)]))
    assert notes(caplog) == ["gray is drawn as specified but applied after ColorJitter"]


def test_only_the_first_rank_notes_differences(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for rank, notes in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        Augment.from_torchvision(v1.Compose([v1.RandomResizedCrop(64), v1.ColorJitter(0.5, 0.5)]))
        assert len(caplog.records) == notes
