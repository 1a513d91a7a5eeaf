"""A network whose logits are the colors of nine parts of an image, and what torchvision and Pillow make of the same image."""

import io
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from fastflower import Augment, Predictor

VIEW = Augment(size=32, resize=36)
CLASSES = tuple(f"{color}{part}" for color in "rgb" for part in range(9))
ORIENTATION = 0x0112


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * nn.functional.adaptive_avg_pool2d(images, 3).flatten(1)


def looking(**options: Any) -> Predictor:
    return Predictor(Looking(), **{"classes": CLASSES, "augment": VIEW, "device": "cpu", **options})


def smooth(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """Return smooth colors without any symmetry."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (5, 6, 3)).astype(np.float32)
    return Image.fromarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def turned(orientation: int) -> dict[str, Any]:
    """Return the options that save an image with an EXIF orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return {"exif": exif}


def upright(data: bytes) -> Image.Image:
    """Return the image as Pillow reads it, with 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    image.info.pop("transparency", None)
    return image.convert("RGB")


def oracle(image: Image.Image, augment: Augment = VIEW) -> NDArray[np.float32]:
    """Return the probabilities that torchvision's validation transform and the network give."""
    size = augment.resized
    chain: list[Any] = [Resize(size), CenterCrop(augment.output_size), ToTensor(), Normalize(*augment.normalization)]
    with torch.inference_mode():
        view: Any = Compose(chain)(image)
        return Looking()(view[None]).softmax(1)[0].numpy()
