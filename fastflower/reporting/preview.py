"""Preview of a recipe's augmentation: one figure of the validation view and random training views."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastflower.errors import integer, require
from fastflower.files import write_out
from fastflower.loading.loader import Loader
from fastflower.loading.picture import drawable, png
from fastflower.models.defaults import complete
from fastflower.models.inference import view_of
from fastflower.packing.source import shards_of
from fastflower.recipes.presets import checked
from fastflower.recipes.recipe import Recipe
from fastflower.shards.remote import Remote
from fastflower.suggestions import keywords


@keywords
def preview(
    shards: str | Path | Remote,
    recipe: Recipe | None = None,
    *,
    images: int = 6,
    draws: int = 6,
    out: str | Path = "preview.png",
) -> Path:
    """Draw images as training will see them: one row per image, with the validation view first, then views from multiple epochs.

    Args:
        shards: A folder of images, an archive or a table of labels, as `pack` takes them; or the shards that `pack` wrote, or
            their URL. Images are packed into runs/packs, as by `train`.
        recipe: The recipe to preview. Augmentation and sizes are exactly as in training, except that mixup and cutmix choose
            different partners. The partner may make up the larger part of a mixed image.
        images: Number of images, from the start of the train split.
        draws: Number of training views per image, spread evenly over the recipe's epochs.
        out: The PNG file to write.

    Returns the path of the PNG. Raises ArgumentError if an argument is invalid, and ShardError or SampleError as Loader does.
    """
    out = Path(out)
    images, draws = integer("images", images, 1, at_most=100), integer("draws", draws, 1, at_most=100)
    require(out.suffix == ".png", "out", "a .png file", str(out))
    recipe = complete(checked(recipe))  # before any packing
    classes, columns = views(shards_of(shards), recipe, images, draws)
    figure = Figure(figsize=(1.6 * len(columns) + 0.4, 1.6 * len(classes) + 0.3), layout="constrained")
    grid = figure.subplots(len(classes), len(columns), squeeze=False)
    for (title, column), cells in zip(columns.items(), grid.T, strict=True):
        for axes, image in zip(cells, column, strict=True):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
        cells[0].set_title(f"{title}, {column.shape[1]} pixels", fontsize=7)
    for axes, name in zip(grid[:, 0], classes, strict=True):
        axes.set_ylabel(drawable(name), fontsize=8, parse_math=False)
    write_out(out, png(figure))
    return out


def views(
    shards: str | Path | Remote, recipe: Recipe, images: int, draws: int
) -> tuple[list[str], dict[str, NDArray[np.uint8]]]:
    """Return the classes of N images, and their views by title: {"validation" or "epoch K": (N, H, W, 3) uint8}."""
    view = view_of(recipe)
    even = images + images % 2  # mixup needs pairs
    loader = Loader(shards, batch_size=even, augment=view, seed=recipe.seed, device="cpu", shuffle=False, tail="pad")
    augments = {"validation": (0, view)}
    for epoch in np.linspace(0, recipe.epochs - 1, draws).round().astype(int).tolist():
        augments[f"epoch {epoch + 1}"] = (epoch, recipe.augment_at(epoch))
    shown = min(images, loader.num_samples)
    labels: list[int] = next(iter(loader)).labels[:shown].numpy().tolist()
    classes = [loader.manifest.classes[label] for label in labels]
    columns: dict[str, NDArray[np.uint8]] = {}
    for title, (epoch, augment) in augments.items():
        loader.set_augment(augment)
        loader.set_epoch(epoch)
        columns[title] = next(iter(loader)).pixels()[:shown]
    return classes, columns
