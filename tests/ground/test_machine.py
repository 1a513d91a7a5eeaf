"""Cores and memory in containers: cgroups v1, v2 and hybrid, nested, without limits, and with invalid files.

Each tree of files follows the kernel's layout (Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from packs import drawn
from places import ROOT

from fastflower import Loader, machine, pack
from fastflower.machine import available_bytes, cores
from fastflower.packing import packer
from fastflower.shards import verification

FREE = 64 << 30
UNLIMITED = 9223372036854771712  # v1 has no "max"

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write the files of a cgroup, and `own` to /proc/self/cgroup. The machine has 64 GiB free and 16 cores."""
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(16)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (tmp_path / "meminfo").write_text(f"MemTotal: {FREE // 512} kB\nMemFree: 1 kB\nMemAvailable: {FREE // 1024} kB\n")

    def files(place: str = "", *, own: str | None = None, **values: object) -> None:
        if own is not None:
            (tmp_path / "own").write_text(own)
        folder = tmp_path / "groups" / place
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            controller, _, rest = name.partition("_")
            (folder / f"{controller}.{rest}").write_text(f"{value}\n")

    return files


def v1(limit: object, used: int, *, inactive: int = 0, active: int = 0, above: object = UNLIMITED) -> dict[str, object]:
    stat = f"cache 7\ninactive_file 3\nhierarchical_memory_limit {above}\ntotal_cache {inactive + active}\n"
    stat += f"total_inactive_file {inactive}\ntotal_active_file {active}\ntotal_unevictable 0"
    return {"memory_limit_in_bytes": limit, "memory_usage_in_bytes": used, "memory_stat": stat}


def v2(limit: object, used: int, *, inactive: int = 0, active: int = 0, slab: int = 0) -> dict[str, object]:
    stat = (
        f"anon 5\nfile {inactive + active}\nshmem 11\nfile_mapped 13\nfile_dirty 17\ninactive_anon 19\nactive_anon 23\n"
    )
    stat += f"inactive_file {inactive}\nactive_file {active}\nunevictable 29\nslab_reclaimable {slab}\nslab_unreclaimable 31"
    return {"memory_max": limit, "memory_current": used, "memory_stat": stat, "memory_high": "max"}


def test_without_cgroups_memory_and_cores_are_the_machines(write: Write, tmp_path: Path) -> None:
    del write
    assert (available_bytes(), cores()) == (FREE, 16)
    (tmp_path / "own").write_text("0::/user.slice/session\n")
    assert (available_bytes(), cores()) == (FREE, 16)


def test_without_mem_available_free_pages_are_counted(write: Write, tmp_path: Path) -> None:
    del write
    for text in ("MemTotal: 1 kB\n", "MemAvailable:\n", "MemAvailable: much kB\n", ""):
        (tmp_path / "meminfo").write_text(text)
        assert 0 < available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_reclaimable_memory_counts_as_free(write: Write) -> None:
    """The page cache takes 7.9 of 8 GB: files read once (inactive), read again (active), and slab caches."""
    gb = 10**9
    for cached in (
        {"inactive": 79 * gb // 10},
        {"active": 79 * gb // 10},
        {"inactive": 5 * gb, "active": 29 * gb // 10},
    ):
        write(own="0::/\n", **v2(8 * gb, 8 * gb, **cached))
        assert available_bytes() == 79 * gb // 10
    write(**v2(8 * gb, 8 * gb, inactive=4 * gb, slab=gb))
    assert available_bytes() == 5 * gb
    write(**v2(8 * gb, 8 * gb))
    assert available_bytes() == 0, "anonymous memory cannot be reclaimed"
    write(**v2(8 * gb, gb, inactive=2 * gb))
    assert available_bytes() == 8 * gb, "the files are read one after the other, so they may disagree"


def test_v1_limits_memory(write: Write) -> None:
    write("memory", own="4:memory:/\n", **v1(1 << 30, 300 << 20))
    assert available_bytes() == 724 << 20
    write("memory", **v1(1 << 30, 1 << 30, inactive=500 << 20, active=24 << 20))
    assert available_bytes() == 524 << 20, "total_* counts all groups below, not only this one"
    write("memory", **v1(UNLIMITED, 300 << 20))
    assert available_bytes() == FREE


def test_the_smallest_limit_of_nested_groups_applies(write: Write) -> None:
    write("a/b", own="1:cpu:/elsewhere\n0::/a/b\n", **v2("max", 1000))
    assert available_bytes() == FREE
    write("a/b", **v2(9000, 2000))
    assert available_bytes() == 7000
    write("a", **v2(8000, 5000))
    assert available_bytes() == 3000
    write("a", **v2(8000, 9000))
    assert available_bytes() == 0
    write("a", **v2(8000, 9000, active=7500))
    assert available_bytes() == 6500
    write("a/b/c", **v2(1, 1))
    assert available_bytes() == 6500, "a group below limits only its own processes"


def test_the_smallest_limit_of_nested_v1_groups_applies(write: Write) -> None:
    write("memory/kubepods/pod1/c", own="3:pids:/x\n9:memory:/kubepods/pod1/c\n", **v1(9000, 2000))
    assert available_bytes() == 7000
    write("memory/kubepods/pod1", **v1(8000, 5000))
    assert available_bytes() == 3000
    write("memory", **v1(UNLIMITED, 1 << 40))
    assert available_bytes() == 3000


def test_memory_above_memory_high_is_not_available(write: Write) -> None:
    """The kernel throttles processes above memory.high."""
    write(own="0::/\n", **v2(9000, 2000) | {"memory_high": 5000})
    assert available_bytes() == 3000
    write(**v2("max", 2000) | {"memory_high": 5000})
    assert available_bytes() == 3000


@pytest.mark.parametrize("own", ["0::/\n", "0::/docker/4f1c\n", "0::/../other\n", None, ""])
def test_a_container_sees_its_own_group_as_the_root(write: Write, own: str | None) -> None:
    write(own=own, **v2(600, 100), cpu_max="150000 100000")
    assert (available_bytes(), cores()) == (500, 2)


@pytest.mark.parametrize(
    "own", ["4:memory:/\n5:cpu,cpuacct:/\n", "4:memory:/docker/4f1c\n5:cpu,cpuacct:/docker/4f1c\n", None]
)
def test_a_container_sees_its_own_v1_group_as_the_root(write: Write, own: str | None) -> None:
    """memory.stat has the limit of a group above that is not mounted, for example a pod's."""
    write("memory", own=own, **v1(600, 100))
    write("cpu", cpu_cfs_quota_us=150000, cpu_cfs_period_us=100000)
    assert (available_bytes(), cores()) == (500, 2)
    write("memory", **v1(600, 100, above=400))
    assert available_bytes() == 300


def test_a_group_inside_a_container_with_the_hosts_path_is_found(write: Write) -> None:
    write("memory", own="4:memory:/docker/4f1c/job\n", **v1(8000, 1000))
    write("memory/job", **v1(3000, 1000))
    assert available_bytes() == 2000


def test_in_a_hybrid_hierarchy_controllers_of_both_versions_are_found(write: Write) -> None:
    own = "5:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/job\n0::/job\n"
    write("memory/job", own=own, **v1(5000, 1000))
    write("cpu,cpuacct/job", cpu_cfs_quota_us=300000, cpu_cfs_period_us=100000)
    write("unified/job", cgroup_procs="")
    assert (available_bytes(), cores()) == (4000, 3)
    write("unified/job", own=own, **v2(3000, 1000))
    assert available_bytes() == 2000, "v2 may have the memory controller too"


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 16),
        ("50000 100000", 1),
        ("100000 100000", 1),
        ("150000 100000", 2),
        ("250000 100000", 3),
        ("30000 10000", 3),
        ("6400000 100000", 16),
        ("1000 1000000", 1),
        ("max", 16),
        ("", 16),
        ("1 0", 16),
        ("many cores", 16),
    ],
)
def test_a_cpu_quota_is_rounded_up(write: Write, quota: str, expected: int) -> None:
    write("job", own="0::/job\n", cpu_max=quota)
    assert cores() == expected


@pytest.mark.parametrize(
    ("quota", "period", "expected"),
    [(-1, 100000, 16), (50000, 100000, 1), (250000, 100000, 3), (5, 0, 16), ("x", "", 16)],
)
def test_a_v1_cpu_quota_is_rounded_up(write: Write, quota: object, period: object, expected: int) -> None:
    for mount in ("cpu", "cpu,cpuacct"):
        write(f"{mount}/job", own="2:cpu,cpuacct:/job\n", cpu_cfs_quota_us=quota, cpu_cfs_period_us=period)
        assert cores() == expected


def test_the_smallest_quota_of_nested_groups_applies_and_ranks_share_it(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("pod", own="0::/pod/c\n", cpu_max="600000 100000")
    write("pod/c", cpu_max="max 100000")
    assert cores() == 6
    write("pod/c", cpu_max="1200000 100000")
    assert cores() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores() == 1


@pytest.mark.parametrize("text", ["", "garbage\n", "0:\n", "::::\n", "0::/caf\xe9\n", "0::relative\n", "x" * 10000])
def test_invalid_files_mean_no_limit_and_no_error(write: Write, tmp_path: Path, text: str) -> None:
    write(own="", memory_max="lots", memory_current="-", memory_stat="inactive_file\nx y z\n\n")
    (tmp_path / "own").write_bytes(text.encode("latin-1"))
    assert (available_bytes(), cores()) == (FREE, 16)
    write(memory_max="7000", memory_current="1000", memory_stat="inactive_file many\n\xff")
    assert available_bytes() == 6000


@pytest.mark.parametrize(
    ("held", "count", "here", "expected"),
    [(128, 128, 1, 128), (8, 128, 1, 8), (128, 128, 4, 32), (8, 32, 4, 8), (2, 2, 4, 1)],
)
def test_cores_and_workers_follow_the_affinity_mask(
    held: int, count: int, here: int, expected: int, write: Write, monkeypatch: pytest.MonkeyPatch, shards: Path
) -> None:
    """A launcher may pin each rank to its own cores. These are not divided among ranks again."""
    write(own="0::/\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(held)))
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    assert cores() == expected
    assert Loader(shards).workers == expected + 1


def test_loader_pack_and_verify_obey_the_quota(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(own="0::/\n", cpu_max="300000 100000")
    asked: list[int] = []

    def pool(workers: int, **options: Any) -> ThreadPoolExecutor:
        asked.append(workers)
        return ThreadPoolExecutor(workers, **options)

    monkeypatch.setattr(packer, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(verification, "ThreadPoolExecutor", pool)
    pack(drawn(tmp_path / "data", a=4, b=4), tmp_path / "shards")
    assert asked == [3, 2], "two shard workers share the cores"
    assert verification.verify(tmp_path / "shards") == []
    assert asked == [3, 2, 3]
    assert Loader(tmp_path / "shards", batch_size=2).workers == 4


def test_only_machine_counts_cores() -> None:
    """Except the baseline, which does not import the library, and code that records the hardware."""
    counting = ("cpu_count", "sched_getaffinity", "ThreadPoolExecutor()")
    found = {
        path.name
        for folder in ("fastflower", "tools", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if any(name in path.read_text() for name in counting)
    }
    assert found == {"machine.py", "devices.py", "record.py", "baseline.py"}
