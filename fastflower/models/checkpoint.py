"""Checkpoint files: a trained network and everything needed to use it or to resume training."""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from shlex import quote
from typing import Any, Self, TypedDict, cast
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from fastflower.errors import ArgumentError, CheckpointError, FastflowerError, require
from fastflower.files import blame_the_system, flush, is_full, written
from fastflower.models.backbone import build
from fastflower.models.sizes import require_sizes
from fastflower.models.weights_file import BEST, best_in, load_file, not_finite
from fastflower.recipes.recipe import Recipe
from fastflower.shards.kinds import image_kind
from fastflower.shards.manifest import FILE
from fastflower.suggestions import command_typed, fields_by_name

FORMAT_VERSION = 2
LAST = "checkpoint-last.pt"  # in a run's folder


class EpochSoFar(TypedDict, total=False):
    """Totals over all ranks for the finished steps of the current epoch; {} between epochs."""

    losses: Tensor
    """(steps,) float64, the mean loss of each step."""
    hits: int
    """Number of correct predictions. The name is kept so that existing files still load."""
    seconds: float
    """Seconds that the steps took on this rank."""
    waited: float
    """Part of `seconds` that was spent waiting for data."""
    trained: bool
    """Whether training for the epoch, including any model soup update, is finished and only validation is left."""


@fields_by_name
@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Training state after an epoch or in the middle of one. The file can be loaded with weights_only=True."""

    recipe: Recipe
    classes: tuple[str, ...]
    model: dict[str, Tensor]
    """state_dict of the network for evaluation and prediction. Holds the averaged weights if the recipe averages weights."""
    epoch: int
    """Number of finished epochs."""
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    """One row per epoch; see `Report`."""
    optimizer: dict[str, Any] = field(default_factory=dict[str, Any])
    scaler: dict[str, float] = field(default_factory=dict[str, float])
    """State of the loss scaler for float16."""
    trained: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The weights being trained, if `model` is an average; training resumes from them."""
    soup: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Mean weights of the finished runs of a model soup."""
    tally: EpochSoFar = field(default_factory=EpochSoFar)
    """Totals so far, if saved in the middle of an epoch."""
    feeding: dict[str, object] = field(default_factory=dict[str, object])
    """The loader's `state_dict`, which identifies its shards."""
    environment: dict[str, str] = field(default_factory=dict[str, str])
    file: Path | None = field(default=None, compare=False)
    """Where it was loaded from, which tells where its run lies. Not stored in the file."""

    def __repr__(self) -> str:
        text = f"backbone={self.recipe.backbone!r}, classes={len(self.classes)}, epoch={self.epoch}"
        if self.step:
            text += f", step={self.step}"
        if self.history and "val_accuracy" in self.history[-1]:
            text += f", val_accuracy={self.history[-1]['val_accuracy']:.3f}"
        return f"Checkpoint({text})"

    @property
    def fold(self) -> int | None:
        """The fold that the network was validated on, or None. It was trained on the others."""
        return cast("int | None", self.feeding.get("fold"))

    @property
    def step(self) -> int:
        """Number of finished steps in the current epoch."""
        return len(self.tally.get("losses", ()))

    def save(self, path: str | Path, *, twin: str | Path | None = None) -> None:
        """Write the file atomically. Raises CheckpointError if it cannot be written.

        twin  A file that this checkpoint was just saved to. If possible, `path` becomes a hard link to it, at no cost. A later
              save to either path leaves the other unchanged, because files are replaced, never modified.
        """
        path = Path(path)
        content: dict[str, object] = {"format": "fastflower", "version": FORMAT_VERSION}
        content |= {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "file"}
        content["recipe"] = self.recipe.to_dict()
        try:
            path.with_name(path.name + ".part").unlink(missing_ok=True)  # left by a killed run of an older fastflower
            with written(path) as part:
                if twin is None or not _linked(Path(twin), part):
                    with part.open("wb") as file:
                        torch.save(content, file)
                        flush(file)
        except (OSError, RuntimeError) as error:  # torch's writer hides an OSError, for example when the disk is full
            reason = error if isinstance(error, OSError) else error.__context__ or error
            blame_the_system(reason, path)
            remedy = "Free up space" if is_full(reason) else f"Make {path.parent} writable"
            raise CheckpointError(
                f"{path}: could not be written ({reason}); any previous file is unchanged. {remedy}, then resume."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a checkpoint, or the best one of a run's folder.

        Raises CheckpointError if the file is not a usable checkpoint of this version.
        """
        known = isinstance(path, (str, os.PathLike))  # pyright: ignore[reportUnnecessaryIsInstance]  (callers may be untyped)
        require(known, "checkpoint", "a path or a Checkpoint", path)
        path = _file(Path(path))
        content = load_file(path)
        if content.get("format") != "fastflower":
            raise CheckpointError(f"{path}: is not a fastflower checkpoint; pass a checkpoint-best.pt from train.")
        if content.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: has checkpoint version {content.get('version')}, but this fastflower reads version "
                f"{FORMAT_VERSION}; train again, or use the version of fastflower that wrote it."
            )
        try:
            recipe = Recipe.from_dict(content["recipe"]).resolved
            rest = {key: content[key] for key in content.keys() - {"format", "version", "recipe", "classes"}}
            return cls(recipe=recipe, classes=tuple(content["classes"]), file=path, **rest)._usable(str(path))
        except CheckpointError:
            raise
        except (KeyError, TypeError, FastflowerError) as error:
            raise CheckpointError(
                f"{path}: is damaged or from another version of fastflower ({error}); pass another one."
            ) from error

    def network(self) -> nn.Module:
        """Build the trained network on the CPU, in evaluation mode. Raises CheckpointError if the weights cannot be used."""
        self._usable("checkpoint")
        require_sizes(self.recipe)
        model = build(self.recipe.backbone, len(self.classes), weights=None, size=self.recipe.augment.output_size)
        try:
            model.load_state_dict(self.model)
        except RuntimeError as error:
            what = f"{self.recipe.backbone} with {len(self.classes)} classes"
            raise CheckpointError(f"checkpoint: weights do not fit {what} ({error}); pass another one.") from None
        return model.eval()

    def _usable(self, name: str) -> Self:
        """Return self. Raises CheckpointError if two classes share a name or the weights are not finite."""
        twice = [one for one, count in Counter(self.classes).items() if count > 1]
        if twice:
            raise CheckpointError(
                f"{name}: two of its classes are named {twice[0]!r}, so their probabilities are ambiguous; pass another "
                f"checkpoint, or train again on shards with unique class names."
            )
        if broken := not_finite(self.model):
            raise CheckpointError(
                f"{name}: weights are not finite ({broken}), so it cannot predict; pass another checkpoint, or train again "
                f"with a lower lr."
            )
        return self


def _file(path: Path) -> Path:
    """Return a checkpoint's file, in a run's folder the best one. Raises CheckpointError for shards and images."""
    path = best_in(path)
    if path.is_dir() and (path / LAST).is_file():
        line = f"fastflower train SHARDS --out {quote(str(path))} --resume"
        line = line if command_typed() else f"train(shards, out={str(path)!r}, resume=True)"
        raise CheckpointError(
            f"{path}: no epoch of this run is finished; resume it ({line}), or pass "
            f"{path / LAST}, its weights as they are."
        )
    folder = path.parent if path.suffix == ".pt" else path
    names = [] if folder.exists() else [file.parent.name for file in folder.parent.glob(f"*/{BEST}")]
    if near := get_close_matches(folder.name, names, 1):
        raise CheckpointError(f"{path}: does not exist; did you mean {folder.with_name(near[0])}?")
    if path.is_file() and path.suffix != ".pt" and (path.parent / BEST).is_file():
        raise CheckpointError(f"{path}: is no checkpoint, but lies in the folder of a run; pass {path.parent}.")
    if runs := sorted(path.glob(f"*/{BEST}"), key=lambda file: file.stat().st_mtime):
        raise CheckpointError(f"{path}: is a folder of runs; pass one of them, such as the newest, {runs[-1].parent}.")
    what = "a folder of shards" if (path / FILE).exists() else None
    if path.is_file():
        with suppress(OSError), path.open("rb") as file:  # load_file explains what cannot be read
            what = image_kind(file.read(32)) and "an image"
    if what:
        raise CheckpointError(
            f"{path}: is {what}, not a checkpoint; pass the checkpoint first, then the shards or images."
        )
    return path


def require_order(checkpoint: object, others: object, call: Callable[[str, list[str]], str]) -> None:
    """Raise CheckpointError if the checkpoint, or its run's folder, is among the other arguments, with images in its place.

    Raises ArgumentError if a run is among them, too: its figures are no images to classify.

    others  A path, or a list of them. Anything else is not looked at.
    call  Returns what to type, given the checkpoint and then the other paths.
    """
    listed = cast("list[object]", others) if isinstance(others, (list, tuple)) else [others]
    first, *rest = map(_path, (checkpoint, *listed))
    paths = list(filter(None, rest))
    if first and _is_checkpoint(first):
        if run := next((path for path in paths if os.path.isdir(path) and _is_checkpoint(path)), None):  # noqa: PTH112
            raise ArgumentError(f"{run}: is a run, not images; pass images or shards after the checkpoint.")
        return
    if not first or not ("://" in first or os.path.lexists(first)):
        return
    if own := next(filter(_is_checkpoint, paths), None):
        line = call(own, [first, *(one for one in paths if one != own)])
        raise CheckpointError(f"{first}: is not a checkpoint, but {own} is; pass the checkpoint first:\n  {line}")


def _path(value: object) -> str:
    return str(cast("object", value)) if isinstance(value, (str, os.PathLike)) else ""


def _is_checkpoint(path: str) -> bool:
    """Return whether a path is a file that torch.save wrote, or the folder of a run that has one."""
    with suppress(OSError, ValueError, BadZipFile), ZipFile(best_in(Path(path))) as file:
        return any(name.endswith("/data.pkl") for name in file.namelist())
    return False


def _linked(file: Path, name: Path) -> bool:
    """Create `name` as a hard link to `file`; return False if the file system does not support hard links."""
    try:
        os.link(file, name)
    except OSError:
        return False
    return True
