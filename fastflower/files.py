"""Files that several processes may write or want: written whole or not at all, locks that die with their process.

A lock is the kernel's (flock), so that whoever is killed leaves none behind. A child that is forked holds none of its parent's.
"""

import errno
import fcntl
import logging
import os
import resource
import secrets
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from pathlib import Path

from fastflower.errors import ArgumentError, HeldError, ResourceError

_log = logging.getLogger("fastflower")

_LOOK = 0.05  # seconds between looks at a lock that another process holds
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # of flock, on a file system without locks
PARTIAL = f"*.{'[0-9a-f]' * 8}.part"
"""Matches what `partial_name` gives."""


def partial_name(path: Path) -> Path:
    """Beside `path`, a name that nobody else has, for what is to become that file."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


@contextmanager
def written(path: Path) -> Generator[Path]:
    """A file to make and to sync in place of `path`: it gets that name at the end, and is removed after an error.

    Several processes may write the same file: the last one's stays.
    """
    part = partial_name(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def write_atomically(path: Path, *pieces: bytes | bytearray | memoryview) -> None:
    """Write a file so that it is seen whole or not at all, also after a power cut."""
    with written(path) as part, part.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def write_out(out: Path, data: bytes) -> None:
    """As `write_atomically`, a file that the caller named. Raises ArgumentError where it cannot be, or ResourceError."""
    try:
        write_atomically(out, data)
    except OSError as error:
        blame_the_system(error, out)
        what = f"{out} cannot be written ({error.strerror})"
        raise ArgumentError(f"out: {what}; name a file in a folder that is there.") from None


def sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refusal(error: object, path: object) -> ResourceError | None:
    """What to say where a file was refused for lack of files or memory, which says nothing about the file."""
    number = error.errno if isinstance(error, OSError) else None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    remedy = {
        errno.EMFILE: f"this process has reached its limit of {limit} open files; raise it (ulimit -n {max(4096, 2 * limit)})",
        errno.ENFILE: "the system has as many files open as it may; close programs, or allow more (sysctl fs.file-max)",
        errno.ENOMEM: "memory ran out; close programs, or use fewer workers",
    }.get(number or 0)
    return ResourceError(f"{path}: cannot be opened or read: {remedy}, and run again.") if remedy else None


def blame_the_system(error: object, path: object) -> None:
    """Raise that, if it is so."""
    if refused := refusal(error, path):
        raise refused from None


@contextmanager
def locked(path: Path, given_up: Callable[[], bool] | None = None) -> Generator[bool]:
    """Hold the lock of a file, which is made where it is missing, with its folder, until the end or the process's end.

    given_up  asked again and again while another holds the lock: CancelledError when it says so. None: nobody waits, and
    HeldError says who holds it.

    Yields True; False, after one warning, where the file system has no locks, and everything goes on without.
    """
    lock = _Lock(path)
    try:
        while not lock.acquire():
            if given_up is None:
                raise HeldError(lock.read_holder())
            if given_up():
                raise CancelledError
            time.sleep(_LOOK)
        if given_up is None:
            lock.write_holder()
        yield lock.exists
    finally:
        lock.release()


class _Lock:
    """An open file that stands for a lock."""

    def __init__(self, path: Path) -> None:
        self.exists = True
        self._path, self._number, self._signed = path, -1, False

    def acquire(self) -> bool:
        """Take the lock, unless another holds it; whether it now is ours. Raises OSError."""
        while True:
            try:
                if self._number < 0:
                    self._open()
                fcntl.flock(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(self._number), self._path.stat()):
                    return True
            except BlockingIOError:
                return False
            except FileNotFoundError:  # whoever held it removed it, or the folder as well
                pass
            except OSError as error:
                if error.errno not in _NO_LOCKS or self._number < 0:
                    raise
                self._go_on_without(error)
                return True
            self.release()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _forking:
            self._number = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _open_locks.add(self)

    def _go_on_without(self, error: OSError) -> None:
        """Say once of a file system that it has no locks."""
        self.exists = False
        device = os.fstat(self._number).st_dev
        if device not in _lockless_devices:
            _lockless_devices.add(device)
            what = "its file system has no locks, so nothing keeps a second process from writing here"
            _log.warning("%s: %s: start one at a time (%s)", self._path.parent, what, error.strerror)

    def write_holder(self) -> None:
        self._signed = True
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        with suppress(OSError):  # a full disk
            os.ftruncate(self._number, 0)
            os.pwrite(self._number, f"process {os.getpid()} on {os.uname().nodename}, since {since}".encode(), 0)

    def read_holder(self) -> str:
        return os.pread(self._number, 200, 0).decode(errors="replace") or "another process"

    def release(self) -> None:
        """Give the lock back; does nothing in a child that was forked meanwhile."""
        with _forking:
            if self._number >= 0:
                with suppress(OSError):  # closing is not enough where a child that C code forked shares the open file
                    if self._signed:
                        os.ftruncate(self._number, 0)
                    fcntl.flock(self._number, fcntl.LOCK_UN)
                self.close_file()

    def close_file(self) -> None:
        """Close the file; the lock goes with it, unless another process shares the open file."""
        _open_locks.discard(self)
        os.close(self._number)
        self._number = -1


_open_locks: set[_Lock] = set()
_lockless_devices: set[int] = set()  # those that were warned of
_forking = threading.Lock()  # held while `_open_locks` changes, and during a fork


def _close_inherited() -> None:
    """In a child that was forked: close what it shares with its parent, who goes on holding it."""
    for lock in list(_open_locks):
        lock.close_file()
    _forking.release()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_close_inherited)
