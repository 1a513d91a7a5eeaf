"""Captured and replayed steps, tested with a fake for CUDA graphs, equal eager steps bit for bit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import RECIPE, assert_same, assert_same_run, killed, small

from fastflower import Augment, Loader, Recipe, train
from fastflower.devices import fastest_convolutions
from fastflower.training import cuda_graphs, step
from fastflower.training.cuda_graphs import Outcome, graphs_of, unchanged
from fastflower.training.optimizer import optimizer_of, plain_state, restore, set_rate
from fastflower.training.run import Run
from fastflower.training.step import Stepper

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the small network and write no report."""
    monkeypatch.setattr("fastflower.models.defaults.build", small)
    monkeypatch.setattr("fastflower.training.run.write_report", lambda *_: None)


class Recorder:
    """Fake for CUDA graphs: runs a function three times as a warm-up, and at each replay writes to the same outputs."""

    def __init__(self) -> None:
        self.records = self.replays = 0

    def __call__(self, function: Callable[[], Outcome]) -> Callable[[], Outcome]:
        self.records += 1
        outcome, *_ = [function() for _ in range(3)]

        def replay() -> Outcome:
            self.replays += 1
            for place, value in zip(outcome, function(), strict=True):
                place.copy_(value)
            return outcome

        return replay


def with_rate_in_a_tensor(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Put the learning rate into a tensor, as on CUDA, but in float64 to keep it exact."""
    optimizer = optimizer_of(model, recipe)
    rate = torch.tensor(recipe.lr, dtype=torch.float64)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64) if "lr_scale" in group else rate
    return optimizer


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Make runs capture their steps."""
    with pytest.MonkeyPatch.context() as patch:
        found = Recorder()
        patch.setattr("fastflower.training.run.graphs_of", lambda *_: found)
        patch.setattr("fastflower.training.run.optimizer_of", with_rate_in_a_tensor)
        yield found


@pytest.fixture(scope="module")
def eager(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """Return a function that trains a recipe eagerly, once per recipe."""
    made: dict[str, Path] = {}

    def run(recipe: Recipe) -> Path:
        name = repr(recipe)
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fastflower.training.run.graphs_of", graphs_of)
                patch.setattr("fastflower.training.run.optimizer_of", optimizer_of)
                made[name] = train(shards, recipe, out=tmp_path_factory.mktemp("eager") / "run", device="cpu").folder
        return made[name]

    return run


ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 0.001, "weight_decay": 0.05, "clip_norm": 0.5}
MIXED = Augment(size=32, resize=36, crop=(0.5, 1.0), mixup=0.4)
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "sgd": ({"weight_decay": 1e-3}, 1),
    "sgd without momentum": ({"momentum": 0.0, "label_smoothing": 0.1}, 1),
    "adam": ({"optimizer": "adam", "lr": 0.001}, 1),
    "adamw, clipped": (ADAMW, 1),
    "progressive, averaged": ({"sizes": (24, 32), "ema": 0.9}, 2),
    "rates by layer": ({"layer_decay": 0.5, "head_lr": 0.05}, 1),
    "mixed images, bfloat16": ({"augment": MIXED, "precision": "bfloat16"}, 1),
}
"""Changes of the recipe, and the number of graphs."""


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_with_captured_steps_equals_an_eager_run(
    shards: Path, tmp_path: Path, eager: Callable[[Recipe], Path], recorder: Recorder, name: str
) -> None:
    """Compares losses, weights, averages and optimizer state, with dropout."""
    changes, records = VARIANTS[name]
    recipe = replace(RECIPE, **changes)
    expected = eager(recipe)
    assert recorder.records == 0
    train(shards, recipe, out=tmp_path / "run", device="cpu")
    assert (recorder.records, recorder.replays) == (records, 10)
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.parametrize(
    "changes", [{}, {**ADAMW, "ema": 0.9, "sizes": (24, 32), "layer_decay": 0.5}], ids=["sgd", "adamw"]
)
def test_a_run_with_captured_steps_resumes_in_the_middle_of_an_epoch(
    shards: Path, tmp_path: Path, eager: Callable[[Recipe], Path], recorder: Recorder, changes: dict[str, Any]
) -> None:
    """Checkpoints of captured and eager runs are interchangeable."""
    recipe, out = replace(RECIPE, **changes), tmp_path / "run"
    expected = eager(recipe)
    killed(shards, recipe, out, (Run, "step", 4), save_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflower.training.run.graphs_of", graphs_of)
        patch.setattr("fastflower.training.run.optimizer_of", optimizer_of)
        killed(shards, recipe, out, (Run, "step", 6), save_steps=2)
    train(shards, recipe, out=out, resume=True, device="cpu")
    assert recorder.records == 2
    assert_same_run(out, expected)


def state_of(run: Run) -> dict[str, Any]:
    """Copy everything that a step changes, without optimizer state that is zero."""
    named = {**dict(run.network.named_parameters()), **dict(run.network.named_buffers())}
    tensors = {name: value.detach().clone() for name, value in named.items()}
    updates = {
        f"{number} {name}": value.clone()
        for number, state in plain_state(run.optimizer)["state"].items()
        for name, value in state.items()
        if value.any()
    }
    return {"tensors": tensors, "updates": updates, "random": torch.get_rng_state()}


@pytest.fixture(scope="module")
def batch(shards: Path) -> tuple[Tensor, Tensor]:
    images, labels, _ = next(iter(Loader(shards, batch_size=24, augment=RECIPE.augment, device="cpu")))
    return images, labels


@pytest.mark.parametrize("changes", [{}, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("updates", [0, 2])
def test_a_warm_up_leaves_everything_unchanged(
    shards: Path, batch: tuple[Tensor, Tensor], changes: dict[str, Any], updates: int
) -> None:
    run = Run(shards, replace(RECIPE, **changes), Path("unused"), CPU)
    for _ in range(updates):
        run.step(*batch)
    before, seen = state_of(run), []

    def warm_up(function: Callable[[], Outcome]) -> Callable[[], Outcome]:
        outcome = [function() for _ in range(3)][-1]
        seen.append(state_of(run))
        return lambda: outcome

    Stepper(run.network, run.optimizer, run.scaler, run.recipe, CPU, torch.float32, warm_up)(*batch)
    assert_same(state_of(run), before)
    assert all(parameter.grad is None for parameter in run.network.parameters())
    (warm,) = seen
    changed = {name for name, value in before["tensors"].items() if not torch.equal(value, warm["tensors"][name])}
    assert changed == before["tensors"].keys(), "otherwise there would be nothing to restore"
    assert not torch.equal(warm["random"], before["random"])


def test_after_a_failed_capture_steps_run_eagerly_with_a_warning(
    shards: Path, batch: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    recording, plain = (Run(shards, RECIPE, Path("unused"), CPU) for _ in range(2))
    asked: list[int] = []

    def spoiled(function: Callable[[], Outcome]) -> Callable[[], Outcome]:
        asked.append(1)
        function()
        raise RuntimeError("operation not permitted when stream is capturing")

    parts = (recording.network, recording.optimizer, recording.scaler, RECIPE, CPU, torch.float32)
    stepper, random = Stepper(*parts, spoiled), torch.get_rng_state()
    images, labels = batch
    batches = [batch, batch, (images[:8], labels[:8])]  # another shape, which would be captured too
    found = [stepper(*each) for each in batches]
    torch.set_rng_state(random)
    expected = [plain.step(*each) for each in batches]
    assert_same(found, expected)
    assert_same(state_of(recording), state_of(plain))
    assert asked == [1]
    assert [line for line in caplog.messages if "CUDA graph" in line] == [
        "could not capture a step as a CUDA graph (operation not permitted when stream is capturing); running all steps eagerly"
    ]


def test_running_out_of_memory_during_a_capture_is_an_error(shards: Path, batch: tuple[Tensor, Tensor]) -> None:
    run = Run(shards, RECIPE, Path("unused"), CPU)

    def full(_function: Callable[[], Outcome]) -> Callable[[], Outcome]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    parts = (run.network, run.optimizer, run.scaler, RECIPE, CPU, torch.float32)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        Stepper(*parts, full)(*batch)


def test_tensors_used_by_a_graph_keep_their_addresses(shards: Path, tmp_path: Path, recorder: Recorder) -> None:
    """A graph refers to the addresses of weights, statistics, optimizer state and learning rate."""
    run = Run(shards, replace(RECIPE, **ADAMW, ema=0.9), tmp_path, CPU)

    def addresses() -> list[int]:
        state = [value for entry in run.optimizer.state.values() for value in entry.values()]
        rates = [group["lr"] for group in run.optimizer.param_groups]
        tensors = [*run.network.parameters(), *run.network.buffers(), *state, *rates]
        return [tensor.data_ptr() for tensor in tensors]

    run.train_epoch(0)
    before, rate = addresses(), run.optimizer.param_groups[0]["lr"].item()
    run.epoch(1)
    assert recorder.records == 1
    assert addresses() == before
    assert run.optimizer.param_groups[0]["lr"].item() != rate


def test_each_shape_and_mode_is_captured_once(shards: Path, batch: tuple[Tensor, Tensor], recorder: Recorder) -> None:
    images, labels = batch
    shares = nn.functional.one_hot(labels, 5).float()
    run = Run(shards, RECIPE, Path("unused"), CPU)
    for _ in range(2):
        run.step(images, labels)
        run.step(images, shares)
        run.step(images[:8], labels[:8])
        run.step(images[:, :, :24, :24].contiguous(memory_format=torch.channels_last), labels)
    assert (recorder.records, recorder.replays) == (4, 8)
    run.network.eval()
    run.step(images, labels)
    assert recorder.records == 5


def test_steps_that_accumulate_gradients_are_not_captured(
    shards: Path, batch: tuple[Tensor, Tensor], recorder: Recorder
) -> None:
    run = Run(shards, RECIPE, Path("unused"), CPU)
    run.step(*batch, 2, update=False)
    assert next(run.network.parameters()).grad is not None
    run.step(*batch, 2)
    assert recorder.records == 0
    assert next(run.network.parameters()).grad is None


@pytest.mark.usefixtures("recorder")
def test_batches_are_copied_for_the_replay(shards: Path, batch: tuple[Tensor, Tensor]) -> None:
    """Copies stay channels-last. Overwriting a batch later does not affect a replay."""
    run = Run(shards, RECIPE, Path("unused"), CPU)
    images, labels = (tensor.clone() for tensor in batch)
    seen: list[Tensor] = []
    run.network.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    run.step(images, labels)
    images.fill_(torch.nan)
    loss, _ = run.step(*batch)
    assert loss.isfinite()
    assert len(seen) == 5
    assert {value.data_ptr() for value in seen} == {seen[0].data_ptr()}
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in seen)


def test_a_step_returns_the_mean_loss_and_the_number_of_correct_predictions(
    shards: Path, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch
    run = Run(shards, RECIPE, Path("unused"), CPU)
    torch.manual_seed(3)
    logits = run.network(images)
    expected = nn.functional.cross_entropy(logits, labels).item(), int((logits.argmax(1) == labels).sum())
    torch.manual_seed(3)
    loss, correct = run.step(images, labels)
    assert (loss.item(), correct.item()) == expected
    assert not loss.requires_grad
    assert not correct.requires_grad
    torch.manual_seed(4)
    shares = nn.functional.one_hot(run.network(images).argmax(1), 5).float() * 0.6 + 0.08
    torch.manual_seed(4)
    assert run.step(images, shares)[1].item() == 24


@pytest.mark.parametrize(
    ("changes", "device", "precision", "recorded"),
    [
        ({}, "cuda:0", torch.bfloat16, True),
        ({}, "cuda:0", torch.float32, True),
        ({}, "cuda:0", torch.float16, False),
        ({}, "cpu", torch.float32, False),
        ({"graph": False}, "cuda:0", torch.bfloat16, False),
        ({"accumulate": 2}, "cuda:0", torch.bfloat16, False),
        ({"compile": True}, "cuda:0", torch.bfloat16, False),
        ({"checkpointing": True}, "cuda:0", torch.bfloat16, False),
    ],
)
def test_graphs_are_used_only_if_all_steps_are_the_same(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], device: str, precision: torch.dtype, recorded: bool
) -> None:
    monkeypatch.setattr(cuda_graphs, "Graphs", lambda device: ("graphs", device))
    found = graphs_of(replace(RECIPE, **changes), torch.device(device), precision)
    assert found == (("graphs", torch.device(device)) if recorded else None)


def test_several_ranks_use_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "Graphs", lambda device: ("graphs", device))
    monkeypatch.setattr(step.distributed, "world_size", lambda: 2)
    assert graphs_of(RECIPE, torch.device("cuda", 0), torch.bfloat16) is None


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizer_state_moves_between_devices(name: Any) -> None:
    """On CUDA the rate is a tensor and Adam is capturable; a saved state contains neither."""
    recipe = replace(RECIPE, optimizer=name, lr=0.25)
    torch.manual_seed(0)
    networks = [nn.Linear(3, 2) for _ in range(2)]
    plain, other = optimizer_of(networks[0], recipe), with_rate_in_a_tensor(networks[1], recipe)
    networks[0](torch.rand(4, 3)).sum().backward()
    plain.step()
    rate = other.param_groups[0]["lr"]
    ways = [way for way in ("fused", "capturable") if way in plain.param_groups[0]]
    for group in other.param_groups:
        group |= dict.fromkeys(ways, True)
    set_rate(plain, 0.125)
    restore(other, plain_state(plain))
    assert all(group["lr"] is rate and all(group[way] is True for way in ways) for group in other.param_groups)
    assert rate.item() == 0.125
    set_rate(other, 0.0625)
    state = plain_state(other)
    assert [group["lr"] for group in state["param_groups"]] == [0.0625, 0.0625]
    assert [type(group["lr"]) for group in state["param_groups"]] == [float, float]
    assert all(group["lr"] is rate for group in other.param_groups)
    assert_same(state["state"], plain_state(plain)["state"])
    before = [[group[way] for way in ways] for group in plain.param_groups]
    restore(plain, state)
    assert [group["lr"] for group in plain.param_groups] == [0.0625, 0.0625]
    assert [[group[way] for way in ways] for group in plain.param_groups] == before


def test_sgd_with_zero_momentum_buffers_equals_new_sgd() -> None:
    """A warm-up leaves buffers that are set to zero."""
    networks = [nn.Linear(50, 40) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    batches = torch.randn(3, 8, 50)
    for network, warm_ups in zip(networks, (0, 3), strict=True):
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=0.01)

        def step(images: Tensor, network: nn.Module = network, optimizer: Any = optimizer) -> None:
            network(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        with unchanged(network, optimizer, torch.default_generator):
            for _ in range(warm_ups):
                step(batches[2])
        step(batches[0])
        step(batches[1])
    assert all(torch.equal(*pair) for pair in zip(networks[0].parameters(), networks[1].parameters(), strict=True))


def test_convolutions_are_benchmarked_only_during_training_on_cuda() -> None:
    cudnn = torch.backends.cudnn
    with fastest_convolutions(CPU):
        assert not cudnn.benchmark
    with fastest_convolutions(torch.device("cuda", 0)):
        assert cudnn.benchmark
    assert not cudnn.benchmark
