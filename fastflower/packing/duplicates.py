"""Finds duplicates: identical files before the split is planned, near-duplicates across splits afterwards."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastflower.files import blame_the_system
from fastflower.packing.folder import Folder
from fastflower.shards.kinds import is_empty_or_page

_TAIL = 4096  # bytes; the end of a compressed image distinguishes it from others of the same size

# Maximum distance of near-duplicates, in bits (of 64). Among 2,848 flower images, 16 pairs are this close, and each pair
# shows the same image. Each of 712 images is still found after JPEG compression at quality 30 or downscaling to half size.
NEAR_BITS = 6

_CHUNK = 1 << 17  # pairs compared at a time, which takes 7 MB

Item = TypeVar("Item")
Result = TypeVar("Result")


class MapLike(Protocol):
    """The builtin map, or a multithreaded map that preserves the order."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterable[Result]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Sets of two or more images with identical bytes."""

    members: NDArray[np.int64]
    """Image numbers, one group after another."""
    ends: NDArray[np.int64]
    """End of each group in `members`."""

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return iter(np.split(self.members, self.ends[:-1]) if len(self.ends) else ())


def identical(folder: Folder, mapped: MapLike = map) -> Groups:
    """Find groups of files with identical bytes. Each group is sorted; groups are in the order of their first image.

    Reads the ends of files only if their sizes match, and entire files only if their ends match too.
    """
    numbers, _ = _group_equal(np.arange(len(folder), dtype=np.int64), folder.files["size"][:, None])
    for whole in (False, True):
        chunks = np.array_split(numbers, -(-len(numbers) // 256)) if len(numbers) else []
        jobs = ([(folder.root, folder.path(n), whole) for n in chunk] for chunk in chunks)
        digests = np.frombuffer(b"".join(mapped(_digests, jobs)), np.uint64).reshape(len(numbers), 2)
        readable = digests.any(axis=1)  # unreadable files are skipped later, when their shard is made
        sizes = folder.files["size"][numbers, None]
        numbers, ends = _group_equal(numbers[readable], np.hstack([digests, sizes])[readable])
    return Groups(numbers, ends)


def _digests(files: list[tuple[Path, str, bool]]) -> bytes:
    """Return 16 bytes of the SHA-256 of each file. Without `whole`, hash only its end. A file gives zeros if it is unreadable,
    empty or a web page.

    files  (root, path, whole) of each file.
    """
    digests: list[bytes] = []
    for root, path, whole in files:
        try:
            with (root / path).open("rb") as file:
                if not whole:
                    file.seek(max(0, file.seek(0, 2) - _TAIL))
                elif is_empty_or_page(file.read(1024)):  # often saved many times, but no image
                    digests.append(bytes(16))
                    continue
                else:
                    file.seek(0)
                digests.append(hashlib.file_digest(file, "sha256").digest()[:16])
        except OSError as error:
            blame_the_system(error, root / path)
            digests.append(bytes(16))
    return b"".join(digests)


def _group_equal(numbers: NDArray[np.int64], keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group image numbers by equal rows in `keys`, and drop groups of one. Return all members, and the end of each group."""
    if not len(numbers):
        return numbers, np.zeros(0, np.int64)
    order = np.lexsort((numbers, *keys.T))
    sorted_keys = keys[order]
    starts = np.flatnonzero(np.append(True, (sorted_keys[1:] != sorted_keys[:-1]).any(axis=1)))
    counts = np.diff(np.append(starts, len(order)))
    kept = np.flatnonzero(counts > 1)
    kept = kept[np.argsort(numbers[order[starts[kept]]])]  # in the order of their first members
    members = [order[start : start + count] for start, count in zip(starts[kept], counts[kept], strict=True)]
    return numbers[np.concatenate(members) if members else np.zeros(0, np.int64)], np.cumsum(counts[kept])


def nearest(queries: NDArray[np.uint64], hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the closest hash for each query: its position and its distance in bits, both -1 if none is within NEAR_BITS.

    queries  (Q,) hashes to find. hashes  (N,) hashes to search; the first wins a tie. Returns two (Q,) arrays.
    """
    hashes, first = np.unique(hashes, return_index=True)
    # Distance in the upper 16 bits, position in the lower 48: the minimum is the closest hash, and the first among ties.
    best = np.full(len(queries), np.iinfo(np.uint64).max)
    for query, place, distance in _near_pairs(queries, hashes):
        np.minimum.at(best, query, distance.astype(np.uint64) << np.uint64(48) | first[place].astype(np.uint64))
    distances = (best >> np.uint64(48)).astype(np.int64)
    positions = (best & np.uint64((1 << 48) - 1)).astype(np.int64)
    near = distances <= NEAR_BITS
    return np.where(near, positions, -1), np.where(near, distances, -1)


def near_groups(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Group hashes that are within NEAR_BITS of each other, directly or through others.

    hashes  (N,). Returns (N,) numbers that are equal within a group and differ between groups.
    """
    hashes, inverse = np.unique(hashes, return_inverse=True)
    root = np.arange(len(hashes))  # a member of each hash's group, the same for all members
    for one, other, _ in _near_pairs(hashes, hashes, root):
        left, right = root[one], root[other]
        while len(apart := np.flatnonzero(left != right)):
            left, right = left[apart], right[apart]
            np.minimum.at(root, np.maximum(left, right), np.minimum(left, right))
            while (root != root[root]).any():
                root[:] = root[root]
            left, right = root[left], root[right]
    return root[inverse]


def _near_pairs(
    queries: NDArray[np.uint64], hashes: NDArray[np.uint64], root: NDArray[np.int64] | None = None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]]:
    """Yield queries and hashes within NEAR_BITS of each other: their positions and distances. A pair may come more than once.

    root  If given, queries and hashes are the same, and pairs with the same root may be left out. The caller may update
    the roots in place. This keeps many hashes that are close to each other from being compared in all pairs.

    Two hashes that differ in at most NEAR_BITS bits are equal in at least two of NEAR_BITS + 2 bands of bits, so only
    hashes with two equal bands are compared (Norouzi, Punjani and Fleet, "Fast Search in Hamming Space with Multi-Index
    Hashing", 2012).
    """
    edges: list[int] = np.linspace(0, 64, NEAR_BITS + 3).astype(int).tolist()
    bands = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    for two in combinations(bands, 2):
        mask = np.uint64(sum(two))
        order, asked = np.argsort(hashes & mask), np.argsort(queries & mask)
        keys, wanted = (hashes & mask)[order], (queries & mask)[asked]
        starts = np.searchsorted(keys, wanted, "left")  # hashes with equal bands are consecutive
        counts = np.searchsorted(keys, wanted, "right") - starts
        for start, stop in _runs(counts, _CHUNK):
            pairs = counts[start:stop]  # per query
            if root is not None:  # of two hashes with different roots, at least one differs from the first of its run
                first = order[starts[start:stop]]
                pairs = np.where(root[asked[start:stop]] == root[first], 0, pairs)
            query = np.repeat(asked[start:stop], pairs)
            pairs_before = np.cumsum(pairs) - pairs
            place = order[np.arange(len(query)) + np.repeat(starts[start:stop] - pairs_before, pairs)]
            distance = np.bitwise_count(queries[query] ^ hashes[place])
            if len(near := np.flatnonzero(distance <= NEAR_BITS)):
                yield query[near], place[near], distance[near]


def _runs(counts: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Split the counts into consecutive runs that each sum to at most `most`; yield the (start, stop) of each run.

    A count that exceeds `most` forms a run of its own.
    """
    ends = np.cumsum(counts)
    start = before = 0
    while start < len(counts):
        stop = max(start + 1, int(np.searchsorted(ends, before + most, "right")))
        yield start, stop
        start, before = stop, int(ends[stop - 1])
