"""Describes a folder of shards: `manifest.json`, `SPLIT.index.npy` with one row per sample, and `train.folds.npy`."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from tokenize import TokenError
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import ShardError
from fastflower.files import blame_the_system, load_array
from fastflower.shards.image import MAX_PIXELS
from fastflower.suggestions import command_typed
from fastflower.tables import MOST_ROWS, html, html_table

FORMAT_VERSION = 2
_FIRST = 1  # the oldest supported version; has no checksums of the manifest and indexes
FILE = "manifest.json"
WORK, PLAN = ".packing", "plan.json"  # exist only in an unfinished pack
INFO = "_info.json"
FOLDS = "train.folds.npy"
_RESTORE = "restore it from a backup, or run fastflower pack again"

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # position in the split's list of shards
        ("offset", "<u8"),  # of the image in the tar, in bytes
        ("size", "<u4"),  # of the image, in bytes
        ("crc32", "<u4"),  # of the image
        ("label", "<i4"),
        ("width", "<u4"),  # of the decoded, upright image, in pixels
        ("height", "<u4"),
    ]
)
FOLDS_DTYPE = np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Split:
    """The samples and shards of a split ("train", "val" or "test")."""

    samples: int
    class_counts: tuple[int, ...] = field(repr=False)
    shards: tuple[Shard, ...] = field(repr=False)
    index_sha256: str | None = field(default=None, repr=False)
    """SHA-256 of SPLIT.index.npy; None in version 1."""


@dataclass(frozen=True, slots=True)
class Folds:
    """The folds of the train split. `train.folds.npy` holds the fold of each sample, (samples,) of FOLDS_DTYPE."""

    count: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json`. It is written last, so a pack with a manifest is complete."""

    folder: Path
    """Folder that the manifest was read from or written to. Not stored."""
    classes: tuple[str, ...]
    splits: dict[str, Split]
    options: dict[str, Any]
    """Options of `pack`: split_by, val_fraction, seed and so on."""
    skipped: tuple[dict[str, str], ...] = ()
    """Skipped files: {"path", "reason"}."""
    warnings: tuple[dict[str, str], ...] = ()
    """Files that were packed with a warning: {"path", "warning"}. May be absent in version 1."""
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Groups of images with identical bytes. All images of a group are in the same split."""
    label_conflicts: tuple[tuple[str, ...], ...] = ()
    """Groups of images with identical bytes under different labels."""
    near_duplicates: tuple[dict[str, Any], ...] = ()
    """Near-duplicates across splits: {"split", "path", "train_path", "distance"}; distance is in bits of the perceptual hash."""
    source_bytes: int | None = None
    """Total size of the packed source files in bytes. None if no longer known."""
    packed_bytes: int = 0
    """Total size of the images in the shards in bytes."""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    version: int = FORMAT_VERSION
    """Format version."""
    folds: Folds | None = None
    """Folds for cross-validation. None, and absent from `manifest.json`, if the pack has none."""

    def __repr__(self) -> str:
        counts = "".join(f", {name}={split.samples}" for name, split in self.splits.items())
        return f"{type(self).__name__}(folder={str(self.folder)!r}, classes={len(self.classes)}{counts})"

    def _repr_html_(self) -> str:
        """Return the number of samples of each class and split, for notebooks; of many classes, those with the fewest."""
        counts = np.array([split.class_counts for split in self.splits.values()]).reshape(len(self.splits), -1)
        few = len(self.classes) <= MOST_ROWS
        shown = range(len(self.classes)) if few else np.argsort(counts.sum(axis=0), kind="stable")[:MOST_ROWS]
        rows = [["all classes", *counts.sum(axis=1)], *([self.classes[label], *counts[:, label]] for label in shown)]
        names = ("skipped", "warnings", "duplicates", "label_conflicts", "near_duplicates")
        remarks = [f"{name}: {len(getattr(self, name))}" for name in names if getattr(self, name)]
        text = [str(self.folder), f"{len(self.classes)} classes" + ("" if few else ", the smallest below"), *remarks]
        return f"<p>{html('; '.join(text))}</p>{html_table(['class', *self.splits], rows)}"

    @classmethod
    def load(cls, folder: str | Path, *, sealed: bool = True) -> Self:
        """Read `folder`/manifest.json. Raises ShardError if it is missing, is damaged or has an unsupported format.

        sealed  Whether to reject a manifest with a wrong checksum.
        """
        folder = Path(str(folder).removeprefix("file://"))
        path = folder / FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            what = f"has no {FILE}, so it is not a finished pack" if folder.exists() else "does not exist"
            what = "is a file, not a folder of shards" if folder.is_file() else what
            problem = f"{what}; pass a folder that pack wrote (fastflower pack FOLDER)."
            if (folder / WORK / PLAN).exists():
                problem = "is an unfinished pack; run the same fastflower pack command again."
            raise ShardError(f"{folder}: {problem}") from None
        except (ValueError, OSError) as error:
            blame_the_system(error, path)
            raise ShardError(f"{path}: cannot be read ({error}); {_RESTORE}.") from None
        try:
            _check_version(path, stored["format"], stored["version"])
            manifest = cls._from_json(folder, stored)
            changed = stored["version"] > _FIRST and stored["sha256"] != _checksum(stored)
        except (KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path}: has a missing or invalid key ({error}); {_RESTORE}.") from None
        repair = f"restore it from a backup, or rebuild it with fastflower verify {quote(str(folder))} --repair."
        if changed and sealed:
            raise ShardError(f"{path}: has changed since it was written (checksum mismatch); {repair}")
        twice = next((name for name, count in Counter(manifest.classes).items() if count > 1), None)
        if twice is not None:
            raise ShardError(f"{path}: lists class {twice!r} twice; {repair}")
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
            folds=Folds(**stored["folds"]) if "folds" in stored else None,
        )

    def to_json(self) -> str:
        """Return the text of `manifest.json`. Equal manifests give identical bytes."""
        content: dict[str, Any] = {"format": "fastflower", "version": self.version, **asdict(self)}
        del content["folder"]
        if self.folds is None:
            del content["folds"]
        if self.version == _FIRST:
            for split in content["splits"].values():
                del split["index_sha256"]
            if not self.warnings:
                del content["warnings"]
        else:
            content["sha256"] = _checksum(content)
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def to_info(self) -> str:
        """Return the text of `_info.json`, which timm's WebDataset reader needs."""
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
        """Return a split. If it is missing or empty, raises ShardError, which lists the available splits."""
        split = self.splits.get(name)
        if split is None or not split.samples:
            full = [key for key, value in self.splits.items() if value.samples]
            choice = f"pass a fold from 0 to {self.folds.count - 1}, or " if self.folds and name == "val" else ""
            choice += f"choose from {', '.join(full)}"
            if name == "train":
                choice = f"it can be evaluated ({', '.join(full)}), but training needs a pack with training images"
            if near := [key for key in full if name.lower().startswith(key)]:  # valid, validation, training
                raise ShardError(f"{self.folder}: has no split {name!r}; did you mean {near[0]!r}?")
            raise ShardError(f"{self.folder}: has no samples in split {name!r}; {choice}.")
        return split

    def identity(self, name: str) -> dict[str, object]:
        """Return what identifies the samples of a split."""
        checksums = "".join(shard.sha256 for shard in self.split(name).shards)
        return {"shards": hashlib.sha256(checksums.encode()).hexdigest()[:16], "fold": None}

    def index(self, name: str) -> NDArray[np.void]:
        """Return a split's memory-mapped index, (samples,) of INDEX_DTYPE. Raises ShardError if it has changed or is invalid."""
        split = self.split(name)
        path = self.folder / f"{name}.index.npy"
        repair = f"restore it from a backup, or rebuild it with fastflower verify {quote(str(self.folder))} --repair."
        rows = _load_array(path, INDEX_DTYPE, split.samples, split.index_sha256, repair)
        problem = _find_problem(rows, split, self.classes)
        if problem:
            raise ShardError(f"{path}: {problem}; {repair}")
        return rows

    def fold_numbers(self) -> NDArray[np.uint32]:
        """Return the fold of each sample of the train split, (samples,). Raises ShardError if the file has changed."""
        if self.folds is None:
            raise ShardError(f"{self.folder}: has no folds; pack the images again, with folds:\n  {with_folds()}")
        remedy = f"{_RESTORE}, because the tars do not record folds."
        return _load_array(self.folder / FOLDS, FOLDS_DTYPE, self.splits["train"].samples, self.folds.sha256, remedy)


def with_folds() -> str:
    """Return what to type to pack with folds. Shards do not know the folder of their images."""
    return "fastflower pack FOLDER --folds 5 --out folds" if command_typed() else "pack(folder, 'folds', folds=5)"


def _load_array(path: Path, dtype: np.dtype[Any], samples: int, sha256: str | None, remedy: str) -> NDArray[Any]:
    """Return a memory-mapped .npy file. Raises ShardError if it differs in dtype, length or checksum (None: no checksum)."""
    try:
        rows = load_array(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest() if sha256 else None
    except (OSError, ValueError, EOFError, SyntaxError, TokenError) as error:  # numpy parses the header as Python
        blame_the_system(error, path)
        raise ShardError(f"{path}: cannot be read ({error}); {remedy}") from None
    if rows.dtype != dtype or rows.shape != (samples,):
        what = f"has shape {rows.shape} and dtype {rows.dtype}, but the manifest says {samples} samples"
        raise ShardError(f"{path}: {what}; {remedy}")
    if digest != sha256:
        raise ShardError(f"{path}: has changed since it was packed (checksum mismatch); {remedy}")
    return rows


def _check_version(path: Path, format_: object, version: object) -> None:
    if format_ != "fastflower" or not isinstance(version, int) or version < _FIRST:
        raise ShardError(
            f"{path}: has format {format_} version {version}, but this fastflower only reads format fastflower, versions "
            f"{_FIRST} to {FORMAT_VERSION}; {_RESTORE}."
        )
    if version > FORMAT_VERSION:
        raise ShardError(
            f"{path}: has format version {version}, written by a newer fastflower, but this one reads versions {_FIRST} to "
            f"{FORMAT_VERSION}; upgrade fastflower (pip install --upgrade fastflower)."
        )


def _checksum(content: dict[str, object]) -> str:
    """Return the SHA-256 of all values except the checksum itself, as ASCII JSON without spaces and with sorted keys."""
    values = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _find_problem(rows: NDArray[np.void], split: Split, classes: tuple[str, ...]) -> str:
    """Return the first problem with the rows of a split's index, or "" if there is none."""
    counts = [shard.samples for shard in split.shards]
    if sum(counts) != split.samples or (rows["shard"] != np.repeat(np.arange(len(counts)), counts)).any():
        return "disagrees with the manifest on the number of samples in each shard"
    label, size, offset = rows["label"], rows["size"], rows["offset"]
    available = np.repeat(np.array([shard.bytes for shard in split.shards], np.uint64), counts)
    misplaced = (offset > available - size) | (offset == 0) | (offset % 512 != 0)
    pixels = rows["width"].astype(np.uint64) * rows["height"]
    rules = (
        ("label", label, (label < 0) | (label >= len(classes)), f"0 .. {len(classes) - 1}"),
        ("size", size, (size == 0) | (size > available), "at least 1 byte and at most the size of its shard"),
        ("offset", offset, misplaced, "a positive multiple of 512 with room for the image in its shard"),
        ("width x height", pixels, (pixels == 0) | (pixels > MAX_PIXELS), f"1 .. {MAX_PIXELS} pixels"),
    )
    for name, values, outside, rule in rules:
        row = int(outside.argmax())
        if outside[row]:
            return f"row {row}: {name} must be {rule}, got {values[row]}"
    same = rows["shard"][1:] == rows["shard"][:-1]
    back = np.flatnonzero(same & (offset[1:] < offset[:-1] + size[:-1]))
    if len(back):
        row = int(back[0]) + 1
        return f"row {row}: offset must be after the image of row {row - 1}, got {offset[row]}"
    counted = np.bincount(label, minlength=len(classes)).tolist()
    for name, count, expected in zip(classes, counted, split.class_counts, strict=False):
        if count != expected:
            return f"has {count} samples of class {name!r}, but the manifest says {expected}"
    if len(split.class_counts) != len(classes):
        return f"cannot be checked: the manifest has counts for {len(split.class_counts)} classes, but lists {len(classes)}"
    return ""


def shard_name(split: str, number: int) -> str:
    """Return the name of a shard of a split, without extension."""
    return f"{split}-{number:06d}"
