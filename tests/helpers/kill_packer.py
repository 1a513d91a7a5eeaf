"""Kill a packer at many moments, resume it, and compare: python tests/helpers/kill_packer.py FOLDER WORK [--random N]

By default, kills it once before each step in which it writes, renames, creates or removes something in OUT. With
--random, kills it at N random times. After each kill, the same pack runs again to the end and must give the same bytes
as an uninterrupted one. With --begin, each attempt resumes a copy of a pack that was killed before. Prints the number
of kills, and exits with status 1 at the first difference.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from fastflower.packing.packer import pack

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--random", type=int, default=0, help="kill at this many random moments instead of at each step"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--shard-bytes", type=int, default=1 << 19)
    parser.add_argument("--begin", type=Path, help="an OUT that was killed with the same options")
    arguments = parser.parse_args()
    tqdm.set_lock(threading.RLock())  # its default is shared with forked children, and a killed one would keep it
    options = {"shard_bytes": arguments.shard_bytes, "workers": 2, "lists": True}
    if not arguments.random:
        os.fsync = lambda _: None  # only a power cut, not a kill, loses what was written
    whole, out = arguments.work / "whole", arguments.work / "out"
    start = time.perf_counter()
    forked(lambda: pack(arguments.folder, whole, **options))
    seconds = time.perf_counter() - start
    expected = checksums(whole)
    moments = random.Random(arguments.seed)
    kills = attempts = 0
    while True:
        attempts += 1
        if arguments.begin:
            shutil.copytree(arguments.begin, out)
        delay = moments.uniform(0, 1.1 * seconds) if arguments.random else None
        killed = forked(lambda: pack(arguments.folder, out, **options), delay=delay, step=attempts, out=out)
        kills += killed
        before = sorted(path.name for path in out.rglob("*")) if out.exists() else []
        if killed and not ((out / "manifest.json").exists() and not (out / ".packing").exists()):
            pack(arguments.folder, out, **options)
        if checksums(out) != expected:
            print(f"after kill {kills} of attempt {attempts} (delay {delay}) the bytes differ; OUT contained: {before}")
            return 1
        shutil.rmtree(out)
        if kills >= arguments.random if arguments.random else not killed:
            print(f"{kills} kills in {attempts} attempts, {len(expected)} files, all bytes as in an uninterrupted pack")
            return 0


def forked(job: Callable[[], object], delay: float | None = None, step: int = 0, out: Path | None = None) -> bool:
    """Run a job in a child, kill it after `delay` seconds or at step `step` in `out`, and return whether it was killed."""
    child = os.fork()
    if child == 0:
        if out is not None and delay is None:
            kill_at(step, str(out))
        try:
            job()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        sys.exit(f"a pack that was not killed failed with status {os.WEXITSTATUS(status)}")
    return False


def kill_at(step: int, out: str) -> None:
    """Kill this process before step number `step` that changes something in `out`."""
    lock, steps = threading.Lock(), [0]

    def count(event: str, args: tuple[object, ...]) -> None:
        if event not in EVENTS or not isinstance(args[0], str | os.PathLike) or not str(args[0]).startswith(out):
            return
        if event == "open" and not int(str(args[2])) & (os.O_WRONLY | os.O_RDWR):
            return
        with lock:
            steps[0] += 1
            if steps[0] >= step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in the folder, including hidden ones, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    sys.exit(main())
