"""Reads shards at a URL that fsspec supports, with retries that can be stopped."""

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastflower.errors import ArgumentError, FastflowerError, ShardError
from fastflower.files import blame_the_system

_log = logging.getLogger("fastflower")

_T = TypeVar("_T")

_PIECE = 4 << 20  # bytes per request; each piece is retried separately
_TIMEOUT = 60.0  # seconds per piece
_POLL = 0.05  # seconds between checks for `stop`
_ATTEMPTS = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 20.0  # seconds between attempts, doubling each time

CHOOSE_CACHE = "set XDG_CACHE_HOME to a writable folder, or pass Remote(folder=...) from Python"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Shards at a URL that fsspec supports: s3://, gs://, https:// and others. Pass it to a Loader instead of a folder."""

    url: str
    """URL of the folder that `pack` wrote."""
    folder: str | Path = field(
        default_factory=lambda: Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastflower")
    )
    """Local cache of shards, shared by all processes of a machine. By default ~/.cache/fastflower, or fastflower in the
    environment variable XDG_CACHE_HOME."""
    limit_bytes: int = 64 << 30
    """Cache limit in bytes.

    Evicts the least recently used shards, but never those of the previous, current or next window.
    """
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    """Arguments for the fsspec file system (storage_options), for example {"anon": True}."""


def expanded(folder: Path) -> Path:
    """Return a cache folder without ~. Raises ArgumentError if there is no home directory."""
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise ArgumentError(f"{folder}: cannot hold remote shards ({error}); {CHOOSE_CACHE}.") from None


def remote(shards: str | Path | Remote) -> Remote | None:
    """Return a Remote for shards at a URL, or None for a local folder."""
    if isinstance(shards, Remote):
        return shards
    scheme, separator, _ = str(shards).partition("://")
    return Remote(url=str(shards)) if separator and scheme != "file" else None


def file_system(url: str, options: Mapping[str, object]) -> tuple[Any, str]:
    """Return the fsspec file system (untyped) of a URL, and the URL's path in it."""
    from fsspec.core import url_to_fs  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    try:
        return url_to_fs(url, **options)  # pyright: ignore[reportUnknownVariableType]
    except ImportError as error:
        remedy = "pip install 'fastflower[s3]' (s3://), 'fastflower[gcs]' (gs://) or 'fastflower[http]' (https://)"
        raise ArgumentError(f"{url}: {error}; {remedy}.") from None
    except ValueError as error:
        raise ArgumentError(f"{url}: {error}; pass a folder or a URL that fsspec supports.") from None


class AttemptError(Exception):
    """Raised if an attempt to read fails but another may succeed."""


def longest_silence() -> float:
    """Return the maximum time in seconds until a piece has arrived or all attempts have failed."""
    return _ATTEMPTS * (_TIMEOUT + _LONGEST_PAUSE)


class RemoteFiles:
    """Reads the files of a Remote with retries. Thread-safe. Connects on the first read."""

    def __init__(self, source: Remote) -> None:
        self.url = source.url.rstrip("/")
        self._options = source.options
        self._requests: set[Future[bytes]] = set()
        self._stopped = False

    def stop(self) -> None:
        """Stop all reads permanently. Pending reads raise CancelledError."""
        self._stopped = True
        for request in tuple(self._requests):
            request.cancel()

    def stopped(self) -> bool:
        """Return whether `stop` was called or the interpreter is shutting down."""
        return self._stopped or getattr(threading, "_SHUTTING_DOWN", False)

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raises ShardError if it cannot be read, CancelledError after `stop`."""
        return self.in_attempts(name, lambda: self._attempt(name))

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """Yield a file of `size` bytes in pieces. Raises the same errors as `read`."""
        for start in range(0, size, _PIECE):
            yield self.in_attempts(name, lambda start=start: self._attempt_piece(name, start, size))

    def in_attempts(self, name: str, attempt: Callable[[], _T]) -> _T:
        """Call `attempt` and return its result. If it raises AttemptError, pause and call it again.

        name  Name of the file, for messages. Raises ShardError after the last attempt, CancelledError after `stop`.
        """
        from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

        def announce(state: RetryCallState) -> None:
            reason = state.outcome and state.outcome.exception()
            _log.warning("%s/%s: %s; retrying in %.1f s", self.url, name, reason, state.upcoming_sleep)

        doubling = wait_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE)
        attempts = Retrying(
            retry=retry_if_exception_type(AttemptError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=lambda state: doubling(state) * random.uniform(0.5, 1.0),
            after=lambda _: self._raise_if_stopped(),
            before_sleep=announce,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return attempts(attempt)
        except AttemptError as error:
            blame_the_system(error.__cause__, f"{self.url}/{name}")
            raise ShardError(
                f"{self.url}/{name}: could not be read in {_ATTEMPTS} attempts ({error}); "
                f"check the connection and the server, then run again (downloaded shards are kept)."
            ) from None

    def _attempt_piece(self, name: str, start: int, size: int) -> bytes:
        """Return the piece at `start` of a file of `size` bytes. Raises AttemptError if it is incomplete."""
        end = min(start + _PIECE, size)
        data = self._attempt(name, start, end)
        if len(data) == size:  # the server does not support range requests
            return data[start:end]
        if len(data) != end - start:
            raise AttemptError(f"received {len(data)} bytes instead of {end - start}")
        return data

    def _attempt(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return bytes start .. end-1 of a file. Raises AttemptError, or ShardError if retrying would not help."""
        try:
            return self._request(name, start, end)
        except FastflowerError:
            raise
        except FileNotFoundError:
            raise ShardError(f"{self.url}/{name}: does not exist; pass the URL of a folder that pack wrote.") from None
        except PermissionError as error:
            raise ShardError(f"{self.url}/{name}: access denied ({error}); check the credentials.") from None
        except Exception as error:  # any error of the client, or a cancellation, which `in_attempts` detects
            raise AttemptError(str(error) or type(error).__name__) from error

    def _request(self, name: str, start: int | None, end: int | None) -> bytes:
        system, root = file_system(self.url, self._options)  # not stored: fsspec caches one file system per process
        if not system.async_impl:
            return system.cat_file(f"{root}/{name}", start=start, end=end)
        timeout = _TIMEOUT if end is not None else 10 * _TIMEOUT  # an entire file
        deadline = time.monotonic() + timeout
        coroutine = system._cat_file(f"{root}/{name}", start=start, end=end)
        request: Future[bytes] = asyncio.run_coroutine_threadsafe(coroutine, system.loop)
        self._requests.add(request)
        try:
            while not request.done():
                self._raise_if_stopped()
                if time.monotonic() >= deadline:
                    raise OSError(f"timed out after {timeout:.0f} seconds")
                with suppress(TimeoutError):  # no result yet; a timeout of the client is raised again below
                    request.result(_POLL)
            return request.result()
        finally:
            request.cancel()
            self._requests.discard(request)

    def _sleep(self, seconds: float) -> None:
        """Sleep in short steps, because nothing wakes a thread at interpreter exit. Raises CancelledError after `stop`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._raise_if_stopped()
            time.sleep(min(_POLL, seconds))

    def _raise_if_stopped(self) -> None:
        if self.stopped():
            raise CancelledError
