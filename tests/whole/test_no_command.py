"""A command line that does not begin with a command is answered with the one that works."""

import json
import shlex
from contextlib import suppress
from pathlib import Path

import pytest
from packs import drawn

from fastflower import pack
from fastflower.cli import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with images, a table, an archive's name, shards and two runs."""
    monkeypatch.chdir(tmp_path)
    drawn(tmp_path / "my data", rose=3, tulip=3)
    pack("my data", "shards")
    for path in ("photo.jpg", "data.zip", "labels.csv", "runs/a/checkpoint-best.pt", "runs/b/checkpoint-last.pt"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    for run in ("a", "b"):
        Path("runs", run, "run.json").write_text(
            json.dumps({"format": "fastflower run", "version": 1, "data": {"shards": "my data"}})
        )
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """Return the error for a command line without a command."""
    capsys.readouterr()
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.partition("error: ")[2]


@pytest.mark.parametrize(
    ("line", "works"),
    [
        ("--epochs 3 train 'my data'", "train 'my data' --epochs 3"),
        ("--resume train 'my data' --out a", "train 'my data' --out a --resume"),
        ("--split train evaluate runs/a shards", "evaluate runs/a shards --split train"),
        ("'my data' train --epochs 3", "train 'my data' --epochs 3"),
        ("runs/a shards evaluate --split train", "evaluate runs/a shards --split train"),
        ("s3://bucket/shards train", "train s3://bucket/shards"),
    ],
)
def test_the_command_comes_first(line: str, works: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here.exists()
    word = shlex.split(line)[0]
    assert answer(capsys, line) == f"unknown command {word!r}; the command comes first:\n  fastflower {works}\n"


@pytest.mark.parametrize(
    ("line", "what", "works"),
    [
        ("'my data'", "train on this folder", "train 'my data'"),
        ("'my data' --epochs 3", "train on this folder", "train 'my data' --epochs 3"),
        ("shards", "train on these shards", "train shards"),
        ("s3://bucket/shards", "train on these shards", "train s3://bucket/shards"),
        ("data.zip", "train on this archive", "train data.zip"),
        ("labels.csv", "train on this table", "train labels.csv"),
        ("photo.jpg", "classify this image", "predict runs/a photo.jpg"),
        ("runs/a", "score this run", "evaluate runs/a 'my data'"),
        ("runs/a --device cpu", "score this run", "evaluate runs/a 'my data' --device cpu"),
        ("runs/a shards", "score this run", "evaluate runs/a shards"),
        ("runs/a/checkpoint-best.pt", "score this run", "evaluate runs/a/checkpoint-best.pt 'my data'"),
        ("runs/a photo.jpg", "classify with this run", "predict runs/a photo.jpg"),
        ("runs/b", "continue this run", "train 'my data' --out runs/b --resume"),
    ],
)
def test_a_path_in_place_of_a_command(
    line: str, what: str, works: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here.exists()
    word = shlex.split(line)[0]
    assert answer(capsys, line) == f"unknown command {word!r}; to {what}, type fastflower {works}\n"


def test_an_image_without_any_run_needs_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").touch()
    assert answer(capsys, "photo.jpg").endswith(
        "; to classify this image, type fastflower predict CHECKPOINT photo.jpg\n"
    )
    assert answer(capsys, "--epochs 3") == "unknown command '--epochs'; the command comes before its flags.\n"


@pytest.mark.parametrize("line", ["--epochs 0 train 'my data'", "'my data' train --epochs 0", "'my data' --epochs 0"])
def test_the_command_in_the_answer_can_be_typed(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here.exists()
    command = "fastflower " + answer(capsys, line).rpartition("fastflower ")[2]
    assert main(shlex.split(command)[1:]) == 1
    assert "error: --epochs must be an integer, at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "same"), [("help", "--help"), ("help train", "train --help"), ("help pack", "pack -h")]
)
def test_help_is_that_of_the_command(line: str, same: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts: list[str] = []
    for words in (line, same):
        with suppress(SystemExit):
            assert main(words.split()) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_help_on_an_unknown_command_names_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "help trian") == "unknown command 'trian'; did you mean:\n  fastflower train --help\n"


def test_a_run_of_another_working_folder_is_continued_with_shards_that_are_found_from_here(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = {"working_directory": str(here)}
    content = {"format": "fastflower run", "version": 1, "data": {"shards": "shards"}, "sessions": [session]}
    Path("runs/b/run.json").write_text(json.dumps(content))
    assert answer(capsys, "runs/b").endswith("type fastflower train shards --out runs/b --resume\n")
    (here / "job").mkdir()
    monkeypatch.chdir(here / "job")
    assert answer(capsys, "../runs/b").endswith(f"type fastflower train {here / 'shards'} --out ../runs/b --resume\n")
    session["working_directory"] = str(here / "gone")
    (here / "runs/b/run.json").write_text(json.dumps(content))
    assert answer(capsys, "../runs/b").endswith("type fastflower train shards --out ../runs/b --resume\n")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "lists/train.txt lists/val.txt",
            "lists/train.txt is packed with lists/val.txt beside it; type fastflower train lists/train.txt",
        ),
        (
            "lists/train.txt lists/val.txt lists/test.txt --epochs 3",
            "lists/train.txt is packed with lists/val.txt and lists/test.txt beside it; type fastflower train lists/train.txt "
            "--epochs 3",
        ),
        ("parts/train parts/val", "one folder holds all splits; type fastflower train parts"),
        ("parts/train parts/val --lr 0.1", "one folder holds all splits; type fastflower train parts --lr 0.1"),
        (
            "lists/train.txt lists/other.txt",
            "unexpected 'lists/other.txt'; type fastflower train lists/train.txt and then flags.",
        ),
        (
            "pack lists/train.txt lists/val.txt",
            "lists/train.txt is packed with lists/val.txt beside it; type fastflower pack lists/train.txt",
        ),
        ("pack parts/train parts/val", "one folder holds all splits; type fastflower pack parts"),
        ("parts/train lists/val.txt", "unexpected 'lists/val.txt'; type fastflower train parts/train and then flags."),
    ],
)
def test_the_splits_as_several_arguments_are_answered_with_one(
    typed: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "val", "test", "other"):
        (here / "parts" / name).mkdir(parents=True)
        (here / "lists").mkdir(exist_ok=True)
        (here / "lists" / f"{name}.txt").touch()
    with pytest.raises(SystemExit):
        main([*([] if typed.startswith("pack") else ["train"]), *shlex.split(typed)])
    assert capsys.readouterr().err == f"error: {said}\n"
