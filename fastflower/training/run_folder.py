"""The folder of a run: choosing it and locking out other runs."""

import os
import shutil
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fastflower import distributed
from fastflower.errors import ArgumentError, CheckpointError, FastflowerError, HeldError, StoppedError
from fastflower.files import PARTIAL, locked, refusal, remedy_for
from fastflower.models.checkpoint import LAST, Checkpoint
from fastflower.reporting.record import FILE
from fastflower.training.command import Call

_LOCK = ".lock"  # in a run's folder


def run_folder(out: str | Path | None, backbone: str, *, resume: bool) -> Path:
    """Return `out`, or the first unused folder of runs/BACKBONE, runs/BACKBONE-2, ..., without creating it.

    Raises ArgumentError if the folder cannot be created, or if `resume` is True and `out` is None.
    """
    if out is None:
        if resume:
            raise ArgumentError("resume: pass the run's folder as out (--out).")
        tries = (Path("runs", backbone + (f"-{number}" if number > 1 else "")) for number in range(1, 10**6))
        out = next(filter(_is_unused, tries))
    folder = Path(out)
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise ArgumentError(
            f"out: cannot create {folder}: {above} is not a writable folder; pass a different folder as out (--out)."
        )
    return folder


@contextmanager
def own(call: Call, *, new: bool, resume: bool) -> Generator[None]:
    """Create and lock a run's folder on rank 0; if that fails, raise the same error on all ranks.

    new  Whether to fail if another run has used the folder.

    A folder created here is removed at the end if it is still empty, or if the run was interrupted before its first checkpoint.

    Raises CheckpointError if another run uses the folder, or if it holds a run and `resume` is False. Raises ArgumentError
    if the folder cannot be created or locked.
    """
    folder = call.out
    created = [place for place in (folder, *folder.parents) if not place.exists() or (new and place == folder)]
    with ExitStack() as stack:
        failed: Exception | None = None
        if distributed.rank() == 0:
            stack.callback(_remove_empty, created)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                alone = stack.enter_context(locked(folder / _LOCK))
                stack.callback((folder / _LOCK).unlink, missing_ok=True)
                if new and not _holds_nothing(folder):
                    failed = _taken(folder)
                elif not resume and (folder / LAST).exists():
                    failed = CheckpointError(f"{folder}: already holds a run. {_choices(call)}")
                for partial in folder.glob(PARTIAL) if alone else ():  # left by a killed run
                    partial.unlink(missing_ok=True)
            except HeldError as error:
                what = f"{folder}: another run is training here ({error}); wait. {_choices(call)}"
                failed = _taken(folder) if new else CheckpointError(what)
            except OSError as error:
                remedy = remedy_for(error, "pass a different folder as out (--out)")
                what = f"out: {folder} cannot be written ({error.strerror or error}); {remedy}."
                failed = refusal(error, folder) or ArgumentError(what)
        if failed := distributed.gathered(failed)[0]:
            raise failed
        try:
            yield
        except (KeyboardInterrupt, StoppedError):
            if folder in created and not (folder / LAST).exists():
                stack.callback(_discard, folder)  # before the folder is removed, because it is empty
            raise


def _is_unused(folder: Path) -> bool:
    """Return whether a folder does not exist, or holds nothing but the lock of a run that was killed."""
    if not folder.exists():
        return True
    try:
        if (unused := _holds_nothing(folder)) and (folder / _LOCK).exists():
            with locked(folder / _LOCK):
                pass
        return unused
    except (HeldError, OSError):
        return False


def _holds_nothing(folder: Path) -> bool:
    """Return whether a folder holds nothing but a lock."""
    return {path.name for path in folder.iterdir()} <= {_LOCK}


def _taken(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder}: another run just took it; run again, or pass a folder as out (--out).")


def _choices(call: Call) -> str:
    """Return what can be typed for a folder that holds a run: only what works with the recipe of the run."""
    start = None
    with suppress(FileNotFoundError, FastflowerError):  # a damaged checkpoint is told on resuming
        start = Checkpoint.load(call.out / LAST)
    ended = start is not None and start.epoch >= start.recipe.epochs
    choices = [] if ended else [f"To continue it:\n  {call.again(resume=True)}"]
    differs = start is not None and start.recipe.resolved != call.recipe.resolved
    if start is not None and start.recipe.backbone == call.recipe.backbone and (ended or differs):
        recipe = " with this recipe" if differs else ""
        choices.append(f"To train on from its weights{recipe}:\n  {call.onward()}")
    return "\n".join([*choices, f"To start another:\n  {call.anew()}"])


def _discard(folder: Path) -> None:
    """Remove what a run writes before its first checkpoint."""
    (folder / FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty
            folder.rmdir()
