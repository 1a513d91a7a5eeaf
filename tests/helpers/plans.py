"""Packing plans of small folders."""

from pathlib import Path
from typing import Any

from fastflower.packing.folder import scan
from fastflower.packing.plan import Options, Plan, make_plan

OPTIONS: Any = {"split_by": "class", "val_fraction": 0.25, "seed": 0, "shard_bytes": 1000}
OPTIONS |= {"max_side": None, "quality": None, "on_bad": "skip", "on_conflict": "keep", "lists": False, "folds": None}
VERSIONS = {"fastflower": "0.1.0", "pillow": "12.0.0", "opencv": "4.12.0"}


def write(root: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def numbered(root: Path, **counts: int) -> Path:
    """Write the given number of different files of equal size for each class, and return the folder."""
    names = [f"{name}/{number:03d}.jpg" for name, count in counts.items() for number in range(count)]
    return write(root, {name: name.rjust(20).encode() for name in names})


def planned(root: Path, **options: Any) -> Plan:
    return make_plan(scan(root), Options(**(OPTIONS | options)), VERSIONS)
