"""The order of an epoch's samples as a pure function of (seed, epoch, position).

The order is a keyed bijection on [0, num_samples), so any slice of it can be computed on its own. It takes O(batch)
memory for any data set size, and makes resuming and sharding simple. Ranks take contiguous slices of one global
batch: for the same global batch size, every world size sees the same samples in the same step.

The bijection is a generalized Feistel network over Z_a x Z_b with a*b >= num_samples and cycle walking: Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, sections 3 and 5. Its round function is SplitMix64's finalizer,
`random.mix64`.

If the last batch of an epoch (its tail) is incomplete, training drops it (different samples every epoch) or pads it
with the epoch's first samples. Evaluation keeps it, and ranks may get different numbers of its samples.
"""

from math import isqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastflower.draws.random import GOLDEN_GAMMA, Stream, mix64, stream_key
from fastflower.errors import ArgumentError, require

MAX_SAMPLES = 1 << 62  # both Feistel halves fit in 32 bits, and no product overflows
# With eight rounds, the 5,040 orders of seven samples pass a chi-square test of uniformity; with four they fail.
_ROUNDS = 8


def permute(positions: ArrayLike, num_samples: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the indices of the samples at `positions` in an epoch's order.

    positions  Integers (N,) in [0, num_samples). num_samples  From 1 to 2**62.
    Returns (N,) int64. Raises ArgumentError if a position is outside the epoch.

    Example:
        >>> from fastflower.draws.order import permute
        >>> permute(range(10), 10, seed=0, epoch=0).tolist()
        [5, 8, 2, 3, 1, 4, 6, 7, 9, 0]
        >>> permute([7, 8], 10, seed=0, epoch=0).tolist()  # any slice on its own
        [7, 9]
        >>> permute([7, 8], 10**12, seed=0, epoch=0).shape
        (2,)
    """
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ArgumentError(f"num_samples must be from 1 to 2**62, got {num_samples}.")
    values = _checked(positions, num_samples)
    rows = isqrt(num_samples - 1) + 1
    columns = -(-num_samples // rows)
    keys = mix64(np.uint64(stream_key(seed, epoch)) + np.arange(_ROUNDS, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA))
    walking = _network(values.astype(np.uint64), rows, columns, keys)
    while True:  # rows * columns exceeds num_samples by less than `rows`, so few values are outside
        outside = walking >= np.uint64(num_samples)
        if not outside.any():
            return walking.astype(np.int64)
        walking[outside] = _network(walking[outside], rows, columns, keys)


def _checked(positions: ArrayLike, count: int) -> NDArray[np.int64]:
    values = np.asarray(positions, np.int64)
    if values.size and not (values.min() >= 0 and values.max() < count):
        raise ArgumentError(f"positions must be from 0 to {count - 1}, got {values.min()} to {values.max()}.")
    return values


def _network(values: NDArray[np.uint64], rows: int, columns: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the keyed bijection on [0, rows * columns). Each round shifts one half by a keyed hash of the other."""
    left, right = np.divmod(values, np.uint64(columns))
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = _shift(left, mix64(right + key), rows)
        else:
            right = _shift(right, mix64(left + key), columns)
    return left * np.uint64(columns) + right


def _shift(half: NDArray[np.uint64], noise: NDArray[np.uint64], modulus: int) -> NDArray[np.uint64]:
    """Return (offset + half) or (offset - half) modulo `modulus`, with the offset and sign taken from noise.

    With an odd modulus, every addition is an even permutation. Additions alone would reach only half the orders of seven
    samples. A multiplication scales the upper 32 bits of noise to [0, modulus), which is cheaper than a division.
    """
    size = np.uint64(modulus)
    offset = ((noise >> np.uint64(32)) * size) >> np.uint64(32)
    total = offset + np.where(noise & np.uint64(1), size - half, half)
    return np.where(total >= size, total - size, total)


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the entire order of an epoch, (num_samples,) int64: a permutation of range(num_samples)."""
    return permute(np.arange(num_samples), num_samples, seed=seed, epoch=epoch)


def num_steps(num_samples: int, global_batch_size: int, *, drop_tail: bool) -> int:
    """Return the number of steps in an epoch, which is the same on every rank."""
    return num_samples // global_batch_size if drop_tail else -(-num_samples // global_batch_size)


def step_positions(
    step: int, num_samples: int, global_batch_size: int, *, rank: int = 0, world_size: int = 1, pad: bool = False
) -> NDArray[np.int64]:
    """Return the positions in the epoch's order that `rank` loads in `step`, int64.

    All ranks get the same number of positions; in an unpadded tail, the numbers may differ by one.
    pad  Fill the tail with the epoch's first positions, repeated as needed.
    """
    if not 0 <= rank < world_size:
        raise ArgumentError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}.")
    start = step * global_batch_size
    count = global_batch_size if pad else min(global_batch_size, num_samples - start)
    first, end = rank * count // world_size, (rank + 1) * count // world_size
    return np.arange(start + first, start + end) % num_samples


class Windows:
    """An order that reads `window` shards at a time: it shuffles the shards, then the samples within each window.

    Like `permute`, it is a pure function of (seed, epoch, position), and each epoch contains every sample once. It
    takes O(S) memory for S shards. The layout of an epoch is computed on first use.

    shard_samples  Number of samples in each shard, (S,), in the order of the index.
    shuffle  False keeps the order of the index. Raises ArgumentError if `window` is less than 1.
    """

    def __init__(self, shard_samples: ArrayLike, window: int, *, seed: int, shuffle: bool = True) -> None:
        require(window >= 1, "window", "at least 1 shard", window)
        self._samples = np.asarray(shard_samples, np.int64)
        self._first_index = np.cumsum(self._samples) - self._samples  # of each shard
        self._window, self._seed, self._shuffle = window, seed, shuffle
        self._laid_out: tuple[int, NDArray[np.int64]] | None = None

    def indices(self, positions: ArrayLike, epoch: int) -> NDArray[np.int64]:
        """Return the indices (N,) of the samples at `positions`, (N,). Raises ArgumentError like `permute`."""
        shards, starts, ends = self._layout(epoch)
        values = _checked(positions, int(ends[-1]))
        if not self._shuffle:
            return values
        windows = np.searchsorted(ends, values, "right") // self._window
        shuffled = np.empty(len(values), np.int64)  # new positions, each within its window
        for window in np.unique(windows):
            start = starts[window * self._window]
            end = ends[min((window + 1) * self._window, len(shards)) - 1]
            rows = np.flatnonzero(windows == window)
            window_seed = stream_key(self._seed, int(window), Stream.WINDOWS)
            shuffled[rows] = start + permute(values[rows] - start, int(end - start), seed=window_seed, epoch=epoch)
        turn = np.searchsorted(ends, shuffled, "right")
        return self._first_index[shards[turn]] + shuffled - starts[turn]

    def ahead(self, positions: ArrayLike, epoch: int) -> list[int]:
        """Return the shards in the windows of `positions`, then in the next window, which may be in the next epoch."""
        shards, _, ends = self._layout(epoch)
        windows = np.unique(np.searchsorted(ends, np.asarray(positions, np.int64), "right") // self._window)
        ahead: list[int] = []
        for window in (*windows, windows[-1] + 1):  # consecutive, except in a padded tail
            ahead += shards[window * self._window : (window + 1) * self._window].tolist()
        missing = (int(windows[-1]) + 2) * self._window - len(shards)
        if missing > 0:
            ahead += self._shard_order(epoch + 1)[: min(missing, self._window)].tolist()
        return list(dict.fromkeys(ahead))

    def _layout(self, epoch: int) -> NDArray[np.int64]:
        """Return (3, S): the shards in the order of an epoch, and the positions where each shard starts and ends."""
        if self._laid_out is None or self._laid_out[0] != epoch:
            shards = self._shard_order(epoch)
            ends = np.cumsum(self._samples[shards])
            self._laid_out = (epoch, np.stack([shards, ends - self._samples[shards], ends]))
        return self._laid_out[1]

    def _shard_order(self, epoch: int) -> NDArray[np.int64]:
        count = len(self._samples)
        return epoch_order(count, seed=self._seed, epoch=epoch) if self._shuffle else np.arange(count)


def balanced(
    positions: ArrayLike, by_class: NDArray[np.int64], class_samples: ArrayLike, *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Like `permute`, but draw all classes equally often: within an epoch, some samples repeat and others are skipped.

    by_class  Indices of all samples, (N,), grouped by class in ascending order.
    class_samples  Number of samples in each class, (K,).
    An epoch still has N samples. All classes appear equally often, to within one. Within a class, so do all samples.
    Each epoch draws different samples from a large class.
    """
    counts = np.asarray(class_samples, np.int64)
    classes = np.flatnonzero(counts)
    rounds, turn = np.divmod(permute(positions, len(by_class), seed=seed, epoch=epoch), len(classes))
    label = classes[turn]
    cycle, offset = np.divmod(rounds, counts[label])  # a cycle is one pass over the samples of a class
    chosen = (np.cumsum(counts) - counts)[label]
    for one_label, one_cycle in np.unique(np.stack([label, cycle]), axis=1).T.tolist():
        rows = np.flatnonzero((label == one_label) & (cycle == one_cycle))
        cycle_seed = stream_key(seed, one_label, one_cycle, Stream.CLASSES)
        chosen[rows] += permute(offset[rows], int(counts[one_label]), seed=cycle_seed, epoch=epoch)
    return by_class[chosen]
