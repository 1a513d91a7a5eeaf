"""Captures libjpeg's warnings. In OpenCV, libjpeg only writes them to C's stderr, without the name of the file."""

import ctypes
import os
import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

_WRITE = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_UNBUFFERED, _NO_LOCK = 2, 2  # _IONBF; FSETLOCKING_BYCALLER


class _Functions(ctypes.Structure):
    _fields_ = (("read", ctypes.c_void_p), ("write", _WRITE), ("seek", ctypes.c_void_p), ("close", ctypes.c_void_p))


class _WarningStream:
    """A C stream that calls a Python function on the writing thread, so each thread gets only its own warnings.

    It replaces C's `stderr`, not file descriptor 2, so it does not affect Python's own output or other processes.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._lock, self._listeners, self._captured = threading.Lock(), 0, threading.local()
        self._write = _WRITE(self._written)
        library.fopencookie.restype = ctypes.c_void_p
        library.fopencookie.argtypes = (ctypes.c_void_p, ctypes.c_char_p, _Functions)
        stream = ctypes.c_void_p(library.fopencookie(None, b"w", _Functions(None, self._write, None, None)))
        library.setvbuf(stream, None, _UNBUFFERED, ctypes.c_size_t(0))
        library["__fsetlocking"](stream, _NO_LOCK)  # otherwise a writer would hold the lock while it waits for the GIL
        self._stream, self._stderr = stream.value, ctypes.c_void_p.in_dll(library, "stderr")
        self._before = self._stderr.value
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Reset the state in a forked child, where the lock may be held by a thread that exists only in the parent."""
        self._lock, self._listeners, self._stderr.value = threading.Lock(), 0, self._before

    def _written(self, _: int, address: int, size: int) -> int:
        text: bytearray | None = getattr(self._captured, "text", None)
        if text is None:  # this thread is not listening
            return os.write(2, ctypes.string_at(address, size))
        text += ctypes.string_at(address, size)
        return size

    @contextmanager
    def listening(self) -> Generator[bytearray]:
        self._captured.text = bytearray()
        with self._lock:
            self._listeners += 1
            self._stderr.value = self._stream
        try:
            yield self._captured.text
        finally:
            with self._lock:
                self._listeners = max(0, self._listeners - 1)  # already 0 in a child forked in the meantime
                if not self._listeners:
                    self._stderr.value = self._before
            self._captured.text = None


_creating = threading.Lock()
_stream = cache(_WarningStream)  # one instance, created when first needed


def warnings() -> AbstractContextManager[bytearray]:
    """Return a context manager that captures libjpeg's warnings on this thread: one line of text per decode with warnings."""
    with _creating:
        stream = _stream()
    return stream.listening()
