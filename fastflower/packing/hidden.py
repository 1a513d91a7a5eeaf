"""Which files and folders are never images or classes: hidden ones, those that systems add, and those to ignore."""

import logging
import os
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from fastflower.packing.again import packing

_log = logging.getLogger("fastflower")

# Added by archive tools, file systems, network storage and operating systems. Lower case.
_SYSTEM = {
    *("__macosx", "icon\r"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("lost+found", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
}

_WRITTEN = ("run.json", ".packing", "train.index.npy", "val.index.npy", "test.index.npy")  # in runs and packs


def is_run_or_pack(folder: str) -> bool:
    """Return whether a folder is a run, or a pack, also an unfinished one."""
    return any(os.path.exists(f"{folder}/{name}") for name in _WRITTEN)  # noqa: PTH110  (strings, for speed)


def is_hidden(name: str) -> bool:
    """Return whether a name begins with a dot or is one that systems add, such as Thumbs.db, @eaDir or lost+found."""
    return name.startswith(".") or name.lower() in _SYSTEM


@dataclass(slots=True)
class _Ignoring:
    roots: list[str]
    """The folder that is packed, last. Before it the root of its archive, to which paths may be relative as well."""
    patterns: Sequence[str]
    matched: set[str] = field(default_factory=set[str])

    def matches(self, path: str) -> bool:
        """Return whether a pattern matches the path or a folder above it."""
        for root in reversed(self.roots):
            parts = os.path.relpath(path, root).split("/")
            for pattern in self.patterns:
                plain = "/" not in pattern.rstrip("/")
                if plain and root != self.roots[-1]:  # it is not meant for the folder that is packed
                    continue
                wanted = ["**"] * plain + [part for part in pattern.split("/") if part not in ("", ".")]
                ends = [end for end in range(1, len(parts) + 1) if _fits(parts[:end], wanted)]
                if ends and not (pattern.endswith("/") and ends[0] == len(parts) and not os.path.isdir(path)):  # noqa: PTH112  (a string)
                    self.matched.add(pattern)
                    return True
        return False


# Every function that reads a folder asks for the patterns, so they are not passed through all of them.
_ignoring: ContextVar[_Ignoring | None] = ContextVar("ignoring", default=None)


def _fits(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return whether the parts of a path fit those of a pattern, in which ** stands for any number of folders."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_fits(parts[start:], wanted[1:]) for start in range(len(parts) + 1))
    # .gitignore also negates a bracket with ^, which fnmatch does not.
    first = re.sub(r"\[\^(\]?[^]]*\])|\[\]?[^]]*\]", lambda found: f"[!{found[1]}" if found[1] else found[0], wanted[0])
    return bool(parts) and fnmatchcase(parts[0], first) and _fits(parts[1:], wanted[1:])


@contextmanager
def ignoring(root: Path, patterns: Sequence[str], archive: Path | None = None) -> Generator[None]:
    """Ignore what the patterns match under `root` until the end of the block. Then warn about patterns without a match.

    archive  Whose content `root` is. A block inside, for a folder of it, uses the same patterns.
    """
    outer = _ignoring.get()
    if outer and archive is None and root.is_relative_to(outer.roots[0]):
        outer.roots.append(str(root))
        try:
            yield
        finally:
            outer.roots.pop()
        return
    state = _Ignoring([str(root)], patterns)
    token = _ignoring.set(state if patterns else None)
    try:
        yield
    finally:
        _ignoring.reset(token)
    for pattern in patterns:
        if pattern not in state.matched:
            what = f"nothing matches the pattern {pattern!r}; write a name, or a path relative to this folder"
            _log.warning("%s: %s%s", archive or root, what, _meant(root, pattern))


def _meant(root: Path, pattern: str) -> str:
    """Return what to type to ignore what a pattern without a match means, or ""."""
    names = {path.name.lower(): path.name for path in (root.iterdir() if root.is_dir() else ())}
    near = get_close_matches(pattern.strip("/").lower(), names, 1)
    return "".join(f"; did you mean {names[one]}?\n  {packing({'ignore': [names[one]]}, goes_on=True)}" for one in near)


def patterns_ignored() -> Sequence[str]:
    """Return the patterns of the current `ignoring` block."""
    state = _ignoring.get()
    return state.patterns if state else ()


def is_ignored(path: str) -> bool:
    """Return whether a pattern of the current `ignoring` block matches a path, which includes the root."""
    state = _ignoring.get()
    return state is not None and state.matches(path)


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder that are neither hidden nor ignored."""
    with os.scandir(folder) as found:
        for entry in found:
            if not is_ignored(entry.path) and not is_hidden(entry.name):
                yield entry
