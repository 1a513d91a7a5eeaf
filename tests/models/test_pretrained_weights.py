"""Initial weights: downloads, heads that are kept or replaced, and checkpoints of other runs."""

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from fastflower import Augment, Checkpoint, Recipe, train
from fastflower.errors import ArgumentError, CheckpointError
from fastflower.models.backbone import build

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")


@pytest.fixture(scope="module")
def state(narrow: None) -> dict[str, torch.Tensor]:  # noqa: ARG001  (is set up first)
    """A narrow ResNet-18 for seven classes."""
    torch.manual_seed(1)
    return models.resnet18(num_classes=7).state_dict()


@pytest.fixture(scope="module")
def file(state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    torch.save(state, path)
    return path


class Server(ThreadingHTTPServer):
    """Gives the same answer to every request and records the paths."""

    daemon_threads = True

    def __init__(self, answer: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.requests.append(self.path)
        self.wfile.write(self.server.answer)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(answer: bytes) -> Iterator[Server]:
    with Server(answer) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def found(content: bytes) -> bytes:
    return b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)


def checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's folder for downloaded weights, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return Path(torch.hub.get_dir(), "checkpoints")


def kept(hub: Path) -> list[Path]:
    return list(hub.iterdir()) if hub.exists() else []


def assert_body(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = network.state_dict()
    for key, value in state.items():
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked"):
            assert torch.equal(own[key], value), key


def test_weights_at_a_url_are_downloaded_once(
    hub: Path, file: Path, state: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    content = file.read_bytes()
    with serving(found(content)) as server, caplog.at_level(logging.INFO, "fastflower"):
        address = f"{server.url}/some/where/mine.pth#sha256={checksum(content)}"
        for _ in range(2):
            assert_body(build("resnet18", 5, weights=address), state)
    assert server.requests == ["/some/where/mine.pth"]
    (path,) = kept(hub)
    assert path.read_bytes() == content
    told = f"{path}: loaded into resnet18; replaced its head for 7 classes with a new one for 5 classes"
    assert [line for line in caplog.messages if "loaded" in line] == [told, told]


def test_two_downloads_with_the_same_file_name_do_not_collide(hub: Path, file: Path, tmp_path: Path) -> None:
    torch.save(models.resnet18(num_classes=3).state_dict(), tmp_path / "other.pth")
    for path in (file, tmp_path / "other.pth"):
        content = path.read_bytes()
        with serving(found(content)) as server:
            network = build("resnet18", 5, weights=f"{server.url}/mine.pth#sha256={checksum(content)}")
        assert_body(network, torch.load(path, weights_only=True))
    assert len(kept(hub)) == 2


def test_training_starts_from_a_url(hub: Path, file: Path, shards: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    small = Augment(size=32, resize=36)
    with serving(found(content)) as server:
        weights = f"{server.url}/mine.pth#sha256={checksum(content)}"
        recipe = Recipe(weights=weights, freeze=4, augment=small, epochs=1, precision="float32")
        report = train(shards, recipe, out=tmp_path / "run", device="cpu")
    trained = Checkpoint.load(report.checkpoint)
    assert trained.recipe.weights == weights
    assert torch.equal(trained.model["conv1.weight"], torch.load(file, weights_only=True)["conv1.weight"])
    assert len(kept(hub)) == 1


@pytest.mark.parametrize("end", ["", "#", "#sha256=", "#sha256=abc", "#md5=" + 64 * "0", "#sha256=" + 65 * "0"])
def test_a_url_without_a_checksum_is_refused_without_a_request(hub: Path, end: str) -> None:
    with serving(found(b"")) as server:
        address = f"{server.url}/mine.pth"
        wanted = (
            f"weights='{address}{end}': a URL must include the file's checksum; pass {address}#sha256=CHECKSUM "
            f"(sha256sum FILE prints it)."
        )
        with pytest.raises(ArgumentError, match=f"^{re.escape(wanted)}$"):
            build("resnet18", 5, weights=address + end)
    assert server.requests == []
    assert kept(hub) == []


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_file_with_another_checksum_is_refused_and_not_kept(hub: Path, file: Path, share: float) -> None:
    """A truncated download has another checksum, too."""
    whole = file.read_bytes()
    wanted = checksum(whole if share < 1 else b"another file")
    answer = found(whole)[: len(found(whole)) - int((1 - share) * len(whole))]
    with serving(answer) as server:
        message = f"weights: the SHA-256 of {server.url}/mine.pth is not {wanted}; check the URL and the checksum."
        with pytest.raises(CheckpointError, match=re.escape(message)):
            build("resnet18", 5, weights=f"{server.url}/mine.pth#sha256={wanted}")
    assert kept(hub) == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.0 404 Not Found\r\n\r\n", r"HTTP Error 404: Not Found"),
        (b"HTTP/1.0 500 Oh\r\n\r\n", r"HTTP Error 500: Oh"),
        (b"", ".*"),
        (b"What do you want?\r\n\r\n", ".*"),
    ],
    ids=["404", "500", "nothing", "no HTTP"],
)
def test_an_error_of_the_server_is_explained(hub: Path, answer: bytes, reason: str) -> None:
    with serving(answer) as server:
        url = f"{server.url}/mine.pth"
        message = (
            rf"^weights: {re.escape(url)} could not be downloaded \({reason}\); check the URL, or pass a file's path\.$"
        )
        with pytest.raises(CheckpointError, match=message):
            build("resnet18", 5, weights=f"{url}#sha256={64 * '0'}")
    assert kept(hub) == []


def test_an_unreachable_server_is_explained(hub: Path) -> None:
    with serving(b"") as server:
        url = f"{server.url}/mine.pth"
    with pytest.raises(CheckpointError, match=rf"^weights: {re.escape(url)} could not be downloaded \(.*refused.*\); "):
        build("resnet18", 5, weights=f"{url}#sha256={64 * '0'}")
    assert kept(hub) == []


def test_a_head_of_another_size_is_replaced(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastflower"):
        network = build("resnet18", 5, weights=str(file))
    assert network.get_parameter("fc.weight").shape == (5, 128)
    assert caplog.messages == [
        f"{file}: loaded into resnet18; replaced its head for 7 classes with a new one for 5 classes"
    ]


def test_a_head_of_the_same_size_is_kept(
    file: Path, state: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastflower"):
        network = build("resnet18", 7, weights=str(file))
    assert torch.equal(network.get_parameter("fc.weight"), state["fc.weight"])
    assert torch.equal(network.get_parameter("fc.bias"), state["fc.bias"])
    assert caplog.messages == [f"{file}: loaded into resnet18; kept its head for 7 classes"]


@pytest.mark.parametrize("missing", [("fc.weight", "fc.bias"), ("fc.bias",)])
def test_a_file_without_a_head_gets_a_new_one(
    state: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture, missing: tuple[str, ...]
) -> None:
    path = tmp_path / "body.pth"
    torch.save({key: value for key, value in state.items() if key not in missing}, path)
    with caplog.at_level(logging.INFO, "fastflower"):
        network = build("resnet18", 7, weights=str(path))
    assert_body(network, state)
    assert not torch.equal(network.get_parameter("fc.weight"), state["fc.weight"])
    assert caplog.messages == [
        f"{path}: loaded into resnet18; found no head that fits, so added a new one for 7 classes"
    ]


def test_a_head_for_another_width_is_not_kept(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({**state, "fc.weight": torch.zeros(5, 100), "fc.bias": torch.zeros(5)}, tmp_path / "odd.pth")
    network = build("resnet18", 5, weights=str(tmp_path / "odd.pth")).eval()
    with torch.inference_mode():
        assert network(torch.rand(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(("name", "head"), [("vgg11", "classifier.6"), ("densenet121", "classifier")])
def test_vgg_and_densenet_keep_their_heads_too(tmp_path: Path, name: str, head: str) -> None:
    with torch.device("meta"):
        shapes = models.get_model(name, num_classes=3).state_dict()
    torch.save({key: torch.tensor(0.5).expand(value.shape) for key, value in shapes.items()}, tmp_path / "mine.pth")
    network = build(name, 3, weights=str(tmp_path / "mine.pth"))
    assert all((network.get_parameter(f"{head}.{part}") == 0.5).all() for part in ("weight", "bias"))


def test_a_checkpoint_as_weights_starts_from_its_network_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        weights=None, augment=Augment(size=32, resize=36), batch_size=24, epochs=1, precision="float32", ema=0.9
    )
    report = train(shards, recipe, out=tmp_path / "run", device="cpu")
    checkpoint = Checkpoint.load(report.checkpoint)
    again = build("resnet18", 5, weights=str(report.checkpoint)).eval()
    own = again.state_dict()
    for name, value in checkpoint.model.items():
        if not name.endswith("num_batches_tracked"):  # never read
            assert torch.equal(own[name], value), name
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(again(images), checkpoint.network()(images))
    assert build("resnet18", 4, weights=str(report.checkpoint)).get_parameter("fc.bias").shape == (4,)
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint-best\.pt: does not fit resnet34: .*; it fits resnet18: pass --backbone resnet18",
    ):
        build("resnet34", 5, weights=str(report.checkpoint))
