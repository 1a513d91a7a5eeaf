"""Small folders to pack, the samples that tarfile finds in a pack, and interrupted packs."""

import json
import re
import signal
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from kill_packer import checksums
from PIL import Image

from fastflower import Manifest, pack
from fastflower.packing.folder import Folder

# File stems. No reader may lose one; DALI and webdataset do if a key contains such characters.
NASTY = [
    "with space", "two.dots.here", "dot.", "two..", "-dash", "ümläut", "日本語", "🌻", "quote'\"", "new\nline", "tab\there",
    "a" * 251, "é" * 125, "semi;colon&", "%41", "back\\slash", "UPPER", "upper", "__key__", "x.cls", "x.json", "*?[]",
    b"caf\xe9".decode("utf-8", "surrogateescape"),
]  # fmt: skip


def draw_image(seed: int, size: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def drawn(root: Path, **counts: int) -> Path:
    """Write the given number of different JPEG files for each class, and return the folder."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            draw_image(1000 * label + number).save(root / name / f"{number:03d}.jpg")
    return root


def nasty(root: Path) -> Path:
    """Write JPEG and PNG files with the same nasty stems and extensions in either case, in classes with nasty names."""
    drawn(root, **{"plain": 2, "with space.and dot": 2, "ø 🌷": 2})
    for number, name in enumerate(NASTY):
        folder = root / ("plain" if number % 2 else "ø 🌷")
        draw_image(5000 + number).save(folder / f"{name}.{('jpg', 'JPG')[number % 3 == 0]}", "JPEG")
        draw_image(6000 + number).save(folder / f"{name}.{('png', 'PNG')[number % 4 == 0]}", "PNG")
    return root


class Sample(NamedTuple):
    shard: str
    key: str
    label: int
    image: bytes
    path: str


def samples(out: Path, split: str) -> Iterator[Sample]:
    """Yield the samples that tarfile finds in the manifest's shards."""
    for shard in Manifest.load(out).splits[split].shards:
        with tarfile.open(out / shard.name) as tar:
            data = {member.name: tar.extractfile(member).read() for member in tar}  # pyright: ignore[reportOptionalMemberAccess]
        for key in [name.removesuffix(".jpg") for name in data if name.endswith(".jpg")]:
            note = json.loads(data[f"{key}.json"])
            yield Sample(shard.name, key, int(data[f"{key}.cls"]), data[f"{key}.jpg"], note["filename"])


def paths(out: Path, split: str) -> set[str]:
    return {sample.path for sample in samples(out, split)}


def images(found: Folder) -> set[str]:
    return {found.path(number) for number in range(len(found))}


def resealed(folder: Path) -> Path:
    """Update the checksums in the manifest after a test changed the indexes, as if they had been packed that way."""
    manifest = Manifest.load(folder, sealed=False)
    splits = {
        name: replace(split, index_sha256=sha256((folder / f"{name}.index.npy").read_bytes()).hexdigest())
        for name, split in manifest.splits.items()
    }
    (folder / "manifest.json").write_text(replace(manifest, splits=splits).to_json())
    return folder


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


class Stopping(Executor):
    """Makes the given number of shards synchronously and is interrupted at the next one, as by Ctrl-C."""

    def __init__(self, shards: int) -> None:
        self.left = shards

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def interrupted(folder: Path, out: Path, *, shards: int, **options: Any) -> Path:
    """Return OUT after a pack that was interrupted when it had made the given number of shards."""
    with pytest.raises(KeyboardInterrupt):
        pack(folder, out, executor=Stopping(shards), **options)
    return out


def child(folder: Path, out: Path, stop: str, action: str, **options: Any) -> subprocess.Popen[str]:
    """Start a process that packs, and runs `action` before the first file operation for which `stop` is true.

    `action` and `stop` are Python code. In it, `event` is the audit event of the operation, and `paths` are its files,
    relative to OUT if they are in it.
    """
    program = f"""if True:
        import os, signal, sys
        from fastflower import pack
        def watch(event, args):
            if not done and event in ("open", "os.rename", "os.remove", "os.rmdir"):
                paths = [str(path).removeprefix({str(out)!r} + "/") for path in args[:2]]
                if {stop}:
                    done.append(event)
                    {action}
        done = []
        sys.addaudithook(watch)
        pack({str(folder)!r}, {str(out)!r}, **{options!r})
    """
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)


def killed(folder: Path, out: Path, stop: str, **options: Any) -> Path:
    """Return OUT after a pack that was killed before the first file operation for which `stop` is true."""
    process = child(folder, out, stop, "os.kill(os.getpid(), signal.SIGKILL)", **options)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    return out


BEFORE_MANIFEST = "event == 'os.rename' and paths[1] == 'manifest.json'"  # when everything else is in place
BEFORE_CLEARING = "event == 'os.remove' and paths[0].endswith('/plan.json')"  # when the manifest is in place


NINE: dict[str, Any] = {"shard_bytes": 4000, "lists": True}
"""With these options, the images of `nine` fill two training shards and one validation shard."""


def nine(root: Path) -> Path:
    return drawn(root, a=5, b=4)


def uninterrupted(folder: Path, out: Path) -> dict[str, str]:
    """Return the checksums of an uninterrupted pack of `nine`."""
    pack(folder, out, **NINE)
    made = checksums(out)
    assert {"train-000001.tar", "val-000000.tar", "meta/val.txt"} < made.keys()
    return made


def read_by_dali(out: Path, split: str, batch_size: int) -> list[tuple[bytes, int]]:
    """Return (image, label) of every sample, as read by DALI's own reader."""
    from nvidia.dali import fn as untyped_fn
    from nvidia.dali.pipeline import Pipeline

    fn: Any = untyped_fn
    paths = [out / shard.name for shard in Manifest.load(out).split(split).shards]
    pipeline = Pipeline(batch_size=batch_size, num_threads=2, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        outputs = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
            name="reader",
        )
        pipeline.set_outputs(*outputs)
    pipeline.build()
    size: Any = pipeline.epoch_size("reader")
    found: list[tuple[bytes, int]] = []
    while len(found) < size:
        images, labels = pipeline.run()
        for number in range(len(images)):
            label = np.asarray(labels.at(number)).tobytes()
            found.append((np.asarray(images.at(number)).tobytes(), int(label)))
    return found[:size]


def repeats(tree: dict[str, Any]) -> bool:
    """Return whether subfolders of one class share a name with a class or another class's subfolder: they may be the classes."""
    inside = [{name for name, below in (held or {}).items() if below is not None} for held in tree.values()]
    return any(held & set(tree) for held in inside) or sum(map(len, inside)) > len(set().union(*inside))


def flip_a_bit(folder: Path, split: str, index: int) -> None:
    """Flip a bit in the image of a sample."""
    row = np.load(folder / f"{split}.index.npy")[index]
    with (folder / f"{split}-{row['shard']:06d}.tar").open("r+b") as file:
        file.seek(int(row["offset"]) + 2000)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def pack_garbage(folder: Path) -> None:
    """Replace sample 3 of split "val" with garbage and a matching checksum, as if it had been packed."""
    rows = np.load(folder / "val.index.npy")
    with (folder / "val-000000.tar").open("r+b") as file:
        file.seek(int(rows[3]["offset"]))
        file.write(b"x" * int(rows[3]["size"]))
    rows["crc32"][3] = zlib.crc32(b"x" * int(rows[3]["size"]))
    np.save(folder / "val.index.npy", rows)
    resealed(folder)


def touch(root: Path, *names: str) -> Path:
    """Create files of one byte, and folders if a name ends in "/". `scan` and ImageFolder find images without opening them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).mkdir() if name.endswith("/") else (root / name).write_bytes(b"x")
    return root
