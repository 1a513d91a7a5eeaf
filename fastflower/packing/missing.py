"""Says why a folder has no class folders, or a class folder no images, and what it is or holds instead."""

from contextlib import suppress
from pathlib import Path

from fastflower.errors import FolderError
from fastflower.packing import layout
from fastflower.packing.again import packing, with_data
from fastflower.packing.containers import instead_of_images
from fastflower.packing.hidden import entries, patterns_ignored
from fastflower.packing.names import splits_named
from fastflower.shards.kinds import image_kind

_MOST_READ = 6  # files
_MOST_NAMES = 3  # per message


def no_class_folders(root: Path) -> FolderError:
    """Return the error for a folder without class folders. Others beside it may be the classes, of which it is one."""
    parent = root.parent if root.name not in ("", "..") else root / ".."
    with suppress(FolderError, OSError):  # they are no classes, or cannot be read
        tops = layout.subfolders(parent)
        others = [top for top in tops if not (parent / top).samefile(root)]  # links to the folder are none
        if others and not splits_named(tops) and all(layout.has_own_images(parent / top) for top in tops):
            layout.check_classes(parent, tops, resplit=False)
            few = ", ".join(map(repr, others[:_MOST_NAMES])) + (", ..." if len(others) > _MOST_NAMES else "")
            remedy = f"if it is one class, beside {few}, pass the folder that holds them:\n  {with_data(parent)}"
            return FolderError(f"{root}: has no class folders; {remedy}")
    remedy = (
        "put the images of each class into a folder of its own. Images without labels are for fastflower predict, or for "
        "Loader.from_files and a network of your own. To pass a table of labels"
    )
    return FolderError(f"{root}: has no class folders; {remedy}:\n  {packing({'labels': ['FILE']}, source=root)}")


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
    drop = (
        f"leave out such classes:\n  {packing({'drop_empty_classes': True})}"
        if can_drop
        else "remove the class folder."
    )
    besides = " besides those that are ignored" if patterns_ignored() else ""
    return FolderError(f"{root / name}: has no images (.jpg, .png and others){besides}; add some, or {drop}")
