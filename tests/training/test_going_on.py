"""Training on after a run: messages print the command or call to type, and what they print works."""

import logging
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import LAST, RECIPE, flags, killed, timeless, written_history

from fastflower import Augment, Checkpoint, Recipe, pack, train
from fastflower.cli import main
from fastflower.errors import CheckpointError
from fastflower.recipes.presets import PRESETS
from fastflower.shards.remote import Remote
from fastflower.suggestions import typed
from fastflower.training.command import Call, unused
from fastflower.training.run import Run

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

SHORT = replace(RECIPE, epochs=1)
ONWARD = "To train on from its weights:\n  "


@pytest.fixture(scope="module")
def ended(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch, in a folder whose name needs quotes. Read-only."""
    return train(shards, SHORT, out=tmp_path_factory.mktemp("ended") / "my run", device="cpu").folder


@pytest.fixture
def done(ended: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "my run"))


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the error of a command that fails."""
    assert main(list(map(str, arguments))) == 1
    return capsys.readouterr().err.partition("error: ")[2]


def type_(text: str) -> int:
    """Type the last line of a message."""
    program, *arguments = shlex.split(text.strip().splitlines()[-1])
    assert program == "fastflower"
    return main(arguments)


def first_weights(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Collect the weights from which the next run starts."""
    found: dict[str, torch.Tensor] = {}
    begin = Run.train

    def noted(self: Run, *values: Any) -> Any:
        found.update({name: value.clone() for name, value in self.network.state_dict().items()})
        return begin(self, *values)

    monkeypatch.setattr(Run, "train", noted)
    return found


@pytest.mark.parametrize("changes", [{"epochs": 2}, {"lr": 0.002}, {"epochs": 3, "batch_size": 12}], ids=str)
def test_resuming_with_another_recipe_prints_a_command_that_trains_on(
    shards: Path,
    done: Path,
    changes: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """People ask for more epochs, or for another learning rate, which other programs ignore."""
    recipe = replace(SHORT, **changes)
    found = first_weights(monkeypatch)
    text = said(capsys, "train", shards, *flags(recipe), "--device", "cpu", "--out", done, "--resume")
    name, value = next(iter(changes.items()))
    assert text.startswith(f"{done / LAST}: was trained with {name} {getattr(SHORT, name)} (now {value})")
    assert ONWARD in text
    assert type_(text) == 0
    next_run = done.with_name("my run-2")
    assert len(written_history(next_run)) == recipe.epochs
    last = Checkpoint.load(next_run / LAST)
    assert replace(last.recipe, weights=None) == recipe.resolved
    assert last.recipe.weights == str(done / LAST)
    model = Checkpoint.load(done / LAST).model
    assert found.keys() == model.keys()
    for key, before in model.items():  # also of the head
        assert torch.equal(found[key], before) or key.endswith("num_batches_tracked")


def test_from_python_the_message_holds_the_call(shards: Path, done: Path) -> None:
    recipe = replace(SHORT, epochs=2)
    with pytest.raises(CheckpointError, match="was trained with epochs 1") as caught:
        train(shards, recipe, out=done, resume=True, device="cpu")
    call = str(caught.value).splitlines()[-1].strip()
    new = done.with_name("my run-2")
    seen = replace(recipe.augment, size=None, resize=None)  # as the weights were trained
    other = replace(recipe, weights=str(done / LAST), augment=seen)
    assert call == f"train({str(shards)!r}, {other!r}, out={str(new)!r}, device='cpu')"
    report = eval(call, {"train": train, "Recipe": Recipe, "Augment": Augment})
    assert (report.folder, len(report.history)) == (new, 2)


def test_resuming_a_finished_run_says_so_and_prints_the_command(
    shards: Path, done: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """It neither starts again from the first epoch nor in another folder."""
    before = written_history(done)
    with caplog.at_level(logging.INFO, "fastflower"):
        arguments = ["train", str(shards), *flags(SHORT), "--device", "cpu", "--out", str(done), "--resume"]
        assert main(arguments) == 0
    (told,) = [line for line in caplog.messages if "already finished" in line]
    assert told.startswith(f"{done}: already finished after epoch 1. {ONWARD}fastflower train")
    assert timeless(written_history(done)) == timeless(before)
    assert [path.name for path in done.parent.iterdir()] == [done.name]
    assert type_(told) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {done.with_name('my run-2') / 'report.html'}"


def test_a_run_that_patience_ended_says_that_it_is_finished(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = replace(RECIPE, patience=1, epochs=9, lr=1e-6, schedule="constant")
    report = train(shards, recipe, out=tmp_path / "run", device="cpu")
    assert len(report.history) < 9
    with caplog.at_level(logging.INFO, "fastflower"):
        train(shards, recipe, out=tmp_path / "run", resume=True, device="cpu")
    assert f"already finished after epoch {len(report.history)}. {ONWARD}train(" in caplog.text


def test_a_folder_that_holds_a_run_is_refused_with_both_commands(
    shards: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, "train", shards, *flags(SHORT), "--device", "cpu", "--out", done)
    first, onward, second, start = text.splitlines()
    assert first == f"{done}: already holds a run. To train on from its weights:"
    assert second == "To start another:"
    assert type_(start) == 0
    assert (done.with_name("my run-2") / LAST).exists()
    assert "--weights" in onward
    assert type_(onward.replace("my run-2", "my run-3")) == 0


def test_a_folder_whose_run_had_another_recipe_is_refused_with_commands_that_work(
    shards: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More epochs are no reason to resume: the weights of the run are."""
    recipe = replace(SHORT, epochs=2)
    text = said(capsys, "train", shards, *flags(recipe), "--device", "cpu", "--out", done)
    first, onward, *_ = text.splitlines()
    assert first == f"{done}: already holds a run. To train on from its weights with this recipe:"
    assert type_(onward) == 0
    assert len(written_history(done.with_name("my run-2"))) == 2

    killed(shards, recipe, tmp_path / "half", (Run, "step", 7))
    text = said(capsys, "train", shards, *flags(replace(recipe, lr=0.1)), "--device", "cpu", "--out", tmp_path / "half")
    first, resume, second, onward, third, start = text.splitlines()
    assert first == f"{tmp_path / 'half'}: already holds a run. To continue it:"
    assert second == "To train on from its weights with this recipe:"
    assert "--weights" in onward
    assert third == "To start another:"
    assert "--lr 0.1" in start
    assert type_(resume) == 0
    assert len(written_history(tmp_path / "half")) == 2


def test_resume_takes_recipe_and_fold_from_the_run(flowers: Path, tmp_path: Path) -> None:
    pack(flowers, tmp_path / "folds", folds=3)
    recipe, out = replace(RECIPE, lr=0.02), tmp_path / "run"
    killed(tmp_path / "folds", recipe, out, (Run, "step", 7), fold=1)
    arguments = ["train", str(tmp_path / "folds"), "--out", str(out), "--device", "cpu", "--resume"]
    assert main(arguments) == 0
    last = Checkpoint.load(out / LAST)
    assert (last.recipe, last.fold, last.epoch) == (recipe.resolved, 1, 2)
    assert len(train(tmp_path / "folds", out=out, resume=True, device="cpu").history) == 2
    for other in (Recipe(), replace(recipe, epochs=3)):
        with pytest.raises(CheckpointError, match=r"was trained with .*; resume with that recipe, or pass none\."):
            train(tmp_path / "folds", other, out=out, resume=True, device="cpu")
    for typed_flags in (["--recipe", "default"], ["--epochs", "3"], ["--augment.flip", "0.1"]):
        assert main([*arguments, *typed_flags]) == 1


def test_a_run_in_the_wrong_place_is_answered_with_its_command(
    shards: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"  fastflower train {shards} --out '{done}' --resume"
    text = said(capsys, "train", "--resume", done)
    assert text == f"{done}: is a run; pass images, or shards. To continue this run:\n{command}\n"
    for arguments, what in (
        (["--out", done, "--resume"], "SHARDS is missing"),
        ([done, shards, "--device", "cpu"], "unexpected"),
    ):
        with pytest.raises(SystemExit):
            main(["train", *map(str, arguments)])
        text = capsys.readouterr().err
        assert text.startswith(f"error: {what}")
        assert text.endswith(f" {done} is a run. To continue it:\n{command}\n")
    assert type_(command) == 0


def test_a_run_without_a_checkpoint_begins_with_the_default_recipe(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastflower.training.trainer.checked", lambda _: SHORT)  # the default, but quick
    report = train(shards, out=tmp_path / "run", resume=True, device="cpu")
    assert len(report.history) == 1


def test_another_backbone_cannot_take_the_weights(shards: Path, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = replace(SHORT, backbone="resnet34")
    text = said(capsys, "train", shards, *flags(recipe), "--device", "cpu", "--out", done, "--resume")
    assert "was trained with backbone 'resnet18' (now 'resnet34'); resume with that recipe, or pass none." in text
    assert "--weights None" in text.splitlines()[-1]
    assert type_(text) == 0


def test_other_data_is_refused_with_a_command_that_trains_on_with_it(
    flowers: Path,
    done: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "two").mkdir()
    for name in ("rose", "tulip"):
        (tmp_path / "two" / name).symlink_to(flowers / name)
    pack(tmp_path / "two", tmp_path / "two classes")
    pack(flowers, tmp_path / "others", seed=1)
    for name, what in (("two classes", "was trained on classes daisy"), ("others", "was trained on other shards")):
        text = said(capsys, "train", tmp_path / name, *flags(SHORT), "--device", "cpu", "--out", done, "--resume")
        assert text.startswith(f"{done / LAST}: {what}")
        assert ONWARD in text
        assert type_(text) == 0
    told = [line for line in caplog.messages if "loaded into" in line]
    assert told[-2].endswith("replaced its head for 5 classes with a new one for 2 classes")
    assert told[-1].endswith("kept its head for 5 classes")


def test_another_fold_is_refused_without_offering_weights_that_know_its_images(flowers: Path, tmp_path: Path) -> None:
    pack(flowers, tmp_path / "folds", folds=3)
    train(tmp_path / "folds", SHORT, fold=1, out=tmp_path / "run", device="cpu")
    with pytest.raises(
        CheckpointError, match=r"got fold 0; pass fold=1 \(--fold 1\), or omit it\. To train on other folds"
    ) as found:
        train(tmp_path / "folds", SHORT, fold=0, out=tmp_path / "run", resume=True, device="cpu")
    call = str(found.value).splitlines()[-1].strip()
    assert call.startswith(f"train({str(tmp_path / 'folds')!r}, {SHORT!r}, fold=0, out={str(tmp_path / 'run-2')!r}")


def test_commands_are_quoted_and_leave_defaults_out() -> None:
    call = Call(shards="it's here", recipe=Recipe(), out=Path("runs/a b"), save_steps=3, fold=0)
    assert call.again(resume=True) == ("""train("it's here", fold=0, out='runs/a b', save_steps=3, resume=True)""")
    with typed("train"):
        assert call.again(resume=True) == f"{call.command()} --resume"
    assert call.command() == """fastflower train 'it'"'"'s here' --fold 0 --out 'runs/a b' --save-steps 3"""
    remote = Call(shards=Remote(url="s3://a/b", options={"secret": "x"}), recipe=Recipe(), out=Path("c"))
    assert remote.again() == "train(shards, out='c')"
    assert remote.changed(lr=0.1) == "train(shards, Recipe(lr=0.1), out='c')"
    other = replace(remote, recipe=Recipe(epochs=2))
    assert other.changed(lr=0.1) == "train(shards, Recipe(epochs=2, lr=0.1), out='c')"
    named = replace(remote, recipe=PRESETS["finetune"]())
    assert named.again() == "train(shards, 'finetune', out='c')"
    assert replace(named, recipe=replace(named.recipe, lr=0.1)).changed(lr=named.recipe.lr) == named.again()
    assert remote.command() == "fastflower train s3://a/b --out c"


def test_under_torchrun_commands_begin_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(shards="a", recipe=Recipe(), out=Path("b"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for ranks, nodes in ((4, ""), (8, "--nnodes=2 ")):
        monkeypatch.setattr("fastflower.distributed.world_size", lambda ranks=ranks: ranks)
        assert call.command() == f"torchrun {nodes}--nproc-per-node=4 -m fastflower train a --out b"


def test_an_unused_folder_is_the_first_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "a-2").mkdir()
    assert unused(tmp_path / "a") == tmp_path / "a-3"
