"""Test-time augmentation: the mean of an image and its mirror image, in scoring, prediction and the command line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastflower import Augment, Checkpoint, Loader, Recipe, evaluate, predict, train
from fastflower.cli import main
from fastflower.models.backbone import build
from fastflower.models.inference import view_of

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

CLASSES = ("daisy", "dandelion", "rose", "sunflower", "tulip")
RECIPE = Recipe(weights=None, augment=Augment(size=48, resize=54), batch_size=24, epochs=1, precision="float32")


@pytest.fixture(scope="module")
def plain(shards: Path) -> Checkpoint:
    """A network that has learned nothing, but gives an image and its mirror image quite different probabilities."""
    torch.manual_seed(0)
    network = build("resnet18", 5, weights=None)
    images = next(iter(Loader(shards, augment=RECIPE.augment, batch_size=120, device="cpu"))).images
    with torch.no_grad():
        for _ in range(20):
            network(images)  # statistics of the batch norms
        logits = network.eval()(images)
        head = network.get_submodule("fc")
        head.get_parameter("weight").div_(logits.std())
        head.get_parameter("bias").sub_(logits.mean(dim=0)).div_(logits.std())
    return Checkpoint(recipe=RECIPE, classes=CLASSES, model=network.state_dict(), epoch=1)


@pytest.fixture(scope="module")
def mirrored(plain: Checkpoint) -> Checkpoint:
    """The same, of a recipe that asks for test-time augmentation."""
    return replace(plain, recipe=replace(RECIPE, tta=True))


def test_scores_are_of_the_mean_probabilities_of_an_image_and_its_mirror_image(plain: Checkpoint, shards: Path) -> None:
    network, rows, wanted = plain.network(), [], []
    with torch.inference_mode():
        for images, labels, _ in Loader(shards, "val", augment=view_of(RECIPE), batch_size=7, device="cpu"):
            for image, label in zip(images, labels.tolist(), strict=True):
                mirror = torch.stack([image[:, :, 47 - column] for column in range(48)], dim=2)
                both = [torch.softmax(network(view[None])[0], dim=0) for view in (image, mirror)]
                rows.append(((both[0] + both[1]) / 2).numpy())
                wanted.append(label)
    expected = np.stack(rows)
    scores = evaluate(plain, shards, tta=True, device="cpu")
    assert np.allclose(scores.probabilities, expected, atol=1e-5)
    assert np.allclose(scores.probabilities.sum(axis=1), 1, atol=1e-5)
    assert scores.loss == pytest.approx(-np.log(expected[np.arange(30), wanted]).mean(), rel=1e-4)
    assert scores.accuracy == np.mean(expected.argmax(axis=1) == wanted)
    assert not np.allclose(scores.probabilities, evaluate(plain, shards, device="cpu").probabilities, atol=0.01)


def test_the_recipe_decides_where_nothing_is_said(plain: Checkpoint, mirrored: Checkpoint, shards: Path) -> None:
    once, twice = (evaluate(plain, shards, tta=tta, device="cpu").probabilities for tta in (False, True))
    assert np.array_equal(evaluate(plain, shards, device="cpu").probabilities, once)
    assert np.array_equal(evaluate(mirrored, shards, device="cpu").probabilities, twice)
    assert np.array_equal(evaluate(mirrored, shards, tta=False, device="cpu").probabilities, once)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_scores_nearly_the_same(mirrored: Checkpoint, shards: Path, precision: str) -> None:
    recipe = replace(mirrored.recipe, precision=precision)  # pyright: ignore[reportArgumentType]
    low = evaluate(replace(mirrored, recipe=recipe), shards, device="cpu").probabilities
    assert np.abs(low - evaluate(mirrored, shards, device="cpu").probabilities).mean() < 0.02


def test_a_mirrored_image_gets_the_same_prediction(
    plain: Checkpoint, mirrored: Checkpoint, flowers: Path, tmp_path: Path
) -> None:
    pairs: list[Path] = []
    for number, path in enumerate(sorted(flowers.glob("*/*.jpg"))[::15]):
        with Image.open(path) as image:
            square = image.convert("RGB").resize((216, 216))  # whose center and blocks are those of its mirror image
        pairs += [tmp_path / f"{number}.png", tmp_path / f"{number} mirrored.png"]
        square.save(pairs[-2])
        ImageOps.mirror(square).save(pairs[-1])

    def differences(checkpoint: Checkpoint) -> np.ndarray:
        found = [list(one.probabilities.values()) for one in predict(checkpoint, pairs, device="cpu")]
        rows = np.array(found).reshape(-1, 2, 5)
        return np.abs(rows[:, 0] - rows[:, 1])

    assert differences(mirrored).max() < 1e-2
    assert differences(plain).max() > 0.05


def test_prediction_agrees_with_evaluation(mirrored: Checkpoint, shards: Path, flowers: Path) -> None:
    loader = Loader(shards, "val", device="cpu")
    found = predict(mirrored, [flowers / loader.path_of(index) for index in range(30)], device="cpu")
    expected = evaluate(mirrored, shards, device="cpu").probabilities
    assert np.allclose([list(one.probabilities.values()) for one in found], expected, atol=1e-4)


def test_training_validates_as_the_recipe_says(shards: Path, tmp_path: Path) -> None:
    report = train(shards, replace(RECIPE, tta=True), out=tmp_path / "run", device="cpu")
    row = report.history[0]
    twice = evaluate(report.checkpoint, shards, device="cpu")
    assert (twice.accuracy, twice.loss) == (row["val_accuracy"], pytest.approx(row["val_loss"], rel=1e-5))
    assert evaluate(report.checkpoint, shards, tta=False, device="cpu").loss != pytest.approx(twice.loss, rel=1e-5)


@pytest.mark.parametrize("tta", [None, True, False])
def test_the_command_prints_macro_f1_and_calibration_error_and_takes_tta(
    mirrored: Checkpoint, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tta: bool | None
) -> None:
    mirrored.save(tmp_path / "checkpoint.pt")
    flags = [] if tta is None else ["--tta", str(tta)]
    assert main(["evaluate", str(tmp_path / "checkpoint.pt"), str(shards), "--device", "cpu", *flags]) == 0
    scores = evaluate(mirrored, shards, tta=tta, device="cpu")
    assert capsys.readouterr().out.splitlines()[0] == (
        f"30 images: accuracy {scores.accuracy:.2%}, loss {scores.loss:.4f}, macro-F1 {scores.macro_f1:.2%}, "
        f"calibration error {scores.calibration_error:.2%}"
    )
