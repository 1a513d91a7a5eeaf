"""What a set of predictions is worth. Shape suffixes: N samples, K classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_CALIBRATION_BINS = 15


@dataclass(frozen=True, slots=True)
class Scores:
    """What `evaluate` returns.

    Row i of labels, probabilities and paths is sample i of the split, the index that `Loader` gives it, whatever the batch size,
    the number of ranks or the order of reading: they may be zipped.
    """

    classes: tuple[str, ...]
    loss: float
    """Mean cross-entropy, in nats."""
    confusion: NDArray[np.int64]
    """(K, K) samples by true class (row) and predicted class (column)."""
    labels: NDArray[np.int64]
    """(N,) true classes, by index in the split."""
    probabilities: NDArray[np.float32]
    """(N, K) by index in the split."""
    paths: Sequence[str] = ()
    """(N,) by index in the split: each image's path, relative to the folder that was packed, read from the shards when it is
    asked for."""

    @property
    def predictions(self) -> NDArray[np.int64]:
        """(N,) most probable classes, by index in the split."""
        return self.probabilities.argmax(axis=1)

    @property
    def confidence(self) -> NDArray[np.float32]:
        """(N,) their probabilities."""
        return self.probabilities.max(axis=1)

    @property
    def num_samples(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """The share of samples whose most probable class is the true one, in [0, 1]."""
        return float(np.trace(self.confusion) / self.num_samples)

    @property
    def recall(self) -> Floats:
        """(K,) share of each class's samples that were found; NaN for a class without samples."""
        return _ratio(np.diag(self.confusion), self.confusion.sum(axis=1))

    @property
    def precision(self) -> Floats:
        """(K,) share of the samples given to each class that belong to it; NaN for a class never predicted."""
        return _ratio(np.diag(self.confusion), self.confusion.sum(axis=0))

    @property
    def macro_f1(self) -> float:
        """The mean over classes of 2 * hits / (samples + predictions); a class with neither is left out (scikit-learn's)."""
        correct, both = np.diag(self.confusion), self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        return float(np.nanmean(_ratio(2 * correct, both)))

    @property
    def calibration_error(self) -> float:
        """Expected calibration error, in [0, 1]: how far probabilities of the predicted classes lie from the share that is right.

        The mean over 15 bins of equal width of |accuracy - mean probability|, weighted by samples (Guo et al. 2017).
        """
        confidence = self.confidence.astype(np.float64)
        gap = (self.predictions == self.labels) - confidence
        bins = np.minimum(
            np.ceil(confidence * _CALIBRATION_BINS).astype(np.int64) - 1, _CALIBRATION_BINS - 1
        )  # open below, closed above
        return float(np.abs(np.bincount(bins, gap, _CALIBRATION_BINS)).sum() / len(gap))


def score(
    classes: tuple[str, ...],
    labels_N: NDArray[np.int64],
    log_probabilities_NK: NDArray[np.float32],
    paths_N: Sequence[str] = (),
) -> Scores:
    """Scores from the logarithms of the predicted probabilities."""
    predicted = log_probabilities_NK.argmax(axis=1)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (labels_N, predicted), 1)
    loss = -float(log_probabilities_NK[np.arange(len(labels_N)), labels_N].mean(dtype=np.float64))
    return Scores(classes, loss, confusion, labels_N, np.exp(log_probabilities_NK), paths_N)


def _ratio(counts: NDArray[np.int64], totals: NDArray[np.int64]) -> Floats:
    return np.divide(counts, totals, out=np.full(len(counts), np.nan), where=totals > 0)
