"""Steps recorded once as graphs of CUDA kernels, and replayed."""

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastflower import distributed
from fastflower.recipes.recipe import Recipe
from fastflower.training.averaging import tensors_of
from fastflower.training.optimizer import state_of, zero_state

Outcome = tuple[Tensor, Tensor]
"""Of a step: mean loss and hits, (), on the device."""
Work = Callable[[], Outcome]
"""A step on a batch that always lies in the same tensors."""
Capture = Callable[[Work], Work]
"""Takes such a step, and gives what does its work again; may do it meanwhile."""

_WARM_UPS = 3  # as torch's notes on CUDA graphs have it: what is made at a first run is made before the recording


@contextmanager
def unchanged(network: nn.Module, optimizer: Optimizer, generator: torch.Generator) -> Generator[None]:
    """Steps within leave no trace: weights, batch norms, the optimizer's state and random numbers are put back, in place.

    State that the first of them made is set to zero, which is what torch's optimizers begin with: Adam's as it is made, SGD's
    because its first momentum is the gradient, and so is momentum * 0 + gradient (dampening is 0 here).
    """
    tensors = [*tensors_of(network), *state_of(optimizer)]
    before, random = [tensor.detach().clone() for tensor in tensors], generator.get_state()
    try:
        yield
    finally:
        generator.set_state(random)
        with torch.no_grad():
            zero_state(optimizer)
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def graphs_of(recipe: Recipe, device: torch.device, precision: torch.dtype) -> Capture | None:
    """What records a run's steps, or None where they are not all alike to the device.

    So it is on several ranks, with gradients that wait for the next batch's, and where float16's loss is scaled, which is decided
    in Python; torch.compile makes graphs of its own.
    """
    alike = distributed.world_size() == 1 and recipe.accumulate == 1 and precision != torch.float16
    return Graphs(device) if recipe.graph and device.type == "cuda" and alike and not recipe.compile else None


class Graphs:
    """Records functions as CUDA graphs.

    They share one pool of memory, so that a run takes that of its largest: no two are replayed at once, and none reads what
    another left there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # One stream for all: cuBLAS keeps a workspace a stream, which the warm-up makes outside the pool.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Do the work three times, record it, and give what replays the record; its outcome always lies in one place."""
        graph, stream = torch.cuda.CUDAGraph(), self._stream
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    work()
            before.wait_stream(stream)
            try:
                # thread_local: the loader's threads go on allocating and copying meanwhile, on other streams.
                with _no_collection(), torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                    outcome = work()
            except RuntimeError:
                self._mend_generator()
                raise
            finally:
                torch.cuda.set_stream(before)  # where a recording fails, torch leaves its own

        def replay() -> Outcome:
            graph.replay()
            return outcome

        return replay

    def _mend_generator(self) -> None:
        """torch 2.11 leaves it as being recorded, which dropout refuses; another recording's end mends it."""
        with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream):
            torch.zeros(1, device=self._device)


@contextmanager
def _no_collection() -> Generator[None]:
    """Collect no garbage within: what is freed with it, such as a pipeline of DALI, would break a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
