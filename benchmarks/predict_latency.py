"""Time one prediction, and the network alone: python benchmarks/predict_latency.py [--data IMAGE]

The clock of "network alone" includes a forward pass and the softmax of one normalized 224-pixel tensor in memory. That of
each other side includes a call of `Predictor` with one image in memory, from bytes, a PIL image or an array to the
Prediction. Besides the clock on the wall, the CPU time of the process is read: with one thread it is the time that a call takes
on an idle machine. An untrained ResNet-18 in float32 on the CPU, with the same threads for all sides. The sides run in turn.
"Overhead" is the difference from the network alone in the same round. The sides "without network" show the same overhead
directly: their network only returns one pixel.
"""

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro
from common import record
from common.images import drawn
from PIL import Image
from torch import Tensor, nn

from fastflower import Augment, Predictor
from fastflower.models.backbone import build, on_device
from fastflower.models.inference import log_probabilities

SIZE = (500, 375)  # width, height


class OnePixel(nn.Module):
    """A network that takes no time."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the first pixel of images (N, 3, H, W)."""
        return images[:, :, 0, 0]


def an_image(data: Path | None) -> bytes:
    """Return a JPEG file of SIZE: the given one, or a drawn flower."""
    with tempfile.TemporaryDirectory() as scratch:
        path = data or next(drawn(Path(scratch, "drawn")).glob("*/*.jpg"))
        if Image.open(path).size == SIZE:
            return path.read_bytes()
        target = io.BytesIO()
        Image.open(path).convert("RGB").resize(SIZE).save(target, "JPEG", quality=95)
        return target.getvalue()


def main(
    data: Path | None = None,
    out: Path = record.ROOT / "benchmarks" / "results",
    rounds: int = 200,
    threads: int | None = None,
) -> None:
    """Time single predictions.

    Args:
        data: A JPEG file; by default, draws a flower. Resized to 500 x 375 pixels if it has another size.
        out: Folder for the JSON.
        rounds: Counted rounds, after ten warm-up rounds.
        threads: Threads of torch, on all sides. None leaves them as they are.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    encoded, device = an_image(data), torch.device("cpu")
    network = on_device(build("resnet18", 5, weights=None).eval(), device)
    predictor = Predictor(network, classes=tuple("abcde"), augment=Augment(), device="cpu")
    bare = Predictor(OnePixel(), classes=tuple("abc"), augment=Augment(), device="cpu")
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    array = np.asarray(image)
    ready = torch.rand(1, 3, 224, 224).to(memory_format=torch.channels_last)
    sides: dict[str, Callable[[], object]] = {
        "network alone": lambda: log_probabilities(network, ready, tta=False).exp(),
        "bytes": lambda: predictor(encoded),
        "PIL image": lambda: predictor(image),
        "array": lambda: predictor(array),
        "bytes, without network": lambda: bare(encoded),
        "PIL image, without network": lambda: bare(image),
        "array, without network": lambda: bare(array),
    }
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-10, rounds):
        for name, call in sides.items():
            start, worked = time.perf_counter(), time.process_time()
            call()
            if number >= 0:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - worked)
    for title, found in (("wall clock", wall), ("CPU time", cpu)):
        print(f"{title:28}{'ms':>26}{'overhead, ms':>26}   n = {rounds}, {torch.get_num_threads()} threads")
        for name, seconds in found.items():
            extra = [mine - alone for mine, alone in zip(seconds, found["network alone"], strict=True)]
            print(f"{name:28}{shown(seconds):>26}{shown(extra) if 'network' not in name else '':>26}")
    content: dict[str, object] = {"clock": " ".join((__doc__ or "").split("\n\n")[1].split()), "bytes": len(encoded)}
    content |= {"seconds": wall, "cpu_seconds": cpu, "load_average": os.getloadavg()}
    print(f"wrote {record.write(out, 'predict_latency', device, content)}")


def shown(seconds: list[float]) -> str:
    """Return the median and the 5th and 95th percentiles in milliseconds: single calls have outliers."""
    low, *_, high = statistics.quantiles(seconds, n=20)
    return f"{1000 * statistics.median(seconds):.2f} ({1000 * low:.2f} - {1000 * high:.2f})"


if __name__ == "__main__":
    tyro.cli(main)
