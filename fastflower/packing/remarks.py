"""What a user should know of a finished pack: what is not in it, or not as one would think."""

from collections.abc import Iterator

from fastflower.shards.manifest import Manifest

_MOST_NAMES = 10  # of classes, in a line
_MORE = 0.05  # of all images: by so much may split "val" exceed the fraction asked for without a word


def remarks(manifest: Manifest) -> Iterator[str]:
    """One line each, without the folder's name."""
    odd = len({item["path"] for item in manifest.warnings})
    if odd:
        yield f"{odd} image{'s decode' if odd > 1 else ' decodes'} with warnings; its manifest names them (warnings)"
    if manifest.skipped:
        yield f"{len(manifest.skipped)} files are left out; its manifest says why (skipped)"
    yield from _validation(manifest)
    for name, split in manifest.splits.items():
        absent = [label for label, count in zip(manifest.classes, split.class_counts, strict=True) if not count]
        if absent and split.samples:
            few = ", ".join(map(repr, absent[:_MOST_NAMES])) + (" and others" if len(absent) > _MOST_NAMES else "")
            yield f"split {name} has no image of {few}: scores say nothing about these classes"


def _validation(manifest: Manifest) -> Iterator[str]:
    val, fraction = manifest.splits.get("val"), manifest.options["val_fraction"]
    if fraction == 0:  # as the caller wanted it
        return
    if not val or not val.samples:
        remedy = "no class can spare an image: add images, or name a folder with a split of its own"
        if max(manifest.splits["train"].class_counts) > 1:
            remedy = "what classes could spare are copies, which stay together; or an older version began this pack: pack again"
        if fraction is None:
            remedy = "add a val beside train, or pack the folder train alone, of which one is drawn"
        yield f"has no images in split 'val', so trainings on it validate nothing; {remedy}"
    elif fraction is not None:
        share = val.samples / sum(split.samples for split in manifest.splits.values())
        if share > fraction + _MORE:
            few = "classes give whole images, and at least one of two or more"
            yield f"split val holds {share:.0%} of the images, more than val_fraction {fraction:g}: {few}"
