"""Divides the training images into folds for cross-validation."""

from heapq import heapify, heapreplace
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray


def assign_folds(labels: NDArray[np.int64], groups: NDArray[np.int64], count: int) -> NDArray[np.uint32]:
    """Assign each image to one of `count` folds, (N,), without dividing groups.

    The sizes of a class in two folds differ by at most one image, unless large groups prevent this. Groups come first, from
    the largest to the smallest. Then the other images fill the folds, in order: if the images are shuffled, this is random,
    and most images of a fold lie in few shards.

    labels  (N,) class of each image. groups  (N,) numbers that are equal within a group.
    """
    folds = np.zeros(len(labels), np.uint32)
    totals = np.zeros(count, np.int64)
    sizes = np.zeros((labels.max(initial=-1) + 1, count), np.int64)  # images of each class in each fold
    _, group, members = np.unique(groups, return_inverse=True, return_counts=True)
    shared = members[group] > 1
    for images in sorted(_divided(np.flatnonzero(shared), group), key=lambda images: (-len(images), images[0])):
        classes, counts = np.unique(labels[images], return_counts=True)
        fold = np.lexsort((totals, counts @ sizes[classes]))[0]  # the smallest, counting these classes
        folds[images] = fold
        sizes[classes, fold] += counts
        totals[fold] += len(images)
    for images in _divided(np.flatnonzero(~shared), labels):
        smallest = list(zip(sizes[labels[images[0]]].tolist(), totals.tolist(), range(count), strict=True))  # a heap
        heapify(smallest)
        for _ in images:
            size, total, fold = smallest[0]
            heapreplace(smallest, (size + 1, total + 1, fold))
        after = np.array([total for _, total, _ in sorted(smallest, key=itemgetter(2))])
        folds[images] = np.repeat(np.arange(count), after - totals)
        totals = after
    return folds


def _divided(images: NDArray[np.int64], numbers: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Divide images by their number in `numbers`, in ascending order within each part. Leaves out empty parts."""
    ordered = images[np.argsort(numbers[images], kind="stable")]
    return np.split(ordered, np.flatnonzero(np.diff(numbers[ordered])) + 1) if len(images) else []
