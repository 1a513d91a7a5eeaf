"""One step of training; on CUDA it is recorded once, as a graph of kernels, and replayed."""

import gc
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastflower import distributed
from fastflower.devices import generator_of
from fastflower.errors import ArgumentError
from fastflower.optimization import tensors_of
from fastflower.recipes.recipe import Recipe

_log = logging.getLogger("fastflower")

Outcome = tuple[Tensor, Tensor]
"""Of a step: mean loss and hits, (), on the device."""
Capture = Callable[[Callable[[], Outcome]], Callable[[], Outcome]]
"""Takes what always does the same work on the same tensors, and gives what does that work again; may do it meanwhile."""

_WARM_UPS = 3  # as torch's notes on CUDA graphs have it: what is made at a first run is made before the recording


class Stepper:
    """Forward, loss, backward, clipping, update and count of hits: a call a batch.

    With `capture` the first batch of each shape is recorded, in the mode (training, frozen batch norms) that the network is in
    then, and all are replayed; what a call gave is overwritten by the next. Without, each is carried out kernel by kernel.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        recipe: Recipe,
        device: torch.device,
        precision: torch.dtype,
        capture: Capture | None = None,
    ) -> None:
        self._network, self._optimizer, self._scaler, self._recipe = network, optimizer, scaler, recipe
        self._device, self._precision = device, precision
        self._criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self._on_its_own: Callable[[], AbstractContextManager[object]] = nullcontext
        self._model: Callable[[Tensor], Tensor] = self._wrapped()
        self._capture = capture
        self._replays: dict[Hashable, Callable[[Tensor, Tensor], Outcome]] = {}

    def __call__(self, images: Tensor, labels: Tensor, together: int = 1, *, update: bool = True) -> Outcome:
        """One batch, the gradients of `together` batches averaged before an update; (mean loss, hits), detached.

        labels  (N,), or (N, K) of mixed images, of which the larger share counts as a hit.
        """
        if self._capture is None or together > 1 or not update:
            return self._eager(images, labels, together, update=update)
        key = (images.shape, images.dtype, labels.shape, labels.dtype, self._network.training)
        if key not in self._replays:
            self._replays[key] = self._recorded(self._capture, images, labels)
        return self._replays[key](images, labels)

    def _eager(self, images: Tensor, labels: Tensor, together: int = 1, *, update: bool = True) -> Outcome:
        with self._on_its_own() if not update else nullcontext():
            with torch.autocast(self._device.type, dtype=self._precision, enabled=self._precision != torch.float32):
                logits = self._model(images)
                loss = self._criterion(logits, labels)
            self._scaler.scale(loss / together).backward()
        hits = (logits.argmax(dim=1) == (labels if labels.ndim == 1 else labels.argmax(dim=1))).sum()
        if update:
            if self._recipe.clip_norm is not None:
                self._scaler.unscale_(self._optimizer)
                nn.utils.clip_grad_norm_(self._network.parameters(), self._recipe.clip_norm)
            self._scaler.step(self._optimizer)
            self._scaler.update()
            # To None: a recording's gradients lie in its own memory, which the next one of another shape uses again.
            self._optimizer.zero_grad(set_to_none=True)
        return loss.detach(), hits

    def _recorded(self, capture: Capture, images: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], Outcome]:
        inputs = images.clone(), labels.clone()  # where every batch of this shape goes; channels-last stays
        try:
            with unchanged(self._network, self._optimizer, generator_of(self._device)):
                replay = capture(lambda: self._eager(*inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # another thread's cudaDeviceSynchronize, such as DALI's, spoils a recording
            self._optimizer.zero_grad(set_to_none=True)
            self._capture = None  # the next would fail, too: torch 2.11 leaves the pool as being recorded to
            _log.warning("a step could not be recorded as a CUDA graph (%s); all go kernel by kernel", error)
            return self._eager

        def step(images: Tensor, labels: Tensor) -> Outcome:
            inputs[0].copy_(images)
            inputs[1].copy_(labels)
            return replay()

        return step

    def _wrapped(self) -> Callable[[Tensor], Tensor]:
        """The network as training calls it: on several ranks, and compiled where the recipe says so."""
        model, cuda = self._network, self._device.type == "cuda"
        if distributed.world_size() > 1:
            if self._recipe.sync_batchnorm and not cuda:
                raise ArgumentError("sync_batchnorm: torch has SyncBatchNorm on CUDA only; leave it out on the CPU.")
            if self._recipe.sync_batchnorm:
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            model = DistributedDataParallel(
                model, device_ids=[self._device] if cuda else None, gradient_as_bucket_view=True
            )
            self._on_its_own = model.no_sync
        # CUDA graphs overwrite gradients that wait for those of the next batch.
        graphs = cuda and self._recipe.accumulate == 1
        if self._recipe.compile:
            return torch.compile(model, mode="reduce-overhead" if graphs else None)
        return model


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
