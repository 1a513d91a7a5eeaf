"""Trains a recipe on shards: one straight loop."""

import logging
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from tqdm import tqdm

from fastflower.backbone import build, train_mode
from fastflower.batch import resolve_device
from fastflower.checkpoint import Checkpoint
from fastflower.errors import ArgumentError, CheckpointError
from fastflower.evaluation import loader_dtype, measure, view_of
from fastflower.loader import Loader
from fastflower.recipe import Recipe
from fastflower.report import Report, write_history, write_report
from fastflower.schedule import multiplier, warm_up
from fastflower.store import Remote

_log = logging.getLogger("fastflower")

LAST, BEST = "checkpoint-last.pt", "checkpoint-best.pt"


def train(
    shards: str | Path | Remote,
    recipe: Recipe = Recipe(),  # noqa: B008  (frozen)
    *,
    out: str | Path | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
) -> Report:
    """Train on split "train", score split "val" after every epoch, and write checkpoints, history and report.

    On one machine, with the same number of threads, the same recipe and shards give the same history.

    Args:
        shards: The folder that `pack` wrote, or its address, as for Loader.
        recipe: What to train, and how.
        out: The folder of the run; None takes the first of runs/BACKBONE, runs/BACKBONE-2, ... that is free.
        resume: Go on after the last finished epoch of the run in `out`; a run without a checkpoint starts afresh.
        device: None means CUDA where there is one, else the CPU.

    Raises ShardError, CheckpointError, ArgumentError or DeviceError before anything is written.
    """
    chosen = resolve_device(device)
    folder = _folder(out, recipe, resume=resume)
    start = Checkpoint.load(folder / LAST) if resume and (folder / LAST).exists() else None
    if start and start.recipe != recipe:
        raise CheckpointError(
            f"{folder / LAST}: was trained with another recipe; resume with the same, or name another out."
        )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return Run(shards, recipe, folder, chosen, start).report()


class Run:
    """A run under way: network, optimizer and loaders, as `train` uses them and benchmarks time them."""

    def __init__(
        self, shards: str | Path | Remote, recipe: Recipe, folder: Path, device: torch.device, start: Checkpoint | None
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder, self.device = recipe, folder, device
        self.precision = loader_dtype(recipe)
        common: dict[str, Any] = {"batch_size": recipe.batch_size, "device": device, "dtype": self.precision}
        shuffle = "balanced" if recipe.balanced else True
        self.loader = Loader(shards, "train", augment=recipe.augment, seed=recipe.seed, shuffle=shuffle, **common)
        self.classes = self.loader.manifest.classes
        splits = self.loader.manifest.splits
        has_val = "val" in splits and splits["val"].samples > 0
        self.val = Loader(shards, "val", augment=view_of(recipe), **common) if has_val else None
        weights = None if start else recipe.weights
        model = build(recipe.backbone, len(self.classes), weights=weights, freeze=recipe.freeze)
        self.model: nn.Module = model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.optimizer = optimizer_of(self.model, recipe)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        self.history: list[dict[str, float]] = []
        if start:
            self._restore(start)

    def _restore(self, start: Checkpoint) -> None:
        if start.classes != self.classes:
            raise CheckpointError(
                f"{self.folder / LAST}: was trained on {', '.join(start.classes)}; resume on the same shards."
            )
        self.model.load_state_dict(start.model)
        self.optimizer.load_state_dict(start.optimizer)
        self.history = list(start.history)
        if start.rng is not None:
            torch.set_rng_state(start.rng)
        _log.info("%s: resumed after epoch %d", self.folder, start.epoch)

    def report(self) -> Report:
        """Train the epochs that are left; validate, save and log after each; write the report at the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        scores = None
        for epoch in range(len(self.history), self.recipe.epochs):
            row = {"epoch": epoch + 1, **self.train_epoch(epoch)}
            scores = None
            if self.val:
                start = time.perf_counter()
                scores = measure(self.model, self.val, self.classes, self.device, self.precision)
                row |= {"val_loss": scores.loss, "val_accuracy": scores.accuracy}
                row["val_seconds"] = time.perf_counter() - start
            self.history.append(row)
            self._save()
            write_history(self.folder, self.history)
            _log.info("%s", _line(row, self.recipe.epochs))
        best = best_epoch(self.history)
        return write_report(
            self.folder, self.recipe, self.classes, self.history, best, self._final_scores(scores), self.val
        )

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training split. Sums stay on the device and are read once, at the end."""
        train_mode(self.model, self.recipe.freeze)
        self.loader.set_epoch(epoch)
        steps = len(self.loader)
        loss_sum = torch.zeros((), device=self.device)
        hits = torch.zeros((), dtype=torch.int64, device=self.device)
        samples, waited, lr = 0, 0.0, 0.0
        start = asked = time.perf_counter()
        label = f"epoch {epoch + 1}/{self.recipe.epochs}"
        with tqdm(total=steps * self.loader.global_batch_size, desc=label, unit="image", disable=None) as bar:
            for step, (images, labels, _) in enumerate(self.loader):
                waited += time.perf_counter() - asked
                together = min(self.recipe.accumulate, steps - step // self.recipe.accumulate * self.recipe.accumulate)
                last = (step + 1) % self.recipe.accumulate == 0 or step + 1 == steps
                lr = self._set_lr(epoch * steps + step, steps)
                loss, logits = self.step(images, labels, together, update=last)
                loss_sum += loss.float() * len(labels)
                likeliest = labels if labels.ndim == 1 else labels.argmax(dim=1)  # of mixed images, the larger share
                hits += (logits.argmax(dim=1) == likeliest).sum()
                samples += len(labels)
                bar.update(len(labels))
                asked = time.perf_counter()
        train_loss, train_accuracy = loss_sum.item() / samples, hits.item() / samples  # waits for the device
        seconds = time.perf_counter() - start
        return {
            "lr": lr,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "images_per_second": samples / seconds,
            "train_seconds": seconds,
            "wait_seconds": waited,
        }

    def step(self, images: Tensor, labels: Tensor, together: int = 1, *, update: bool = True) -> tuple[Tensor, Tensor]:
        """One batch, the gradients of `together` batches averaged before an update; (mean loss, logits (N, K)), detached."""
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            logits = self.model(images)
            loss = self.criterion(logits, labels)
        self.scaler.scale(loss / together).backward()
        if not update:
            return loss.detach(), logits.detach()
        if self.recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), logits.detach()

    def _set_lr(self, step: int, steps_per_epoch: int) -> float:
        recipe = self.recipe
        lr = recipe.lr * multiplier(
            recipe.schedule,
            step,
            total_steps=recipe.epochs * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            step_epochs=recipe.step_epochs,
            gamma=recipe.gamma,
        )
        lr *= warm_up(step, recipe.warmup_epochs * steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _save(self) -> None:
        checkpoint = Checkpoint(
            recipe=self.recipe,
            classes=self.classes,
            model=self.model.state_dict(),
            epoch=len(self.history),
            history=self.history,
            optimizer=self.optimizer.state_dict(),
            rng=torch.get_rng_state(),
            environment=environment(self.device),
        )
        checkpoint.save(self.folder / LAST)
        if best_epoch(self.history) == len(self.history):
            checkpoint.save(self.folder / BEST)

    def _final_scores(self, last: Any) -> Any:
        """Scores of the best checkpoint: measured again only where the best epoch is not the one just scored."""
        if self.val is None or (last is not None and best_epoch(self.history) == len(self.history)):
            return last
        self.model.load_state_dict(Checkpoint.load(self.folder / BEST).model)
        return measure(self.model, self.val, self.classes, self.device, self.precision)


def optimizer_of(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer of what is trained. Matrices and kernels decay, norms and biases (one dimension) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in trained if parameter.ndim > 1]
    plain = [parameter for parameter in trained if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decaying, recipe.weight_decay), (plain, 0.0))
        if parameters
    ]
    if recipe.optimizer == "sgd":
        return SGD(groups, recipe.lr, momentum=recipe.momentum)
    kind = Adam if recipe.optimizer == "adam" else AdamW
    return kind(groups, recipe.lr, betas=(recipe.momentum, 0.999))


def best_epoch(history: list[dict[str, float]]) -> int:
    """The first epoch, counted from 1, of the highest validation accuracy; the last where nothing was validated."""
    if "val_accuracy" not in history[-1]:
        return len(history)
    return max(range(len(history)), key=lambda row: history[row]["val_accuracy"]) + 1


def environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions, for checkpoints and benchmark records."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    names = ("fastflower", "torch", "torchvision", "numpy", "opencv-python-headless")
    found = {name: version(name) for name in names}
    return {
        "device": f"{device.type}: {chip}",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **found,
    }


def _folder(out: str | Path | None, recipe: Recipe, *, resume: bool) -> Path:
    if out is None:
        if resume:
            raise ArgumentError("resume: name the run's folder with out (--out).")
        tries = (Path("runs", recipe.backbone + (f"-{number}" if number > 1 else "")) for number in range(1, 10**6))
        return next(folder for folder in tries if not folder.exists())
    folder = Path(out)
    if not resume and (folder / LAST).exists():
        raise CheckpointError(f"{folder}: holds a run already; pass resume=True (--resume), or name another out.")
    return folder


def _line(row: dict[str, float], epochs: int) -> str:
    text = f"epoch {row['epoch']:.0f}/{epochs}: train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:.1%}"
    if "val_accuracy" in row:
        text += f", val loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:.1%}"
    return f"{text}, {row['images_per_second']:.0f} images/s, {row['wait_seconds']:.1f} of {row['train_seconds']:.1f} s waiting"
