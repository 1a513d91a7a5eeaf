"""Updates of the weights: the recipe's optimizer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

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


def state_of(optimizer: Optimizer) -> list[Tensor]:
    """Momentum, moments and counters: all tensors that its updates change besides the weights."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor)]


def zero_state(optimizer: Optimizer) -> None:
    """Momentum and moments as before the first update, in place: a CUDA graph is of these very tensors."""
    for tensor in state_of(optimizer):
        tensor.zero_()
