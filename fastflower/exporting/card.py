"""The model card: what a person needs to know before they use an exported file."""

from collections.abc import Iterable, Iterator, Sequence
from math import sqrt
from pathlib import Path
from typing import cast

import numpy as np

from fastflower.exporting.formats import Exported
from fastflower.exporting.proof import TOLERANCE, Proof
from fastflower.exporting.snippets import snippet
from fastflower.models.metrics import Scores, percent
from fastflower.recipes.flags import changes, nearest
from fastflower.reporting.record import Json, read
from fastflower.shards.manifest import Manifest

_MOST_CLASSES = 100  # rows of the table of classes
_MOST_PAIRS = 10


def card(exported: Exported, file: Path, proof: Proof, scores: Scores | None, pack: Manifest | None) -> str:
    """Return the card as Markdown. scores  On the run's val split. pack  The run's data. Either may not be at hand."""
    checkpoint, facts = exported.checkpoint, exported.facts
    recipe = checkpoint.recipe
    preset = nearest(recipe)
    sections = {
        f"# {file.name}": [
            f"Classifies images into {len(checkpoint.classes)} classes with {recipe.backbone}. "
            f"Input: {facts['input']}. Output: {facts['output']}.",
            f"Classes, in the order of the output: {', '.join(checkpoint.classes)}.",
            str(facts["orientation"]),
        ],
        "## Use": [f"```python\n{snippet(exported, file.as_posix())}```"],
        "## Scores": list(_scores(scores, checkpoint.fold)),
        "## Data": list(_data(exported, pack)),
        "## View": [_table(["", ""], [[name, _text(value)] for name, value in cast("Json", facts["view"]).items()])],
        "## Recipe": [
            f"Recipe {preset}, after epoch {checkpoint.epoch} of {recipe.epochs}"
            + (", changed:" if (changed := changes(recipe, preset)) else "."),
            *(
                [_table(["field", "value"], [[name, _text(value)] for name, value in changed.items()])]
                if changed
                else []
            ),
            f"Pretrained weights: {_text(facts['pretrained_weights'])}. License: {facts['license_of_pretrained_weights']}.",
        ],
        "## Proof": [
            f"After it was written, this file was run on {proof}. Every probability is within {TOLERANCE} of fastflower "
            f"predict's in float32. It resizes with predict's filter, but does not round gray levels on the way.",
        ],
        "## Intended use and limits": [
            "It is meant for images like those it was trained on: one subject of one of the classes. It gives every image one "
            "of the classes, also an image that shows none of them, and its probabilities then mean nothing.",
            "Scores hold for images that are taken and chosen like those of the split above. Measure it on your own images "
            "before you rely on it. Near-duplicates of training images, and wrong labels, make scores look better or worse.",
        ],
        "## Versions": [
            ", ".join(f"{name} {value}" for name, value in cast("dict[str, str]", facts["versions"]).items())
        ],
    }
    return "\n\n".join(f"{title}\n\n" + "\n\n".join(texts) for title, texts in sections.items()) + "\n"


def _scores(scores: Scores | None, fold: int | None) -> Iterator[str]:
    if scores is None:
        yield "Not measured here: the run's val split is not at hand. Measure it with fastflower evaluate CHECKPOINT SHARDS."
        return
    count, correct = scores.num_samples, int(np.trace(scores.confusion))
    low, high = interval(correct, count)
    where = "the val split" if fold is None else f"fold {fold}"
    yield (
        f"Accuracy on {where}: {correct} of {count} images, {percent(scores.accuracy)} (95% interval {low:.1%} to {high:.1%}); "
        f"macro-F1 {percent(scores.macro_f1)}; calibration error {percent(scores.calibration_error)}. The epoch was chosen by "
        f"this split, so expect slightly less on new images."
    )
    worst: list[int] = np.argsort(np.nan_to_num(scores.recall, nan=2), kind="stable")[:_MOST_CLASSES].tolist()
    rows = [
        [scores.classes[k], scores.support[k], percent(float(scores.precision[k])), percent(float(scores.recall[k]))]
        for k in worst
    ]
    yield _table(["class, the worst first", "images", "precision", "recall"], rows)
    wrong = scores.confusion - np.diag(np.diag(scores.confusion))
    most: list[int] = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS].tolist()
    pairs = [divmod(place, len(wrong)) for place in most if wrong.flat[place]]
    if pairs:
        named = [[scores.classes[true], scores.classes[found], wrong[true, found]] for true, found in pairs]
        yield _table(["class", "taken for", "images"], named)


def interval(correct: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share [Wilson 1927]."""
    z, share = 1.96, correct / count
    middle, reach = share + z * z / (2 * count), z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - reach) / (1 + z * z / count), (middle + reach) / (1 + z * z / count)


def _data(exported: Exported, pack: Manifest | None) -> Iterator[str]:
    folder = exported.checkpoint.file.parent if exported.checkpoint.file else None
    record = read(folder) if folder else None
    data = cast("Json", record.get("data") or {}) if record else {}
    if given := data.get("folder") or data.get("shards"):
        yield f"Trained on {Path(str(given)).name}."
    if pack is None:
        yield "Its counts are not at hand."
        return
    counts = ", ".join(f"{split.samples} images in {name}" for name, split in pack.splits.items())
    more = {
        "files skipped": pack.skipped,
        "groups of identical images": pack.duplicates,
        "groups of identical images under different labels": pack.label_conflicts,
        "near-duplicates of training images in other splits": pack.near_duplicates,
    }
    yield f"{counts}. " + ", ".join(f"{what}: {len(found)}" for what, found in more.items()) + "."


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_text, cast("Sequence[object]", value))) if isinstance(value, tuple | list) else str(value)


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = list[Sequence[object]]([columns, ["---"] * len(columns), *rows])
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
