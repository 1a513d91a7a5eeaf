"""Averages of a network's weights."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """An average of a network's weights and of its batch norms' statistics: exponential (EMA), or with decay None uniform.

    After n updates the decay is at most (1 + n) / (10 + n), so that the first weights are soon forgotten (as TensorFlow's
    ExponentialMovingAverage with num_updates); of a uniform average it is n / (1 + n).

    Not torch's AveragedModel, whose counter goes to the device and is read there at each update, so that the host would wait.
    """

    def __init__(self, network: nn.Module, decay: float | None) -> None:
        self.network = deepcopy(network).requires_grad_(requires_grad=False).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, updates: int) -> None:
        """Take in the weights after the update that follows `updates` others."""
        decay = updates / (1 + updates) if self._decay is None else min(self._decay, (1 + updates) / (10 + updates))
        pairs = list(zip(tensors_of(self.network), tensors_of(network), strict=True))
        averages, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        get_ema_multi_avg_fn(decay)(averages, current, None)
        for average, counter in pairs:
            if not average.is_floating_point():  # of a batch norm
                average.copy_(counter)


def tensors_of(network: nn.Module) -> list[Tensor]:
    """All that a network consists of: parameters, detached, and buffers."""
    return [*(parameter.detach() for parameter in network.parameters()), *network.buffers()]
