"""Unpacks a zip or tar archive of images into the workspace, so that it can be packed like a folder."""

import errno
import json
import logging
import os
import re
import shlex
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any, Self

from tqdm import tqdm

from fastflower.errors import FolderError
from fastflower.files import blame_the_system, write_atomically
from fastflower.packing.hidden import entries
from fastflower.shards.manifest import PLAN

RECORD = "unpacked.json"  # in the workspace; written last
_FOLDER = "unpacked"
_MOST_TIMES = 100  # as large as an archive may be what it contains
_ALWAYS_BYTES = 1 << 30  # that any archive may contain
_MOST_HEADER = 1 << 20  # bytes of a tar's long name or extended header, which are read into memory
_PIECE = 1 << 20
_DEEPEST = 20  # folders that may wrap the content
_MOST_NAMES = 6  # per message
_ENDINGS = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst)|7z|rar)$", re.IGNORECASE)
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, LZMAError, EOFError, OSError),
    *(ValueError, RuntimeError),  # from zipfile: invalid numbers, unknown compression
)
_BAD_NAME = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}


def is_archive(path: Path) -> bool:
    """Return whether a file is a zip or tar archive, or is named like an archive."""
    return _is_file(path) and (_ENDINGS.search(path.name) is not None or _is_zip(path) or _is_tar(path))


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113  (Path.is_file raises if a name is too long)


def _is_zip(path: Path) -> bool:
    """Return whether a file is a zip archive. A truncated zip counts; a tar that ends with a zip does not."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(4) in (b"PK\3\4", b"PK\5\6") or (not _is_tar(path) and zipfile.is_zipfile(path))
    return False


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except _DAMAGE:
        return False


def advice(archive: Path) -> str:
    """Return what to do with an archive, or "" if it is neither zip nor tar."""
    if not (_is_zip(archive) or _is_tar(archive)):
        return ""
    return f"pack it (fastflower pack {_quoted(archive)}), or unpack it ({_command(archive)})"


@contextmanager
def unpacked(archive: Path, work: Path) -> Generator[Path]:
    """Unpack an archive into the workspace, unless that is done, and yield the folder of its content.

    If the block raises an error that names a file in this folder, the error tells the user to unpack the archive first.

    Raises FolderError if the archive is damaged, encrypted or too large, or has a member outside its folder.
    """
    target, record, status = work.absolute() / _FOLDER, work / RECORD, archive.stat()
    wanted = {"archive": archive.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    before = json.loads(record.read_bytes()) if record.exists() else None
    if before != wanted:
        if before and (work / PLAN).exists():
            what = f"is not the archive ({before['archive']!r}), or has been changed, since the pack into {work.parent}"
            raise FolderError(
                f"{archive}: {what} was interrupted; pass the unchanged archive to resume, or remove {work} to start over."
            )
        record.unlink(missing_ok=True)
        if target.exists():  # left by a killed process
            shutil.rmtree(target)
        target.mkdir()
        _Unpacking.of(archive, target).run()
        os.sync()  # one call for all files
        write_atomically(record, json.dumps(wanted).encode())
    try:
        yield _content(target)
    except FolderError as error:
        if str(target) not in str(error):
            raise
        said = str(error).replace(str(target), str(_beside(archive)))
        raise FolderError(f"{archive}: unpack it first ({_command(archive)}), because:\n{said}") from None


def _content(folder: Path) -> Path:
    """Return the folder or, while it contains only one folder, that one."""
    for _ in range(_DEEPEST):
        inside = list(entries(folder))
        if len(inside) != 1 or not inside[0].is_dir(follow_symlinks=False):
            break
        folder /= inside[0].name
    return folder


def _beside(archive: Path) -> Path:
    """Return a new folder next to an archive, to unpack it to."""
    name = _ENDINGS.sub("", archive.name)
    folder = archive.with_name(name)
    return archive.with_name(f"{name}-unpacked") if folder.exists() else folder


def _command(archive: Path) -> str:
    """Return the command that unpacks an archive."""
    source, target = _quoted(archive), _quoted(_beside(archive))
    if archive.suffix.lower() == ".zip" or _is_zip(archive):
        return f"unzip {source} -d {target}"
    return f"mkdir {target} && tar -xf {source} -C {target}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


class _Header(tarfile.TarInfo):
    """A tar header. tarfile would take an invalid or missing header for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the end
                raise
            raise tarfile.ReadError(f"{error}, no end marker") from None
        if not (header.isreg() or header.size <= _MOST_HEADER):
            raise tarfile.ReadError("header too large")
        return header


@dataclass(slots=True)
class _Unpacking:
    """Writes the members of an archive below `target`, at most `most` bytes. Nothing is written through links."""

    archive: Path
    target: Path
    most: int
    space: int
    """Free bytes."""
    bar: "tqdm[Any]"
    written: int = 0
    links: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Symbolic links to create at the end: name, target."""
    skipped: list[str] = field(default_factory=list[str])

    @classmethod
    def of(cls, archive: Path, target: Path) -> Self:
        most = max(_ALWAYS_BYTES, _MOST_TIMES * archive.stat().st_size)
        disk = shutil.disk_usage(target)
        space = disk.free if disk.total else most  # some file systems do not know
        return cls(archive, target, most, space, tqdm(desc="unpack", unit="B", unit_scale=True, disable=None))

    def run(self) -> None:
        """Unpack everything."""
        with self._reading("file"):
            file = self.archive.open("rb")
        with file, self.bar:
            (self._unpack_zip if _is_zip(self.archive) else self._unpack_tar)(file)
        self._make_links()
        if self.skipped:
            named = ", ".join(map(repr, self.skipped[:_MOST_NAMES])) + (
                " ..." if len(self.skipped) > _MOST_NAMES else ""
            )
            what = f"skipped {len(self.skipped)} of its members: devices, pipes, or links that do not stay inside"
            logging.getLogger("fastflower").warning("%s: %s (%s)", self.archive, what, named)

    def _unpack_zip(self, file: IO[bytes]) -> None:
        with self._reading("directory"):
            archive = zipfile.ZipFile(file)
        members = archive.infolist()
        self.bar.total = sum(member.file_size for member in members)
        self._check(self.bar.total)
        for member in members:
            name = member.filename.replace("\\", "/") if member.create_system == 0 else member.filename  # 0: Windows
            if member.flag_bits & 1:
                raise FolderError(f"{self.archive}: {name!r} is encrypted; unpack it first ({_command(self.archive)}).")
            mode = stat.S_IFMT(member.external_attr >> 16) if member.create_system == 3 else 0  # 3: Unix
            if name.endswith("/") or mode == stat.S_IFDIR:
                self._add_folder(name)
            elif mode == stat.S_IFLNK:
                with self._reading(repr(name)):
                    self.links.append((name, os.fsdecode(archive.open(member).read(_PIECE))))
            elif mode in (0, stat.S_IFREG):
                with self._reading(repr(name)):
                    stream = archive.open(member)
                with stream:
                    self._add_file(name, stream)
            else:
                self.skipped.append(name)

    def _unpack_tar(self, file: IO[bytes]) -> None:
        with self._reading("start"):
            archive = tarfile.open(fileobj=file, tarinfo=_Header)  # noqa: SIM115  (closing it only frees memory)
        name = ""
        while True:
            with self._reading(f"member after {name!r}"):
                member = archive.next()
            if member is None:
                break
            vars(archive)["members"].clear()  # else a million of them take a gigabyte
            name = member.name
            if member.isdir():
                self._add_folder(name)
            elif member.issym():
                self.links.append((name, member.linkname))
            elif member.isreg() and (stream := archive.extractfile(member)):
                self._add_file(name, stream)
            elif member.islnk() and (source := self._place(member.linkname)) and _is_file(source):
                with source.open("rb") as stream:
                    self._add_file(name, stream)
            else:
                self.skipped.append(name)
        with self._reading("end"):  # has the checksum of a compressed tar
            while archive.fileobj and (piece := archive.fileobj.read(_PIECE)):
                self._count(len(piece))

    def _add_folder(self, name: str) -> None:
        if path := self._place(name):
            with self._writing(name):
                path.mkdir(parents=True, exist_ok=True)

    def _add_file(self, name: str, stream: IO[bytes]) -> None:
        path = self._place(name)
        if path is None:
            return
        with self._writing(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
        with file:
            while True:
                with self._reading(repr(name)):
                    piece = stream.read(_PIECE)
                if not piece:
                    break
                self._count(len(piece))
                file.write(piece)

    def _place(self, name: str) -> Path | None:
        """Return where a member goes, or None if macOS added it. Raises FolderError if that is outside."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or "\0" in name or re.match(r"[A-Za-z]:(/|$)", name):
            what = f"{name!r} would be outside the folder that it is unpacked to"
            raise FolderError(f"{self.archive}: {what}; unpack the archive with another program, then pack the folder.")
        added = "__MACOSX" in parts or any(part.startswith("._") for part in parts)
        return None if added or not parts else self.target.joinpath(*parts)

    def _count(self, more: int) -> None:
        self.written += more
        self._check(self.written)
        self.bar.update(more)

    def _check(self, total: int) -> None:
        """Raise FolderError if the content is too large."""
        if total > self.space:
            what = f"needs more than the {self.space} bytes that are free in {self.target.parents[1]} to be unpacked"
            raise FolderError(f"{self.archive}: {what}; free up space, or choose another folder with --out.")
        if total > self.most:
            what = f"contains more than {self.most} bytes, which is suspicious for an archive of its size"
            raise FolderError(f"{self.archive}: {what}; if it is right, unpack it first ({_command(self.archive)}).")

    @contextmanager
    def _reading(self, what: str) -> Generator[None]:
        """Explain errors in the archive."""
        try:
            yield
        except _DAMAGE as error:
            blame_the_system(error, self.archive)
            reason = str(error).partition("\n")[0] or type(error).__name__
            remedy = "it is damaged, incomplete, or neither zip nor tar; get it again, or unpack it first"
            raise FolderError(f"{self.archive}: {what} cannot be read ({reason}); {remedy}.") from error

    @contextmanager
    def _writing(self, name: str) -> Generator[None]:
        """Explain errors that are due to a member's name."""
        try:
            yield
        except OSError as error:
            if error.errno not in _BAD_NAME:
                raise
            remedy = "rename it in the archive"
            raise FolderError(f"{self.archive}: {name!r} cannot be unpacked ({error.strerror}); {remedy}.") from None

    def _make_links(self) -> None:
        """Create the symbolic links, none below another one. Then remove those that lead outside."""
        top, made = self.target.resolve(), list[tuple[str, Path]]()
        for name, target in self.links:
            place = self._place(name)
            if place is None:
                continue
            path = top / place.relative_to(self.target)
            try:
                if path.parent.resolve() != path.parent:
                    raise OSError(errno.ELOOP, "is below a link")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(target)
                made.append((name, path))
            except (OSError, ValueError, RuntimeError):  # exists already; or the file system has no links
                self.skipped.append(name)
        for name, path in made:
            if not Path(os.path.realpath(path)).is_relative_to(top):  # Path.resolve raises for a link to itself
                path.unlink()
                self.skipped.append(name)
