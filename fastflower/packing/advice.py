"""Recognizes archives, and says what to do with those that `pack` does not unpack."""

import os
import re
import shlex
import tarfile
import zipfile
import zlib
from contextlib import suppress
from lzma import LZMAError
from pathlib import Path

_ENDINGS = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst)|7z|rar)$", re.IGNORECASE)
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


def advice(archive: Path) -> str:
    """Return what to do with an archive, or "" if it is neither zip nor tar."""
    if not (is_zip(archive) or is_tar(archive)):
        return ""
    return f"pack it (fastflower pack {_quoted(archive)}), or unpack it ({command_for(archive)})"


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
