"""Counter-based random numbers: each is a pure function of (seed, epoch, index, slot).

Uses SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014) with Stafford's
constants ("Mix13"). Shape suffixes: N samples, A attempts, S slots.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, SplitMix64's increment
ATTEMPTS = 10  # before the fallback, as in torchvision's RandomResizedCrop and RandomErasing


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply SplitMix64's finalizer elementwise: a bijection in which every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def stream_key(*words: int) -> int:
    """Hash integers such as (seed, epoch) to a 64-bit key. Every input affects every bit of the key."""
    key = 0
    for word in words:
        key = int(mix64(np.array([(key + GOLDEN_GAMMA + word) % 2**64], np.uint64))[0])
    return key


class Stream(IntEnum):
    """Constants that give each use of a seed its own `stream_key`. The order of an epoch uses none. Never renumber."""

    DRAWS = 1
    MIXES = 2
    WINDOWS = 3
    CLASSES = 4


class Slot(IntEnum):
    """Position of each random number in a sample's stream. Never renumber: every recorded draw depends on it."""

    FLIP = 0
    FLIP_VERTICAL = 1
    ROTATE = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    SCALE = 5
    SHEAR_X = 6
    SHEAR_Y = 7
    BRIGHTNESS = 8
    CONTRAST = 9
    SATURATION = 10
    HUE = 11
    ERASE = 12
    AFFINE_ROTATE = 13
    GRAYSCALE = 14
    JITTER_APPLIES = 15
    CROP = 16  # ATTEMPTS areas, ATTEMPTS ratios, then top and left
    ROTATE_APPLIES = 38
    AFFINE_APPLIES = 39
    ERASE_BOX = 40  # the same layout as CROP
    # Unused: 62, 63.


_SLOTS = 64


class Dice:
    """Random numbers for a batch, (N, S), uniform in [0, 1): one per sample and slot.

    A sample's stream starts at a hash of (seed, epoch, index). A slot is an offset into that stream.
    """

    def __init__(self, seed: int, epoch: int, indices_N: NDArray[np.int64]) -> None:
        key = np.uint64(stream_key(seed, epoch, Stream.DRAWS))
        starts = mix64(mix64(indices_N.astype(np.uint64) * np.uint64(GOLDEN_GAMMA) + key))
        jumps = np.arange(1, _SLOTS + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
        bits = mix64(starts[:, None] + jumps[None, :])
        self.numbers_NS: Floats = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def uniform(self, slot: int, count: int = 1) -> Floats:
        """Return the numbers of `count` slots, starting at `slot`: (N, count), uniform in [0, 1)."""
        return self.numbers_NS[:, slot : slot + count]

    def between(self, least: float, most: float, slot: int, count: int | None = None) -> Floats:
        """Return numbers uniform in [least, most): (N,), or (N, count) if `count` is given."""
        values = self.uniform(slot, count or 1)
        return least + (most - least) * (values if count else values[:, 0])

    def happens(self, probability: float, slot: int) -> NDArray[np.bool_]:
        """Return True with this probability, (N,)."""
        return self.numbers_NS[:, slot] < probability

    def position(self, room_N2: NDArray[np.int64] | Floats, slot: int) -> Floats:
        """Return whole numbers (N, 2), each uniform in 0 .. room."""
        return np.floor(self.uniform(slot, 2) * (room_N2 + 1))

    def sides(
        self, share: tuple[float, float], area_N: NDArray[np.int64], ratio: tuple[float, float], slot: int
    ) -> Floats:
        """Draw ten rectangles per sample, with area fraction and aspect ratio in these ranges. Return their sides (N, 10, 2)."""
        areas_NA = self.between(*share, slot, ATTEMPTS) * area_N[:, None]
        ratios_NA = np.exp(self.between(float(np.log(ratio[0])), float(np.log(ratio[1])), slot + ATTEMPTS, ATTEMPTS))
        return np.rint(np.sqrt(np.stack([areas_NA / ratios_NA, areas_NA * ratios_NA], axis=-1)))

    def first_fit(
        self, sides_NA2: Floats, fits_NA2: NDArray[np.bool_], sizes_N2: NDArray[np.int64], slot: int
    ) -> tuple[NDArray[np.bool_], Floats]:
        """Return whether any attempt fits, (N,), and the first rectangle that fits, at a random position, (N, 4)."""
        fits_NA: NDArray[np.bool_] = np.logical_and(fits_NA2[..., 0], fits_NA2[..., 1])
        rows = np.arange(len(fits_NA))
        first = np.argmax(fits_NA, axis=1)
        chosen = sides_NA2[rows, first]
        corner = self.position(sizes_N2 - chosen, slot + 2 * ATTEMPTS)
        return fits_NA[rows, first], np.concatenate([corner, chosen], axis=1)

    def factor(self, strength: float, slot: int) -> Floats:
        """Return factors (N,), uniform in [max(0, 1 - strength), 1 + strength)."""
        return self.between(max(0.0, 1 - strength), 1 + strength, slot)
