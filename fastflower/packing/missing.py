"""Says why a class folder has no images: what it holds instead, or images without an extension."""

from contextlib import suppress
from pathlib import Path

from fastflower.errors import FolderError
from fastflower.packing import layout
from fastflower.packing.containers import instead_of_images
from fastflower.packing.hidden import entries, patterns_ignored
from fastflower.shards.kinds import image_kind

_MOST_READ = 6  # files


def no_images(root: Path, name: str, can_drop: bool) -> FolderError:
    """Return the error for a class folder without images. can_drop  Whether other classes would be left without it."""
    if instead := instead_of_images(root / name):
        return FolderError(instead)
    for file in sorted(entry.name for entry in entries(root / name) if entry.is_file())[:_MOST_READ]:
        with suppress(OSError), (root / name / file).open("rb") as opened:
            if kind := image_kind(opened.read(32)):
                what = f"{name}/{file} is {kind} without an image extension"
                if "/" in name:
                    return FolderError(f"{root}: {what}; add the extension to its name.")
                return FolderError(f"{root}: {what}; a list can name such files: {layout.list_and_pack(root, '*/')}")
    remedy = "leave out such classes with --drop-empty-classes" if can_drop else "remove the class folder"
    besides = " besides those that --ignore matches" if patterns_ignored() else ""
    return FolderError(f"{root / name}: has no images (.jpg, .png and others){besides}; add some, or {remedy}.")
