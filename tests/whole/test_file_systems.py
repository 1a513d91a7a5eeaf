"""Quirks of operating systems: few file descriptors, folders that are links, refused deletions."""

import asyncio
import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_server import IMPATIENT
from packs import drawn

from fastflower import Loader, pack
from fastflower.errors import FolderError, ShardError
from fastflower.shards.manifest import Manifest
from fastflower.shards.mirror import Mirror
from fastflower.shards.reader import ShardReader
from fastflower.shards.remote import Remote


@pytest.mark.parametrize("on_bad", ["fail", "skip"])
def test_there_may_be_more_shards_than_files_that_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_bad: Any
) -> None:
    """At most eight shards are open at once, and every sample comes exactly once."""
    manifest = pack(drawn(tmp_path / "data", a=20, b=20), tmp_path / "shards", shard_bytes=1, val_fraction=0.0)
    assert len(manifest.split("train").shards) == 40
    monkeypatch.setattr("fastflower.shards.reader._MOST_OPEN", 8)
    reader = ShardReader(manifest, "train")
    for index in range(40):
        reader.encoded(index)
        assert sum(_is_tar(entry, tmp_path) for entry in Path("/proc/self/fd").iterdir()) <= 8
    loader = Loader(tmp_path / "shards", batch_size=8, on_bad=on_bad, cache=None, workers=3)
    for _ in range(2):
        assert sorted(index for batch in loader for index in batch.index.tolist()) == list(range(40))
    assert loader.replaced == {}


def _is_tar(descriptor: Path, folder: Path) -> bool:
    try:
        place = descriptor.readlink()
    except FileNotFoundError:  # the descriptor of the listing itself
        return False
    return place.is_relative_to(folder) and place.suffix == ".tar"


class _Impatient:
    """A file system with a client that times out by itself and raises asyncio's TimeoutError."""

    async_impl = True

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.asked = 0
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _cat_file(self, *_: object, **__: object) -> bytes:
        self.asked += 1
        raise TimeoutError("the client gave up")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Impatient]:
    system = _Impatient()
    monkeypatch.setattr("fastflower.shards.remote.file_system", lambda *_: (system, "shards"))
    yield system
    system.end()


def test_a_timeout_of_the_client_counts_as_one_attempt(
    impatient: _Impatient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {**IMPATIENT, "_ATTEMPTS": 3, "_TIMEOUT": 0.3}.items():
        monkeypatch.setattr(f"fastflower.shards.remote.{name}", value)
    with pytest.raises(ShardError, match=r"could not be read in 3 attempts \(the client gave up\)"):
        Mirror.connect(Remote(url="https://host/shards", folder=str(tmp_path)))
    assert impatient.asked == 3
    again = "https://host/shards/manifest.json: the client gave up; retrying in "
    assert [message.startswith(again) for message in caplog.messages] == [True, True]


@pytest.mark.parametrize("kind", ["folder", "link", "mount"])
def test_an_empty_folder_that_cannot_be_removed_hides_no_error(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = drawn(tmp_path / "data", a=3, b=3), tmp_path / "out"
    (data / "a" / "text.jpg").write_text("no image")
    place = tmp_path / "disk" if kind == "link" else out
    place.mkdir()
    if kind == "link":
        out.symlink_to(place)
    if kind == "mount":

        def busy(path: Path) -> None:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

        monkeypatch.setattr(Path, "rmdir", busy)
    with pytest.raises(
        FolderError, match=re.escape(f"{data}/a/text.jpg: is plain text, named .jpg; remove or replace it")
    ):
        pack(data, out, on_bad="fail")
    assert out.exists()
    assert not out.exists() or list(out.iterdir()) == []


def test_a_pack_finishes_even_if_open_files_cannot_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS renames open files in their folder until they are closed, so the folder is not empty."""
    out, rmdir = tmp_path / "out", os.rmdir

    def full(path: Any, **options: Any) -> None:
        if os.path.basename(path) == ".packing":  # noqa: PTH119  (rmtree may give a name relative to a descriptor)
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmdir(path, **options)

    data = drawn(tmp_path / "data", a=4, b=4)
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", full)
        made = pack(data, out)
    assert Manifest.load(out) == made
    assert len(list(Loader(out, "train", batch_size=2))) == made.split("train").samples // 2
    assert pack(data, out) == made
    assert not (out / ".packing").exists(), "the rest of the workspace is removed once possible"


def test_a_file_url_is_its_path(shards: Path) -> None:
    assert Manifest.load(f"file://{shards}") == Manifest.load(shards)
    theirs, ours = (list(Loader(place, "val", batch_size=4)) for place in (shards, f"file://{shards}"))
    assert all((one.images == other.images).all() for one, other in zip(theirs, ours, strict=True))
