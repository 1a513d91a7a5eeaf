"""Packing speed: python benchmarks/pack_speed.py [--data FOLDER] [--rounds N]

The clock contains everything from the folder to the finished shards, in one process that has its libraries loaded: finding
the files, reading, proving (fastflower alone), writing. Files are in the page cache after the uncounted first round; before
each run what others wrote is on the disk. litdata starts its worker processes inside the clock, as it does for its users.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import tyro
from common.images import drawn
from common.record import ROOT, Side, installed, interleave, ratio, silent, table, write

from fastflower import pack
from fastflower.machine import cores
from fastflower.packing.folder import scan
from fastflower.shards.image import decode

SHARD_BYTES = 64 << 20


def floor(files: list[Path], out: Path, threads: int) -> int:
    """The least that any packer with proof does: read and decode every file in full, and write its bytes once."""

    def work(number: int) -> None:
        with (out / f"{number}.bin").open("wb") as target:
            for path in files[number::threads]:
                data = path.read_bytes()
                decode(data)
                target.write(data)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return len(files)


def fastflower(folder: Path, out: Path, threads: int) -> int:
    """With proof, two splits, indexes and checksums."""
    manifest = pack(folder, out / "shards", shard_bytes=SHARD_BYTES, workers=threads)
    return sum(split.samples for split in manifest.splits.values())


def proven(data: bytes) -> bytes:
    """The bytes of an image that decodes."""
    decode(data)
    return data


def webdataset(samples: list[tuple[Path, int]], out: Path, through: Callable[[bytes], bytes] = bytes) -> int:
    """Its ShardWriter, fed with the files' bytes: no shuffle, no index."""
    from webdataset.writer import ShardWriter

    with ShardWriter(f"{out}/%06d.tar", maxsize=SHARD_BYTES, verbose=0) as writer:
        for number, (path, label) in enumerate(samples):
            writer.write({"__key__": f"{number:08d}", "jpg": through(path.read_bytes()), "cls": label})
    return len(samples)


def loaded(sample: tuple[str, int]) -> dict[str, object]:
    """What litdata's optimize asks for: one sample, made in a worker process."""
    return {"image": Path(sample[0]).read_bytes(), "label": sample[1]}


def litdata(samples: list[tuple[Path, int]], out: Path, threads: int) -> int:
    """Its optimize, fed with the files' bytes."""
    from litdata import optimize  # pyright: ignore[reportMissingImports]

    inputs = [(str(path), label) for path, label in samples]
    with silent():
        optimize(loaded, inputs, output_dir=str(out / "chunks"), chunk_bytes=SHARD_BYTES, num_workers=threads)
    return len(samples)


def mds(samples: list[tuple[Path, int]], out: Path, through: Callable[[bytes], bytes] = bytes) -> int:
    """MosaicML's MDSWriter, fed with the files' bytes."""
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    with MDSWriter(out=str(out / "mds"), columns={"image": "bytes", "label": "int"}, size_limit=SHARD_BYTES) as writer:
        for path, label in samples:
            writer.write({"image": through(path.read_bytes()), "label": label})
    return len(samples)


def main(data: Path | None = None, rounds: int = 5, out: Path = ROOT / "benchmarks" / "results") -> None:
    """Time packing against the floor and against other packers, interleaved.

    Args:
        data: A folder of class folders; drawn flowers where it is left out.
        rounds: Counted rounds, after one that is not.
        out: The folder for the JSON.
    """
    threads = cores()
    with tempfile.TemporaryDirectory() as scratch:
        folder = data or drawn(Path(scratch, "drawn"))
        found = scan(folder)
        samples = [(folder / found.path(n), int(found.files["label"][n])) for n in range(len(found))]
        files = [path for path, _ in samples]
        ways: Iterable[tuple[str, str | None, Callable[[Path], int]]] = (
            ("floor: read, decode and write once", None, lambda to: floor(files, to, threads)),
            ("fastflower, with proof", None, lambda to: fastflower(folder, to, threads)),
            ("webdataset ShardWriter, no proof", "webdataset", lambda to: webdataset(samples, to)),
            ("litdata optimize, no proof", "litdata", lambda to: litdata(samples, to, threads)),
            ("MosaicML MDSWriter, no proof", "streaming", lambda to: mds(samples, to)),
            ("webdataset ShardWriter, each decoded first", "webdataset", lambda to: webdataset(samples, to, proven)),
            ("MosaicML MDSWriter, each decoded first", "streaming", lambda to: mds(samples, to, proven)),
        )
        sides = [
            side(name, run, Path(scratch) / f"run{n}") for n, (name, module, run) in enumerate(ways) if has(module)
        ]
        interleave(sides, rounds, torch.device("cpu"))
        content = {
            "images": len(found),
            "bytes": int(found.files["size"].sum()),
            "threads": threads,
            "peers": dict(installed("webdataset", "litdata", "mosaicml-streaming", "opencv-python-headless")),
            "times_the_floor": 1 / ratio(sides[1], sides[0]),
            "sides": [timed.to_dict() for timed in sides],
        }
    print(table(f"packing, {threads} threads", sides))
    print(f"fastflower takes {content['times_the_floor']:.2f} times the floor")
    for other in sides[2:]:
        print(f"fastflower is {ratio(sides[1], other):.2f} times as fast as {other.name}")
    print(f"wrote {write(out, 'pack_speed', torch.device('cpu'), content)}")


def side(name: str, run: Callable[[Path], int], to: Path) -> Side:
    """A way of packing into a folder that is new each time."""

    def fresh() -> int:
        to.mkdir()
        return run(to)

    def clear() -> None:
        shutil.rmtree(to)
        os.sync()

    return Side(name, fresh, clear)


def has(module: str | None) -> bool:
    """Whether a competitor can be imported; it says so where not."""
    from importlib.util import find_spec

    if module is None or find_spec(module):
        return True
    print(f"{module} is not installed and is left out: pip install '.[bench]'", file=sys.stderr)
    return False


if __name__ == "__main__":
    tyro.cli(main)
