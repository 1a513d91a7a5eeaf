"""Progress bars, log lines in their place where none is shown, and log lines where IPython runs."""
# pyright: standard
# tqdm and IPython do not type their arguments.

import logging
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fastflower.suggestions import called_directly

if TYPE_CHECKING:
    from IPython.core.display_functions import DisplayHandle

_log = logging.getLogger("fastflower")

_SILENT, _BETWEEN = 30.0, 60.0  # seconds: before the first line that stands for a bar, and between two


def bar(
    iterable: Iterable[object] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    unit_scale: bool = False,
    hidden: bool = False,
) -> "tqdm[Any]":
    """Return a progress bar. It is shown on a terminal and in a notebook, unless `hidden`; elsewhere it logs a line a minute."""
    options = {"desc": desc, "unit": unit, "total": total, "initial": initial, "unit_scale": unit_scale}
    if not hasattr(_shell(), "kernel"):
        made = _LoggedBar(iterable, **options, disable=hidden or None)  # None: unless stderr is a terminal
        made.what, made.units = desc, f"{unit}es" if unit.endswith("ch") else f"{unit}s"
        made.due = inf if hidden else max(perf_counter() + _SILENT, _LoggedBar.last + _BETWEEN)
        return made
    made = _NotebookBar(
        iterable, **options, disable=hidden, gui=True, mininterval=0.25, smoothing=0
    )  # gui: do not print
    if not hidden:
        made.display()
    return made


@contextmanager
def shown() -> Generator[None]:
    """Show log lines in the `with` block or the decorated function, if IPython runs and logging is not configured.

    Afterwards logging is as it was, so a later configuration neither doubles lines nor finds a level changed.
    """
    _NotebookBar.closed = None
    if _shell() is None or _log.hasHandlers():
        yield
        return
    handler, level = _Lines(), _log.level
    _log.addHandler(handler)
    if level == logging.NOTSET and logging.root.level == logging.WARNING:  # the defaults
        _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.setLevel(level)
        _log.removeHandler(handler)


def tell(function: str, lines: Iterable[str]) -> None:
    """Log the last lines of a function, which say what it has made, if the user called it. The command line prints them."""
    for line in lines if called_directly(function) else ():
        _log.info("%s", line)


class _LoggedBar(tqdm):
    """A bar that logs how far it is, where it is not shown: after half a minute, then every minute."""

    last = -inf
    """When a bar logged a line."""
    due, what, units = inf, "", ""
    start: tuple[float, int] | None = None
    """Time and position of the first update, from which speed is measured: what comes before takes longer."""

    def __iter__(self) -> Iterator[object]:
        if not self.disable:
            yield from super().__iter__()
            return
        for each in self.iterable:
            yield each
            self.update()

    def update(self, n: float | None = 1) -> bool | None:
        if not self.disable:
            return super().update(n)
        self.n += int(n or 0)
        now = perf_counter()
        begun, before = self.start = self.start or (now, self.n)
        if now < self.due or self.n == before or not self.total:
            return None
        _LoggedBar.last, self.due = now, now + _BETWEEN
        speed = (self.n - before) / (now - begun)
        left = _duration((self.total - self.n) / speed)
        place = f"{self.what}: {self.n} of {self.total} {self.units}"
        _log.info("%s, %.3g %s/s, about %s left", place, speed, self.units, left)
        return None


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes > 90:
        return f"{seconds / 3600:.1f} hours"
    return f"{minutes} minutes" if minutes > 1 else "a minute" if minutes else f"{seconds:.0f} seconds"


class _Lines(logging.Handler):
    """Prints messages above the bars of a terminal. Warnings go to stderr, which notebooks show in red."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), sys.stderr if record.levelno >= logging.WARNING else sys.stdout)


class _NotebookBar(tqdm):
    """A bar of plain text that replaces its own output, and that of the bar before it in the same call.

    Unlike tqdm.notebook it needs no ipywidgets, and it is still there in a saved notebook.
    """

    closed: "DisplayHandle | None" = None
    """The output of the last bar that was closed in this call."""
    output: "DisplayHandle | None" = None

    def display(self, *_: object, **__: object) -> None:
        from IPython.display import display

        text = {"text/plain": str(self)}
        if self.output is None:
            self.output, _NotebookBar.closed = _NotebookBar.closed, None
        if self.output is None:
            self.output = display(text, raw=True, display_id=True)
        else:
            self.output.update(text, raw=True)

    def clear(self, *_: object, **__: object) -> None:
        """Do nothing: printed lines have an output of their own."""

    def close(self) -> None:
        if not self.disable:
            super().close()
            self.display()
            _NotebookBar.closed = self.output


def _shell() -> object:
    """Return the IPython that runs this code, or None."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None
