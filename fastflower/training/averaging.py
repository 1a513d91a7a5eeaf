"""Weight averaging: EMA and model soups."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Average of a network's weights and batch norm statistics: an EMA, or a uniform mean if decay is None.

    After n updates the EMA decay is at most (1 + n) / (10 + n), so the first weights fade quickly, as in TensorFlow's
    ExponentialMovingAverage with num_updates. The uniform mean uses decay n / (1 + n).

    torch's AveragedModel is not used: it reads its counter at each update, and thereby waits for the device.
    """

    def __init__(self, network: nn.Module, decay: float | None) -> None:
        self.network = deepcopy(network).requires_grad_(requires_grad=False).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, updates: int) -> None:
        """Add the network's current weights to the average. `updates` is the number of earlier updates."""
        decay = updates / (1 + updates) if self._decay is None else min(self._decay, (1 + updates) / (10 + updates))
        pairs = list(zip(tensors_of(self.network), tensors_of(network), strict=True))
        averages, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        get_ema_multi_avg_fn(decay)(averages, current, None)
        for average, counter in pairs:
            if not average.is_floating_point():  # a batch norm's counter
                average.copy_(counter)


def tensors_of(network: nn.Module) -> list[Tensor]:
    """Return all tensors of a network: detached parameters, then buffers."""
    return [*(parameter.detach() for parameter in network.parameters()), *network.buffers()]
