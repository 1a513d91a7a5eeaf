"""Classification metrics. Shapes: N samples, K classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastflower.tables import MOST_ROWS, html_table

Floats = NDArray[np.float64]
_CALIBRATION_BINS = 15


@dataclass(frozen=True, slots=True)
class Scores:
    """Metrics and predictions, as returned by `evaluate`.

    Row i of labels, probabilities and paths belongs to sample i of the split, where i is the index that `Loader` yields. This
    holds for any batch size and any number of ranks, so these arrays can be zipped.
    """

    classes: tuple[str, ...]
    loss: float
    """Mean cross-entropy, in nats."""
    confusion: NDArray[np.int64]
    """(K, K) sample counts by true class (row) and predicted class (column)."""
    labels: NDArray[np.int64]
    """(N,) indices of the true classes."""
    probabilities: NDArray[np.float32]
    """(N, K) predicted probabilities."""
    paths: Sequence[str] = ()
    """(N,) image paths relative to the packed folder, read from the shards when accessed."""
    split: str = ""
    """The split that `evaluate` scored."""

    def __repr__(self) -> str:
        return f"Scores({self._summary()}, classes={len(self.classes)})"

    def _repr_html_(self) -> str:
        """Return the scores of each class, for notebooks; of many classes, those with the lowest recall."""
        precision, recall, few = self.precision, self.recall, len(self.classes) <= MOST_ROWS
        shown = range(len(self.classes)) if few else np.argsort(recall, kind="stable")[:MOST_ROWS]
        columns = ["class", "samples", "precision", "recall"]
        rows = [
            (self.classes[label], self.confusion[label].sum(), percent(precision[label]), percent(recall[label]))
            for label in shown
        ]
        more = f"macro_f1={self.macro_f1:.3f}, calibration_error={self.calibration_error:.3f}"
        which = "" if few else f"; of {len(self.classes)} classes, those with the lowest recall"
        return f"<p>{self._summary()}, {more}{which}</p>{html_table(columns, rows)}"

    def _summary(self) -> str:
        count = len(self.labels)
        correct = int(np.trace(self.confusion))
        return f"accuracy={correct / max(1, count):.3f} ({correct} of {count}), loss={self.loss:.3f}"

    @property
    def predictions(self) -> NDArray[np.int64]:
        """(N,) indices of the most probable classes."""
        return self.probabilities.argmax(axis=1)

    @property
    def confidence(self) -> NDArray[np.float32]:
        """(N,) probabilities of the most probable classes."""
        return self.probabilities.max(axis=1)

    @property
    def mistakes(self) -> NDArray[np.int64]:
        """(M,) int64 indices of the samples that are predicted wrongly, the most confident first.

        Their images are [scores.paths[i] for i in scores.mistakes].
        """
        wrong = np.flatnonzero(self.predictions != self.labels)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]

    @property
    def num_samples(self) -> int:
        return int(self.confusion.sum())

    @property
    def support(self) -> NDArray[np.int64]:
        """(K,) number of samples of each class; 0 for a class of the checkpoint that the evaluated images lack."""
        return self.confusion.sum(axis=1)

    @property
    def accuracy(self) -> float:
        """Fraction of correct predictions, in [0, 1]."""
        return float(np.trace(self.confusion) / self.num_samples)

    @property
    def recall(self) -> Floats:
        """(K,) fraction of each class's samples that are predicted correctly; NaN for a class without samples."""
        return _ratio(np.diag(self.confusion), self.support)

    @property
    def precision(self) -> Floats:
        """(K,) fraction of each class's predictions that are correct; NaN for a class that is never predicted."""
        return _ratio(np.diag(self.confusion), self.confusion.sum(axis=0))

    @property
    def macro_f1(self) -> float:
        """Mean F1 over classes, skipping classes with neither samples nor predictions, as in scikit-learn."""
        correct, both = np.diag(self.confusion), self.confusion.sum(axis=0) + self.support
        return float(np.nanmean(_ratio(2 * correct, both)))

    @property
    def calibration_error(self) -> float:
        """Expected calibration error, in [0, 1]: mean gap between confidence and accuracy.

        The mean of |accuracy - mean confidence| over 15 bins of equal width, weighted by sample count (Guo et al. 2017).
        """
        confidence = self.confidence.astype(np.float64)
        gap = (self.predictions == self.labels) - confidence
        bins = np.ceil(confidence * _CALIBRATION_BINS).astype(np.int64).clip(max=_CALIBRATION_BINS) - 1  # (low, high]
        return float(np.abs(np.bincount(bins, gap, _CALIBRATION_BINS)).sum() / len(gap))


def percent(share: float) -> str:
    """Format a fraction as a percentage; "undefined" for NaN."""
    return "undefined" if np.isnan(share) else f"{share:.1%}"


def score(
    classes: tuple[str, ...],
    labels_N: NDArray[np.int64],
    log_probabilities_NK: NDArray[np.float32],
    paths_N: Sequence[str] = (),
) -> Scores:
    """Compute scores from log-probabilities."""
    predicted = log_probabilities_NK.argmax(axis=1)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (labels_N, predicted), 1)
    loss = -float(log_probabilities_NK[np.arange(len(labels_N)), labels_N].mean(dtype=np.float64))
    return Scores(classes, loss, confusion, labels_N, np.exp(log_probabilities_NK), paths_N)


def _ratio(counts: NDArray[np.int64], totals: NDArray[np.int64]) -> Floats:
    return np.divide(counts, totals, out=np.full(len(counts), np.nan), where=totals > 0)
