"""What a Loader yields."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Samples in the order of the epoch, all on the loader's device."""

    images: Tensor
    """(N, 3, H, W), an NCHW view of channels-last memory, in the loader's dtype; normalised unless that is uint8."""
    labels: Tensor
    """(N,) int64."""
    index: Tensor
    """(N,) int64: the samples' positions in the split's index, which key every random number."""
