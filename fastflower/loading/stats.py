"""Measures how a loader spends its time, and names the bottleneck."""

from dataclasses import dataclass
from threading import Lock

SPENT = ("read", "decode", "augment", "wait", "consume")
"""Names of the activities that a loader's clock measures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Time spent by a loader. Read, decode and augment times are summed over threads, and exclude work in DALI or on a GPU."""

    images: int
    workers: int
    replaced: int
    """Number of damaged samples that were replaced."""
    read_seconds: float
    """Time spent reading samples and verifying their checksums."""
    decode_seconds: float
    augment_seconds: float
    wait_seconds: float
    """Time the consumer spent waiting for batches."""
    consume_seconds: float
    """Time the consumer spent using batches, while the loader prefetched."""

    def __str__(self) -> str:
        """Return a table of the times, followed by the verdict."""
        count = max(1, self.images)
        spent = {name: getattr(self, f"{name}_seconds") for name in SPENT}
        lines = [
            f"{name:8} {seconds:8.2f} s {1000 * seconds / count:8.3f} ms per image" for name, seconds in spent.items()
        ]
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """The bottleneck and what to do about it, in one sentence."""
        total = self.wait_seconds + self.consume_seconds
        if not self.images or not total:
            return "no batches yet: iterate over the loader first."
        share = self.wait_seconds / total
        if share < 0.05:
            return f"the consumer is the bottleneck: it waited for data {share:.0%} of the time; speed up the training step."
        waited = f"data loading is the bottleneck: the consumer waited {share:.0%} of the time"
        if not self.augment_seconds:
            advice = "add cores (workers), or pack smaller images (max_side)"
            return f"{waited}; work in DALI or on a GPU is not timed separately; {advice}."
        work = {"reading": self.read_seconds, "decoding": self.decode_seconds, "augmenting": self.augment_seconds}
        slowest = max(work, key=lambda name: work[name])
        advice = {
            "reading": "put the shards on a faster disk or in RAM",
            "decoding": "cache decoded images (cache), pack smaller images (max_side), or add cores (workers)",
            "augmenting": "add cores (workers), or use less augmentation (hue costs the most)",
        }[slowest]
        return f"{waited}, mostly for {slowest}; {advice}."


class Clock:
    """Adds up seconds by name. Thread-safe."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = Lock()

    def add(self, what: str, seconds: float) -> None:
        """Add `seconds` to the total for `what`."""
        with self._lock:
            self._seconds[what] = self._seconds.get(what, 0.0) + seconds

    def __getitem__(self, what: str) -> float:
        return self._seconds.get(what, 0.0)
