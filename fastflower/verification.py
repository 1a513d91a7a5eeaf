"""Checks shards against their checksums and indexes, and rebuilds what can be rebuilt from the tars."""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflower.errors import SampleError, ShardError
from fastflower.image import prepare
from fastflower.manifest import FILE, FORMAT_VERSION, INDEX_DTYPE, INFO, Manifest, Shard, Split, write_atomically
from fastflower.shard import Samples, ShardWriter, index_rows, npy

_RESTORE = "restore it from a copy, or pack again"


@dataclass(slots=True)
class _Tar:
    """What a tar holds; `shard` is None when it is not a whole tar as fastflower writes it, and `problem` says why."""

    path: Path
    problem: str = ""
    shard: Shard | None = None
    rows: NDArray[Any] = field(default_factory=lambda: np.zeros(0, INDEX_DTYPE))
    dali_index: str = ""
    classes: dict[int, str] = field(default_factory=dict)

    def key(self, sample: int) -> str:
        """Of its sample at that position."""
        return self.dali_index.splitlines()[1 + sample].split()[3].removesuffix(".cls")


def verify(shards: str | Path, *, repair: bool = False) -> list[str]:
    """Read every tar of a pack, decode every image, and compare with the manifest, checksums and indexes.

    Args:
        shards: The folder that pack wrote.
        repair: Rebuild indexes and manifest from tars that are intact.

    Returns what is wrong, after the repair: a line each that begins with the file; none when all is well. Raises
    ShardError when there is no pack at all, or one of another version.
    """
    folder = Path(shards)
    manifest, names, lost = _names(folder)
    if not names:
        raise ShardError(f"{folder}: has no shards; name the folder that tools/pack.py wrote.")
    with ThreadPoolExecutor() as pool:
        tars = list(pool.map(_read, [folder / name for name in names]))
    groups = _groups(folder, manifest, tars)
    for split, group in groups.items():
        _compare(folder, manifest, split, group)
    problems = [tar.problem for tar in tars if tar.problem]
    expected: dict[str, bytes] = {}
    for split, group in groups.items():
        good = [tar for tar in group if not tar.problem]
        expected |= {tar.path.with_suffix(".idx").name: tar.dali_index.encode() for tar in good}
        if len(good) == len(group):
            expected[f"{split}.index.npy"] = npy(index_rows([tar.rows for tar in good]))
    if not problems:
        derived, problem = _derived(folder, manifest, groups)
        problems += [problem] if problem else []
        expected |= {INFO: derived.to_info().encode(), FILE: derived.to_json().encode("utf-8", "backslashreplace")}
    elif lost:
        problems.append(lost)
    for name, data in expected.items() if not (problems and lost) else ():
        path = folder / name
        if not path.is_file() or path.read_bytes() != data:
            if repair:
                write_atomically(path, data)
            else:
                what = "does not say what the tars hold" if path.is_file() else "is missing"
                problems.append(f"{path}: {what}; rebuild it with --repair.")
    return problems


def _names(folder: Path) -> tuple[Manifest | None, list[str], str]:
    """The manifest, the names of the tars that there are or should be, and why there is no manifest."""
    names = {path.name for path in folder.glob("*.tar")}
    try:
        manifest = Manifest.load(folder)
    except ShardError as error:
        if _stored(folder / FILE, "version") not in (None, FORMAT_VERSION):
            raise
        for split in (_stored(folder / INFO, "splits") or {}).values():
            names |= set(split["filenames"])
        return None, sorted(names), str(error)
    names |= {shard.name for split in manifest.splits.values() for shard in split.shards}
    return manifest, sorted(names), ""


def _stored(path: Path, key: str) -> Any:
    """A value of a JSON file, None where there is none."""
    try:
        return json.loads(path.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(path: Path) -> _Tar:
    """Every sample, decoded and written again into nothing: the same bytes mean that the tar holds nothing else."""
    found = _Tar(path)
    key = "its first sample"
    try:
        with path.open("rb") as file, ShardWriter(_Nothing()) as writer:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for key, label, image, note in _samples(tar):
                    size = prepare(image, max_side=None, quality=None).size
                    sample = Samples()
                    sample.add(key, image, label, size, note["filename"], note["class"])
                    writer.extend(sample)
                    found.classes[label] = note["class"]
    except (OSError, tarfile.TarError, SampleError, ValueError, KeyError, TypeError) as error:
        missing = isinstance(error, FileNotFoundError)
        what = "is missing" if missing else f"is damaged at or behind {key} ({error})"
        found.problem = f"{path}: {what}; {_RESTORE}."
        return found
    found.shard, found.rows, found.dali_index = writer.shard(path.name), writer.rows, writer.dali_index()
    if found.shard.sha256 != digest:
        found.problem = f"{path}: is damaged outside its images; {_RESTORE}."
    return found


class _Nothing:
    def write(self, data: bytes, /) -> None: ...


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, int, bytes, dict[str, str]]]:
    """(key, label, image, note) of each KEY.cls, KEY.jpg and KEY.json."""
    members = iter(tar)
    for first in members:
        data: list[bytes] = []
        key = first.name.removesuffix(".cls")
        for ending, member in (("cls", first), ("jpg", next(members, None)), ("json", next(members, None))):
            file = tar.extractfile(member) if member is not None else None
            if member is None or file is None or member.name != f"{key}.{ending}":
                raise ValueError(f"{key} lacks its .{ending}")
            data.append(file.read())
        yield key, int(data[0]), data[1], json.loads(data[2])


def _groups(folder: Path, manifest: Manifest | None, tars: list[_Tar]) -> dict[str, list[_Tar]]:
    """The tars by split, in order: as the manifest says or, without one, as their names do."""
    groups: dict[str, list[_Tar]] = {split: [] for split in (manifest.splits if manifest else ("train", "val"))}
    known = {shard.name: split for split in groups for shard in (manifest.splits[split].shards if manifest else ())}
    for tar in tars:
        match = re.fullmatch(r"(.+)-(\d{6})\.tar", tar.path.name)
        split = known.get(tar.path.name) if manifest else match and match[1]
        if not split or not match:
            tar.problem = f"{tar.path}: is no shard of this pack; move it away."
            continue
        group = groups.setdefault(split, [])
        if int(match[2]) != len(group):
            tar.problem = tar.problem or f"{folder / split}-{len(group):06d}.tar: is missing; {_RESTORE}."
        group.append(tar)
    return groups


def _compare(folder: Path, manifest: Manifest | None, split: str, group: list[_Tar]) -> None:
    """Note in each tar how it differs from what was packed, as far as manifest or index still tell."""
    try:
        stored = np.load(folder / f"{split}.index.npy", mmap_mode="r")
        stored = stored if stored.dtype == INDEX_DTYPE else np.zeros(0, INDEX_DTYPE)
    except (OSError, ValueError, EOFError):
        stored = np.zeros(0, INDEX_DTYPE)
    for number, tar in enumerate(group):
        if tar.problem:
            continue
        rows = stored[stored["shard"] == number]
        changed = np.flatnonzero(rows["crc32"] != tar.rows["crc32"]) if len(rows) == len(tar.rows) else []
        if manifest and manifest.splits[split].shards[number] == tar.shard:
            continue
        if len(changed):
            tar.problem = (
                f"{tar.path}: the image of {tar.key(int(changed[0]))} has changed since it was packed; {_RESTORE}."
            )
        elif manifest:
            tar.problem = f"{tar.path}: is not the shard that was packed (sha256 differs); {_RESTORE}."


def _derived(folder: Path, manifest: Manifest | None, groups: dict[str, list[_Tar]]) -> tuple[Manifest, str]:
    """The manifest that these tars must have, and what of it cannot be known without the old one."""
    names = {label: name for group in groups.values() for tar in group for label, name in tar.classes.items()}
    classes = manifest.classes if manifest else tuple(names.get(label, "") for label in range(max(names) + 1))
    splits: dict[str, Split] = {}
    for split, group in groups.items():
        rows = index_rows([tar.rows for tar in group])
        counts = np.bincount(rows["label"], minlength=len(classes)).tolist()
        splits[split] = Split(len(rows), tuple(counts), tuple(tar.shard for tar in group if tar.shard))
    problem = ""
    if "" in classes:
        problem = f"{folder / FILE}: is lost, and no sample tells the name of class {classes.index('')}; pack again."
    packed = sum(int(tar.rows["size"].sum()) for group in groups.values() for tar in group)
    old = manifest or Manifest(folder=folder, classes=classes, splits=splits, options={})
    return replace(old, splits=splits, packed_bytes=packed), problem
