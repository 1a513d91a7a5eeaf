"""report.html and the figures of a run."""

import os
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from training_runs import RECIPE

from fastflower import Augment, Recipe, Report, evaluate, pack, train
from fastflower.models.metrics import score
from fastflower.reporting import figures
from fastflower.reporting.preview import preview

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return train(shards, replace(RECIPE, epochs=1), out=tmp_path_factory.mktemp("reported") / "run", device="cpu")


def test_the_report_is_one_file_that_opens_anywhere(run: Report) -> None:
    html = (run.folder / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", html), "everything must be inside the file"
    assert run.scores is not None
    assert f"{100 * run.scores.accuracy:.1f}%" in html
    assert html.count("<img") == 2 + min(12, round(30 * (1 - run.scores.accuracy)))
    assert all(name in html for name in run.scores.classes)


def test_the_heading_names_the_run_and_its_recipe(run: Report) -> None:
    html = (run.folder / "report.html").read_text()
    assert re.search(r"<title>run: resnet18, \d+\.\d%</title>", html)
    assert "<h1>run: resnet18 (recipe default, changed) on 5 classes</h1>" in html
    assert "classified correctly\nafter one epoch." in html


@pytest.mark.parametrize("epochs", [1, 2, 3, 50])
def test_curves_have_whole_epochs_from_the_first(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "png", lambda figure: drawn.append(figure) or b"")
    names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
    figures.curves([{"epoch": epoch, **dict.fromkeys(names, 1 / epoch)} for epoch in range(1, epochs + 1)])
    for axes in drawn[0].axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert all(float(tick).is_integer() and 1 <= tick <= epochs for tick in ticks)
        assert ticks == list(range(1, epochs + 1)) if epochs <= 3 else len(ticks) > 3
        assert all(line.get_marker() == "o" and len(line.get_xdata()) == epochs for line in axes.get_lines())  # pyright: ignore[reportArgumentType]  (matplotlib's types)


def test_names_in_the_report_are_escaped(flowers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nasty"
    for number, name in enumerate(["<b>bold</b>", "plain"]):
        (folder / name.replace("/", "")).mkdir(parents=True)
        for path in sorted(flowers.glob("*/*.jpg"))[number * 30 : number * 30 + 12]:
            (folder / name.replace("/", "") / path.name).write_bytes(path.read_bytes())
    pack(folder, tmp_path / "shards")
    report = train(tmp_path / "shards", replace(RECIPE, epochs=1, batch_size=8), out=tmp_path / "run", device="cpu")
    assert "<b>bold" not in (report.folder / "report.html").read_text()


def confusion(classes: list[str]) -> tuple[int, int]:
    """Return (width, height) of the figure in pixels."""
    count = len(classes)
    outputs = np.log(np.full((count, count), 1 / count))
    data = figures.confusion(score(tuple(classes), np.arange(count), outputs.astype(np.float32)))
    return struct.unpack(">II", data[16:24])


def test_the_figure_of_a_confusion_matrix_has_a_bounded_size() -> None:
    assert confusion(["a", "b"]) == (583, 495)
    assert max(confusion([f"class {number}" for number in range(300)])) <= 21 * 110


def test_a_dollar_in_a_class_name_is_not_a_formula() -> None:
    assert confusion([r"a$\frac$", "5$ to 10$"]) == (583, 495)


def test_class_and_file_names_that_are_not_utf8_are_drawn_and_reported(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in (b"caf\xe9", b"tea"):
        (folder / os.fsdecode(name)).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(
                os.fsencode(folder) + b"/" + name + b"/\xe9%d.jpg" % number
            )
    pack(folder, tmp_path / "shards", val_fraction=0.5)
    recipe = Recipe(weights=None, augment=Augment(size=32, resize=32), epochs=1, batch_size=2, lr=1e-6)
    done = train(tmp_path / "shards", recipe, out=tmp_path / "run", device="cpu")
    text = (tmp_path / "run" / "report.html").read_text()
    assert r"caf\udce9" in text
    assert evaluate(done.checkpoint, tmp_path / "shards", device="cpu").classes == (os.fsdecode(b"caf\xe9"), "tea")
    assert preview(tmp_path / "shards", recipe, images=4, draws=1, out=tmp_path / "p.png").exists()
    assert "\udce9" not in figures.drawable(os.fsdecode(b"caf\xe9"))
