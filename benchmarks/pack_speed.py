"""Time packing: python benchmarks/pack_speed.py [--data FOLDER] [--rounds N]

The clock covers everything from the folder to the finished shards, in one process that has already imported its
libraries: finding the files, reading, decoding (on the sides that check images) and writing. After the uncounted first
round the files are in the page cache. The output of earlier runs is synced to disk before each run. litdata starts its
worker processes within the clock, as it does for its users.
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
    """Do the least that a packer must do to check every image: read and fully decode each file, and write its bytes once."""

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
    """Pack with every image checked, two splits, indexes and checksums."""
    manifest = pack(folder, out / "shards", shard_bytes=SHARD_BYTES, workers=threads)
    return sum(split.samples for split in manifest.splits.values())


def decoded(data: bytes) -> bytes:
    """Return the bytes of an image after checking that it decodes."""
    decode(data)
    return data


def webdataset(samples: list[tuple[Path, int]], out: Path, through: Callable[[bytes], bytes] = bytes) -> int:
    """Write the files' bytes with webdataset's ShardWriter: no shuffle, no index."""
    from webdataset.writer import ShardWriter

    with ShardWriter(f"{out}/%06d.tar", maxsize=SHARD_BYTES, verbose=0) as writer:
        for number, (path, label) in enumerate(samples):
            writer.write({"__key__": f"{number:08d}", "jpg": through(path.read_bytes()), "cls": label})
    return len(samples)


def load_sample(sample: tuple[str, int]) -> dict[str, object]:
    """Return one sample for litdata's optimize, which calls this in its worker processes."""
    return {"image": Path(sample[0]).read_bytes(), "label": sample[1]}


def litdata(samples: list[tuple[Path, int]], out: Path, threads: int) -> int:
    """Write the files' bytes with litdata's optimize."""
    from litdata import optimize  # pyright: ignore[reportMissingImports]

    inputs = [(str(path), label) for path, label in samples]
    with silent():
        optimize(load_sample, inputs, output_dir=str(out / "chunks"), chunk_bytes=SHARD_BYTES, num_workers=threads)
    return len(samples)


def mds(samples: list[tuple[Path, int]], out: Path, through: Callable[[bytes], bytes] = bytes) -> int:
    """Write the files' bytes with MosaicML's MDSWriter."""
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    with MDSWriter(out=str(out / "mds"), columns={"image": "bytes", "label": "int"}, size_limit=SHARD_BYTES) as writer:
        for path, label in samples:
            writer.write({"image": through(path.read_bytes()), "label": label})
    return len(samples)


def main(data: Path | None = None, rounds: int = 5, out: Path = ROOT / "benchmarks" / "results") -> None:
    """Time packing against the floor and against other packers, interleaved.

    Args:
        data: Folder of class folders; by default, draws flowers.
        rounds: Counted rounds, after one warm-up round.
        out: Folder for the JSON.
    """
    threads = cores()
    with tempfile.TemporaryDirectory() as scratch:
        folder = data or drawn(Path(scratch, "drawn"))
        found = scan(folder)
        samples = [(folder / found.path(n), int(found.files["label"][n])) for n in range(len(found))]
        files = [path for path, _ in samples]
        ways: Iterable[tuple[str, str | None, Callable[[Path], int]]] = (
            ("floor: read, decode and write once", None, lambda to: floor(files, to, threads)),
            ("fastflower, every image checked", None, lambda to: fastflower(folder, to, threads)),
            ("webdataset ShardWriter, nothing checked", "webdataset", lambda to: webdataset(samples, to)),
            ("litdata optimize, nothing checked", "litdata", lambda to: litdata(samples, to, threads)),
            ("MosaicML MDSWriter, nothing checked", "streaming", lambda to: mds(samples, to)),
            (
                "webdataset ShardWriter, images decoded first",
                "webdataset",
                lambda to: webdataset(samples, to, decoded),
            ),
            ("MosaicML MDSWriter, images decoded first", "streaming", lambda to: mds(samples, to, decoded)),
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
    """Return a side that packs into a new folder each time."""

    def fresh() -> int:
        to.mkdir()
        return run(to)

    def clear() -> None:
        shutil.rmtree(to)
        os.sync()

    return Side(name, fresh, clear)


def has(module: str | None) -> bool:
    """Return whether a library can be imported, and print how to install it if not."""
    from importlib.util import find_spec

    if module is None or find_spec(module):
        return True
    print(f"{module} is not installed and is skipped: pip install '.[bench]'", file=sys.stderr)
    return False


if __name__ == "__main__":
    tyro.cli(main)
