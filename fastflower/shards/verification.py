"""Checks shards against their checksums and indexes, and rebuilds the indexes and the manifest from the tars."""

import hashlib
import json
import logging
import os
import re
import struct
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote

import numpy as np
from numpy.typing import NDArray

from fastflower import progress
from fastflower.errors import SampleError, ShardError, boolean, require
from fastflower.files import blame_the_system, remedy_for, write_atomically
from fastflower.machine import cores
from fastflower.shards.image import prepare
from fastflower.shards.manifest import FILE, FOLDS, FORMAT_VERSION, INFO, PLAN, WORK, Manifest, Shard, Split, shard_name
from fastflower.shards.writer import Samples, ShardWriter, index_rows, npy, split_of

_log = logging.getLogger("fastflower")

_SPLITS = ("train", "val", "test")
_RESTORE = "restore it from a backup, or run fastflower pack again"
_RESTORE_MANIFEST = f"restore {FILE} from a backup, or run fastflower pack again"


@dataclass(slots=True)
class _Tar:
    """The contents of a tar. `problem` says what is wrong with it; `shard` is None if a sample cannot be read."""

    path: Path
    problem: str = ""
    shard: Shard | None = None
    rows: NDArray[np.void] = field(default_factory=lambda: index_rows([]))
    dali_index: bytes = b""
    classes: set[tuple[int, str]] = field(default_factory=set[tuple[int, str]])


@progress.shown()
def verify(shards: str | Path, *, repair: bool = False) -> list[str]:
    """Read every tar of a pack, decode every image, and check both against the manifest, checksums and indexes.

    Args:
        shards: Folder that `pack` wrote.
        repair: Rebuild the indexes and the manifest from intact tars. If the manifest is lost, its options and its lists
            of skipped, duplicate and near-duplicate files cannot be rebuilt.

    Returns the problems that remain after the repair, one line each, starting with the file. Raises ShardError if the
    folder has no pack, an unfinished pack or a pack from a newer version, or if a rebuilt file cannot be written.
    """
    repair = boolean("repair", repair)
    place = str(shards).removeprefix("file://")
    require("://" not in place, "shards", "a local folder, not a URL (download the shards first)", place)
    folder = Path(place)
    manifest, distrust = _load_manifest(folder)
    trusted = None if distrust else manifest
    names = _tar_names(folder, trusted)
    if not any(names.values()):
        raise ShardError(f"{folder}: has no shards; pass a folder that pack wrote (fastflower pack FOLDER).")
    read = _read_all([folder / name for group in names.values() for name in group])
    tars = {split: [read[name] for name in group] for split, group in names.items()}
    files: dict[str, bytes | memoryview] = {}  # expected contents by name, from the intact tars
    for split, group in tars.items():
        _mark_changed(folder, trusted, split, group)
        intact = [tar for tar in group if not tar.problem]
        files |= {tar.path.with_suffix(".idx").name: tar.dali_index for tar in intact}
        if len(intact) == len(group):
            files[f"{split}.index.npy"] = npy(index_rows([tar.rows for tar in intact]))
    problems = [tar.problem for group in tars.values() for tar in group if tar.problem]
    foreign = f"is not a shard of this pack; move it to another folder, or restore {FILE} from a backup"
    problems += [f"{path}: {foreign}." for path in sorted(folder.glob("*.tar")) if path.name not in read]
    if not problems:
        try:
            derived = _derive_manifest(folder, manifest, tars, distrust)
            if repair:  # also adds the checksums that version 1 lacks
                derived = replace(derived, version=FORMAT_VERSION)
            files[INFO] = derived.to_info().encode()
            files[FILE] = derived.to_json().encode("utf-8", "backslashreplace")
        except ShardError as error:
            problems.append(str(error))
    elif distrust:
        problems.append(distrust)
    if problems and distrust:
        return problems  # the expected contents of the files are unknown
    problems += _folds_problems(folder, manifest, repair=repair)
    return problems + _repair_or_report(folder, files, distrust.partition(";")[0] if manifest else "", repair=repair)


def _folds_problems(folder: Path, manifest: Manifest | None, *, repair: bool) -> list[str]:
    """Return the problems with a pack's folds. Warn if the manifest is lost: a repair cannot restore the folds."""
    if manifest is None and repair and (folder / FOLDS).exists():
        what = "the rebuilt manifest has no folds, because the tars do not record them"
        _log.warning("%s: %s; to use this file, restore %s from a backup", folder / FOLDS, what, FILE)
    try:
        if manifest and manifest.folds:
            manifest.fold_numbers()
    except ShardError as error:
        return [str(error)]
    return []


def _repair_or_report(
    folder: Path, files: dict[str, bytes | memoryview], manifest_problem: str, *, repair: bool
) -> list[str]:
    """Rewrite each file that differs from its expected contents. Without `repair`, return the problems instead.

    manifest_problem  What is wrong with a manifest that is damaged but still supplies options and lists, else "".
    """
    problems: list[str] = []
    for name, data in files.items():
        path, kept = folder / name, manifest_problem if name == FILE else ""
        if path.is_file() and path.read_bytes() == data:
            continue
        if not repair:
            what = f"{path}: {'does not match the tars' if path.exists() else 'is missing'}"
            problems.append(f"{kept or what}; rebuild it with fastflower verify {quote(str(folder))} --repair.")
            continue
        try:
            write_atomically(path, data)
        except OSError as error:
            remedy = remedy_for(error, "check what is at this path and that its folder is writable")
            what = f"cannot be written ({error.strerror or error}); {remedy}"
            raise ShardError(
                f"{path}: {what}, then run fastflower verify {quote(str(folder))} --repair again."
            ) from error
        _log.info("rebuilt %s", path)
        if kept:
            _log.warning("%s: kept entries that the tars cannot confirm, such as options and skipped files", path)
    return problems


def _load_manifest(folder: Path) -> tuple[Manifest | None, str]:
    """Return the manifest (None if unreadable), and why its list of shards cannot be trusted ("" if it can)."""
    path = folder / FILE
    try:
        manifest = Manifest.load(folder)
    except ShardError as error:
        if (_version(path) or 0) > FORMAT_VERSION or (folder / WORK / PLAN).exists():
            raise
        try:
            return Manifest.load(folder, sealed=False), str(error)
        except ShardError:
            return None, str(error)
    for split, described in manifest.splits.items():
        for number, shard in enumerate(described.shards):
            if shard.name != f"{shard_name(split, number)}.tar":
                return manifest, f"{path}: lists {shard.name} as shard {number} of {split}; {_RESTORE}."
        if split not in _SPLITS:
            return manifest, f"{path}: lists the unknown split {split!r}; {_RESTORE}."
    return manifest, ""


def _version(path: Path) -> int | None:
    try:
        return int(json.loads(path.read_bytes())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tar_names(folder: Path, manifest: Manifest | None) -> dict[str, list[str]]:
    """Return the names of the expected tars by split. Without a manifest, infer the names from the existing files."""
    if manifest:
        return {split: [shard.name for shard in described.shards] for split, described in manifest.splits.items()}
    try:
        info = json.loads((folder / INFO).read_bytes())["splits"]
        listed = [str(name) for split in info.values() for name in split["filenames"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        listed = []
    counts = {split: 0 for split in _SPLITS if (folder / f"{split}.index.npy").exists()}
    for name in [*listed, *(path.name for path in folder.glob("*.tar"))]:
        if match := re.fullmatch(rf"({'|'.join(_SPLITS)})-(\d{{6}})\.tar", name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    ordered = [split for split in _SPLITS if split in counts]
    return {split: [f"{shard_name(split, number)}.tar" for number in range(counts[split])] for split in ordered}


def _read_all(paths: list[Path]) -> dict[str, _Tar]:
    """Read the tars with one thread per core. Returns their contents by file name."""
    with ThreadPoolExecutor(cores()) as pool:  # if a read raises, pool.map cancels the queued ones
        tars = progress.bar(pool.map(_read, paths), total=len(paths), desc="verify", unit="shard")
        return {tar.path.name: tar for tar in tars}


def _read(path: Path) -> _Tar:
    """Decode every sample of a tar. To find damage elsewhere in it, rebuild the tar from the samples and compare checksums."""
    tar = _Tar(path)
    key = "its first sample"
    try:
        with path.open("rb") as file, Path(os.devnull).open("wb") as nothing, ShardWriter(nothing) as writer:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for key, label, image, source, class_name in _samples(archive):
                    size = prepare(image, max_side=None, quality=None).size
                    sample = Samples()
                    sample.add(key, image, label, size, source, class_name)
                    writer.extend(sample)
                    tar.classes.add((label, class_name))
    except (OSError, tarfile.TarError, SampleError, ValueError, KeyError, OverflowError, struct.error) as error:
        blame_the_system(error, path)
        missing = isinstance(error, FileNotFoundError)
        what = "is missing" if missing else f"is damaged at or after {key} ({error})"
        tar.problem = f"{path}: {what}; {_RESTORE}."
        return tar
    tar.shard, tar.rows = writer.shard(path.name), writer.rows
    tar.dali_index = b"".join(writer.dali_index_pieces())
    if tar.shard.sha256 != digest:
        tar.problem = f"{path}: is damaged outside its images; {_RESTORE}."
    return tar


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, int, bytes, str, str]]:
    """Yield (key, label, image, original path, class) for each sample (KEY.cls, KEY.jpg and KEY.json)."""
    members = iter(archive)
    for first in members:
        data: list[bytes] = []
        key = first.name.removesuffix(".cls")
        for extension, member in (("cls", first), ("jpg", next(members, None)), ("json", next(members, None))):
            file = archive.extractfile(member) if member is not None else None
            if member is None or file is None or member.name != f"{key}.{extension}":
                raise ValueError(f"{key}.{extension} is missing")
            data.append(file.read())
        if not data[0].isdigit():
            raise ValueError(f"{key}.cls must contain a label, got {data[0][:20]!r}")
        match json.loads(data[2]):
            case {"filename": str(source), "class": str(class_name)}:
                yield key, int(data[0]), data[1], source, class_name
            case _:
                raise ValueError(f"{key}.json must contain a filename and a class")


def _mark_changed(folder: Path, manifest: Manifest | None, split: str, group: list[_Tar]) -> None:
    """Set `problem` of each tar that has changed since it was packed, according to the manifest or the stored index."""
    stored = _stored_rows(folder, split)
    for number, tar in enumerate(group):
        if not tar.shard or tar.problem:
            continue
        if manifest and manifest.splits[split].shards[number].sha256 == tar.shard.sha256:
            continue
        rows, places = stored[stored["shard"] == number], ["offset", "size"]
        same_places = len(rows) == len(tar.rows) and (rows[places] == tar.rows[places]).all()
        changed: list[int] = np.flatnonzero(rows["crc32"] != tar.rows["crc32"]).tolist() if same_places else []
        if changed:
            key = tar.dali_index.splitlines()[1 + changed[0]].split()[3].decode().removesuffix(".cls")
            what = f"the image of {key} has changed since it was packed"
            tar.problem = f"{tar.path}: {what}; {_RESTORE}."
        elif manifest:
            what = f"is not the shard that {FILE} describes (sha256 differs)"
            tar.problem = f"{tar.path}: {what}; restore one of the two from a backup, or run fastflower pack again."


def _stored_rows(folder: Path, split: str) -> NDArray[np.void]:
    """Return the rows of a split's index file, ignoring the header, or an empty array if there is no file."""
    empty = index_rows([])
    try:
        data = (folder / f"{split}.index.npy").read_bytes()[len(npy(empty)) :]
    except OSError:
        return empty
    return np.frombuffer(data, empty.dtype, len(data) // empty.itemsize)


def _derive_manifest(folder: Path, manifest: Manifest | None, tars: dict[str, list[_Tar]], distrust: str) -> Manifest:
    """Return the manifest that matches these tars. Raises ShardError if the tars do not determine it."""
    old = manifest or Manifest(folder=folder, classes=(), splits={}, options={})
    labeled = sorted({pair for group in tars.values() for tar in group for pair in tar.classes})
    classes = list(old.classes)
    for label, name in labeled:
        if label > len(classes):
            raise ShardError(
                f"{folder / FILE}: is missing, and no sample gives the name of class {len(classes)}; {_RESTORE_MANIFEST}."
            )
        classes[label : label + 1] = [name]
    if len(dict(labeled)) < len(labeled) or len(set(classes)) < len(classes):
        raise ShardError(
            f"{folder / FILE}: is missing, and the tars disagree about the label of a class; {_RESTORE_MANIFEST}."
        )
    splits: dict[str, Split] = {}
    for split, group in tars.items():
        rows, stored = index_rows([tar.rows for tar in group]), _stored_rows(folder, split)
        if distrust and (len(stored) > len(rows) or (stored != rows[: len(stored)]).any()):
            what = f"does not match the tars, and {FILE} is missing, so nothing says which of them is correct"
            raise ShardError(f"{folder / f'{split}.index.npy'}: {what}; {_RESTORE_MANIFEST}.")
        splits[split] = split_of([tar.shard for tar in group if tar.shard], rows, len(classes))
    packed = sum(int(tar.rows["size"].sum()) for group in tars.values() for tar in group)
    return replace(old, classes=tuple(classes), splits=splits, packed_bytes=packed)
