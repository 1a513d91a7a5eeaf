"""Where a loader's time goes, and what holds a job back."""

from dataclasses import dataclass
from threading import Lock

SPENT = ("read", "decode", "augment", "wait", "consume")
"""On what a loader's clock says that time went."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Where a loader's time went. Reading, decoding and augmenting are sums over threads: not what a GPU or DALI does."""

    images: int
    workers: int
    replaced: int
    """Damaged samples that another stood in for."""
    read_seconds: float
    """Reading and checking checksums."""
    decode_seconds: float
    augment_seconds: float
    wait_seconds: float
    """In which the consumer waited for a batch."""
    consume_seconds: float
    """In which the consumer used a batch while the loader worked ahead."""

    def __str__(self) -> str:
        """The sums, and a sentence that says what holds the job back and what to do."""
        count = max(1, self.images)
        spent = {name: getattr(self, f"{name}_seconds") for name in SPENT}
        lines = [
            f"{name:8} {seconds:8.2f} s {1000 * seconds / count:8.3f} ms an image" for name, seconds in spent.items()
        ]
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """One sentence."""
        total = self.wait_seconds + self.consume_seconds
        if not self.images or not total:
            return "nothing was fed yet: iterate first."
        share = self.wait_seconds / total
        if share < 0.05:
            return f"the consumer holds the job back: it waited for data {share:.0%} of the time; speed up the training step."
        waited = f"feeding holds the job back: the consumer waited {share:.0%} of the time"
        if not self.augment_seconds:
            return f"{waited}; what a GPU or DALI does is not told apart; add cores (workers), or pack smaller images (max_side)."
        work = {"reading": self.read_seconds, "decoding": self.decode_seconds, "augmenting": self.augment_seconds}
        slowest = max(work, key=lambda name: work[name])
        advice = {
            "reading": "put the shards on a faster disk, or into RAM",
            "decoding": "later epochs need none if images are kept (cache); else pack smaller ones (max_side) or add cores",
            "augmenting": "add cores (workers), or augment less: hue costs most",
        }[slowest]
        return f"{waited}, most of it for {slowest}; {advice}."


class Clock:
    """Seconds spent, by what they were spent on. Thread-safe."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock = Lock()

    def add(self, what: str, seconds: float) -> None:
        """Add to one of the sums."""
        with self._lock:
            self._seconds[what] = self._seconds.get(what, 0.0) + seconds

    def __getitem__(self, what: str) -> float:
        return self._seconds.get(what, 0.0)
