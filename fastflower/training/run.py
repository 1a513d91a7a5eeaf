"""The training loop: epochs, steps, validation, checkpoints and resuming."""

import logging
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from copy import deepcopy
from functools import partial
from itertools import islice
from math import inf, isfinite
from pathlib import Path
from time import perf_counter
from typing import cast

import torch
from torch import Tensor, nn

from fastflower import distributed, progress
from fastflower.devices import environment, fastest_convolutions, generator_of, precision_of, resolve_device
from fastflower.draws.random import stream_key
from fastflower.errors import CheckpointError, FastflowerError, StoppedError, TrainingError
from fastflower.loading.batch import Batch
from fastflower.loading.loader import Loader
from fastflower.models.backbone import on_device
from fastflower.models.checkpoint import LAST, Checkpoint, EpochSoFar
from fastflower.models.defaults import complete, network_of
from fastflower.models.inference import measure, recalibrate, view_of
from fastflower.models.metrics import Scores
from fastflower.models.stages import train_mode
from fastflower.models.weights_file import BEST
from fastflower.recipes.recipe import Recipe
from fastflower.reporting.report import Report, best_epoch, epoch_line, tensorboard, write_history, write_report
from fastflower.shards.remote import Remote
from fastflower.training.averaging import Average, tensors_of
from fastflower.training.command import Call
from fastflower.training.cuda_graphs import graphs_of
from fastflower.training.failures import resumable
from fastflower.training.optimizer import optimizer_of, plain_state, restore, set_rate, zero_state
from fastflower.training.resuming import require_same_data, warn_of_changes
from fastflower.training.step import Stepper
from fastflower.training.tally import Tally, first_not_finite

_log = logging.getLogger("fastflower")

_LONG = 10.0  # seconds of validation after which a checkpoint of the trained epoch is saved
_RECALIBRATION = 20  # batches; a running mean with momentum 0.1 covers about as many
_ADVICE = (
    "start a new run in a different folder (out) with a lower lr, warm-up (warmup_epochs) "
    "or gradient clipping (clip_norm)"
)


class Run:
    """Network, optimizer and loaders of a run, used by `train` and timed by benchmarks."""

    def __init__(
        self,
        shards: str | Path | Remote,
        recipe: Recipe,
        folder: Path,
        device: torch.device,
        start: Checkpoint | None = None,
        *,
        fold: int | None = None,
        save_steps: int | None = None,
        stop: Callable[[], int] = lambda: 0,
        call: Call | None = None,
    ) -> None:
        self.recipe = recipe = complete(recipe)
        self.folder, self.device = folder, resolve_device(device)
        self.precision = precision_of(recipe.precision, self.device)
        self._save_steps, self._stop = save_steps, stop
        self._call = call or Call(
            shards=shards, recipe=recipe, fold=fold, out=folder, save_steps=save_steps, device=device
        )
        self.loader, self.val = self._loaders(shards, fold)
        self.classes = self.loader.manifest.classes
        torch.manual_seed(recipe.seed)  # pyright: ignore[reportUnknownMemberType]  (untyped in torch)
        self._freeze = recipe.freeze or 0
        self.network = on_device(network_of(recipe, self.classes, resumed=start is not None), self.device)
        self.optimizer = optimizer_of(self.network, recipe)
        self.average = Average(self.network, recipe.ema) if recipe.ema or recipe.soup > 1 else None
        self._first_weights = deepcopy(self.network.state_dict()) if recipe.soup > 1 else {}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.history: list[dict[str, float]] = []
        self._interrupted: EpochSoFar = {}
        self._tally: Tally | None = None  # of the current epoch
        self._statistics: dict[str, Tensor] = {}  # old batch norm statistics, to save during a recalibration
        self._saved, self._saved_at = "", 0.0  # position and time of the last checkpoint, for messages
        if start:
            self._restore(start)
        train_mode(self.network, self._freeze)
        capture = graphs_of(recipe, self.device, self.precision)
        # Created after restoring, because CUDA graphs refer to the restored tensors.
        self.stepper = Stepper(self.network, self.optimizer, self.scaler, recipe, self.device, self.precision, capture)

    def _loaders(self, shards: str | Path | Remote, fold: int | None) -> tuple[Loader, Loader | None]:
        """Create the train and val loaders; the val loader is None if the val split is missing or empty."""
        recipe, batch_size = self.recipe, distributed.share(self.recipe.batch_size)
        make = partial(Loader, shards, fold=fold, batch_size=batch_size, device=self.device, dtype=self.precision)
        shuffle = "balanced" if recipe.balanced else True
        train = make("train", augment=recipe.augment_at(0), seed=recipe.seed, shuffle=shuffle)
        splits = train.manifest.splits
        if "val" in splits and splits["val"].samples > 0:
            return train, make("val", augment=view_of(recipe))
        if distributed.rank() == 0:
            what = "%s: the val split has no images, so nothing is validated; %s will hold the last epoch"
            if folds := train.manifest.folds:
                what += f"; to validate on a fold, pass fold=0 .. {folds.count - 1} (--fold)"
            _log.warning(what, shards, BEST)
        return train, None

    def _restore(self, start: Checkpoint) -> None:
        require_same_data(start, self._call, self.loader, self.val)
        try:
            self.loader.load_state_dict(start.feeding)
        except FastflowerError as error:
            raise CheckpointError(f"{self.folder / LAST}: {error}") from None
        self.network.load_state_dict(start.trained or start.model)
        if self.average:
            self.average.network.load_state_dict(start.soup or start.model)
        restore(self.optimizer, start.optimizer)
        self.scaler.load_state_dict(start.scaler)
        self.history, self._interrupted = list(start.history), start.tally
        self._saved, self._saved_at = (
            _position(start.epoch, start.step, trained=start.tally.get("trained", False)),
            perf_counter(),
        )
        if self._finished():
            told = "%s: already finished after epoch %d. To train on from its weights:\n  %s"
            _log.info(told, self.folder, start.epoch, self._call.onward())
        else:
            warn_of_changes(start, self._call, environment(self.device, self.precision))
            _log.info("%s: resumed in epoch %d after %d steps", self.folder, start.epoch + 1, start.step)

    @property
    def scored(self) -> nn.Module:
        """The network to validate and save.

        This is the averaged network for an EMA and at the end of each run of a model soup, otherwise the network being trained.
        """
        if self.average is None:
            return self.network
        if self.recipe.ema:
            return self.average.network
        if self._tally and not self._tally.trained:
            return self.network
        epochs = len(self.history) + (self._tally is not None)
        return self.average.network if self._ends_training(epochs - 1) else self.network

    def _ends_training(self, epoch: int) -> bool:
        """Return whether an epoch, counted from 0, ends the training or one run of a model soup."""
        return (epoch + 1) % self.recipe.epochs_per_training == 0

    def train(self, record: Callable[[int], None] = lambda _: None) -> Report:
        """Train the remaining epochs; validate, save and log after each one; write the report at the end.

        record  Called on rank 0 with the number of finished epochs whenever it changes, and before the report is written.
        """
        first = distributed.rank() == 0
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.history:  # a killed run may not have written the last row
                write_history(self.folder, self.history)
        scores = None
        with tensorboard(self.folder) if first else nullcontext() as write_events:
            while not self._finished():
                row, scores = self.epoch(len(self.history))
                self.history.append(row)
                self._tally = None
                self._save()
                if write_events:  # only on rank 0
                    write_events(row)
                    write_history(self.folder, self.history)
                    record(len(self.history))
                    _log.info("%s", epoch_line(row, self.recipe.epochs))
                if not self._finished():
                    self._save_or_stop()
        best = best_epoch(self.history)
        if self.val and (scores is None or best != len(self.history)):
            kept = Checkpoint.load(self.folder / BEST)
            best = kept.epoch  # an older version may have resolved ties differently
            self.scored.load_state_dict(kept.model)
            scores = self._score(self.val)
        if first:
            record(len(self.history))
            write_report(self.folder, self.recipe, self.classes, self.history, best, scores, self.val)
        distributed.wait_for_all()
        self._save_or_stop()  # SIGTERM may have come after the last epoch
        return Report(self.folder, self.history, best, scores)

    def epoch(self, epoch: int) -> tuple[dict[str, float], Scores | None]:
        """Train and validate one epoch; return its row of the history, and its scores if there is a val split."""
        row = {"epoch": epoch + 1, **self.train_epoch(epoch)}
        start = perf_counter()
        if self.recipe.recalibrate and self._ends_training(epoch):
            self._recalibrate()
        if self.val is None:
            return row, None
        distributed.share_buffers(self.scored)
        scores = self._score(self.val)
        if not isfinite(scores.loss):
            raise TrainingError(
                f"{self.folder}: the validation loss is not finite after epoch {epoch + 1}; {_ADVICE}. If {LAST} exists, "
                f"it was saved before this happened."
            )
        row |= {"val_loss": scores.loss, "val_accuracy": scores.accuracy, "val_seconds": perf_counter() - start}
        return row, scores

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch, or the rest of an interrupted one; return its part of the history row."""
        recipe, loader, steps, batch_size = self.recipe, self.loader, len(self.loader), self.loader.global_batch_size
        save_every = self._save_steps * recipe.accumulate if self._save_steps else steps + 1
        tally = self._begin_epoch(epoch)
        bar = progress.bar(
            desc=f"epoch {epoch + 1}/{recipe.epochs}",
            total=steps * batch_size,
            initial=tally.steps * batch_size,
            unit="image",
            hidden=distributed.rank() > 0,
        )
        begun = perf_counter() - tally.seconds
        with fastest_convolutions(self.device), bar, _batches_of(loader) as batches:
            waited = tally.waited - loader.stats().wait_seconds  # the loader's clock excludes its waits for the GPU
            for step, (images, labels, _) in enumerate(batches, start=tally.steps):
                first = step - step % recipe.accumulate  # first batch of this update
                last = min(first + recipe.accumulate, steps) - 1
                self._prepare(epoch * steps + step, steps)
                tally.add(*self.step(images, labels, last + 1 - first, update=step == last))
                self._require_finite(tally.not_finite(), epoch)
                bar.update(batch_size)
                if step == last:
                    if self.average and recipe.ema:
                        updates = epoch * -(-steps // recipe.accumulate) + step // recipe.accumulate
                        self.average.update(self.network, updates)
                    tally.seconds, tally.waited = perf_counter() - begun, waited + loader.stats().wait_seconds
                    self._save_or_stop(due=tally.steps % save_every == 0)
        losses, correct = tally.totals()
        self._require_finite(first_not_finite(losses), epoch)
        seconds = perf_counter() - begun
        if self.average and recipe.soup > 1 and self._ends_training(epoch) and not tally.trained:
            self.average.update(self.network, epoch // recipe.epochs_per_training)
        tally.trained = True
        return {
            "lr": recipe.lr_at(epoch * steps + steps - 1, steps),
            "size": loader.augment.output_size[0],
            "images": steps * batch_size,
            "train_loss": losses.mean().item(),
            "train_accuracy": correct / (steps * batch_size),
            "images_per_second": steps * batch_size / seconds,
            "train_seconds": seconds,
            "wait_seconds": tally.waited,
        }

    def _begin_epoch(self, epoch: int) -> Tally:
        """Prepare network, loader and tally to start an epoch or to resume an interrupted one."""
        train_mode(self.network, self._freeze)
        tally = self._tally = Tally(len(self.loader), self.device, self._interrupted)
        self._interrupted = {}
        if self._first_weights and epoch % self.recipe.epochs_per_training == 0 and tally.steps == 0:
            self.network.load_state_dict(self._first_weights)
            zero_state(self.optimizer)
        augment = self.recipe.augment_at(epoch)
        if augment != self.loader.augment:
            self.loader.set_augment(augment)
        self.loader.load_state_dict({**self.loader.state_dict(), "epoch": epoch, "step": tally.steps})
        return tally

    def step(self, images: Tensor, labels: Tensor, together: int = 1, *, update: bool = True) -> tuple[Tensor, Tensor]:
        """Train on one batch (see `Stepper`). The next step may overwrite the returned tensors."""
        return self.stepper(images, labels, together, update=update)

    def _prepare(self, step: int, steps_per_epoch: int) -> None:
        """Set the learning rate and the dropout seed for `step`, which is counted over all epochs."""
        set_rate(self.optimizer, self.recipe.lr_at(step, steps_per_epoch))
        generator_of(self.device).manual_seed(stream_key(self.recipe.seed, step, distributed.rank()) >> 1)

    def _require_finite(self, step: int | None, epoch: int) -> None:
        """Raise TrainingError if `step`, the first step with a non-finite loss, is not None."""
        if step is None:
            return
        places = [self.loader.where(index) for index in self.loader.indices(epoch, step).tolist()]
        raise TrainingError(
            f"{self.folder}: the loss is not finite in epoch {epoch + 1}, step {step + 1}; {_ADVICE}, and check the batch. "
            f"If {LAST} exists, it was saved before this happened. Batch: {'; '.join(places)}"
        )

    def _recalibrate(self) -> None:
        """Recompute batch norm statistics; a checkpoint saved in the meantime holds the old ones."""
        position = self.loader.state_dict()
        self.loader.set_augment(view_of(self.recipe))
        self._statistics = {name: value.clone() for name, value in self.scored.named_buffers()}
        batches = self._watched(self.loader, min(_RECALIBRATION, len(self.loader)))
        recalibrate(self.scored, batches, self._freeze)
        self._statistics = {}
        self.loader.load_state_dict(position)

    def _score(self, val: Loader) -> Scores:
        steps = -(-val.num_samples // val.global_batch_size)  # same on all ranks; the last may be empty on some
        batches = self._watched(val, steps)
        return measure(self.scored, batches, self.classes, tta=self.recipe.tta, paths=val.paths)

    def _watched(self, loader: Loader, steps: int) -> Iterator[Batch]:
        """Yield val or recalibration batches. Check for SIGTERM before each; save the trained epoch once after _LONG seconds."""
        ends = perf_counter() + _LONG
        with _batches_of(loader) as batches:
            for _ in range(steps):
                due = distributed.any_rank(perf_counter() > ends)
                self._save_or_stop(due=due)
                ends = inf if due else ends
                yield from islice(batches, 1)

    def _finished(self) -> bool:
        done, patience = len(self.history), self.recipe.patience
        stale = patience is not None and done > 0 and done - best_epoch(self.history) >= patience
        return done >= self.recipe.epochs or stale

    def _save_or_stop(self, *, due: bool = False) -> None:
        """Save the current epoch if `due` or if any rank received a signal.

        Then raises StoppedError after SIGTERM, KeyboardInterrupt after SIGINT.
        """
        stop = distributed.any_rank(bool(self._stop()))
        if self._tally and (stop or due):
            self._save()
        if stop:
            if max(distributed.gathered(self._stop())) == signal.SIGINT:
                raise KeyboardInterrupt
            raise StoppedError(self.stopped("stopped by SIGTERM"))

    def stopped(self, how: str) -> str:
        """Describe where a run stopped, what it has saved, and what to type to continue. how  For example "interrupted"."""
        place = self._place
        what = f"{self.folder}: {how} {place}"
        if not self._saved:
            return f"{what}; nothing was saved yet. {self._call.again_told(resume=False)}"
        lost = f"; what came after the checkpoint {self._saved}, {perf_counter() - self._saved_at:.0f} s ago, is lost"
        saved = ", and saved a checkpoint" if place == self._saved else lost
        return f"{what}{saved}. {self._call.again_told(resume=True)}"

    @property
    def _place(self) -> str:
        tally = self._tally
        return _position(len(self.history), tally.steps if tally else 0, trained=tally is not None and tally.trained)

    def _loader_state(self) -> dict[str, object]:
        return {**self.loader.state_dict(), "val": self.val.state_dict()["shards"] if self.val else None}

    def _save(self) -> None:
        tally: EpochSoFar = self._tally.state() if self._tally else {}
        self._require_finite(first_not_finite(tally.get("losses", torch.zeros(0))), len(self.history))
        tensors = [*tensors_of(self.network), *tensors_of(self.scored)]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            raise TrainingError(f"{self.folder}: weights are no longer finite and were not saved; {_ADVICE}.")
        if distributed.rank() == 0:
            with resumable(self._call):
                self._write(tally)
        self._saved, self._saved_at = self._place, perf_counter()

    def _write(self, tally: EpochSoFar) -> None:
        model = self.scored.state_dict()
        model.update(self._statistics)  # an MNASNet loads no copy of a state_dict, which would lack its version
        checkpoint = Checkpoint(
            recipe=self.recipe,
            classes=self.classes,
            model=model,
            trained=self.network.state_dict() if self.average else {},
            soup=self.average.network.state_dict() if self.average and self.recipe.soup > 1 else {},
            epoch=len(self.history),
            history=self.history,
            tally=tally,
            feeding=self._loader_state(),
            optimizer=plain_state(self.optimizer),
            scaler=self.scaler.state_dict(),
            environment=environment(self.device, self.precision),
        )
        best = self.folder / BEST if not tally and best_epoch(self.history) == len(self.history) else None
        if best:
            checkpoint.save(best)  # before LAST, so that a run resumed from LAST finds BEST
        checkpoint.save(self.folder / LAST, twin=best)


def _position(epoch: int, steps: int, *, trained: bool) -> str:
    """Describe a position: `epoch` finished epochs, and in the next one `steps` steps, or its whole training."""
    if trained:
        return f"in the validation of epoch {epoch + 1}"
    if steps:
        return f"in epoch {epoch + 1}, step {steps}"
    return f"after epoch {epoch}" if epoch else "before the first step"


def _batches_of(loader: Loader) -> closing[Generator[Batch]]:
    """Return a context manager for a loader's batches. On exit, the threads end even if a traceback holds the iterator."""
    return closing(cast("Generator[Batch]", iter(loader)))
