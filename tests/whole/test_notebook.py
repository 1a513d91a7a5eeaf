"""The example notebook: it runs from top to bottom, and shows what a reader expects."""

from pathlib import Path

import nbformat
import notebooks
from places import ROOT

NOTEBOOK = ROOT / "examples" / "first_network.ipynb"


def test_the_notebook_is_saved_without_outputs() -> None:
    """Outputs would age, and make its changes unreadable."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells if cell.cell_type == "code")


def test_the_notebook_runs_without_images_and_network(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    draw, pack, look, train, evaluate, mistakes, predict = outputs = notebooks.run(notebook, tmp_path)
    assert draw == []
    assert notebooks.shown(pack)[0].startswith("pack: 100%")
    assert notebooks.shown(pack)[1:] == ["Manifest(folder='shards', classes=3, train=144, val=36)"]
    assert [output.data["image/png"] != "" for output in look if "data" in output] == [True]
    assert [line.partition(":")[0] for line in notebooks.printed(train).splitlines() if line.startswith("epoch")] == [
        f"epoch {epoch}/6" for epoch in range(1, 7)
    ]
    bar, report = notebooks.shown(train)
    assert bar.startswith("epoch 6/6: 100%")
    assert report.startswith("Report(folder='runs/resnet18', epochs=6, best_epoch=")
    (html,) = notebooks.shown(train, "text/html")
    assert html.count("<img") == 2
    bar, scores = notebooks.shown(evaluate)
    assert float(scores.partition("accuracy=")[2][:5]) > 0.5  # chance is a third
    assert notebooks.printed(mistakes).count(": predicted ") <= 3
    assert notebooks.printed(predict).count("%)") == 3
    assert [notebooks.printed(cell, "stderr") for cell in outputs] == [""] * len(outputs)
