"""Accepts what is not packed yet where shards are expected: packs it once, beside the runs, and reuses that pack."""

import glob
import logging
import os
import time
import zlib
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Literal

from fastflower import distributed
from fastflower.errors import ArgumentError, FolderError, HeldError, ShardError, require
from fastflower.files import blame_the_system, locked, remedy_for
from fastflower.packing.again import packing
from fastflower.packing.folder import Folder
from fastflower.packing.layout import subfolders
from fastflower.packing.listing import OwnSplitError
from fastflower.packing.lists import is_table
from fastflower.packing.packer import accepting, is_inside, pack
from fastflower.packing.remarks import summary
from fastflower.packing.source_files import FILES, Files, difference, files_of, read, root_of, write
from fastflower.packing.space import bytes_in, readable
from fastflower.packing.workspace import remove_empty
from fastflower.shards.manifest import FILE, WORK, Manifest
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
    known = _Packs(Path(str(shards).removeprefix("file://")), packs)
    folder, busy = distributed.of_first_rank(partial(_prepare, known, trained, as_split, fold))
    if not busy:
        return folder
    token = accepting.set(accept)
    try:
        return distributed.of_first_rank(partial(_pack_once, known, folder, as_split), busy)
    finally:
        accepting.reset(token)


def _is_pack(folder: Path) -> bool:
    """Return whether pack wrote a folder, or began to. Beside class folders, manifest.json belongs to another program."""
    ours = (folder / WORK).exists() or any(folder.glob("*.index.npy"))
    return ours or ((folder / FILE).exists() and not subfolders(folder))


@dataclass(frozen=True)
class _Packs:
    """The packs of a source in a folder."""

    source: Path
    folder: Path

    @cached_property
    def files(self) -> Files:
        """The source's files, as they were when first asked for."""
        return files_of(self.source)

    def difference(self, pack: Path) -> str:
        """Return in parentheses which file is not as it was for a pack, or "" if the pack does not tell."""
        with suppress(OSError, zlib.error):
            if changed := difference(read(pack / FILES), self.files.listing):
                return f" ({changed})"
        return ""

    def current(self, as_split: _AsSplit) -> Path:
        """Return the folder for a pack of the files as they are."""
        return self.folder / f"{self._start(as_split)}{self.files.state}"

    def older(self, as_split: _AsSplit) -> list[Path]:
        """Return the packs of the files as they were."""
        found = self.folder.glob(f"{glob.escape(self._start(as_split))}{8 * '[0-9a-f]'}")
        return sorted(path for path in found if path != self.current(as_split))

    def _start(self, as_split: _AsSplit) -> str:
        path = Path(os.path.realpath(self.source))
        kind = sha256(os.fsencode(f"{path} {as_split}")).hexdigest()[:4]
        named = root_of(self.source).absolute()
        return f"{os.path.normpath(named).rpartition('/')[2][:_MOST_LETTERS]}-{kind}"


def _prepare(packs: _Packs, trained: object, as_split: _AsSplit, fold: int | None) -> tuple[Path, Path | None]:
    """Return a finished pack and None, or the folder to pack into and a file that exists until that is done."""
    source, folder = packs.source, packs.folder
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
        what = f"fold must be None, because {source} is not packed with folds, got {fold!r}; pack it first"
        raise ArgumentError(f"{what}:\n  {packing({'folds': 5}, source=source)}")
    own = packs.current(None)
    candidates = [own] if as_split else [own, *packs.older(None)]
    if found := trained_pack(candidates, trained):
        if found != own:
            what = f"has changed since this run began{packs.difference(found)}, which resumes on the images that it began with"
            _log.warning("%s: %s (%s)", source, what, found)
        return found, None
    divided = as_split and _is_ready(own) and Manifest.load(own).options["split_by"] == "folder"
    target = own if divided else packs.current(as_split)
    if _is_ready(target):
        _log.info("%s: is packed already, in %s", source, target)
        return target, None
    if is_inside(folder, root_of(source)) and not is_table(source):
        what = f"would hold the pack, but is inside the folder to pack ({root_of(source)})"
        beside = os.path.normpath(root_of(source) / os.pardir / "shards")
        remedy = f"choose a run's folder outside (--out), or pack first:\n  {packing({'out': beside}, source=source)}"
        raise FolderError(f"{folder}: {what}; {remedy}")
    for old in packs.older(as_split):
        what = f"has changed{packs.difference(old)}; remove its old pack if no run on it is to resume"
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


def _pack_once(packs: _Packs, folder: Path, as_split: _AsSplit) -> Path:
    """Pack into a folder, unless another process has done so, and return the folder.

    If `as_split` is given, but the source has splits of its own, packs it as it is into the folder for that.
    """
    source = packs.source
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
            with suppress(OSError):  # the list only explains later packs
                write(packs.files.listing, folder / FILES)
            return folder
        except OwnSplitError:
            pass
    return _pack_once(packs, packs.current(None), None)


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
        remedy = remedy_for(error, f"pack first, to another folder:\n  {packing({'out': 'shards'}, source=source)}")
        raise FolderError(f"{folder}: cannot be written ({error.strerror or error}); {remedy}") from None
