"""The folder of a run: which one it is, and that no two runs share it."""

import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fastflower import distributed
from fastflower.errors import ArgumentError, CheckpointError, HeldError
from fastflower.files import PARTIAL, locked
from fastflower.models.checkpoint import LAST

_LOCK = ".lock"  # in the folder of a run


def run_folder(out: str | Path | None, backbone: str, *, resume: bool) -> Path:
    """Where a run goes: `out`, or the first of runs/BACKBONE, runs/BACKBONE-2, ... that is free; makes nothing.

    Raises ArgumentError where it cannot be made.
    """
    if out is None:
        if resume:
            raise ArgumentError("resume: name the run's folder with out (--out).")
        tries = (Path("runs", backbone + (f"-{number}" if number > 1 else "")) for number in range(1, 10**6))
        return next(folder for folder in tries if not folder.exists())
    folder = Path(out)
    stands = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (stands.is_dir() and os.access(stands, os.W_OK | os.X_OK)):
        raise ArgumentError(
            f"out: {folder} cannot be made, {stands} is no folder that can be written to; name another."
        )
    return folder


@contextmanager
def own(folder: Path, *, new: bool, resume: bool) -> Generator[None]:
    """Make a run's folder and keep other runs out of it: rank 0 does, and where it cannot all ranks raise its error.

    new  there must be none yet. A folder in which nothing was written does not stay.

    Raises CheckpointError where another run holds it, saying which, or where it holds a run that is not to be resumed; OSError.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with ExitStack() as stack:
        failed: Exception | None = None
        if distributed.rank() == 0:
            stack.callback(_clear, made)
            try:
                folder.mkdir(parents=True, exist_ok=not new)
                alone = stack.enter_context(locked(folder / _LOCK))
                stack.callback((folder / _LOCK).unlink, missing_ok=True)
                if not resume and (folder / LAST).exists():
                    told = "holds a run already; pass resume=True (--resume), or name another out"
                    failed = CheckpointError(f"{folder}: {told}.")
                for left in folder.glob(PARTIAL) if alone else ():  # by a run that was killed
                    left.unlink(missing_ok=True)
            except FileExistsError:
                failed = CheckpointError(f"{folder}: another run took it meanwhile; start again, or name out.")
            except HeldError as error:
                wait = "wait for it and pass resume=True (--resume), or name another out"
                failed = CheckpointError(f"{folder}: another run trains here ({error}); {wait}.")
            except OSError as error:
                failed = error
        failed = distributed.gathered(failed)[0]
        if failed is not None:
            raise failed
        yield


def _clear(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty
            folder.rmdir()
