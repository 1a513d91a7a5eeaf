"""Trains a backbone for a step and uses it: python try_backbone.py NAME ..., or all of torchvision, each in its own process."""

import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch

from fastflower import Augment, Checkpoint, Recipe
from fastflower.devices import precision_of
from fastflower.models.backbone import build, on_device
from fastflower.models.inference import log_probabilities
from fastflower.models.sizes import sizes_of
from fastflower.models.stages import heads_of, stages_of, train_mode
from fastflower.models.torchvision_networks import NAMES
from fastflower.training.optimizer import optimizer_of
from fastflower.training.step import Stepper

CPU = torch.device("cpu")
CLASSES = ("a", "b", "c")


def use(name: str, side: int, folder: Path) -> None:
    """Build, freeze two stages, train a step in channels-last, save, load, resume and predict.

    In bfloat16 if the processor computes in it; without that, a large network's step takes minutes.
    """
    torch.manual_seed(0)
    precision = precision_of("auto", CPU)
    recipe = Recipe(backbone=name, weights=None, freeze=2, augment=Augment(size=side), lr=0.01)
    network = on_device(build(name, 3, weights=None, freeze=2, size=(side, side)), CPU)
    train_mode(network, 2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.rand(2, 3, side, side).to(precision, memory_format=torch.channels_last)
    optimizer = optimizer_of(network, recipe)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = Stepper(network, optimizer, scaler, recipe, CPU, precision, None)
    loss, _ = step(images, torch.tensor([0, 1]), 1, update=True)
    assert loss.isfinite().all()
    frozen = {key for stage in stages_of(network)[:2] for key in stage}
    changed = {key for key, value in network.named_parameters() if not torch.equal(value, before[key])}
    assert not changed & frozen
    assert f"{heads_of(network)[0]}.weight" in changed  # and no others in the first step, where it is zero

    path = folder / "checkpoint.pt"
    Checkpoint(recipe=recipe, classes=CLASSES, model=network.state_dict(), epoch=1).save(path)
    loaded = on_device(Checkpoint.load(path).network(), CPU)
    expected = log_probabilities(network.eval(), images, tta=False)
    # Statistics of two tiny images may let outputs overflow.
    torch.testing.assert_close(log_probabilities(loaded, images, tta=False), expected, rtol=0, atol=0, equal_nan=True)
    assert expected.shape == (2, 3)
    again = build(name, 3, weights=str(path), classes=CLASSES, size=(side, side)).state_dict()
    counters = {key for key in again if key.endswith("num_batches_tracked")}
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in again.items() if key not in counters)


def main(names: list[str]) -> int:
    """Print a row for each backbone; return the number of those that failed."""
    if len(names) == 1:
        sizes = sizes_of(names[0])
        side = sizes.nearest(224) if sizes else 224
        begun = perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            use(names[0], side, Path(folder))
        print(f"| {names[0]} | {sizes} | {side} | {perf_counter() - begun:.1f} |")
        return 0
    print("| backbone | image sizes | tried at | seconds |\n|---|---|--:|--:|", flush=True)
    done = [subprocess.run([sys.executable, __file__, name], check=False) for name in names or NAMES]
    failed = [each.args[-1] for each in done if each.returncode]
    print(f"{len(done) - len(failed)} of {len(done)} work; failed: {', '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
