"""The errors that a caller can act on. Each message names the file or argument, the rule and the remedy."""


class FastflowerError(Exception):
    """Base of every error that fastflower raises on purpose."""


class ArgumentError(FastflowerError, ValueError):
    """An argument, or a field of `Augment` or `Recipe`, is outside its rule."""


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Raise ArgumentError for an argument that is outside its rule."""
    if not holds:
        raise ArgumentError(f"{name} must be {rule}, got {value!r}.")


class FolderError(FastflowerError):
    """A folder of images cannot be packed as it stands."""


class ShardError(FastflowerError):
    """Shards, their manifest or their index are missing, damaged or do not belong together."""


class SampleError(FastflowerError):
    """One image cannot be decoded, or its bytes are not those that were packed."""


class CheckpointError(FastflowerError):
    """A checkpoint or a file of weights cannot be used, or not be written."""


class DeviceError(FastflowerError):
    """The device that was asked for is not there, or its memory does not suffice."""


class TrainingError(FastflowerError):
    """Training cannot go on: a loss or weights that are not finite, a rank that is gone, a folder that refuses a file."""


class StoppedError(FastflowerError):
    """SIGTERM ended training; its state was saved."""
