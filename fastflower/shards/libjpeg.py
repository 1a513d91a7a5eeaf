"""What libjpeg warns of. Inside OpenCV it writes to C's stderr, without the file's name, and tells it in no other way."""

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
    """A C stream whose write is our function, on the thread that writes: each thread hears its own, none of the others'.

    It stands in for C's `stderr`, not for file descriptor 2, so Python's own output and other processes are not touched.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._lock, self._listeners, self._heard = threading.Lock(), 0, threading.local()
        self._write = _WRITE(self._written)
        library.fopencookie.restype = ctypes.c_void_p
        library.fopencookie.argtypes = (ctypes.c_void_p, ctypes.c_char_p, _Functions)
        stream = ctypes.c_void_p(library.fopencookie(None, b"w", _Functions(None, self._write, None, None)))
        library.setvbuf(stream, None, _UNBUFFERED, ctypes.c_size_t(0))
        library["__fsetlocking"](stream, _NO_LOCK)  # or who writes would wait for Python's lock with that of the stream
        self._stream, self._stderr = stream.value, ctypes.c_void_p.in_dll(library, "stderr")
        self._before = self._stderr.value
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """In a child that is forked: the parent's other threads, one of which may hold the lock, are not there."""
        self._lock, self._listeners, self._stderr.value = threading.Lock(), 0, self._before

    def _written(self, _: int, address: int, size: int) -> int:
        heard: bytearray | None = getattr(self._heard, "text", None)
        if heard is None:  # a thread that does not listen
            return os.write(2, ctypes.string_at(address, size))
        heard += ctypes.string_at(address, size)
        return size

    @contextmanager
    def listening(self) -> Generator[bytearray]:
        self._heard.text = bytearray()
        with self._lock:
            self._listeners += 1
            self._stderr.value = self._stream
        try:
            yield self._heard.text
        finally:
            with self._lock:
                self._listeners = max(0, self._listeners - 1)  # 0 in a child that is forked meanwhile
                if not self._listeners:
                    self._stderr.value = self._before
            self._heard.text = None


_making = threading.Lock()
_stream = cache(_WarningStream)  # one, made when it is first needed


def warnings() -> AbstractContextManager[bytearray]:
    """As a context: what libjpeg warns of on this thread meanwhile, as text; a line for each decode that it warns of."""
    with _making:
        stream = _stream()
    return stream.listening()
