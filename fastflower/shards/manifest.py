"""What a folder of shards says of itself: `manifest.json`, and one row a sample in `SPLIT.index.npy`."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import ShardError
from fastflower.files import blame_the_system
from fastflower.shards.image import MAX_PIXELS

FORMAT_VERSION = 2
_FIRST = 1  # the oldest version that is read: without checksums of indexes and of the manifest
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
    index_sha256: str | None = None
    """Of SPLIT.index.npy; None in version 1."""


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
    versions: dict[str, str] = field(default_factory=dict[str, str])
    version: int = FORMAT_VERSION
    """Of the format."""

    @classmethod
    def load(cls, folder: str | Path, *, sealed: bool = True) -> Self:
        """Read `folder`/manifest.json. Raises ShardError when it is missing, damaged or of another format.

        sealed  False takes one whose checksum differs, too.
        """
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
            blame_the_system(error, path)
            raise ShardError(f"{path}: cannot be read ({error}); restore it from a copy or pack again.") from None
        try:
            _check_version(path, stored["format"], stored["version"])
            manifest = cls._from_json(folder, stored)
            changed = stored["version"] > _FIRST and stored["sha256"] != _checksum(stored)
        except (KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path}: lacks {error}; restore it from a copy or pack again.") from None
        again = f"restore it from a copy, or rebuild it with fastflower verify {folder} --repair."
        if changed and sealed:
            raise ShardError(f"{path}: has changed since it was written (checksum mismatch); {again}")
        twice = next((name for name, count in Counter(manifest.classes).items() if count > 1), None)
        if twice is not None:
            raise ShardError(f"{path}: names two classes {twice!r}; {again}")
        return manifest

    @classmethod
    def _from_json(cls, folder: Path, stored: dict[str, Any]) -> Self:
        splits = {
            name: Split(
                split["samples"],
                tuple(split["class_counts"]),
                tuple(Shard(**shard) for shard in split["shards"]),
                split["index_sha256"] if stored["version"] > _FIRST else None,
            )
            for name, split in stored["splits"].items()
        }
        return cls(
            folder=folder,
            classes=tuple(stored["classes"]),
            splits=splits,
            options=stored["options"],
            skipped=tuple(stored["skipped"]),
            warnings=tuple(stored["warnings"] if stored["version"] > _FIRST else stored.get("warnings", ())),
            duplicates=tuple(map(tuple, stored["duplicates"])),
            label_conflicts=tuple(map(tuple, stored["label_conflicts"])),
            near_duplicates=tuple(stored["near_duplicates"]),
            source_bytes=stored["source_bytes"],
            packed_bytes=stored["packed_bytes"],
            versions=stored["versions"],
            version=stored["version"],
        )

    def to_json(self) -> str:
        """The text of the file: the same manifest gives the same bytes."""
        content: dict[str, Any] = {"format": "fastflower", "version": self.version, **asdict(self)}
        del content["folder"]
        if self.version == _FIRST:
            for split in content["splits"].values():
                del split["index_sha256"]
            if not self.warnings:
                del content["warnings"]
        else:
            content["sha256"] = _checksum(content)
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

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

    def index(self, name: str) -> NDArray[np.void]:
        """The rows, (samples,) of INDEX_DTYPE, memory-mapped. Raises ShardError when they are not those packed, or cannot be."""
        split = self.split(name)
        path = self.folder / f"{name}.index.npy"
        again = f"restore it from a copy, or rebuild it with fastflower verify {self.folder} --repair."
        try:
            rows = np.load(path, mmap_mode="r")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest() if split.index_sha256 else None
        except (OSError, ValueError, EOFError, SyntaxError, TokenError) as error:  # numpy evaluates the header
            blame_the_system(error, path)
            raise ShardError(f"{path}: cannot be read ({error}); {again}") from None
        if rows.dtype != INDEX_DTYPE or rows.shape != (split.samples,):
            what = f"has {rows.shape} rows of {rows.dtype}, the manifest says {split.samples} samples"
            raise ShardError(f"{path}: {what}; {again}")
        if digest != split.index_sha256:
            raise ShardError(f"{path}: has changed since it was packed (checksum mismatch); {again}")
        wrong = _wrong(rows, split, self.classes)
        if wrong:
            raise ShardError(f"{path}: {wrong}; {again}")
        return rows


def _check_version(path: Path, format_: object, version: object) -> None:
    if format_ != "fastflower" or not isinstance(version, int) or version < _FIRST:
        raise ShardError(
            f"{path}: is format {format_} version {version}, this fastflower reads versions {_FIRST} to {FORMAT_VERSION}; "
            f"restore it from a copy or pack again."
        )
    if version > FORMAT_VERSION:
        raise ShardError(
            f"{path}: is version {version} of the format, written by a newer fastflower; this one reads versions {_FIRST} to "
            f"{FORMAT_VERSION}: upgrade it (pip install --upgrade fastflower)."
        )


def _checksum(content: dict[str, object]) -> str:
    """Of all values but itself: of their JSON in ASCII, without spaces, names sorted."""
    values = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _wrong(rows: NDArray[np.void], split: Split, classes: tuple[str, ...]) -> str:
    """What cannot be in the rows of a split's index; nothing where all can."""
    counts = [shard.samples for shard in split.shards]
    if sum(counts) != split.samples or (rows["shard"] != np.repeat(np.arange(len(counts)), counts)).any():
        return "counts other samples of each shard than the manifest does"
    label, size, offset = rows["label"], rows["size"], rows["offset"]
    room = np.repeat(np.array([shard.bytes for shard in split.shards], np.uint64), counts)
    misplaced = (offset > room - size) | (offset == 0) | (offset % 512 != 0)
    pixels = rows["width"].astype(np.uint64) * rows["height"]
    rules = (
        ("label", (label < 0) | (label >= len(classes)), f"0 .. {len(classes) - 1}"),
        ("size", (size == 0) | (size > room), "at least 1 byte, and not more than its shard has"),
        ("offset", misplaced, "a multiple of 512 with room for the size"),
        ("width", (pixels == 0) | (pixels > MAX_PIXELS), f"that of an image of 1 .. {MAX_PIXELS} pixels"),
    )
    for name, outside, rule in rules:
        row = int(outside.argmax())
        if outside[row]:
            return f"row {row} has {name} {rows[name][row]}, which must be {rule}"
    same = rows["shard"][1:] == rows["shard"][:-1]
    back = np.flatnonzero(same & (offset[1:] < offset[:-1] + size[:-1]))
    if len(back):
        return f"row {back[0] + 1} has offset {offset[back[0] + 1]}, in or before the image of the row above"
    counted = np.bincount(label, minlength=len(classes)).tolist()
    for name, count, told in zip(classes, counted, split.class_counts, strict=False):
        if count != told:
            return f"has {count} samples of class {name!r}, the manifest says {told}"
    if len(split.class_counts) != len(classes):
        return f"is of {len(split.class_counts)} classes, not {len(classes)}"
    return ""


def shard_name(split: str, number: int) -> str:
    """Of a split's shard, without ending."""
    return f"{split}-{number:06d}"
