"""The Python blocks of documentation pages run, page by page, in a folder with data, shards and a run."""

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from packs import drawn
from places import ROOT
from torch.nn.parallel import DistributedDataParallel
from torchvision import models

from fastflower import Augment, Batch, Checkpoint, Loader, Recipe, predict, train
from fastflower.models.backbone import build

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

PAGES = ("coming-from-dataloader.md", "using-a-trained-network.md", "augmentation.md")
# The same path in seconds: small images, and no worker processes, which would be forked from a process with threads.
SHORTER = {
    "RandomResizedCrop(224)": "RandomResizedCrop(32)",
    "num_workers=4, pin_memory=True, persistent_workers=True": "num_workers=0",
}


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(weights=None, augment=Augment(size=64), epochs=2, batch_size=24, precision="float32")
    return train(shards, recipe, out=tmp_path_factory.mktemp("runs") / "run", device="cpu").folder


def executed(page: str, flowers: Path, run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a page's blocks define, run one after another in `folder`."""
    monkeypatch.chdir(folder)
    for name, made in {"data": flowers, "run": run, "photo.jpg": next(flowers.glob("rose/*.jpg"))}.items():
        Path(name).symlink_to(made)
    trained: list[tuple[Any, ...]] = []
    names: dict[str, Any] = {"__name__": "page", "train_step": lambda *batch: trained.append(batch), "trained": trained}
    for text in blocks(page):
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        exec(compile(text, f"docs/{page}", "exec"), names)
    return names


def test_every_page_has_blocks_and_each_shortening_is_used() -> None:
    texts = {page: "".join(blocks(page)) for page in PAGES}
    assert all(texts.values())
    assert all(any(long in text for text in texts.values()) for long in SHORTER)


def test_a_loader_does_what_the_page_on_dataloader_says(
    flowers: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = executed(PAGES[0], flowers, run, tmp_path, monkeypatch)
    # Two epochs of ImageFolder (150 images), two of the loader (120), and one that is interrupted and resumed.
    assert len(names["trained"]) == 2 * 4 + 2 * 3 + 3
    loader, dataset = names["loader"], names["dataset"]
    assert loader.augment.resolved == Augment(size=(32, 32), crop=(0.08, 1.0), flip=0.5).resolved
    assert list(loader.classes) == dataset.classes
    assert names["names"] == [str(path) for path in sorted(Path("data/rose").iterdir())]
    assert (list(names["features"]), names["damaged"]) == (names["names"], [])
    assert loader.num_samples == 120
    assert len(loader) == 3
    assert loader.global_batch_size == 32
    batch = next(iter(loader))
    assert isinstance(batch, Batch)
    assert batch.images.shape == (32, 3, 32, 32)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images.min() < 0
    label, path = int(batch.labels[0]), loader.path_of(int(batch.index[0]))
    assert path.startswith(dataset.classes[label])
    assert loader.image(int(batch.index[0])).shape[2] == 3
    view = Loader("shards", "val", batch_size=32, device="cpu")
    assert (view.augment.resized, view.augment.output_size) == (256, (224, 224))
    assert sum(len(index) for _, _, index in view) == view.num_samples == 30


def test_packing_and_validation_under_torchrun_run_again_as_the_page_on_loading_says(
    flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(flowers)
    texts = [text for text in blocks("loading.md") if "dist." in text or "network.module" in text]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = DistributedDataParallel(torch.nn.Sequential(torch.nn.AvgPool2d(224), torch.nn.Conv2d(3, 5, 1)))
        names: dict[str, Any] = {"network": network}
        for _ in range(2):
            for text in texts:
                exec(compile(text, "docs/loading.md", "exec"), names)
    finally:
        dist.destroy_process_group()
    assert (len(texts), names["loader"].num_samples, names["logits"].shape) == (2, 120, (30, 5, 1, 1))


def test_a_network_elsewhere_says_what_predict_says(
    flowers: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = executed(PAGES[1], flowers, run, tmp_path, monkeypatch)
    found, expected = names["probabilities"], names["prediction"]
    assert names["checkpoint"].classes[names["best"]] == expected.class_name
    assert found.tolist() == pytest.approx(list(expected.probabilities.values()), abs=0.02)
    with torch.inference_mode():
        assert torch.equal(names["model"](names["image"][None]).softmax(1)[0], found)
    tolerance = 1e-4 if names["device"] == "cpu" else 0.05  # bfloat16 on CUDA
    assert names["logits"].softmax(1)[0].tolist() == pytest.approx(found.tolist(), abs=tolerance)
    view = names["checkpoint"].recipe.augment
    assert (names["size"], names["resize"]) == (view.size, view.resized)
    assert (names["mean"], names["std"]) == (view.mean, view.std)
    assert predict("run/checkpoint-best.pt", "photo.jpg", device="cpu")[0].class_name == expected.class_name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of FastAPI's own test client
def test_the_web_service_classifies_uploads(
    flowers: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastapi.testclient import TestClient

    names = executed(PAGES[1], flowers, run, tmp_path, monkeypatch)
    client = TestClient(names["app"])
    answer = client.post("/classify", files={"file": ("a.jpg", Path("photo.jpg").read_bytes(), "image/jpeg")})
    (expected,) = predict("run/checkpoint-best.pt", "photo.jpg")
    assert answer.json() == {"class": expected.class_name, "probability": pytest.approx(expected.probability)}
    refused = client.post("/classify", files={"file": ("a.jpg", b"<html>", "image/jpeg")})
    assert refused.status_code == 422
    assert refused.json()["detail"] == "is HTML, a web page, not an image"
    assert client.post("/classify").status_code == 422


def test_other_transforms_are_applied_to_batches_as_the_page_says(
    flowers: Path, run: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shards").symlink_to(shards)
    names = executed(PAGES[2], flowers, run, tmp_path, monkeypatch)
    augment = names["augment"]
    assert (augment.size, augment.resize, augment.padding, augment.jitter_probability) == ((32, 32), "off", 4, 0.8)
    images = names["images"]
    assert images.shape == (32, 3, 224, 224)
    assert images.dtype == torch.float32
    assert images.aminmax() == pytest.approx((-1, 1), abs=0.1)


@pytest.mark.parametrize("backbone", ["resnet50", "resnet50_v1"])
def test_the_strides_of_a_backbone_without_fastflower_are_those_with_it(backbone: str) -> None:
    (exchange,) = [text for text in blocks(PAGES[1]) if "_v1" in text and "stride" in text]
    with torch.device("meta"):  # neither memory nor random numbers
        expected, model = build(backbone, 5, weights=None), models.get_model("resnet50", num_classes=5)
    exec(compile(exchange, "docs", "exec"), {"model": model, "recipe": {"backbone": backbone}})
    assert strides(model) == strides(expected)


def strides(model: torch.nn.Module) -> list[tuple[int, ...]]:
    return [module.stride for module in model.modules() if isinstance(module, torch.nn.Conv2d)]


def said_by_the_library() -> str:
    """Every string of the library; f-strings have a value's place between their parts."""
    nodes = [node for path in (ROOT / "fastflower").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_the_page_of_messages_quotes_what_the_library_says() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/when-it-goes-wrong.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    said = said_by_the_library()
    assert [row for row in rows if not all(part.strip() in said for part in row.split("…"))] == []


@pytest.mark.usefixtures("narrow", "no_figures")
def test_the_page_of_training_has_a_recipe_and_cross_validates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    text, _, folds = blocks("training.md")
    exec(compile(text, "docs/training.md", "exec"), names)
    assert (names["recipe"].epochs, names["recipe"].batch_size) == (8, 16)
    monkeypatch.chdir(tmp_path)
    drawn(tmp_path / "data", a=8, b=7)
    names["recipe"] = replace(
        names["recipe"], weights=None, freeze=0, augment=Augment(size=32), sizes=(), soup=1, epochs=1
    )
    names["recipe"] = replace(names["recipe"], batch_size=4, backbone="resnet18", recalibrate=False)
    exec(compile(folds, "docs/training.md", "exec"), names)
    assert [Checkpoint.load(report.checkpoint).fold for report in names["reports"]] == list(range(5))
    assert [report.scores.num_samples for report in names["reports"]] == [3] * 5
    assert len(names["accuracies"]) == 5


def test_two_runs_are_compared_as_the_page_says(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in ("a", "b"):
        Path("runs", name).symlink_to(run)
    (block,) = (text for text in blocks("training.md") if "history.csv" in text)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/training.md", "exec"), names)
    assert [line.get_label() for line in names["plt"].gca().get_lines()] == ["runs/a", "runs/b"]
    assert all(len(line.get_xdata()) == 2 for line in names["plt"].gca().get_lines())
    names["plt"].close()
    assert Path("compared.png").stat().st_size > 0
