"""Cores and memory available to this process within its affinity mask and cgroups, and package versions."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path

NOT_INSTALLED = "not installed"
_GROUPS, _OWN_GROUPS, _MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/meminfo")

# For cgroup v2, then v1: the limit files, the usage file, and the entries of memory.stat that the kernel reclaims
# before it swaps or kills a process. These are page cache and slab caches, but not tmpfs files or locked pages
# (Documentation/admin-guide/cgroup-v2.rst). MemAvailable in /proc/meminfo counts memory the same way. Kubernetes'
# working set excludes only inactive_file, so it would count files that were read twice, such as shards, as used.
_MEMORY_FILES = (
    (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file", "slab_reclaimable")),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def speaks() -> bool:
    """Return whether this process reports what concerns all: without torchrun, or as rank 0."""
    return os.environ.get("RANK", "0") == "0"


def ranks_here() -> int:
    """Return the number of ranks on this machine, as set by torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores() -> int:
    """Return the number of threads that this process can run at once. Ranks on one machine divide its cores and quota.

    An affinity mask (taskset, SLURM, Docker's --cpuset-cpus) can lower the number. A quota (Docker's --cpus, a
    Kubernetes limit) is rounded up, because using one and a half cores takes two threads.
    """
    whole = min([os.cpu_count() or 1, *map(ceil, _cores_allowed())])
    return max(1, min(len(os.sched_getaffinity(0)), whole // ranks_here()))


def available_bytes() -> int:
    """Return the bytes of RAM available without swapping: the kernel's estimate, or less if a cgroup allows less."""
    kilobytes = _named_numbers(_MEMINFO).get("MemAvailable:")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if kilobytes is None else kilobytes * 1024
    return max(0, min([free, *_bytes_allowed()]))


def _cores_allowed() -> Iterator[float]:
    """Yield the core limit of each cgroup that has one."""
    for group in _groups("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):  # missing, or "max"
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota and period and quota > 0:  # -1: no limit
            yield quota / period


def _bytes_allowed() -> Iterator[int]:
    """Yield the bytes left in each cgroup that has a limit: the limit minus the memory that cannot be reclaimed."""
    for group in _groups("memory"):
        stat = _named_numbers(group / "memory.stat")
        above = stat.get("hierarchical_memory_limit")  # v1: includes ancestors that a container cannot see
        for files, current, reclaimable in _MEMORY_FILES:
            limits = [limit for limit in (above, *(_number(group / name) for name in files)) if limit is not None]
            used = _number(group / current)
            if limits and used is not None:
                yield min(limits) - max(0, used - sum(stat.get(name, 0) for name in reclaimable))


def _groups(controller: str) -> Iterator[Path]:
    """Yield the v1 and v2 folders of the cgroups that contain this process and may have the controller enabled."""
    # Always try the root: inside a container, it is the container's own cgroup.
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
    """Return a cgroup's folder. A container may see only its own subtree, but `path` starts at the host's root."""
    names = [name for name in path.split("/") if name not in ("", "..")]
    folders = (top.joinpath(*names[start:]) for start in range(len(names)))
    return next((folder for folder in folders if folder.is_dir()), top)


def _number(path: Path) -> int | None:
    """Return the integer in a file, or None if the file is missing or says "max" (no limit)."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _named_numbers(path: Path) -> dict[str, int]:
    """Return the NAME NUMBER lines of a file as a dictionary, which is empty if the file cannot be read."""
    with suppress(OSError):
        lines = re.findall(r"^[ \t]*(\S+)[ \t]+(-?\d+)(?!\S)", os.fsdecode(path.read_bytes()), re.MULTILINE)
        return {name: int(value) for name, value in lines}
    return {}


def version_of(name: str) -> str:
    """Return a package's version, or "not installed" if it has no metadata (for example, a source tree on sys.path)."""
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED
