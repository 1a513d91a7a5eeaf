"""Says what holds training back: the same loop as training, fed for some seconds, and the loader's clock."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from time import perf_counter

import torch

from fastflower.devices import fastest_convolutions, resolve_device
from fastflower.errors import require
from fastflower.loading.loader import Loader
from fastflower.loading.stats import Stats
from fastflower.recipes.recipe import Recipe
from fastflower.shards.remote import Remote
from fastflower.training.run import Run


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was measured; its text says what to do."""

    loading_rate: float
    """Images/s of the loader alone, decoding each."""
    training_rate: float
    """Images/s of forward, backward and step on one batch again and again."""
    stats: Stats
    """Of the loader alone."""
    device: str

    def __str__(self) -> str:
        """A short table and a sentence."""
        faster = self.loading_rate / self.training_rate
        held = f"training holds the job back: it can be fed {faster:.1f} times as fast as it takes images."
        lines = (
            f"feeding alone   {self.loading_rate:8.1f} images/s, decoding each",
            f"training alone  {self.training_rate:8.1f} images/s on {self.device}",
            str(self.stats).rpartition("\n")[0],
            held if faster >= 1 else self.stats.verdict,
        )
        return "\n".join(lines)


def diagnose(
    shards: str | Path | Remote,
    recipe: Recipe | None = None,
    *,
    seconds: float = 5.0,
    device: str | torch.device | None = None,
) -> Diagnosis:
    """Feed SHARDS for some seconds without training, then train on one batch for as long.

    Args:
        shards: The folder that `pack` wrote, or its address, as for Loader.
        recipe: What is to be trained.
        seconds: Of each measurement, after its first batch.
        device: None means CUDA where there is one, else the CPU.

    Raises ShardError, ArgumentError and DeviceError as Loader does.
    """
    recipe = replace(recipe or Recipe(), weights=None)
    require(seconds > 0, "seconds", "above 0", seconds)
    run = Run(shards, recipe, Path(), resolve_device(device))
    loader = Loader(
        shards,
        batch_size=recipe.batch_size,
        augment=recipe.augment,
        device=run.device,
        dtype=run.precision,
        cache=None,
        backend=run.loader.backend,
    )
    batches = (batch for _ in count() for batch in loader)
    batch = next(batches)
    loading_rate = _rate(lambda: len(next(batches).index), seconds)
    batches.close()

    def step() -> int:
        loss, _ = run.step(batch.images, batch.labels)
        loss.item()  # waits for the device
        return len(batch.index)

    with fastest_convolutions(run.device):
        step()
        training_rate = _rate(step, seconds)
    return Diagnosis(loading_rate, training_rate, loader.stats(), str(run.device))


def _rate(work: Callable[[], int], seconds: float) -> float:
    """Images/s of work that gives how many it dealt with, done again and again for so long."""
    images, start = 0, perf_counter()
    while perf_counter() - start < seconds:
        images += work()
    return images / (perf_counter() - start)
