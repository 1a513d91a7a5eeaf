"""The images that benchmarks run on: a given folder or drawn flowers, all or some of them, with the split of a pack."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from common import record
from fastflower import Loader, Manifest, pack
from fastflower.packing.folder import scan


def drawn(into: Path) -> Path:
    """Draw flowers into class folders and return the folder."""
    subprocess.run([sys.executable, record.ROOT / "tools" / "draw_flowers.py", into], check=True)
    return into


@contextmanager
def images(data: Path | None, max_images: int | None, val_fraction: float = 0.0) -> Iterator[tuple[Path, Path]]:
    """Yield class folders (train/CLASS and val/CLASS with a val_fraction) and the shards of the same images.

    If data is None, draws flowers.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = data or drawn(Path(scratch, "drawn"))
        if max_images is not None:
            folder = some(folder, Path(scratch, "some"), max_images)
        shards = Path(scratch, "shards")
        pack(folder, shards, val_fraction=val_fraction)
        yield split_folders(folder, shards, Path(scratch, "splits")) if val_fraction else folder, shards


def split_folders(data: Path, shards: Path, into: Path) -> Path:
    """Link the images of each split as SPLIT/CLASS/... for ImageFolder, and return the folder."""
    part = into.with_name(f"{into.name}.part")  # so that an interrupted run leaves no incomplete folder
    shutil.rmtree(part, ignore_errors=True)
    for split in Manifest.load(str(shards)).splits:
        loader = Loader(shards, split, batch_size=1, device="cpu", cache=None)
        for index in range(loader.num_samples):
            place = part / split / loader.path_of(index)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to((data / loader.path_of(index)).resolve())
    return part.rename(into)


def some(folder: Path, into: Path, count: int) -> Path:
    """Link at most `count` images, spread evenly over the classes, and return the folder."""
    found = scan(folder)
    numbers = np.linspace(0, len(found), min(count, len(found)), endpoint=False).astype(int)
    for number in numbers:
        path = found.path(number)
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        (into / path).symlink_to((folder / path).resolve())
    return into
