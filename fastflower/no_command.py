"""Answers a command line that does not begin with a command: with the one that works, if it is clear."""

import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from fastflower.packing.advice import is_archive
from fastflower.packing.lists import is_table, neighbors
from fastflower.packing.names import is_image, split_in
from fastflower.suggestions import near_command


def answer(args: Sequence[str], commands: Collection[str]) -> str:
    """Return the error for a command line that does not begin with a command."""
    word, *rest = args
    told, is_place = f"unknown command {word!r}", "://" in word or os.path.lexists(word)
    if (is_place or word.startswith("-")) and (line := _in_order(args, commands)):
        return f"{told}; the command comes first:\n  {line}"
    if is_place:
        return told + _of_place(word, rest)
    if near := near_command(word, commands):
        return f"{told}; did you mean:\n  {shlex.join(['fastflower', near, *rest])}"
    return f"{told}; the command comes before its flags." if word.startswith("-") else f"{told}."


def _in_order(args: Sequence[str], commands: Collection[str]) -> str:
    """Return a command line with its command first, or "" if it has none. A word after a flag may be the flag's value."""
    places = [place for place, word in enumerate(args) if word in commands]
    if not places:
        return ""
    place = min(places, key=lambda place: args[place - 1].startswith("-"))
    before, after = args[:place], args[place + 1 :]
    others = [*after, *before] if before[0].startswith("-") else [*before, *after]  # flags last
    return shlex.join(["fastflower", args[place], *others])


def _of_place(word: str, rest: Sequence[str]) -> str:
    """Return what to type if a path or URL stands in place of the command."""
    path = Path(word)
    if is_image(word) and path.is_file():
        return f"; to classify this image, type fastflower {shlex.join(['predict', _newest_run(), word, *rest])}"
    if path.suffix == ".pt" or (path / "run.json").exists() or any(path.glob("checkpoint-*.pt")):
        return _of_run(path, rest)
    kind = "these shards" if "://" in word or (path / "manifest.json").exists() else "this folder"
    kind = "this archive" if is_archive(path) else "this table" if is_table(path) else kind
    return f"; to train on {kind}, type fastflower {shlex.join(['train', word, *rest])}"


def _of_run(path: Path, rest: Sequence[str]) -> str:
    from fastflower.models.weights_file import best_in
    from fastflower.reporting.record import read, shards_of_run
    from fastflower.training.command import to_resume

    if not best_in(path).is_file():
        return f"; to continue this run, type {to_resume(path)}"
    if any(map(is_image, rest)):
        return f"; to classify with this run, type fastflower {shlex.join(['predict', str(path), *rest])}"
    content = read(path if path.is_dir() else path.parent)
    shards = [] if rest and not rest[0].startswith("-") else [shards_of_run(content)]
    return f"; to score this run, type fastflower {shlex.join(['evaluate', str(path), *shards, *rest])}"


def splits_together(args: Sequence[str]) -> str:
    """Return what to type if a command has files or folders of several splits, such as train.txt val.txt; else ""."""
    prog, *args = args
    first, *others = [Path(word) for word in args if os.path.lexists(word)] or [Path()]
    flags = [word for word in args if word not in map(str, (first, *others))]
    found = [path for path in others if split_in(path.stem) and path.is_dir() == first.is_dir()]
    if not others or others != found or split_in(first.stem) != "train":
        return ""
    if first.is_dir() and {path.absolute().parent for path in others} == {first.absolute().parent}:
        line = shlex.join(["fastflower", prog, str(first.parent), *flags])
        return f"one folder holds all splits; type {line}"
    if is_table(first) and {path.absolute() for path in others} <= {path.absolute() for path in neighbors(first)}:
        line = shlex.join(["fastflower", prog, str(first), *flags])
        return f"{first} is packed with {' and '.join(map(str, others))} beside it; type {line}"
    return ""


def _newest_run() -> str:
    """Return the folder of the run in runs/ with the newest checkpoint, else CHECKPOINT, for which the user has a name."""
    found = Path("runs").glob("*/checkpoint-best.pt")
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return str(newest.parent) if newest else "CHECKPOINT"
