"""Open files and memory: an unused loader is freed at once, and a refusal by the system is not reported as damage."""

import errno
import gc
import os
import resource
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import forked
from packs import drawn
from training_runs import small

from fastflower import Augment, Loader, Manifest, Recipe, pack, predict, train
from fastflower.errors import ResourceError, SampleError
from fastflower.files import write_out
from fastflower.models.backbone import build
from fastflower.models.checkpoint import Checkpoint
from fastflower.packing import workspace
from fastflower.packing.folder import scan
from fastflower.shards import remote
from fastflower.shards.reader import ShardReader
from fastflower.shards.verification import verify

SMALL = Augment(size=16, resize=16)
BACKENDS = ["native", "opencv", "dali", "triton"]
LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images in as many shards. Read-only."""
    return packed(tmp_path_factory.mktemp("many"), 60)


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images in as many shards. Read-only."""
    return packed(tmp_path_factory.mktemp("some"), 8)


def packed(root: Path, count: int) -> Path:
    pack(drawn(root / "data", a=count, b=count), root / "out", shard_bytes=1, val_fraction=0)
    return root / "out"


@pytest.fixture
def no_collector(_frozen: None) -> Iterator[None]:
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()


def tars() -> int:
    """Return the number of shards that this process has open."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found += entry.readlink().suffix == ".tar"
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return found


def make(folder: Path, **options: Any) -> Loader:
    return Loader(folder, **{"batch_size": 8, "augment": SMALL, "device": "cpu", "workers": 2, **options})


def to_the_end(loader: Loader) -> None:
    assert len(list(loader)) == 2


def to_the_middle(loader: Loader) -> None:
    for _ in loader:
        break


def at_another(loader: Loader) -> None:
    loader.set_augment(Augment(size=24, resize=24, flip=0.5))
    list(loader)
    loader.image(3)


def to_an_error(loader: Loader) -> None:
    with pytest.raises(SampleError, match="checksum mismatch"):
        list(loader)


@pytest.mark.parametrize(
    "use", [to_the_middle, *(pytest.param(use, marks=pytest.mark.soak) for use in (to_the_end, at_another))]
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("no_collector")
def test_an_unused_loader_is_freed_at_once_with_its_files(some: Path, backend: Any, use: Any) -> None:
    loader = make(some, backend=backend)
    use(loader)
    found, reader = weakref.ref(loader), weakref.ref(loader._reader)
    del loader
    assert found() is None
    assert reader() is None
    assert tars() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("damaged", ["train-000010.tar", "train-*.tar"])
def test_a_loader_that_met_a_damaged_sample_is_freed_at_once(
    some: Path, tmp_path: Path, backend: Any, damaged: str
) -> None:
    """Also if several threads met one."""
    folder = Path(shutil.copytree(some, tmp_path / "copy"))
    for tar in folder.glob(damaged):
        tar.write_bytes(bytes(tar.stat().st_size))
    loader = make(folder, backend=backend, batch_size=16, tail="keep")
    to_an_error(loader)
    held = [weakref.ref(each) for each in (loader, loader._samples, loader._reader, loader._backend)]
    del loader
    assert [each() for each in held] == [None] * 4
    assert tars() == 0


def test_no_file_is_open_between_epochs(some: Path) -> None:
    loader = make(some, cache=None)
    for batches in (15, 3):
        for number, _ in enumerate(loader, start=1):
            assert tars() > 0
            if number == batches:
                break
        gc.collect()
        assert tars() == 0


def test_readers_share_a_limit_of_open_files_and_read_their_own_shards(
    some: Path, flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(flowers, tmp_path / "other", shard_bytes=1 << 16)
    monkeypatch.setattr("fastflower.shards.reader._MOST_OPEN", 10)
    readers = [ShardReader(Manifest.load(folder), "train") for folder in (some, tmp_path / "other")]
    for index in range(16):
        for reader in readers:
            reader.encoded(index)  # checked against the checksum in its own index
            assert tars() <= 10
    readers.clear()
    reader = None
    assert tars() == 0


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.usefixtures("nothing_to_collect")
@pytest.mark.parametrize("on_bad", ["skip", pytest.param("fail", marks=pytest.mark.soak)])
def test_thirty_loaders_fit_a_low_limit_of_open_files(many: Path, on_bad: str) -> None:
    """They are kept, each with an open iterator."""

    def thirty_loaders() -> None:
        gc.disable()
        taken = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
        free = [number for number in range(len(taken) + 98) if number not in taken]
        limit = free[97]  # leaves 97 files, as a limit of 100 does in a new process
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        kept, found = [], 0
        for _ in range(30):
            loader = make(many, cache=None, on_bad=on_bad, shuffle=False)
            found += sum(len(batch.index) for batch in loader)
            kept.append((loader, iter(loader)))
            next(kept[-1][1])
            assert loader.replaced == {}
        assert found == 30 * 120

    assert forked(thirty_loaders) == 0


REFUSED = {
    errno.EMFILE: rf"this process has reached its limit of {LIMIT} open files; raise the limit \(ulimit -n \d+\), and run again",
    errno.ENFILE: r"the system has reached its limit of open files; .* \(sysctl fs.file-max\), and run again",
    errno.ENOMEM: r"out of memory; close programs or use fewer workers, and run again",
}


@pytest.fixture(params=REFUSED)
def refusing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], str]:
    """(parts of names of files that are refused from now on, the expected message)."""
    refused: list[str] = []
    opened = {place: getattr(*place) for place in ((os, "open"), (os, "scandir"), (Path, "open"), (Path, "read_bytes"))}

    def refuse(place: Any) -> Any:
        def open_it(name: Any, *values: Any, **options: Any) -> Any:
            if any(part in str(name) for part in refused):
                raise OSError(request.param, os.strerror(request.param), str(name))
            return opened[place](name, *values, **options)

        return open_it

    for place in opened:
        monkeypatch.setattr(*place, refuse(place))
    return refused, rf"cannot be opened or read: {REFUSED[request.param]}"


@pytest.mark.parametrize("on_bad", ["fail", "skip"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refusal_by_the_system_is_not_a_damaged_sample(some: Path, backend: Any, on_bad: Any, refusing: Any) -> None:
    refused, message = refusing
    cache = None if backend != "triton" else "auto"
    loader = make(some, backend=backend, on_bad=on_bad, cache=cache, batch_size=16, tail="keep")  # none is rendered
    refused.append("train-000010.tar")
    with pytest.raises(ResourceError, match=rf"^{some}/train-000010\.tar: {message}"):
        list(loader)
    assert loader.replaced == {}


def test_a_refusal_by_the_system_is_not_a_damaged_pack(some: Path, refusing: Any) -> None:
    refused, message = refusing
    for name, act in {
        "manifest.json": Manifest.load,
        "train.index.npy": lambda folder: Manifest.load(folder).index("train"),
        "train-000010.tar": verify,
    }.items():
        refused[:] = [name]
        with pytest.raises(ResourceError, match=rf"^{some}/{name}: {message}"):
            act(some)


@pytest.mark.parametrize("part", ["a/001.jpg", "b"])
def test_a_refusal_by_the_system_does_not_make_packing_skip_a_file(tmp_path: Path, part: str, refusing: Any) -> None:
    refused, message = refusing
    folder = drawn(tmp_path / "data", a=3, b=3)
    shutil.copyfile(folder / "a/001.jpg", folder / "a/002.jpg")  # of equal size, so that packing reads both
    scan(folder)
    refused.append(f"data/{part}")
    with pytest.raises(ResourceError, match=f"^{folder}/{part}: {message}"):
        pack(folder, tmp_path / "out", workers=1)
    refused.clear()
    assert pack(folder, tmp_path / "out").skipped == ()


def test_a_refusal_by_the_system_does_not_make_a_folder_look_empty(tmp_path: Path, refusing: Any) -> None:
    """Otherwise a split with images would look empty."""
    refused, message = refusing
    for split in ("train", "val"):
        drawn(tmp_path / "data" / split, a=2, b=2)
    refused += ["val/a", "val/b"]
    with pytest.raises(ResourceError, match=f"^{tmp_path}/data/val/[ab]: {message}"):
        scan(tmp_path / "data")
    refused[:] = ["data"]
    with pytest.raises(ResourceError, match=f"^{tmp_path}/data: {message}"):
        scan(tmp_path / "data")


def test_a_refusal_by_the_system_is_not_reported_as_a_wrong_output_path(tmp_path: Path, refusing: Any) -> None:
    refused, message = refusing
    refused.append("table.csv")
    with pytest.raises(ResourceError, match=f"^{tmp_path}/table.csv: {message}"):
        write_out(tmp_path / "table.csv", b"")


def test_a_refusal_by_the_system_is_not_blamed_on_the_server(
    some: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is still retried."""
    tries: list[str] = []

    def refuse(_: Any, name: str, *__: Any) -> bytes:
        tries.append(name)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("fastflower.shards.remote._FIRST_PAUSE", 0.0)
    monkeypatch.setattr(remote.RemoteFiles, "_request", refuse)
    message = f"^local://{some}/manifest.json: cannot be opened or read: {REFUSED[errno.EMFILE]}"
    with pytest.raises(ResourceError, match=message):
        make(remote.Remote(url=f"local://{some}", folder=tmp_path))  # pyright: ignore[reportArgumentType]
    assert len(tries) == remote._ATTEMPTS


def test_a_refusal_by_the_system_does_not_make_predict_skip_a_file(tmp_path: Path, refusing: Any) -> None:
    refused, message = refusing
    folder = drawn(tmp_path / "data", a=3)
    refused.append("001.jpg")
    with pytest.raises(ResourceError, match=rf"^{folder}/a/001.jpg: {message}"):
        predict(_checkpoint(), folder, on_bad="skip", device="cpu")


def _checkpoint() -> Checkpoint:
    recipe = Recipe(weights=None, augment=SMALL)
    model = build(recipe.backbone, 2, weights=None).state_dict()
    return Checkpoint(recipe=recipe, classes=("a", "b"), model=model, epoch=0)


def test_a_refusal_by_the_system_is_not_a_damaged_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "x.pt").touch()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("torch.load", refuse)
    with pytest.raises(ResourceError, match=rf"x\.pt: cannot be opened or read: {REFUSED[errno.EMFILE]}"):
        Checkpoint.load(tmp_path / "x.pt")


def test_train_pack_and_checkpoints_name_a_refusal_by_the_system(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files", "history.csv")

    message = REFUSED[errno.EMFILE]
    monkeypatch.setattr("fastflower.training.run.write_history", refuse)
    monkeypatch.setattr("fastflower.models.defaults.build", small)
    recipe = Recipe(weights=None, freeze=0, augment=SMALL, epochs=1)
    with pytest.raises(ResourceError, match=rf"^history\.csv: cannot be opened or read: {message}"):
        train(shards, recipe, out=tmp_path / "run", device="cpu")
    monkeypatch.setattr("torch.save", refuse)
    with pytest.raises(ResourceError, match=rf"x\.pt: cannot be opened or read: {message}"):
        _checkpoint().save(tmp_path / "x.pt")
    assert not list(tmp_path.glob("*.pt*"))
    monkeypatch.setattr(workspace, "save_plan", refuse)
    with pytest.raises(ResourceError, match=rf"out: cannot be opened or read: {message}"):
        pack(drawn(tmp_path / "data", a=3, b=3), tmp_path / "out")
