"""Decides which subfolders of a folder of images are classes and which are splits.

An ambiguous layout raises an error that lists the possible readings, with a command for each. `folder.scan` looks for
lists first, then for splits, then for class folders. In this module, `tops` are the names of the root's subfolders.
"""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from fastflower.errors import FolderError
from fastflower.files import blame_the_system
from fastflower.packing.again import packing, quoted
from fastflower.packing.hidden import entries, patterns_ignored
from fastflower.packing.names import (
    FOLDS,
    SPLIT_WORDS,
    is_generic,
    is_image,
    is_no_class_name,
    is_to_predict,
    splits_named,
    words_of,
)

_MOST_NAMES = 6  # per message
_DEEPEST = 20  # folder levels to search for class folders


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def subfolders(root: Path) -> list[str]:
    """Return the sorted names of subfolders that are neither hidden nor ignored (ImageFolder would include .git)."""
    return sorted(entry.name for entry in entries(root) if is_folder(entry))


def holds_images(folder: Path) -> bool:
    """Return whether a file in the folder, or in a readable folder below it, has an image extension."""
    seen: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        path = pending.pop()
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            for entry in entries(path):
                if is_folder(entry):
                    pending.append(path / entry.name)
                elif is_image(entry.name):
                    return True
        except OSError as error:
            blame_the_system(error, path)
            if path == folder:
                raise
    return False


def _inner(root: Path, top: str) -> str:
    """Descend from `top` while there is only one subfolder. For data/flowers/CLASS, return data/flowers."""
    for _ in range(_DEEPEST):
        inside = subfolders(root / top)
        if len(inside) != 1 or has_own_images(root / top):
            break
        if splits_named(inside) and inside[0].lower() != Path(top).name.lower():
            break
        top = f"{top}/{inside[0]}"
    return top


def are_splits(root: Path, tops: Sequence[str], named: dict[str, str]) -> bool:
    """Return whether subfolders are splits: some of several, or a val or test split with class folders alone.

    named  Those with the name of a split.
    """
    alone = len(tops) == 1 and "train" not in named.values()
    return bool(named) and (len(tops) > 1 or (alone and _class_parent(root, tops[0]) is not None))


def places_of_splits(root: Path, named: dict[str, str], tops: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Map each split folder that has class folders to the parent of its class folders, train first.

    Returns also the folders of unlabeled images. Only test splits and folders of images to predict may be unlabeled.
    Raises FolderError if other folders with images are next to the splits, or if class folders are missing elsewhere.
    """
    unlabeled = [top for top in tops if top not in named and is_to_predict(top) and _class_parent(root, top) is None]
    others = [top for top in tops if top not in (*named, *unlabeled) and holds_images(root / top)]
    if others:
        raise _splits_beside_others(root, named, others)
    full = [top for top in named if holds_images(root / top)]
    if not full:
        remedy = f"put the images of each class into {root / next(iter(named))}/CLASS"
        raise FolderError(f"{root}: has no images in {_names(named)}; {remedy}.")
    if len({named[top] for top in full}) < len(full):
        raise _duplicate_split(root, {top: named[top] for top in full})
    bases = _class_parents(root, full)
    train = next((top for top in bases if named[top] == "train"), None)
    if train is None and len(full) == len(bases) == 1:
        return bases, unlabeled  # a val or test split alone
    if train is None:
        what = f"has folders named after splits ({_names(named)}), but no training split with class folders"
        raise _ambiguous(
            root, what, [*_subfolders_as_classes(root, bases), _to_label(root, full), _as_classes(root, full)]
        )
    bare = [top for top in full if top not in bases]
    unlabeled += [top for top in bare if named[top] == "test"]
    if len(unlabeled) < len(bare) or (len(bases) == 1 and not unlabeled):
        raise _missing_class_folders(root, bases, bare, [top for top in bare if top not in unlabeled])
    inside = subfolders(root / bases[train])
    if len(inside) > 1 and (generic := [name for name in inside if is_generic(name)]):
        places = [f"{base}/{name}" for base in bases.values() for name in generic]
        raise _generic_folders(root, bases[train], generic, inside, places)
    return bases, unlabeled


def partly_labeled(root: Path, named: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the parents of the class folders of each split, as `places_of_splits` does, and the splits without class folders.

    Both are empty unless the training split has class folders and another split has images without them.
    """
    full = [top for top in named if holds_images(root / top)]
    bases = _class_parents(root, full)
    bare = [top for top in full if top not in bases]
    return (bases, bare) if bare and "train" in (named[top] for top in bases) else ({}, [])


def _class_parents(root: Path, tops: Iterable[str]) -> dict[str, str]:
    """Map each folder to the folder that directly holds its class folders, if there is one."""
    return {top: base for top in tops if (base := _class_parent(root, top)) is not None}


def _class_parent(root: Path, top: str) -> str | None:
    """Return the parent of a split's class folders, or None if there are none.

    The parent is the split's folder, or its only subfolder if that has the same name or a name like "images".
    """
    base, inside = top, subfolders(root / top)
    while len(inside) == 1 and (inside[0].lower() == top.lower() or is_no_class_name(inside[0])):
        deeper = subfolders(root / base / inside[0])
        if not deeper:
            return None
        base, inside = f"{base}/{inside[0]}", deeper
    return None if all(map(is_no_class_name, inside)) else base


def check_classes(root: Path, tops: Sequence[str], resplit: bool) -> None:
    """Raise FolderError if class folders seem to contain classes or splits. resplit  Whether to allow splits in them."""
    if len(tops) == 1:
        refuse_wrapper(root, tops[0])
        return
    inner = {top: _inner(root, top) for top in tops}
    inside = {top: subfolders(root / inner[top]) for top in tops}
    nested = [(top, split) for top in tops for split in splits_named(inside[top])]
    if nested and not resplit:
        full = [top for top in tops if holds_images(root / top)]
        if len(full) == 1:
            refuse_wrapper(root, full[0])
        raise _nested_splits(root, tops, [(inner[top], split) for top, split in nested])
    for top in tops:
        beside = set(inside[top])
        rest = [other for other in tops if other != top]
        again = [other for other in rest if other in beside]
        if len(again) > 1 and 4 * len(again) >= 3 * len(rest):
            what = f"has the same folders in {top!r} as next to it ({_names(again)})"
            reading = f"use {_names(rest)} as classes and skip {top!r}", _skip_and_pack(root, [top])
            raise _ambiguous(root, what, [*_subfolders_as_classes(root, [top]), reading, _as_classes(root, tops)])
    shared = sorted(set[str].intersection(*map(set, inside.values())) - {name for _, name in nested})
    generic = [name for name in shared if is_generic(name)]
    if generic and len(shared) > 1 and all(top == inner[top] for top in tops):
        what = f"has the folders {_names(shared)} in each of {_names(tops)}"
        reading = f"use {_names(tops)} as classes with only the images in {generic[0]!r}"
        command = list_and_pack(root, f"*/{quoted(generic[0])}")
        raise _ambiguous(root, what, [(reading, command), _as_classes(root, tops)])
    folds = len(shared) > 1 and all(FOLDS.issuperset(words_of(top)) for top in tops)
    if (folds or len(shared) >= len(tops)) and not any(has_own_images(root / inner[top]) for top in tops):
        what = f"has the same folders ({_names(shared)}) in each of {_names(inner.values())}"
        raise _ambiguous(root, what, [*_subfolders_as_classes(root, tops), _as_classes(root, tops)])
    if len({re.sub(r"\d+$", "", top) for top in tops}) == 1 and FOLDS.intersection(words_of(tops[0])):
        what = f"has folders that may be parts of one data set ({_names(tops)})"
        raise _ambiguous(root, what, [_to_label(root, tops), _as_classes(root, tops)])
    generic = [top for top in tops if is_generic(top)]
    if generic and any(holds_images(root / top) for top in tops if top not in generic):
        raise _generic_folders(root, ".", generic, tops, generic)


def shared_folders(root: Path, tops: Sequence[str]) -> list[str]:
    """Return the folders that each of `tops` has, if none of `tops` has images besides."""
    if any(has_own_images(root / top) for top in tops):
        return []
    return sorted(set[str].intersection(*(set(subfolders(root / top)) for top in tops)))


def has_own_images(folder: Path) -> bool:
    """Return whether a file directly in the folder has an image extension."""
    return any(is_image(entry.name) for entry in entries(folder))


def refuse_wrapper(root: Path, top: str) -> None:
    """Raise FolderError if the only folder with images has subfolders, because it is then a wrapper and not a class."""
    deepest = path = root / top
    for _ in range(_DEEPEST):
        inside = subfolders(path)
        if len(inside) > 1:
            inside = [name for name in inside if holds_images(path / name)]
        if inside:
            deepest = path
        if len(inside) != 1:
            break
        path /= inside[0]
    if subfolders(root / top):
        what = f"has one class, {top!r}; a classifier needs at least two class folders."
        raise FolderError(f"{root}: {what} If they are in {deepest}, pass that folder.")


def _ambiguous(root: Path, what: str, readings: Sequence[tuple[str, str]]) -> FolderError:
    """Return an error that lists the possible readings of a folder, with a command for each."""
    lines = [
        f"{root}: {what}. This layout is ambiguous; choose one:",
        *(f"to {reading}: {command}" for reading, command in readings),
    ]
    return FolderError("\n  ".join(lines))


def _splits_beside_others(root: Path, named: dict[str, str], others: list[str]) -> FolderError:
    what = f"has folders named after splits ({_names(named)}) next to other folders of images ({_names(others)})"
    readings: list[tuple[str, str]] = []
    bases = _class_parents(root, named)
    if _splits_fit(root, named, bases):
        readings.append((f"use {_names(bases)} as splits and skip {_names(others)}", _skip_and_pack(root, others)))
    if len(others) > 1:
        with suppress(FolderError):  # raised if `others` contain classes or splits, and so are not classes
            check_classes(root, others, resplit=False)
            reading = f"use {_names(others)} as classes and skip {_names(named)}"
            readings.append((reading, _skip_and_pack(root, list(named))))
    readings += _subfolders_as_classes(root, [*named, *others])
    return _ambiguous(root, what, [*readings, _as_classes(root, [*named, *others])])


def _splits_fit(root: Path, named: dict[str, str], bases: dict[str, str]) -> bool:
    """Return whether train has more than one class and includes every class of the other splits."""
    if len(bases) < 2 or named[next(iter(bases))] != "train":
        return False
    train, *others = [set(subfolders(root / base)) for base in bases.values()]
    return len(train) > 1 and train.issuperset(set[str]().union(*others))


def _missing_class_folders(root: Path, bases: dict[str, str], bare: list[str], val: list[str]) -> FolderError:
    """Return the error for splits without class folders.

    bare  All splits without class folders. val  Those of them that are not test splits.
    """
    only = len(bases) == 1
    what = f"has class folders only in {_names(bases)}" if only else f"has no class folders in {_names(val)}"
    readings = _subfolders_as_classes(root, [next(iter(bases))], " and draw the val split from them")
    if val and not only:
        readings.append((f"skip {_names(val)}", _skip_and_pack(root, val)))
    if bare:
        readings.append(_to_label(root, bare))
    return _ambiguous(root, what, readings)


def _generic_folders(
    root: Path, base: str, generic: Sequence[str], tops: Sequence[str], places: Sequence[str]
) -> FolderError:
    """Return the error for folders that may hold images of any class.

    base  Parent of all folders in `tops`, which include `generic`. places  Paths of the generic folders in all splits.
    """
    what = f"has other folders next to {_names(generic)}, which may hold images of any class"
    others = [top for top in tops if top not in generic and holds_images(root / base / top)]
    readings = _subfolders_as_classes(root, [os.path.normpath(f"{base}/{top}") for top in generic])
    if len(others) > 1:
        readings.append((f"use {_names(others)} as classes and skip {_names(generic)}", _skip_and_pack(root, places)))
    return _ambiguous(root / base, what, [*readings, _to_label(root / base, generic), _as_classes(root / base, tops)])


def _duplicate_split(root: Path, named: dict[str, str]) -> FolderError:
    splits = list(named.values())
    twice = [top for top, split in named.items() if splits.count(split) > 1]
    readings: list[tuple[str, str]] = []
    if len({named[top] for top in twice}) == 1:
        for top in twice:
            rest = [other for other in twice if other != top]
            readings.append((f"use {top!r} as the split and skip {_names(rest)}", _skip_and_pack(root, rest)))
    kinds = {top: [word for word in words_of(top) if word not in SPLIT_WORDS] for top in named}
    for kind in dict.fromkeys(map(tuple, kinds.values())):
        tops, rest = ([top for top in named if (tuple(kinds[top]) == kind) == same] for same in (True, False))
        if (
            rest
            and len({named[top] for top in tops}) == len(tops)
            and _splits_fit(root, named, _class_parents(root, tops))
        ):
            readings.append((f"use {_names(tops)} as splits and skip {_names(rest)}", _skip_and_pack(root, rest)))
    places = {top: f"{split}/{'-'.join(kinds[top])}" for top, split in named.items()}
    if len(set(places.values())) == len(named) and not any(place.endswith("/") for place in places.values()):
        by_split = Path(f"{root.absolute()}-by-split")
        links = [f"ln -s {quoted(root.absolute() / top)} {quoted(by_split / place)}" for top, place in places.items()]
        folders = " ".join(quoted(by_split / split) for split in dict.fromkeys(splits))
        command = " && ".join([f"mkdir -p {folders}", *links, packing(source=by_split, shell=True)])
        readings.append(("use each folder as one class of its split", command))
    what = f"has more than one folder for the same split ({_names(twice)})"
    return _ambiguous(root, what, [*readings, _as_classes(root, list(named))])


def _nested_splits(root: Path, tops: Sequence[str], nested: Sequence[tuple[str, str]]) -> FolderError:
    """Return the error for split folders inside class folders. nested  Pairs of (class folder, split folder in it)."""
    readings: list[tuple[str, str]] = []
    for top in dict.fromkeys(top for top, _ in nested):
        named = splits_named(subfolders(root / top))
        if _splits_fit(root / top, named, _class_parents(root / top, named)):
            readings.append((f"use the splits in {top!r}", packing(source=root / top, shell=True)))
    classes = [(top, split) for top, split in nested if "/" not in top]
    if len({top for top, _ in classes}) > 1:
        place = f"{root.absolute()}-by-split"
        by_split = quoted(place)
        splits = " ".join(map(quoted, sorted({split for _, split in classes})))
        command = (
            f'(cd {quoted(root)} && for split in {splits}; do mkdir -p {by_split}/"$split"; for class in '
            f'*/; do [ -d "$class$split" ] && ln -s "$PWD/$class$split" {by_split}/"$split/${{class%/}}"; done; done); '
            f"{packing(source=place, shell=True)}"
        )
        readings.append(("keep the splits inside each class", command))
    try:
        check_classes(root, tops, resplit=True)
        readings.append(("draw a new split from all images", _pack(root, split_by="class")))
    except FolderError:  # `tops` cannot be classes
        readings.append(_as_classes(root, tops))
    (top, split), *_ = nested
    path, name = f"{top}/{split}", top.partition("/")[0]
    return _ambiguous(root, f"has {path!r}, which is named after a split but is inside the class {name!r}", readings)


def _subfolders_as_classes(root: Path, tops: Iterable[str], also: str = "") -> list[tuple[str, str]]:
    """For each folder with several subfolders, return the line of an error message that suggests using these as classes."""
    several = [top for top in (_inner(root, top) for top in tops) if len(subfolders(root / top)) > 1]
    return [
        (f"use the folders in {top!r} as classes{also}", packing(source=root / top, shell=True))
        for top in several[:_MOST_NAMES]
    ]


def _skip_and_pack(root: Path, tops: Sequence[str]) -> str:
    """Return the command that packs the rest of a folder."""
    return _pack(root, [top for top in tops if (root / top).exists()])


def _pack(root: Path, skipped: Sequence[str] = (), **changes: object) -> str:
    """Return the command that packs a folder without `skipped` and without what is ignored already."""
    patterns = [*patterns_ignored(), *(f"/{glob.escape(top)}" for top in skipped)]
    return packing({"ignore": patterns, **changes}, source=root, shell=True)


def _to_label(root: Path, tops: Sequence[str]) -> tuple[str, str]:
    """Return the line of an error message that suggests labeling the unlabeled images."""
    command = packing({"labels": ["FILE"]}, source=root, shell=True)
    return f"label the images in {_names(tops)}", f"put them into {root / tops[0]}/CLASS, or pass a table: {command}"


def _as_classes(root: Path, tops: Sequence[str]) -> tuple[str, str]:
    """Return the line of an error message that suggests using every folder as a class. Its command writes a list."""
    names = " ".join(map(quoted, tops)) if len(tops) <= _MOST_NAMES else "*/"
    return f"use {_names(tops)} as classes", list_and_pack(root, names)


def list_and_pack(root: Path, names: str) -> str:
    """Return the command that lists all files in the folders `names` and then packs them."""
    hidden = "-not -path '*/.*' -not -path '*/@eaDir/*'"  # a list could name them
    return f"(cd {quoted(root)} && find -L {names} -type f {hidden} > train.txt) && {_pack(root, split_by='class')}"


def _names(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:_MOST_NAMES])) + (" and others" if len(names) > _MOST_NAMES else "")
