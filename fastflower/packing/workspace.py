"""OUT/.packing: where a pack works, locked against a second one, and what an interrupted one goes on from."""

import os
import shutil
from collections.abc import Generator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import PIL

from fastflower.errors import FolderError, HeldError
from fastflower.files import blame_the_system, locked
from fastflower.machine import version_of
from fastflower.packing.duplicates import MapLike
from fastflower.packing.folder import Folder
from fastflower.packing.plan import Options, Plan, check_same, load_plan, make_plan, save_plan
from fastflower.shards.manifest import INFO, PLAN, WORK

_ENDINGS = (".tar", ".idx", ".npy")


@contextmanager
def workspace(out: Path) -> Generator[Path]:
    """OUT/.packing, locked against a second pack. It stays while it holds a plan to go on with; OUT goes if it is empty."""
    work = out / WORK
    try:
        with locked(work / "lock"):
            try:
                yield work
            finally:
                if not (work / PLAN).exists():
                    shutil.rmtree(work, ignore_errors=True)  # NFS keeps files that are open; what stays is no plan
                    with suppress(OSError):  # not empty, a link, or where a disk is mounted
                        out.rmdir()
    except HeldError as error:
        what = f"another pack is writing here ({error}); wait for it, or name another folder with --out."
        raise FolderError(f"{out}: {what}") from None
    except (OSError, BrokenExecutor, MemoryError) as error:  # images that cannot be read are skipped: not about them
        blame_the_system(error, out)
        if isinstance(error, MemoryError):
            what = "is not finished: memory ran out; pack with fewer workers (--workers 1)."
        elif isinstance(error, OSError):
            what = f"cannot be written ({error.strerror or error}); make room, or name another folder with --out."
        else:
            what = f"a worker died ({error}); pack with fewer workers where memory ran out."
        begun = os.path.exists(work / PLAN)  # noqa: PTH110  (does not raise, as Path.exists does for a name that is too long)
        again = " The same command goes on where this one stopped." if begun else ""
        raise FolderError(f"{out}: {what}{again}") from error


def begun_plan(folder: Folder, options: Options, work: Path, mapped: MapLike) -> Plan:
    """The plan of the pack that was interrupted here, or a new one; saved, and read from the workspace in both cases."""
    out = work.parent
    versions = {"fastflower": version_of("fastflower"), "pillow": PIL.__version__, "opencv": cv2.__version__}
    if not (work / PLAN).exists():
        names = [INFO, "classes.txt", "meta"] if options.lists else [INFO]
        taken = [path.name for path in sorted(out.iterdir()) if path.name in names or path.suffix in _ENDINGS]
        if taken:
            raise FolderError(f"{out}: holds {taken[0]} already; name another folder with --out, or remove this one.")
        save_plan(make_plan(folder, options, versions, mapped), work)
    plan = load_plan(work, folder.root.absolute(), whole=True)
    check_same(plan, folder, options, versions, work)
    return plan
