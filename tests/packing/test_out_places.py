"""A pack has the same bytes wherever it is written, and however the folder is spelled."""

import shutil
from pathlib import Path

import pytest
from kill_packer import checksums
from packs import draw_image, drawn

from fastflower import pack


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = drawn(Path("data"), rose=5, tulip=5)
    draw_image(99).save(folder / "alone.jpg")
    lines = [f"{path},{path.parent.name}\n" for path in sorted(folder.rglob("*.jpg"))]
    (folder / "t.csv").write_text("".join(["path,label\n", *lines]))
    return folder


@pytest.mark.parametrize(
    "out", ["data/out", "data/rose/out", "data/train", "data/meta", "data/images/val", "x/.packing/y", "@eaDir/test"]
)
def test_a_table_or_an_archive_is_packed_to_the_same_bytes(out: str, data: Path) -> None:
    expected = {place: pack(data, place, labels="data/t.csv").folder for place in ("a", "b")}
    assert checksums(pack(data, out, labels="data/t.csv").folder) == checksums(expected["a"])
    assert checksums(expected["b"]) == checksums(expected["a"])
    shutil.rmtree(out)
    archive = shutil.make_archive("data", "zip", drawn(Path("others"), rose=5, tulip=5))
    assert checksums(pack(archive, out).folder) == checksums(pack("others", "c").folder)


@pytest.mark.parametrize(
    ("place", "spelled"), [(".", "./data/"), ("data", "."), ("data/rose", ".."), ("data", "../data")]
)
def test_the_folder_may_be_spelled_in_any_way(
    place: str, spelled: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paths in the table begin with the name of the folder, and one has nothing else."""
    expected = pack(data, tmp_path / "expected", labels=data / "t.csv")
    assert sum(split.samples for split in expected.splits.values()) == 11
    table = (tmp_path / data / "t.csv").absolute()
    monkeypatch.chdir(place)
    pack(spelled, tmp_path / "out", labels=table)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "expected")
