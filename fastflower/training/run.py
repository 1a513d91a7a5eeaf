"""A run under way: one straight loop over epochs and steps."""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from copy import deepcopy
from itertools import islice
from math import inf, isfinite
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastflower import distributed
from fastflower.devices import (
    environment,
    fastest_convolutions,
    generator_of,
    kept_memory,
    precision_of,
    resolve_device,
)
from fastflower.draws.random import stream_key
from fastflower.errors import CheckpointError, FastflowerError, StoppedError, TrainingError
from fastflower.loading.batch import Batch
from fastflower.loading.loader import Loader
from fastflower.models.backbone import build, train_mode
from fastflower.models.checkpoint import BEST, LAST, Checkpoint
from fastflower.models.inference import measure, recalibrate, view_of
from fastflower.models.metrics import Scores
from fastflower.recipes.recipe import Recipe
from fastflower.reporting.report import Report, best_epoch, epoch_line, tensorboard, write_history, write_report
from fastflower.shards.remote import Remote
from fastflower.training.averaging import Average, tensors_of
from fastflower.training.cuda_graphs import graphs_of
from fastflower.training.optimizer import forget, optimizer_of, plain_state, restore, set_rate
from fastflower.training.step import Stepper
from fastflower.training.tally import Tally, first_not_finite

_log = logging.getLogger("fastflower")

_LONG = 10.0  # seconds of validation after which an epoch's training is saved
_RECALIBRATION = 20  # batches; as many as a running mean of momentum 0.1 remembers
_ADVICE = "train anew (another out) with a lower lr, warm-up (warmup_epochs) or clipped gradients (clip_norm)"


class Run:
    """A run under way: network, optimizer and loaders, as `train` uses them and benchmarks time them."""

    def __init__(
        self,
        shards: str | Path | Remote,
        recipe: Recipe,
        folder: Path,
        device: torch.device,
        start: Checkpoint | None = None,
        *,
        save_steps: int | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.recipe, self.folder, self.device = recipe, folder, resolve_device(device)
        device = self.device
        self.precision = precision_of(recipe.precision, device)
        self._save_steps, self._stop = save_steps, stop
        batch_size = distributed.share(recipe.batch_size)
        common: dict[str, Any] = {"batch_size": batch_size, "device": device, "dtype": self.precision}
        shuffle = "balanced" if recipe.balanced else True
        self.loader = Loader(shards, "train", augment=recipe.augment_at(0), seed=recipe.seed, shuffle=shuffle, **common)
        self.classes = self.loader.manifest.classes
        splits = self.loader.manifest.splits
        has_val = "val" in splits and splits["val"].samples > 0
        self.val = Loader(shards, "val", augment=view_of(recipe), **common) if has_val else None
        if not has_val and distributed.rank() == 0:
            _log.warning(
                "%s: has no images in split 'val', so nothing is validated: %s is of the last epoch", shards, BEST
            )
        torch.manual_seed(recipe.seed)
        weights = None if start and recipe.soup == 1 else recipe.weights
        how: dict[str, Any] = {"weights": weights, "freeze": recipe.freeze, "classes": self.classes}
        network = build(recipe.backbone, len(self.classes), **how)
        self.network: nn.Module = network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.optimizer = optimizer_of(self.network, recipe)
        self.average = Average(self.network, recipe.ema) if recipe.ema or recipe.soup > 1 else None
        self._first = deepcopy(self.network.state_dict()) if recipe.soup > 1 else {}
        self.scored = self.average.network if self.average and recipe.ema else self.network
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.history: list[dict[str, float]] = []
        self._interrupted: dict[str, Any] = {}
        self._tally: Tally | None = None  # of the epoch under way
        self._statistics: dict[str, Tensor] = {}  # of batch norms, while they are being computed anew
        if start:
            self._restore(start)
        train_mode(self.network, recipe.freeze)
        capture = graphs_of(recipe, device, self.precision)
        parts = (self.network, self.optimizer, self.scaler)  # as restored: a graph is of these very tensors
        self._stepper = Stepper(*parts, recipe, device, self.precision, capture)

    def _restore(self, start: Checkpoint) -> None:
        place = self.folder / LAST
        if start.classes != self.classes:
            theirs, ours = ", ".join(start.classes), ", ".join(self.classes)
            raise CheckpointError(f"{place}: was trained on {theirs}, these shards have {ours}; resume on the same.")
        try:
            self.loader.load_state_dict(start.feeding)
        except FastflowerError as error:
            told = str(error)
            if start.feeding["shards"] != self.loader.state_dict()["shards"]:
                told = "was trained on other shards; resume on the same, or name another out, which may start from this file."
            raise CheckpointError(f"{place}: {told}") from None
        val = self._feeding()["val"]
        if start.feeding.get("val", val) != val:
            raise CheckpointError(f"{place}: was validated on another split 'val'; resume on the same shards.")
        self.network.load_state_dict(start.trained or start.model)
        if self.average:
            self.average.network.load_state_dict(start.soup or start.model)
        restore(self.optimizer, start.optimizer)
        self.scaler.load_state_dict(start.scaler)
        self.history, self._interrupted = list(start.history), start.tally
        now = environment(self.device, self.precision)
        for name in ("device", "precision", "threads", "torch", "ranks"):
            before, follows = start.environment.get(name), "the last bits will differ"
            if name == "ranks" and not self.recipe.sync_batchnorm:
                follows += ", and all where batch norms are trained, which see their rank's part of a batch only"
            if before != now[name] and distributed.rank() == 0:
                _log.warning("%s: %s was %s, now %s: %s", place, name, before, now[name], follows)
        if self._finished():
            _log.info("%s: was finished after epoch %d", self.folder, start.epoch)
        else:
            _log.info("%s: resumed in epoch %d after %d steps", self.folder, start.epoch + 1, start.step)

    def report(self) -> Report:
        """Train the epochs that are left; validate, save and log after each; write the report at the end."""
        first = distributed.rank() == 0
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.history:  # a kill may have come before its last row
                write_history(self.folder, self.history)
        scores = None
        with kept_memory(self.device), tensorboard(self.folder) if first else nullcontext() as board:
            while not self._finished():
                row, scores = self.epoch(len(self.history))
                self.history.append(row)
                self._tally = None
                self._save()
                if first:
                    write_history(self.folder, self.history, board)
                    _log.info("%s", epoch_line(row, self.recipe.epochs))
                if not self._finished():
                    self._obey()
        best = best_epoch(self.history)
        if self.val and (scores is None or best != len(self.history)):
            kept = Checkpoint.load(self.folder / BEST)
            best = kept.epoch  # of a run that an older version began: the first of equals
            self.scored.load_state_dict(kept.model)
            scores = self._score(self.val)
        if first:
            write_report(self.folder, self.recipe, self.classes, self.history, best, scores, self.val)
        distributed.wait_for_all()
        self._obey()  # also where nothing is left to do, or a SIGTERM of the last epoch would be lost
        return Report(self.folder, self.history, best, scores)

    def epoch(self, epoch: int) -> tuple[dict[str, float], Scores | None]:
        """Train and validate: a row of the history, and the scores where there is a split "val"."""
        with kept_memory(self.device):
            row = {"epoch": epoch + 1, **self.train_epoch(epoch)}
            tally, last = self._tally, (epoch + 1) % self.recipe.epochs_per_training == 0
            if self._first and self.average and last:
                if tally and not tally.trained:
                    self.average.update(self.network, epoch // self.recipe.epochs_per_training)
                self.scored = self.average.network
            if tally:
                tally.trained = True
            start = perf_counter()
            if self.recipe.recalibrate and last:
                place = self.loader.state_dict()
                self.loader.set_augment(view_of(self.recipe))
                self._statistics = {name: value.clone() for name, value in self.scored.named_buffers()}
                batches = self._watched(self.loader, min(_RECALIBRATION, len(self.loader)))
                recalibrate(self.scored, batches, self.recipe.freeze)
                self._statistics = {}
                self.loader.load_state_dict(place)
            if self.val is None:
                return row, None
            distributed.share_buffers(self.scored)
            scores = self._score(self.val)
            if not isfinite(scores.loss):
                raise TrainingError(
                    f"{self.folder}: the validation loss is not finite after epoch {epoch + 1}; {_ADVICE}. {LAST}, if there "
                    f"is one, is from before."
                )
            row |= {"val_loss": scores.loss, "val_accuracy": scores.accuracy, "val_seconds": perf_counter() - start}
            return row, scores

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training split, or what an interruption left of it; its row of the history."""
        recipe = self.recipe
        train_mode(self.network, recipe.freeze)
        augment, steps = recipe.augment_at(epoch), len(self.loader)
        if augment != self.loader.augment:
            self.loader.set_augment(augment)
        tally = self._tally = Tally(steps, self.device, self._interrupted)
        self._interrupted = {}
        if self._first:
            self.scored = self.network
            if epoch % recipe.epochs_per_training == 0 and tally.steps == 0:
                self.network.load_state_dict(self._first)
                forget(self.optimizer)
        self.loader.load_state_dict({**self.loader.state_dict(), "epoch": epoch, "step": tally.steps})
        every = self._save_steps * recipe.accumulate if self._save_steps else steps + 1
        begun = perf_counter() - tally.seconds
        label = f"epoch {epoch + 1}/{recipe.epochs}"
        batch_size = self.loader.global_batch_size
        options: dict[str, Any] = {"total": steps * batch_size, "initial": tally.steps * batch_size, "unit": "image"}
        options |= {"desc": label, "disable": distributed.rank() > 0 or None}
        with fastest_convolutions(self.device), tqdm(**options) as bar, _ended(self.loader) as batches:
            waited = tally.waited - self.loader.stats().wait_seconds  # its clock stands while it waits for the GPU
            for step, (images, labels, _) in enumerate(batches, start=tally.steps):
                tally.waited = waited + self.loader.stats().wait_seconds
                self._prepare(epoch * steps + step, steps)
                first = step - step % recipe.accumulate
                end = min(first + recipe.accumulate, steps)
                tally.add(*self.step(images, labels, end - first, update=step + 1 == end))
                self._check(tally.not_finite(), epoch)
                bar.update(batch_size)
                if step + 1 == end:
                    if self.average and recipe.ema:
                        before = epoch * -(-steps // recipe.accumulate) + step // recipe.accumulate
                        self.average.update(self.network, before)
                    tally.seconds = perf_counter() - begun
                    self._obey(tally, due=tally.steps % every == 0)
        found = tally.state()
        self._check(first_not_finite(found["losses"]), epoch)
        seconds = perf_counter() - begun
        return {
            "lr": recipe.lr_at(epoch * steps + steps - 1, steps),
            "size": augment.output_size[0],
            "train_loss": found["losses"].mean().item(),
            "train_accuracy": found["hits"] / (steps * batch_size),
            "images_per_second": steps * batch_size / seconds,
            "train_seconds": seconds,
            "wait_seconds": tally.waited,
        }

    def step(self, images: Tensor, labels: Tensor, together: int = 1, *, update: bool = True) -> tuple[Tensor, Tensor]:
        """One batch, the gradients of `together` batches averaged before an update; (mean loss, hits), until the next step."""
        return self._stepper(images, labels, together, update=update)

    def _score(self, val: Loader) -> Scores:
        steps = -(-val.num_samples // val.global_batch_size)  # of all ranks; one may have no part of the last
        batches = self._watched(val, steps)
        return measure(self.scored, batches, self.classes, tta=self.recipe.tta, paths=val.paths)

    def _watched(self, loader: Loader, steps: int) -> Iterator[Batch]:
        """Batches that nothing is trained on. Before each SIGTERM is obeyed; where they take long, the training is saved once."""
        ends = perf_counter() + _LONG
        with _ended(loader) as batches:
            for _ in range(steps):
                due = distributed.any_rank(perf_counter() > ends)
                self._obey(self._tally, due=due)
                ends = inf if due else ends
                yield from islice(batches, 1)

    def _finished(self) -> bool:
        done, patience = len(self.history), self.recipe.patience
        stale = patience is not None and done > 0 and done - best_epoch(self.history) >= patience
        return done >= self.recipe.epochs or stale

    def _prepare(self, step: int, steps_per_epoch: int) -> None:
        """The rate of a step, counted over all epochs, and the random numbers of its dropout, which are functions of it."""
        set_rate(self.optimizer, self.recipe.lr_at(step, steps_per_epoch))
        generator_of(self.device).manual_seed(stream_key(self.recipe.seed, step, distributed.rank()) >> 1)

    def _check(self, step: int | None, epoch: int) -> None:
        """Raise for the step whose loss is not finite, if there is one."""
        if step is None:
            return
        places = [self.loader.where(index) for index in self.loader.indices(epoch, step).tolist()]
        raise TrainingError(
            f"{self.folder}: the loss is not finite in epoch {epoch + 1}, step {step + 1}; {_ADVICE}, and look at the batch. "
            f"{LAST}, if there is one, is from before. The batch: {'; '.join(places)}"
        )

    def _obey(self, tally: Tally | None = None, *, due: bool = False) -> None:
        """Save in mid-epoch where that is due, and stop where a rank got SIGTERM."""
        stop = distributed.any_rank(self._stop())
        if tally and (stop or due):
            self._save(tally)
        if stop:
            epoch = len(self.history)
            step = f"in epoch {epoch + 1}, step {tally.steps}" if tally else f"after epoch {epoch}"
            place = f"in the validation of epoch {epoch + 1}" if tally and tally.trained else step
            raise StoppedError(f"{self.folder}: stopped by SIGTERM {place}, and saved; resume=True (--resume) goes on.")

    def _feeding(self) -> dict[str, Any]:
        return {**self.loader.state_dict(), "val": self.val.state_dict()["shards"] if self.val else None}

    def _save(self, tally: Tally | None = None) -> None:
        state = tally.state() if tally else {}
        if tally:
            self._check(first_not_finite(state["losses"]), len(self.history))
        tensors = [*tensors_of(self.network), *tensors_of(self.scored)]
        if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
            raise TrainingError(f"{self.folder}: weights are not finite any more, and were not saved; {_ADVICE}.")
        if distributed.rank() > 0:
            return
        checkpoint = Checkpoint(
            recipe=self.recipe,
            classes=self.classes,
            model=self.scored.state_dict() | self._statistics,
            trained=self.network.state_dict() if self.average else {},
            soup=self.average.network.state_dict() if self.average and self._first else {},
            epoch=len(self.history),
            history=self.history,
            tally=state,
            feeding=self._feeding(),
            optimizer=plain_state(self.optimizer),
            scaler=self.scaler.state_dict(),
            environment=environment(self.device, self.precision),
        )
        best = self.folder / BEST if not tally and best_epoch(self.history) == len(self.history) else None
        if best:
            checkpoint.save(best)  # first: what is resumed from LAST finds it
        checkpoint.save(self.folder / LAST, twin=best)


def _ended(loader: Loader) -> closing[Any]:
    """As a context: its batches, whose threads end with it: an error's traceback would keep them until some collection."""
    batches: Any = iter(loader)
    return closing(batches)
