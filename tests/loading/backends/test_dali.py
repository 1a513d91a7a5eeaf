"""DALI's graph, and the choice of the backend for evaluation, as far as they can be tested without a GPU."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import parity
import pytest
import torch

from fastflower import Augment, Checkpoint, Loader, evaluate, train
from fastflower.models import evaluation
from fastflower.recipes.recipe import Recipe

EVERYTHING = replace(parity.CASES["everything"].augment, erase=0.5)


@pytest.mark.dali
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_the_graph_uses_only_what_works_on_a_gpu(dtype: torch.dtype) -> None:
    """It decodes no regions, which is reported to crash, and erases before the conversion to half precision, where a
    GPU cannot erase.
    """
    from fastflower.loading.backends import dali

    graph: Any = dali._graph
    options = {"batch_size": 2, "num_threads": 1, "device_id": None, "prefetch_queue_depth": 2}
    pipe = graph(EVERYTHING, dtype, False, **options)
    pipe.build()
    names = dict.fromkeys(re.findall(rb"decoders__[A-Z]\w+|Erase|CropMirrorNormalize", pipe.serialize()))
    assert list(names) == [b"decoders__Image", b"Erase", b"CropMirrorNormalize"]
    assert dali.HW_DECODER_LOAD == 0


@pytest.mark.dali
def test_workers_is_the_total_number_of_threads(shards: Path) -> None:
    for workers in (1, 2, 17):
        backend: Any = Loader(shards, device="cpu", backend="dali", cache=None, workers=workers)._backend
        threads = backend.threads + backend.pipeline().num_threads
        assert threads == max(2, workers), "at least one reads and one decodes"


def test_evaluate_uses_the_backend_of_training(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the cache argument decides: training uses "auto", and None would choose DALI."""
    recipe = Recipe(weights=None, augment=Augment(size=32, resize=36), epochs=1, batch_size=24, lr=0.01)
    checkpoint = Checkpoint.load(train(shards, recipe, out=tmp_path / "run", device="cpu").checkpoint)
    asked: dict[str, Any] = {}

    class AskedError(Exception):
        pass

    def loader(*_: Any, **how: Any) -> None:
        asked.update(how)
        raise AskedError

    monkeypatch.setattr(evaluation, "Loader", loader)
    for device, cache in (("cuda", "auto"), ("cpu", None)):
        monkeypatch.setattr(evaluation, "resolve_device", lambda _, device=device: torch.device(device))
        monkeypatch.setattr(evaluation, "precision_of", lambda *_: torch.float32)
        with pytest.raises(AskedError):
            evaluate(checkpoint, shards)
        assert asked["cache"] == cache
