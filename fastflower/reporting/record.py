"""run.json in a run's folder: what was run, on what, when, and how it ended. docs/training.md describes its keys."""

import json
import logging
import os
import platform
import re
import subprocess
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import cast

from fastflower import distributed
from fastflower.errors import FastflowerError, StoppedError
from fastflower.files import write_atomically

_log = logging.getLogger("fastflower")

Json = dict[str, object]

FILE = "run.json"
_GIT_SECONDS = 5  # a status that takes longer is left out


@contextmanager
def recorded(
    folder: Path, facts: dict[str, object], session: dict[str, object], *, resume: bool
) -> Generator[Callable[[int], None]]:
    """Keep run.json up to date on rank 0: at the start, at the end, and when the yielded function gets the number of epochs.

    facts  What describes the whole run. session  What describes this process. resume  Whether to keep earlier sessions.
    """
    if distributed.rank() > 0:
        yield lambda _: None
        return
    begun = perf_counter()
    before = cast("list[Json]", (_read_or_warn(folder) or {}).get("sessions", [])) if resume else []
    for earlier in before:
        if earlier["status"] == "running":  # and yet the folder's lock is free
            earlier["status"] = "killed"
    now: Json = {"status": "running", "error": None, "started": _now(), "ended": None, "seconds": 0.0}
    here = Path.cwd()
    now |= {"host": platform.node(), "pid": os.getpid(), "working_directory": str(here)}
    now |= {**session, "git": git_state(here)}
    content: Json = {"format": "fastflower run", "version": 1, "status": "running", "error": None, **facts}
    sessions = [*before, now]
    content |= {"finished_epochs": 0, "seconds": 0.0, "sessions": sessions}

    def write(epochs: int | None = None) -> None:
        now["seconds"] = round(perf_counter() - begun, 3)
        content["seconds"] = round(sum(cast("float", each["seconds"]) for each in sessions), 3)
        content["finished_epochs"] = content["finished_epochs"] if epochs is None else epochs
        text = json.dumps(without_secrets(content), indent=1, ensure_ascii=False)
        write_atomically(folder / FILE, text.encode("utf-8", "backslashreplace"))

    def end(status: str, error: str | None = None) -> None:
        now["ended"] = _now()
        for part in (content, now):
            part |= {"status": status, "error": error}
        write()

    write()
    try:
        yield write
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, StoppedError))
        told = str(error) if stopped or isinstance(error, FastflowerError) else ""
        with suppress(OSError):  # the disk may be full, which `error` says
            end("interrupted" if stopped else "failed", told or f"{type(error).__name__}: {error}".removesuffix(": "))
        raise
    end("finished")


def read(folder: Path) -> Json | None:
    """Return the content of a run's run.json; None if there is none, as in runs of older versions, or if it is damaged."""
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        content: object = json.loads((folder / FILE).read_text("utf-8"))
        if isinstance(content, dict):
            found = cast("Json", content)
            return found if found.get("format") == "fastflower run" else None
    return None


def shards_of_run(content: Json | None) -> str:
    """Return the shards that a run.json names, as they can be typed here; "SHARDS" if it names none."""
    data = cast("Json", (content or {}).get("data") or {})
    shards = str(data.get("shards", "SHARDS"))
    sessions = cast("list[Json]", (content or {}).get("sessions") or [{}])
    began = Path(str(sessions[-1].get("working_directory", "")))
    return str(began / shards) if began != Path.cwd() and (began / shards).exists() else shards


def _read_or_warn(folder: Path) -> Json | None:
    content = read(folder)
    if content is None and (folder / FILE).exists():
        _log.warning("%s: is damaged, so the new one does not list earlier sessions", folder / FILE)
    return content


def without_secrets(value: object) -> object:
    """Remove user names, passwords and queries from the URLs in a JSON value."""
    if isinstance(value, dict):
        return {name: without_secrets(each) for name, each in cast("dict[str, object]", value).items()}
    if isinstance(value, list | tuple):
        return [without_secrets(each) for each in cast("list[object]", value)]
    if isinstance(value, str):
        return re.sub(r"(://[^\s?#'\"]*)\?[^\s#'\"]*", r"\1", re.sub(r"://[^\s/?#'\"]*@", "://", value))
    return value


def git_state(folder: Path) -> dict[str, object] | None:
    """Return the commit of a working directory and whether tracked files have changed since; None outside of git."""
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=_GIT_SECONDS, check=True)
    except (
        OSError,
        subprocess.SubprocessError,
    ):  # git is missing, refuses or takes too long; or there is no repository
        return None
    lines = done.stdout.decode(errors="replace").splitlines()
    commits = [line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid ")]
    return {"commit": commits[0], "dirty": any(not line.startswith("#") for line in lines)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
