"""All backends against torchvision's functionals, with the same drawn numbers."""

import os
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import oracle
import parity
import pytest
import torch
from numpy.typing import NDArray
from places import HELPERS, ROOT
from torchvision.transforms.v2 import functional as F

from fastflower import Augment
from fastflower.shards.image import decode


@pytest.fixture(scope="module")
def encoded(image_files: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in image_files[::6]]


LIMITS = [each for each in (("native", 1.0), ("dali", 2.0), ("triton", 1.0)) if each[0] in parity.BACKENDS]


def enough(name: str, encoded: list[bytes]) -> list[bytes]:
    """Return fewer images for Triton's interpreter, which takes a third of a second for each."""
    return encoded[::7] if name == "triton" else encoded


QUICK = (
    "validation view (resize 256, center 224)",
    "downscaling by 4",
    "hue 0.1",
    "hue 0.5 and grayscale",
    "everything",
)
"""Cases for Triton's interpreter: the kernels have one path for all geometry, and "everything" takes all color steps."""
PAIRS = [
    pytest.param(name, case, marks=[pytest.mark.soak] if name == "triton" and case not in QUICK else [])
    for name in parity.BACKENDS
    for case in parity.CASES
]


def test_the_cases_cover_everything_that_can_be_drawn(encoded: list[bytes]) -> None:
    """Except erasing, which has its own test."""
    neutral = parity.request(Augment(), encoded).draw
    draws = [parity.request(case.augment, encoded).draw for case in parity.CASES.values()]
    for name in {field.name for field in fields(neutral)} - {"size", "image", "erase"}:
        assert any(not np.array_equal(getattr(draw, name), getattr(neutral, name)) for draw in draws), name


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_a_backend_renders_what_torchvision_renders(name: str, case: str, encoded: list[bytes]) -> None:
    encoded = enough(name, encoded)
    found = parity.differences(case, name, encoded)
    worst = f"{case}, {name}: mean {found.mean():.2f}, worst image {found.max():.2f}"
    assert len(found) >= 0.8 * len(encoded), "too few images show enough to be compared"
    assert found.mean() <= parity.CASES[case].limit, worst
    assert found.max() <= 12, worst


@pytest.mark.parametrize("name", parity.BACKENDS)
def test_a_reduction_without_a_prefilter_would_be_noticed(name: str, encoded: list[bytes]) -> None:
    """The limit of "downscaling by 4" is tight: plain bilinear sampling exceeds it several times."""
    case, encoded = parity.CASES["downscaling by 4"], enough(name, encoded)
    draw = parity.request(case.augment, encoded).draw
    matrix = draw.matrix()
    matrix[:, :, 2] += matrix[:, :, :2].sum(axis=2) / 2 - 0.5
    wanted = parity.expected("downscaling by 4", tuple(encoded))
    unfiltered = [
        np.abs(
            cv2.warpAffine(decode(data), warp, (56, 56), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP) - image
        ).mean()
        for data, warp, (image, _) in zip(encoded, matrix, wanted, strict=True)
    ]
    assert np.mean(unfiltered) > 3 * case.limit
    assert parity.differences("downscaling by 4", name, encoded).mean() < case.limit


def supersampled(image: NDArray[np.uint8], matrix: NDArray[np.float64], size: tuple[int, int], factor: int = 6) -> Any:
    """Return the ground truth: the mean of factor x factor bilinear samples over each output pixel."""
    fine = matrix.copy()
    fine[:, :2] /= factor
    fine[:, 2] += fine[:, :2].sum(axis=1) / 2 - 0.5
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    shape = (size[1] * factor, size[0] * factor)
    big = cv2.warpAffine(image.astype(np.float32), fine, shape, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return cv2.resize(big, (size[1], size[0]), interpolation=cv2.INTER_AREA)


# torchvision resamples three times: for the crop, the rotation and the affine.
RESAMPLED = Augment(crop=(0.08, 1.0), rotate=10, translate=(0.1, 0.1), scale=(0.9, 1.1))


@cache
def truths(encoded: tuple[bytes, ...]) -> list[tuple[Any, Any, float]]:
    """Return for each image the ground truth, the pixels to compare, and torchvision's mean difference there."""
    draw, found = parity.request(RESAMPLED, encoded).draw, list[tuple[Any, Any, float]]()
    for row, (data, matrix) in enumerate(zip(encoded, draw.matrix(), strict=True)):
        chain, shown = oracle.render(decode(data), draw, row, RESAMPLED)
        truth = supersampled(decode(data), matrix, draw.size)
        found.append((truth, shown, np.abs(chain - truth)[shown].mean()))
    return found


@pytest.mark.parametrize("name", parity.BACKENDS)
def test_one_resample_is_closer_to_the_truth_than_three(name: str, encoded: list[bytes]) -> None:
    encoded = enough(name, encoded)
    pairs = list(zip(parity.render(name, RESAMPLED, encoded), truths(tuple(encoded)), strict=True))
    ours = np.mean([np.abs(image - truth)[shown].mean() for image, (truth, shown, _) in pairs])
    theirs = np.mean([difference for _, (*_, difference) in pairs])
    assert ours < 0.75 * theirs, f"ours {ours:.2f}, torchvision's {theirs:.2f}"


@pytest.mark.parametrize("name", parity.BACKENDS)
def test_the_neutral_view_of_an_image_of_the_output_size_is_the_image(name: str, encoded: list[bytes]) -> None:
    frames = [parity.stretched(data) for data in encoded[:4]]
    made = parity.render(name, Augment(resize=224), frames)
    assert np.array_equal(made, np.stack([decode(data) for data in frames]))


@pytest.mark.parametrize("name", parity.BACKENDS)
@pytest.mark.parametrize("mode", ["constant", "edge"])
def test_a_random_crop_of_small_images_is_torchvisions_to_the_pixel(
    name: str, mode: Any, rng: np.random.Generator
) -> None:
    """As on CIFAR: also the padding, and images that are smaller than the crop."""
    augment = Augment(size=32, resize="off", random_crop=True, padding=4, padding_mode=mode, flip=0.5)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in (*[(32, 32)] * 6, (50, 33), (9, 40))]
    encoded = [cv2.imencode(".png", image[..., ::-1])[1].tobytes() for image in images]
    draw = parity.request(augment, encoded).draw
    assert len(np.unique(draw.roi[:6], axis=0)) == 6
    wanted = [oracle.render(image, draw, row, augment)[0] for row, image in enumerate(images)]
    assert np.abs(parity.render(name, augment, encoded) - np.stack(wanted)).max() < 1e-3


@pytest.mark.parametrize("name", parity.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalization_is_torchvisions(name: str, dtype: torch.dtype, encoded: list[bytes]) -> None:
    encoded = encoded[:1] if name == "triton" else encoded[:4]
    levels = parity.render(name, Augment(), encoded)
    wanted = F.normalize(torch.from_numpy(levels).permute(0, 3, 1, 2) / 255, oracle.MEAN, oracle.STD).permute(
        0, 2, 3, 1
    )
    made = parity.render(name, Augment(), encoded, dtype)
    # DALI normalizes before it rounds to levels: half a level.
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    half_level = 0.0 if name == "opencv" else 0.5 / 255 / min(oracle.STD)
    assert np.abs(made - wanted.numpy()).max() <= rounding + half_level


@pytest.mark.parametrize("name", parity.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_erasing_fills_the_drawn_rectangle_and_nothing_else(
    name: str, dtype: torch.dtype, encoded: list[bytes]
) -> None:
    """Also with values that no image has."""
    augment, encoded = Augment(erase=1.0, erase_value=(0.0, 4.0, -3.0)), encoded[: 2 if name == "triton" else 16]
    draw = parity.request(augment, encoded).draw
    made, plain = (parity.render(name, view, encoded, dtype) for view in (augment, Augment()))
    assert (draw.erase[:, 2] > 0).all()
    value = torch.tensor(augment.erase_value)[:, None, None]
    for image, whole, (top, left, height, width) in zip(made, plain, draw.erase.tolist(), strict=True):
        chw = torch.from_numpy(whole).permute(2, 0, 1)
        wanted = F.erase(chw, top, left, height, width, value).permute(1, 2, 0).numpy()
        # DALI erases before normalization, which rounds.
        assert np.allclose(image, wanted, rtol=0, atol=5e-6 if name == "dali" else 0)


@pytest.mark.parametrize("name", parity.BACKENDS)
def test_a_pixel_goes_where_the_matrix_says(name: str) -> None:
    """Pins the direction of the warp, which DALI's documentation states both ways."""
    image = np.zeros((224, 224, 3), np.uint8)
    image[60:63, 150:153] = 255
    encoded = [cv2.imencode(".png", image)[1].tobytes()]
    augment = Augment(resize=224, rotate=30, translate=(0.1, 0.1), flip=0.5)
    for seed in range(5):
        ((_, images),) = parity.backend(name, augment, torch.uint8, encoded).run(
            [parity.request(augment, encoded, seed)]
        )
        rows, columns = np.nonzero(images[0, 0].numpy() > 40)
        found = np.array([columns.mean() + 0.5, rows.mean() + 0.5])
        matrix = parity.request(augment, encoded, seed).draw.matrix()[0]
        assert np.allclose(matrix[:, :2] @ found + matrix[:, 2], [151.5, 61.5], atol=0.7)


@pytest.mark.parametrize("name", parity.BACKENDS)
def test_outside_the_crop_is_black_or_the_image(name: str, encoded: list[bytes]) -> None:
    fields: dict[str, Any] = {"crop": (0.2, 0.4), "rotate": 45}
    encoded = enough(name, encoded)
    drawn = parity.request(Augment(**fields), encoded)
    warp = parity.request(Augment(**fields, fill="photo"), encoded).warp
    black = parity.render(name, Augment(**fields), encoded)
    filled = parity.render(name, Augment(**fields, fill="photo"), encoded)
    turned = np.abs(drawn.draw.rotate) > 20
    assert turned.sum() > 1
    assert (black[turned][:, :3, :3].max(axis=(1, 2, 3)) <= 3).all(), "a corner rotated out of the crop is black"
    inside = turned & ~warp.masked
    assert inside.any()
    assert np.abs(black - filled)[:, 90:134, 90:134].max() <= 1, "inside the crop nothing changes"
    assert filled[inside][:, :3, :3].mean() > 20, "with fill='photo' the corner shows the image"


@pytest.mark.parametrize("name", parity.BACKENDS)
def test_exif_orientation_is_applied_when_only_a_part_is_visible(name: str, encoded: list[bytes]) -> None:
    turned = parity.turned(encoded[0])
    augment = Augment(size=150, crop=(0.1, 0.2))
    ours, theirs = (parity.render(backend, augment, turned) for backend in (name, "opencv"))
    assert np.abs(ours - theirs).mean(axis=(1, 2, 3)).max() < 1


@pytest.mark.parametrize(("name", "limit"), LIMITS)
def test_backends_render_the_same_batch(name: str, limit: float, encoded: list[bytes]) -> None:
    augment, encoded = parity.CASES["everything"].augment, enough(name, encoded)
    one, other = (parity.render(backend, augment, encoded) for backend in ("opencv", name))
    assert np.abs(one - other).mean() < limit


def test_the_parity_table_needs_no_environment_variables(image_files: list[Path], tmp_path: Path) -> None:
    """Like `python tests/helpers/parity.py FOLDER`, for one case and one image."""
    (tmp_path / "rose").mkdir()
    (tmp_path / "rose/1.jpg").write_bytes(image_files[0].read_bytes())
    case = "rotation 30"
    program = f"import parity; parity.CASES = {{{case!r}: parity.CASES[{case!r}]}}; parity.main({str(tmp_path)!r})"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(HELPERS))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 images\n\n| augmentation |")
    name, *numbers = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert name == case
    assert len(numbers) == 3 * len(parity.BACKENDS)
    assert max(map(float, numbers)) < 0.5
