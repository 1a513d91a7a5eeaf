"""Unpacks a zip or tar archive of images into the workspace, so that it can be packed like a folder."""

import errno
import hashlib
import json
import logging
import lzma
import os
import re
import shlex
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Self

from tqdm import tqdm

from fastflower import progress
from fastflower.errors import FolderError
from fastflower.files import blame_the_system, write_atomically
from fastflower.packing.advice import DAMAGE, beside, command_for, is_file, is_zip
from fastflower.packing.hidden import entries, ignoring
from fastflower.packing.layout import holds_images
from fastflower.packing.listing import lists_of
from fastflower.packing.names import is_image, splits_named
from fastflower.shards.manifest import PLAN

_log = logging.getLogger("fastflower")

RECORD = "unpacked.json"  # in the workspace; written last
_FOLDER = "unpacked"
_MOST_TIMES = 100  # as large as an archive may be what it contains
_ALWAYS_BYTES = 1 << 30  # that any archive may contain
_MOST_HEADER = 1 << 20  # bytes of a tar's long name or extended header, which are read into memory
_PIECE = 1 << 20
_DEEPEST = 20  # folders that may wrap the content
_MOST_NAMES = 6  # per message
_BAD_NAME = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}


@contextmanager
def unpacked(archive: Path, work: Path, *, ignore: Sequence[str] = (), tables: bool = False) -> Generator[Path]:
    """Unpack an archive into the workspace, unless that is done, and yield the folder of its content.

    tables  Whether tables are used, with paths relative to the root of the archive or to the only folder in it.

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
        with ignoring(target, ignore, archive):
            yield _content(archive, target, tables=tables)
    except FolderError as error:
        if str(target) not in str(error):
            raise
        if " of these images: fastflower pack " in str(error):  # a table in the archive
            said = re.sub(rf"^{re.escape(str(target))}\S*: ", "", str(error)).replace(f"{target}/", "")
            said = re.sub(
                r"fastflower pack ('[^']*'|\S+)", lambda _: f"fastflower pack {shlex.quote(str(archive))}", said
            )
            raise FolderError(f"{archive}: {said}") from None
        said = str(error).replace(str(target), str(beside(archive)))
        raise FolderError(f"{archive}: unpack it first ({command_for(archive)}), because:\n{said}") from None


def _named(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_MOST_NAMES])) + (" ..." if len(names) > _MOST_NAMES else "")


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def root_in(work: Path) -> Path:
    """Return the folder that archives are unpacked to."""
    return work.absolute() / _FOLDER


def _content(archive: Path, folder: Path, *, tables: bool) -> Path:
    """Return the folder or, while it has only one folder, that one.

    A folder with class folders is also taken if there are files and folders without images next to it.
    """
    alone = path = folder
    others: list[str] = []
    for _ in range(_DEEPEST):
        inside = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries(path)}
        tops = [name for name, is_top in inside.items() if is_top]
        whole = False
        if len(inside) > 1:
            if tables or any(map(is_image, inside.keys() - tops)):
                break
            whole = bool(lists_of(path) or splits_named(tops))
            tops = [name for name in tops if whole or holds_images(path / name)]
            others += sorted(str((path / name).relative_to(folder)) for name in inside.keys() - tops)
        if whole or len(tops) > 1:
            if path != alone:
                what = f"packs {str(path.relative_to(folder))!r}, the only folder with images; not {_named(others)}"
                _log.warning("%s: %s", archive, what)
            return path
        if not tops:
            break
        path /= tops[0]
        alone = alone if others else path
    return alone


def _name_of(member: zipfile.ZipInfo) -> str:
    """Return the name of a zip's member. Info-ZIP and macOS write UTF-8 without saying so, or into an extra field."""
    name, marked = member.filename, member.flag_bits & 0x800
    with suppress(UnicodeError):  # code page 437 has no UTF-8 of other than ASCII letters in sensible names
        name = name if marked else name.encode("cp437").decode()
    with suppress(UnicodeError, struct.error):
        raw, extra = member.orig_filename.encode("utf-8" if marked else "cp437"), member.extra
        while len(extra) >= 4:
            kind, size = struct.unpack_from("<HH", extra)
            if kind == 0x7075 and struct.unpack_from("<BI", extra, 4) == (1, zlib.crc32(raw)):  # Unicode Path
                name = extra[9 : 4 + size].decode() or name
            extra = extra[4 + size :]
    return name.replace("\\", "/") if member.create_system == 0 else name  # 0: Windows


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
    replaced: list[str] = field(default_factory=list[str])
    """Members that were followed by another one of the same name with other content."""

    @classmethod
    def of(cls, archive: Path, target: Path) -> Self:
        most = max(_ALWAYS_BYTES, _MOST_TIMES * archive.stat().st_size)
        disk = shutil.disk_usage(target)
        space = disk.free if disk.total else most  # some file systems do not know
        return cls(archive, target, most, space, progress.bar(desc="unpack", unit="B", unit_scale=True))

    def run(self) -> None:
        """Unpack everything."""
        with self._reading("file"):
            file = self.archive.open("rb")
        with file, self.bar:
            (self._unpack_zip if is_zip(self.archive) else self._unpack_tar)(file)
        self._make_links()
        if self.skipped:
            what = f"skipped {len(self.skipped)} of its members: devices, pipes, or links that do not stay inside"
            _log.warning("%s: %s (%s)", self.archive, what, _named(self.skipped))
        if self.replaced:
            count, what = len(self.replaced), "replaced another one of the same name with different content"
            _log.warning("%s: %d of its members %s (%s)", self.archive, count, what, _named(self.replaced))

    def _unpack_zip(self, file: IO[bytes]) -> None:
        with self._reading("directory"):
            archive = zipfile.ZipFile(file)
        members = archive.infolist()
        self.bar.total = sum(member.file_size for member in members)
        self._check(self.bar.total)
        for member in members:
            name = _name_of(member)
            if member.flag_bits & 1:
                raise FolderError(
                    f"{self.archive}: {name!r} is encrypted; unpack it first ({command_for(self.archive)})."
                )
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

    def _unpack_tar(self, file: BufferedReader) -> None:
        with self._reading("start"):
            # By itself, tarfile takes zeros after the end of an xz file for damage.
            xz = file.peek(6).startswith(b"\xfd7zXZ\0")
            source = lzma.LZMAFile(file, format=lzma.FORMAT_XZ) if xz else file  # noqa: SIM115  (the caller closes the file)
            archive = tarfile.open(fileobj=source, tarinfo=_Header)  # noqa: SIM115  (closing it only frees memory)
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
            elif member.islnk() and (source := self._place(member.linkname)) and is_file(source):
                if (path := self._place(name)) and not (path.exists() and path.samefile(source)):
                    with source.open("rb") as stream:
                        self._add_file(name, stream)
            else:
                self.skipped.append(name)
        more = False
        with self._reading("end"):  # has the checksum of a compressed tar
            while archive.fileobj and (piece := archive.fileobj.read(_PIECE)):
                self._count(len(piece))
                more = more or piece.count(0) < len(piece)
        if more:
            what = "has data after its end marker, as when tar archives are joined with cat"
            command = command_for(self.archive).replace("tar -xf", "tar --ignore-zeros -xf")
            raise FolderError(f"{self.archive}: {what}; unpack it ({command}), then pack the folder.")

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
            before = _digest(path) if is_file(path) else None
            file = path.open("wb")
        with file:
            while True:
                with self._reading(repr(name)):
                    piece = stream.read(_PIECE)
                if not piece:
                    break
                self._count(len(piece))
                file.write(piece)
        if before and before != _digest(path):
            self.replaced.append(name)

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
            raise FolderError(f"{self.archive}: {what}; free up space, or choose another folder as out (--out).")
        if total > self.most:
            what = f"contains more than {self.most} bytes, which is suspicious for an archive of its size"
            raise FolderError(f"{self.archive}: {what}; if it is right, unpack it first ({command_for(self.archive)}).")

    @contextmanager
    def _reading(self, what: str) -> Generator[None]:
        """Explain errors in the archive."""
        try:
            yield
        except DAMAGE as error:
            blame_the_system(error, self.archive)
            if isinstance(error, NotImplementedError):
                target = shlex.quote(str(beside(self.archive)))
                remedy = f"{command_for(self.archive)} && fastflower pack {target}"
                raise FolderError(
                    f"{self.archive}: {what} uses a compression that Python cannot read; type: {remedy}"
                ) from None
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
