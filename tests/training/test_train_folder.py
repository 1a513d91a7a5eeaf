"""`train` on what is not packed: where the pack goes, resuming, what is refused, and several ranks."""

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from forks import forked
from packs import drawn, exactly
from training_runs import LAST, RECIPE, flags, killed

from fastflower import Checkpoint, Manifest, train
from fastflower.cli import main
from fastflower.errors import ArgumentError, CheckpointError, FolderError, ShardError
from fastflower.packing import source
from fastflower.packing.source import shards_of
from fastflower.training.run import Run

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

ONE = replace(RECIPE, epochs=1)


@pytest.fixture
def data(flowers: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(flowers, tmp_path / "data"))


def test_the_pack_lies_beside_the_run_and_a_second_run_uses_it(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastflower")
    one = train(data, ONE, out=tmp_path / "runs/a", device="cpu")
    (folder,) = (tmp_path / "runs/packs").iterdir()
    splits = Manifest.load(folder).splits
    assert [line for line in caplog.messages if "images in" in line and "shards" in line] == [
        f"{name}: {split.samples} images in {len(split.shards)} shards" for name, split in splits.items()
    ]
    caplog.clear()
    other = train(data, ONE, out=tmp_path / "runs/b", device="cpu")
    assert caplog.messages[0] == f"{data}: is packed already, in {folder}"
    third = train(folder, ONE, out=tmp_path / "runs/c", device="cpu")
    losses = {report.history[0]["train_loss"] for report in (one, other, third)}
    assert len(losses) == 1
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.name not in "abc"] == ["packs"]


def test_a_run_resumes_on_the_images_that_it_began_with(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(data, RECIPE, out=tmp_path / "runs/whole", device="cpu")
    killed(data, RECIPE, tmp_path / "runs/a", (Run, "step", 7), save_steps=2)
    assert Checkpoint.load(tmp_path / "runs/a" / LAST).epoch == 1
    image = next(data.rglob("*.jpg"))
    os.utime(image, (1, 1))
    caplog.clear()
    report = train(data, RECIPE, out=tmp_path / "runs/a", resume=True, device="cpu")
    assert [row["train_loss"] for row in report.history] == [row["train_loss"] for row in whole.history]
    (folder,) = (tmp_path / "runs/packs").iterdir()
    what = f"has changed since this run began ({image.relative_to(data)} has been changed), which resumes on the images"
    assert caplog.messages == [f"{data}: {what} that it began with ({folder})"]


def test_a_run_whose_pack_is_gone_is_not_resumed_on_other_images(data: Path, tmp_path: Path) -> None:
    killed(data, RECIPE, tmp_path / "runs/a", (Run, "step", 7), save_steps=2)
    shutil.rmtree(tmp_path / "runs/packs")
    next(data.rglob("*.jpg")).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-last\.pt: was trained on other shards; resume with"):
        train(data, RECIPE, out=tmp_path / "runs/a", resume=True, device="cpu")


def test_nothing_is_packed_for_a_run_that_is_refused(data: Path, tmp_path: Path) -> None:
    train(data, ONE, out=tmp_path / "runs/a", device="cpu")
    shutil.rmtree(tmp_path / "runs/packs")
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(data, ONE, out=tmp_path / "runs/a", device="cpu")
    with pytest.raises(CheckpointError, match="was trained with lr"):
        train(data, replace(ONE, lr=0.5), out=tmp_path / "runs/a", resume=True, device="cpu")
    assert not (tmp_path / "runs/packs").exists()


def test_a_folder_that_cannot_be_packed_leaves_no_run(tmp_path: Path) -> None:
    drawn(tmp_path / "data", rose=2)
    with pytest.raises(FolderError, match="has one class, 'rose'"):
        train(tmp_path / "data", ONE, out=tmp_path / "runs/a", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_test_set_cannot_be_trained_on(tmp_path: Path) -> None:
    drawn(tmp_path / "data/test", rose=3, tulip=3)
    with pytest.raises(FolderError) as failed:
        train(tmp_path / "data", ONE, out=tmp_path / "runs/a", device="cpu")
    what = "has no train split; it can be evaluated (test), but training needs training images."
    assert str(failed.value) == f"{tmp_path / 'data'}: {what}"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # nothing was packed


def test_a_fold_needs_a_pack_with_folds(data: Path, tmp_path: Path) -> None:
    rule = f"fold must be None, because {data} is not packed with folds, got 0; pack it first:\n  "
    pack, out = f"pack({str(data)!r}, 'shards', folds=5)", str(tmp_path / "runs/a")
    then = f"train('shards', recipe, fold=0, out={out!r}, device='cpu')"
    with pytest.raises(ArgumentError, match=exactly(f"{rule}{pack}; {then}")):
        train(data, ONE, fold=0, out=tmp_path / "runs/a", device="cpu")


def test_preview_packs_beside_the_runs_of_the_working_directory(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data.parent)
    assert main(["preview", "data", "--images", "1", "--draws", "1", "--augment.size", "32"]) == 0
    assert (
        main(["doctor", "data", "--seconds", "0.1", "--device", "cpu", "--batch-size", "8", "--augment.size", "32"])
        == 0
    )
    (folder,) = Path("runs/packs").iterdir()
    assert "images/s" in capsys.readouterr().out
    assert Manifest.load(folder).splits["val"].samples == 30


def one_of_two(rank: int, store: Path, data: Path, packs: Path) -> None:
    """Rank 0 packs, or fails; both find the same."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    calls = [0]
    packing = source.pack

    def counted(*values: object, **options: object) -> Manifest:
        calls[0] += 1
        return packing(*values, **options)  # pyright: ignore[reportArgumentType]  (passed on)

    source.pack = counted
    folder = Path(str(shards_of(data / "good", packs)))
    assert (calls[0], (folder / "manifest.json").exists()) == (1 - rank, True)
    assert shards_of(folder, packs) == folder
    for wrong, kind in (("bad", FolderError), ("missing", ShardError)):
        with pytest.raises(kind, match=f"^{data / wrong}: "):
            shards_of(data / wrong, packs)
    assert [path.name for path in packs.iterdir()] == [folder.name]
    dist.destroy_process_group()


def test_the_first_rank_packs_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    drawn(tmp_path / "data/good", rose=4, tulip=4)
    drawn(tmp_path / "data/bad", rose=2)
    job = partial(one_of_two, store=tmp_path / "store", data=tmp_path / "data", packs=tmp_path / "runs/packs")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda rank: forked(partial(job, rank)), range(2))) == [0, 0]


@pytest.mark.parametrize("command", ["train", "evaluate", "preview", "doctor"])
def test_the_help_says_that_images_are_taken(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([command, "--help"])
    assert "A folder of images, an archive or a table of labels" in " ".join(capsys.readouterr().out.split())


def test_a_list_and_an_archive_are_trained_on_by_the_command(data: Path, tmp_path: Path) -> None:
    (data / "train.txt").write_text("\n".join(str(path.relative_to(data)) for path in sorted(data.rglob("*.jpg"))))
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", data)
    for number, place in enumerate((data / "train.txt", archive)):
        out = tmp_path / "runs" / str(number)
        assert main(["train", str(place), *flags(ONE), "--weights", "None", "--device", "cpu", "--out", str(out)]) == 0
        assert (out / "run.json").exists()
