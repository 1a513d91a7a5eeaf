"""Bottleneck diagnosis: times data loading alone and training alone for a few seconds each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from time import perf_counter

import torch

from fastflower.devices import fastest_convolutions, resolve_device
from fastflower.errors import number
from fastflower.loading.loader import Loader
from fastflower.loading.stats import Stats
from fastflower.models.defaults import complete
from fastflower.models.recomputation import require_options
from fastflower.models.sizes import require_sizes
from fastflower.packing.source import shards_of
from fastflower.recipes.presets import checked
from fastflower.recipes.recipe import Recipe
from fastflower.shards.remote import Remote
from fastflower.suggestions import keywords
from fastflower.training.run import Run


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Measured throughput; print it to see the bottleneck and a remedy."""

    loading_rate: float
    """Images/s of data loading without training, with every image decoded."""
    training_rate: float
    """Images/s of training steps on one batch, without data loading."""
    stats: Stats
    """Timing of the data loading."""
    device: str

    def __str__(self) -> str:
        """Format the rates and the loader's timing as a table, followed by a verdict."""
        ratio = self.loading_rate / self.training_rate
        verdict = f"training is the bottleneck: data loading alone is {ratio:.1f} times as fast."
        lines = (
            f"loading alone   {self.loading_rate:8.1f} images/s, decoding every image",
            f"training alone  {self.training_rate:8.1f} images/s on {self.device}",
            str(self.stats).rpartition("\n")[0],
            verdict if ratio >= 1 else self.stats.verdict,
        )
        return "\n".join(lines)


@keywords
def diagnose(
    shards: str | Path | Remote,
    recipe: Recipe | None = None,
    *,
    seconds: float = 5.0,
    device: str | torch.device | None = None,
) -> Diagnosis:
    """Find the bottleneck of training: time data loading alone, then training on one batch.

    Args:
        shards: A folder of images, an archive or a table of labels, as `pack` takes them; or the shards that `pack` wrote, or
            their URL. Images are packed into runs/packs, as by `train`.
        recipe: The recipe to diagnose, by default Recipe(). Uses random weights, which take the same time as pretrained ones.
        seconds: Duration of each of the two measurements, not counting the first batch.
        device: None uses CUDA if available, otherwise the CPU.

    Returns a Diagnosis; print it to see the bottleneck. Raises ShardError, ArgumentError or DeviceError as Loader does.
    """
    recipe = replace(complete(checked(recipe)), weights=None)
    seconds = number("seconds", seconds, "a number above 0", lambda seconds: seconds > 0)
    require_sizes(recipe)
    require_options(recipe)
    shards = shards_of(shards)
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
    """Call `work` repeatedly for `seconds`; return images/s. Each call returns its number of images."""
    images, start = 0, perf_counter()
    while perf_counter() - start < seconds:
        images += work()
    return images / (perf_counter() - start)
