"""Draw five kinds of flowers as JPEG files in class folders: python tools/draw_flowers.py OUT

Deterministic; reads no image files. The kinds differ in shape; their colors, sizes, numbers and backgrounds overlap,
so that a network has something to learn.
"""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import tyro
from numpy.random import Generator
from numpy.typing import NDArray
from tqdm import tqdm

from fastflower.machine import cores

Image = NDArray[np.uint8]
"""(H, W, 3) RGB."""
Point = NDArray[np.float64]
"""(2,) x, y."""
Color = tuple[float, float, float]

SHIFT = 4  # fractional bits of the coordinates passed to OpenCV
WHITES: list[Color] = [(235, 235, 225), (240, 215, 225), (245, 240, 200)]
YELLOWS: list[Color] = [(235, 195, 30), (245, 215, 70), (225, 160, 20)]
REDS: list[Color] = [(190, 25, 45), (220, 90, 130), (160, 40, 110), (230, 120, 60)]


def petal(
    image: Image, center: Point, angle: float, start: float, length: float, width: float, color: Color, tip: float
) -> None:
    """Draw one petal that points away from the center. A tip of 0 is round; a tip of 1 is pointed."""
    along = np.linspace(0, 1, 12)
    half = width / 2 * np.sin(np.pi * along ** (0.7 + 0.5 * tip)) ** (0.6 + 0.6 * tip)
    distance = start + length * along
    outline = np.concatenate([np.stack([distance, half], 1), np.stack([distance, -half], 1)[::-1]])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points = np.rint((outline @ turn + center) * 2**SHIFT).astype(np.int32)
    cv2.fillPoly(image, [points], color, cv2.LINE_AA, SHIFT)
    cv2.polylines(
        image, [points], isClosed=True, color=tinted(color, 0.8), thickness=1, lineType=cv2.LINE_AA, shift=SHIFT
    )


def disc(image: Image, center: Point, radius: float, color: Color) -> None:
    x, y = np.rint(center * 2**SHIFT).astype(int).tolist()
    cv2.circle(image, (x, y), int(radius * 2**SHIFT), color, -1, cv2.LINE_AA, SHIFT)


def varied(rng: Generator, colors: Sequence[Color], spread: float = 18) -> Color:
    return clipped(np.array(colors[int(rng.integers(len(colors)))]) + rng.normal(0, spread, 3))


def tinted(color: Color, factor: float | NDArray[np.float64]) -> Color:
    return clipped(np.array(color) * factor)


def clipped(values: NDArray[np.float64]) -> Color:
    red, green, blue = np.clip(values, 0, 255).tolist()
    return red, green, blue


def ring(
    image: Image,
    rng: Generator,
    center: Point,
    count: int,
    start: float,
    length: float,
    width: float,
    color: Color,
    tip: float,
) -> None:
    phase = rng.uniform(0, 2 * np.pi)
    for number in range(count):
        angle = phase + 2 * np.pi * number / count + rng.normal(0, 0.06)
        tint = tinted(color, rng.normal(1, 0.05, 3))
        petal(image, center, angle, start, length * rng.normal(1, 0.06), width, tint, tip)


def daisy(image: Image, rng: Generator, center: Point, radius: float) -> None:
    color = varied(rng, WHITES + YELLOWS[:1])
    ring(image, rng, center, int(rng.integers(12, 20)), 0.2 * radius, 0.8 * radius, 0.24 * radius, color, 0.2)
    disc(image, center, radius * rng.uniform(0.2, 0.3), varied(rng, YELLOWS))


def dandelion(image: Image, rng: Generator, center: Point, radius: float) -> None:
    color = varied(rng, YELLOWS + WHITES[2:])
    for share in (1.0, 0.72, 0.45):
        ring(image, rng, center, int(rng.integers(26, 36)), 0, share * radius, 0.1 * radius, color, 0.5)


def rose(image: Image, rng: Generator, center: Point, radius: float) -> None:
    color = varied(rng, REDS + WHITES + YELLOWS[:1])
    for share in (1.0, 0.75, 0.52, 0.3):
        tint = tinted(color, 0.7 + 0.3 * share)
        ring(image, rng, center, int(rng.integers(4, 7)), 0, share * radius, share * radius, tint, 0.0)


def sunflower(image: Image, rng: Generator, center: Point, radius: float) -> None:
    color = varied(rng, [*YELLOWS, REDS[3]])
    ring(image, rng, center, int(rng.integers(14, 22)), 0.35 * radius, 0.65 * radius, 0.26 * radius, color, 1.0)
    disc(image, center, radius * rng.uniform(0.34, 0.46), varied(rng, [(70, 45, 25), (95, 70, 30)]))


def tulip(image: Image, rng: Generator, center: Point, radius: float) -> None:
    color = varied(rng, REDS + YELLOWS + WHITES)
    lean = rng.normal(0, 0.25)
    base = center + 0.8 * radius * np.array([np.sin(lean), np.cos(lean)])
    petal(image, base, np.pi / 2 - lean, 0, 1.6 * radius, 0.1 * radius, varied(rng, [(60, 120, 50)]), 0.0)
    for turn, share in ((-0.42, 1.5), (0.42, 1.5), (0.0, 1.6)):
        tint = tinted(color, 0.85 + 0.15 * (turn == 0))
        petal(image, base, -np.pi / 2 - lean + turn, 0, share * radius, 0.85 * radius, tint, 0.4)


KINDS: dict[str, Callable[[Image, Generator, Point, float], None]] = {
    "daisy": daisy,
    "dandelion": dandelion,
    "rose": rose,
    "sunflower": sunflower,
    "tulip": tulip,
}


def draw(kind: str, rng: Generator) -> Image:
    """Draw one image, (H, W, 3) uint8 RGB, with sides of 240 to 500 pixels."""
    height, width = rng.integers(240, 501, 2)
    coarse = rng.normal(0, 1, (int(rng.integers(3, 12)), int(rng.integers(3, 12)), 1))
    ground = np.array(varied(rng, [(60, 95, 45), (95, 85, 60), (120, 150, 185), (45, 55, 40)], 25))
    rough = cv2.resize(coarse.astype(np.float32), (int(width), int(height)), interpolation=cv2.INTER_CUBIC)[..., None]
    image = np.clip(ground * (1 + 0.22 * rough), 0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(4, 14))):  # leaves and petals of other flowers
        spot, length = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0.1, 0.5) * width
        tone = varied(rng, [(60, 120, 50), (40, 80, 40), (120, 110, 60), (160, 150, 90)])
        petal(image, spot, rng.uniform(0, 2 * np.pi), 0, length, 0.3 * length, tone, rng.uniform(0, 1))
    for _ in range(int(rng.integers(1, 4))):
        radius = rng.uniform(0.13, 0.4) * min(height, width)
        KINDS[kind](image, rng, rng.uniform(0.2, 0.8, 2) * (width, height), radius)
    if rng.uniform() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.6))
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(2, 14))
    return np.clip(image * np.float32(rng.uniform(0.6, 1.25)) + grain, 0, 255).astype(np.uint8)


def draw_flowers(out: Annotated[Path, tyro.conf.Positional], per_class: int = 160, seed: int = 0) -> None:
    """Write drawings of five kinds of flowers to OUT/KIND/NNNN.jpg.

    Args:
        out: Folder to write to.
        per_class: Number of images of each kind.
        seed: Random seed of the images.
    """

    def write(job: tuple[int, str, int]) -> None:
        label, kind, number = job
        image = draw(kind, np.random.default_rng((seed, label, number)))
        _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
        (out / kind / f"{number:04d}.jpg").write_bytes(data.tobytes())

    for kind in KINDS:
        (out / kind).mkdir(parents=True, exist_ok=True)
    jobs = [(label, kind, number) for label, kind in enumerate(KINDS) for number in range(per_class)]
    with ThreadPoolExecutor(cores()) as pool:
        list(tqdm(pool.map(write, jobs), total=len(jobs), desc="draw", unit="image", disable=None))


if __name__ == "__main__":
    sys.exit(tyro.cli(draw_flowers))
