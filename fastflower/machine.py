"""What this process may use of its machine: cores and memory, as the kernel and the control groups around it allow; versions."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path

_GROUPS, _OWN_GROUPS, _MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/meminfo")

# Of a group and those below it, by version: its limits, what it uses, and what of that the kernel gives up before it swaps or
# kills: the page cache and caches of names, but not files of a tmpfs or locked pages (Documentation/admin-guide/cgroup-v2.rst,
# memory.stat). /proc/meminfo's MemAvailable counts the same. Kubernetes' working set leaves out inactive_file only, so that a
# file that was read twice, as shards are, would count as memory that is taken.
_MEMORY_FILES = (
    (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file", "slab_reclaimable")),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def ranks_here() -> int:
    """How many processes that train together share this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores() -> int:
    """The number of threads that can run at once in this process; ranks share the machine's cores and the group's quota.

    Fewer where this process is held to fewer (taskset, SLURM, Docker's --cpuset-cpus). A quota (--cpus, a Kubernetes limit) is
    rounded up: two threads use one and a half cores, one thread cannot.
    """
    whole = min([os.cpu_count() or 1, *map(ceil, _cores_allowed())])
    return max(1, min(len(os.sched_getaffinity(0)), whole // ranks_here()))


def available_bytes() -> int:
    """RAM that can be had without swapping: the least of what the kernel and each control group allow."""
    kilobytes = _named_numbers(_MEMINFO).get("MemAvailable:")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if kilobytes is None else kilobytes * 1024
    return max(0, min([free, *_bytes_allowed()]))


def _cores_allowed() -> Iterator[float]:
    """Cores that each group around this process allows, where it limits them."""
    for group in _groups("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):  # none there, or "max"
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota and period and quota > 0:  # -1: no limit
            yield quota / period


def _bytes_allowed() -> Iterator[int]:
    """Bytes that each group around this process still allows: a limit less what is used and cannot be reclaimed."""
    for group in _groups("memory"):
        stat = _named_numbers(group / "memory.stat")
        above = stat.get("hierarchical_memory_limit")  # v1: the least also of groups that a container does not see
        for files, current, reclaimable in _MEMORY_FILES:
            limits = [limit for limit in (above, *(_number(group / name) for name in files)) if limit is not None]
            used = _number(group / current)
            if limits and used is not None:
                yield min(limits) - max(0, used - sum(stat.get(name, 0) for name in reclaimable))


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control groups that may have a controller, v1's and v2's, and of all groups above them."""
    # Where nothing is said, the top one's: what a container sees there is its own.
    lines = ["0::/", f"0:{controller}:/"]
    with suppress(OSError):
        lines += os.fsdecode(_OWN_GROUPS.read_bytes()).splitlines()
    seen: set[Path] = set()
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and controller not in controllers.split(","):
            continue
        mounts = [controllers, controller] if controllers else ["", "unified"]
        for top in (_GROUPS / mount for mount in mounts):
            group = _group_folder(top, path)
            seen |= {folder for folder in (group, *group.parents) if folder.is_relative_to(top)}
    yield from sorted(seen)


def _group_folder(top: Path, path: str) -> Path:
    """The folder of a group; a container may see the groups from its own one on, but read the whole path of it."""
    names = [name for name in path.split("/") if name not in ("", "..")]
    folders = (top.joinpath(*names[start:]) for start in range(len(names)))
    return next((folder for folder in folders if folder.is_dir()), top)


def _number(path: Path) -> int | None:
    """What a file holds; None where there is none, or it says that there is no limit ("max")."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _named_numbers(path: Path) -> dict[str, int]:
    """The lines of a file that are a name and a number."""
    with suppress(OSError):
        lines = re.findall(r"^[ \t]*(\S+)[ \t]+(-?\d+)(?!\S)", os.fsdecode(path.read_bytes()), re.MULTILINE)
        return {name: int(value) for name, value in lines}
    return {}


def version_of(name: str) -> str:
    """Of an installed distribution; "not installed" where it is only on the path, as a source tree may be."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
