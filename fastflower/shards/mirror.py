"""Shards that are not local: a mirror in a bounded cache, filled ahead of need through fsspec.

A mirror is a folder like any that `pack` wrote, named by its manifest's hash, in which tars come and go. Every tar is checked
against the manifest's sha256 before it gets its name, so whoever finds it there can use it: processes share mirrors.
"""

import asyncio
import hashlib
import logging
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

from fastflower.errors import ArgumentError, FastflowerError, HeldError, ShardError
from fastflower.files import blame_the_system, locked, partial_name, refusal, write_atomically
from fastflower.shards.manifest import FILE, Manifest
from fastflower.shards.remote import Remote, file_system

_log = logging.getLogger("fastflower")

_T = TypeVar("_T")

_PIECE = 4 << 20  # bytes asked for at a time: each is tried again alone
_TIMEOUT = 60.0  # seconds for a piece
_LOOK = 0.05  # seconds between looks at whether anybody still waits
_ATTEMPTS = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 20.0  # seconds between attempts, doubled each time
_THREADS = 4


class Mirror:
    """The mirror of one Remote. Thread-safe; may be used by several processes at once.

    Raises ArgumentError when the address's file system is not installed, ShardError when what is there cannot be read.
    """

    def __init__(self, source: Remote) -> None:
        self.source = source
        self._url = source.url.rstrip("/")
        self._cache = Path(source.folder).expanduser()
        self._threads: set[threading.Thread] = set()
        self._queue: deque[str] = deque()
        self._reading: set[Future[bytes]] = set()
        self._users = 0
        self._process = os.getpid()
        self._ahead: list[str] = []
        self._wanted: set[str] = set()
        self._stopping = False
        self._lock = threading.Lock()
        text = self._small(FILE)
        self.folder = self._cache / hashlib.sha256(text).hexdigest()[:16]
        self._have(FILE, text)
        self.manifest = self._checked(FILE, lambda: Manifest.load(self.folder))
        self._shards = {shard.name: shard for split in self.manifest.splits.values() for shard in split.shards}
        for name in self._shards:
            if Path(name).name != name:
                raise ShardError(f"{self._url}/{FILE}: names a shard {name!r}, which is no file's name; pack again.")

    def open(self, split: str, window: int) -> None:
        """Have the split's index here. Raises ArgumentError when the limit does not hold three windows of shards."""
        shards = self.manifest.split(split).shards
        name = f"{split}.index.npy"
        if not self._intact(split):
            self._have(name, self._small(name))
            self._checked(name, lambda: self.manifest.index(split))
        total = sum(shard.bytes for shard in shards)
        needed = min(total, 3 * window * max(shard.bytes for shard in shards))  # behind, here, ahead
        if needed > self.source.limit_bytes:
            raise ArgumentError(
                f"limit_bytes must hold three windows of shards, here {needed} bytes, got {self.source.limit_bytes}; "
                f"raise it, or lower the loader's window ({window})."
            )
        bounds = f"{total / 1e9:.2f} GB in {len(shards)} shards, {self.source.limit_bytes / 1e9:.1f} GB of cache in {self._cache}"
        _log.info(
            "%s: split %r: %s; a machine downloads each once an epoch, or once if all fit", self._url, split, bounds
        )

    def _intact(self, split: str) -> bool:
        """Whether the split's index is here, and as it was packed."""
        try:
            return (self.folder / f"{split}.index.npy").exists() and len(self.manifest.index(split)) > 0
        except ShardError as error:
            _log.warning("%s; it is downloaded again", str(error).partition(";")[0])
            return False

    def _have(self, name: str, data: bytes) -> None:
        """Have a file here, with this content."""
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_bytes() != data:
                write_atomically(path, data)
        except OSError as error:
            raise _unwritable(path, error) from None

    def _checked(self, name: str, load: Callable[[], _T]) -> _T:
        """What a file holds. Where it cannot be loaded, it does not stay."""
        try:
            return load()
        except ShardError as error:
            (self.folder / name).unlink()
            raise ShardError(str(error).replace(str(self.folder), self._url)) from None

    def begin(self) -> None:
        """An iterator begins to use the mirror; ends with `ending`."""
        if self._process != os.getpid():  # forked: threads, and whoever held the lock, stayed behind
            self._process, self._lock, self._threads, self._users = os.getpid(), threading.Lock(), set(), 0
            self._reading.clear()
            self._queue.clear()
        with self._lock:
            self._users += 1

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Of the last iterator in use: all downloads end, also those that are waited for."""
        # A fork brought it along, and nothing of it runs here; or the interpreter ends, and threads stand still, locks in hand.
        if self._process != os.getpid() or sys.is_finalizing():
            yield
            return
        with self._lock:
            self._users -= 1
            self._stopping = self._users == 0
            for future in self._reading if self._stopping else ():
                future.cancel()
        try:
            yield
            while self._stopping and (threads := list(self._threads)):
                threads[0].join()
        finally:
            if self._stopping:
                self._queue.clear()
                self._ahead, self._stopping = [], False

    def prefetch(self, names: Sequence[str]) -> set[str]:
        """Begin to download these shards, in this order. Returns the names that are kept, with those of the call before."""
        if names == self._ahead:
            return self._wanted
        self._wanted = {*names, *self._ahead}
        self._ahead = list(names)
        missing: list[str] = []
        for name in names:
            try:
                os.utime(self.folder / name)  # what was used last is kept, by other processes too
            except FileNotFoundError:
                missing.append(name)
            except OSError:  # another user's: it counts as used when he used it
                continue
        with self._lock:
            self._queue = deque(missing)
            while len(self._threads) < min(_THREADS, len(missing)):
                # Daemons: the interpreter does not wait for them when it ends.
                thread = threading.Thread(target=self._work, name="fastflower-download", daemon=True)
                self._threads.add(thread)
                thread.start()
        return self._wanted

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._stopping or not self._queue:
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
        """Have a shard here: of all threads and processes that want it, one downloads it. demanded  it is waited for."""
        shard, path = self._shards[name], self.folder / name
        with locked(path.with_name(f"{name}.lock"), self._ending) as alone:
            if path.exists():
                return
            for left in self.folder.glob(f"{name}*.part") if alone else ():  # by a process that was killed
                left.unlink(missing_ok=True)
            part = partial_name(path)
            try:
                while not self._make_room(path, part, shard.bytes, demanded=demanded):
                    if not demanded:
                        return
                    if self._ending():
                        raise CancelledError
                    time.sleep(_LOOK)
                for attempt in count():
                    digest = hashlib.sha256()
                    with part.open("r+b") as file:
                        for piece in self._pieces(name, shard.bytes):
                            file.write(piece)
                            digest.update(piece)
                        os.fsync(file.fileno())
                    if digest.hexdigest() == shard.sha256:
                        # Whoever counts meanwhile would meet it under neither name.
                        with locked(self._cache / "room.lock", self._ending):
                            part.replace(path)
                        return
                    self._pause(name, attempt, "its bytes are not those that the manifest names (checksum mismatch)")
            finally:
                part.unlink(missing_ok=True)

    def _make_room(self, target: Path, part: Path, size: int, *, demanded: bool) -> bool:
        """Make a file of `size`, a part of `target`, within the limit with the tars there, of which the least worth go.

        Returns False, with nothing made, when only shards that come sooner could go and this one is not waited for, or when
        others that are being downloaded take the room.
        """
        least = self._worth(target)
        with locked(self._cache / "room.lock", self._ending):
            found: list[tuple[int, float, int, Path]] = []
            held, busy = size, False
            for path in (*self._cache.glob("*/*.tar"), *self._cache.glob("*/*.tar*.part")):
                with suppress(FileNotFoundError):
                    if path.suffix == ".part" and path != part and _abandoned(path):
                        path.unlink()
                        continue
                    status = path.stat()
                    held += status.st_size if path != part else 0
                    busy |= path.suffix == ".part" and path != part
                    if path.suffix == ".tar":
                        found.append((self._worth(path), status.st_mtime, status.st_size, path))
            for worth, _, freed, path in sorted(found):
                if held <= self.source.limit_bytes:
                    break
                if worth >= max(2, least) and not demanded:
                    return False
                path.unlink(missing_ok=True)  # whoever has it open keeps it until he lets go
                held -= freed
            if held > self.source.limit_bytes and busy:
                return False
            part.write_bytes(b"")
            os.truncate(part, size)
            return True

    def _worth(self, path: Path) -> int:
        """0 for tars that are not wanted, 1 for those of the window behind, then the more the sooner they are read."""
        ahead = self._ahead  # which the thread that asks for batches replaces
        if path.parent != self.folder or path.name not in self._wanted:
            return 0
        return 1 + (len(ahead) - ahead.index(path.name) if path.name in ahead else 0)

    def _pieces(self, name: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, _PIECE):
            yield self._tried(name, start, min(start + _PIECE, size), size)

    def _small(self, name: str) -> bytes:
        """The whole of a file of which only the name is known."""
        return self._tried(name, None, None, None)

    def _tried(self, name: str, start: int | None, end: int | None, size: int | None) -> bytes:
        """Bytes start .. end of a file, tried again until they are there. Raises ShardError when that does not help."""
        for attempt in range(_ATTEMPTS):
            try:
                data = self._read(name, start, end)
            except FastflowerError:
                raise
            except FileNotFoundError:
                raise ShardError(f"{self._url}/{name}: is not there; name the folder that pack wrote.") from None
            except PermissionError as error:
                raise ShardError(f"{self._url}/{name}: may not be read ({error}); check the credentials.") from None
            except Exception as error:  # whatever the file system's client raises
                if attempt + 1 == _ATTEMPTS:
                    blame_the_system(error, f"{self._url}/{name}")
                reason = str(error) or type(error).__name__
            else:
                if start is None or end is None or len(data) == end - start:
                    return data
                if len(data) == size:  # a server that knows no ranges
                    return data[start:end]
                reason = f"{len(data)} bytes came instead of {end - start}"
            self._pause(name, attempt, reason)
        raise AssertionError("the last pause raises")

    def _read(self, name: str, start: int | None, end: int | None) -> bytes:
        system, root = file_system(self._url, self.source.options)  # each time: fsspec keeps one a process
        if not system.async_impl:
            return system.cat_file(f"{root}/{name}", start=start, end=end)
        patience = _TIMEOUT if end is not None else 10 * _TIMEOUT  # a whole file
        future = asyncio.run_coroutine_threadsafe(system._cat_file(f"{root}/{name}", start=start, end=end), system.loop)
        with self._lock:
            self._reading.add(future)
        try:
            deadline = time.monotonic() + patience
            while True:
                if self._ending():
                    raise CancelledError
                with suppress(TimeoutError):
                    return future.result(min(_LOOK, max(0.0, deadline - time.monotonic())))
                if future.done():  # the client has timeouts of its own
                    return future.result()
                if time.monotonic() >= deadline:
                    raise OSError(f"not all came within {patience:.0f} seconds")
        finally:
            future.cancel()
            with self._lock:
                self._reading.discard(future)

    def _ending(self) -> bool:
        """Whether nobody waits for downloads any more: the last iterator, or the interpreter, ends."""
        return self._stopping or getattr(threading, "_SHUTTING_DOWN", False)

    def _pause(self, name: str, attempt: int, reason: str) -> None:
        """Wait before the next attempt, twice as long each time. Raises ShardError after the last."""
        if self._ending():
            raise CancelledError
        if attempt + 1 == _ATTEMPTS:
            raise ShardError(
                f"{self._url}/{name}: could not be read in {_ATTEMPTS} attempts ({reason}); "
                f"check the connection and the server, then run again: what is here already is kept."
            )
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1.0)
        _log.warning("%s/%s: %s; trying again in %.1f s", self._url, name, reason, pause)
        end = time.monotonic() + pause
        while time.monotonic() < end and not self._ending():
            time.sleep(min(_LOOK, pause))


def _unwritable(path: Path, error: OSError) -> FastflowerError:
    if refused := refusal(error, path):
        return refused
    return ShardError(
        f"{path}: cannot be written ({error.strerror}); make room, or name another folder with Remote(folder=)."
    )


def _abandoned(part: Path) -> bool:
    """Whether no process is downloading into a part any more; where there are no locks, whether nothing came for too long."""
    try:
        with locked(part.with_name(f"{part.name.partition('.tar')[0]}.tar.lock")) as exists:
            return exists or time.time() - part.stat().st_mtime > _ATTEMPTS * (_TIMEOUT + _LONGEST_PAUSE)
    except HeldError:
        return False
