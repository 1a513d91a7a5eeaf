"""Recognizes archives, and says what to do with those that `pack` does not unpack."""

import os
import re
import shlex
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from lzma import LZMAError
from pathlib import Path

from fastflower.files import blame_the_system
from fastflower.shards.kinds import kind_of

AS_FILES = 'save the images as files, one folder per class ("Images inside other files" in docs/format.md shows how)'
_ENDINGS = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst)|7z|rar)$", re.IGNORECASE)
_PART = re.compile(  # such as x.zip.001, x.tar.gz.partaa, x.tgzab
    r"(.+\.(?:zip|tar(?:\.(?:gz|bz2|xz|zst))?|tgz|7z|rar))([-_.]?(?:part)?[-_.]?(?:\d{1,3}|[a-z]{2}))", re.IGNORECASE
)
SHARD = (
    "holds WebDataset samples (.cls files), so it is a shard already; if fastflower packed it, train on its folder. "
    "Shards of other programs are not read: save the images as files, one folder per class"
)
_FEW = 10  # members
DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, LZMAError, EOFError, OSError),
    *(ValueError, RuntimeError),  # from zipfile: invalid numbers, unknown compression
)


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip or tar archive, or is named like an archive."""
    return is_file(path) and (_ENDINGS.search(path.name) is not None or is_zip(path) or is_tar(path))


def is_file(path: Path) -> bool:
    """Return whether a path is a file."""
    return os.path.isfile(path)  # noqa: PTH113  (Path.is_file raises if a name is too long)


def is_zip(path: Path) -> bool:
    """Return whether a file is a zip archive. A truncated zip counts; a tar that ends with a zip does not."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(4) in (b"PK\3\4", b"PK\5\6") or (not is_tar(path) and zipfile.is_zipfile(path))
    return False


def is_tar(path: Path) -> bool:
    """Return whether a file is a tar archive, compressed or not."""
    try:
        return tarfile.is_tarfile(path)
    except DAMAGE:
        return False


def loop(archives: Sequence[Path]) -> str:
    """Return the command that unpacks archives that lie in one folder and end alike, or ""."""
    endings = {found[0] for archive in archives if (found := _ENDINGS.search(archive.name))}
    if len(endings) != 1 or len({archive.parent for archive in archives}) != 1:
        return ""
    (ending,) = endings
    target = f'"${{f%{ending}}}"'
    unpack = f'unzip "$f" -d {target}' if ending == ".zip" else f'mkdir {target} && tar -xf "$f" -C {target}'
    return f"for f in {_quoted(archives[0].parent)}/*{ending}; do {unpack}; done"


def advice(archive: Path) -> str:
    """Return what to do with an archive, or "" if it is neither zip nor tar."""
    if not (is_zip(archive) or is_tar(archive)):
        return ""
    return f"pack it (fastflower pack {_quoted(archive)}), or unpack it ({command_for(archive)})"


def refused(path: Path) -> str | None:
    """Return what is wrong with a file to pack and what to do, or None if it may be an archive or nothing is known of it."""
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        blame_the_system(error, path)
        return f"cannot be read ({error.strerror}); make it readable"
    if not head:
        return "is empty; get it again"
    if not head.strip(b"\0"):
        return f"begins with {len(head)} zero bytes, so it is no archive; get it again"
    if path.with_suffix(".z01").exists() and path.suffix.lower() in (".zip", ".z01"):
        whole = path.with_name(f"{path.stem}-whole.zip")
        command = f"zip -s 0 {_quoted(path.with_suffix('.zip'))} --out {_quoted(whole)}"
        return f"is one part of several; join them ({command}) and pack {whole}"
    if not _ENDINGS.search(path.name) and (part := _PART.fullmatch(path.name)):
        whole, end = path.with_name(part[1]), "?" * len(part[2])
        return f"is one part of several; join them (cat {_quoted(whole)}{end} > {_quoted(whole)}) and pack {whole}"
    kind = kind_of(head)
    if kind is None:
        return None
    if unpack := _other_command(path, kind):
        return f"{kind}; unpack it ({unpack}) and pass the folder"
    if is_shard(path):
        return SHARD
    if is_zip(path) and path.suffix.lower() != ".npz":
        return None
    if any(note in kind for note in ("HTML", "text", "JSON", "XML", "pointer")):
        get = "" if "(run " in kind else "; get it again"
        return f"{kind}, not an archive{get}" if _ENDINGS.search(path.name) else None
    return None if "archive" in kind and "NumPy" not in kind else f"{kind}, which fastflower does not read; {AS_FILES}"


def is_shard(path: Path) -> bool:
    """Return whether a file is a tar of WebDataset samples with labels: 1.jpg, 1.cls, 2.jpg ..."""
    with suppress(*DAMAGE), tarfile.open(path) as tar:
        return any(member.name.endswith(".cls") for member in islice(tar, _FEW))
    return False


def _other_command(path: Path, kind: str) -> str:
    """Return the command that unpacks an archive of a kind that `pack` does not, or ""."""
    source, target = _quoted(path), _quoted(beside(path))
    if "Zstandard" in kind:
        is_tar_inside = re.search(r"\.(tar\.|t)zst$", path.name.lower())
        return f"mkdir {target} && tar --zstd -xf {source} -C {target}" if is_tar_inside else f"zstd -d {source}"
    commands = {"7z": f"7z x {source} -o{target}", "RAR": f"unrar x {source} {target}/"}
    return next((command for name, command in commands.items() if f"a {name} archive" in kind), "")


def beside(archive: Path) -> Path:
    """Return a new folder next to an archive, to unpack it to."""
    name = _ENDINGS.sub("", archive.name)
    folder = archive.with_name(name)
    return archive.with_name(f"{name}-unpacked") if folder.exists() else folder


def command_for(archive: Path) -> str:
    """Return the command that unpacks an archive."""
    source, target = _quoted(archive), _quoted(beside(archive))
    if archive.suffix.lower() == ".zip" or is_zip(archive):
        return f"unzip {source} -d {target}"
    return f"mkdir {target} && tar -xf {source} -C {target}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
