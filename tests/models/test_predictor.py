"""Predictor: the same image in any form, against torchvision; many threads; networks of one's own; endless streams."""

import io
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from looking import CLASSES, VIEW, Looking, encoded, looking, oracle, smooth, turned, upright
from numpy.typing import NDArray
from packs import exactly
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from fastflower import Augment, Checkpoint, Predictor, Recipe, predict
from fastflower.cli import main
from fastflower.errors import ArgumentError, SampleError
from fastflower.models.backbone import build
from fastflower.models.predictor import Prediction

RGB = smooth()
SIXTEEN = np.asarray(RGB.convert("L")).astype(np.uint16) * 257 - np.asarray(RGB.convert("L")) // 2
KEPT = {  # whose bytes `pack` keeps
    **{f"turned {value}": encoded(RGB, "JPEG", quality=90, **turned(value)) for value in range(1, 9)},
    "gray": encoded(RGB.convert("L"), "JPEG"),
    "progressive": encoded(RGB, "JPEG", progressive=True),
    "large, decoded at a reduced scale": encoded(smooth(640, 480), "JPEG", quality=95),
}
TRANSCODED = {
    "cmyk": encoded(RGB.convert("CMYK"), "JPEG", quality=95),
    "turned png": encoded(RGB, "PNG", **turned(6)),
    "palette": encoded(RGB.quantize(64), "PNG"),
    "palette, transparent": encoded(RGB.quantize(64), "PNG", transparency=b"\1\2\3"),
    "16 bit": encoded(Image.fromarray(SIXTEEN), "PNG"),
    "16 bit, turned": encoded(Image.fromarray(SIXTEEN), "TIFF", **turned(8)),
    "transparent": encoded(RGB.convert("RGBA"), "PNG"),
    "one pixel wide": encoded(RGB.resize((1, 48)), "PNG"),
    "one pixel high": encoded(RGB.resize((64, 1)), "PNG"),
    "one pixel": encoded(RGB.resize((1, 1)), "PNG"),
}
FILES = KEPT | TRANSCODED


def rows(found: list[Prediction]) -> NDArray[np.float64]:
    return np.array([list(one.probabilities.values()) for one in found])


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return looking()


@pytest.mark.parametrize("kind", FILES)
def test_an_image_in_any_form_has_the_same_probabilities(predictor: Predictor, kind: str, tmp_path: Path) -> None:
    data = FILES[kind]
    path = tmp_path / "image"
    path.write_bytes(data)
    with path.open("rb") as file:
        forms: list[Any] = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), file]
        files = rows(predictor(forms))
    assert (files == files[0]).all()
    with Image.open(io.BytesIO(data)) as image:  # from a path, Pillow 13 does not turn an uncompressed TIFF file
        image.load()
        before = (image.size, image.tobytes(), dict(image.getexif()), {**image.info})
        direct = rows(predictor([image, np.asarray(upright(data))]))
        assert (image.size, image.tobytes(), dict(image.getexif()), {**image.info}) == before
    assert np.abs(direct[0] - direct[1]).max() < 1e-3
    # Files other than JPEG become JPEG files, as in a pack. Large JPEG files are decoded at a reduced scale.
    assert np.abs(files[0] - direct[0]).max() <= (0.004 if kind in TRANSCODED or "large" in kind else 0)
    assert np.abs(direct[0] - oracle(upright(data))).max() < 0.004
    assert files[0].sum() == pytest.approx(1)


def test_mixed_images_keep_their_order_and_have_names(predictor: Predictor, tmp_path: Path) -> None:
    images = [smooth(seed=seed) for seed in range(5)]
    (tmp_path / "folder").mkdir()
    for number in (1, 2):
        images[number].save(tmp_path / f"folder/{number}.png")
    images[4].save(tmp_path / "4.png")
    mixed = [images[0], tmp_path / "folder", encoded(images[3], "PNG"), str(tmp_path / "4.png")]
    found = predictor(mixed)
    assert np.abs(rows(found) - [oracle(image) for image in images]).max() < 0.004
    inside = [tmp_path / f"folder/{number}.png" for number in (1, 2)]
    assert [one.path for one in found] == [None, *inside, None, tmp_path / "4.png"]
    assert [one.name for one in found] == ["image 0", *map(str, inside), "image 3", str(tmp_path / "4.png")]
    assert [one.index for one in found] == [0, 1, 2, 3, 4]
    assert predictor(iter(mixed)) == predictor(tuple(mixed)) == found
    assert predictor([]) == []


def test_predict_is_a_predictor_called_once(tmp_path: Path, flowers: Path) -> None:
    recipe = Recipe(weights=None, augment=Augment(size=32), precision="float32", tta=True)
    model = build("resnet18", 5, weights=None).state_dict()
    checkpoint = Checkpoint(recipe=recipe, classes=tuple("abcde"), model=model, epoch=0)
    checkpoint.save(tmp_path / "checkpoint.pt")
    images = sorted(flowers.glob("*/*.jpg"))[::40]
    expected = predict(checkpoint, images, device="cpu")
    for network in (checkpoint, tmp_path / "checkpoint.pt", str(tmp_path / "checkpoint.pt")):
        predictor = Predictor(network, device="cpu")
        assert predictor(images) == list(predictor.stream(images)) == expected
        assert predictor.classes == checkpoint.classes
    module = Predictor(checkpoint.network(), classes=checkpoint.classes, augment=recipe.augment, device="cpu")
    once = rows(predict(replace(checkpoint, recipe=replace(recipe, tta=False)), images, device="cpu"))
    assert (rows(module(images)) == once).all()


def test_many_threads_get_the_answers_of_one(predictor: Predictor) -> None:
    images: list[Any] = [*FILES.values(), *(smooth(seed=seed) for seed in range(10))]
    expected = predictor(images)
    start = threading.Barrier(8)

    def ask(shift: int) -> bool:
        start.wait()
        turn = [(number + 7 * shift) % len(images) for number in range(len(images))]
        alone = all(predictor(images[number]) == [replace(expected[number], name="image 0")] for number in turn)
        return alone and rows(predictor(images)).tolist() == rows(expected).tolist()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))


def test_a_network_of_ones_own_is_left_as_it_is() -> None:
    network = nn.Sequential(Looking(), nn.Dropout(0.9)).train()
    predictor = Predictor(network, classes=CLASSES, augment=VIEW, device="cpu")
    expected = predictor(RGB)
    assert np.abs(rows(expected)[0] - oracle(RGB)).max() < 0.004
    assert all(module.training for module in network.modules())
    with torch.no_grad():
        next(network.parameters()).zero_()
    assert predictor(RGB) == expected, "later changes of the network have no effect"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_lower_precision_predicts_in_it(dtype: torch.dtype) -> None:
    predictor = Predictor(Looking().to(dtype), classes=CLASSES, augment=VIEW, device="cpu")
    assert np.abs(rows(predictor(RGB))[0] - oracle(RGB)).max() < 0.01


def test_an_endless_stream_holds_few_images(predictor: Predictor) -> None:
    alive = weakref.WeakSet[Any]()
    most = 0

    def endless() -> Iterator[NDArray[np.uint8]]:
        nonlocal most
        for seed in itertools.count():
            array = np.full((4, 4, 3), seed % 256, np.uint8)
            alive.add(Holder(array))
            most = max(most, len(alive))
            yield array

    class Holder:
        def __init__(self, array: NDArray[np.uint8]) -> None:
            weakref.finalize(array, alive.discard, self)

    stream = predictor.stream(endless())
    first = [one.index for one in itertools.islice(stream, 300)]
    stream.close()
    assert first == list(range(300))
    assert most <= 2 * 32 + 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastflower")]


def test_an_error_in_a_stream_comes_after_the_predictions_before_it(predictor: Predictor) -> None:
    stream = predictor.stream([RGB] * 40 + [b"no image"])
    assert len(list(itertools.islice(stream, 32))) == 32
    message = r"^image 40: is plain text, not an image; pass another image, or on_bad='skip' \(--on-bad skip\)\.$"
    with pytest.raises(SampleError, match=message):
        next(stream)
    found = predictor([b"no image", RGB, b"", RGB], on_bad="skip")
    assert [one.index for one in found] == [1, 3]


NAMED = {"classes": CLASSES, "augment": VIEW}
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"classes": None},
        r"^classes must be given .* outputs, as in Predictor\(network, classes=\[.*\], augment=.*\), got None\.$",
    ),
    ({"classes": "rose"}, r"^classes must be given with a network: different names, .*, got 'rose'\.$"),
    ({"classes": ("a", "a")}, r"^classes must be given with a network: different names, .*, got \('a', 'a'\)\.$"),
    ({"classes": (0, 1)}, r"^classes must be given with a network: .*, got \(0, 1\)\.$"),
    ({"classes": ()}, r"^classes must be given with a network: .*, got \(\)\.$"),
    (
        {"augment": None},
        r"^augment must be given with a network: an Augment or a torchvision transform, .*, got None\.$",
    ),
    ({"tta": "no"}, r"^tta must be True, False or None, got 'no'\.$"),
    ({"precision": "half"}, r"^precision must be 'auto', 'bfloat16', 'float16' or 'float32', got 'half'\.$"),
    ({"max_pixels": 0}, r"^max_pixels must be an integer from 1 to 178956970, got 0\.$"),
    ({"max_pixels": 10**9}, r"^max_pixels must be an integer from 1 to 178956970, got 1000000000\.$"),
    ({"url_seconds": 0}, r"^url_seconds must be a number of seconds above 0, got 0\.$"),
    ({"url_seconds": float("inf")}, r"^url_seconds must be a number of seconds above 0, got inf\.$"),
    ({"url_seconds": True}, r"^url_seconds must be a number of seconds above 0, got True\.$"),
    ({"url_bytes": 0}, r"^url_bytes must be an integer, at least 1 byte, got 0\.$"),
    ({"url_bytes": None}, r"^url_bytes must be an integer, at least 1 byte, got None\.$"),
    ({"url_bytes": 1.5}, r"^url_bytes must be an integer, at least 1 byte, got 1\.5\.$"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Predictor(Looking(), device="cpu", **(NAMED | options))


def test_what_does_not_fit_a_network_is_named() -> None:
    with pytest.raises(
        ArgumentError, match=r"^checkpoint must be a network in float32, .*\(convert it: network\.float"
    ):
        Predictor(Looking().double(), **NAMED)
    predictor = Predictor(Looking(), classes=("a", "b"), augment=VIEW, device="cpu")
    with pytest.raises(
        ArgumentError, match=r"^classes must name the outputs of the network: 2 names for 27 outputs\.$"
    ):
        predictor(RGB)
    for name, value in NAMED.items():
        rule = f"^{name} must be None unless a network is passed: a checkpoint has its own"
        with pytest.raises(ArgumentError, match=rule):
            Predictor("run/checkpoint-best.pt", **{name: value})


def test_a_transform_of_torchvision_describes_a_network_too() -> None:
    weights = ResNet18_Weights.DEFAULT.transforms(crop_size=32, resize_size=36)
    ours = Augment.from_torchvision(weights)
    one, other = (Predictor(Looking(), classes=CLASSES, augment=augment, device="cpu") for augment in (weights, ours))
    assert one(RGB) == other(RGB)


class Wrapped(nn.Module):
    """Returns what `form` makes of the logits."""

    def __init__(self, form: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.network, self.form = Looking(), form

    def forward(self, images: Tensor) -> object:
        return self.form(self.network(images))


class ModelOutput(dict[str, Tensor]):
    """As transformers has it."""


FORMS: list[tuple[Callable[[Tensor], object], str, str]] = [
    (lambda logits: ModelOutput(loss=logits, logits=logits), "a ModelOutput with 'loss', 'logits'", "['logits']"),
    (lambda logits: {"out": logits}, "a dict with 'out'", "['out']"),
    (lambda logits: (logits, logits), "a tuple", "[0]"),
    (lambda logits: SimpleNamespace(logits=logits), "a SimpleNamespace", ".logits"),
    (lambda logits: logits[:, :, None, None], "a tensor of shape (1, 27, 1, 1)", ".flatten(1)"),
]


@pytest.mark.parametrize(("form", "what", "part"), FORMS)
def test_a_network_that_returns_something_else_than_logits_says_how_to_wrap_it(
    form: Callable[[Tensor], object], what: str, part: str
) -> None:
    network = Wrapped(form)
    message = (
        f"checkpoint must be a network that returns logits (N, classes), got {what}; wrap it in an nn.Module with "
        f"def forward(self, images): return self.network(images){part}."
    )
    with pytest.raises(ArgumentError, match=exactly(message)):
        Predictor(network, device="cpu", **NAMED)(RGB)
    advised = eval(f"lambda outputs: outputs{part}")
    network = Wrapped(lambda logits: advised(form(logits)))
    assert Predictor(network, device="cpu", **NAMED)(RGB) == looking()(RGB)


def test_tta_and_precision_can_be_chosen(tmp_path: Path) -> None:
    recipe = Recipe(weights=None, augment=VIEW, precision="bfloat16", tta=False)
    model = build("resnet18", 3, weights=None).state_dict()
    kept = Checkpoint(recipe=recipe, classes=tuple("abc"), model=model, epoch=0)
    exact = replace(kept, recipe=replace(recipe, precision="float32"))
    assert predict(kept, RGB, precision="float32", device="cpu") == predict(exact, RGB, device="cpu")
    assert predict(kept, RGB, device="cpu") != predict(exact, RGB, device="cpu")
    twice = predict(exact, RGB, tta=True, device="cpu")
    assert twice == predict(replace(exact, recipe=replace(exact.recipe, tta=True)), RGB, device="cpu")
    alone = [predict(exact, RGB, tta=tta, device="cpu") for tta in (None, False)]
    assert alone[0] == alone[1] != twice
    both = rows(looking()([RGB, RGB.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]))
    assert rows(looking(tta=True)(RGB))[0] == pytest.approx(both.mean(axis=0), abs=2e-3)
    kept.save(tmp_path / "checkpoint.pt")
    RGB.save(tmp_path / "image.png")
    line = ["predict", str(tmp_path / "checkpoint.pt"), str(tmp_path / "image.png"), "--device", "cpu", "--out"]
    cases: list[tuple[list[str], dict[str, Any]]] = [
        (["--tta"], {"tta": True}),
        (["--no-tta", "--precision", "float32"], {"precision": "float32"}),
    ]
    for flags, values in cases:
        assert main([*line, str(tmp_path / "1.csv"), *flags]) == 0
        predict(kept, tmp_path / "image.png", out=tmp_path / "2.csv", device="cpu", **values)
        assert (tmp_path / "1.csv").read_text() == (tmp_path / "2.csv").read_text()


def test_a_precision_other_than_that_of_the_weights_needs_weights_in_float32() -> None:
    rounded, exact = (rows(looking(precision=kind)(RGB)) for kind in ("bfloat16", "float32"))
    assert (rounded != exact).any()
    assert np.abs(rounded - exact).max() < 0.01
    said = "precision must be None or 'bfloat16' with a network whose weights are bfloat16, got 'float32'."
    with pytest.raises(ArgumentError, match=exactly(said)):
        Predictor(Looking().to(torch.bfloat16), precision="float32", **NAMED)
