"""When an interrupted plan can be resumed, and the error if it cannot."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import OPTIONS, VERSIONS, planned, write

from fastflower.errors import FolderError
from fastflower.packing.folder import scan
from fastflower.packing.plan import PLAN, Options, Plan, check_same, load_plan, save_plan


def interrupted(tmp_path: Path, contents: dict[str, bytes]) -> tuple[Path, Path, Plan]:
    """Return a folder with a broken link among its images, the workspace of its pack, and the plan."""
    root, work = write(tmp_path / "data", contents), tmp_path / "out" / ".packing"
    (root / "b/2.jpg").symlink_to("nowhere")
    work.mkdir(parents=True)
    save_plan(planned(root), work)
    return root, work, load_plan(work, root, whole=True)


FILES = {name: name.encode() for name in ("a/1.jpg", "a/2.jpg", "a/notes.txt", "b/1.jpg", "b/3.jpg", "c/1.jpg")}
OTHER = {"split_by": "random", "val_fraction": 0.5, "seed": 1, "shard_bytes": 2, "max_side": 64, "quality": 80}
OTHER |= {
    "on_bad": "fail",
    "on_conflict": "drop",
    "lists": True,
    "folds": 3,
    "pillow": "12.1",
    "opencv": "5.0",
    "fastflower": "2",
}


@pytest.mark.parametrize("name", OTHER)
def test_a_plan_with_another_option_or_version_is_refused(tmp_path: Path, name: str) -> None:
    root, work, plan = interrupted(tmp_path, FILES)
    options = Options(**(OPTIONS | {name: OTHER[name]} if name in OPTIONS else OPTIONS))
    versions: Any = VERSIONS | {name: OTHER[name]} if name in VERSIONS else VERSIONS
    before = (OPTIONS | VERSIONS)[name]
    what = f"holds an interrupted pack with {name} {before!r}, not {OTHER[name]!r}"
    text = f"{work}: {what}; use {name} {before!r} to resume, or remove {work} to start over."
    with pytest.raises(FolderError, match=f"^{re.escape(text)}$"):
        check_same(plan, scan(root), options, versions, work)


def test_a_plan_with_unknown_options_is_refused(tmp_path: Path) -> None:
    root, work, _ = interrupted(tmp_path, FILES)
    stored = json.loads((work / PLAN).read_text())
    del stored["options"]["lists"]
    (work / PLAN).write_text(json.dumps(stored))
    what = "holds an interrupted pack from a fastflower version with other options"
    text = f"{work}: {what}; resume with that version, or remove {work} to start over."
    with pytest.raises(FolderError, match=f"^{re.escape(text)}$"):
        load_plan(work, root, whole=True)


def joined(root: Path) -> None:
    """Replace two files by one with the concatenated path."""
    (root / "a/1.jpg").unlink()
    (root / "a/2.jpg").unlink()
    write(root, {"a/1.jpga/2.jpg": b"a/1.jpg"})


IGNORED = "has been added or removed"
CHANGES: list[tuple[Callable[[Path], object], str, str]] = [
    (lambda root: (root / "a/2.jpg").write_bytes(b"longer than before"), "a/2.jpg", "has been changed"),
    (lambda root: os.utime(root / "b/1.jpg", ns=(0, 1)), "b/1.jpg", "has been changed"),
    (lambda root: write(root, {"0/1.jpg": b""}), "0/1.jpg", "has been added"),
    (lambda root: write(root, {"c/2.jpg": b""}), "c/2.jpg", "has been added"),
    (lambda root: write(root, {"b/1b.jpg": b""}), "b/1b.jpg", "has been added"),  # before the broken link
    (lambda root: (root / "a/1.jpg").unlink(), "a/1.jpg", "has been removed"),
    (lambda root: shutil.rmtree(root / "c"), "c/1.jpg", "has been removed"),
    (lambda root: (root / "a/1.jpg").rename(root / "a/5.jpg"), "a/1.jpg", "has been removed"),
    (lambda root: (root / "b/3.jpg").rename(root / "b/0.jpg"), "b/0.jpg", "has been added"),
    (lambda root: (root / "a").rename(root / "z"), "a/1.jpg", "has been removed"),
    (joined, "a/1.jpg", "has been removed"),
    (lambda root: ((root / "a/2.jpg").unlink(), os.mkfifo(root / "a/2.jpg")), "a/2.jpg", "has been removed"),
    (lambda root: write(root, {"c/other.txt": b""}), "c/other.txt", IGNORED),
    (lambda root: (root / "a/notes.txt").unlink(), "a/notes.txt", IGNORED),
    (lambda root: write(root, {"train.txt": b"a/1.jpg\nb/1.jpg"}), "a/2.jpg", "has been removed"),
]


@pytest.mark.parametrize(("change", "path", "how"), CHANGES)
def test_a_change_in_the_folder_is_reported(
    tmp_path: Path, change: Callable[[Path], object], path: str, how: str
) -> None:
    root, work, plan = interrupted(tmp_path, FILES)
    check_same(plan, scan(root), Options(**OPTIONS), VERSIONS, work)
    change(root)
    since = f"since the pack into {work.parent} was interrupted"
    text = f"{root / path}: {how} {since}; undo this change to resume, or remove {work} to start over."
    with pytest.raises(FolderError, match=f"^{re.escape(text)}$"):
        check_same(plan, scan(root), Options(**OPTIONS), VERSIONS, work)


def test_a_pack_resumes_although_the_reasons_for_skipping_are_worded_differently(tmp_path: Path) -> None:
    root, work, plan = interrupted(tmp_path, FILES)
    assert plan.folder.ignored
    reworded = replace(plan.folder, ignored=tuple((path, "some other words") for path, _ in plan.folder.ignored))
    check_same(replace(plan, folder=reworded), scan(root), Options(**OPTIONS), VERSIONS, work)


def test_changed_classes_or_splits_of_the_same_images_are_reported(tmp_path: Path) -> None:
    lists = {"train.txt": b"a/1.jpg 0\nb/1.jpg 1", "classes.txt": b"one\ntwo"}
    root, work, plan = interrupted(tmp_path, FILES | lists)
    for changed in ({"classes.txt": b"one\nthree"}, {"val.txt": b""}):
        write(root, lists | changed)
        text = f"{root}: classes or splits have been changed since the pack into {work.parent} was interrupted; "
        with pytest.raises(FolderError, match=f"^{re.escape(text)}undo this"):
            check_same(plan, scan(root), Options(**OPTIONS), VERSIONS, work)


STATES = st.lists(st.sampled_from(["", "x", "yy", "link"]), min_size=8, max_size=8)
PLACES = [f"{folder}/{name}.jpg" for folder in "ab" for name in ("1", "10", "3", "x")]


def made(root: Path, states: list[str]) -> dict[str, str]:
    contents = dict(zip(PLACES, states, strict=True)) | {"a/2.jpg": "z", "b/2.jpg": "z"}
    write(root, {path: state.encode() for path, state in contents.items() if state not in ("", "link")})
    for path, state in contents.items():
        if state == "link":
            (root / path).symlink_to("nowhere")
        elif state:
            os.utime(root / path, ns=(0, 0))
    return {path: state for path, state in contents.items() if state}


@settings(deadline=None, max_examples=80, derandomize=True)
@given(before=STATES, now=STATES, same=st.booleans())
def test_a_reported_change_is_true(before: list[str], now: list[str], same: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        old, new = made(Path(folder) / "old", before), made(Path(folder) / "new", before if same else now)
        plan, found = planned(Path(folder) / "old"), scan(Path(folder) / "new")
        try:
            check_same(plan, found, Options(**OPTIONS), VERSIONS, Path("out/.packing"))
        except FolderError as error:
            path, how = str(error).removeprefix(f"{found.root}/").split(" since ")[0].split(": ")
            assert old.get(path) != new.get(path)
            assert how == (
                "has been added" if path not in old else "has been removed" if path not in new else "has been changed"
            )
        else:
            assert old == new
