"""Random numbers: SplitMix64's published outputs, keys that depend on every word, uniform and independent slots."""

from math import sqrt

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflower.draws.random import GOLDEN_GAMMA, Dice, mix64, stream_key

MASK = (1 << 64) - 1


def test_mixing_continues_the_published_splitmix64_sequence() -> None:
    # Reference outputs of SplitMix64 for seed 1234567, published by its authors and on Rosetta Code.
    states = np.array([(1234567 + number * GOLDEN_GAMMA) & MASK for number in range(1, 6)], np.uint64)
    assert mix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(value=st.integers(0, MASK))
def test_mixing_has_an_inverse(value: int) -> None:
    """So mix64 is a bijection."""

    def unshift(number: int, shift: int) -> int:
        result = number
        for _ in range(64 // shift):
            result = number ^ (result >> shift)
        return result

    mixed = int(mix64(np.array([value], np.uint64))[0])
    mixed = unshift(mixed, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK
    mixed = unshift(mixed, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK
    assert unshift(mixed, 30) == value


def test_every_word_of_a_key_changes_about_half_of_its_bits() -> None:
    changed: list[int] = []
    for bit in range(64):
        for words in ([1 << bit, 7, 9], [3, 7 ^ (1 << bit), 9], [3, 7, 9 ^ (1 << bit)]):
            changed.append((stream_key(*words) ^ stream_key(3, 7, 9)).bit_count())
    assert min(changed) > 12  # binomial (64, 1/2): mean 32, standard deviation 4
    assert abs(np.mean(changed) - 32) < 1.5


def test_keys_depend_on_the_order_of_their_words() -> None:
    assert len({stream_key(0, 1), stream_key(1, 0), stream_key(0, 0), stream_key(0), stream_key(1), stream_key()}) == 6


def test_uniform_numbers_are_uniform_and_independent() -> None:
    numbers = np.stack([Dice(0, epoch, np.arange(1000)).numbers_NS for epoch in range(8)])  # epochs, indices, slots
    count = numbers.size
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 1 / 2) < 5 * sqrt(1 / 12 / count)
    assert abs(numbers.var() - 1 / 12) < 5 * sqrt(1 / 180 / count)
    assert len(np.unique(numbers)) == count
    centered = (numbers - 1 / 2) * sqrt(12)
    for axis in range(3):
        for lag in (1, 2, 3, 7):
            near, far = np.moveaxis(centered, axis, 0)[:-lag], np.moveaxis(centered, axis, 0)[lag:]
            assert abs((near * far).mean()) < 5 / sqrt(near.size)
    one, other = (Dice(seed, 0, np.arange(9000)).numbers_NS.ravel() - 1 / 2 for seed in (0, 1))
    assert abs(one @ other) < 5 / 12 * sqrt(9000 * 64)


def test_distant_indices_have_different_numbers() -> None:
    numbers = Dice(0, 0, np.array([0, 1, 2**31, 2**32, 2**62, 2**62 + 1])).numbers_NS
    assert numbers.shape[0] == 6
    assert len(np.unique(numbers)) == numbers.size
