"""A trained network and all that is needed to use it, or to go on training it, in one file."""

import os
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TypedDict

import torch
from torch import Tensor, nn

from fastflower.errors import CheckpointError, FastflowerError
from fastflower.files import blame_the_system, written
from fastflower.models.backbone import build, load_file, not_finite
from fastflower.recipes.recipe import Recipe

FORMAT_VERSION = 2
LAST, BEST = "checkpoint-last.pt", "checkpoint-best.pt"  # in the folder of a run


class EpochSoFar(TypedDict, total=False):
    """What the steps of an epoch under way came to, over all ranks; {} between epochs."""

    losses: Tensor
    """(steps,) float64, each step's mean."""
    hits: int  # the number of correct predictions; the name is that of old files
    seconds: float
    """That the steps took on this rank."""
    waited: float
    """Of these seconds, for data."""
    trained: bool
    """Whether the epoch's training is over, and a soup has its share of it; what is left is to validate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state after an epoch, or in the middle of one. The file loads with weights_only=True."""

    recipe: Recipe
    classes: tuple[str, ...]
    model: dict[str, Tensor]
    """The network's state_dict; where the recipe averages weights, the average."""
    epoch: int
    """Epochs that are finished."""
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    """One row an epoch; see `Report`."""
    optimizer: dict[str, Any] = field(default_factory=dict[str, Any])
    scaler: dict[str, float] = field(default_factory=dict[str, float])
    """Of float16's loss scaling."""
    trained: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Where the recipe averages weights: those that training goes on with."""
    soup: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Where the recipe says soup: the mean of the trainings that are finished."""
    tally: EpochSoFar = field(default_factory=EpochSoFar)
    """In mid-epoch: of the steps so far."""
    feeding: dict[str, object] = field(default_factory=dict[str, object])
    """The loader's `state_dict`, which says what it was fed from."""
    environment: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def step(self) -> int:
        """Steps of the epoch under way that are done."""
        return len(self.tally.get("losses", ()))

    def save(self, path: str | Path, *, twin: str | Path | None = None) -> None:
        """Write the file so that it is seen whole or not at all.

        twin  A file that this checkpoint was just saved to: where there are hard links `path` becomes another name of it, at no
              cost. Files are replaced and never written to, so that what is saved to one name later leaves the other as it is.
        """
        path = Path(path)
        content: dict[str, object] = {"format": "fastflower", "version": FORMAT_VERSION}
        content |= {entry.name: getattr(self, entry.name) for entry in fields(self)}
        content["recipe"] = self.recipe.to_dict()
        try:
            path.with_name(path.name + ".part").unlink(missing_ok=True)  # of an older fastflower that was killed
            with written(path) as part:
                if twin is None or not _linked(Path(twin), part):
                    with part.open("wb") as file:
                        torch.save(content, file)
                        file.flush()
                        os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer hides an OSError, such as a full disk, behind its own
            reason = error if isinstance(error, OSError) else error.__context__ or error
            blame_the_system(reason, path)
            raise CheckpointError(
                f"{path}: could not be written ({reason}); what stood there before still does. Make room, and resume."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a checkpoint. Raises CheckpointError when the file is none, is damaged, is of another format, or is of no use."""
        content = load_file(Path(path))
        if content.get("format") != "fastflower":
            raise CheckpointError(
                f"{path}: is not a fastflower checkpoint; pass a checkpoint-best.pt that train wrote."
            )
        if content.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: is checkpoint version {content.get('version')}, this fastflower reads version {FORMAT_VERSION}; "
                f"train again, or use the one that wrote it."
            )
        try:
            recipe = Recipe.from_dict(content["recipe"])
            rest = {key: content[key] for key in content.keys() - {"format", "version", "recipe", "classes"}}
            return cls(recipe=recipe, classes=tuple(content["classes"]), **rest)._usable(str(path))
        except CheckpointError:
            raise
        except (KeyError, TypeError, FastflowerError) as error:
            raise CheckpointError(
                f"{path}: is damaged, or from another version of fastflower ({error}); pass another."
            ) from error

    def network(self) -> nn.Module:
        """The trained network in evaluation mode, on the CPU. Raises CheckpointError where the weights are none of it."""
        self._usable("checkpoint")
        model = build(self.recipe.backbone, len(self.classes), weights=None)
        try:
            model.load_state_dict(self.model)
        except RuntimeError as error:
            what = f"{self.recipe.backbone} with {len(self.classes)} classes"
            raise CheckpointError(f"checkpoint: its weights do not fit {what} ({error}); pass another.") from None
        return model.eval()

    def _usable(self, name: str) -> Self:
        """Itself; raises CheckpointError where nothing that its network says could be told or believed."""
        twice = [one for one, count in Counter(self.classes).items() if count > 1]
        if twice:
            raise CheckpointError(
                f"{name}: two of its classes are called {twice[0]!r}, so that their probabilities cannot be told apart; pass "
                f"another checkpoint, or train again on shards that name each class once."
            )
        if broken := not_finite(self.model):
            raise CheckpointError(
                f"{name}: weights are not finite ({broken}), so that its network knows no class; pass another checkpoint, or "
                f"train again with a lower lr."
            )
        return self


def _linked(file: Path, name: Path) -> bool:
    """Give a file another name; False where the file system has no hard links."""
    try:
        os.link(file, name)
    except OSError:
        return False
    return True
