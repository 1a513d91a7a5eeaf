"""What a folder of shards says of itself: `manifest.json`, and one row a sample in `SPLIT.index.npy`."""

import json
import os
import threading
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tokenize import TokenError
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import ArgumentError, ShardError

FORMAT_VERSION = 1
FILE = "manifest.json"
WORK, PLAN = ".packing", "plan.json"  # in a pack that is not finished
INFO = "_info.json"

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # position in the split's list of shards
        ("offset", "<u8"),  # of the image's bytes in the tar
        ("size", "<u4"),  # bytes
        ("crc32", "<u4"),  # of those bytes
        ("label", "<i4"),
        ("width", "<u4"),  # pixels of the decoded, upright image
        ("height", "<u4"),
    ]
)


def version_of(name: str) -> str:
    """Of an installed distribution; "not installed" where it is only on the path, as a source tree may be."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Split:
    """The shards of "train" or "val"."""

    samples: int
    class_counts: tuple[int, ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole of `manifest.json`; a manifest on disk means a whole pack."""

    folder: Path
    """Where it was read from or written to; not stored."""
    classes: tuple[str, ...]
    splits: dict[str, Split]
    options: dict[str, Any]
    """What it was packed with: split_by, val_fraction, seed and the rest."""
    skipped: tuple[dict[str, str], ...] = ()
    """Files left out: {"path", "reason"}."""
    warnings: tuple[dict[str, str], ...] = ()
    """Files that are packed though something is odd about them: {"path", "warning"}; version 1 may lack it."""
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Groups of files with identical bytes; a group lies in one split."""
    label_conflicts: tuple[tuple[str, ...], ...] = ()
    """Groups of files with identical bytes under different labels."""
    near_duplicates: tuple[dict[str, Any], ...] = ()
    """Look-alikes across the split: {"split", "path", "train_path", "distance"}, bits of a perceptual hash that differ."""
    source_bytes: int | None = None
    """Of the files that were packed; None where it is not known any more."""
    packed_bytes: int = 0
    """Of the images in the shards."""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `folder`/manifest.json. Raises ShardError when it is missing, damaged or of another format."""
        folder = Path(str(folder).removeprefix("file://"))
        path = folder / FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            what = f"has no {FILE}, so it is no finished pack" if folder.exists() else "does not exist"
            told = f"{what}; name a folder that pack wrote (fastflower pack FOLDER)."
            if (folder / WORK / PLAN).exists():
                told = "is a pack that was not finished; run the same pack again."
            raise ShardError(f"{folder}: {told}") from None
        except (ValueError, OSError) as error:
            raise ShardError(f"{path}: cannot be read ({error}); restore it from a copy or pack again.") from None
        try:
            if stored["format"] != "fastflower" or stored["version"] != FORMAT_VERSION:
                raise ShardError(
                    f"{path}: is format {stored['format']} version {stored['version']}, "
                    f"this fastflower reads version {FORMAT_VERSION}; pack again."
                )
            splits = {
                name: Split(
                    split["samples"], tuple(split["class_counts"]), tuple(Shard(**shard) for shard in split["shards"])
                )
                for name, split in stored["splits"].items()
            }
            return cls(
                folder=folder,
                classes=tuple(stored["classes"]),
                splits=splits,
                options=stored["options"],
                skipped=tuple(stored["skipped"]),
                warnings=tuple(stored["warnings"] if stored["version"] > 1 else stored.get("warnings", ())),
                duplicates=tuple(map(tuple, stored["duplicates"])),
                label_conflicts=tuple(map(tuple, stored["label_conflicts"])),
                near_duplicates=tuple(stored["near_duplicates"]),
                source_bytes=stored["source_bytes"],
                packed_bytes=stored["packed_bytes"],
                versions=stored["versions"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path}: lacks {error}; restore it from a copy or pack again.") from None

    def to_json(self) -> str:
        """The text of the file: the same manifest gives the same bytes."""
        stored = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "folder"}
        content = {"format": "fastflower", "version": FORMAT_VERSION, **stored}
        return json.dumps(content, indent=1, ensure_ascii=False, default=asdict) + "\n"  # asdict: splits

    def to_info(self) -> str:
        """The text of `_info.json`, which timm's reader of WebDataset shards reads."""
        splits = {
            name: {
                "name": name,
                "num_samples": split.samples,
                "filenames": [shard.name for shard in split.shards],
                "shard_lengths": [shard.samples for shard in split.shards],
            }
            for name, split in self.splits.items()
        }
        return json.dumps({"splits": splits}, indent=1) + "\n"

    def split(self, name: str) -> Split:
        """The split of that name, with at least one sample. Raises ShardError naming the splits there are."""
        split = self.splits.get(name)
        if split is None or not split.samples:
            full = [key for key, value in self.splits.items() if value.samples]
            raise ShardError(f"{self.folder}: has no samples in split {name!r}; it has {', '.join(full)}.")
        return split

    def index(self, name: str) -> NDArray[Any]:
        """The rows of a split, (samples,) of INDEX_DTYPE, memory-mapped. Raises ShardError when they do not fit."""
        split = self.split(name)
        path = self.folder / f"{name}.index.npy"
        try:
            rows = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError, SyntaxError, TokenError) as error:  # numpy evaluates the header
            raise ShardError(f"{path}: cannot be read ({error}); restore it from a copy or pack again.") from None
        if rows.dtype != INDEX_DTYPE or rows.shape != (split.samples,):
            raise ShardError(
                f"{path}: has {rows.shape} rows of {rows.dtype}, the manifest says {split.samples} samples; "
                f"restore it from a copy or pack again."
            )
        return rows


def write_atomically(path: Path, *pieces: bytes | bytearray | memoryview) -> None:
    """Write a file so that it is seen whole or not at all, also after a power cut."""
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")  # others may write the same file
    try:
        with part.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def write_out(out: Path, data: bytes) -> None:
    """As `write_atomically`, a file that the caller named. Raises ArgumentError where it cannot be."""
    try:
        write_atomically(out, data)
    except OSError as error:
        raise ArgumentError(
            f"out: {out} cannot be written ({error.strerror}); name a file in a folder that is there."
        ) from None


def sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
