"""The formats of exported files: how each is written, and how it is run again to prove it."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]  (their types)
from torch import Tensor, nn
from torchvision import models  # pyright: ignore[reportMissingTypeStubs]

from fastflower.errors import ArgumentError
from fastflower.exporting.graph import Classifier, RawView
from fastflower.loading.batch import Pixels
from fastflower.models.checkpoint import Checkpoint
from fastflower.models.inference import view_of
from fastflower.models.timm_networks import PREFIX, library
from fastflower.models.torchvision_networks import V1, arguments_of
from fastflower.reporting.record import Json

if TYPE_CHECKING:
    from onnx import GraphProto

Run = Callable[[Pixels], NDArray[np.float32]]
"""Runs an exported file on one image, (H, W, 3) uint8 of RGB: (K,) probabilities."""

OPSET = 18
"""Of ONNX. Read by onnxruntime from 1.14 and by TensorRT from 8.6."""
_EXAMPLE = (300, 400)  # pixels of the image that the graph is recorded with
_MOST_BYTES = 2**31  # of a protobuf, which an .onnx file is
SUFFIXES = (".onnx", ".pt2", ".safetensors", ".pt")


@dataclass(frozen=True, slots=True)
class Exported:
    """What is exported: a trained network with its view, and what the file says of itself."""

    checkpoint: Checkpoint
    facts: Json
    shape: tuple[int, int] | None = None
    """(height, width) of a batch's images. None: one image of any size."""

    def network(self) -> nn.Module:
        """Return the trained network, which maps (N, 3, h, w) to logits."""
        return self.checkpoint.network().requires_grad_(requires_grad=False)

    def classifier(self, network: nn.Module | None = None) -> Classifier:
        """Return a network, by default the trained one, with the view before it and softmax after it."""
        recipe = self.checkpoint.recipe
        return Classifier(RawView(view_of(recipe)), network or self.network(), tta=recipe.tta).eval()


def write(exported: Exported, path: Path) -> list[Path]:
    """Write a file in the format of its suffix; return it and those beside it. Raises ArgumentError if that is impossible."""
    writers = {".onnx": write_onnx, ".pt2": write_pt2, ".safetensors": write_safetensors, ".pt": write_tensors}
    return [path, *writers[path.suffix](exported, path)]


def runner(exported: Exported, path: Path) -> Run:
    """Return a function that runs a written file as its users will: without the checkpoint and without fastflower's network."""
    makers = {".onnx": run_onnx, ".pt2": run_pt2, ".safetensors": run_safetensors, ".pt": run_tensors}
    return makers[path.suffix](exported, path)


def write_onnx(exported: Exported, path: Path) -> list[Path]:
    """Write an ONNX file."""
    onnx, _ = onnx_package("onnx"), onnx_package("onnxscript")
    if sum(value.nbytes for value in exported.checkpoint.model.values()) >= _MOST_BYTES:
        raise ArgumentError(f"out: {path.name} would be larger than 2 GB, the limit of ONNX; export to .pt2 instead.")
    program = _program(exported)
    with quiet():
        made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)  # pyright: ignore[reportUnknownMemberType]
    assert made is not None  # None only with a file to write
    model = made.model_proto
    rows, columns = exported.shape or ("height", "width")
    (given,), (found,) = model.graph.input, model.graph.output
    _rename(model.graph, {given.name: "pixels", found.name: "probabilities"})
    batch = [] if exported.shape is None else ["batch"]
    for value, sides in ((given, [*batch, rows, columns, 3]), (found, [*batch, len(exported.checkpoint.classes)])):
        for dimension, side in zip(value.type.tensor_type.shape.dim, sides, strict=True):
            dimension.Clear()
            setattr(dimension, "dim_param" if isinstance(side, str) else "dim_value", side)
    del model.graph.value_info[:]  # shapes in between, under torch's names of the dimensions
    model.producer_name = "fastflower"
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in exported.facts.items()})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return []


def run_onnx(exported: Exported, path: Path) -> Run:
    """Return what runs an ONNX file on the CPU by onnxruntime."""
    session = session_of(path)

    def run(pixels: Pixels) -> NDArray[np.float32]:
        (rows,) = session.run(None, {"pixels": pixels if exported.shape is None else pixels[None]})
        return rows.reshape(-1)

    return run


class Session(Protocol):
    """An onnxruntime session."""

    def run(self, outputs: None, inputs: Mapping[str, Pixels]) -> list[NDArray[np.float32]]:
        """Return the outputs."""
        ...


def session_of(path: Path) -> Session:
    """Return an onnxruntime session on the CPU."""
    return onnx_package("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])


def write_pt2(exported: Exported, path: Path) -> list[Path]:
    """Write a program of torch.export."""
    with quiet():
        torch.export.save(_program(exported), path, extra_files={"fastflower.json": json.dumps(exported.facts)})
    return []


def run_pt2(exported: Exported, path: Path) -> Run:
    """Return what runs a program of torch.export."""
    with quiet():
        return _in_torch(torch.export.load(path).module(), batched=exported.shape is not None)


def write_safetensors(exported: Exported, path: Path) -> list[Path]:
    """Write the tensors, and config.json beside them, from which timm's create_model or torchvision's get_model builds."""
    recipe, facts = exported.checkpoint.recipe, exported.facts
    if recipe.backbone in V1:
        what = f"{recipe.backbone} is not a network of torchvision or timm, so none of their functions would load it"
        raise ArgumentError(f"out: {what}; export to .onnx or .pt2 instead.")
    tensors = {name: value.contiguous().clone() for name, value in exported.checkpoint.model.items()}
    save_file(tensors, path, metadata={"format": "pt", **{name: json.dumps(value) for name, value in facts.items()}})
    config = path.with_name("config.json")
    config.write_text(json.dumps(_config(exported), indent=2, ensure_ascii=False), "utf-8")
    return [config]


def _config(exported: Exported) -> Json:
    """Return what timm's hub reads; for a network of torchvision, the same with its name and arguments."""
    recipe, classes = exported.checkpoint.recipe, exported.checkpoint.classes
    mean, std = recipe.augment.normalization
    height, width = recipe.augment.output_size
    resize = recipe.augment.resized
    shorter = resize if isinstance(resize, int) else min(resize) if isinstance(resize, tuple) else height
    pretrained = {
        "input_size": (3, height, width),
        "crop_pct": min(height, width) / shorter,
        "crop_mode": "squash" if isinstance(resize, tuple) else "center",
        "interpolation": "bilinear",
        "mean": mean,
        "std": std,
        "num_classes": len(classes),
    }
    of_timm = recipe.backbone.startswith(PREFIX)
    name = recipe.backbone.removeprefix(PREFIX).partition(".")[0]
    named: Json = {"architecture": name, "library": "timm" if of_timm else "torchvision", "num_classes": len(classes)}
    if of_timm:
        named["model_args"] = _timm_arguments(recipe.backbone, (height, width))
    else:
        named["arguments"] = {"num_classes": len(classes), **arguments_of(name)}
    return {**named, "label_names": list(classes), "pretrained_cfg": pretrained, "fastflower": exported.facts}


def _timm_arguments(backbone: str, size: tuple[int, int]) -> Json:
    """Return the arguments that build a network for one size for another one."""
    known = library(backbone).get_pretrained_cfg(backbone.removeprefix(PREFIX))
    other = known is not None and known.fixed_input_size and known.input_size[1:] != size
    return {"img_size": size} if other else {}


def run_safetensors(exported: Exported, path: Path) -> Run:
    """Return what runs the tensors in the network that config.json names, built by its own library, after our view."""
    config = json.loads(path.with_name("config.json").read_text("utf-8"))
    if config["library"] == "timm":
        network: nn.Module = library(PREFIX).create_model(f"local-dir:{path.parent}", pretrained=True)
    else:
        network = models.get_model(config["architecture"], weights=None, **config["arguments"])
        network.load_state_dict(load_file(path))
    return _in_torch(exported.classifier(network.eval()), batched=False)


def write_tensors(exported: Exported, path: Path) -> list[Path]:
    """Write the tensors for torch.load with weights_only=True."""
    torch.save({"state_dict": exported.checkpoint.model, **_plain(exported.facts)}, path)
    return []


def run_tensors(exported: Exported, path: Path) -> Run:
    """Return what runs the tensors in the network that they are named after, after our view."""
    content = torch.load(path, weights_only=True)
    network = exported.network()
    network.load_state_dict(content["state_dict"])
    return _in_torch(exported.classifier(network), batched=False)


def _plain(value: Json) -> Json:
    return json.loads(json.dumps(value))


def _program(exported: Exported) -> torch.export.ExportedProgram:
    """Record the graph. Raises ArgumentError if the network cannot be recorded."""
    height, width = exported.shape or _EXAMPLE
    sample = torch.zeros(height, width, 3, dtype=torch.uint8)
    if exported.shape is None:
        dynamic = {0: torch.export.Dim("height", min=1), 1: torch.export.Dim("width", min=1)}
    else:
        sample, dynamic = sample.expand(2, -1, -1, -1).contiguous(), {0: torch.export.Dim("batch", min=1)}
    try:
        with quiet():
            return torch.export.export(exported.classifier(), (sample,), dynamic_shapes={"pixels": dynamic})
    except Exception as error:  # of torch's compiler, which has many
        name, lines = exported.checkpoint.recipe.backbone, str(error).strip().splitlines() or [""]
        raise ArgumentError(
            f"out: torch.export cannot record {name} ({type(error).__name__}: {lines[0]}); export to .safetensors instead."
        ) from error


def _in_torch(module: nn.Module, *, batched: bool) -> Run:
    def run(pixels: Pixels) -> NDArray[np.float32]:
        image = torch.from_numpy(np.array(pixels))  # a copy that can be written, or torch warns  # pyright: ignore[reportUnknownMemberType]
        with torch.inference_mode():
            rows: Tensor = module(image[None] if batched else image)
        return rows.reshape(-1).numpy()

    return run


def _rename(graph: "GraphProto", names: dict[str, str]) -> None:
    """Rename values of a graph."""
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for listed in (node.input, node.output):
            listed[:] = [names.get(name, name) for name in listed]


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keep torch's exporter and its packages from printing and warning about their own internals."""
    loud = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)


def onnx_package(name: str) -> ModuleType:
    """Import onnx, onnxscript or onnxruntime, or a module of theirs. Raises ArgumentError if it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ArgumentError(f"out: .onnx needs the package {package}; run pip install 'fastflower[onnx]'.") from None
