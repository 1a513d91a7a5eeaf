"""What DALI's graph asks a GPU for, and which backend scores on one: as far as can be seen without a GPU."""

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
def test_the_graph_asks_a_gpu_for_nothing_that_it_lacks(dtype: torch.dtype) -> None:
    """No decoding of regions, which is reported to crash there, and nothing after the conversion to half precision, in which it
    cannot erase.
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
def test_workers_are_threads_in_all(shards: Path) -> None:
    for workers in (1, 2, 17):
        backend: Any = Loader(shards, device="cpu", backend="dali", cache=None, workers=workers)._backend
        threads = backend.threads + backend.pipeline().num_threads
        assert threads == max(2, workers), "one at least reads, one decodes"


def test_evaluate_takes_the_backend_of_training(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the cache decides, which is "auto" in training: None would mean DALI."""
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
