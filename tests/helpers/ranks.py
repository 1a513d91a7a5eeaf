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
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
"""Environment of torchrun and of programs that call `launch`."""


def launch(ranks: int, function: Callable[..., None], *arguments: str, polls: float = 0.1) -> list[int | None]:
    """Call function(*arguments) on each rank. Return the ranks' exit codes.

    polls  Seconds between two looks at the ranks. When one has failed, the agent stops the others.
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
        max_restarts=0,
        start_method="fork",
        monitor_interval=polls,
    )
    with patch.object(module, "start_processes", starting), suppress(ChildFailedError):
        elastic_launch(config, function)(*arguments)
    return [process.exitcode for process in started]
