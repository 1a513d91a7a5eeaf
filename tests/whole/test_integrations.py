"""What docs/integrations.md says of other frameworks: its examples run, and go on exactly where they were stopped."""

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

from fastflower import Augment, Batch, Loader
from fastflower.draws.order import epoch_order
from fastflower.errors import ArgumentError

DOCUMENT = (ROOT / "docs" / "integrations.md").read_text()
EXAMPLES: dict[str, str] = dict(re.findall(r"^## (\w+)\n(?:(?!```).)*```python\n(.*?)```", DOCUMENT, re.DOTALL | re.M))
STOP = 3

Fed = list[tuple[list[int], torch.Tensor]]

torchdata_warnings = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 calls it
lightning_warnings = pytest.mark.filterwarnings(
    "ignore::UserWarning",  # Lightning's way of giving advice: on loggers, small epochs, callbacks
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",  # Lightning 2.6 calls it
)


def make(shards: Path, split: str = "train") -> Loader:
    augment = Augment(size=32, resize=36, crop=(0.2, 1.0), flip=0.5)
    return Loader(shards, split, batch_size=16, augment=augment, device="cpu", workers=1)


def small_network(num_classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, num_classes))


def fed(batches: Iterable[Batch]) -> Fed:
    return [(batch.index.tolist(), batch.images) for batch in batches]


def assert_same(found: Fed, expected: Fed) -> None:
    """The same samples, bit for bit."""
    assert [index for index, _ in found] == [index for index, _ in expected]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def epochs(shards: Path) -> list[Fed]:
    """The first epochs of a loader that nobody stops."""
    loader = make(shards)
    found = [fed(loader) for _ in range(3)]
    for number, epoch in enumerate(found):
        indices = [index for part, _ in epoch for index in part]
        assert indices == epoch_order(120, seed=0, epoch=number)[:112].tolist()
    return found


@torchdata_warnings
@lightning_warnings
@pytest.mark.parametrize(("title", "module"), [(title, title.lower()) for title in EXAMPLES])
def test_the_examples_run(
    title: str, module: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    Path("shards").symlink_to(shards)
    text = EXAMPLES[title]
    # Small images and a small network, more steps than three, and no accelerator: the same path in a few seconds.
    for name, shorter in {
        "from torchvision.models import resnet18": "from test_integrations import small_network as resnet18",
        "Augment(": "Augment(size=32, resize=36, ",
        "batch_size=32": "batch_size=16",
        "Accelerator()": "Accelerator(cpu=True)",
        "Trainer(": "Trainer(accelerator='cpu', logger=False, enable_progress_bar=False, ",
    }.items():
        text = text.replace(name, shorter)
    exec(compile(text, "docs/integrations.md", "exec"), {"__name__": "integrations"})


def test_there_is_an_example_for_each_framework() -> None:
    assert list(EXAMPLES) == ["torchdata", "Accelerate", "Lightning"]


@torchdata_warnings
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # what forking here means
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="this process"),
        pytest.param(
            {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}, id="one that persists"
        ),
    ],
)
def test_torchdata_goes_on_with_the_remaining_batches_bit_for_bit(
    shards: Path, epochs: list[Fed], options: dict[str, Any]
) -> None:
    loading = pytest.importorskip("torchdata.stateful_dataloader")

    def wrapped() -> Any:
        return loading.StatefulDataLoader(make(shards), batch_size=None, **options)

    feeding = wrapped()
    assert len(feeding) == len(epochs[0])
    assert_same(fed(islice(feeding, STOP)), epochs[0][:STOP])
    state = feeding.state_dict()
    feeding = wrapped()
    feeding.load_state_dict(state)
    assert_same(fed(feeding), epochs[0][STOP:])
    assert_same(fed(feeding), epochs[1])


@torchdata_warnings
def test_torchdata_goes_on_with_the_next_epoch_after_a_whole_one(shards: Path, epochs: list[Fed]) -> None:
    loading = pytest.importorskip("torchdata.stateful_dataloader")
    feeding = loading.StatefulDataLoader(make(shards), batch_size=None)
    assert_same(fed(feeding), epochs[0])
    state = feeding.state_dict()
    feeding = loading.StatefulDataLoader(make(shards), batch_size=None)
    feeding.load_state_dict(state)
    assert_same(fed(feeding), epochs[1])
    assert_same(fed(feeding), epochs[2])


def test_an_iterator_that_gives_no_batch_uses_up_no_epoch(shards: Path, epochs: list[Fed]) -> None:
    loader = make(shards)
    iter(loader)
    assert_same(fed(islice(loader, STOP)), epochs[0][:STOP])
    iter(loader)
    assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (1, 0)
    assert_same(fed(loader), epochs[1])


def test_accelerate_leaves_a_loader_as_it_is_and_goes_on_with_the_remaining_batches(
    shards: Path, epochs: list[Fed], tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator, loader = accelerate.Accelerator(cpu=True), make(shards)
    assert accelerator.prepare(loader) is loader
    accelerator.register_for_checkpointing(loader)
    assert_same(fed(islice(loader, STOP)), epochs[0][:STOP])
    accelerator.save_state(str(tmp_path))
    accelerator, loader = accelerate.Accelerator(cpu=True), make(shards)
    accelerator.register_for_checkpointing(loader)
    accelerator.load_state(str(tmp_path))
    assert_same(fed(loader), epochs[0][STOP:])
    assert_same(fed(loader), epochs[1])


def recorder() -> Any:
    """A Lightning module that keeps what it was fed."""
    import lightning

    class Recorder(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = small_network(num_classes=5)
            self.trained: list[Batch] = []
            self.validated: list[Batch] = []

        def training_step(self, batch: Batch, _step: int) -> torch.Tensor:
            self.trained.append(batch)
            return torch.nn.functional.cross_entropy(self.head(batch.images), batch.labels)

        def validation_step(self, batch: Batch, _step: int) -> None:
            self.validated.append(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Recorder()


def fitted(module: Any, epochs: int, *callbacks: Any, **options: Any) -> Any:
    import lightning

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        **quiet,
    )
    trainer.fit(module, **options)
    return module


@lightning_warnings
@pytest.mark.parametrize("stop", [STOP, 6, 10])
def test_lightning_goes_on_with_the_remaining_batches_bit_for_bit(
    shards: Path, epochs: list[Fed], tmp_path: Path, stop: int
) -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    def loaders() -> dict[str, Loader]:
        return {"train_dataloaders": make(shards), "val_dataloaders": make(shards, "val")}

    often = callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    whole = fitted(recorder(), 2, often, **loaders())
    assert_same(fed(whole.trained), [*epochs[0], *epochs[1]])
    rest = fitted(recorder(), 2, ckpt_path=tmp_path / f"step={stop}.ckpt", **loaders())
    assert_same(fed(rest.trained), fed(whole.trained[stop:]))
    # Every sample once an epoch, behind two batches of Lightning's sanity check.
    indices = [index for batch in whole.validated[2:] for index in batch.index.tolist()]
    assert indices == [*range(30), *range(30)]


@lightning_warnings
def test_lightning_goes_on_with_the_next_epoch_where_the_data_module_keeps_the_state(
    shards: Path, epochs: list[Fed], tmp_path: Path
) -> None:
    lightning = pytest.importorskip("lightning")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class Flowers(lightning.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.train = make(shards)

        def train_dataloader(self) -> Loader:
            return self.train

        def state_dict(self) -> dict[str, Any]:
            return self.train.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.train.load_state_dict(state_dict)

    last = callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    first = fitted(recorder(), 1, last, datamodule=Flowers())
    second = fitted(recorder(), 2, ckpt_path=tmp_path / "epoch=0.ckpt", datamodule=Flowers())
    assert_same(fed(first.trained), epochs[0])
    assert_same(fed(second.trained), epochs[1])


def test_worker_processes_that_would_feed_every_batch_twice_are_refused(shards: Path) -> None:
    loader = torch.utils.data.DataLoader(make(shards), batch_size=None, num_workers=2, multiprocessing_context="fork")
    with pytest.raises(ArgumentError, match="num_workers must be 0, got 2: a Loader has its own threads"):
        next(iter(loader))
