"""Steps recorded once as graphs of CUDA kernels, and replayed."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastflower import distributed
from fastflower.recipes.recipe import Recipe
from fastflower.training.averaging import tensors_of

Outcome = tuple[Tensor, Tensor]
"""Of a step: mean loss and hits, (), on the device."""
Capture = Callable[[Callable[[], Outcome]], Callable[[], Outcome]]
"""Takes what always does the same work on the same tensors, and gives what does that work again; may do it meanwhile."""

_WARM_UPS = 3  # as torch's notes on CUDA graphs have it: what is made at a first run is made before the recording


@contextmanager
def unchanged(network: nn.Module, optimizer: Optimizer, generator: torch.Generator) -> Iterator[None]:
    """Steps within leave no trace: weights, batch norms, the optimizer's state and random numbers are put back, in place.

    State that the first of them made is set to zero, which is what torch's optimizers begin with: Adam's as it is made, SGD's
    because its first momentum is the gradient, and so is momentum * 0 + gradient (dampening is 0 here).
    """
    tensors = [*tensors_of(network), *_state_of(optimizer)]
    before, random = [tensor.detach().clone() for tensor in tensors], generator.get_state()
    try:
        yield
    finally:
        generator.set_state(random)
        with torch.no_grad():
            for tensor in _state_of(optimizer):
                tensor.zero_()
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def _state_of(optimizer: Optimizer) -> list[Tensor]:
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor)]


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

    def __call__(self, function: Callable[[], Outcome]) -> Callable[[], Outcome]:
        """Run the function three times, record it, and give what replays the record; its outcome always lies in one place."""
        graph, stream = torch.cuda.CUDAGraph(), self._stream
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    function()
            before.wait_stream(stream)
            try:
                # thread_local: the loader's threads go on allocating and copying meanwhile, on other streams.
                with _no_collection(), torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                    outcome = function()
            except RuntimeError:
                # torch 2.11 leaves the generator as being recorded, which dropout refuses; another recording's end mends it
                with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
                    torch.zeros(1, device=self._device)
                raise
            finally:
                torch.cuda.set_stream(before)  # where a recording fails, torch leaves its own

        def replay() -> Outcome:
            graph.replay()
            return outcome

        return replay


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage within: what is freed with it, such as a pipeline of DALI, would break a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
