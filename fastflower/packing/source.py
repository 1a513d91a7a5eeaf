"""Accepts what is not packed yet where shards are expected: packs it once, beside the runs, and reuses that pack."""

import glob
import logging
import os
import re
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Literal

from fastflower import distributed
from fastflower.errors import ArgumentError, FolderError, HeldError, ShardError, require
from fastflower.files import blame_the_system, locked, remedy_for
from fastflower.packing.folder import Folder
from fastflower.packing.hidden import is_hidden, is_run_or_pack
from fastflower.packing.layout import quoted, subfolders
from fastflower.packing.listing import OwnSplitError
from fastflower.packing.lists import is_table, neighbors
from fastflower.packing.names import is_image
from fastflower.packing.packer import accepting, is_inside, pack
from fastflower.packing.remarks import summary
from fastflower.packing.space import bytes_in, readable
from fastflower.packing.workspace import remove_empty
from fastflower.shards.manifest import FILE, PLAN, WORK, Manifest
from fastflower.shards.remote import Remote, remote

_log = logging.getLogger("fastflower")

PACKS = "packs"  # the folder beside runs
RUNS = Path("runs", PACKS)
_POLL_SECONDS = 0.5  # while another process packs
_MOST_LETTERS = 50  # of the source's name in that of its pack
_WEIGHTS = (".pt", ".pth")  # zip archives, too; passed by mistake
_AsSplit = Literal["val", "test"] | None


def shards_of(
    shards: str | Path | Remote,
    packs: Path = RUNS,
    *,
    trained: object = None,
    as_split: _AsSplit = None,
    fold: int | None = None,
    accept: Callable[[Folder], None] = lambda _: None,
) -> str | Path | Remote:
    """Return shards as they are. Pack anything else that `pack` takes into PACKS/NAME-HASH, once, and return this folder.

    The hash covers the path of the source, `as_split`, and the names, sizes and times of its files. If another process packs
    the same, waits for it. In a process group, rank 0 packs and the others wait.

    packs  The folder for packs.
    trained  Identity of the shards of a run to resume or to evaluate (Manifest.identity). Its pack is preferred.
    as_split  The split for images of a folder without splits. None draws a val split.
    fold  The fold that is asked for. Only shards have folds.
    accept  Called with the images that were found, before any is packed. May raise an error.

    Raises FolderError if the source cannot be packed, ArgumentError if it has no folds, and ShardError if it does not exist.
    """
    require(bool(str(shards)), "shards", "a folder, an archive, a table or a URL", shards)
    if remote(shards):
        return shards
    source = Path(str(shards).removeprefix("file://"))
    folder, busy = distributed.of_first_rank(partial(_prepare, source, packs, trained, as_split, fold))
    if not busy:
        return folder
    token = accepting.set(accept)
    try:
        return distributed.of_first_rank(partial(_pack_once, source, folder, as_split), busy)
    finally:
        accepting.reset(token)


def _is_pack(folder: Path) -> bool:
    """Return whether pack wrote a folder, or began to. Beside class folders, manifest.json belongs to another program."""
    ours = (folder / WORK).exists() or any(folder.glob("*.index.npy"))
    return ours or ((folder / FILE).exists() and not subfolders(folder))


@dataclass(frozen=True, slots=True)
class _Packs:
    """The packs of a source in a folder."""

    source: Path
    folder: Path
    state: str
    """Hash of the source's files."""

    def current(self, as_split: _AsSplit) -> Path:
        """Return the folder for a pack of the files as they are."""
        return self.folder / f"{self._start(as_split)}{self.state}"

    def older(self, as_split: _AsSplit) -> list[Path]:
        """Return the packs of the files as they were."""
        found = self.folder.glob(f"{glob.escape(self._start(as_split))}{8 * '[0-9a-f]'}")
        return sorted(path for path in found if path != self.current(as_split))

    def _start(self, as_split: _AsSplit) -> str:
        path = Path(os.path.realpath(self.source))
        kind = sha256(os.fsencode(f"{path} {as_split}")).hexdigest()[:4]
        named = _root(self.source).absolute()
        return f"{os.path.normpath(named).rpartition('/')[2][:_MOST_LETTERS]}-{kind}"


def _root(source: Path) -> Path:
    """Return the folder of a table, else the source itself."""
    return source.parent if is_table(source) else source


def _prepare(
    source: Path, folder: Path, trained: object, as_split: _AsSplit, fold: int | None
) -> tuple[Path, Path | None]:
    """Return a finished pack and None, or the folder to pack into and a file that exists until that is done."""
    if not os.path.exists(source):  # noqa: PTH110  (Path.exists raises if a name is too long)
        raise ShardError(
            f"{source}: does not exist; pass shards, a folder of images, an archive, or a table of labels."
        )
    try:
        if _is_pack(source) or source.suffix in _WEIGHTS:
            return source, None
    except OSError as error:
        blame_the_system(error, source)
        raise ShardError(f"{source}: cannot be read ({error.strerror}); make it readable.") from None
    if fold is not None:
        command = f"fastflower pack {quoted(source)} --folds 5 --out shards"
        raise ArgumentError(
            f"fold must be None, because {source} is not packed with folds, got {fold!r}; pack it first, then pass shards:\n"
            f"  {command}"
        )
    packs = _Packs(source, folder, _state_of(source))
    own = packs.current(None)
    candidates = [own] if as_split else [own, *packs.older(None)]
    if found := trained_pack(candidates, trained):
        if found != own:
            what = "has changed since this run began, which resumes on the images that it began with"
            _log.warning("%s: %s (%s)", source, what, found)
        return found, None
    divided = as_split and _is_ready(own) and Manifest.load(own).options["split_by"] == "folder"
    target = own if divided else packs.current(as_split)
    if _is_ready(target):
        _log.info("%s: is packed already, in %s", source, target)
        return target, None
    if is_inside(folder, _root(source)) and not is_table(source):
        what = f"would hold the pack, but is inside the folder to pack ({_root(source)})"
        remedy = f"choose a run's folder outside (--out), or pack first: fastflower pack {quoted(source)} --out FOLDER"
        raise FolderError(f"{folder}: {what}; {remedy}")
    for old in packs.older(as_split):
        what = "has changed; remove its old pack if no run on it is to resume"
        _log.info("%s: %s: %s (%s)", source, what, old, readable(bytes_in(old)))
    busy = folder / f".{target.name}.{token_hex(4)}"
    if distributed.world_size() > 1:
        with _writing(source, folder):
            folder.mkdir(parents=True, exist_ok=True)
            busy.touch()
    return target, busy


def _is_ready(folder: Path) -> bool:
    return (folder / FILE).exists() and not (folder / WORK).exists()


def _identity(folder: Path) -> object:
    """Return what identifies the train split of a pack, or None if there is none."""
    try:
        return Manifest.load(folder).identity("train")["shards"]
    except ShardError:
        return None


def trained_pack(packs: Iterable[Path], trained: object) -> Path | None:
    """Return the pack whose train split has the given identity, or None."""
    return next((pack for pack in packs if _identity(pack) == trained), None) if trained else None


def _pack_once(source: Path, folder: Path, as_split: _AsSplit) -> Path:
    """Pack into a folder, unless another process has done so, and return the folder.

    If `as_split` is given, but the source has splits of its own, packs it as it is into the folder for that.
    """
    lock = folder.with_name(f".{folder.name}.lock")
    new = [path for path in (folder.parent, *folder.parent.parents) if not path.exists()]
    with ExitStack() as stack:
        stack.callback(remove_empty, new)
        with _writing(source, folder):
            _take(stack, lock, source, folder)
        stack.callback(lock.unlink, missing_ok=True)
        if _is_ready(folder):
            return folder
        try:
            manifest = pack(source, folder, as_split=as_split)
            for line in [*summary(manifest)][:-1]:  # the last one names the folder, which the log has done
                _log.info("%s", line)
            return folder
        except OwnSplitError:
            other = _Packs(source, folder.parent, _state_of(source)).current(None)
        except FolderError as error:
            if not re.search(r"--[a-z]|fastflower pack", str(error)):
                raise
            out = folder if (folder / WORK / PLAN).exists() else Path("shards")
            command = f"fastflower pack {quoted(source)} --out {quoted(out)}"
            raise FolderError(f"{error}\nFlags are those of pack: pack first ({command}), then pass {out}.") from error
    return _pack_once(source, other, None)


def _take(stack: ExitStack, lock: Path, source: Path, folder: Path) -> None:
    """Hold a lock until the stack closes. While another process holds it, say so and wait."""
    told = False
    while True:
        try:
            stack.enter_context(locked(lock))
            return
        except HeldError as error:
            if not told:
                _log.info("%s: waiting for %s, which packs it into %s", source, error, folder)
            told = True
            time.sleep(_POLL_SECONDS)


@contextmanager
def _writing(source: Path, folder: Path) -> Generator[None]:
    """Explain that the folder for packs cannot be written."""
    try:
        yield
    except OSError as error:
        blame_the_system(error, folder)
        remedy = remedy_for(error, f"pack first: fastflower pack {quoted(source)} --out FOLDER, then pass that")
        raise FolderError(f"{folder}: cannot be written ({error.strerror or error}); {remedy}.") from None


def _state_of(source: Path) -> str:
    """Return a hash of the names, sizes and times of the files that `pack` may read.

    These are the file itself, or all files in a folder. For a table, they are the table, those of other splits beside it, and
    the images below its folder.
    """
    digest, root = sha256(), _root(source)
    table = {source.name, *(file.name for file in neighbors(source))} if is_table(source) else None
    if not root.is_dir():
        status = root.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()[:8]
    seen, pending = set[tuple[int, int]](), [str(root)]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)  # noqa: PTH116  (pathlib takes three times as long)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            digest.update(f"{error.errno}".encode())
            continue
        entries = [entry for entry in entries if _counts(entry, table)]
        pending += [entry.path for entry in entries if _is_folder(entry)]
        if table:
            entries = [entry for entry in entries if not _is_folder(entry)]
        if entries or not table:
            digest.update(os.fsencode(f"{os.path.relpath(folder, root)}\0"))
        for entry in entries:
            digest.update(os.fsencode(_described(entry)))
    return digest.hexdigest()[:8]


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


def _described(entry: os.DirEntry[str]) -> str:
    """Return the name of an entry, where it leads to if it is a link, and the size and time of a file."""
    link = f"{Path(entry.path).readlink()}\0" if entry.is_symlink() else ""
    if _is_folder(entry):
        return f"{link}{entry.name}/\0"
    try:
        status = entry.stat()
        return f"{link}{entry.name}\0{status.st_size} {status.st_mtime_ns}\0"
    except OSError:  # a broken link
        return f"{link}{entry.name}\0" + "0 0\0"
