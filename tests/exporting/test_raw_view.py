"""The exported view against the one that `predict` renders, and against torchvision."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from looking import oracle, smooth
from numpy.typing import NDArray

from fastflower import Augment
from fastflower.exporting.graph import RawView
from fastflower.loading.backends.opencv import OpencvRenderer
from fastflower.loading.request import Request
from fastflower.shards.image import reduced

PLAIN = Augment(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))  # gray levels
VIEWS = (
    replace(PLAIN, size=64, resize=72),
    replace(PLAIN, size=64, resize=64),
    replace(PLAIN, size=(48, 64), resize=(56, 70)),
    replace(PLAIN, size=64, resize="off"),
    replace(PLAIN, size=80, resize=64),  # black at the edges
)
SIZES = (
    (75, 100),
    (100, 75),
    (64, 64),
    (30, 41),
    (1, 90),
    (90, 1),
    (1, 1),
    (300, 301),
    (800, 600),
    (2000, 3000),
    (64, 900),
)


def rendered(augment: Augment, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the view that `predict` renders of decoded pixels."""
    out = np.empty((*augment.output_size, 3), np.float32)
    render = OpencvRenderer(augment, torch.float32)
    size = np.array([pixels.shape[:2]])
    (job,) = render.jobs(Request.drawn(augment, np.zeros(1, np.int64), size, seed=0, epoch=0, step=0))
    render(reduced(pixels, job.decode_scale), job, out)
    return out


def exported(augment: Augment, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return RawView(augment)(torch.from_numpy(pixels)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("augment", VIEWS, ids=lambda view: f"{view.size}-{view.resize}")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_pixel_is_that_of_predict_within_its_rounding(
    augment: Augment, size: tuple[int, int], rng: np.random.Generator
) -> None:
    noise = rng.integers(0, 256, (*size, 3), np.uint8)
    difference = np.abs(rendered(augment, noise) - exported(augment, noise))
    assert difference.mean() < 0.5
    assert difference.max() < 3  # predict rounds to whole levels after each of up to three steps


def test_smooth_images_look_as_torchvision_shows_them() -> None:
    """The filters differ, as docs/augmentation.md says, but not in what they show."""
    image = smooth(640, 480)
    view = Augment(size=32, resize=36)
    seen = RawView(view)(torch.from_numpy(np.array(image)))[None]
    ours = torch.nn.functional.adaptive_avg_pool2d(seen, 3).flatten(1).softmax(1)[0].numpy()
    np.testing.assert_allclose(ours, oracle(image, view), atol=0.01)


def test_a_batch_is_its_images() -> None:
    pixels = torch.from_numpy(np.stack([np.array(smooth(90, 70, seed)) for seed in range(3)]))
    view = RawView(VIEWS[0])
    torch.testing.assert_close(view(pixels), torch.stack([view(each) for each in pixels]))


def test_pixels_beyond_a_small_resize_are_black() -> None:
    white = np.full((64, 64, 3), 255, np.uint8)
    shown = exported(VIEWS[4], white)
    inside = np.zeros((80, 80), bool)
    inside[8:72, 8:72] = True
    assert (shown[inside] == 255).all()
    assert (shown[~inside] == 0).all()
