"""Starts ranks as torchrun does, by its own agent, but by fork: ranks need not import torch again."""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest.mock import patch

from torch import multiprocessing
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

# One thread each, and names that need no network: torchrun would look up the machine's own name.
# Else torch 2.15 gives restarted ranks the store of those before, where they may find addresses of processes that are gone.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
"""Environment of torchrun and of programs that call `launch`."""


def launch(
    ranks: int, function: Callable[..., None], *arguments: str, polls: float = 0.1, restarts: int = 0
) -> list[int | None]:
    """Call function(*arguments) on each rank. Return the ranks' exit codes, those of restarted ranks last.

    polls     Seconds between two looks at the ranks. When one has failed, the agent stops the others.
    restarts  How often it then starts all ranks again.
    """
    started: list[Any] = []
    module: Any = multiprocessing
    start = module.start_processes

    def starting(*values: Any, **options: Any) -> Any:
        context = start(*values, **options)
        started.extend(context.processes)
        return context

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_endpoint="localhost:0",
        rdzv_backend="c10d",
        local_addr="localhost",
        max_restarts=restarts,
        start_method="fork",
        monitor_interval=polls,
    )
    with patch.object(module, "start_processes", starting), suppress(ChildFailedError):
        elastic_launch(config, function)(*arguments)
    return [process.exitcode for process in started]
