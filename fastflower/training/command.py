"""The command or call to type next: to resume a run, to start it again, or to train on from its weights."""

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastflower import distributed
from fastflower.files import unused
from fastflower.machine import ranks_here
from fastflower.models.checkpoint import LAST
from fastflower.models.defaults import brief
from fastflower.recipes.flags import flags, nearest
from fastflower.recipes.presets import PRESETS
from fastflower.recipes.recipe import Recipe
from fastflower.reporting.record import read, shards_of_run
from fastflower.shards.remote import Remote
from fastflower.suggestions import command_typed


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of `train`."""

    shards: str | Path | Remote
    recipe: Recipe
    fold: int | None = None
    out: Path
    save_steps: int | None = None
    device: str | torch.device | None = None

    def again(self, *, resume: bool = False) -> str:
        """Return what to type to start or resume this run: a command, or a call if it was started from Python."""
        known = resume and (self.out / LAST).exists()  # then recipe and fold are those of the checkpoint
        return (replace(self, recipe=Recipe(), fold=None) if known else self)._line({}, resume=resume)

    def again_told(self, *, resume: bool) -> str:
        """Return what to type to start or resume this run, and that it does so."""
        return f"To {'continue' if resume else 'start again'}:\n  {self.again(resume=resume)}"

    def changed(self, **changes: object) -> str:
        """Return what to type to train with other fields of the recipe, from the run's last weights if it has saved any."""
        return self.onward(**changes) if (self.out / LAST).exists() else self._line(changes)

    def anew(self, **changes: object) -> str:
        """Return what to type to start a new run, in an unused folder. changes  Fields of the recipe."""
        return replace(self, out=unused(self.out))._line(changes)

    def onward(self, **changes: object) -> str:
        """Return what to type to train on from the last weights of this run, in an unused folder."""
        return self.anew(weights=str(self.out / LAST), **changes)

    def command(self, *, resume: bool = False) -> str:
        """Return the command line of this call."""
        options = [text for name, value in self._given(resume).items() for text in _flag(name, value)]
        return shlex.join([*_launcher(), "train", self.address, *flags(self.recipe, nearest(self.recipe)), *options])

    @property
    def typed(self) -> bool:
        """Whether the user typed a command, and did not call a function."""
        return bool(command_typed())

    @property
    def address(self) -> str:
        """The shards' folder or URL."""
        return self.shards.url if isinstance(self.shards, Remote) else str(self.shards)

    def _line(self, changes: dict[str, object], *, resume: bool = False) -> str:
        recipe = brief(Recipe.from_dict(self.recipe.to_dict() | changes))
        if self.typed:
            return replace(self, recipe=recipe).command(resume=resume)
        shards = "shards" if isinstance(self.shards, Remote) else repr(str(self.shards))
        preset = nearest(recipe)
        text = repr(preset) if PRESETS[preset]() == recipe else repr(recipe)  # whatever the caller named it
        named = [] if recipe == Recipe() else [text]
        options = [f"{name}={value!r}" for name, value in self._given(resume).items()]
        return f"train({', '.join([shards, *named, *options])})"

    def _given(self, resume: bool) -> dict[str, object]:
        """Return the arguments that differ from their defaults."""
        device = None if self.device is None else str(self.device)
        values = {"fold": self.fold, "out": str(self.out), "save_steps": self.save_steps, "device": device}
        return {name: value for name, value in {**values, "resume": resume or None}.items() if value is not None}


def to_resume(folder: Path) -> str:
    """Return the command that resumes the run in a folder, with the shards that its run.json names; "" if it holds no run."""
    content = read(folder)
    if content is None and not (folder / LAST).exists():
        return ""
    return shlex.join(["fastflower", "train", shards_of_run(content), "--out", str(folder), "--resume"])


def _flag(name: str, value: object) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return [flag] if value is True else [flag, str(value)]


def _launcher() -> list[str]:
    """Return what precedes the subcommand: fastflower, or torchrun as it was called."""
    ranks = distributed.world_size()
    if ranks == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["fastflower"]
    nodes = [f"--nnodes={ranks // ranks_here()}"] if ranks > ranks_here() else []
    return ["torchrun", *nodes, f"--nproc-per-node={ranks_here()}", "-m", "fastflower"]
