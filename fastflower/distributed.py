"""The processes that train together: torchrun's group, and the few sums and agreements that they need."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fastflower.errors import ArgumentError, DeviceError

_T = TypeVar("_T")


@contextmanager
def process_group(device: str | torch.device | None) -> Generator[None]:
    """Join the processes that torchrun started, and leave them at the end; does nothing alone or where that was done.

    Each rank takes the GPU of its number on the machine, unless `device` is the CPU. Raises DeviceError where there are fewer.
    """
    if not dist.is_available() or dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        yield
        return
    asked = str(device or "cuda")
    cuda = torch.cuda.is_available() and asked.startswith("cuda")
    if cuda and ":" in asked:
        raise ArgumentError(f"device must be cuda, of which each rank takes the GPU of its number, got {asked!r}.")
    if cuda:
        here, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if here >= gpus:
            raise DeviceError(
                f"rank {here} of this machine has no GPU, there are {gpus}; start at most so many ranks on it."
            )
        torch.cuda.set_device(here)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 where there is only one."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _together() else 1


def share(batch_size: int) -> int:
    """A rank's part of a global batch. Raises ArgumentError where it cannot be cut into equal parts."""
    count = world_size()
    if batch_size % count:
        raise ArgumentError(f"batch_size {batch_size} must be a multiple of the {count} ranks, which take equal parts.")
    return batch_size // count


def place(asked_rank: int | None, asked_size: int | None) -> tuple[int, int]:
    """(rank, world size) as asked for, or where neither is torch.distributed's. Raises ArgumentError where they do not fit."""
    if asked_rank is None and asked_size is None:
        return rank(), world_size()
    if asked_rank is None or asked_size is None:
        raise ArgumentError("rank and world_size belong together; give both or neither.")
    if not 0 <= asked_rank < asked_size:
        raise ArgumentError(f"rank must lie in 0 .. world_size-1 = {asked_size - 1}, got {asked_rank}.")
    return asked_rank, asked_size


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks of a CPU tensor, elementwise."""
    total = values.clone()
    if _together():
        dist.all_reduce(total)
    return total


def any_rank(flag: bool) -> bool:
    """Whether any rank says so; all ranks must ask at the same place."""
    return bool(summed(torch.tensor(int(flag)))) if _together() else flag


def gathered(value: _T) -> list[_T]:
    """The values of all ranks, in their order; numpy arrays and plain values."""
    values = [value] * world_size()
    if _together():
        dist.all_gather_object(values, value)
    return values


def share_buffers(network: nn.Module) -> None:
    """Give all ranks rank 0's statistics of batch norms, which each took from its own part of the last batch."""
    if _together():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def wait_for_all() -> None:
    """Go on when every rank is here."""
    if _together():
        dist.barrier()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
