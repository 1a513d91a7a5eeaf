"""val_fraction and test_fraction: drawn from the training images, never ignored."""

from pathlib import Path
from typing import Any

import pytest
from packs import drawn, exactly, paths

from fastflower import pack
from fastflower.errors import ArgumentError


def divided(root: Path, *splits: str) -> Path:
    """Ten training images of two classes each, and three of each class in the other splits."""
    drawn(root / "train", a=10, b=10)
    for name in splits:
        drawn(root / name, a=3, b=3)
    return root


@pytest.mark.parametrize("options", [{}, {"split_by": "folder"}])
def test_the_test_split_is_drawn_from_train_beside_a_val_split(tmp_path: Path, options: dict[str, Any]) -> None:
    root, out = divided(tmp_path / "data", "val"), tmp_path / "out"
    manifest = pack(root, out, test_fraction=0.2, **options)
    counts = {name: split.class_counts for name, split in manifest.splits.items()}
    assert counts == {"train": (8, 8), "val": (3, 3), "test": (2, 2)}
    assert all(path.startswith("val/") for path in paths(out, "val"))
    assert all(path.startswith("train/") for path in paths(out, "test"))
    assert len(paths(out, "train") | paths(out, "val") | paths(out, "test")) == 26
    assert (manifest.options["val_fraction"], manifest.options["test_fraction"]) == (None, 0.2)


@pytest.mark.parametrize(("own", "fractions"), [("val", {"val_fraction": 0.2}), ("test", {"test_fraction": 0.1})])
def test_a_fraction_for_a_split_that_the_folder_has_is_refused(
    tmp_path: Path, own: str, fractions: dict[str, Any]
) -> None:
    root = divided(tmp_path / "data", own)
    what = f"{own}_fraction cannot be used because {root} has its own {own} split"
    (given,) = (f"{name}={value}" for name, value in fractions.items())
    again = f"pack({str(root)!r}, '{tmp_path / 'out'}', {given}, split_by='class')"
    with pytest.raises(ArgumentError, match=exactly(f"{what}; leave it out, or draw all splits anew:\n  {again}")):
        pack(root, tmp_path / "out", **fractions)
    assert not (tmp_path / "out").exists()
    assert own in pack(root, tmp_path / "out").splits
    pack(root, tmp_path / "redrawn", split_by="class", **fractions)


def test_tables_have_the_same_rules(tmp_path: Path) -> None:
    root = drawn(tmp_path / "data", a=10, b=10)
    rows = [f"{name}/00{n}.jpg,{name},{'val' if n > 7 else 'train'}\n" for name in "ab" for n in range(10)]
    (tmp_path / "t.csv").write_text("image,label,split\n" + "".join(rows))
    with pytest.raises(ArgumentError, match=r"^val_fraction cannot be used because .* has its own val split"):
        pack(root, tmp_path / "out", labels=tmp_path / "t.csv", val_fraction=0)
    manifest = pack(root, tmp_path / "out", labels=tmp_path / "t.csv", test_fraction=0.25)
    counts = {name: split.class_counts for name, split in manifest.splits.items()}
    assert counts == {"train": (6, 6), "val": (2, 2), "test": (2, 2)}


def test_with_folds_the_test_split_is_drawn_from_train_and_val(tmp_path: Path) -> None:
    manifest = pack(divided(tmp_path / "data", "val"), tmp_path / "out", folds=3, test_fraction=0.2)
    counts = {name: split.class_counts for name, split in manifest.splits.items()}
    assert counts == {"train": (10, 10), "test": (3, 3)}
    assert len(manifest.fold_numbers()) == 20
