"""Caches remote shards in a local folder of limited size, and prefetches them.

Each pack has its own cache folder, named after the hash of its manifest. Files have the names that `pack` gave them.
A tar gets its final name only after its SHA-256 matches the manifest, so any process that finds it can use it.
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
from fastflower.files import flush, locked, partial_name, refusal, remedy_for, write_atomically
from fastflower.shards.folds import FoldView
from fastflower.shards.manifest import FILE, FOLDS, Manifest, Shard
from fastflower.shards.remote import CHOOSE_CACHE, AttemptError, Remote, RemoteFiles, expanded, longest_silence

_log = logging.getLogger("fastflower")

_T = TypeVar("_T")

_POLL = 0.05  # seconds between checks for free space
_THREADS = 4


class _Tar(NamedTuple):
    """A tar in the cache. Tars sort in the order of eviction."""

    priority: int
    used: float
    bytes: int
    path: Path


class Mirror:
    """The local cache of one Remote; create it with `connect`. Safe to use from multiple threads and processes."""

    def __init__(self, source: Remote, manifest: Manifest) -> None:
        self.manifest, self.folder = manifest, manifest.folder
        self._source = source
        self._cache = manifest.folder.parent
        self._shards = {shard.name: shard for split in manifest.splits.values() for shard in split.shards}
        self._ahead: list[str] = []  # shards to read next, in order
        self._wanted: set[str] = set()  # shards of the last two `prefetch` calls
        self._begin_process()

    def _begin_process(self) -> None:
        """Set up the state of this process. A forked child has no download threads, and its copy of the lock may be held."""
        self._process = os.getpid()
        self._files = RemoteFiles(self._source)
        self._users = 0
        self._lock = threading.Lock()
        self._queue: deque[str] = deque()
        self._threads: set[threading.Thread] = set()

    @classmethod
    def connect(cls, source: Remote) -> "Mirror":
        """Download the manifest of a Remote and open its local cache.

        Raises ArgumentError if the URL's file system is not installed, or ShardError if the manifest cannot be read.
        """
        files = RemoteFiles(source)
        text = files.read(FILE)
        folder = expanded(Path(source.folder)) / hashlib.sha256(text).hexdigest()[:16]
        manifest = _store(folder / FILE, text, files.url, lambda: Manifest.load(folder))
        for name in (shard.name for split in manifest.splits.values() for shard in split.shards):
            if Path(name).name != name:
                what = f"lists shard {name!r}, which is not a file name; run fastflower pack again."
                raise ShardError(f"{files.url}/{FILE}: {what}")
        return cls(source, manifest)

    def open_split(self, split: str, window: int, fold: int | None = None) -> None:
        """Download a split's index. Raises ArgumentError if the cache cannot hold three windows of shards.

        fold  If given, the split is the part of the train split that FoldView describes.
        """
        manifest, stored = self.manifest, split if fold is None else "train"
        manifest.split(stored)
        self._fetch(f"{stored}.index.npy", lambda: manifest.index(stored))
        if fold is not None:
            self._fetch(FOLDS, manifest.fold_numbers)
            manifest = FoldView.of(manifest, fold)
        shards = manifest.split(split).shards
        limit = self._source.limit_bytes
        total = sum(shard.bytes for shard in shards)
        needed = min(total, 3 * window * max(shard.bytes for shard in shards))  # previous, current and next window
        if needed > limit:
            rule = f"must be at least {needed} to hold three windows of shards, got {limit}"
            raise ArgumentError(f"limit_bytes {rule}; raise it, or lower the loader's window ({window}).")
        sizes = f"{total / 1e9:.2f} GB in {len(shards)} shards, cache of {limit / 1e9:.1f} GB in {self._cache}"
        often = "each machine downloads every shard once per epoch, or once in total if all fit in the cache"
        _log.info("%s: split %r: %s; %s", self._files.url, split, sizes, often)

    def _fetch(self, name: str, load: Callable[[], object]) -> None:
        """Download a file unless it is cached and can be loaded. Raises ShardError if it still cannot be loaded."""
        path = self.folder / name
        try:
            if path.exists():
                load()
                return
        except ShardError as error:
            _log.warning("%s; downloading it again", str(error).partition(";")[0])
        _store(path, self._files.read(name), self._files.url, load)

    def begin_use(self) -> None:
        """Register an iterator as a user of the cache. `ending_use` unregisters it."""
        if self._process != os.getpid():
            self._begin_process()
        with self._lock:
            self._users += 1

    @contextmanager
    def ending_use(self) -> Generator[None]:
        """Unregister an iterator. For the last one, cancel all downloads on entry, and wait for their threads on exit."""
        # A forked child has nothing to release; at interpreter shutdown, threads are frozen and may hold locks.
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
        """Start downloading shards in this order. Returns the names to keep: these and those of the previous call."""
        if names == self._ahead:
            return self._wanted
        self._wanted = {*names, *self._ahead}
        self._ahead = list(names)
        missing = [name for name in names if not self._mark_used(name)]
        with self._lock:
            self._queue = deque(missing)
            while len(self._threads) < min(_THREADS, len(missing)):
                # Daemon threads, so that the interpreter does not wait for them at exit.
                thread = threading.Thread(target=self._download_queue, name="fastflower-download", daemon=True)
                self._threads.add(thread)
                thread.start()
        return self._wanted

    def _mark_used(self, name: str) -> bool:
        """Return whether a shard is cached. Update its modification time so that all processes evict other shards first."""
        path = self.folder / name
        with suppress(OSError):  # the file belongs to another user or is not cached
            os.utime(path)
        return path.exists()

    def _download_queue(self) -> None:
        while True:
            with self._lock:
                if self._files.stopped() or not self._queue:
                    self._threads.discard(threading.current_thread())
                    return
                name = self._queue.popleft()
            with suppress(Exception):  # `path` tries again and raises the error
                self._download(name)

    def path(self, name: str) -> Path:
        """Return the local file of a shard, downloading it first if needed. Raises ShardError if the download fails."""
        path = self.folder / name
        try:
            if not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)  # the cache may have been deleted
                self._download(name, demanded=True)
        except OSError as error:
            raise _unwritable(path, error) from None
        return path

    def _download(self, name: str, *, demanded: bool = False) -> None:
        """Download a shard unless it is cached. While one thread of any process downloads a shard, the others wait for it.

        demanded  Whether a caller waits for the shard. If not, the download must not evict shards that are needed sooner.
        """
        shard, path = self._shards[name], self.folder / name
        with locked(path.with_name(f"{name}.lock"), self._files.stopped) as alone:
            if path.exists():
                return
            for left in self.folder.glob(f"{name}*.part") if alone else ():  # left by a killed process
                left.unlink(missing_ok=True)
            part = partial_name(path)
            try:
                while not self._make_room(part, shard, demanded=demanded):
                    if not demanded:
                        return
                    if self._files.stopped():
                        raise CancelledError
                    time.sleep(_POLL)
                self._files.in_attempts(name, lambda: self._fill(part, shard))
                # Rename under the lock, so that other processes count the file exactly once when they add up sizes.
                with locked(self._cache / "room.lock", self._files.stopped):
                    part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def _fill(self, part: Path, shard: Shard) -> None:
        """Download an entire shard into a file. Raises AttemptError if its checksum does not match the manifest."""
        digest = hashlib.sha256()
        with part.open("r+b") as file:
            for piece in self._files.pieces(shard.name, shard.bytes):
                file.write(piece)
                digest.update(piece)
            flush(file)
        if digest.hexdigest() != shard.sha256:
            raise AttemptError("its bytes do not match the manifest (checksum mismatch)")

    def _make_room(self, part: Path, shard: Shard, *, demanded: bool) -> bool:
        """Create the partial file of a shard at full size. Evict the tars with the lowest priority to stay within the limit.

        Does nothing and returns False if other downloads occupy the space, or if a prefetch would evict a shard that is
        needed sooner.
        """
        with locked(self._cache / "room.lock", self._files.stopped):
            tars, downloading = self._tars()
            excess = shard.bytes + sum(tar.bytes for tar in tars) + downloading - self._source.limit_bytes
            protected_from = max(2, self._priority(self.folder / shard.name))
            evicted: list[Path] = []
            for tar in sorted(tars):
                if excess <= 0:
                    break
                if tar.priority >= protected_from and not demanded:
                    return False
                evicted.append(tar.path)
                excess -= tar.bytes
            if excess > 0 and downloading:
                return False
            for path in evicted:
                path.unlink(missing_ok=True)  # a process that has the file open can still read it
            part.write_bytes(b"")
            os.truncate(part, shard.bytes)
            return True

    def _tars(self) -> tuple[list[_Tar], int]:
        """Return the tars of all packs in the cache, and the total size of unfinished downloads in bytes."""
        tars: list[_Tar] = []
        downloading = 0
        for path in (*self._cache.glob("*/*.tar"), *self._cache.glob("*/*.tar*.part")):
            with suppress(FileNotFoundError):  # another process removed the file
                status = path.stat()
                if path.suffix == ".tar":
                    tars.append(_Tar(self._priority(path), status.st_mtime, status.st_size, path))
                elif _abandoned(path):
                    path.unlink()
                else:
                    downloading += status.st_size
        return tars, downloading

    def _priority(self, path: Path) -> int:
        """Return a tar's priority: 0 if it is not needed, 1 if only the previous window needs it.

        Otherwise it is a number above 1, which is larger the sooner the tar is needed.
        """
        ahead = self._ahead  # read only once, because another thread may replace the list
        if path.parent != self.folder or path.name not in self._wanted:
            return 0
        return 1 + (len(ahead) - ahead.index(path.name) if path.name in ahead else 0)


def _store(path: Path, data: bytes, url: str, load: Callable[[], _T]) -> _T:
    """Write a cache file unless it already has this content, then load it. Delete it if it cannot be loaded."""
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
    remedy = remedy_for(error, CHOOSE_CACHE)
    return refusal(error, path) or ShardError(f"{path}: cannot be written ({error.strerror}); {remedy}.")


def _abandoned(part: Path) -> bool:
    """Return True if no process is writing to a partial file any more. Without locks, judge by its last write time."""
    try:
        with locked(part.with_name(f"{part.name.partition('.tar')[0]}.tar.lock")) as exists:
            return exists or time.time() - part.stat().st_mtime > longest_silence()
    except HeldError:
        return False
