"""The command `predict`: its exit status, and the tables that it writes for oneself or for a competition."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
from looking import CLASSES, VIEW, Looking, looking, smooth
from packs import exactly

from fastflower import Augment, Checkpoint, Recipe, predict
from fastflower.cli import main
from fastflower.errors import ArgumentError
from fastflower.models.backbone import build
from fastflower.models.predictor import Prediction

KINDS = ("cat", "dog", "0")


@pytest.fixture(scope="module")
def checkpoint(narrow: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001  (is set up first)
    path = tmp_path_factory.mktemp("run") / "checkpoint-best.pt"
    model = build("resnet18", 3, weights=None).state_dict()
    recipe = Recipe(weights=None, augment=Augment(size=32), precision="float32")
    Checkpoint(recipe=recipe, classes=KINDS, model=model, epoch=0).save(path)
    return path


@pytest.fixture
def test(tmp_path: Path) -> Path:
    """Four images in a folder and in one below it."""
    folder = tmp_path / "test"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(("b.png", "a.jpg", "more/c.png", "more/d.e.png")):
        smooth(seed=seed).save(folder / name)
    return folder


def lines(file: Path) -> list[list[str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.reader(opened))


def by_name(found: list[Prediction]) -> dict[str, Prediction]:
    return {one.path.name: one for one in found if one.path}


def command(checkpoint: Path, *args: object) -> int:
    return main(["predict", str(checkpoint), *map(str, args), "--device", "cpu"])


def test_damaged_images_in_a_folder_fail_the_command_after_all_others_are_predicted(
    checkpoint: Path, test: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (test / "broken.jpg").write_bytes(b"no image")
    (test / "more" / "empty.png").touch()
    table = tmp_path / "all.csv"
    assert command(checkpoint, test, "--out", table) == 1
    out, err = capsys.readouterr()
    expected = predict(checkpoint, test, device="cpu")
    assert out == f"wrote {table}\n"
    assert err.splitlines()[-1] == (
        f"error: 2 of 6 images are unusable and have no prediction; their cells in {table} are empty; the images are named above "
        f"(to accept that, pass --on-bad skip)."
    )
    assert command(checkpoint, test) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{one.path}: {one.class_name} ({one.probability:.1%})" for one in expected]
    assert err.splitlines()[-1] == (
        "error: 2 of 6 images are unusable and have no prediction; the images are named above (to accept that, pass "
        "--on-bad skip)."
    )
    assert f"skipped {test / 'broken.jpg'}: is plain text, named .jpg" in caplog.messages
    header, *rows = lines(table)
    assert header == ["path", "class", "probability", *KINDS]
    assert [row[0] for row in rows] == [str(test / name) for name in ("a.jpg", "b.png", "broken.jpg")] + [
        str(test / "more" / name) for name in ("c.png", "d.e.png", "empty.png")
    ]
    assert [row[1:] for row in rows if not row[1]] == [[""] * 5] * 2
    assert [float(row[2]) for row in rows if row[1]] == [one.probability for one in expected]
    assert command(checkpoint, test, "--on-bad", "skip") == 0


def test_a_damaged_image_that_is_named_stops_the_command(
    checkpoint: Path, test: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (test / "broken.jpg").write_bytes(b"no image")
    assert command(checkpoint, test / "a.jpg", test / "broken.jpg", "--out", tmp_path / "all.csv") == 1
    assert "broken.jpg: is plain text, named .jpg; pass image files or" in capsys.readouterr().err
    assert not (tmp_path / "all.csv").exists()
    assert (
        command(checkpoint, test / "a.jpg", test / "broken.jpg", "--out", tmp_path / "all.csv", "--on-bad", "skip") == 0
    )
    assert [row[1:] for row in lines(tmp_path / "all.csv")][2] == [""] * 5


@pytest.mark.parametrize("ids", [None, "name", "stem"])
def test_columns_make_a_submission(checkpoint: Path, test: Path, tmp_path: Path, ids: str | None) -> None:
    flags = [] if ids is None else ["--ids", ids]
    assert command(checkpoint, test, "--out", tmp_path / "s.csv", "--columns", "id,label", *flags) == 0
    found = by_name(predict(checkpoint, test, device="cpu"))
    shown = {"a.jpg": "a", "b.png": "b", "c.png": "c", "d.e.png": "d.e"}
    expected = [[stem if ids == "stem" else name, found[name].class_name] for name, stem in shown.items()]
    assert lines(tmp_path / "s.csv") == [["id", "label"], *expected]


def test_columns_of_classes_hold_their_probabilities(checkpoint: Path, test: Path, tmp_path: Path) -> None:
    """In the order of the columns, which need not be that of the network."""
    for columns in (("image_id", "dog", "cat"), ("id", "0", "dog", "cat"), ("id", "dog")):
        found = by_name(predict(checkpoint, test, out=tmp_path / "s.csv", columns=columns, device="cpu"))
        header, *rows = lines(tmp_path / "s.csv")
        assert tuple(header) == columns
        for name, *cells in rows:
            assert list(map(float, cells)) == [found[name].probabilities[kind] for kind in columns[1:]]


SAMPLES: dict[str, tuple[str, list[str]]] = {
    "names": ("Image,Id\nb.png,cat\nd.e.png,cat\na.jpg,dog\nc.png,0\n", ["b.png", "d.e.png", "a.jpg", "c.png"]),
    "stems": ("id,label\r\nd.e,\r\nb,\r\nc,\r\na,\r\n", ["d.e.png", "b.png", "c.png", "a.jpg"]),
    "paths": ('\ufeff"id","label"\ntest/b.png,0\nmore/c,0\na,0\n', ["b.png", "c.png", "a.jpg"]),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_sample_gives_header_ids_and_order(checkpoint: Path, test: Path, tmp_path: Path, kind: str) -> None:
    text, order = SAMPLES[kind]
    (tmp_path / "sample_submission.csv").write_text(text, encoding="utf-8", newline="")
    flags = ["--out", tmp_path / "s.csv", "--sample", tmp_path / "sample_submission.csv"]
    assert command(checkpoint, test, *flags) == 0
    found = by_name(predict(checkpoint, test, device="cpu"))
    expected = [row[:1] for row in csv.reader(text.removeprefix("\ufeff").splitlines())]
    rows = lines(tmp_path / "s.csv")
    assert [row[:1] for row in rows] == expected
    assert [row[1] for row in rows[1:]] == [found[name].class_name for name in order]


def test_a_sample_of_probabilities_is_followed_and_skipped_images_have_empty_cells(
    checkpoint: Path, test: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("z.jpg", "unlisted.jpg"):
        (test / name).write_bytes(b"no image")
    (tmp_path / "sample.csv").write_text("id,dog,cat,0\nz,0.3,0.3,0.4\nc,0.3,0.3,0.4\n")
    flags = ["--out", tmp_path / "s.csv", "--sample", tmp_path / "sample.csv"]
    assert command(checkpoint, test, *flags) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: 1 of 2 images are unusable and have no prediction; {tmp_path}/s.csv has 1 row with empty cells, which a "
        "competition may reject: fill them, for example with the most frequent class; the images are named above (to accept "
        "that, pass --on-bad skip)."
    )
    assert not any("unlisted.jpg" in text for text in caplog.messages)
    one = by_name(predict(checkpoint, test, device="cpu"))["c.png"].probabilities
    header, empty, full = lines(tmp_path / "s.csv")
    assert (header, empty) == (["id", "dog", "cat", "0"], ["z", "", "", ""])
    assert list(map(float, full[1:])) == pytest.approx([one["dog"], one["cat"], one["0"]])  # in a batch of other images
    assert f"{tmp_path}/sample.csv: does not list 4 of the images, which are not predicted" in caplog.messages
    (tmp_path / "sample.csv").write_text("id,cat\nc,0.3\n")
    (test / "unlisted.jpg").rename(tmp_path / "unlisted.jpg")
    assert command(checkpoint, test, tmp_path / "unlisted.jpg", *flags) == 0
    assert f"{tmp_path}/sample.csv: has no column for 'dog', '0', whose probabilities are left out" in caplog.messages
    predicted = predict(checkpoint, test, out=tmp_path / "s.csv", sample=tmp_path / "sample.csv", device="cpu")
    assert [one.name for one in predicted] == [str(test / "more" / "c.png")]


SAMPLE_ERRORS: dict[str, tuple[str | None, str]] = {
    "missing ids": (
        "id,label\na,cat\nx1,cat\nx2,cat\n",
        "FILE: 2 of 3 ids name no image, such as 'x1', 'x2'; pass the folder of all images that it lists.",
    ),
    "unclear ids": (
        "id,label\nc,cat\ntwin,cat\n",
        "FILE: id 'twin' names TEST/more/twin.png and TEST/twin.png; pass only the images that it lists.",
    ),
    "the same image twice": ("id,label\na,cat\na.jpg,cat\n", "FILE: has two rows for TEST/a.jpg; remove one."),
    "probabilities of one class": (
        "id,is_dog\na,0.5\n",
        "FILE: column 'is_dog': '0.5' is not a class of the network ('cat', 'dog', '0'); pass a network that was "
        "trained on these classes, or write class names with columns ('id', 'is_dog') (--columns id,is_dog).",
    ),
    "other classes": (
        "id,cat,wolf\na,0.5,0.5\n",
        "FILE: 'wolf' is not a class of the network; name the id and the label, or the id and classes ('cat', 'dog', '0').",
    ),
    "capitals": (
        "id,Cat,Dogs\na,0.5,0.5\n",
        "FILE: 'Cat', 'Dogs' are not classes of the network (did you mean 'cat', 'dog'?); name the id and the label, or the id "
        "and classes ('cat', 'dog', '0').",
    ),
    "capital labels": (
        "id,label\na,DOG\n",
        "FILE: column 'label': 'DOG' is not a class of the network (did you mean 'dog'?) ('cat', 'dog', '0'); pass a network "
        "that was trained on these classes, or write class names with columns ('id', 'label') (--columns id,label).",
    ),
    "one column": ("id\na\n", "sample: FILE must have a header, rows, and two or more columns in each."),
    "no rows": ("id,label\n", "sample: FILE must have a header, rows, and two or more columns in each."),
    "uneven rows": (
        "id,label\na,cat\nb\n",
        "sample: FILE: row 3 has 1 cell, the header has 2; download the file again, or correct the row.",
    ),
    "no file": (None, "sample: FILE cannot be read (No such file or directory); pass a CSV file."),
}


@pytest.mark.parametrize("kind", SAMPLE_ERRORS)
def test_a_sample_that_does_not_fit_is_an_error_before_prediction(
    checkpoint: Path, test: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    text, message = SAMPLE_ERRORS[kind]
    for name in ("twin.png", "more/twin.png"):
        (test / name).write_bytes(b"is not read")
    file = tmp_path / "sample.csv"
    if text is not None:
        file.write_text(text)
    assert command(checkpoint, test, "--out", tmp_path / "s.csv", "--sample", file) == 1
    expected = message.replace("FILE", str(file)).replace("TEST", str(test))
    assert sorted(capsys.readouterr().err.splitlines()[-1]) == sorted(f"error: {expected}")
    assert not (tmp_path / "s.csv").exists()


def test_a_sample_that_is_empty_or_no_text_is_named(test: Path, tmp_path: Path) -> None:
    for name, content in {"empty.csv": b"", "table.csv": b"PAR1\0\0"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ArgumentError, match=rf"^sample: .*{name} has no header and rows \(.*\); pass a CSV file\.$"
        ):
            written(test, sample=tmp_path / name)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"columns": ("id", "label"), "sample": "s.csv"}, "columns must be None with sample, which has the header, got "),
    (
        {"columns": ("id", "label"), "out": None},
        "columns must be used with out (--out), the file to write, got ('id', 'la",
    ),
    ({"sample": "s.csv", "out": None}, "sample must be used with out (--out), the file to write, got 's.csv'."),
    ({"sample": Path("s.csv"), "out": None}, "sample must be used with out (--out), the file to write, got 's.csv'."),
    ({"ids": "stem"}, "ids must be used with columns (--columns), got 'stem'."),
    ({"ids": "path", "columns": ("id", "label")}, "ids must be 'name' or 'stem', got 'path'."),
    ({"columns": "id,label"}, "columns must be two or more different names, such as ('id', 'label'), got 'id,label'."),
    ({"columns": ("id",)}, "columns must be two or more different names, such as ('id', 'label'), got ('id',)."),
    (
        {"columns": ("id", "id")},
        "columns must be two or more different names, such as ('id', 'label'), got ('id', 'id').",
    ),
    (
        {"columns": ("id", "r0", "x")},
        "columns: 'x' is not a class of the network; name the id and the label, or the id and",
    ),
]


def written(images: Any, **options: Any) -> list[Prediction]:
    table = images.parent / "s.csv" if isinstance(images, Path) else "s.csv"
    options = {"out": table, "classes": CLASSES, "augment": VIEW, "device": "cpu", **options}
    return predict(Looking(), images, **options)


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_arguments_are_named(test: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}"):
        written(test, **options)


def test_some_labels_that_the_network_does_not_know_are_a_warning(
    checkpoint: Path, test: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sample.csv").write_text("id,label\na,Cat\nb,dog\n")
    assert command(checkpoint, test, "--out", tmp_path / "s.csv", "--sample", tmp_path / "sample.csv") == 0
    what = "column 'label': 'Cat' is not a class of the network (did you mean 'cat'?), which never predicts it"
    assert f"{tmp_path}/sample.csv: {what}" in caplog.messages


def test_images_without_a_unique_name_have_no_id(test: Path) -> None:
    smooth().save(test / "more" / "a.jpg")
    message = "columns must be used with images of different names (or use sample), got ['a.jpg']."
    with pytest.raises(ArgumentError, match=exactly(message)):
        written(test, columns=("id", "label"))
    message = "image 1: has no file name for its id; pass paths with columns or sample."
    with pytest.raises(ArgumentError, match=exactly(message)):
        written([test / "b.png", smooth()], columns=("id", "label"))
    message = "images must be a list, not an iterator, with columns or sample; pass list(images)."
    with pytest.raises(ArgumentError, match=exactly(message)):
        written(iter([test / "b.png"]), columns=("id", "label"))


def test_images_without_a_path_have_a_name_in_the_table(test: Path) -> None:
    found = predict(
        Looking(), iter([smooth(), test / "b.png"]), out=test / "s.csv", classes=CLASSES, augment=VIEW, device="cpu"
    )
    assert [row[0] for row in lines(test / "s.csv")] == ["path", "image 0", str(test / "b.png")]
    assert found == looking()([smooth(), test / "b.png"])
