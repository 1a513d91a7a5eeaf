"""export: every format answers as `predict` does, without fastflower; what cannot be exported is said, and leaves no file."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from looking import encoded, smooth, turned
from safetensors import safe_open
from training_runs import RECIPE

from fastflower import Checkpoint, Recipe, export, predict, train
from fastflower.cli import main
from fastflower.errors import ArgumentError, ExportError
from fastflower.exporting import formats, proof, quantization
from fastflower.exporting.card import interval
from fastflower.exporting.facts import facts_of, license_of
from fastflower.models.backbone import build

VIEW = replace(RECIPE.augment, size=64, resize=72)
FORMATS = (".onnx", ".pt2", ".pt", ".safetensors")
FILES = {
    "turned.jpg": encoded(smooth(100, 75), "JPEG", quality=95, **turned(6)),
    "gray.jpg": encoded(smooth(75, 100).convert("L"), "JPEG"),
    "cmyk.jpg": encoded(smooth(80, 80).convert("CMYK"), "JPEG", quality=95),
    "narrow.png": encoded(smooth(80, 80).resize((1, 90)), "PNG"),
    "large.jpg": encoded(smooth(3000, 2000), "JPEG"),
}


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch."""
    recipe = replace(RECIPE, backbone="timm/test_resnet", augment=VIEW, epochs=1, tta=True)
    return train(shards, recipe, out=tmp_path_factory.mktemp("export") / "run", device="cpu").folder


@pytest.fixture(scope="module")
def folder_of_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder_of_images")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each format."""
    folder = tmp_path_factory.mktemp("exported")
    for suffix in FORMATS:
        export(run, folder / f"flowers{suffix}")
    return folder


def answers_of(file: Path, folder_of_images: Path) -> dict[str, list[float]]:
    """Return the probabilities of all images by the snippet of a file's card, in a process that cannot import fastflower."""
    (snippet,) = [
        part.split("```")[0] for part in file.with_name(f"{file.name}.md").read_text().split("```python\n")[1:]
    ]
    loop = f"import sys; sys.modules['fastflower'] = None\nimport json, glob\nfound = {{}}\nfor name in {sorted(FILES)!r}:\n"
    body = snippet.replace('"photo.jpg"', "name") + "\nfound[name] = [float(one) for one in probabilities]"
    assert '"photo.jpg"' in snippet
    program = loop + "".join(f"    {line}\n" for line in body.splitlines()) + "print(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder_of_images, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_the_snippet_of_the_card_gives_the_answers_of_predict_without_fastflower(
    run: Path, exported: Path, folder_of_images: Path, suffix: str
) -> None:
    """EXIF-turned, gray, CMYK, one pixel wide, 6 megapixels."""
    found = answers_of(exported / f"flowers{suffix}", folder_of_images)
    expected = predict(run, [folder_of_images / name for name in sorted(FILES)], precision="float32", device="cpu")
    for one in expected:
        assert one.path is not None
        np.testing.assert_allclose(found[one.path.name], list(one.probabilities.values()), atol=0.02, err_msg=one.name)


def test_the_metadata_of_each_format_names_classes_view_origin_and_version(run: Path, exported: Path) -> None:
    import onnx

    onnx_facts = {entry.key: json.loads(entry.value) for entry in onnx.load(exported / "flowers.onnx").metadata_props}
    extra = {"fastflower.json": ""}
    torch.export.load(exported / "flowers.pt2", extra_files=extra)
    with safe_open(exported / "flowers.safetensors", "pt") as file:  # pyright: ignore[reportUnknownVariableType]
        tensor_facts = {name: json.loads(value) for name, value in file.metadata().items() if name != "format"}
    plain = torch.load(exported / "flowers.pt", weights_only=True)
    config = json.loads((exported / "config.json").read_text())
    for facts in (onnx_facts, json.loads(extra["fastflower.json"]), tensor_facts, plain, config["fastflower"]):
        assert facts["classes"] == list(Checkpoint.load(run).classes)
        assert facts["view"]["size"] == [64, 64]
        assert facts["view"]["resize"] == 72
        assert facts["backbone"] == "timm/test_resnet"
        whole = facts in (onnx_facts, json.loads(extra["fastflower.json"]))
        assert facts["input"].startswith("(H, W, 3) uint8" if whole else "(N, 3, 64, 64) float32")
        assert facts["pretrained_weights"] is None
        assert facts["versions"].keys() == {"fastflower", "torch"}
        assert "exif_transpose" in facts["orientation"]


def test_an_onnx_file_has_standard_operators_only_and_no_resize(exported: Path) -> None:
    import onnx

    model = onnx.load(exported / "flowers.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import if entry.domain == ""] == [
        ("", formats.OPSET)
    ]
    assert {node.domain for node in model.graph.node} == {""}
    assert "Resize" not in {node.op_type for node in model.graph.node}
    (given,), (found,) = model.graph.input, model.graph.output
    assert [side.dim_param or side.dim_value for side in given.type.tensor_type.shape.dim] == ["height", "width", 3]
    assert [side.dim_param or side.dim_value for side in found.type.tensor_type.shape.dim] == [5]


def test_timm_builds_the_network_from_the_exported_folder(run: Path, exported: Path) -> None:
    import timm

    network = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), Checkpoint.load(run).network()(images))
    assert vars(network)["pretrained_cfg"]["label_names"] == list(Checkpoint.load(run).classes)


@pytest.mark.parametrize("backbone", ["mobilenet_v3_small", "googlenet"])
def test_torchvision_builds_the_network_by_the_snippet(tmp_path: Path, backbone: str) -> None:
    checkpoint = untrained(backbone)
    export(checkpoint, tmp_path / "model.safetensors")
    snippet = (tmp_path / "model.safetensors.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(snippet, names)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(names["network"](images), checkpoint.network()(images))


def untrained(backbone: str = "timm/test_resnet", **changes: Any) -> Checkpoint:
    torch.manual_seed(0)
    recipe = Recipe(backbone=backbone, weights=None, augment=VIEW, precision="float32", **changes)
    model = build(backbone, 5, weights=None, size=(64, 64)).state_dict()
    return Checkpoint(recipe=recipe, classes=tuple("abcde"), model=model, epoch=0)


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".pt2", marks=pytest.mark.soak)])
def test_a_batched_file_takes_any_number_of_images_of_its_size(suffix: str, tmp_path: Path) -> None:
    checkpoint, out = untrained(), tmp_path / f"batched{suffix}"
    export(checkpoint, out, batched="60x80")
    pixels = np.stack([np.array(smooth(80, 60, seed)) for seed in range(3)])
    if suffix == ".onnx":
        (found,) = formats.session_of(out).run(None, {"pixels": pixels})
    else:
        found = torch.export.load(out).module()(torch.from_numpy(pixels)).detach().numpy()
    expected = predict(checkpoint, list(pixels), device="cpu")
    np.testing.assert_allclose(found, [list(one.probabilities.values()) for one in expected], atol=0.01)


def test_the_command_prints_files_and_proof(run: Path, folder_of_images: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(run), str(tmp_path / "flowers.pt"), "--prove", str(folder_of_images)]) == 0
    said = capsys.readouterr().out
    assert f"wrote {tmp_path / 'flowers.pt'} and {tmp_path / 'flowers.pt.md'}" in said
    assert f"proof: 5 images of {folder_of_images}: same class for 5, largest difference of a probability 0." in said


def test_the_proof_takes_the_runs_val_split_and_says_where_images_are_from(run: Path, tmp_path: Path) -> None:
    own = export(run, tmp_path / "own.pt").proof
    assert (own.images, own.source) == (30, "of the run's val split")
    other = export(untrained(), tmp_path / "other.pt").proof
    assert (other.images, other.source) == (
        8,
        "drawn here, because the run's val split is not at hand (--prove FOLDER)",
    )


def test_damaged_images_of_the_proof_are_skipped_and_named(tmp_path: Path, caplog: Any) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "bad.jpg").write_bytes(b"no image")
    (folder / "good.jpg").write_bytes(FILES["gray.jpg"])
    assert export(untrained(), tmp_path / "one.pt", prove=folder).proof.images == 1
    assert f"skipped {folder / 'bad.jpg'}" in caplog.text
    (folder / "good.jpg").unlink()
    with pytest.raises(Exception, match=r"none of its images is usable; pass another folder \(--prove\)"):
        export(untrained(), tmp_path / "none.pt", prove=folder)


@pytest.mark.parametrize(("change", "kept"), [(0.0199, True), (0.0201, False)])
def test_a_file_whose_probabilities_differ_is_not_kept(
    change: float, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(exported: formats.Exported, path: Path) -> formats.Run:
        run = formats.runner(exported, path)
        return lambda pixels: run(pixels) + np.float32(change if pixels.shape == (20, 40, 3) else 0)

    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr("fastflower.exporting.export.runner", other)
    if kept:
        export(untrained(), tmp_path / "a.pt")
        return
    with pytest.raises(
        ExportError, match=r"a.pt: its probabilities must be within 0.02 of predict's.*no file was written"
    ):
        export(untrained(), tmp_path / "a.pt")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_another_class_is_refused_but_for_ties() -> None:
    images = proof.Images(
        "of a test", ["a"], [np.zeros((2, 2, 3), np.uint8)], np.array([[0.4, 0.395, 0.205]], np.float32)
    )
    tied = replace(images, expected=np.array([[0.4, 0.3995, 0.2005]], np.float32))
    swapped = np.array([0.395, 0.4, 0.205], np.float32)
    assert proof.proof_of(lambda _: swapped, images).same == 0
    with pytest.raises(ExportError, match="same class for 0"):
        proof.require_proof(proof.proof_of(lambda _: swapped, images), "file")
    proof.require_proof(proof.proof_of(lambda _: swapped, tied), "file")
    nan = np.full(3, np.nan, np.float32)
    with pytest.raises(ExportError):
        proof.require_proof(proof.proof_of(lambda _: nan, images), "file")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "suffix": ({"out": "flowers.h5"}, r"out must be a file with one of the suffixes .onnx, .*, .pt, got 'flowers.h5'"),
    "size": ({"out": "a.onnx", "batched": "big"}, r"batched must be height and width in pixels, as in 480x640, got 'big'"),
    "zero": ({"out": "a.onnx", "batched": (0, 3)}, r"batched must be height and width in pixels, as in 480x640, got 0"),
    "batched": ({"out": "a.pt", "batched": "48x64"}, r"batched must be None with .pt, got '48x64'"),
    "folder": ({"out": "file/a.pt"}, r"out: file/a.pt cannot be written \(.*\); choose a file in a writable folder"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_exported_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ArgumentError, match=message):
        export(untrained(), **options)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_folders_are_made_and_stay_only_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(untrained(), tmp_path / "new" / "one" / "a.pt")
    assert {path.name for path in (tmp_path / "new" / "one").iterdir()} == {"a.pt", "a.pt.md"}
    monkeypatch.setattr(proof, "TOLERANCE", -1.0)
    with pytest.raises(ExportError):
        export(untrained(), tmp_path / "other" / "two" / "a.pt")
    assert not (tmp_path / "other").exists()


def test_networks_of_no_library_are_not_exported_as_their_tensors(tmp_path: Path) -> None:
    with pytest.raises(
        ArgumentError, match=r"resnet50_v1 is not a network of torchvision or timm.*export to .onnx or .pt2"
    ):
        export(untrained("resnet50_v1"), tmp_path / "a.safetensors")


def test_config_json_of_other_weights_is_not_overwritten(tmp_path: Path) -> None:
    export(untrained(), tmp_path / "a.safetensors")
    export(untrained(), tmp_path / "a.safetensors")
    with pytest.raises(
        ArgumentError, match=r"holds a.safetensors, and config.json describes one.*choose another folder"
    ):
        export(untrained(), tmp_path / "b.safetensors")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ArgumentError, match=r"holds config.json"):
        export(untrained(), tmp_path / "b.safetensors")


def test_an_int8_file_is_measured_and_kept_only_if_it_agrees(
    run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    checkpoint = Checkpoint.load(run)
    monkeypatch.setattr(quantization, "AGREEMENT", 0.0)
    described = formats.Exported(checkpoint, facts_of(checkpoint, None, raw=True))
    done = quantization.quantized(described, exported / "flowers.onnx", tmp_path / "flowers.int8.onnx")
    assert done.bytes[1] == done.file.stat().st_size < done.bytes[0] == (exported / "flowers.onnx").stat().st_size
    model = onnx.load(done.file)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    assert "classes" in {entry.key for entry in model.metadata_props}
    answers = formats.session_of(done.file).run(None, {"pixels": np.array(smooth(90, 70))})[0]
    assert answers.sum() == pytest.approx(1, abs=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["flowers.int8.onnx"]

    monkeypatch.setattr(quantization, "AGREEMENT", 0.98)
    quantization.require_agreement(done._replace(images=100, same=98), exported / "flowers.onnx")
    with pytest.raises(
        ExportError, match=r"97 of 100 images.*flowers.onnx was written, the int8 file was not. Export without"
    ):
        quantization.require_agreement(done._replace(images=100, same=97), exported / "flowers.onnx")


@pytest.mark.soak
def test_the_command_writes_the_int8_file_or_says_why_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "AGREEMENT", 0.0)
    done = export(run, tmp_path / "flowers.onnx", int8=True).int8
    assert done is not None
    assert done.file == tmp_path / "flowers.int8.onnx"
    assert str(done) in (tmp_path / "flowers.onnx.md").read_text()
    monkeypatch.setattr(quantization, "AGREEMENT", 1.01)
    with pytest.raises(
        ExportError, match=r"of 30 images.*other.onnx was written, the int8 file was not. Export without"
    ):
        export(run, tmp_path / "other.onnx", batched="64x64", int8=True)
    names = {"flowers.onnx", "flowers.onnx.md", "flowers.int8.onnx", "other.onnx", "other.onnx.md"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_int8_needs_the_runs_training_images(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"int8 must be False unless the run's shards are on this machine"):
        export(untrained(), tmp_path / "a.onnx", int8=True)
    with pytest.raises(ArgumentError, match=r"int8 must be False with .pt, got True"):
        export(untrained(), tmp_path / "a.pt", int8=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)


@pytest.mark.usefixtures("without_onnx")
def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"out: .onnx needs the package onnx; run pip install 'fastflower\[onnx\]'"):
        export(untrained(), tmp_path / "a.onnx")


def test_the_card_says_what_a_person_needs_to_know(run: Path, exported: Path) -> None:
    card = (exported / "flowers.pt.md").read_text()
    for title in ("Use", "Scores", "Data", "View", "Recipe", "Proof", "Intended use and limits", "Versions"):
        assert f"\n## {title}\n" in card
    scores = json.loads((run / "run.json").read_text())
    assert "of 30 images" in card
    assert "120 images in train, 30 images in val" in card
    assert f"Trained on {Path(scores['data']['shards']).name}." in card
    assert "after epoch 1 of 1" in card
    assert f"in the order of the output: {', '.join(Checkpoint.load(run).classes)}." in card
    assert "License: none: trained from random weights." in card


@pytest.mark.parametrize(
    ("backbone", "weights", "license_"),
    [
        ("timm/tf_efficientnet_lite0", "lite0", "Apache-2.0"),
        ("resnet18", "DEFAULT", "BSD-3-Clause"),
        ("resnet18", "runs/a", "unknown"),
        ("timm/resnet50.a1_in1k", "DEFAULT", "apache-2.0"),
        ("resnet18", None, "none"),
    ],
)
def test_the_license_of_weights_is_named(backbone: str, weights: str | None, license_: str) -> None:
    assert license_of(backbone, weights).startswith(license_)


def test_the_interval_of_a_share_is_wilsons() -> None:
    from scipy.stats import binomtest

    for correct, count in ((0, 10), (526, 570), (10, 10)):
        own = binomtest(correct, count).proportion_ci(0.95, "wilson")
        assert interval(correct, count) == pytest.approx((own.low, own.high), abs=1e-4)
