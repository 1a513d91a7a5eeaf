"""Shards at an address, of any file system that fsspec knows, and how its files are read: in attempts that can be stopped."""

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

_PIECE = 4 << 20  # bytes asked for at a time: each is tried again alone
_TIMEOUT = 60.0  # seconds for a piece
_LOOK = 0.05  # seconds between looks at whether reading has been stopped
_ATTEMPTS = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 20.0  # seconds between attempts, doubled each time


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Shards at an address of fsspec's: s3://, gs://, https:// and others. A Loader takes one where it takes a folder."""

    url: str
    """Of the folder that `pack` wrote."""
    folder: str | Path = field(
        default_factory=lambda: Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastflower"
    )
    """Where mirrors are kept, shared by all processes of a machine; ~/.cache/fastflower."""
    limit_bytes: int = 64 << 30
    """Of tars in it: those not used for longest make room, but for the shards of three windows."""
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    """What fsspec's file system is made with: storage_options, such as {"anon": True}."""


def remote(shards: str | Path | Remote) -> Remote | None:
    """The shards as a Remote when they are not a local folder's."""
    if isinstance(shards, Remote):
        return shards
    scheme, separator, _ = str(shards).partition("://")
    return Remote(url=str(shards)) if separator and scheme != "file" else None


def file_system(url: str, options: Mapping[str, object]) -> tuple[Any, str]:
    """fsspec's file system of an address, which has no types, and the path in it."""
    from fsspec.core import url_to_fs  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    try:
        return url_to_fs(url, **options)  # pyright: ignore[reportUnknownVariableType]
    except ImportError as error:
        raise ArgumentError(f"{url}: {error}; pip install 'fastflower[s3]', for gs:// [gcs], else [http].") from None
    except ValueError as error:
        raise ArgumentError(f"{url}: {error}; name a folder, or an address that fsspec knows.") from None


class AttemptError(Exception):
    """An attempt to read failed for the reason that it names, and another may succeed."""


def longest_silence() -> float:
    """Seconds after which a piece has come, or all attempts at it have failed."""
    return _ATTEMPTS * (_TIMEOUT + _LONGEST_PAUSE)


class RemoteFiles:
    """Reads the files of a Remote, in attempts. Thread-safe; connects when something is read."""

    def __init__(self, source: Remote) -> None:
        self.url = source.url.rstrip("/")
        self._options = source.options
        self._requests: set[Future[bytes]] = set()
        self._stopped = False

    def stop(self) -> None:
        """End all reading, now and for good: whoever waits for it gets CancelledError."""
        self._stopped = True
        for request in tuple(self._requests):
            request.cancel()

    def stopped(self) -> bool:
        """Whether nobody needs files any more: after `stop`, or where the interpreter ends."""
        return self._stopped or getattr(threading, "_SHUTTING_DOWN", False)

    def read(self, name: str) -> bytes:
        """The whole of a file. Raises ShardError when it cannot be had, CancelledError after `stop`."""
        return self.in_attempts(name, lambda: self._attempt(name))

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """A file of `size` bytes, piece by piece. Raises as `read` does."""
        for start in range(0, size, _PIECE):
            yield self.in_attempts(name, lambda start=start: self._attempt_piece(name, start, size))

    def in_attempts(self, name: str, attempt: Callable[[], _T]) -> _T:
        """What `attempt` returns, which is called again, after a pause, while it raises AttemptError.

        name  the file that it is about. Raises ShardError after the last attempt, CancelledError after `stop`.
        """
        from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

        def announce(state: RetryCallState) -> None:
            reason = state.outcome and state.outcome.exception()
            _log.warning("%s/%s: %s; trying again in %.1f s", self.url, name, reason, state.upcoming_sleep)

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
                f"check the connection and the server, then run again: what is here already is kept."
            ) from None

    def _attempt_piece(self, name: str, start: int, size: int) -> bytes:
        """The piece of a file of `size` bytes that begins at `start`. Raises AttemptError where it is not all there."""
        end = min(start + _PIECE, size)
        data = self._attempt(name, start, end)
        if len(data) == size:  # from a server that knows no ranges
            return data[start:end]
        if len(data) != end - start:
            raise AttemptError(f"{len(data)} bytes came instead of {end - start}")
        return data

    def _attempt(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes start .. end of a file. Raises ShardError where another attempt would not help, else AttemptError."""
        try:
            return self._request(name, start, end)
        except FastflowerError:
            raise
        except FileNotFoundError:
            raise ShardError(f"{self.url}/{name}: is not there; name the folder that pack wrote.") from None
        except PermissionError as error:
            raise ShardError(f"{self.url}/{name}: may not be read ({error}); check the credentials.") from None
        except Exception as error:  # the client's, whatever they are; that it was cancelled, too: `in_attempts` tells
            raise AttemptError(str(error) or type(error).__name__) from error

    def _request(self, name: str, start: int | None, end: int | None) -> bytes:
        system, root = file_system(self.url, self._options)  # each time: fsspec keeps one a process
        if not system.async_impl:
            return system.cat_file(f"{root}/{name}", start=start, end=end)
        patience = _TIMEOUT if end is not None else 10 * _TIMEOUT  # a whole file
        deadline = time.monotonic() + patience
        reading = system._cat_file(f"{root}/{name}", start=start, end=end)
        request: Future[bytes] = asyncio.run_coroutine_threadsafe(reading, system.loop)
        self._requests.add(request)
        try:
            while not request.done():
                self._raise_if_stopped()
                if time.monotonic() >= deadline:
                    raise OSError(f"not all came within {patience:.0f} seconds")
                with suppress(TimeoutError):  # nothing came yet; or the client's own, which the result raises again
                    request.result(_LOOK)
            return request.result()
        finally:
            request.cancel()
            self._requests.discard(request)

    def _sleep(self, seconds: float) -> None:
        """Sleep, but not after `stop`: in short naps, as nothing wakes a thread when the interpreter ends."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._raise_if_stopped()
            time.sleep(min(_LOOK, seconds))

    def _raise_if_stopped(self) -> None:
        if self.stopped():
            raise CancelledError
