"""How far the backends are from torchvision's functionals: python tests/helpers/parity.py FOLDER prints the table.

Differences are gray levels of 255, a mean an image, over the pixels that none of torchvision's frames cut off.
"""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

if not torch.cuda.is_available():  # asked for when Triton is imported, which torchvision does
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
"""On the CPU; Triton's kernels run there only where there is no GPU, in its interpreter."""
JITTER: dict[str, Any] = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1}
REPORTS: dict[str, Any] = {"crop": (0.08, 1.0), "flip": 0.5, "rotate": 10, "translate": (0.1, 0.1)}


@dataclass(frozen=True)
class Case:
    """One augmentation, or several, and how far from torchvision they may be on average."""

    fields: dict[str, Any]
    limit: float = 1.0
    whole: bool = False
    """Draw from the whole image; else from one that was stretched to 224 x 224 before, so that one operation acts alone."""
    augment: Augment = field(init=False)

    def __post_init__(self) -> None:
        view = {} if self.whole else {"resize": (224, 224)}
        object.__setattr__(self, "augment", Augment(**{**view, **self.fields}))


CASES = {
    "validation view (resize 256, center 224)": Case({}, whole=True),
    "resized crop": Case({"crop": (0.08, 1.0)}, whole=True),
    "reduction by four": Case({"resize": 64, "size": 56}, whole=True),
    "reduction by sixteen": Case({"resize": 18, "size": 16}, whole=True),
    "left-right flip": Case({"flip": 0.5}),
    "upside-down flip": Case({"flip_vertical": 0.5}),
    "rotation 30": Case({"rotate": 30}),
    "translation 10%": Case({"translate": (0.1, 0.1)}),
    "scale 0.8 .. 1.2": Case({"scale": (0.8, 1.2)}),
    "shear 10, 5": Case({"shear": (10, 5)}),
    "rotation of the affine 15": Case({"affine_rotate": 15}),
    "brightness 0.4": Case({"brightness": 0.4}),
    "contrast 0.4": Case({"contrast": 0.4}),
    "saturation 0.4": Case({"saturation": 0.4}),
    "hue 0.1": Case({"hue": 0.1}, limit=2.0),
    "hue 0.5": Case({"hue": 0.5}, limit=2.0),
    "the reports' chain": Case({**REPORTS, **JITTER}, limit=2.0, whole=True),
    "everything": Case(
        {**REPORTS, **JITTER, "flip_vertical": 0.5, "scale": (0.9, 1.1), "shear": (5, 0)}, limit=2.0, whole=True
    ),
}


@cache
def stretched(encoded: bytes) -> bytes:
    """An image at 224 x 224, losslessly."""
    data = io.BytesIO()
    Image.fromarray(cv2.resize(decode(encoded), (224, 224), interpolation=cv2.INTER_AREA)).save(data, "PNG")
    return data.getvalue()


def turned(encoded: bytes) -> list[bytes]:
    """An image with each of the eight orientations of EXIF."""
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
    """A backend over image files in memory."""
    samples = SampleSource(EncodedFiles(encoded, [decode(data).shape[:2] for data in encoded]))
    setup = Setup(resolve_device(device), dtype, batch_size=len(encoded), workers=2)
    return create(name, augment, samples, setup, None if name == "dali" else 1 << 30)


def request(augment: Augment, encoded: Sequence[bytes], seed: int = 0) -> Request:
    """All images as one batch."""
    indices = np.arange(len(encoded))
    sizes = np.array([decode(data).shape[:2] for data in encoded])
    return Request.drawn(augment, indices, sizes, seed=seed, epoch=0, step=0)


def render(
    name: str, augment: Augment, encoded: Sequence[bytes], dtype: torch.dtype = torch.uint8, device: str = "cpu"
) -> Any:
    """(N, H, W, 3) as the backend makes them."""
    ((_, images),) = backend(name, augment, dtype, encoded, device).run([request(augment, encoded)])
    return images.permute(0, 2, 3, 1).float().cpu().numpy()


@cache
def expected(case: str, encoded: tuple[bytes, ...]) -> list[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """torchvision's images and the pixels that count."""
    augment, images = CASES[case].augment, [decode(data) for data in encoded]
    draw: Draw = request(augment, encoded).draw
    return [oracle.render(image, draw, row, augment) for row, image in enumerate(images)]


def differences(case: str, name: str, image_files: Sequence[bytes], device: str = "cpu") -> NDArray[np.float64]:
    """The mean absolute difference of each image that has counting pixels."""
    encoded = tuple(image_files) if CASES[case].whole else tuple(map(stretched, image_files))
    made = render(name, CASES[case].augment, encoded, device=device)
    pairs = zip(made, expected(case, encoded), strict=True)
    return np.array([np.abs(image - wanted)[shown].mean() for image, (wanted, shown) in pairs if shown.any()])


def main(folder: str) -> None:
    """Print the table of docs/augmentation.md."""
    paths = sorted(Path(folder).glob("*/*.jpg"))
    image_files = [path.read_bytes() for path in paths[:: max(1, len(paths) // 128)][:128]]
    if not image_files:
        sys.exit(f"{folder}: has no images CLASS/*.jpg; name a folder of class folders.")
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
