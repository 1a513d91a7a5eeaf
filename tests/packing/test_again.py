"""Messages of packing end with what the user typed or called, with the flag that helps, and that works."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from packs import draw_image, drawn

from fastflower import Manifest, Recipe, pack, train
from fastflower.cli import main
from fastflower.errors import FolderError
from fastflower.packing.again import packing
from fastflower.suggestions import typed


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def with_an_empty_class() -> None:
    drawn(Path("data"), rose=4, tulip=4)
    Path("data/lily").mkdir()


def with_a_class_in_val_only() -> None:
    drawn(Path("data"), **{"train/rose": 3, "train/tulip": 3, "val/lily": 1, "val/rose": 1})


def with_a_class_of_damaged_images() -> None:
    drawn(Path("data"), rose=4, tulip=4, lily=2)
    for path in Path("data/lily").iterdir():
        path.write_bytes(b"\xff\xd8\xff\xe0 no more")


def with_a_table(text: str) -> Callable[[], None]:
    def make() -> None:
        for number in range(6):
            Path("data").mkdir(exist_ok=True)
            draw_image(number).save(f"data/{number}.jpg")
        Path("data/t.csv").write_text(text)

    return make


def rows(cells: str) -> str:
    """Return a row for each image. "%" in the cells is 0 or 1."""
    return "".join(f"{number}.jpg,{cells.replace('%', str(number % 2))}\n" for number in range(6))


def packed_already() -> None:
    pack(drawn(Path("data"), rose=4, tulip=4), "shards")


TABLE = "--labels data/t.csv"
CASES: dict[str, tuple[Callable[[], None], str, str]] = {
    "an empty class": (with_an_empty_class, "--seed 3", "--seed 3 --drop-empty-classes"),
    "a class in val only": (with_a_class_in_val_only, "--seed=3 --quality 90", "--seed 3 --quality 90 --drop-empty-classes"),
    "a damaged class": (with_a_class_of_damaged_images, "--seed 3", "--seed 3 --drop-empty-classes"),
    "a damaged image": (with_a_class_of_damaged_images, "--ignore tulip/000.jpg --drop-empty-classes --on-bad fail",
                        "--ignore tulip/000.jpg --drop-empty-classes"),
    "columns": (with_a_table("image,x,y\n" + rows("a%,b%")), TABLE, f"{TABLE} --label-column x"),
    "a wrong column": (with_a_table("image,class\n" + rows("a%")),
                       f"--label_column Class {TABLE}", f"--label-column class {TABLE}"),
    "columns of numbers": (with_a_table("path,a,b\n" + rows("1,1")), TABLE, f"{TABLE} --label-column a"),
    "two usual columns": (with_a_table("path,label,class\n" + rows("%,1")), TABLE, f"{TABLE} --label-column label"),
    "two columns of images": (with_a_table("a,b,label\n" + rows("1.jpg,%")), TABLE, f"{TABLE} --path-column a"),
    "a pack": (packed_already, "--seed 1", "--seed 1 --out shards-2"),
    "a place inside": (with_a_class_of_damaged_images, "--drop-empty-classes --out data/out", "--drop-empty-classes --out out"),
    "fractions": (with_a_class_in_val_only, "--val-fraction 0.5 --drop-empty-classes",
                  "--val-fraction 0.5 --drop-empty-classes --split-by class"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_command_ends_the_message_and_works(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, flags, more = CASES[name]
    make()
    assert main(["pack", "data", *shlex.split(flags)]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last == f"  fastflower pack data {more}"
    if "columns of numbers" not in name:
        assert main(shlex.split(last)[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["an empty class", "a class in val only", "a damaged class"])
@pytest.mark.usefixtures("narrow", "no_figures")
def test_train_cannot_take_the_flag_so_pack_comes_first(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    CASES[name][0]()
    flags = "--recipe scratch --epochs 1 --batch-size 2 --augment.size 32 --device cpu --out runs/a"
    assert main(["train", "data/", *shlex.split(flags)]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    first, then = last.split(" && ")
    (out,) = re.findall(r"^  fastflower pack data --out (\S+) --drop-empty-classes$", first)
    assert then == f"fastflower train {out} {flags}"
    assert out == "shards" or Path(out).parent == Path("runs/packs")
    for command in (first, then):
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err


def test_calls_end_the_message_and_work() -> None:
    with_an_empty_class()
    with pytest.raises(FolderError) as caught:
        pack(Path("data"), seed=3, ignore=["none"])
    *_, last = str(caught.value).split("\n  ")
    assert last == "pack('data', seed=3, ignore=['none'], drop_empty_classes=True)"
    assert isinstance(eval(last, {"pack": pack}), Manifest)
    with pytest.raises(FolderError) as caught:
        train("data", Recipe(weights=None), out="runs/a", device="cpu")
    first, then = str(caught.value).split("\n  ")[-1].split("; ")
    assert first == "pack('data', 'shards-2', drop_empty_classes=True)"
    assert then == "train('shards-2', recipe, out='runs/a', device='cpu')"
    assert isinstance(eval(first, {"pack": pack}), Manifest)


def test_a_remark_about_a_finished_pack_names_another_place(caplog: pytest.LogCaptureFixture) -> None:
    drawn(Path("data"), **{"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1})
    assert main(["pack", "data"]) == 0
    (said,) = (text for text in caplog.messages if "in split 'val'" in text)
    *_, last = said.split("\n  ")
    assert last == "fastflower pack data --val-fraction 0.2 --out shards-2"
    assert main(shlex.split(last)[1:]) == 0
    assert Manifest.load("shards-2").splits["val"].samples == 2


def test_the_table_of_a_competition_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    drawn(Path("comp"), train=12, test=5)
    labels = "".join(f"{number:03d},{'xyz'[number % 3]}\n" for number in range(12))
    Path("comp/train.csv").write_text(f"id,label\n{labels}")
    Path("comp/sample_submission.csv").write_text("id,label\n000,x\n")
    assert main(["pack", "comp", "--quality", "90"]) == 1
    _, first, *_ = capsys.readouterr().err.splitlines()
    said, command = first.split(": ")
    assert said == "  train.csv names 12 of these images"
    assert command == "fastflower pack comp --quality 90 --labels comp/train.csv"
    assert main(shlex.split(command)[1:]) == 0
    assert Manifest.load("shards").classes == ("x", "y", "z")
    assert main(["train", "comp", "--recipe", "scratch"]) == 1
    assert f"{said}: fastflower train comp/train.csv --recipe scratch\n" in capsys.readouterr().err


def test_what_is_not_known_is_named() -> None:
    assert packing({"labels": ["a", Path("b")]}) == "pack(folder, labels=['a', 'b'])"
    assert packing({"ignore": ["a b"]}, source="x y", shell=True) == "fastflower pack 'x y' --ignore 'a b'"
    with typed(["pack", "x", "--dask", "tcp://a:1"]):
        assert packing({"seed": 1}, source="x") == "fastflower pack x --seed 1 --dask tcp://a:1"
    with typed(["evaluate", "run.pt", "x", "--device", "cpu"]):
        then = "fastflower evaluate run.pt shards --device cpu"
        assert packing({"seed": 1}, source="x") == f"fastflower pack x --seed 1 --out shards && {then}"
