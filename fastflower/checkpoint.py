"""A trained network and all that is needed to use it, or to go on training it, in one file."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from fastflower.backbone import build, load_file
from fastflower.errors import CheckpointError, FastflowerError
from fastflower.recipe import Recipe

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state after an epoch. The file holds tensors and plain values only: it loads with weights_only=True."""

    recipe: Recipe
    classes: tuple[str, ...]
    model: dict[str, Any]
    """The network's state_dict."""
    epoch: int
    """Epochs that are finished."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One row an epoch; see `Report`."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    rng: torch.Tensor | None = None
    """torch's CPU generator, which dropout draws from."""
    environment: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the file so that it is seen whole or not at all."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        names = ("classes", "model", "epoch", "history", "optimizer", "rng", "environment")
        content = {"format": "fastflower", "version": FORMAT_VERSION, "recipe": self.recipe.to_dict()}
        content |= {name: getattr(self, name) for name in names}
        try:
            with part.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, RuntimeError) as error:  # torch's writer hides an OSError, such as a full disk, behind its own
            reason = error if isinstance(error, OSError) else error.__context__ or error
            raise CheckpointError(
                f"{path}: could not be written ({reason}); what stood there before still does."
            ) from error
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a checkpoint. Raises CheckpointError when the file is none, is damaged, or is of another format."""
        content = load_file(Path(path))
        if content.get("format") != "fastflower":
            raise CheckpointError(
                f"{path}: is not a fastflower checkpoint; pass a checkpoint-best.pt that train wrote."
            )
        if content.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: is checkpoint version {content.get('version')}, this fastflower reads version {FORMAT_VERSION}."
            )
        try:
            recipe = Recipe.from_dict(content["recipe"])
            fields = {
                key: value for key, value in content.items() if key not in ("format", "version", "recipe", "classes")
            }
            return cls(recipe=recipe, classes=tuple(content["classes"]), **fields)
        except (KeyError, TypeError, FastflowerError) as error:
            raise CheckpointError(f"{path}: is damaged, or from another version of fastflower ({error}).") from error

    def network(self) -> nn.Module:
        """The trained network in evaluation mode, on the CPU."""
        model = build(self.recipe.backbone, len(self.classes), weights=None)
        model.load_state_dict(self.model)
        return model.eval()
