"""Programs that run an exported file, without fastflower. Each classifies photo.jpg."""

from fastflower.exporting.formats import Exported

_READ = """\
import numpy as np
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")  # upright, as predict reads it
{fit}pixels = np.array(image)  # (H, W, 3) uint8
"""
_ONNX = """\
import json

import onnxruntime
{read}
session = onnxruntime.InferenceSession({file!r})
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
probabilities = session.run(None, {{"pixels": pixels{batch}}})[0]{first}
print(classes[probabilities.argmax()], probabilities.max())
"""
_PT2 = """\
import json

import torch
{read}
facts = {{"fastflower.json": ""}}
network = torch.export.load({file!r}, extra_files=facts).module()
classes = json.loads(facts["fastflower.json"])["classes"]
with torch.inference_mode():
    probabilities = network(torch.from_numpy(pixels){batch}){first}
print(classes[probabilities.argmax()], float(probabilities.max()))
"""
_TIMM = """\
import timm
network = timm.create_model("local-dir:{folder}", pretrained=True).eval()
"""
_TORCHVISION = """\
import json
import torchvision
from safetensors.torch import load_file

with open("{folder}/config.json") as file:
    config = json.load(file)
network = torchvision.models.get_model(config["architecture"], **config["arguments"]).eval()
network.load_state_dict(load_file({file!r}))
"""
_TENSORS = """\
import torch

content = torch.load({file!r}, weights_only=True)
# Load content["state_dict"] into {backbone} with {count} outputs. content["classes"] names them.
"""
_AFTER = """\
# The network maps normalized images (N, 3, {size[0]}, {size[1]}) to logits: resize with antialiasing ({resize}), crop the
# center, divide by 255, subtract {mean}, divide by {std}.
"""


def snippet(exported: Exported, file: str) -> str:
    """Return a Python program that runs a file. file  Its path as it is typed."""
    suffix, recipe = file[file.rindex(".") :], exported.checkpoint.recipe
    fit = "" if exported.shape is None else f"image = image.resize(({exported.shape[1]}, {exported.shape[0]}))\n"
    read, batch, first = (
        _READ.format(fit=fit),
        "" if exported.shape is None else "[None]",
        "[0]" if exported.shape else "",
    )
    if suffix in (".onnx", ".pt2"):
        return (_ONNX if suffix == ".onnx" else _PT2).format(read=read, file=file, batch=batch, first=first)
    folder = file.rpartition("/")[0] or "."
    of_timm = recipe.backbone.startswith("timm/")
    form = _TENSORS if suffix == ".pt" else _TIMM if of_timm else _TORCHVISION
    mean, std = recipe.augment.normalization
    view = _AFTER.format(size=recipe.augment.output_size, resize=recipe.augment.resized, mean=mean, std=std)
    named = {"file": file, "folder": folder, "backbone": recipe.backbone, "count": len(exported.checkpoint.classes)}
    return form.format(**named) + view
