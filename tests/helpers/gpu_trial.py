"""Runs parts of the GPU check on a machine without a GPU."""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch
from common import images
from common.gpu_part import Part, Place
from torchvision import models

CPU = torch.device("cpu")
MARKS = [
    pytest.mark.usefixtures("nothing_to_collect"),  # the baseline forks
    pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, run the check itself"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


def make_place(flowers: Path, folder: Path) -> Place:
    """Pack 20 images, both in one split and in two."""
    few = images.some(flowers, folder / "few", 20)
    weights = folder / "weights.pth"
    torch.save({name: value.half() for name, value in models.resnet18().state_dict().items()}, weights)
    place = Place(few, folder, weights)
    place.prepare(20, 20)
    return place


def make_part(folder: Path) -> Part:
    return Part("tried", folder / "out", CPU, file="gpu_tried", clock="What the\n clock includes.")


def left(part: Part) -> dict[str, Any]:
    """Return what the part saved, after checking what every file must contain."""
    assert part.failed == [], (part.out / "failures.log").read_text()
    part.save(finished=True)
    (path,) = part.out.glob("*.json")
    content = json.loads(path.read_text())
    assert path.name == f"gpu_tried_cpu_{time.strftime('%Y%m%d', time.gmtime())}.json"
    assert content["versions"]["torch"] == version("torch")
    assert {"triton", "nvidia-dali-cuda130"} <= content["versions"].keys()
    assert {"commit", "when", "hardware"} <= content.keys()
    found = content["parts"]["tried"]
    assert found["clock"] == "What the clock includes."
    assert found["rows"] == part.rows
    assert found["seconds"] > 0
    assert found["left_out"] == []
    return found


def check_side(side: dict[str, Any], rounds: int, baseline: str) -> None:
    assert len(side["seconds"]) == side["n"] == rounds
    assert len(side["warm_up_seconds"]) == 1
    assert side["images"] > 0
    assert side["baseline"] == baseline
    assert side["ratio"] > 0
    rates = side["images_per_second"]
    assert rates["n"] == rounds
    assert 0 < rates["min"] <= rates["median"] <= rates["max"]


def row_of(part: Part, name: str) -> str:
    return part.rows[name]


def run(name: str, part: Part, place: Place, **changes: Any) -> None:
    """Run a part at the size for a machine without a GPU."""
    gpu_check.PARTS[name](part, place, **{**gpu_check.TINY.get(name, {}), **changes})
