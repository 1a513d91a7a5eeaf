"""The files that a pack comes from: whether they are as they were, and which of them is not."""

import os
import zlib
from collections.abc import Iterator
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from fastflower.files import write_atomically
from fastflower.packing.hidden import is_hidden, is_run_or_pack
from fastflower.packing.lists import is_table, neighbors
from fastflower.packing.names import is_image
from fastflower.packing.remarks import printable

_BLOCK = 1 << 16  # bytes
_MOST_EQUAL = 8  # files of one size and time, to find one that was moved
FILES = "files.zz"  # in a pack that `train` made: the listing, compressed


class Files(NamedTuple):
    """The names, sizes and times of the files that `pack` may read."""

    state: str
    """A hash of them, in the name of a pack."""
    listing: bytes
    """A null byte, then for each file and folder its path, which begins with "/" and ends with "/" if it is a folder, and its
    size, time and target if it is a link, each ended by a null byte."""


def root_of(source: Path) -> Path:
    """Return the folder of a table, else the source itself."""
    return source.parent if is_table(source) else source


def files_of(source: Path) -> Files:
    """Return the file itself, or all files in a folder. For a table: it, those of other splits beside it, and the images below
    its folder.
    """
    digest, listing = sha256(), bytearray(b"\0")
    for path, hashed, detail in _walk(source):
        digest.update(hashed)
        if path:
            listing += b"%b\0%b\0" % (path, detail)
    return Files(digest.hexdigest()[:8], bytes(listing))


def write(listing: bytes, file: Path) -> None:
    """Write a listing atomically, compressed."""
    write_atomically(file, zlib.compress(listing, 1))


def read(file: Path) -> bytes:
    """Return a listing from its file. Raises OSError or zlib.error."""
    return zlib.decompress(file.read_bytes())


def difference(before: bytes, now: bytes) -> str:
    """Return the first file that differs between two listings, and how, or "" if none does."""
    old, new = (_record(listing, _common(before, now)) for listing in (before, now))
    if old == new:
        return ""
    (path, detail), (other, new_detail) = old, new
    if path == other:
        return f"{_shown(path)} has been changed"
    if path and not _holds(now, path):
        moved = _elsewhere(detail, now, before)
        return f"{_shown(path)} {f'is now {_shown(moved)}' if moved else 'has been removed'}"
    moved = _elsewhere(new_detail, before, now)
    return f"{_shown(moved)} is now {_shown(other)}" if moved else f"{_shown(other)} has been added"


def _holds(listing: bytes, path: bytes) -> bool:
    return b"\0%b\0" % path in listing


def _elsewhere(detail: bytes, listing: bytes, other: bytes) -> bytes:
    """Return the path of a file with this size and time in one listing, and not in the other, or b"" if there is none."""
    place = 0
    for _ in range(_MOST_EQUAL if detail else 0):
        if (place := listing.find(b"\0%b\0" % detail, place + 1)) < 0:
            break
        path, _ = _record(listing, place)
        if not _holds(other, path):
            return path
    return b""


def _common(one: bytes, other: bytes) -> int:
    """Return the number of bytes at the start that are equal."""
    place, end = 0, min(len(one), len(other))
    while place < end and one[place : place + _BLOCK] == other[place : place + _BLOCK]:
        place += _BLOCK
    rest = zip(one[place : place + _BLOCK], other[place : place + _BLOCK], strict=False)
    return min(place, end) + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], rest))


def _record(listing: bytes, place: int) -> tuple[bytes, bytes]:
    """Return the path and the detail at a place in a listing, empty at its end."""
    start = listing.rfind(b"\0", 0, place) + 1
    if listing[start : start + 1] not in (b"/", b""):  # in the detail
        start = listing.rfind(b"\0", 0, start - 1) + 1
    end = listing.find(b"\0", start)
    return listing[start:end], listing[end + 1 : listing.find(b"\0", end + 1)]


def _shown(path: bytes) -> str:
    return printable(os.fsdecode(path.removeprefix(b"/"))) or "the file"


def _walk(source: Path) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield for each file and folder its path and its detail in the listing, between them what enters the hash."""
    root = root_of(source)
    table = {source.name, *(file.name for file in neighbors(source))} if is_table(source) else None
    if not root.is_dir():
        status = root.stat()
        described = f"{status.st_size} {status.st_mtime_ns}".encode()
        yield b"/", described, described
        return
    seen, pending = set[tuple[int, int]](), [str(root)]
    while pending:
        folder = pending.pop()
        place = os.path.relpath(folder, root)
        above = "/" if place == "." else f"/{place}/"
        try:
            status = os.stat(folder)  # noqa: PTH116  (pathlib takes three times as long)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            yield os.fsencode(above), f"{error.errno}".encode(), b"unreadable"
            continue
        entries = [entry for entry in entries if _counts(entry, table)]
        pending += [entry.path for entry in entries if _is_folder(entry)]
        if table:
            entries = [entry for entry in entries if not _is_folder(entry)]
        if entries or not table:
            yield b"", os.fsencode(f"{place}\0"), b""
        for entry in entries:
            name, detail, link = _described(entry)
            linked = f"{link}\0" if link else ""
            hashed = f"{linked}{name}\0" + (f"{detail}\0" if detail else "")
            yield (
                os.fsencode(above + name),
                os.fsencode(hashed),
                os.fsencode(f"{detail} -> {link}".strip() if link else detail),
            )


def _counts(entry: os.DirEntry[str], table: set[str] | None) -> bool:
    """Return whether `pack` may read an entry of a folder, or of the folder of a table. table  Names of the tables."""
    if is_hidden(entry.name) and not is_image(entry.name):
        return False
    if table is None or is_image(entry.name):
        return True
    return not is_run_or_pack(entry.path) if _is_folder(entry) else entry.name in table


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _described(entry: os.DirEntry[str]) -> tuple[str, str, str]:
    """Return the name of an entry, the size and time of a file, and where it leads to if it is a link."""
    link = str(Path(entry.path).readlink()) if entry.is_symlink() else ""
    if _is_folder(entry):
        return f"{entry.name}/", "", link
    try:
        status = entry.stat()
        return entry.name, f"{status.st_size} {status.st_mtime_ns}", link
    except OSError:  # a broken link
        return entry.name, "0 0", link
