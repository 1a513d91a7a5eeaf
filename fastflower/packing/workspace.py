"""Manages OUT/.packing, the locked workspace from which an interrupted pack resumes."""

import os
import shutil
from collections.abc import Generator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import cv2
import PIL

from fastflower.errors import FolderError, HeldError
from fastflower.files import blame_the_system, locked, remedy_for
from fastflower.machine import NOT_INSTALLED, version_of
from fastflower.packing.again import once_more, packing
from fastflower.packing.archives import RECORD
from fastflower.packing.duplicates import MapLike
from fastflower.packing.folder import Folder
from fastflower.packing.plan import Options, Plan, check_same, load_plan, make_plan, save_plan
from fastflower.shards.manifest import INFO, PLAN, WORK

_ENDINGS = (".tar", ".idx", ".npy")


@contextmanager
def workspace(out: Path) -> Generator[Path]:
    """Yield OUT/.packing, locked against a second pack. Afterward remove it unless a plan remains.

    Then OUT and the folders above it are also removed if they are empty, but only those that did not exist before.
    """
    work = out / WORK
    new = [path for path in (work, out, *out.parents) if not os.path.exists(path)]  # noqa: PTH110  (see below)
    if work not in new:  # an interrupted pack made OUT
        new.append(out)
    entered = False
    try:
        with locked(work / "lock"):
            entered = True
            try:
                yield work
            finally:
                if not (work / PLAN).exists():
                    (work / RECORD).unlink(missing_ok=True)  # before any unpacked file
                    shutil.rmtree(work, ignore_errors=True)  # NFS keeps open files, which are harmless without a plan
                    remove_empty(new)
    except HeldError as error:
        what = f"another pack is writing here ({error}); wait for it to finish, or choose another folder"
        raise FolderError(f"{out}: {what}:\n  {packing({'out': out})}") from None
    except (OSError, BrokenExecutor, MemoryError) as error:  # never caused by an unreadable image, which is skipped
        if not entered and work in new:  # another process may hold the lock in a folder that existed
            with suppress(OSError):
                (work / "lock").unlink()
            remove_empty(new)
        blame_the_system(error, out)
        if isinstance(error, MemoryError):
            what = f"packing ran out of memory; to resume with fewer workers:\n  {packing({'workers': 1})}"
            raise FolderError(f"{out}: {what}") from error
        if isinstance(error, OSError):
            remedy = remedy_for(error, "choose another folder as out (--out)")
            what = f"cannot be written ({error.strerror or error}); {remedy}."
        else:
            what = f"a worker died ({error}); if it ran out of memory, use fewer workers."
        resumable = os.path.exists(work / PLAN)  # noqa: PTH110  (Path.exists raises if a name is too long)
        again = f" To resume:\n  {once_more()}" if resumable else ""
        raise FolderError(f"{out}: {what}{again}") from error


def remove_empty(folders: list[Path]) -> None:
    """Remove those folders that are empty."""
    for folder in folders:
        with suppress(OSError):  # not empty, a link, or a mount point
            folder.rmdir()


def load_or_make_plan(folder: Folder, options: Options, work: Path, mapped: MapLike) -> Plan:
    """Load the plan of a pack that was interrupted here. If there is none, make, save and load a new plan."""
    out = work.parent
    versions = {"fastflower": version_of("fastflower"), "pillow": PIL.__version__, "opencv": cv2.__version__}
    if (heif := version_of("pillow-heif")) != NOT_INSTALLED:  # decodes HEIC if it is installed
        versions["pillow-heif"] = heif
    if not (work / PLAN).exists():
        names = [INFO, "classes.txt", "meta"] if options.lists else [INFO]
        taken = [path.name for path in sorted(out.iterdir()) if path.name in names or path.suffix in _ENDINGS]
        if taken:
            what = f"already contains {taken[0]}; remove it, or choose another folder"
            raise FolderError(f"{out}: {what}:\n  {packing({'out': out})}")
        save_plan(make_plan(folder, options, versions, mapped), work)
    plan = load_plan(work, folder.root.absolute(), whole=True)
    check_same(plan, folder, options, versions, work)
    return replace(plan, options=options)  # drop_empty_classes may have been added
