"""Diagnosis: the measured bottleneck, in one sentence."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastflower import Augment, Loader, Recipe
from fastflower.cli import main
from fastflower.errors import ArgumentError
from fastflower.training import diagnosis
from fastflower.training.diagnosis import Diagnosis, diagnose
from fastflower.training.run import Run

SMALL = Recipe(weights=None, augment=Augment(size=32, resize=36, flip=0.5, hue=0.1), batch_size=16)


def test_both_rates_are_measured_and_the_bottleneck_is_named(shards: Path) -> None:
    found = diagnose(shards, SMALL, seconds=0.3, device="cpu")
    assert found.stats.images > 0
    assert found.loading_rate > found.training_rate > 0
    table = str(found).splitlines()
    assert table[0].startswith("loading alone ")
    assert table[1].endswith("images/s on cpu")
    assert table[-1].startswith("training is the bottleneck: data loading alone is ")


def test_slow_loading_is_blamed_on_its_slowest_part(shards: Path) -> None:
    loader = Loader(shards, augment=SMALL.augment, batch_size=16, device="cpu", cache=None)
    list(loader)
    stats = loader.stats()
    slow = {
        "reading": replace(stats, read_seconds=99.0),
        "decoding": replace(stats, decode_seconds=99.0),
        "augmenting": replace(stats, augment_seconds=99.0),
    }
    for what, changed in slow.items():
        sentence = str(Diagnosis(loading_rate=10, training_rate=20, stats=changed, device="cpu")).splitlines()[-1]
        assert sentence.startswith("data loading is the bottleneck: the consumer waited ")
        assert f"mostly for {what}; " in sentence


def test_the_diagnosis_loads_with_the_backend_of_training(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If training renders cached images on the GPU, the doctor must not measure DALI."""
    made: list[Loader] = []
    monkeypatch.setattr(diagnosis, "Loader", lambda *args, **how: made.append(Loader(*args, **how)) or made[-1])

    class Opencv(Run):
        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            self.loader = Loader(shards, batch_size=16, device="cpu", backend="opencv")

    monkeypatch.setattr(diagnosis, "Run", Opencv)
    diagnose(shards, SMALL, seconds=0.1, device="cpu")
    assert [loader.backend for loader in made] == ["opencv"]


def test_a_diagnosis_of_zero_seconds_is_refused(shards: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^seconds must be a number above 0, got 0\.$"):
        diagnose(shards, SMALL, seconds=0)


def test_the_doctor_command_prints_the_bottleneck(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seconds", "0.2", "--device", "cpu", "--augment.size", "32", "--augment.resize", "36"]
    assert main(["doctor", str(shards), *arguments]) == 0
    assert "is the bottleneck: " in capsys.readouterr().out
