"""Measure the peak memory of packing: python benchmarks/pack_memory.py [--counts 10000 1000000]

Packs folders of many small images, all different, each in a process of its own, and reads the peak resident memory of
the process (VmHWM in /proc, which includes pages of mapped files). Bytes per file is the slope between the two largest
folders.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import tyro
from common.record import ROOT, write

CLASSES = 10
CHILD = """
import json, sys, time
from pathlib import Path
from fastflower.packing.packer import pack
start = time.perf_counter()
manifest = pack(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - start
images = sum(split.samples for split in manifest.splits.values())
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps({"images": images, "seconds": seconds, "peak_bytes": peak}))
"""


def many(folder: Path, count: int) -> None:
    """Write `count` different JPEG files of noise, 16 x 16 pixels."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class-{label}").mkdir(parents=True)
    for number in range(count):
        _, data = cv2.imencode(".jpg", rng.integers(0, 256, (16, 16, 3), np.uint8))
        (folder / f"class-{number % CLASSES}" / f"image-{number:09d}.jpg").write_bytes(data.tobytes())


def main(counts: tuple[int, ...] = (10_000, 100_000, 1_000_000), out: Path = ROOT / "benchmarks" / "results") -> None:
    """Pack the given numbers of files and print the peak memory.

    Args:
        counts: Numbers of files, ascending.
        out: Folder for the JSON.
    """
    results: list[dict[str, Any]] = []
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            many(Path(scratch, "data"), count)
            command = [sys.executable, "-c", CHILD, f"{scratch}/data", f"{scratch}/shards"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout))
        print(
            f"{count:9,} files: {results[-1]['peak_bytes'] / 2**20:6.0f} MiB, {results[-1]['seconds']:6.1f} s",
            flush=True,
        )
    content: dict[str, Any] = {"results": results}
    if len(results) > 1:
        small, large = results[-2], results[-1]
        slope = (large["peak_bytes"] - small["peak_bytes"]) / (large["images"] - small["images"])
        content["bytes_per_file"] = slope
        print(f"{slope:.0f} bytes per file")
    print(f"wrote {write(out, 'pack_memory', torch.device('cpu'), content)}")


if __name__ == "__main__":
    tyro.cli(main)
