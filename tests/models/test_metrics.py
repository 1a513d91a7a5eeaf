"""Scores, compared with a hand-written loop, torch's cross-entropy and torchmetrics."""

from math import isnan

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torchmetrics.classification import MulticlassCalibrationError, MulticlassF1Score

from fastflower.models.metrics import score

CLASSES = ("daisy", "dandelion", "roses", "sunflowers")


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return torch.log_softmax(torch.from_numpy(logits), dim=1).numpy()


def sure_of(predicted: list[int]) -> NDArray[np.float32]:
    """Return logits with probability 1 for the given classes."""
    return np.eye(len(CLASSES), dtype=np.float32)[predicted] * 100


def test_scores_equal_a_hand_written_loop(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 4, 200)
    logits = rng.normal(size=(200, 4)).astype(np.float32)
    logits[np.arange(200), labels] += 1
    scores = score(CLASSES, labels, log_probabilities(logits))

    confusion = [[0] * 4 for _ in range(4)]
    correct, loss = 0, 0.0
    for label, row in zip(labels.tolist(), logits.astype(np.float64).tolist(), strict=True):
        best = max(range(4), key=row.__getitem__)
        confusion[label][best] += 1
        correct += best == label
        exponentials = [float(np.exp(value)) for value in row]
        loss -= float(np.log(exponentials[label] / sum(exponentials))) / 200
    assert scores.confusion.tolist() == confusion
    assert scores.num_samples == 200
    assert scores.accuracy == pytest.approx(correct / 200)
    assert scores.loss == pytest.approx(loss, rel=1e-5)
    for number in range(4):
        right = confusion[number][number]
        assert scores.recall[number] == pytest.approx(right / sum(confusion[number]))
        assert scores.precision[number] == pytest.approx(right / sum(row[number] for row in confusion))
    assert not np.allclose(scores.recall, scores.precision)


def test_the_loss_equals_torchs_cross_entropy(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 4, 1000)
    logits = (5 * rng.normal(size=(1000, 4))).astype(np.float32)
    expected = functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    assert score(CLASSES, labels, log_probabilities(logits)).loss == pytest.approx(expected, rel=1e-5)


def test_scores_keep_labels_and_probabilities_in_order(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 4, 50)
    logits = rng.normal(size=(50, 4)).astype(np.float32)
    scores = score(CLASSES, labels, log_probabilities(logits))
    assert scores.classes == CLASSES
    assert np.array_equal(scores.labels, labels)
    assert np.allclose(scores.probabilities, torch.softmax(torch.from_numpy(logits), dim=1).numpy(), atol=1e-6)


def test_perfect_predictions_score_one() -> None:
    labels = np.array([0, 1, 2, 3, 3, 3])
    scores = score(CLASSES, labels, log_probabilities(sure_of(labels.tolist())))
    assert scores.accuracy == 1
    assert scores.loss == pytest.approx(0, abs=1e-6)
    assert scores.recall.tolist() == scores.precision.tolist() == [1, 1, 1, 1]
    assert scores.confusion.tolist() == np.diag([1, 1, 1, 3]).tolist()


def test_predictions_that_are_always_wrong_score_zero() -> None:
    labels = np.array([0, 1, 2, 3])
    scores = score(CLASSES, labels, log_probabilities(sure_of([1, 2, 3, 0])))
    assert scores.accuracy == 0
    assert scores.loss == pytest.approx(100)
    assert scores.recall.tolist() == scores.precision.tolist() == [0, 0, 0, 0]
    assert np.trace(scores.confusion) == 0


def test_classes_without_samples_or_predictions_score_nan() -> None:
    scores = score(CLASSES, np.array([0, 0, 1]), log_probabilities(sure_of([0, 2, 2])))
    assert scores.recall[:2].tolist() == [0.5, 0]
    assert [isnan(value) for value in scores.recall] == [False, False, True, True]
    assert scores.precision[[0, 2]].tolist() == [1, 0]
    assert [isnan(value) for value in scores.precision] == [False, True, False, True]
    assert scores.accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize("num_samples", [1, 3, 10, 500])
def test_macro_f1_equals_torchmetrics_and_a_hand_written_loop(rng: np.random.Generator, num_samples: int) -> None:
    """With few samples, some of the ten classes have no samples, no predictions, or neither."""
    classes = tuple(f"class {number}" for number in range(10))
    for _ in range(20):
        labels = rng.integers(0, 10, num_samples)
        logits = rng.normal(size=(num_samples, 10)).astype(np.float32)
        logits[np.arange(num_samples), labels] += 1
        found = score(classes, labels, log_probabilities(logits)).macro_f1
        theirs = MulticlassF1Score(10, average="macro")(torch.from_numpy(logits), torch.from_numpy(labels)).item()
        predicted = logits.argmax(axis=1)
        each: list[float] = []
        for number in range(10):
            samples, predictions = labels == number, predicted == number
            if samples.any() or predictions.any():
                each.append(2 * (samples & predictions).sum() / (samples.sum() + predictions.sum()))
        assert found == pytest.approx(sum(each) / len(each), rel=1e-9)
        assert found == pytest.approx(theirs, rel=1e-5)


def test_macro_f1_counts_a_class_that_is_only_predicted_and_skips_one_without_predictions_or_samples() -> None:
    scores = score(CLASSES, np.array([0, 0, 1]), log_probabilities(sure_of([0, 2, 1])))
    assert scores.macro_f1 == pytest.approx((2 / 3 + 1 + 0) / 3)


@pytest.mark.parametrize("num_classes", [2, 5, 40])
@pytest.mark.parametrize("sharpness", [0.1, 1, 5])
def test_the_calibration_error_equals_torchmetrics(
    rng: np.random.Generator, num_classes: int, sharpness: float
) -> None:
    labels = rng.integers(0, num_classes, 700)
    logits = (sharpness * rng.normal(size=(700, num_classes))).astype(np.float32)
    logits[np.arange(700), labels] += sharpness
    logarithms = log_probabilities(logits)
    theirs = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1")
    expected = theirs(torch.from_numpy(logarithms).exp(), torch.from_numpy(labels)).item()
    found = score(tuple(map(str, range(num_classes))), labels, logarithms).calibration_error
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_calibration_error_of_certain_predictions_is_the_error_rate() -> None:
    labels = np.array([0, 1, 2, 3])
    for predicted, expected in (([0, 1, 2, 3], 0), ([1, 2, 3, 0], 1), ([0, 1, 2, 0], 0.25)):
        found = score(CLASSES, labels, log_probabilities(sure_of(predicted))).calibration_error
        assert found == pytest.approx(expected, abs=1e-6)


def test_calibrated_probabilities_have_no_calibration_error() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2, 0.0]] * 10, np.float32)
    labels = np.array([0] * 5 + [1] * 3 + [2] * 2)
    found = score(CLASSES, labels, np.log(np.maximum(probabilities, 1e-30)))
    assert found.accuracy == 0.5
    assert found.calibration_error == pytest.approx(0, abs=1e-6)


def test_mistakes_come_with_the_most_confident_first() -> None:
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.95, 0.05], [0.4, 0.6]], np.float32)
    paths = ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")
    scores = score(("x", "y"), np.array([0, 1, 0, 1, 1]), np.log(probabilities), paths)
    assert scores.mistakes.dtype == np.int64
    assert [paths[i] for i in scores.mistakes] == ["d.jpg", "c.jpg", "b.jpg"]
    assert len(scores.mistakes) == round((1 - scores.accuracy) * scores.num_samples)
    assert score(("x", "y"), np.array([0]), np.log(probabilities[:1])).mistakes.shape == (0,)
