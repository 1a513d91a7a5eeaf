"""Order of `Scores`: labels, probabilities and paths follow the index in the split, so they can be zipped."""

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bad_server import BadServer
from packs import draw_image
from training_runs import RECIPE

from fastflower import Checkpoint, Loader, Report, evaluate, pack, predict, train
from fastflower.models.metrics import Scores, score
from fastflower.shards.reader import ShardReader
from fastflower.shards.remote import Remote

pytestmark = pytest.mark.usefixtures("narrow", "no_figures")


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return train(shards, replace(RECIPE, epochs=1), out=tmp_path_factory.mktemp("runs") / "run", device="cpu")


def agree(scores: Scores, shards: Path, flowers: Path, split: str) -> None:
    """Assert that row i of paths and labels belongs to sample i of the split."""
    loader = Loader(shards, split, device="cpu", cache=None)
    assert len(scores.paths) == scores.num_samples == loader.num_samples
    assert list(scores.paths) == [loader.path_of(index) for index in range(loader.num_samples)]
    assert {(Path(path).parent.name, path) for path in scores.paths} <= {
        (path.parent.name, str(path.relative_to(flowers))) for path in flowers.glob("*/*.jpg")
    }
    for path, label in zip(scores.paths, scores.labels, strict=True):
        assert scores.classes[label] == Path(path).parent.name


@pytest.mark.parametrize("split", ["val", "train"])
def test_scores_follow_the_index_in_the_split(run: Report, shards: Path, flowers: Path, split: str) -> None:
    scores = evaluate(run.checkpoint, shards, split=split, device="cpu")
    agree(scores, shards, flowers, split)
    assert np.array_equal(scores.predictions, scores.probabilities.argmax(axis=1))
    shown = range(0, scores.num_samples, 7)
    alone = predict(run.checkpoint, [flowers / scores.paths[index] for index in shown], device="cpu")
    for index, one in zip(shown, alone, strict=True):
        assert list(one.probabilities.values()) == pytest.approx(scores.probabilities[index].tolist(), abs=1e-4)


def test_scores_of_training_follow_the_same_order(run: Report, shards: Path, flowers: Path) -> None:
    assert run.scores is not None
    agree(run.scores, shards, flowers, "val")
    again = evaluate(run.checkpoint, shards, device="cpu")
    assert np.array_equal(run.scores.labels, again.labels)
    assert np.allclose(run.scores.probabilities, again.probabilities, atol=1e-5)
    assert list(run.scores.paths) == list(again.paths)


def test_scores_have_the_paths_of_remote_shards_and_of_names_that_are_not_ascii(
    run: Report, source: Remote, server: BadServer, shards: Path, flowers: Path, tmp_path: Path
) -> None:
    del server
    scores = evaluate(run.checkpoint, source, device="cpu")
    agree(scores, shards, flowers, "val")
    for name in ("a", "é"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            draw_image(number).save(tmp_path / "data" / name / f"ü {number}.jpg")
    pack(tmp_path / "data", tmp_path / "shards", val_fraction=0.5)
    checkpoint = Checkpoint.load(run.checkpoint)
    model = {name: value[:2] if name.startswith("fc.") else value for name, value in checkpoint.model.items()}
    two = replace(checkpoint, classes=("a", "é"), model=model)
    found = evaluate(two, tmp_path / "shards", device="cpu")
    assert len(found.paths) == 4
    assert all((tmp_path / "data" / path).exists() for path in found.paths)


def test_paths_are_a_lazy_sequence(run: Report, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    path = ShardReader.path

    def counted(self: ShardReader, index: int) -> str:
        asked.append(index)
        return path(self, index)

    monkeypatch.setattr(ShardReader, "path", counted)
    paths = evaluate(run.checkpoint, shards, device="cpu").paths
    assert asked == []
    assert isinstance(paths, Sequence)
    first, last = paths[0], paths[-1]
    assert asked == [0, 29]
    assert paths[np.argmax([1, 0])] == first  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert paths[:2] == (first, paths[1])
    assert paths[::-1][0] == last
    assert paths.index(last) == 29
    assert last in paths
    with pytest.raises(IndexError):
        paths[30]
    for copied in (pickle.loads(pickle.dumps(paths)), copy.deepcopy(paths)):
        assert copied == tuple(paths)


def test_scores_computed_from_arrays_have_no_paths() -> None:
    assert score(("a", "b"), np.array([0, 1]), np.log(np.full((2, 2), 0.5, np.float32))).paths == ()
