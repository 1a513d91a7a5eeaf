"""The worked examples in docstrings, run as they stand, in a folder with flowers/ and shards/."""

import doctest
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from places import ROOT

PACKAGE = ROOT / "fastflower"
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples() -> Iterator[doctest.DocTest]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>>" in path.read_text():
            module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            yield from (found for found in doctest.DocTestFinder().find(module) if found.examples)


EXAMPLES = {example.name.removeprefix("fastflower."): example for example in examples()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_happens(
    name: str, flowers: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flowers").symlink_to(flowers)
    (tmp_path / "shards").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    said: list[str] = []
    ran = doctest.DocTestRunner(optionflags=OPTIONS).run(EXAMPLES[name], out=said.append)
    assert not ran.failed, "".join(said)
    assert ran.attempted
