"""Duplicates: the results match a dictionary of checksums, a comparison of every pair of hashes, and imagehash."""

import hashlib
import io
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from fastflower.packing import duplicates
from fastflower.packing.duplicates import NEAR_BITS, Groups, identical, nearest
from fastflower.packing.folder import Folder, scan
from fastflower.shards.image import perceptual_hash, prepare

TAIL = 4096  # bytes: the end of a file, which is read first


def write(root: Path, contents: Iterable[bytes]) -> Folder:
    """Make a folder of two classes in which image n has the n-th contents."""
    every = list(contents)
    for number, content in enumerate(every):
        path = root / ("a" if number < len(every) // 2 else "b") / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = scan(root)
    assert len(found) == len(every)
    return found


def listed(groups: Groups) -> list[list[int]]:
    return [group.tolist() for group in groups]


def by_checksum(found: Folder) -> list[list[int]]:
    """Return the expected groups of files that are not empty, from a dictionary, which keeps the order of the first images."""
    numbers: dict[str, list[int]] = {}
    for number in range(len(found)):
        path = found.root / found.path(number)
        if path.is_file() and path.stat().st_size:
            numbers.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), []).append(number)
    return [group for group in numbers.values() if len(group) > 1]


class Recorded:
    """A map that records its items."""

    def __init__(self) -> None:
        self.rounds: list[list[list[tuple[Path, str, bool]]]] = []

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        self.rounds.append(list(items))
        return map(function, self.rounds[-1])

    def read(self, number: int) -> list[str]:
        """Return the names of the files read in one round: 0 reads ends, 1 reads whole files."""
        files = [file for job in self.rounds[number] for file in job]
        assert {whole for _, _, whole in files} <= {bool(number)}
        return sorted(path.rpartition("/")[2].removesuffix(".jpg") for _, path, _ in files)


@pytest.mark.parametrize("seed", range(8))
def test_groups_match_a_dictionary_of_checksums(tmp_path: Path, seed: int) -> None:
    """Contents have few sizes, heads and tails. The sizes are around the length of the end that is read first."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 1, 2, 100, TAIL - 1, TAIL, TAIL + 1, 2 * TAIL + 1], 150)
    found = write(tmp_path, (bytes(rng.integers(0, 2, 1, np.uint8)) * int(size) for size in sizes))
    for number in rng.choice(150, 40, replace=False):  # one byte differs: the first, the last or a middle one
        path = found.root / found.path(int(number))
        content = bytearray(path.read_bytes())
        if content:
            content[int(rng.choice([0, -1, len(content) // 2]))] ^= 0x80
        path.write_bytes(content)
    groups = identical(found)
    assert listed(groups) == by_checksum(found)
    assert len(listed(groups)) > 10
    assert groups.members.dtype == groups.ends.dtype == np.int64


def test_all_different_images_make_no_group(tmp_path: Path) -> None:
    for name, contents in {"sizes": [b"x" * size for size in range(9)], "bytes": [b"%d" % n for n in range(9)]}.items():
        groups = identical(write(tmp_path / name, contents))
        assert (listed(groups), groups.members.shape, groups.ends.shape) == ([], (0,), (0,))


def test_all_equal_images_are_one_group(tmp_path: Path) -> None:
    assert listed(identical(write(tmp_path, [b"the same"] * 300))) == [list(range(300))]


def test_groups_are_in_the_order_of_their_first_images(tmp_path: Path) -> None:
    contents = [b"long" * 9, b"b", b"unlike", b"a", b"", b"b", b"long" * 9, b"a", b"b", b""]
    assert listed(identical(write(tmp_path, contents))) == [[0, 6], [1, 5, 8], [3, 7]]


def test_files_are_read_only_if_sizes_match_and_in_full_only_if_ends_match(tmp_path: Path) -> None:
    end = bytes(TAIL)
    contents = {
        "alone": b"no other has this size",
        "other end": b"x" + end[:-1] + b"1",
        "other head": b"y" + end,
        "twice": b"x" + end,
        "twice too": b"x" + end,
        "longer": b"xy" + end,
        "longer too": b"xy" + end[:-1] + b"2",
    }
    found, recorded = write(tmp_path, contents.values()), Recorded()
    assert listed(identical(found, recorded)) == [[3, 4]]
    assert recorded.read(0) == [f"{number:04d}" for number in range(1, 7)]
    assert recorded.read(1) == ["0002", "0003", "0004"]


def test_only_the_ends_of_large_files_are_read(tmp_path: Path) -> None:
    """The files have 8 GB of zeros before the last byte. Reading half of them takes more than two seconds."""
    found = write(tmp_path, [b"1", b"2"])
    for number in range(2):
        with (found.root / found.path(number)).open("r+b") as file:
            file.seek(4 << 30)
            file.write(b"%d" % number)
    found = scan(tmp_path)
    start = time.perf_counter()
    assert listed(identical(found)) == []
    assert time.perf_counter() - start < 2


def test_many_files_are_read_in_jobs_of_at_most_256(tmp_path: Path) -> None:
    recorded = Recorded()
    identical(write(tmp_path, (b"%03d" % (number // 2) for number in range(514))), recorded)
    for jobs in recorded.rounds:
        assert sum(map(len, jobs)) == 514
        assert max(map(len, jobs)) <= 256


def test_threads_find_the_same_groups(tmp_path: Path) -> None:
    found = write(tmp_path, (b"%03d" % (number * number % 331) for number in range(700)))
    with ThreadPoolExecutor(4) as pool:
        assert listed(identical(found, pool.map)) == listed(identical(found)) == by_checksum(found)


def test_unreadable_files_are_in_no_group(tmp_path: Path) -> None:
    """Broken links, removed files and files replaced by folders are in no group, nor are empty files and web pages."""
    found = write(tmp_path, [b"", b"", b"same", b"same", b"same", b"same", b"gone", b"gone", *[b"<html>"] * 2])
    for number in (4, 5, 6, 7):
        (found.root / found.path(number)).unlink()
    (found.root / found.path(5)).mkdir()
    (found.root / "a/nothing.jpg").symlink_to("nowhere")
    (found.root / "b/nothing.jpg").symlink_to("nowhere")
    assert listed(identical(found)) == [[2, 3]]
    again = scan(found.root)
    names = [[again.path(number) for number in group] for group in identical(again)]
    assert names == [["a/0002.jpg", "a/0003.jpg"]]


def test_a_file_removed_between_the_two_reads_is_in_no_group(tmp_path: Path) -> None:
    found = write(tmp_path, [b"same"] * 3)

    def map_then_remove(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        made = [function(item) for item in items]
        (found.root / found.path(1)).unlink(missing_ok=True)
        return made

    assert listed(identical(found, map_then_remove)) == [[0, 2]]


Hashes = NDArray[np.uint64]


def compared(queries: Hashes, hashes: Hashes) -> tuple[list[int], list[int]]:
    """Return the expected result of `nearest`, from comparing every pair."""
    positions, distances = [], []
    for query in queries.tolist():
        bits = [(query ^ other).bit_count() for other in hashes.tolist()]
        best = min(bits, default=65)
        near = best <= NEAR_BITS
        positions.append(bits.index(best) if near else -1)
        distances.append(best if near else -1)
    return positions, distances


def same_as_compared(queries: Hashes, hashes: Hashes) -> None:
    positions, distances = nearest(queries, hashes)
    assert positions.dtype == distances.dtype == np.int64
    assert (positions.tolist(), distances.tolist()) == compared(queries, hashes)


def flipped(value: int, bits: Iterable[int]) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


HASH = st.integers(0, 2**64 - 1)
NEAR = st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 63), max_size=9)), max_size=12)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(centers=st.lists(HASH, min_size=6, max_size=6), queries=NEAR, hashes=NEAR)
def test_nearest_matches_a_comparison_of_every_pair(centers: list[int], queries: Any, hashes: Any) -> None:
    """Both sides scatter around six centers, so there are duplicates, ties, and distances on both sides of the limit."""
    left, right = (
        np.array([flipped(centers[center], bits) for center, bits in side], np.uint64) for side in (queries, hashes)
    )
    same_as_compared(left, right)


def scattered(rng: np.random.Generator, count: int) -> Hashes:
    """Return hashes 0 to 9 bits away from ten centers."""
    centers = [0, 2**64 - 1, *range(3, 2**64, 2**61 + 12345)]
    bits = [rng.choice(64, rng.integers(0, 10), replace=False).tolist() for _ in range(count)]
    return np.array([flipped(centers[number % len(centers)], some) for number, some in enumerate(bits)], np.uint64)


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000, 1 << 20])
def test_the_size_of_chunks_of_pairs_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    rng, counting = np.random.default_rng(0), Mock(wraps=np.bitwise_count)
    queries, hashes = scattered(rng, 200), scattered(rng, 300)
    monkeypatch.setattr(duplicates, "_CHUNK", chunk)
    monkeypatch.setattr(duplicates.np, "bitwise_count", counting)
    same_as_compared(queries, hashes)
    assert set(compared(queries, hashes)[1]) == {-1, *range(7)}
    pairs = [len(call.args[0]) for call in counting.call_args_list]
    assert max(pairs) <= max(chunk, 300)  # the pairs of a query are not divided
    assert len(pairs) <= 28 + 2 * sum(pairs) / chunk  # two consecutive runs exceed a chunk


def test_hashes_are_near_up_to_six_bits() -> None:
    value = 0x123456789ABCDEF0
    assert NEAR_BITS == 6
    for count in range(65):
        positions, distances = nearest(
            np.array([value], np.uint64), np.array([flipped(value, range(count))], np.uint64)
        )
        expected = (0, count) if count <= 6 else (-1, -1)
        assert (positions.item(), distances.item()) == expected


def test_six_bits_are_found_wherever_they_lie() -> None:
    """This includes the worst case: six bits that make all but two of the eight bands differ."""
    places = [*itertools.combinations(range(0, 64, 8), 6), *itertools.combinations(range(4, 64, 8), 6)]
    places += itertools.combinations(range(7, 64, 8), 6)
    hashes = np.array([flipped(0, bits) for bits in places], np.uint64)
    for value in hashes:
        assert nearest(np.zeros(1, np.uint64), np.array([value]))[1].tolist() == [6]


def test_the_first_of_equally_near_hashes_is_found() -> None:
    hashes = np.array([0xFF, 0b10, 0b1, 0b1, 0b0, 0b0], np.uint64)
    positions, distances = nearest(np.array([0b0, 0b11, 0b101, 0xFF], np.uint64), hashes)
    assert positions.tolist() == [4, 1, 2, 0]
    assert distances.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(("queries", "hashes"), [(0, 0), (0, 3), (3, 0)])
def test_nothing_is_near_nothing(queries: int, hashes: int) -> None:
    positions, distances = nearest(np.zeros(queries, np.uint64), np.zeros(hashes, np.uint64))
    assert positions.tolist() == distances.tolist() == [-1] * queries


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    target = io.BytesIO()
    image.save(target, "JPEG", quality=quality)
    return target.getvalue()


def hashes_of(encoded: Iterable[bytes]) -> Hashes:
    return np.array([prepare(data, max_side=None, quality=None).hash for data in encoded], np.uint64)


def hash_of_imagehash(image: Image.Image) -> int:
    return int(str(imagehash.phash(image)), 16)


def test_the_hash_of_32_x_32_pixels_equals_imagehash_bit_for_bit(image_files: list[Path]) -> None:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)) for _ in range(300)]
    small = [Image.open(path).convert("L").resize((32, 32), Image.Resampling.LANCZOS) for path in image_files]
    for image in (*noise, *small):
        assert perceptual_hash(np.asarray(image)) == hash_of_imagehash(image)


def test_the_hash_of_an_image_is_close_to_imagehash(image_files: list[Path]) -> None:
    """The two downscale differently. Real images differ in 1.0 bits on average, drawn ones in 1.7; at most 6."""
    ours = hashes_of(path.read_bytes() for path in image_files)
    theirs = np.array([hash_of_imagehash(Image.open(path)) for path in image_files], np.uint64)
    differ = np.bitwise_count(ours ^ theirs)
    assert differ.mean() < 2.5
    assert differ.max() <= 8


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3), (1, 4000)])
def test_the_smallest_images_have_a_hash_of_64_bits(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    assert 0 < perceptual_hash(noise) < 1 << 64
    assert perceptual_hash(np.zeros(size, np.uint8)) == 0


@pytest.mark.parametrize("size", [(31, 33), (32, 400), (95, 97), (96, 96), (97, 191), (193, 385), (1000, 96)])
def test_the_hash_does_not_depend_on_the_size(image_files: list[Path], size: tuple[int, int]) -> None:
    """From about 96 pixels, the image is first halved, so odd sides lose a row or column."""
    gray = Image.open(image_files[0]).convert("L")
    resized = gray.resize(size, Image.Resampling.LANCZOS)
    assert (perceptual_hash(np.asarray(resized)) ^ hash_of_imagehash(gray)).bit_count() <= NEAR_BITS


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG quality 30": lambda image: jpeg(image, 30),
    "half the size": lambda image: jpeg(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)),
    "brighter": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(1.2)),
    "darker": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(0.8)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_modified_images_are_found_again(image_files: list[Path], change: str) -> None:
    """All 150 are found, except that only 146 brightened real images are, because parts of them turn white."""
    opened = [Image.open(path).convert("RGB") for path in image_files]
    originals = hashes_of(path.read_bytes() for path in image_files)
    positions, _ = nearest(hashes_of(map(CHANGES[change], opened)), originals)
    found = np.mean(positions == np.arange(len(image_files)))
    assert found == 1 or (change == "brighter" and found >= 0.97)


def test_other_images_are_far_away(image_files: list[Path]) -> None:
    """None of the 11,175 pairs is closer than 12 bits. The mean is 31, as for random hashes."""
    hashes = hashes_of(path.read_bytes() for path in image_files)
    apart = np.bitwise_count(hashes[:, None] ^ hashes)[np.triu_indices(len(hashes), 1)]
    assert np.mean(apart > 10) > 0.999
    assert 29 < apart.mean() < 33
