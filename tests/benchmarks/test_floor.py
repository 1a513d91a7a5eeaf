"""The floor for loading time renders every image once, with the renderers that the parity tests compare with torchvision."""

from pathlib import Path

import parity
import pytest
from common import floor

from fastflower import Augment, Loader


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("renderer", floor.RENDERERS)
def test_the_floor_renders_every_image_once_with_a_parity_tested_renderer(
    renderer: str, decoded: bool, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert renderer in parity.BACKENDS
    rendered: list[int] = []
    make = floor.RENDERERS[renderer]

    def counting(*arguments: object) -> object:
        real = make(*arguments)  # pyright: ignore[reportArgumentType]

        class Counting:
            jobs = real.jobs

            def __call__(self, image: object, job: object, out: object) -> None:
                rendered.append(id(job))
                real(image, job, out)  # pyright: ignore[reportArgumentType]

        return Counting()

    monkeypatch.setitem(floor.RENDERERS, renderer, counting)
    loader = Loader(shards, batch_size=8, augment=Augment(size=32, crop=(0.3, 1.0), hue=0.1), device="cpu")
    epoch = floor.epoch_of(loader, renderer, 2, decoded=decoded)
    for number in (1, 2):
        assert epoch() == loader.num_samples == 120
        assert len(rendered) == 120 * number
    assert len(set(rendered)) == 120
