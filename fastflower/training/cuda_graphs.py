"""Capture and replay of training steps as CUDA graphs."""

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
"""Mean loss and number of correct predictions of a step, both of shape (), on the device."""
Work = Callable[[], Outcome]
"""A step that always reads its batch from the same tensors."""
Capture = Callable[[Work], Work]
"""Captures a step, possibly running it first, and returns a function that replays it."""

_WARM_UPS = 3  # as in torch's notes on CUDA graphs; lazy initialization must precede the capture


@contextmanager
def unchanged(network: nn.Module, optimizer: Optimizer, generator: torch.Generator) -> Generator[None]:
    """Undo all steps inside the context: restore weights, batch norm buffers, optimizer state and random state, in place.

    Optimizer state created by these steps is set to zero, which is equivalent to no state. Adam's state starts at zero. SGD's
    first momentum buffer is the gradient. A zero buffer gives the same: momentum * 0 + gradient, because dampening is 0.
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
    """Return a function that captures a run's training steps, or None if they cannot be captured.

    Steps cannot be captured on the CPU, with multiple ranks, with gradient accumulation, with checkpointing (which reads the
    state of the random generator), or with float16 (the loss scaler decides in Python whether to skip an update). With
    torch.compile, returns None: torch.compile captures its own graphs.
    """
    same = distributed.world_size() == 1 and recipe.accumulate == 1 and precision != torch.float16
    other = recipe.compile or recipe.checkpointing
    return Graphs(device) if recipe.graph and device.type == "cuda" and same and not other else None


class Graphs:
    """Captures functions as CUDA graphs that share one memory pool.

    Sharing is safe because no two graphs replay at once and none reads what another left in the pool. A run then needs only
    the memory of its largest graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # All graphs use one stream, because cuBLAS allocates a workspace per stream, outside the pool, during the warm-up.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Run `work` three times, capture it, and return a function that replays it into the same output tensors."""
        graph, stream = torch.cuda.CUDAGraph(), self._stream
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    work()
            before.wait_stream(stream)
            try:
                # thread_local, because the loader's threads keep allocating and copying on other streams.
                with _no_collection(), torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                    outcome = work()
            except RuntimeError:
                self._reset_generator()
                raise
            finally:
                torch.cuda.set_stream(before)  # if the capture fails, torch does not restore the stream

        def replay() -> Outcome:
            graph.replay()
            return outcome

        return replay

    def _reset_generator(self) -> None:
        """Run an empty capture, because in torch 2.11 a failed capture leaves the random generator unusable for dropout."""
        with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream):
            torch.zeros(1, device=self._device)


@contextmanager
def _no_collection() -> Generator[None]:
    """Disable garbage collection: freeing an object such as a DALI pipeline would break the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
