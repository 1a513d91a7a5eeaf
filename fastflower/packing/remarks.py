"""Warnings about a finished pack: skipped files, missing classes and unusual splits."""

from collections.abc import Iterator

from fastflower.shards.manifest import Manifest

_MOST_NAMES = 10  # class names per warning
_TOLERANCE = 0.05  # fraction of all images by which the val split may exceed val_fraction without a warning


def remarks(manifest: Manifest) -> Iterator[str]:
    """Yield one line per warning, without the folder's name."""
    odd, skipped = len({item["path"] for item in manifest.warnings}), len(manifest.skipped)
    if odd:
        yield f"decoded {odd} image{'s' if odd > 1 else ''} with warnings; see `warnings` in manifest.json"
    if skipped:
        yield f"skipped {skipped} file{'s' if skipped > 1 else ''}; see `skipped` in manifest.json for the reasons"
    yield from _validation(manifest)
    for name, split in manifest.splits.items():
        absent = [label for label, count in zip(manifest.classes, split.class_counts, strict=True) if not count]
        if absent and split.samples:
            few = ", ".join(map(repr, absent[:_MOST_NAMES])) + (" and others" if len(absent) > _MOST_NAMES else "")
            yield f"the {name} split has no images of {few}: these classes will not be evaluated"


def _validation(manifest: Manifest) -> Iterator[str]:
    val, fraction = manifest.splits.get("val"), manifest.options["val_fraction"]
    if fraction == 0:  # the caller wants no validation
        return
    if not val or not val.samples:
        remedy = "no class can spare an image: add images, or pack a folder with its own split"
        if max(manifest.splits["train"].class_counts) > 1:
            remedy = "classes can only spare copies, which stay together: add images."
            remedy += " If an older version planned this pack, pack again"
        if fraction is None:
            remedy = "add a val folder next to train, or pack only the train folder to split it into train and val"
        yield f"has no images in split 'val', so training on these shards has nothing to validate on; {remedy}"
    elif fraction is not None:
        share = val.samples / sum(split.samples for split in manifest.splits.values())
        if share > fraction + _TOLERANCE:
            why = "each class with two or more images contributes at least one, and copies stay together"
            yield f"the val split holds {share:.0%} of the images, more than val_fraction {fraction:g}: {why}"
