"""File systems that lack something, full disks, and folders that cannot be written: one warning, or a remedy that helps."""

import errno
import fcntl
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packs import drawn
from training_runs import RECIPE as TINY

from fastflower import Manifest, files, pack, train
from fastflower.errors import ArgumentError, CheckpointError, FolderError, ShardError
from fastflower.models import backbone
from fastflower.models.checkpoint import Checkpoint
from fastflower.recipes.recipe import Recipe
from fastflower.shards import mirror, verification
from fastflower.shards.mirror import Mirror
from fastflower.shards.remote import Remote

NO_SYNC = [errno.EINVAL, errno.EBADF]
FULL = [errno.ENOSPC, errno.EDQUOT]
OTHER = [errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO]


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return drawn(tmp_path / "small", a=3, b=3)


@pytest.mark.parametrize("number", NO_SYNC)
def test_without_fsync_locks_hard_links_and_memory_mapping_everything_works_after_one_warning_each(
    small: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = pack(small, tmp_path / "expected")
    monkeypatch.setattr(files, "_lacks", set[tuple[int, str]]())
    monkeypatch.setattr(os, "fsync", failing(number))
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    monkeypatch.setattr("mmap.mmap", failing(number if number == errno.EINVAL else errno.ENODEV))
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    made = pack(small, tmp_path / "out")
    assert replace(made, folder=expected.folder) == expected
    assert made.index("train").tolist() == expected.index("train").tolist()
    lacks = "cannot flush everything to disk", "does not support locks"
    assert [sum(lack in message for message in caplog.messages) for lack in lacks] == [1, 1]
    checkpoint = Checkpoint(recipe=Recipe(), classes=("a", "b"), model={}, epoch=1)
    checkpoint.save(tmp_path / "last.pt")
    checkpoint.save(tmp_path / "best.pt", twin=tmp_path / "last.pt")
    assert Checkpoint.load(tmp_path / "best.pt").classes == ("a", "b")
    assert [sum(lack in message for message in caplog.messages) for lack in lacks] == [1, 1]


def test_an_fsync_that_fails_for_another_reason_is_an_error(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(
        FolderError, match=re.escape(f"{tmp_path / 'out'}: cannot be written (Input/output error); choose")
    ):
        pack(small, tmp_path / "out")


def failed_pack(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = drawn(folder / "data", a=3, b=3)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("fastflower.packing.plan.write_atomically", failing(number))
    pack(data)


def failed_preview(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "write_atomically", failing(number))
    files.write_out(folder / "seen.png", b"")


def failed_checkpoint(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    Checkpoint(recipe=Recipe(), classes=("a", "b"), model={}, epoch=1).save(folder / "last.pt")


def failed_repair(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(drawn(folder / "data", a=3, b=3), folder / "out")
    (folder / "out/_info.json").unlink()
    monkeypatch.setattr(verification, "write_atomically", failing(number))
    verification.verify(folder / "out", repair=True)


def failed_cache(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(drawn(folder / "data", a=3, b=3), folder / "out")
    monkeypatch.setattr(mirror, "write_atomically", failing(number))
    Mirror.connect(Remote(url=f"file://{folder / 'out'}", folder=folder / "cache"))


def failed_weights(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setattr("torch.hub.download_url_to_file", failing(number))
    backbone.build("resnet18", 2, weights=f"https://host/x.pth#sha256={'0' * 64}")


def failed_run(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(drawn(folder / "data", a=3, b=3), folder / "out")
    monkeypatch.setattr("fastflower.training.run_folder.locked", failing(number))
    train(folder / "out", TINY, out=folder / "run", device="cpu")


@pytest.mark.parametrize(
    ("fail", "remedy"),
    [
        (failed_pack, "choose another folder as out (--out)."),
        (failed_preview, "choose a file in an existing, writable folder (--out)."),
        (failed_repair, "check what is at this path and that its folder is writable,"),
        (failed_cache, "set XDG_CACHE_HOME to a writable folder, or pass Remote(folder=...) from Python."),
        (failed_weights, "set TORCH_HOME to a writable folder, or pass a file (--weights PATH)."),
        (failed_run, "pass a different folder as out (--out)."),
    ],
)
@pytest.mark.parametrize("number", [errno.EROFS, errno.EDQUOT])
def test_a_message_says_to_free_up_space_only_if_that_helps(
    tmp_path: Path, number: int, fail: Any, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((FolderError, ArgumentError, ShardError, CheckpointError)) as caught:
        fail(tmp_path, number, monkeypatch)
    said = f"({os.strerror(number)}); {'free up space, or ' if number in FULL else ''}{remedy}"
    assert said in str(caught.value)


@pytest.mark.parametrize("number", [*FULL, *OTHER])
def test_a_checkpoint_that_cannot_be_saved_names_the_remedy(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = "Free up space" if number in FULL else f"Make {tmp_path} writable"
    with pytest.raises(CheckpointError, match=re.escape(f"unchanged. {remedy}, then resume.") + "$"):
        failed_checkpoint(tmp_path, number, monkeypatch)


def test_a_run_in_a_folder_that_is_not_writable_names_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(drawn(tmp_path / "data", a=3, b=3), tmp_path / "out")
    (tmp_path / "runs").write_text("no folder")  # root may write everywhere
    monkeypatch.chdir(tmp_path)
    what = f"out: cannot create runs/resnet18: {tmp_path / 'runs'} is not a writable folder; "
    with pytest.raises(ArgumentError, match=re.escape(f"{what}pass a different folder as out (--out).")):
        train("out", TINY, device="cpu")


def test_without_a_home_directory_the_cache_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pack(drawn(tmp_path / "data", a=3, b=3), tmp_path / "out")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    source = Remote(url=f"file://{tmp_path / 'out'}")
    with monkeypatch.context() as patch:
        patch.delenv("HOME")
        patch.setattr("pwd.getpwuid", lambda _: {}["no such user"])
        remedy = "set XDG_CACHE_HOME to a writable folder, or pass Remote(folder=...) from Python."
        with pytest.raises(ArgumentError, match=rf"^~/\.cache/fastflower: cannot hold .*; {re.escape(remedy)}$"):
            Mirror.connect(source)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Mirror.connect(source).folder.is_relative_to(tmp_path / "home/.cache/fastflower")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    connected = Mirror.connect(Remote(url=f"file://{tmp_path / 'out'}"))
    assert connected.folder.is_relative_to(tmp_path / "xdg/fastflower")
    assert replace(Manifest.load(connected.folder), folder=made.folder) == made
