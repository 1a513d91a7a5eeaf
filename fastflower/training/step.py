"""One training step. On CUDA, it can be captured as a CUDA graph and replayed."""

import logging
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastflower import distributed
from fastflower.devices import generator_of
from fastflower.errors import ArgumentError
from fastflower.models.recomputation import no_blocks, recompute_blocks, still_statistics
from fastflower.recipes.recipe import Recipe
from fastflower.training.cuda_graphs import Capture, Outcome, unchanged

_log = logging.getLogger("fastflower")


class Stepper:
    """Runs the forward pass, loss, backward pass, gradient clipping and update for one batch per call.

    With `capture`, the step is captured on the first batch of each shape and replayed for every batch. The capture keeps the
    network's current mode (training, frozen batch norms), and each call overwrites the previous outcome. Without `capture`,
    steps run eagerly.
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
        self._no_sync: Callable[[], AbstractContextManager[object]] = nullcontext
        self._model: Callable[[Tensor], Tensor] = self._wrapped()
        self._capture = capture
        self._replays: dict[Hashable, Callable[[Tensor, Tensor], Outcome]] = {}

    def __call__(self, images: Tensor, labels: Tensor, together: int = 1, *, update: bool = True) -> Outcome:
        """Train on one batch; return (mean loss, number of correct predictions), detached.

        labels    (N,) classes, or (N, K) probabilities for mixed images; the most probable class counts as correct.
        together  Number of batches per update. Their gradients are averaged.
        update    Whether to update the weights; False only accumulates the gradients.
        """
        if self._capture is None or together > 1 or not update:
            return self._eager(images, labels, together, update=update)
        key = (images.shape, images.dtype, labels.shape, labels.dtype, self._network.training)
        if key not in self._replays:
            self._replays[key] = self._captured(self._capture, images, labels)
        return self._replays[key](images, labels)

    @property
    def replays(self) -> bool:
        """Whether at least one step has been captured, for replay."""
        return bool(self._replays)

    def _eager(self, images: Tensor, labels: Tensor, together: int = 1, *, update: bool = True) -> Outcome:
        with self._no_sync() if not update else nullcontext():
            with torch.autocast(self._device.type, dtype=self._precision, enabled=self._precision != torch.float32):
                logits = self._model(images)
                loss: Tensor = self._criterion(logits, labels)
            with still_statistics(self._network) if self._recipe.checkpointing else nullcontext():
                self._scaler.scale(loss / together).backward()  # pyright: ignore[reportUnknownMemberType]  (untyped)
        correct = (logits.argmax(dim=1) == (labels if labels.ndim == 1 else labels.argmax(dim=1))).sum()
        if update:
            if self._recipe.clip_norm is not None:
                self._scaler.unscale_(self._optimizer)
                nn.utils.clip_grad_norm_(self._network.parameters(), self._recipe.clip_norm)
            self._scaler.step(self._optimizer)
            self._scaler.update()
            # Set to None, because captured gradients lie in the graph's memory, which the graph for another shape reuses.
            self._optimizer.zero_grad(set_to_none=True)
        return loss.detach(), correct

    def _captured(self, capture: Capture, images: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], Outcome]:
        inputs = images.clone(), labels.clone()  # every batch of this shape is copied here; clone keeps channels-last
        try:
            with unchanged(self._network, self._optimizer, generator_of(self._device)):
                replay = capture(lambda: self._eager(*inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # for example, DALI synchronized the device in another thread
            self._optimizer.zero_grad(set_to_none=True)
            self._capture = None  # the next capture would fail too: torch 2.11 leaves the pool in capture mode
            _log.warning("could not capture a step as a CUDA graph (%s); running all steps eagerly", error)
            return self._eager

        def step(images: Tensor, labels: Tensor) -> Outcome:
            inputs[0].copy_(images)
            inputs[1].copy_(labels)
            return replay()

        return step

    def _wrapped(self) -> Callable[[Tensor], Tensor]:
        """Wrap the network in DistributedDataParallel if there are multiple ranks; compile it if the recipe says so."""
        model: nn.Module = self._network
        if self._recipe.checkpointing and not recompute_blocks(model):
            raise no_blocks(self._recipe.backbone)
        cuda = self._device.type == "cuda"
        if distributed.world_size() > 1:
            if self._recipe.sync_batchnorm and not cuda:
                raise ArgumentError("sync_batchnorm: torch supports SyncBatchNorm only on CUDA; omit it on the CPU.")
            if self._recipe.sync_batchnorm:
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # pyright: ignore[reportUnknownMemberType,reportUnknownVariableType]
            model = DistributedDataParallel(
                model, device_ids=[self._device] if cuda else None, gradient_as_bucket_view=True
            )
            self._no_sync = model.no_sync
        # CUDA graphs would overwrite accumulated gradients.
        graphs = cuda and self._recipe.accumulate == 1
        return torch.compile(model, mode="reduce-overhead" if graphs else None) if self._recipe.compile else model
