"""Compare the backends with torchvision's functionals: python tests/helpers/parity.py FOLDER prints the table.

Differences are in levels of 0..255, averaged over the pixels of an image that torchvision did not move out of the
frame.
"""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

if not torch.cuda.is_available():  # read when torchvision imports Triton
    os.environ["TRITON_INTERPRET"] = "1"

import oracle

from fastflower import Augment
from fastflower.devices import resolve_device
from fastflower.draws.draw import Draw
from fastflower.loading.backends.base import AnyBackend, Setup
from fastflower.loading.backends.selection import create
from fastflower.loading.request import Request
from fastflower.loading.samples import EncodedFiles, SampleSource
from fastflower.shards.image import decode

BACKENDS = ["native", "opencv", "dali", *(() if torch.cuda.is_available() else ("triton",))]
"""Backends to test on the CPU. Triton's kernels run there only without a GPU, in the interpreter."""
JITTER: dict[str, Any] = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1}
AFFINE: dict[str, Any] = {"affine_rotate": 15, "translate": (0.1, 0.2), "shear": (10, 5)}
REPORTS: dict[str, Any] = {"crop": (0.08, 1.0), "flip": 0.5, "rotate": 10, "translate": (0.1, 0.1)}


@dataclass(frozen=True)
class Case:
    """One or more augmentations, and the largest mean difference from torchvision allowed."""

    fields: dict[str, Any]
    limit: float = 1.0
    whole: bool = False
    """Draw from the original image. Otherwise it is first stretched to 224 x 224, so that one operation acts alone."""
    augment: Augment = field(init=False)

    def __post_init__(self) -> None:
        view = {} if self.whole else {"resize": (224, 224)}
        object.__setattr__(self, "augment", Augment(**{**view, **self.fields}))


CASES = {
    "validation view (resize 256, center 224)": Case({}, whole=True),
    "resized crop": Case({"crop": (0.08, 1.0)}, whole=True),
    "downscaling by 4": Case({"resize": 64, "size": 56}, whole=True),
    "downscaling by 16": Case({"resize": 18, "size": 16}, whole=True),
    "horizontal flip": Case({"flip": 0.5}),
    "vertical flip": Case({"flip_vertical": 0.5}),
    "rotation 30": Case({"rotate": 30}),
    "translation 10%": Case({"translate": (0.1, 0.1)}),
    "scale 0.8 .. 1.2": Case({"scale": (0.8, 1.2)}),
    "shear 10, 5": Case({"shear": (10, 5)}),
    "affine rotation 15": Case({"affine_rotate": 15}),
    "brightness 0.4": Case({"brightness": 0.4}),
    "contrast 0.4": Case({"contrast": 0.4}),
    "saturation 0.4": Case({"saturation": 0.4}),
    "hue 0.1": Case({"hue": 0.1}, limit=2.0),
    "hue 0.5": Case({"hue": 0.5}, limit=2.0),
    "grayscale": Case({"grayscale": 0.5}),
    "hue 0.5 and grayscale": Case({"hue": 0.5, "grayscale": 1.0}),
    "random crop (resize 256, crop 224)": Case({"random_crop": True}, whole=True),
    "random crop, padding 28": Case({"random_crop": True, "padding": 28}),
    "random crop, edge padding 28": Case({"random_crop": True, "padding": 28, "padding_mode": "edge"}),
    "rotation 30 before resized crop": Case(
        {"crop": (0.08, 1.0), "rotate": 30, "move_first": True}, limit=2.0, whole=True
    ),
    "affine before center crop": Case({"resize": (256, 320), **AFFINE, "move_first": True}, limit=2.0, whole=True),
    "augmentation of report A": Case({**REPORTS, **JITTER}, limit=2.0, whole=True),
    "everything": Case(
        {**REPORTS, **JITTER, "flip_vertical": 0.5, "scale": (0.9, 1.1), "shear": (5, 0)}, limit=2.0, whole=True
    ),
}


@lru_cache(64)
def decoded(encoded: bytes) -> NDArray[np.uint8]:
    return decode(encoded)


@cache
def stretched(encoded: bytes) -> bytes:
    """Return an image stretched to 224 x 224, as PNG."""
    data = io.BytesIO()
    Image.fromarray(cv2.resize(decode(encoded), (224, 224), interpolation=cv2.INTER_AREA)).save(data, "PNG")
    return data.getvalue()


def turned(encoded: bytes) -> list[bytes]:
    """Return an image with each of the eight EXIF orientations, as JPEG."""
    image, found = Image.open(io.BytesIO(encoded)).convert("RGB"), list[bytes]()
    for orientation in range(1, 9):
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        image.save(file, "JPEG", quality=95, exif=exif)
        found.append(file.getvalue())
    return found


def backend(
    name: Any, augment: Augment, dtype: torch.dtype, encoded: Sequence[bytes], device: str = "cpu"
) -> AnyBackend:
    """Return a backend over image files in memory."""
    samples = SampleSource(EncodedFiles(encoded, [decoded(data).shape[:2] for data in encoded]))
    setup = Setup(resolve_device(device), dtype, batch_size=len(encoded), workers=2)
    return create(name, augment, samples, setup, None if name == "dali" else 1 << 30)


def request(augment: Augment, encoded: Sequence[bytes], seed: int = 0) -> Request:
    """Return the request of all images as one batch."""
    indices = np.arange(len(encoded))
    sizes = np.array([decoded(data).shape[:2] for data in encoded])
    return Request.drawn(augment, indices, sizes, seed=seed, epoch=0, step=0)


def render(
    name: str, augment: Augment, encoded: Sequence[bytes], dtype: torch.dtype = torch.uint8, device: str = "cpu"
) -> Any:
    """Return the images as the backend renders them, (N, H, W, 3) float32."""
    ((_, images),) = backend(name, augment, dtype, encoded, device).run([request(augment, encoded)])
    return images.permute(0, 2, 3, 1).float().cpu().numpy()


@cache
def expected(case: str, encoded: tuple[bytes, ...]) -> list[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Return torchvision's images, each with the mask of the pixels to compare."""
    augment, images = CASES[case].augment, [decoded(data) for data in encoded]
    draw: Draw = request(augment, encoded).draw
    return [oracle.render(image, draw, row, augment) for row, image in enumerate(images)]


def differences(case: str, name: str, image_files: Sequence[bytes], device: str = "cpu") -> NDArray[np.float64]:
    """Return the mean absolute difference of each image that has pixels to compare."""
    encoded = tuple(image_files) if CASES[case].whole else tuple(map(stretched, image_files))
    made = render(name, CASES[case].augment, encoded, device=device)
    pairs = zip(made, expected(case, encoded), strict=True)
    return np.array([np.abs(image - wanted)[shown].mean() for image, (wanted, shown) in pairs if shown.any()])


def main(folder: str) -> None:
    """Print the table of docs/augmentation.md."""
    paths = sorted(Path(folder).glob("*/*.jpg"))
    image_files = [path.read_bytes() for path in paths[:: max(1, len(paths) // 128)][:128]]
    if not image_files:
        sys.exit(f"{folder}: has no images CLASS/*.jpg; pass a folder of class folders.")
    heads = "".join(f" {name}: mean | 95% | worst |" for name in BACKENDS)
    print(f"{len(image_files)} images\n\n| augmentation |{heads}\n|---|{'--:|' * 3 * len(BACKENDS)}")
    for case in CASES:
        cells = [case]
        for name in BACKENDS:
            found = differences(case, name, image_files)
            cells += [f"{found.mean():.2f}", f"{np.percentile(found, 95):.2f}", f"{found.max():.2f}"]
        expected.cache_clear()
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__))
