"""Updates of the weights: the recipe's optimizer, and averaged weights."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastflower.recipes.recipe import Recipe


def optimizer_of(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer of what is trained. Matrices and kernels decay, norms and biases (one dimension) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in trained if parameter.ndim > 1]
    plain = [parameter for parameter in trained if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decaying, recipe.weight_decay), (plain, 0.0))
        if parameters
    ]
    cuda = trained[0].is_cuda
    # A CUDA graph reads the rate anew at each replay where it lies on the device: as float32, which is what torch's kernels take.
    rate = torch.tensor(recipe.lr, dtype=torch.float32, device=trained[0].device) if cuda else recipe.lr
    if recipe.optimizer == "sgd":
        # On the CPU fused SGD took 17 ms for a ResNet-50, torch's loop 12; fused Adam 16, the loop 46.
        optimizer = SGD(groups, rate, momentum=recipe.momentum, fused=True if cuda else None)
        for parameter in trained if cuda and recipe.momentum else ():
            # Zeros give torch's first step (its dampening is 0). Its own buffers stay unwritten where float16 skips that step.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = Adam if recipe.optimizer == "adam" else AdamW
    return kind(groups, rate, betas=(recipe.momentum, 0.999), fused=True, capturable=cuda)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """The learning rate of the next update; where it is a tensor it stays where it lies."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def plain_state(optimizer: Optimizer) -> dict[str, Any]:
    """Its state_dict with the rate as a number, as it is on any device."""
    state = optimizer.state_dict()
    return {**state, "param_groups": [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]}


def restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what `plain_state` gave, also on another device; fused, capturable and where the rate lies stay as they are here."""
    own = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    rate = optimizer.param_groups[0]["lr"]  # of all groups
    for group, before in zip(optimizer.param_groups, own, strict=True):
        group |= {name: before[name] for name in ("lr", "fused", "capturable") if name in before}
    set_rate(optimizer, rate)


class Average:
    """An average of a network's weights and of its batch norms' statistics: exponential (EMA), or with decay None uniform.

    After n updates the decay is at most (1 + n) / (10 + n), so that the first weights are soon forgotten (as TensorFlow's
    ExponentialMovingAverage with num_updates); of a uniform average it is n / (1 + n).
    """

    def __init__(self, network: nn.Module, decay: float | None) -> None:
        self.network = deepcopy(network).requires_grad_(requires_grad=False).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, updates: int) -> None:
        """Take in the weights after the update that follows `updates` others."""
        decay = updates / (1 + updates) if self._decay is None else min(self._decay, (1 + updates) / (10 + updates))
        averages: list[Tensor] = []
        current: list[Tensor] = []
        for mine, theirs in zip(tensors_of(self.network), tensors_of(network), strict=True):
            if mine.is_floating_point():
                averages.append(mine)
                current.append(theirs)
            else:
                mine.copy_(theirs)  # batch norms' counters
        get_ema_multi_avg_fn(decay)(averages, current, None)


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Momentum and moments as before the first update, in place: a CUDA graph is of these very tensors."""
    for state in optimizer.state.values():
        for value in filter(torch.is_tensor, state.values()):
            value.zero_()


def tensors_of(network: nn.Module) -> list[Tensor]:
    """All that a network consists of: parameters, detached, and buffers."""
    return [*(parameter.detach() for parameter in network.parameters()), *network.buffers()]
