"""The floor for loading time on the CPU: decoding and rendering in bare threads, and nothing else.

There are no checksums, random draws or batches: the encoded files are in RAM, the draws are made beforehand, and each
thread overwrites one buffer. What remains is decoding, antialiasing, one warp, clipped color, exact hue and
normalization to float32. The parity tests compare the renderers with torchvision.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import numpy as np
import torch

from fastflower import Augment, Loader
from fastflower.loading.backends.native import NativeRenderer
from fastflower.loading.backends.opencv import OpencvRenderer
from fastflower.loading.backends.threads import Renderer
from fastflower.loading.request import Request
from fastflower.loading.samples import SampleSource
from fastflower.shards.image import decode
from fastflower.shards.reader import ShardReader

RENDERERS: dict[str, Callable[[Augment, torch.dtype], Renderer]] = {"native": NativeRenderer, "opencv": OpencvRenderer}


def epoch_of(loader: Loader, renderer: str, workers: int, *, decoded: bool) -> Callable[[], int]:
    """Return a function that renders every image of the loader's split once and returns their number.

    Args:
        loader: Its split, augmentation and seed are used.
        renderer: A key of RENDERERS.
        workers: Number of threads.
        decoded: Keep the images decoded in RAM, at the decode scale of their draws.
    """
    render = RENDERERS[renderer](loader.augment, torch.float32)
    numbers = range(loader.num_samples)
    indices = np.array(numbers)
    samples = SampleSource(ShardReader(loader.manifest, loader.split))
    jobs = render.jobs(Request.drawn(loader.augment, indices, samples.sizes, seed=loader.seed, epoch=0, step=0))
    encoded = [samples.encoded(index) for index in numbers]
    images = [decode(data, job.decode_scale) for data, job in zip(encoded, jobs, strict=True)] if decoded else None

    def epoch() -> int:
        order = np.random.default_rng().permutation(len(jobs)).tolist()
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, [order] * workers, [count()] * workers))  # the threads share one counter
        return len(jobs)

    def work(order: Sequence[int], numbers: Any) -> None:
        out = np.empty((*loader.augment.output_size, 3), np.float32)
        for number in numbers:
            if number >= len(order):
                return
            index = order[number]
            image = images[index] if images else decode(encoded[index], jobs[index].decode_scale)
            render(image, jobs[index], out)

    return epoch
