"""Atomic writes and file locks, for files that multiple processes share.

The kernel holds the locks (flock), so a killed process leaves none behind. A forked child does not inherit locks.
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
from typing import TYPE_CHECKING, Any, BinaryIO

from fastflower.errors import ArgumentError, HeldError, ResourceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_log = logging.getLogger("fastflower")

_POLL_SECONDS = 0.05  # between attempts to take a lock that another process holds
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # from flock on a file system without locks
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # from fsync on FUSE, SMB or 9p
_NO_MMAP = {errno.ENODEV, errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EACCES}  # from mmap on FUSE, SMB or 9p
PARTIAL = f"*.{'[0-9a-f]' * 8}.part"
"""Glob pattern that matches the names from `partial_name`."""


def partial_name(path: Path) -> Path:
    """Return a unique temporary path next to `path`. Write to it, then rename it to `path`."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


@contextmanager
def written(path: Path) -> Generator[Path]:
    """Yield a temporary path to write and sync. Rename it to `path` at the end, or remove it after an error.

    Multiple processes may write the same file: the last one wins.
    """
    part = partial_name(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def unused(folder: Path) -> Path:
    """Return the first of FOLDER-2, FOLDER-3, ... that does not exist."""
    tries = (folder.with_name(f"{folder.name}-{number}") for number in range(2, 10**6))
    return next(path for path in tries if not path.exists())


def write_atomically(path: Path, *pieces: bytes | bytearray | memoryview) -> None:
    """Write a file atomically: even after a power failure, it is either complete or unchanged."""
    with written(path) as part, part.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        flush(file)


def write_out(out: Path, data: bytes) -> None:
    """Write a file atomically to the path that a caller passed as `out`.

    Raises ArgumentError if it cannot be written, or ResourceError if the system is out of file descriptors or memory.
    """
    try:
        write_atomically(out, data)
    except OSError as error:
        blame_the_system(error, out)
        remedy = remedy_for(error, "choose a file in an existing, writable folder (--out)")
        raise ArgumentError(f"out: {out} cannot be written ({error.strerror}); {remedy}.") from None


def is_full(error: object) -> bool:
    """Return whether `error` means that the disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def remedy_for(error: object, elsewhere: str) -> str:
    """Return the remedy for a file that cannot be written: `elsewhere`, or to free up space if that helps."""
    return f"free up space, or {elsewhere}" if is_full(error) else elsewhere


def flush(file: BinaryIO) -> None:
    """Flush a file to disk."""
    file.flush()
    _fsync(file.fileno(), Path(file.name).parent)


def load_array(path: Path) -> "NDArray[Any]":
    """Memory-map an array in a .npy file. Read it instead if the file system does not support memory mapping."""
    import numpy as np  # importing this file must be fast

    try:
        return np.load(path, mmap_mode="r")
    except OSError as error:
        if error.errno not in _NO_MMAP:
            raise
        return np.load(path)


def sync(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fsync(handle, folder)
    finally:
        os.close(handle)


def _fsync(number: int, folder: Path) -> None:
    """Call fsync. On a file system that does not support it, warn and continue."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        what = "its file system cannot flush everything to disk, so a power failure may damage what was just written"
        _warn_once(number, folder, what, error)


def _warn_once(number: int, folder: Path, what: str, error: OSError) -> None:
    """Warn about what the file system of an open file lacks, once per file system."""
    lack = os.fstat(number).st_dev, what
    if lack not in _lacks:
        _lacks.add(lack)
        _log.warning("%s: %s (%s)", folder, what, error.strerror)


def refusal(error: object, path: object) -> ResourceError | None:
    """Return a ResourceError if `error` means that the system is out of file descriptors or memory, else None."""
    number = error.errno if isinstance(error, OSError) else None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    wanted = max(4096, 2 * limit)
    remedy = {
        errno.EMFILE: f"this process has reached its limit of {limit} open files; raise the limit (ulimit -n {wanted})",
        errno.ENFILE: "the system has reached its limit of open files; close programs or raise the limit "
        "(sysctl fs.file-max)",
        errno.ENOMEM: "out of memory; close programs or use fewer workers",
    }.get(number or 0)
    return ResourceError(f"{path}: cannot be opened or read: {remedy}, and run again.") if remedy else None


def blame_the_system(error: object, path: object) -> None:
    """Raise the ResourceError that `refusal` returns, if any."""
    if refused := refusal(error, path):
        raise refused from None


@contextmanager
def locked(path: Path, given_up: Callable[[], bool] | None = None) -> Generator[bool]:
    """Hold the lock on a file until the block or the process ends. Creates the file and its folder if missing.

    given_up  Function to poll while another process holds the lock. If it returns True, raises CancelledError.
    None: raises HeldError, which names the holder, without waiting.

    Yields True, or False (after one warning) if the file system does not support locks.
    """
    lock = _Lock(path)
    try:
        while not lock.acquire():
            if given_up is None:
                raise HeldError(lock.read_holder())
            if given_up():
                raise CancelledError
            time.sleep(_POLL_SECONDS)
        if given_up is None:
            lock.write_holder()
        yield lock.exists
    finally:
        lock.release()


class _Lock:
    """A file lock, held as long as the file is open."""

    def __init__(self, path: Path) -> None:
        self.exists = True
        self._path, self._number, self._signed = path, -1, False

    def acquire(self) -> bool:
        """Try to take the lock. Returns False if another process holds it. Raises OSError if locking fails."""
        while True:
            try:
                if self._number < 0:
                    self._open()
                fcntl.flock(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(self._number), self._path.stat()):
                    return True
            except BlockingIOError:
                return False
            except FileNotFoundError:  # its holder removed the file or the folder
                pass
            except OSError as error:
                if self._number < 0:
                    raise
                if error.errno not in _NO_LOCKS:
                    raise OSError(error.errno, f"{error.strerror}, when locking {self._path.name}") from error
                self._continue_without(error)
                return True
            self.release()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _forking:
            self._number = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _open_locks.add(self)

    def _continue_without(self, error: OSError) -> None:
        """Continue without a lock, after a warning."""
        self.exists = False
        what = "its file system does not support locks, so run only one process at a time here"
        _warn_once(self._number, self._path.parent, what, error)

    def write_holder(self) -> None:
        self._signed = True
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        with suppress(OSError):  # the disk may be full
            os.ftruncate(self._number, 0)
            os.pwrite(self._number, f"process {os.getpid()} on {os.uname().nodename}, since {since}".encode(), 0)

    def read_holder(self) -> str:
        return os.pread(self._number, 200, 0).decode(errors="replace") or "another process"

    def release(self) -> None:
        """Release the lock. Does nothing in a child that was forked while the lock was held."""
        with _forking:
            if self._number >= 0:
                with suppress(OSError):  # closing is not enough if a child forked by C code shares the open file
                    if self._signed:
                        os.ftruncate(self._number, 0)
                    fcntl.flock(self._number, fcntl.LOCK_UN)
                self.close_file()

    def close_file(self) -> None:
        """Close the file. This releases the lock, unless another process shares the open file."""
        _open_locks.discard(self)
        os.close(self._number)
        self._number = -1


_open_locks: set[_Lock] = set()
_lacks: set[tuple[int, str]] = set()  # (device, what it lacks) already warned about
_forking = threading.Lock()  # held during a fork and while `_open_locks` changes


def _close_inherited() -> None:
    """Close the lock files that a forked child shares with its parent. The parent keeps its locks."""
    for lock in list(_open_locks):
        lock.close_file()
    _forking.release()


os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_close_inherited)
