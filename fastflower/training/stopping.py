"""Signals that ask a run to save and stop: SIGTERM and Ctrl-C. Before training has begun, they stop it at once."""

import logging
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType

from fastflower import distributed

_log = logging.getLogger("fastflower")


class TerminatedError(KeyboardInterrupt):
    """Raised by SIGTERM before training has begun."""


def stopped_by(error: KeyboardInterrupt) -> str:
    """Return which signal has stopped a run, for messages."""
    return "stopped by SIGTERM" if isinstance(error, TerminatedError) else "interrupted by SIGINT"


class Stop:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.begun = False
        """Whether training has begun. Before that, signals raise KeyboardInterrupt at once, because there is nothing to save."""
        self._received: list[int] = []  # not an Event: a second signal during its set() would deadlock

    def __call__(self) -> int:
        """Return the signal's number, or 0. SIGTERM goes before SIGINT."""
        return max(self._received, default=0)

    def terminate(self, number: int, _frame: FrameType | None) -> None:
        """Handle SIGTERM: save at the next step."""
        if not self.begun:
            raise TerminatedError
        self._received.append(number)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT, which Ctrl-C sends: save at the next step. The second one stops at once."""
        if not self.begun or number in self._received:
            signal.default_int_handler(number, frame)
        self._received.append(number)
        if distributed.rank() == 0:
            with suppress(RuntimeError):  # the signal came while the same stream was written to
                _log.warning("interrupted: saving after this step; interrupt again to stop at once")


@contextmanager
def preemption() -> Generator[Stop]:
    """Catch SIGTERM and SIGINT inside the block. Outside the main thread, catches nothing.

    Also leaves SIGINT alone if it is ignored, as in a shell's background jobs, or if the program has a handler of its own.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers: dict[int, Callable[[int, FrameType | None], None]] = {signal.SIGTERM: stop.terminate}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = stop.interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None if C code set the handler
