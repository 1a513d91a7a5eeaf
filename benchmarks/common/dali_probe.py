"""Decode a folder of images in one DALI graph. gpu_dali.py runs this in a throwaway process because it may crash.

python benchmarks/common/dali_probe.py FOLDER PIXELS --device gpu [--torchvision] [--fancy] [--load L] [--region]

Writes the central 64 x 64 pixels of each image, (N, 64, 64, 3) uint8, to PIXELS (.npy). Prints one line of JSON:
images/s and the libnvjpeg that is mapped. Imports torchvision only with --torchvision, since the first import decides
which nvJPEG is used.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 64  # of the central crop, in pixels


def middle(size: Any) -> tuple[int, int]:
    """Return the top left corner (y, x) of the central crop."""
    return (size[0] - SIDE) // 2, (size[1] - SIDE) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pixels", type=Path)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--torchvision", action="store_true")
    parser.add_argument("--fancy", action="store_true")
    parser.add_argument("--region", action="store_true")
    parser.add_argument("--load", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    if given.torchvision:
        import torchvision  # noqa: F401  (for the libraries it maps)
    from nvidia.dali import fn as untyped_fn
    from nvidia.dali import types as untyped_types
    from nvidia.dali.pipeline import Pipeline

    fn: Any = untyped_fn
    types: Any = untyped_types
    paths = sorted(given.folder.glob("*.jpg"))
    sizes = json.loads((given.folder / "sizes.json").read_text())
    encoded = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]
    gpu = given.device == "gpu"
    how = {"device": "mixed" if gpu else "cpu", "jpeg_fancy_upsampling": given.fancy, "hw_decoder_load": given.load}
    pipe = Pipeline(len(encoded), 4, 0 if gpu else None, prefetch_queue_depth=1)
    with pipe:
        samples = fn.external_source(name="samples", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        cut: Any = {"shape": [SIDE, SIDE], "axes": (0, 1)}
        if given.region:
            images = fn.decoders.image_slice(samples, start=start, **cut, **how)
        else:
            images = fn.slice(fn.decoders.image(samples, **how), start=start, **cut)
        pipe.set_outputs(images)
    pipe.build()
    starts = np.array([middle(size) for size in sizes], np.int32)

    def run() -> Any:
        pipe.feed_input("samples", encoded)
        pipe.feed_input("start", starts)
        (found,) = pipe.run()
        return found.as_cpu() if gpu else found

    first = run()
    found = [np.asarray(first.at(number)) for number in range(len(encoded))]
    begun = time.perf_counter()
    for _ in range(given.repeats):
        run()
    rate = given.repeats * len(encoded) / (time.perf_counter() - begun)
    np.save(given.pixels, np.stack(found))
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = sorted({Path(line.split()[-1]).name for line in lines if "libnvjpeg.so" in line or "libnvjpeg." in line})
    print(json.dumps({"images_per_second": rate, "nvjpeg": mapped}))


if __name__ == "__main__":
    main()
