"""The process group under torchrun, and the few collective operations that training needs."""

import logging
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fastflower.errors import ArgumentError, DeviceError, FastflowerError, integer

_T = TypeVar("_T")

_POLL_SECONDS = 0.5


@contextmanager
def process_group(device: str | torch.device | None) -> Generator[None]:
    """Join torchrun's process group inside the block. Does nothing without torchrun or if a group already exists.

    Each rank uses the GPU of its local rank, unless `device` is the CPU. Raises DeviceError if a machine has more
    ranks than GPUs.
    """
    if not dist.is_available() or dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        yield
        return
    asked = str(device or "cuda")
    cuda = torch.cuda.is_available() and asked.startswith("cuda")
    if cuda and ":" in asked:
        raise ArgumentError(
            f"device must be cuda under torchrun, got {asked!r}: each rank uses the GPU whose number is its local rank."
        )
    if cuda:
        here, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if here >= gpus:
            raise DeviceError(
                f"local rank {here} has no GPU: this machine has only {gpus}; "
                f"start at most that many ranks per machine (--nproc-per-node {gpus})."
            )
        torch.cuda.set_device(here)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's rank, or 0 without a process group."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """Return the number of ranks, or 1 without a process group."""
    return dist.get_world_size() if _together() else 1


def share(batch_size: int) -> int:
    """Return the number of samples per rank in a global batch. Raises ArgumentError if the batch does not divide evenly."""
    count = world_size()
    if batch_size % count:
        near = batch_size - batch_size % count or count
        raise ArgumentError(
            f"batch_size must be a multiple of {count}, the number of ranks, got {batch_size}: Recipe.batch_size (--batch-size) "
            f"is that of all ranks together; pass {near}."
        )
    return batch_size // count


def place(asked_rank: int | None, asked_size: int | None) -> tuple[int, int]:
    """Return the given (rank, world size), or torch.distributed's if both are None. Raises ArgumentError if invalid."""
    if asked_rank is None and asked_size is None:
        return rank(), world_size()
    if asked_rank is None or asked_size is None:
        raise ArgumentError("rank and world_size belong together; pass both or neither.")
    size = integer("world_size", asked_size, 1)
    return integer("rank", asked_rank, 0, at_most=size - 1, rule=f"from 0 to world_size - 1 = {size - 1}"), size


def summed(values: Tensor) -> Tensor:
    """Return the elementwise sum of a CPU tensor over all ranks."""
    total = values.clone()
    if _together():
        dist.all_reduce(total)
    return total


def any_rank(flag: bool) -> bool:
    """Return True if `flag` is True on any rank. All ranks must call this together."""
    return bool(summed(torch.tensor(int(flag)))) if _together() else flag


def gathered(value: _T) -> list[_T]:
    """Return the values of all ranks, in rank order. Values must be picklable."""
    values = [value] * world_size()
    if _together():
        dist.all_gather_object(values, value)
    return values


def of_first_rank(work: Callable[[], _T], busy: Path | None = None) -> _T:
    """Return what `work` returns on rank 0, or raise its FastflowerError on all ranks.

    busy  A file that all ranks see until the work is done, for work that takes longer than a collective may.
    """
    done, failed = None, None
    try:
        if rank() == 0:
            done = work()
    except FastflowerError as error:
        failed = error
    finally:
        if rank() == 0 and busy and _together():
            busy.unlink(missing_ok=True)
    while rank() > 0 and busy and busy.exists():
        time.sleep(_POLL_SECONDS)
    done, failed = gathered((done, failed))[0]
    if failed:
        raise failed
    return cast("_T", done)


def share_buffers(network: nn.Module) -> None:
    """Copy rank 0's batch norm statistics to all ranks. Each rank has computed its own from its part of each batch."""
    if _together():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def wait_for_all() -> None:
    """Block until every rank has called this."""
    if _together():
        dist.barrier()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def _speaks(record: logging.LogRecord) -> bool:
    """Return whether a line is logged: what is no warning says the same on all ranks, so only rank 0 logs it."""
    return record.levelno >= logging.WARNING or rank() == 0


logging.getLogger("fastflower").addFilter(_speaks)
