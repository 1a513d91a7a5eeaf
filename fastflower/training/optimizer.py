"""The recipe's optimizer, its learning rate and its state."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastflower.recipes.recipe import Recipe


def optimizer_of(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Create the recipe's optimizer for the trainable parameters. One-dimensional ones (norms, biases) get no weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in trained if parameter.ndim > 1]
    plain = [parameter for parameter in trained if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decaying, recipe.weight_decay), (plain, 0.0))
        if parameters
    ]
    cuda = trained[0].is_cuda
    # A tensor on the device, so each replay of a CUDA graph reads the current rate; float32 because torch's kernels expect it.
    rate = torch.tensor(recipe.lr, dtype=torch.float32, device=trained[0].device) if cuda else recipe.lr
    if recipe.optimizer == "sgd":
        # For ResNet-50 on the CPU, SGD took 17 ms fused and 12 ms in a for-loop; Adam took 16 ms fused and 46 ms in a for-loop.
        optimizer = SGD(groups, rate, momentum=recipe.momentum, fused=True if cuda else None)
        for parameter in trained if cuda and recipe.momentum else ():
            # Zeros give the same first step (dampening is 0). torch's own buffers stay uninitialized if float16 skips that step.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = Adam if recipe.optimizer == "adam" else AdamW
    return kind(groups, rate, betas=(recipe.momentum, 0.999), fused=True, capturable=cuda)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of the next update, in place if it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def plain_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state_dict with the learning rate as a float, so that the state does not depend on the device."""
    state = optimizer.state_dict()
    return {**state, "param_groups": [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]}


def restore(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state from `plain_state`, keeping this device's fused and capturable flags and learning rate tensor."""
    own = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    rate = optimizer.param_groups[0]["lr"]  # the same in all groups
    for group, before in zip(optimizer.param_groups, own, strict=True):
        group |= {name: before[name] for name in ("lr", "fused", "capturable") if name in before}
    set_rate(optimizer, rate)


def state_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all tensors that updates change besides the weights: momentum, moments and counters."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor)]


def zero_state(optimizer: Optimizer) -> None:
    """Reset momentum and moments to zero, as before the first update. Works in place because CUDA graphs use these tensors."""
    for tensor in state_of(optimizer):
        tensor.zero_()
