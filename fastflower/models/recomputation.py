"""Gradient checkpointing: the activations inside blocks are not kept, but computed again in the backward pass."""

from collections.abc import Generator
from contextlib import contextmanager
from types import MethodType
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from fastflower.errors import ArgumentError
from fastflower.models.backbone import skeleton_of
from fastflower.models.stages import blocks_of, freeze_stages, train_mode
from fastflower.models.timm_networks import is_timm
from fastflower.recipes.recipe import Recipe


def recompute_blocks(network: nn.Module) -> bool:
    """Keep only the inputs of each block for the backward pass; return whether the network has blocks that allow it."""
    if is_timm(network):
        try:
            network.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
        except (AttributeError, AssertionError):  # timm's networks without blocks
            return False
        return True
    blocks = [network.get_submodule(name) for name in blocks_of(network)]
    for block in blocks:
        block.forward = MethodType(_recomputed, block)
    return bool(blocks)


def _recomputed(block: nn.Module, *inputs: object) -> Tensor:
    forward = MethodType(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*inputs)
    if inputs and isinstance(inputs[0], list):  # of a DenseNet, which appends to it afterwards
        first = cast("list[Tensor]", inputs[0])
        return cast("Tensor", checkpoint(lambda *each: forward([*each]), *first, use_reentrant=False))
    return cast("Tensor", checkpoint(forward, *inputs, use_reentrant=False))


@contextmanager
def still_statistics(network: nn.Module) -> Generator[None]:
    """Keep the statistics of batch norms inside the block, a backward pass that computes forward passes again.

    With momentum 0 they keep their values exactly. Without statistics at all, other tensors would be saved than at first.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter


def kept_bytes(network: nn.Module, images: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass besides weights, also on the meta device."""
    own = [value.untyped_storage() for value in (*network.parameters(), *network.buffers())]
    known, kept = {id(storage) for storage in own}, dict[int, torch.UntypedStorage]()

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if id(storage) not in known:
            kept[id(storage)] = storage
        return value

    with saved_tensors_hooks(pack, lambda value: cast("Tensor", value)):
        network(images)
    return sum(storage.nbytes() for storage in kept.values())


def bytes_per_image(recipe: Recipe) -> int:
    """Estimate what an image of the largest size takes in a training step, from the tensors that are kept, in float32."""
    size = max(
        (recipe.augment_at(epoch).output_size for epoch in range(recipe.epochs)), key=lambda size: size[0] * size[1]
    )
    network = skeleton_of(recipe.backbone, size=recipe.augment.output_size, drop_path=recipe.drop_path)
    freeze_stages(network, recipe.freeze or 0)
    train_mode(network, recipe.freeze or 0)
    if recipe.checkpointing:
        recompute_blocks(network)
    return kept_bytes(network, torch.empty(2, 3, *size, device="meta")) // 2


def require_options(recipe: Recipe) -> None:
    """Raise ArgumentError if the backbone does not have the recipe's stochastic depth or checkpointing."""
    if recipe.drop_path is None and not recipe.checkpointing:
        return
    network = skeleton_of(recipe.backbone, size=recipe.augment.output_size, drop_path=recipe.drop_path)
    if recipe.checkpointing and not recompute_blocks(network):
        raise no_blocks(recipe.backbone)


def no_blocks(backbone: str) -> ArgumentError:
    """Return the error for a backbone whose activations cannot be computed again."""
    return ArgumentError(
        f"checkpointing must be False with backbone {backbone}, which has no blocks that can be computed again, got True; "
        f"omit it (--no-checkpointing), or pass a backbone with residual blocks (--backbone resnet50)."
    )
