"""A class folder in place of the folder that holds the classes is refused with what to type, for every caller."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from packs import draw_image, drawn

from fastflower import Checkpoint, Recipe, evaluate, pack, train
from fastflower.cli import main
from fastflower.errors import FolderError


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    drawn(Path("my data"), rose=4, tulip=5, lily=4, daisy=4, aster=4)
    return Path("my data")


@pytest.mark.parametrize(
    ("command", "answer"),
    [("train", "train 'my data'"), ("pack", "pack 'my data'"), ("preview", "preview 'my data'")],
)
def test_the_command_names_the_parent(
    command: str, answer: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(data / "rose")]) == 1
    what = "has no class folders; if it is one class, beside 'aster', 'daisy', 'lily', ..., pass the folder that holds them"
    assert f"error: my data/rose: {what}:\n  fastflower {answer}\n" in capsys.readouterr().err
    if command == "pack":
        assert main(shlex.split(answer)) == 0


@pytest.mark.parametrize(("call", "answer"), [(train, "train('my data')"), (pack, "pack('my data')")])
def test_the_call_names_the_parent(call: Callable[[Path], object], answer: str, data: Path) -> None:
    with pytest.raises(FolderError, match=rf"\n  {re.escape(answer)}$"):
        call(data / "tulip")
    assert not Path("runs").exists()


def test_evaluate_keeps_its_checkpoint_first(data: Path) -> None:
    checkpoint = Checkpoint(recipe=Recipe(), classes=("rose",), model={}, epoch=1)
    with pytest.raises(FolderError, match=r"\n  evaluate\(checkpoint, 'my data'\)$"):
        evaluate(checkpoint, data / "rose")


def test_the_working_folder_may_be_the_class(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data / "rose")
    assert main(["pack", ".", "--out", "../../../shards"]) == 1
    assert capsys.readouterr().err.endswith("\n  fastflower pack .. --out ../../../shards\n")


@pytest.mark.parametrize("beside", ["notes", "train", "val"])
def test_other_folders_beside_are_no_classes(beside: str, tmp_path: Path) -> None:
    """Nothing suggests a parent without further images, or one that would be refused or read in another way."""
    drawn(tmp_path / "data", test=2)
    (tmp_path / "data" / beside).mkdir()
    if beside != "notes":
        draw_image(1).save(tmp_path / "data" / beside / "1.jpg")
    with pytest.raises(FolderError, match="has no class folders; put the images of each class into a folder"):
        pack(tmp_path / "data/test", tmp_path / "out")
