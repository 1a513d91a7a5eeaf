"""Memory that a step frees stays for the next one."""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

# The parameters of glibc's mallopt: malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# Where glibc's own, which move with what is freed, end: man 3 mallopt, of 64 bits.
_LARGEST_THRESHOLD, _USUAL_MMAP_MAX = 32 << 20, 65536

_lock = Lock()
_users = 0


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Within, what is freed is not given back to the system: of a training step or a validation on the CPU.

    glibc maps every block of more than 32 MB anew, and unmaps it when it is freed. A step's activations are such blocks, whose
    pages the kernel clears each time: 5 to 7% of a step (docs/log.md). At the end all that is free goes back to the system.
    Does nothing for a GPU, with another C library, and where the environment decides (MALLOC_MMAP_MAX_, GLIBC_TUNABLES, ...).
    """
    global _users
    library, settings = ctypes.CDLL(None), (*os.environ, os.environ.get("GLIBC_TUNABLES", ""))
    decided = re.search(r"malloc[._](mmap|trim)_", " ".join(settings), re.IGNORECASE)
    if device.type != "cpu" or decided or not hasattr(library, "mallopt"):
        yield
        return
    with _lock:
        _users += 1
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                library.mallopt(_MMAP_MAX, _USUAL_MMAP_MAX)
                library.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
                library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
                library.malloc_trim(0)
