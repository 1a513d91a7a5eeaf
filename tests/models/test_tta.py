"""Test-time augmentation with the horizontal flip, in evaluation, prediction and on the command line."""

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
    """An untrained network with quite different probabilities for an image and its horizontal flip."""
    torch.manual_seed(0)
    network = build("resnet18", 5, weights=None)
    images = next(iter(Loader(shards, augment=RECIPE.augment, batch_size=120, device="cpu"))).images
    with torch.no_grad():
        for _ in range(20):
            network(images)  # updates batch norm statistics
        logits = network.eval()(images)
        head = network.get_submodule("fc")
        head.get_parameter("weight").div_(logits.std())
        head.get_parameter("bias").sub_(logits.mean(dim=0)).div_(logits.std())
    return Checkpoint(recipe=RECIPE, classes=CLASSES, model=network.state_dict(), epoch=1)


@pytest.fixture(scope="module")
def augmented(plain: Checkpoint) -> Checkpoint:
    """The same network with a recipe that asks for test-time augmentation."""
    return replace(plain, recipe=replace(RECIPE, tta=True))


def test_tta_averages_the_probabilities_of_an_image_and_its_horizontal_flip(plain: Checkpoint, shards: Path) -> None:
    network, rows, wanted = plain.network(), [], []
    with torch.inference_mode():
        for images, labels, _ in Loader(shards, "val", augment=view_of(RECIPE), batch_size=7, device="cpu"):
            for image, label in zip(images, labels.tolist(), strict=True):
                flipped = torch.stack([image[:, :, 47 - column] for column in range(48)], dim=2)
                both = [torch.softmax(network(view[None])[0], dim=0) for view in (image, flipped)]
                rows.append(((both[0] + both[1]) / 2).numpy())
                wanted.append(label)
    expected = np.stack(rows)
    scores = evaluate(plain, shards, tta=True, device="cpu")
    assert np.allclose(scores.probabilities, expected, atol=1e-5)
    assert np.allclose(scores.probabilities.sum(axis=1), 1, atol=1e-5)
    assert scores.loss == pytest.approx(-np.log(expected[np.arange(30), wanted]).mean(), rel=1e-4)
    assert scores.accuracy == np.mean(expected.argmax(axis=1) == wanted)
    assert not np.allclose(scores.probabilities, evaluate(plain, shards, device="cpu").probabilities, atol=0.01)


def test_the_recipe_decides_about_tta_by_default(plain: Checkpoint, augmented: Checkpoint, shards: Path) -> None:
    once, twice = (evaluate(plain, shards, tta=tta, device="cpu").probabilities for tta in (False, True))
    assert np.array_equal(evaluate(plain, shards, device="cpu").probabilities, once)
    assert np.array_equal(evaluate(augmented, shards, device="cpu").probabilities, twice)
    assert np.array_equal(evaluate(augmented, shards, tta=False, device="cpu").probabilities, once)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_scores_nearly_the_same(augmented: Checkpoint, shards: Path, precision: str) -> None:
    recipe = replace(augmented.recipe, precision=precision)  # pyright: ignore[reportArgumentType]
    low = evaluate(replace(augmented, recipe=recipe), shards, device="cpu").probabilities
    assert np.abs(low - evaluate(augmented, shards, device="cpu").probabilities).mean() < 0.02


def test_with_tta_a_flipped_image_gets_the_same_prediction(
    plain: Checkpoint, augmented: Checkpoint, flowers: Path, tmp_path: Path
) -> None:
    pairs: list[Path] = []
    for number, path in enumerate(sorted(flowers.glob("*/*.jpg"))[::15]):
        with Image.open(path) as image:
            square = image.convert("RGB").resize((216, 216))  # the flip has the same center and JPEG blocks
        pairs += [tmp_path / f"{number}.png", tmp_path / f"{number} flipped.png"]
        square.save(pairs[-2])
        ImageOps.mirror(square).save(pairs[-1])

    def differences(checkpoint: Checkpoint) -> np.ndarray:
        found = [list(one.probabilities.values()) for one in predict(checkpoint, pairs, device="cpu")]
        rows = np.array(found).reshape(-1, 2, 5)
        return np.abs(rows[:, 0] - rows[:, 1])

    assert differences(augmented).max() < 1e-2
    assert differences(plain).max() > 0.05


def test_prediction_with_tta_agrees_with_evaluation(augmented: Checkpoint, shards: Path, flowers: Path) -> None:
    loader = Loader(shards, "val", device="cpu")
    found = predict(augmented, [flowers / loader.path_of(index) for index in range(30)], device="cpu")
    expected = evaluate(augmented, shards, device="cpu").probabilities
    assert np.allclose([list(one.probabilities.values()) for one in found], expected, atol=1e-4)


def test_training_validates_with_the_recipes_tta(shards: Path, tmp_path: Path) -> None:
    report = train(shards, replace(RECIPE, tta=True), out=tmp_path / "run", device="cpu")
    row = report.history[0]
    twice = evaluate(report.checkpoint, shards, device="cpu")
    assert (twice.accuracy, twice.loss) == (row["val_accuracy"], pytest.approx(row["val_loss"], rel=1e-5))
    assert evaluate(report.checkpoint, shards, tta=False, device="cpu").loss != pytest.approx(twice.loss, rel=1e-5)


@pytest.mark.parametrize("tta", [None, True, False])
def test_the_evaluate_command_prints_macro_f1_and_calibration_error_and_takes_tta(
    augmented: Checkpoint, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tta: bool | None
) -> None:
    augmented.save(tmp_path / "checkpoint.pt")
    flags = [] if tta is None else ["--tta", str(tta)]
    assert main(["evaluate", str(tmp_path / "checkpoint.pt"), str(shards), "--device", "cpu", *flags]) == 0
    scores = evaluate(augmented, shards, tta=tta, device="cpu")
    assert capsys.readouterr().out.splitlines()[0] == (
        f"val: 30 images, accuracy {scores.accuracy:.2%}, loss {scores.loss:.4f}, macro-F1 {scores.macro_f1:.2%}, "
        f"calibration error {scores.calibration_error:.2%}"
    )
