"""The GPU check's parts at tiny sizes on the CPU: what they leave, and that what fails costs the others nothing."""

import json
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models

from fastflower import Augment, Recipe
from fastflower.backbone import build

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import baseline
import epoch_time
import gpu_check
import gpu_feeding
import gpu_training
import record

pytestmark = [
    pytest.mark.usefixtures("nothing_to_collect"),  # the baseline forks
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine with CUDA the check itself is run"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

CPU = torch.device("cpu")
MAGNIFIED = Augment(size=32, resize=36, crop=(0.008, 0.01), flip=0.5, contrast=0.2)
"""What Triton's interpreter is quick at."""
SMALL = Augment(size=32, resize=36, crop=(0.5, 1.0), flip=0.5)


@pytest.fixture(scope="module")
def place(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> gpu_check.Place:
    """20 photographs: all to train on, and split."""
    folder = tmp_path_factory.mktemp("check")
    few = epoch_time.some(flowers, folder / "few", 20)
    weights = folder / "weights.pth"
    torch.save({name: value.half() for name, value in models.resnet18().state_dict().items()}, weights)
    place = gpu_check.Place(few, folder, weights)
    place.prepare()
    return place


@pytest.fixture
def part(tmp_path: Path) -> record.Part:
    return record.Part("tried", tmp_path / "out", CPU, clock="What the\n clock holds.")


def left(part: record.Part) -> dict[str, Any]:
    """What the part left on the disk, after a look at what every file must hold."""
    assert part.failed == [], (part.out / "failures.log").read_text()
    part.save(finished=True)
    (path,) = part.out.glob("*.json")
    content = json.loads(path.read_text())
    assert path.name == f"gpu_tried_cpu_{time.strftime('%Y%m%d', time.gmtime())}.json"
    assert content["versions"]["torch"] == version("torch")
    assert {"triton", "nvidia-dali-cuda130"} <= content["versions"].keys()
    assert {"commit", "when", "hardware"} <= content.keys()
    found = content["parts"]["tried"]
    assert found["clock"] == "What the clock holds."
    assert found["rows"] == [list(row) for row in part.rows]
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


def row_of(part: record.Part, name: str) -> str:
    (value,) = [value for row, value in part.rows if row == name]
    return value


def test_feeding_is_timed_by_every_way_against_the_baseline(place: gpu_check.Place, part: record.Part) -> None:
    chosen = [way for way in gpu_feeding.ways(1) if "bfloat16" in way.name and "65%" not in way.name]
    assert len(chosen) == 7
    gpu_feeding.feeding(part, place.data, place.all, batch_sizes=(8,), rounds=1, augment=MAGNIFIED, chosen=chosen)
    sides = left(part)["batch_8"]
    assert [side["name"] for side in sides[1:]] == [way.name for way in chosen]
    for side in sides:
        check_side(side, 1, "ImageFolder + DataLoader")
        assert side["images"] % 16 == 0
    assert "goal: at least 350000" in row_of(part, "batch 8: from the cache, the best")
    assert "goal: at least 2" in row_of(part, "batch 8: decoding on the GPU, the best")


def test_every_way_is_one_that_a_loader_knows() -> None:
    from fastflower import dali_executor

    found = gpu_feeding.ways()
    assert len({way.name for way in found}) == len(found) == 13
    assert {way.hw_decoder_load for way in found} == {None, 0.0, 0.65, 1.0}
    assert isinstance(dali_executor.HW_DECODER_LOAD, float)


def test_a_way_that_fails_is_left_out_alone(place: gpu_check.Place, part: record.Part) -> None:
    wrong = gpu_feeding.Way("wrong", {"executor": "none such"})
    chosen = [wrong, gpu_feeding.Way("threads", {"executor": "opencv"})]
    gpu_feeding.feeding(part, place.data, place.all, batch_sizes=(8,), rounds=1, augment=SMALL, chosen=chosen)
    assert part.failed == ["batch 8: wrong"]
    assert [side["name"] for side in part.found["batch_8"]] == ["ImageFolder + DataLoader", "threads"]
    log = (part.out / "failures.log").read_text()
    assert log.startswith("tried: batch 8: wrong\n")
    assert "executor must be one of" in log


def test_kernels_are_timed_for_every_shape_beside_a_step(place: gpu_check.Place, part: record.Part) -> None:
    from fastflower import triton_executor

    before = triton_executor._BLOCK, triton_executor._WARPS
    tiny: dict[str, Any] = {"batch_sizes": (4,), "dtypes": ("bfloat16",), "launches": 1, "steps": 1, "rounds": 2}
    tiny["shapes"] = ((256, 4), (512, 8))
    gpu_feeding.kernels(part, place.all, **tiny, augment=MAGNIFIED)
    assert before == (triton_executor._BLOCK, triton_executor._WARPS)
    found = left(part)
    assert found["step_seconds_4"]["n"] == 2
    by_shape = found["batch_4_bfloat16"]["device_seconds"]
    assert list(by_shape) == [f"{block} pixels, {warps} warps" for block, warps in tiny["shapes"]]
    for times in by_shape.values():
        assert times["n"] == len(times["raw"]) == 2
        assert times["share_of_step"] == times["median"] / found["step_seconds_4"]["median"]
    assert found["batch_4_bfloat16"]["host_seconds"].keys() == {"draw", "tables", "both"}


def test_kernels_are_launched_in_the_shape_that_is_asked_for() -> None:
    from fastflower import triton_executor

    with gpu_feeding.launched_as(1024, 2):
        assert (triton_executor._BLOCK, triton_executor._WARPS) == (1024, 2)


def test_the_loader_is_timed_against_a_replayed_batch(place: gpu_check.Place, part: record.Part) -> None:
    case = ("resnet18", 8, 2)
    gpu_training.overlap(part, place.split, cases=(case,), rounds=1, augment=SMALL, compiled=None)
    found = left(part)["resnet18, batch 8"]
    assert found.keys() == {"graph", "no graph"}
    for way, values in found.items():
        for side in values["sides"]:
            check_side(side, 1, f"{way}, replayed")
            assert side["images"] == 2 * 8  # two epochs of one step
        assert values["share"] == values["sides"][1]["ratio"]
        assert 0 <= values["waited"] <= 1
        assert values["warm_up_seconds"] > 0
    assert "goal: at least 98%" in row_of(part, "resnet18, batch 8, graph: with the loader")


def test_a_replayed_batch_stands_in_for_all(place: gpu_check.Place) -> None:
    from fastflower import Loader

    loader = Loader(place.split, batch_size=4, augment=SMALL, device="cpu")
    replayed = gpu_training.Replayed(loader)
    batches = list(replayed)
    assert len(batches) == len(replayed) == len(loader) == 3
    assert all(batch is batches[0] for batch in batches)
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    assert replayed.augment is loader.augment


def test_epochs_are_timed_against_the_plain_loops(place: gpu_check.Place, part: record.Part) -> None:
    gpu_training.epochs(part, place.folders, place.split, batch_sizes=(8,), rounds=1, augment=SMALL)
    found = left(part)["batch_8"]
    assert len(found["sides"]) == 3
    for side in found["sides"]:
        check_side(side, 1, "ImageFolder loop, float32, NCHW")
    assert len(found["history"]) == 2
    assert 0 <= found["waited"] <= 1


TINY = ("--epochs", "1", "--augment.size", "32", "--augment.resize", "36", "--device", "cpu")


@pytest.mark.slow
def test_whole_runs_are_timed_from_start_to_exit(place: gpu_check.Place, part: record.Part, tmp_path: Path) -> None:
    gpu_check.runs(
        part, place.split, tmp_path, chosen={"report A": ("report-a", 1)}, flags=("--batch-size", "8", *TINY)
    )
    (run,) = left(part)["report A"]
    assert run["seconds"] > run["train_seconds"] + run["val_seconds"] > 0
    assert "--weights None" in " ".join(run["command"])
    assert "goal: under 20 s" in row_of(part, "report A, from random weights: process")
    assert "goal: under 6 s" in row_of(part, "report A: training")


def test_what_a_run_that_fails_said_is_kept(part: record.Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "train.py").write_text("import sys\nsys.exit('no room')\n")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    gpu_check.runs(part, tmp_path, tmp_path, chosen={"report A": ("report-a", 2)})
    assert part.failed == ["report A, run 1", "report A, run 2"]
    assert part.found["report A"] == []
    log = (part.out / "failures.log").read_text()
    assert "--recipe report-a --weights None" in log
    assert "status 1\nno room" in log


def test_accuracy_is_timed_until_its_marks(place: gpu_check.Place, part: record.Part, tmp_path: Path) -> None:
    recipe = Recipe(augment=SMALL, epochs=2, batch_size=8)
    given: dict[str, Any] = {"recipes": {"tiny": recipe}, "seeds": 2, "marks": (0.0, 1.01)}
    gpu_training.accuracy(part, place.data, place.weights, tmp_path, **given)
    found = left(part)["tiny"]
    assert [run["seed"] for run in found] == [0, 1]
    for run in found:
        first, last = run["epoch_ends"]
        assert run["reached_seconds"] == {"0.0%": first, "101.0%": None}
        assert 0 < run["start_up_seconds"] < first < last < run["seconds"]
        assert run["recipe"]["weights"] == "weights.pth"
    assert "n = 2; 2 of 2 reached it" in row_of(part, "tiny: until 0.0%")
    assert row_of(part, "tiny: until 101.0%") == "0 of 2 reached it"


def test_the_plain_loop_fine_tunes_the_network_that_we_do(tmp_path: Path) -> None:
    path = tmp_path / "resnet50.pth"
    torch.save(models.resnet50().state_dict(), path)
    ours: Any = build(baseline.RESNET50, 5, weights=str(path)).eval()
    plain = baseline.pretrained_resnet50(path, 5).eval()
    plain.fc.load_state_dict(ours.fc.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(ours(images), plain(images))


def test_accuracy_without_weights_is_left_out(place: gpu_check.Place, part: record.Part, tmp_path: Path) -> None:
    gpu_training.accuracy(part, place.data, None, tmp_path)
    assert "LEFT OUT" in row_of(part, "accuracy")


def test_memory_and_a_profile_are_taken(place: gpu_check.Place, part: record.Part) -> None:
    tiny: dict[str, Any] = {"epochs": (1, 2), "batch_sizes": (8,), "steps": 3, "augment": SMALL}
    gpu_training.memory(part, place.split, **tiny)
    found = left(part)
    assert found["memory"].keys() == {"epoch_1", "epoch_2"}
    assert all(held["resident"] > 0 for held in found["memory"].values())
    profile = found["profile_8"]
    assert "Self CPU" in profile["key_averages"]
    assert profile["gpu"] is None
    assert profile["stats"]["images"] > 0


def test_idle_time_of_a_gpu_is_what_no_kernel_covers() -> None:
    def event(name: str, start: float, length: float, kind: str = "kernel", stream: int = 7) -> dict[str, Any]:
        return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "args": {"stream": stream}}

    events = [
        event("conv", 100, 40),
        event("step", 0, 1000, "gpu_user_annotation"),
        event("warp", 120, 40, stream=9),  # 20 of them beside the other
        event("conv", 180, 20),
        event("copy", 190, 5, "gpu_memcpy", 9),  # all of it
        {"ph": "M", "name": "process_name"},
    ]
    found = gpu_training.gpu_work(events, steps=2)
    assert found is not None
    assert found["idle_share"] == pytest.approx(0.2)
    assert found["ms_a_step"] == pytest.approx(0.05)
    assert found["busy_ms_a_step_by_stream"] == pytest.approx({"7": 0.03, "9": 0.0225})
    assert found["kernels"][0] == {"name": "conv", "ms_a_step": pytest.approx(0.03), "times_a_step": 1}
    assert gpu_training.gpu_work([events[1]], steps=1) is None


def test_a_piece_that_fails_costs_the_others_nothing(part: record.Part) -> None:
    def fail() -> None:
        raise ValueError("as a test")

    part.attempt("first", fail)
    part.attempt("second", lambda: part.found.update(figure=1))
    part.ends = 0
    part.attempt("third", lambda: part.found.update(figure=2))
    found = record.parts(part.out)["tried"]
    assert (found["failed"], found["left_out"], found["figure"], found["finished"]) == (["first"], ["third"], 1, False)
    assert "ValueError: as a test" in (part.out / "failures.log").read_text()


def test_no_round_is_begun_when_time_is_up() -> None:
    sides = [record.Side("a", lambda: 1), record.Side("b", lambda: 1)]
    assert record.interleave(sides, 5, CPU, ends=0) == sides
    assert [len(side.seconds) for side in sides] == [1, 1]


PART = """
import json, os, pathlib, sys, time
name, out = sys.argv[1:]
content = {"parts": {name: {"rows": [[name, "a figure"]], "finished": name == "memory"}}}
pathlib.Path(out, f"gpu_{name}.json").write_text(json.dumps(content))
if name == "kernels":
    print("as good as gone", file=sys.stderr, flush=True)
    os.kill(os.getpid(), 11)
if name == "overlap":
    time.sleep(60)
sys.exit(name == "memory")
"""


def test_a_process_that_crashes_or_hangs_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "_GRACE", 0)
    monkeypatch.setitem(gpu_check.SECONDS, "overlap", 5.0)

    def command(name: str, _seconds: float) -> list[str]:
        return [sys.executable, "-c", PART, name, str(tmp_path)]

    monkeypatch.setattr(gpu_check, "_LEAST", 1)
    rows, failed = gpu_check.in_turn(tmp_path, ["tests", "kernels", "overlap", "memory"], command, 300)
    assert failed == ["kernels", "overlap", "memory"]  # of the last a piece failed, which it told itself
    fell = "FAILED, see failures.log"
    figures = [("kernels", "a figure"), ("kernels", fell), ("overlap", "a figure"), ("overlap", fell)]
    assert rows == [("tests", "a figure"), *figures, ("memory", "a figure")]
    log = (tmp_path / "failures.log").read_text()
    assert "kernels: ended with status -11\nas good as gone" in log
    assert "overlap: ended with status none: it was ended after 5 s" in log
    assert "memory" not in log
    assert record.parts(tmp_path).keys() == {"tests", "kernels", "overlap", "memory"}


def test_parts_that_would_begin_too_late_are_left_out(tmp_path: Path) -> None:
    rows, failed = gpu_check.in_turn(tmp_path, ["tests"], lambda *_: ["false"], -1)
    assert (rows, failed) == ([("tests", "LEFT OUT, out of time")], [])


def test_a_part_is_done_by_its_name(place: gpu_check.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(gpu_check.PARTS) == list(gpu_check.SECONDS)
    assert sum(gpu_check.SECONDS.values()) <= 25 * 60
    for name in gpu_check.PARTS:
        monkeypatch.setitem(gpu_check.PARTS, name, lambda part, _: part.row(part.name, "done"))
        assert gpu_check.do(name, tmp_path, CPU, place, 60) == 0
    found = record.parts(tmp_path)
    assert found.keys() == gpu_check.PARTS.keys()
    assert all(content["finished"] and content["clock"] for content in found.values())
    assert len(list(tmp_path.iterdir())) == 7  # with the log of failures eight


def test_tests_that_fail_are_told(part: record.Part, tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_it() -> None:\n    assert 1 == 2\n"
    )
    (tmp_path / "test_other.py").write_text("import no_such_module\n")
    part.ends = time.perf_counter() + 60
    gpu_check.tests(part, tmp_path)
    assert part.failed == ["tests"]
    assert "1 failed" in part.rows[0][1]
    log = (part.out / "failures.log").read_text()
    assert "assert 1 == 2" in log
    assert "no_such_module" not in log


def test_without_cuda_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(tmp_path / "out") == 2
    assert capsys.readouterr().out.startswith("no CUDA on this machine")
    assert not (tmp_path / "out").exists()


def test_only_the_recipes_of_the_five_reports_and_ours_are_named() -> None:
    from fastflower.recipe import PRESETS

    assert {recipe for recipe, _ in gpu_check.RUNS.values()} <= PRESETS.keys()
    assert replace(PRESETS["finetune"](), seed=1).backbone == "resnet50"
