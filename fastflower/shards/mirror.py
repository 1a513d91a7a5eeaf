"""Shards that are not local: a mirror in a bounded cache, filled ahead of need.

A mirror is a folder like any that `pack` wrote, named by its manifest's hash, in which tars come and go. Every tar is checked
against the manifest's sha256 before it gets its name, so whoever finds it there can use it: processes share mirrors.
"""

import hashlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from fastflower.errors import ArgumentError, FastflowerError, HeldError, ShardError
from fastflower.files import locked, partial_name, refusal, write_atomically
from fastflower.shards.manifest import FILE, Manifest, Shard
from fastflower.shards.remote import AttemptError, Remote, RemoteFiles, longest_silence

_log = logging.getLogger("fastflower")

_T = TypeVar("_T")

_LOOK = 0.05  # seconds between looks at whether there is room
_THREADS = 4


class _Tar(NamedTuple):
    """A tar in the cache. Sorted, those that make room first come first."""

    worth: int
    used: float
    bytes: int
    path: Path


class Mirror:
    """The mirror of one Remote, which `connect` makes. Thread-safe; may be used by several processes at once."""

    def __init__(self, source: Remote, manifest: Manifest) -> None:
        self.manifest, self.folder = manifest, manifest.folder
        self._source = source
        self._cache = manifest.folder.parent
        self._shards = {shard.name: shard for split in manifest.splits.values() for shard in split.shards}
        self._ahead: list[str] = []  # the shards that are read next, in this order
        self._wanted: set[str] = set()  # those, and those of the call before
        self._begin_process()

    def _begin_process(self) -> None:
        """What each process has for itself: of a parent's, a forked child has no thread, and locks as they just were."""
        self._process = os.getpid()
        self._files = RemoteFiles(self._source)
        self._users = 0
        self._lock = threading.Lock()
        self._queue: deque[str] = deque()
        self._threads: set[threading.Thread] = set()

    @classmethod
    def connect(cls, source: Remote) -> "Mirror":
        """Download the manifest of a Remote, which says what its mirror is to hold.

        Raises ArgumentError when the address's file system is not installed, ShardError when what is there cannot be read.
        """
        files = RemoteFiles(source)
        text = files.read(FILE)
        folder = Path(source.folder).expanduser() / hashlib.sha256(text).hexdigest()[:16]
        manifest = _stored(folder / FILE, text, files.url, lambda: Manifest.load(folder))
        for name in (shard.name for split in manifest.splits.values() for shard in split.shards):
            if Path(name).name != name:
                raise ShardError(f"{files.url}/{FILE}: names a shard {name!r}, which is no file's name; pack again.")
        return cls(source, manifest)

    def open_split(self, split: str, window: int) -> None:
        """Download the split's index. Raises ArgumentError when the limit does not hold three windows of shards."""
        shards = self.manifest.split(split).shards
        path = self.folder / f"{split}.index.npy"
        try:
            here = path.exists() and len(self.manifest.index(split)) > 0
        except ShardError as error:
            _log.warning("%s; it is downloaded again", str(error).partition(";")[0])
            here = False
        if not here:
            _stored(path, self._files.read(path.name), self._files.url, lambda: self.manifest.index(split))
        limit = self._source.limit_bytes
        total = sum(shard.bytes for shard in shards)
        needed = min(total, 3 * window * max(shard.bytes for shard in shards))  # behind, here, ahead
        if needed > limit:
            rule = f"must hold three windows of shards, here {needed} bytes, got {limit}"
            raise ArgumentError(f"limit_bytes {rule}; raise it, or lower the loader's window ({window}).")
        bounds = f"{total / 1e9:.2f} GB in {len(shards)} shards, {limit / 1e9:.1f} GB of cache in {self._cache}"
        told = "a machine downloads each once an epoch, or once if all fit"
        _log.info("%s: split %r: %s; %s", self._files.url, split, bounds, told)

    def begin_use(self) -> None:
        """An iterator begins to use the mirror, until `ending_use`."""
        if self._process != os.getpid():
            self._begin_process()
        with self._lock:
            self._users += 1

    @contextmanager
    def ending_use(self) -> Generator[None]:
        """An iterator ends its use. Within, if it was the last, all downloads are stopped, also those that are waited for."""
        # A fork brought it along, and nothing of it runs here; or the interpreter ends, and threads stand still, locks in hand.
        if self._process != os.getpid() or sys.is_finalizing():
            yield
            return
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._files.stop()
        try:
            yield
            for thread in tuple(self._threads) if last else ():
                thread.join()
        finally:
            if last:
                self._queue.clear()
                self._ahead = []
                self._files = RemoteFiles(self._source)

    def prefetch(self, names: list[str]) -> set[str]:
        """Begin to download these shards, in this order. Returns the names that are kept, with those of the call before."""
        if names == self._ahead:
            return self._wanted
        self._wanted = {*names, *self._ahead}
        self._ahead = list(names)
        missing = [name for name in names if not self._mark_used(name)]
        with self._lock:
            self._queue = deque(missing)
            while len(self._threads) < min(_THREADS, len(missing)):
                # Daemons: the interpreter does not wait for them when it ends.
                thread = threading.Thread(target=self._download_queue, name="fastflower-download", daemon=True)
                self._threads.add(thread)
                thread.start()
        return self._wanted

    def _mark_used(self, name: str) -> bool:
        """Whether a shard is here. What was used last is kept, by other processes too."""
        path = self.folder / name
        with suppress(OSError):  # another user's, which counts as used when he used it; or it is not here
            os.utime(path)
        return path.exists()

    def _download_queue(self) -> None:
        while True:
            with self._lock:
                if self._files.stopped() or not self._queue:
                    self._threads.discard(threading.current_thread())
                    return
                name = self._queue.popleft()
            with suppress(Exception):  # whoever needs the shard tries again, and says why not
                self._download(name)

    def path(self, name: str) -> Path:
        """The local file of a shard, which is waited for. Raises ShardError when it cannot be had."""
        path = self.folder / name
        try:
            if not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)  # someone may have cleared the cache
                self._download(name, demanded=True)
        except OSError as error:
            raise _unwritable(path, error) from None
        return path

    def _download(self, name: str, *, demanded: bool = False) -> None:
        """Download a shard that is not here: of all threads and processes that want it, one does.

        demanded  somebody waits for it; else it is left out where it would need the room of what is wanted sooner.
        """
        shard, path = self._shards[name], self.folder / name
        with locked(path.with_name(f"{name}.lock"), self._files.stopped) as alone:
            if path.exists():
                return
            for left in self.folder.glob(f"{name}*.part") if alone else ():  # by a process that was killed
                left.unlink(missing_ok=True)
            part = partial_name(path)
            try:
                while not self._make_room(part, shard, demanded=demanded):
                    if not demanded:
                        return
                    if self._files.stopped():
                        raise CancelledError
                    time.sleep(_LOOK)
                self._files.in_attempts(name, lambda: self._fill(part, shard))
                # Locked, or whoever counts would meet it under neither name.
                with locked(self._cache / "room.lock", self._files.stopped):
                    part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def _fill(self, part: Path, shard: Shard) -> None:
        """Download all of a shard into a file. Raises AttemptError when it is not the one that was packed."""
        digest = hashlib.sha256()
        with part.open("r+b") as file:
            for piece in self._files.pieces(shard.name, shard.bytes):
                file.write(piece)
                digest.update(piece)
            os.fsync(file.fileno())
        if digest.hexdigest() != shard.sha256:
            raise AttemptError("its bytes are not those that the manifest names (checksum mismatch)")

    def _make_room(self, part: Path, shard: Shard, *, demanded: bool) -> bool:
        """Reserve a shard's bytes for its part, within the limit: the tars in the cache that are worth least make room.

        Returns False, with nothing done, where others that are being downloaded take the room, or, of a shard that is not
        demanded, where a tar that comes sooner would have to go.
        """
        with locked(self._cache / "room.lock", self._files.stopped):
            tars, downloading = self._tars()
            excess = shard.bytes + sum(tar.bytes for tar in tars) + downloading - self._source.limit_bytes
            kept_from = max(2, self._worth(self.folder / shard.name))
            leaving: list[Path] = []
            for tar in sorted(tars):
                if excess <= 0:
                    break
                if tar.worth >= kept_from and not demanded:
                    return False
                leaving.append(tar.path)
                excess -= tar.bytes
            if excess > 0 and downloading:
                return False
            for path in leaving:
                path.unlink(missing_ok=True)  # whoever has it open keeps it until he lets go
            part.write_bytes(b"")
            os.truncate(part, shard.bytes)
            return True

    def _tars(self) -> tuple[list[_Tar], int]:
        """The tars in the cache, of all mirrors, and the bytes of those that are being downloaded."""
        tars: list[_Tar] = []
        downloading = 0
        for path in (*self._cache.glob("*/*.tar"), *self._cache.glob("*/*.tar*.part")):
            with suppress(FileNotFoundError):  # it goes meanwhile
                status = path.stat()
                if path.suffix == ".tar":
                    tars.append(_Tar(self._worth(path), status.st_mtime, status.st_size, path))
                elif _abandoned(path):
                    path.unlink()
                else:
                    downloading += status.st_size
        return tars, downloading

    def _worth(self, path: Path) -> int:
        """0 for tars that are not wanted, 1 for those of the window behind, then the more the sooner they are read."""
        ahead = self._ahead  # which the thread that asks for batches replaces
        if path.parent != self.folder or path.name not in self._wanted:
            return 0
        return 1 + (len(ahead) - ahead.index(path.name) if path.name in ahead else 0)


def _stored(path: Path, data: bytes, url: str, load: Callable[[], _T]) -> _T:
    """Write a file of a mirror, unless it is there with this content; what it holds. Where it cannot be loaded, it goes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != data:
            write_atomically(path, data)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        return load()
    except ShardError as error:
        path.unlink()
        raise ShardError(str(error).replace(str(path.parent), url)) from None


def _unwritable(path: Path, error: OSError) -> FastflowerError:
    remedy = "make room, or name another folder with Remote(folder=)"
    return refusal(error, path) or ShardError(f"{path}: cannot be written ({error.strerror}); {remedy}.")


def _abandoned(part: Path) -> bool:
    """Whether no process is downloading into a part any more; where there are no locks, whether nothing came for too long."""
    try:
        with locked(part.with_name(f"{part.name.partition('.tar')[0]}.tar.lock")) as exists:
            return exists or time.time() - part.stat().st_mtime > longest_silence()
    except HeldError:
        return False
