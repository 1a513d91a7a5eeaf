"""What is said of a finished pack: its content, and warnings of skipped files, missing classes and unusual splits."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from fastflower.packing.again import packing
from fastflower.packing.folder import EMPTY_CLASS
from fastflower.packing.names import plain_name
from fastflower.shards.manifest import Manifest

_MOST_LINES = 20  # of each kind in the summary; manifest.json lists all
_MOST_NAMES = 10  # class names per warning
_MOST_REASONS, _MOST_FILES = 20, 3  # named for skipped files
_TOLERANCE = 0.05  # fraction of all images by which the val split may exceed val_fraction without a warning


def summary(manifest: Manifest) -> Iterator[str]:
    """Yield the lines that say what a pack holds, and where it is."""
    for name, split in manifest.splits.items():
        folds = f", {manifest.folds.count} folds" if manifest.folds and name == "train" else ""
        yield f"{name}: {split.samples} images in {len(split.shards)} shards{folds}"
    identical = [group for group in manifest.duplicates if group not in manifest.label_conflicts]
    yield from _listed("warning", [f"{item['path']}: {item['warning']}" for item in manifest.warnings])
    yield from _listed("the same image under two labels:", map(", ".join, manifest.label_conflicts))
    yield from _listed("identical:", map(", ".join, identical))
    near = [f"{item['path']} in {item['split']}, {item['train_path']} in train" for item in manifest.near_duplicates]
    yield from _listed("near-duplicate:", near)
    if near:
        yield f"near-duplicates of training images in other splits: {len(near)}; accuracy on them is optimistic"
    yield f"wrote {manifest.folder}"


def _listed(what: str, lines: Iterable[str]) -> Iterator[str]:
    lines = list(lines)
    yield from (f"{what} {printable(line)}" for line in lines[:_MOST_LINES])
    if len(lines) > _MOST_LINES:
        yield f"{what} {len(lines) - _MOST_LINES} more; see manifest.json"


def remarks(manifest: Manifest, ignored: Collection[str] = (), validation: int = 0) -> Iterator[str]:
    """Yield each warning, without the folder's name.

    ignored  Reasons for which files were skipped without reading them. validation  Number of images planned for val.
    """
    odd = len({item["path"] for item in manifest.warnings})
    if odd:
        yield f"decoded {odd} image{'s' if odd > 1 else ''} with warnings; see `warnings` in manifest.json"
    empty = [item["path"] for item in manifest.skipped if item["reason"] == EMPTY_CLASS]
    if empty:
        yield f"left out {counted(len(empty), 'class', 'classes')} without training images: {_few(empty)}"
    if len(manifest.skipped) > len(empty):
        yield "\n  ".join(_skipped(manifest, ignored))
    yield from _similar_classes(manifest.classes)
    yield from _folds(manifest) if manifest.folds else _validation(manifest, validation)
    for name, split in manifest.splits.items():
        absent = [label for label, count in zip(manifest.classes, split.class_counts, strict=True) if not count]
        if absent and split.samples:
            yield f"the {name} split has no images of {_few(absent)}: these classes will not be evaluated"


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_MOST_NAMES])) + (" and others" if len(names) > _MOST_NAMES else "")


def _folds(manifest: Manifest) -> Iterator[str]:
    numbers, labels = manifest.fold_numbers(), manifest.index("train")["label"]
    sizes = np.zeros((len(manifest.classes), int(numbers.max()) + 1), np.int64)  # images of each class in each fold
    np.add.at(sizes, (labels, numbers), 1)
    filled = (sizes > 0).sum(axis=1)
    uneven = np.ptp(sizes, axis=1) > 1
    for chosen, what in (
        (filled == 1, "all images of {} are in one fold, so training without it sees none: add images"),
        ((filled > 1) & (filled < sizes.shape[1]), "some folds have no images of {}: add images, or pack fewer folds"),
        (uneven, "folds differ by more than one image of {}, because copies and near-duplicates share a fold"),
    ):
        if names := [name for name, one in zip(manifest.classes, chosen, strict=True) if one]:
            yield what.format(_few(names))


def _skipped(manifest: Manifest, ignored: Collection[str]) -> Iterator[str]:
    """Yield a line for each reason, damaged files first, then the most frequent. Reasons that differ in numbers are one."""
    groups: dict[str, list[dict[str, str]]] = {}
    skipped = [item for item in manifest.skipped if item["reason"] != EMPTY_CLASS]
    for item in skipped:
        groups.setdefault(re.sub(r"\b\d[\d.,]*\b", "N", item["reason"]), []).append(item)
    unread = {key for key, items in groups.items() if items[0]["reason"] in ignored and "cannot be read" not in key}
    ordered = sorted(groups, key=lambda key: (key in unread, -len(groups[key])))
    yield f"skipped {counted(len(skipped), 'file')}; `skipped` in manifest.json lists all:"
    for key in ordered[:_MOST_REASONS]:
        items = groups[key]
        reason = items[0]["reason"] if len({item["reason"] for item in items}) == 1 else key
        names = ", ".join(item["path"] for item in items[:_MOST_FILES])
        if len(items) > _MOST_FILES:
            names = f"{len(items)} files ({names} and {counted(len(items) - _MOST_FILES, 'other')})"
        yield printable(f"{reason}: {names}")
    if rest := ordered[_MOST_REASONS:]:
        yield f"{counted(sum(len(groups[key]) for key in rest), 'file')} for {counted(len(rest), 'other reason')}"


def counted(count: int, noun: str, several: str = "") -> str:
    """Return a count with its noun: "1 class", "2 classes". several  Plural, if it does not just add an s."""
    return f"{count} {noun if count == 1 else several or f'{noun}s'}"


def printable(text: str) -> str:
    """Escape what would not print, because file names may contain line breaks and terminal escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _similar_classes(classes: Sequence[str]) -> Iterator[str]:
    first: dict[str, str] = {}
    for name in classes:
        other = first.setdefault(plain_name(name), name)
        if other != name and any(letter.isalnum() for letter in name):
            yield f"classes {other!r} and {name!r} differ only in case, spaces, punctuation or Unicode form"


def _validation(manifest: Manifest, planned: int) -> Iterator[str]:
    val, fraction = manifest.splits.get("val"), manifest.options["val_fraction"]
    if manifest.splits and "train" not in manifest.splits:
        if not manifest.options.get("as_split"):
            yield f"has only a {next(iter(manifest.splits))} split: evaluate on it; training needs a train split"
        return
    if fraction == 0:  # the caller wants no validation
        return
    if not val or not val.samples:
        remedy = "no class can spare an image: add images, or pack a folder with its own split"
        if max(manifest.splits["train"].class_counts) > 1:
            remedy = "classes can only spare copies, which stay together: add images."
            remedy += " If an older version planned this pack, pack again"
        if planned:
            remedy = f"{counted(planned, 'image')} for it cannot be read: replace damaged files"
            seed = int(manifest.options["seed"]) + 1
            remedy += f", or draw others:\n  {packing({'seed': seed}, goes_on=True)}" if fraction else ""
        elif fraction is None and val:
            remedy = f"add images to it, or draw a new split:\n  {packing({'split_by': 'class'}, goes_on=True)}"
        elif fraction is None:
            remedy = f"draw one from the training images:\n  {packing({'val_fraction': 0.2}, goes_on=True)}"
        yield f"has no images in split 'val', so training on these shards has nothing to validate on; {remedy}"
    elif fraction is not None:
        share = val.samples / sum(split.samples for split in manifest.splits.values())
        if share > fraction + _TOLERANCE:
            why = "each class with two or more images contributes at least one, and copies stay together"
            yield f"the val split holds {share:.0%} of the images, more than val_fraction {fraction:g}: {why}"
