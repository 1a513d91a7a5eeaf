"""Loader timing: where the time goes, and which part is the bottleneck."""

from dataclasses import dataclass
from threading import Lock

SPENT = ("read", "decode", "augment", "wait", "consume")
"""Activities that a loader's clock measures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Where a loader's time went. Read, decode and augment seconds are sums over threads, without work on a GPU or in DALI."""

    images: int
    workers: int
    replaced: int
    """Number of damaged samples that were replaced."""
    read_seconds: float
    """Seconds of reading and verifying checksums."""
    decode_seconds: float
    augment_seconds: float
    wait_seconds: float
    """Seconds that the consumer waited for batches."""
    consume_seconds: float
    """Seconds that the consumer used batches while the loader prefetched."""

    def __str__(self) -> str:
        """Format the seconds as a table, followed by the verdict."""
        count = max(1, self.images)
        spent = {name: getattr(self, f"{name}_seconds") for name in SPENT}
        lines = [
            f"{name:8} {seconds:8.2f} s {1000 * seconds / count:8.3f} ms per image" for name, seconds in spent.items()
        ]
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """Sentence that names the bottleneck and a remedy."""
        total = self.wait_seconds + self.consume_seconds
        if not self.images or not total:
            return "nothing was loaded yet: iterate over the loader first."
        share = self.wait_seconds / total
        if share < 0.05:
            return f"the consumer is the bottleneck: it waited for data {share:.0%} of the time; speed up the training step."
        waited = f"data loading is the bottleneck: the consumer waited {share:.0%} of the time"
        if not self.augment_seconds:
            return f"{waited}; work of a GPU or DALI is not broken down; add cores (workers) or pack smaller images (max_side)."
        work = {"reading": self.read_seconds, "decoding": self.decode_seconds, "augmenting": self.augment_seconds}
        slowest = max(work, key=lambda name: work[name])
        advice = {
            "reading": "put the shards on a faster disk or in RAM",
            "decoding": "cache images (cache) so only the first epoch decodes, pack smaller ones (max_side) or add cores",
            "augmenting": "add cores (workers) or augment less: hue costs most",
        }[slowest]
        return f"{waited}, mostly for {slowest}; {advice}."


class Clock:
    """Thread-safe counter of seconds per activity."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = Lock()

    def add(self, what: str, seconds: float) -> None:
        """Add seconds to an activity."""
        with self._lock:
            self._seconds[what] = self._seconds.get(what, 0.0) + seconds

    def __getitem__(self, what: str) -> float:
        return self._seconds.get(what, 0.0)
