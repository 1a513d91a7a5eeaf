"""Interrupted training: after a kill, SIGTERM, a full disk or an error, a resumed run equals an uninterrupted one."""

import logging
import math
import re
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_runs import (
    BEST,
    LAST,
    RECIPE,
    arguments,
    assert_same,
    assert_same_run,
    before_call,
    child,
    kill,
    killed,
    place,
    small,
    terminate,
    timeless,
    written_history,
)

from fastflower import Augment, Checkpoint, Loader, train
from fastflower.cli import main
from fastflower.errors import ArgumentError, CheckpointError, DeviceError, StoppedError, TrainingError
from fastflower.training import run as loop
from fastflower.training.run import Run

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")


@pytest.fixture(autouse=True)
def _small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "resnet" not in request.fixturenames:
        monkeypatch.setattr("fastflower.models.defaults.build", small)


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the small network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.models.defaults.build", small)
        return train(shards, RECIPE, out=tmp_path_factory.mktemp("whole") / "run", device="cpu").folder


@pytest.fixture(scope="module")
def resnet(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the recipe's ResNet-18, for child processes, which cannot be patched."""
    return train(shards, RECIPE, out=tmp_path_factory.mktemp("resnet") / "run", device="cpu").folder


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 2},
    "averaged": {"ema": 0.9},
    "progressive": {"sizes": (24, 32)},
    "float16": {"precision": "float16"},
    "all at once": {
        "accumulate": 2,
        "ema": 0.9,
        "sizes": (24, 40),
        "optimizer": "adamw",
        "lr": 0.001,
        "weight_decay": 0.05,
        "clip_norm": 1.0,
        "schedule": "cosine",
        "warmup_epochs": 0.5,
        "precision": "bfloat16",
        "balanced": True,
        "tta": True,
        "augment": Augment(size=32, resize=36, crop=(0.5, 1.0), hue=0.1, erase=0.5, mixup=0.4),
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_that_is_killed_repeatedly_equals_an_uninterrupted_one(shards: Path, tmp_path: Path, name: str) -> None:
    """It is killed in both epochs, and once before any progress. Dropout masks must be the same too."""
    recipe = replace(RECIPE, **VARIANTS[name])
    one, other = tmp_path / "one", tmp_path / "other"
    train(shards, recipe, out=one, device="cpu")
    places: list[tuple[int, int]] = []
    for batch in (4, 1, 6):
        killed(shards, recipe, other, (Run, "step", batch), save_steps=2 // recipe.accumulate)
        places.append(place(other))
    assert places == [(0, 2), (0, 2), (1, 2)]
    train(shards, recipe, out=other, resume=True, device="cpu")
    assert_same_run(other, one)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param((loop, "measure", 1), id="first validation"),
        pytest.param((Checkpoint, "save", 3), id="between the first epoch's two checkpoints"),
        pytest.param((loop, "write_history", 1), id="before the first row"),
        pytest.param((loop, "write_history", 2), id="before the last row"),
        pytest.param((loop, "write_report", 1), id="before the report"),
    ],
)
def test_a_run_that_is_killed_at_the_end_of_an_epoch_equals_an_uninterrupted_one(
    shards: Path, tmp_path: Path, whole: Path, moment: tuple[Any, str, int]
) -> None:
    """The first checkpoint is from the last step of an epoch, so the resumed epoch has no step left."""
    killed(shards, RECIPE, tmp_path / "run", moment, save_steps=5)
    train(shards, RECIPE, out=tmp_path / "run", resume=True, device="cpu")
    assert_same_run(tmp_path / "run", whole)


def test_a_command_that_is_stopped_and_killed_equals_an_uninterrupted_one(
    shards: Path, tmp_path: Path, resnet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gets SIGTERM in the second epoch, then, in a process of its own, SIGKILL while a checkpoint is half written."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        before_call(Run, "step", 6, terminate, patch)
        assert main(arguments(RECIPE, shards, out)) == 143
    printed = capsys.readouterr()
    *_, said, line = printed.err.splitlines()
    assert said == f"{out}: stopped by SIGTERM in epoch 2, step 1, and saved a checkpoint. To continue:"
    assert re.match(rf"  fastflower train {shards} .*--resume$", line)
    assert printed.out == ""
    assert place(out) == (1, 1)
    done = child("SIGKILL", "write", "2", recipe=RECIPE, shards=shards, out=out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert f"{out}: resumed in epoch 2 after 1 steps" in done.stderr
    assert "differ" not in done.stderr
    assert place(out) == (1, 2)
    assert len(list(out.glob(f"{LAST}.*.part"))) == 1
    train(shards, RECIPE, out=out, resume=True, device="cpu")
    assert_same_run(out, resnet)


@pytest.mark.parametrize(
    ("moment", "changes", "said"),
    [
        pytest.param((Run, "step", 7), {}, "in epoch 2, step 2", id="a step"),
        pytest.param((Run, "step", 3), {"accumulate": 2}, "in epoch 1, step 4", id="before its update"),
        pytest.param((loop, "measure", 1), {}, "in the validation of epoch 1", id="validation"),
        pytest.param((loop, "write_history", 1), {}, "after epoch 1", id="after validation"),
        pytest.param((loop, "write_report", 1), {}, "after epoch 2", id="report"),
        pytest.param((loop, "measure", 2), {}, "in the validation of epoch 2", id="last validation"),
    ],
)
def test_sigterm_stops_after_the_current_update_and_the_old_handler_is_restored(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Path,
    moment: tuple[Any, str, int],
    changes: dict[str, Any],
    said: str,
) -> None:
    out, recipe = tmp_path / "run", replace(RECIPE, **changes)
    ours: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: ours.append(number))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        with monkeypatch.context() as patch:
            before_call(*moment, terminate, patch)
            with pytest.raises(
                StoppedError, match=rf"run: stopped by SIGTERM {said}, and saved a checkpoint\. To continue:\n  train\("
            ):
                train(shards, recipe, out=out, device="cpu")
        assert signal.getsignal(signal.SIGTERM) is handler
        assert ours == []
    finally:
        signal.signal(signal.SIGTERM, before)
    if recipe == RECIPE:
        train(shards, recipe, out=out, resume=True, device="cpu")
        assert_same_run(out, whole)


def test_training_in_another_thread_installs_no_signal_handler(shards: Path, tmp_path: Path, whole: Path) -> None:
    seen: set[Any] = set()
    handler = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            before_call(Run, "step", 1, lambda: seen.add(signal.getsignal(signal.SIGTERM)), patch)
            torch.set_num_threads(1)
            train(shards, RECIPE, out=tmp_path / "run", device="cpu")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == {handler}
    assert_same_run(tmp_path / "run", whole)


@pytest.fixture
def begun(shards: Path, tmp_path: Path) -> Path:
    """A run that was stopped after the fourth step of the second epoch."""
    with pytest.MonkeyPatch.context() as patch:
        before_call(Run, "step", 9, terminate, patch)
        with pytest.raises(StoppedError, match="in epoch 2, step 4"):
            train(shards, RECIPE, out=tmp_path / "begun", device="cpu")
    return tmp_path / "begun"


def test_a_checkpoint_from_the_middle_of_an_epoch_loads_without_running_code(begun: Path, whole: Path) -> None:
    content = torch.load(begun / LAST, weights_only=True)
    last = Checkpoint.load(begun / LAST)
    assert (last.epoch, last.step) == (1, 4)
    assert_same(content["tally"], last.tally)
    losses: torch.Tensor = content["tally"]["losses"]
    assert (losses.shape, losses.dtype) == ((4,), torch.float64)
    assert losses.isfinite().all()
    row = written_history(whole)[1]
    # The fifth step is missing: its loss is below 10, and it has at most 24 correct predictions.
    assert 0 < 5 * row["train_loss"] - losses.sum().item() < 10
    assert 0 <= 120 * row["train_accuracy"] - content["tally"]["hits"] <= 24
    assert timeless(last.history) == timeless(written_history(whole))[:1]


def test_resuming_with_another_number_of_threads_warns(
    shards: Path, begun: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = shutil.copytree(begun, begun.with_name("same"))
    with caplog.at_level(logging.WARNING, "fastflower"):
        train(shards, RECIPE, out=same, resume=True, device="cpu")
        assert caplog.messages == []
        torch.set_num_threads(2)
        try:
            report = train(shards, RECIPE, out=begun, resume=True, device="cpu")
            train(shards, RECIPE, out=same, resume=True, device="cpu")  # is finished, so nothing will differ
        finally:
            torch.set_num_threads(1)
    assert caplog.messages == [f"{begun / LAST}: threads changed from 1 to 2; results will differ in the last bits"]
    assert report.history[1]["train_loss"] == pytest.approx(written_history(whole)[1]["train_loss"], rel=1e-3)


def test_a_run_resumes_after_a_full_disk(shards: Path, tmp_path: Path, resnet: Path) -> None:
    resource = pytest.importorskip("resource")  # Unix only
    out = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.MonkeyPatch.context() as patch:
            full = (resource.RLIMIT_FSIZE, (1 << 20, hard))
            before_call(Run, "step", 4, lambda: resource.setrlimit(*full), patch)
            with pytest.raises(
                CheckpointError, match=r"last\.pt: could not .*File too large(.*\n)+  train\(.*resume=True\)$"
            ):
                train(shards, RECIPE, out=out, save_steps=2, device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert place(out) == (0, 2)
    assert not (out / f"{LAST}.part").exists()
    train(shards, RECIPE, out=out, resume=True, device="cpu")
    assert_same_run(out, resnet)


def test_a_run_resumes_after_its_history_could_not_be_written(shards: Path, tmp_path: Path, whole: Path) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "history.csv")

    with pytest.MonkeyPatch.context() as patch:
        before_call(loop, "write_history", 1, full, patch)
        with pytest.raises(
            TrainingError,
            match=r"^history\.csv: cannot be read or written \(No space left on device\); fix this\. To c",
        ):
            train(shards, RECIPE, out=tmp_path / "run", device="cpu")
    train(shards, RECIPE, out=tmp_path / "run", resume=True, device="cpu")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("save_steps", [None, 1])
def test_a_loss_that_is_not_finite_stops_training_with_its_batch_named_and_is_never_saved(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int | None
) -> None:
    """A resumed run stops at the same batch."""
    out, step = tmp_path / "run", Run.step
    loader = Loader(shards, batch_size=24, seed=RECIPE.seed, augment=RECIPE.augment, device="cpu")
    poison = loader.indices(1, 2)
    keys = "; ".join(loader.where(index) for index in poison.tolist())

    def poisoned(self: Run, images: torch.Tensor, *rest: Any, **options: Any) -> Any:
        state = self.loader.state_dict()  # after this batch
        return step(self, images * math.nan if (state["epoch"], state["step"]) == (1, 3) else images, *rest, **options)

    monkeypatch.setattr(Run, "step", poisoned)
    advice = (
        f"{out}: the loss is not finite in epoch 2, step 3; start a new run in a different folder (out) with a lower lr, "
        "warm-up (warmup_epochs) or gradient clipping (clip_norm), "
        f"and check the batch. If {LAST} exists, it was saved before this happened. Batch: {keys}"
    )
    for _ in range(2):
        with pytest.raises(TrainingError, match=f"^{re.escape(advice)}$"):
            train(shards, RECIPE, out=out, resume=True, save_steps=save_steps, device="cpu")
        last = Checkpoint.load(out / LAST)
        assert (last.epoch, last.step) == (1, 2 if save_steps else 0)
        assert all(value.isfinite().all() for value in last.model.values())


def test_a_far_too_high_learning_rate_stops_training(shards: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, lr=1e30, schedule="constant")
    with pytest.raises(
        TrainingError, match=r"run: the loss is not finite in epoch 1, step [2-5]; start a new run .* sample rose_"
    ):
        train(shards, recipe, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / LAST).exists()


def gone() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nNot shown.")


def too_much() -> None:
    torch.empty(10**15)


def no_memory() -> None:
    raise MemoryError("Unable to allocate 7.28 PiB for an array")


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (gone, r"CUDA out of memory\. Tried to allocate 20\.00 MiB\."),
        (too_much, ".*can't allocate memory.*"),
        (no_memory, "Unable to allocate 7.28 PiB for an array"),
    ],
)
def test_memory_that_runs_out_is_explained(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Callable[[], None], said: str
) -> None:
    before_call(nn.CrossEntropyLoss, "forward", 1, cause, monkeypatch)
    message = (
        rf"^batch_size 24 does not fit in the memory of cpu \({said}\); try batch_size=12, accumulate=2, which may still be "
        r"too much and keeps .*, or keep fewer activations .*With the smaller batch:\n  train\('.*', .*batch_size=12.*"
        rf"accumulate=2.*, out='{tmp_path}/run', device='cpu'\)$"
    )
    with pytest.raises(DeviceError, match=message):
        train(shards, RECIPE, out=tmp_path / "run", device="cpu")


def test_other_errors_of_torch_pass_through_unchanged(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def fail() -> None:
        raise error

    before_call(nn.CrossEntropyLoss, "forward", 1, fail, monkeypatch)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied$") as caught:
        train(shards, RECIPE, out=tmp_path / "run", device="cpu")
    assert caught.value is error
    assert error.__cause__ is None


def test_save_steps_of_zero_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^save_steps must be an integer, at least 1, got 0\.$"):
        train(shards, RECIPE, out=tmp_path / "run", save_steps=0, device="cpu")
    assert not (tmp_path / "run").exists()


def test_patience_ends_a_run_without_improvement_and_resuming_does_not_extend_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An equal epoch is no improvement; a better one restarts the count. The count survives a kill."""
    recipe = replace(RECIPE, patience=2, epochs=12)
    accuracies = [0.2, 0.1, 0.3, 0.3, 0.1, 0.9]

    class Scored(Run):
        def _score(self, val: Loader) -> Any:
            scores = super()._score(val)
            correct = round(30 * accuracies[len(self.history)]) if len(self.history) < len(accuracies) else 0
            scores.confusion[:] = 0
            scores.confusion[0, :2] = correct, 30 - correct
            return scores

    monkeypatch.setattr("fastflower.training.trainer.Run", Scored)
    killed(shards, recipe, tmp_path / "run", (Scored, "train_epoch", 5))
    report = train(shards, recipe, out=tmp_path / "run", resume=True, device="cpu")
    assert [round(row["val_accuracy"], 2) for row in report.history] == [0.2, 0.1, 0.3, 0.3, 0.1]
    assert report.best_epoch == 3
    assert Checkpoint.load(tmp_path / "run" / BEST).epoch == 3
    before_call(Scored, "train_epoch", 1, kill, monkeypatch)
    assert train(shards, recipe, out=tmp_path / "run", resume=True, device="cpu").history == report.history
