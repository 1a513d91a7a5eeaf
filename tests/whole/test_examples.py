"""Runs the examples in docstrings, in a folder with flowers/, shards/ and run/, a finished training."""

import doctest
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from places import ROOT

from fastflower import Augment, Recipe, train

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")

PACKAGE = ROOT / "fastflower"
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples() -> Iterator[doctest.DocTest]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>>" in path.read_text():
            module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            yield from (found for found in doctest.DocTestFinder().find(module) if found.examples)


EXAMPLES = {example.name.removeprefix("fastflower."): example for example in examples()}


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(weights=None, augment=Augment(size=32), epochs=1, batch_size=24)
    return train(shards, recipe, out=tmp_path_factory.mktemp("runs") / "run", device="cpu").folder


def test_the_main_functions_have_an_example() -> None:
    first = ("pack", "Loader", "Augment.draw", "permute", "train", "predict")
    assert [name for name in first if not any(each.endswith(f".{name}") for each in EXAMPLES)] == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(
    name: str, flowers: Path, shards: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, made in {"flowers": flowers, "shards": shards, "run": run}.items():
        (tmp_path / folder).symlink_to(made)
    (tmp_path / "photo.jpg").symlink_to(next((flowers / "rose").iterdir()))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    said: list[str] = []
    ran = doctest.DocTestRunner(optionflags=OPTIONS).run(EXAMPLES[name], out=said.append)
    assert not ran.failed, "".join(said)
    assert ran.attempted
