"""Says what holds training back: the same loop as training, fed for some seconds, and the loader's clock."""

from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fastflower.devices import fastest_convolutions, kept_memory, resolve_device
from fastflower.errors import require
from fastflower.loading.loader import Loader
from fastflower.loading.stats import Stats
from fastflower.recipes.recipe import Recipe
from fastflower.shards.remote import Remote
from fastflower.training.run import Run


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was measured; its text says what to do."""

    feeding_rate: float
    """Images/s of the loader alone, decoding each."""
    training_rate: float
    """Images/s of forward, backward and step on one batch again and again."""
    stats: Stats
    """Of the loader alone."""
    device: str

    def __str__(self) -> str:
        """A short table and a sentence."""
        faster = self.feeding_rate / self.training_rate
        held = f"training holds the job back: it can be fed {faster:.1f} times as fast as it takes images."
        lines = (
            f"feeding alone   {self.feeding_rate:8.1f} images/s, decoding each",
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
    run = Run(shards, recipe, Path(), resolve_device(device), None)
    how: dict[str, Any] = {"batch_size": recipe.batch_size, "dtype": run.precision, "device": run.device}
    feeding = Loader(shards, augment=recipe.augment, cache=None, backend=run.loader.backend, **how)
    batches = (batch for _ in count() for batch in feeding)
    batch = next(batches)
    images, start = 0, perf_counter()
    while perf_counter() - start < seconds:
        batch = next(batches)
        images += len(batch.index)
    feeding_rate = images / (perf_counter() - start)
    batches.close()
    with kept_memory(run.device), fastest_convolutions(run.device):
        run.step(batch.images, batch.labels)
        steps, start = 0, perf_counter()
        while perf_counter() - start < seconds:
            loss, _ = run.step(batch.images, batch.labels)
            loss.item()  # waits for the device
            steps += 1
    training_rate = steps * len(batch.index) / (perf_counter() - start)
    return Diagnosis(feeding_rate, training_rate, feeding.stats(), str(run.device))
