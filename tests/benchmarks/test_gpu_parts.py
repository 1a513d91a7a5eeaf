"""The parts of the GPU check at tiny sizes on the CPU: what they measure and save."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import baseline, gpu_dali, gpu_loading, gpu_part, gpu_smoke, gpu_training, record
from common.gpu_part import Part, Place
from gpu_trial import CPU, MARKS, check_side, left, make_part, make_place, row_of, run
from torchvision import models

from fastflower.loading.backends import triton
from fastflower.models.backbone import build

pytestmark = [*MARKS, pytest.mark.usefixtures("narrow")]


@pytest.fixture(scope="module")
def place(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(flowers, tmp_path_factory.mktemp("check"))


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return make_part(tmp_path)


def test_facts_describe_the_machine(place: Place, part: Part) -> None:
    run("facts", part, place)
    assert part.skipped == ["copies and products"]
    assert part.rows["Python, torch"].endswith(torch.__version__)
    assert part.found["nvjpeg"] == gpu_smoke.mapped("nvjpeg")


def test_the_smoke_test_compares_images_and_losses(place: Place, part: Part) -> None:
    run("smoke", part, place)
    found = left(part)
    for name in ("float32", "float16", "bfloat16", "uint8"):
        assert 0 < found[f"levels_apart_{name}"]["mean"] < 0.5
        assert found[f"levels_apart_{name}"]["n"] == 4
    assert found["losses"]["with graphs"] == pytest.approx(found["losses"]["without graphs"], rel=1e-3)


def test_the_smoke_test_fails_if_images_differ(place: Place, part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke, "_LEVELS", 0.001)
    run("smoke", part, place, training=gpu_part.SMALL)
    assert [what for what in part.failed if "Triton" in what] == part.failed
    assert len(part.failed) == 4
    assert "levels on average; at most 0.001 is allowed" in (part.out / "failures.log").read_text()


def test_every_way_to_load_is_timed_against_the_baseline(place: Place, part: Part) -> None:
    run("loading", part, place)
    sides = left(part)["batch_8"]
    assert [side["name"] for side in sides[1:]] == [way.name for way in gpu_loading.ways()]
    for side in sides:
        check_side(side, 1, "ImageFolder + DataLoader")
        assert side["images"] % 16 == 0
    assert "goal: at least 350000" in row_of(part, "batch 8: from the cache, best")
    assert "goal: at least 10" in row_of(part, "batch 8: from the cache, against ImageFolder")


def test_only_the_failing_way_is_dropped(place: Place, part: Part) -> None:
    wrong = gpu_loading.Way("wrong", {"backend": "none such"})
    chosen = [wrong, gpu_loading.Way("threads", {"backend": "opencv"})]
    run("loading", part, place, augment=gpu_part.SMALL, chosen=chosen)
    assert part.failed == ["batch 8: wrong"]
    assert [side["name"] for side in part.found["batch_8"]] == ["ImageFolder + DataLoader", "threads"]
    log = (part.out / "failures.log").read_text()
    assert log.startswith("tried: batch 8: wrong\n")
    assert "backend must be one of" in log


def test_kernels_are_timed_for_every_shape_and_relative_to_a_step(
    place: Place, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[int, ...]] = []
    render = triton.TritonBackend.launch

    def watched(self: triton.TritonBackend, memory: Any, out: Any, *shape: int) -> None:
        launched.append(shape)
        render(self, memory, out, *shape)

    monkeypatch.setattr(triton.TritonBackend, "launch", watched)
    run("kernels", part, place)
    shapes = [shape for shape in launched if shape]  # the loader's own batches pass none
    assert list(dict.fromkeys(shapes)) == list(gpu_loading.SHAPES[:2])
    found = left(part)
    assert found["step_seconds_4"]["n"] == 2
    by_shape = found["batch_4_bfloat16"]["device_seconds"]
    assert list(by_shape) == [f"{block} pixels, {warps} warps" for block, warps in gpu_loading.SHAPES[:2]]
    for times in by_shape.values():
        assert times["n"] == len(times["raw"]) == 2
        assert times["share_of_step"] == times["median"] / found["step_seconds_4"]["median"]
    assert found["batch_4_bfloat16"]["host_seconds"].keys() == {"draw", "tables", "both"}


def test_the_last_shape_is_the_one_the_backend_uses() -> None:
    assert gpu_loading.SHAPES[-1] == (triton.BLOCK, triton.WARPS)


REPLAYED = {"overlap": "resnet18, batch 8", "compile": "resnet18, batch 8, compiled too"}


@pytest.mark.parametrize("name", ["overlap", pytest.param("compile", marks=pytest.mark.soak)])
def test_the_loader_is_timed_against_a_replayed_batch(name: str, place: Place, part: Part) -> None:
    what = REPLAYED[name]
    run(name, part, place)
    assert part.skipped == (["torch.compile"] if name == "compile" else [])
    part.skipped.clear()
    found = left(part)[what]
    assert found.keys() == {"graph", "no graph"}
    for way, values in found.items():
        for side in values["sides"]:
            check_side(side, 1, f"{way}, replayed")
            assert side["images"] == 2 * 8  # two epochs of one step
        assert values["share"] == values["sides"][1]["ratio"]
        assert 0 <= values["waited"] <= 1
        assert values["warm_up_seconds"] > 0
    assert "goal: at least 98%" in row_of(part, f"{what}, graph: with the loader")


def test_a_replayed_batch_replaces_every_batch(place: Place) -> None:
    from fastflower import Loader

    loader = Loader(place.split, batch_size=4, augment=gpu_part.SMALL, device="cpu")
    replayed = gpu_training.Replayed(loader)
    batches = list(replayed)
    assert len(batches) == len(replayed) == len(loader) == 3
    assert all(batch is batches[0] for batch in batches)
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    assert replayed.augment is loader.augment


def test_epochs_are_timed_against_the_plain_loops(place: Place, part: Part) -> None:
    run("epochs", part, place)
    found = left(part)["batch_8"]
    assert len(found["sides"]) == 3
    for side in found["sides"]:
        check_side(side, 1, "ImageFolder loop, float32, NCHW")
    assert len(found["history"]) == 2
    assert 0 <= found["waited"] <= 1


@pytest.mark.soak
def test_whole_runs_are_timed_from_start_to_exit(place: Place, part: Part) -> None:
    run("runs", part, place)
    (found,) = left(part)["report A"]
    assert found["seconds"] > found["train_seconds"] + found["val_seconds"] > 0
    assert "--weights None" in " ".join(found["command"])
    assert "goal: under 20 s" in row_of(part, "report A, from random weights: process")
    assert "goal: under 6 s" in row_of(part, "report A: training")


def test_the_output_of_a_failed_run_is_kept(part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fastflower").mkdir()
    (tmp_path / "fastflower" / "__init__.py").touch()
    (tmp_path / "fastflower" / "__main__.py").write_text("import sys\nsys.exit('no room')\n")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    run("runs", part, Place(tmp_path, tmp_path), chosen={"report A": ("report-a", 2)})
    assert part.failed == ["report A, run 1", "report A, run 2"]
    assert part.found["report A"] == []
    log = (part.out / "failures.log").read_text()
    assert "--recipe report-a --weights None" in log
    assert "status 1\nno room" in log


@pytest.mark.soak
def test_accuracy_is_timed_until_each_mark(place: Place, part: Part) -> None:
    run("accuracy", part, place)
    found = left(part)["tiny"]
    assert [each["seed"] for each in found] == [0, 1]
    for each in found:
        first, last = each["epoch_ends"]
        assert each["reached_seconds"] == {"0.0%": first, "101.0%": None}
        assert 0 < each["start_up_seconds"] < first < last < each["seconds"]
        assert each["recipe"]["weights"] == "weights.pth"
    assert "n = 2; 2 of 2 reached it" in row_of(part, "tiny: until 0.0%")
    assert row_of(part, "tiny: until 101.0%") == "0 of 2 reached it"


def test_the_plain_loop_fine_tunes_the_same_network(tmp_path: Path) -> None:
    path = tmp_path / "resnet50.pth"
    torch.save(models.resnet50().state_dict(), path)
    ours: Any = build(baseline.RESNET50, 5, weights=str(path)).eval()
    plain = baseline.pretrained_resnet50(path, 5).eval()
    plain.fc.load_state_dict(ours.fc.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(ours(images), plain(images))


def test_accuracy_is_skipped_without_weights(place: Place, part: Part) -> None:
    run("accuracy", part, replace(place, weights=None))
    assert row_of(part, "accuracy") == "SKIPPED, needs --weights"


def test_a_profile_is_recorded(place: Place, part: Part) -> None:
    run("profile", part, place)
    profile = left(part)["profile_8"]
    assert "Self CPU" in profile["key_averages"]
    assert profile["gpu"] is None
    assert profile["stats"]["images"] > 0


def test_the_gpu_is_idle_when_no_kernel_runs() -> None:
    def event(name: str, start: float, length: float, kind: str = "kernel", stream: int = 7) -> dict[str, Any]:
        return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "args": {"stream": stream}}

    events = [
        event("conv", 100, 40),
        event("step", 0, 1000, "gpu_user_annotation"),
        event("warp", 120, 40, stream=9),  # 20 of them overlap the other
        event("conv", 180, 20),
        event("copy", 190, 5, "gpu_memcpy", 9),  # overlaps a kernel fully
        {"ph": "M", "name": "process_name"},
    ]
    found = gpu_training.gpu_work(events, steps=2)
    assert found is not None
    assert found["idle_share"] == pytest.approx(0.2)
    assert found["ms_a_step"] == pytest.approx(0.05)
    assert found["busy_ms_a_step_by_stream"] == pytest.approx({"7": 0.03, "9": 0.0225})
    assert found["kernels"][0] == {"name": "conv", "ms_a_step": pytest.approx(0.03), "times_a_step": 1}
    assert gpu_training.gpu_work([events[1]], steps=1) is None


@pytest.mark.dali
def test_each_way_to_decode_is_probed_in_its_own_process(
    place: Place, part: Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_dali, "_LIMIT", 120.0)  # other programs may be using the cores
    run("probe", part, place)
    found = left(part)
    assert len(gpu_dali.WAYS) == 16
    alone, beside = found["DALI alone, fancy, engine 0, whole"], found["torchvision first, plain, engine 1, region"]
    for way in (alone, beside):
        assert way["survived"]
        assert way["images_per_second"] > 0
    assert alone["levels_apart"]["max"] == 0
    assert alone["nvjpeg"] != beside["nvjpeg"], "torchvision ships its own"


def test_a_probe_that_crashes_is_reported(
    place: Place, part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = tmp_path / "crash.py"
    crash.write_text("import os\nos.kill(os.getpid(), 11)\n")
    monkeypatch.setattr(gpu_dali.dali_probe, "__file__", str(crash))
    run("probe", part, place)
    assert set(part.rows.values()) == {"FAILED with status -11"}
    assert "probe: DALI alone, fancy, engine 0, whole: status -11" in (part.out / "failures.log").read_text()


@pytest.mark.dali
def test_the_engine_is_timed_only_if_its_pixels_are_equal(place: Place, part: Part) -> None:
    run("dali_1", part, place)
    assert part.skipped == ["engine 100%"]
    engine = Part("engine", part.out, CPU, file="gpu_tried")
    run("engine", engine, place)
    engine.save()
    assert engine.skipped == ["engine 0%, GPU busy", "engine 100%, GPU busy"]
    assert engine.found["equal"] == {"0%": True, "100%": True}
    again = Part("again", part.out, CPU, file="gpu_tried")
    run("dali_1", again, place)
    assert [side["name"] for side in again.found["batch_8"]][1:] == [f"DALI, {name}" for name in gpu_loading.DTYPES]
    assert "goal: at least 2" in row_of(again, "engine 100%, batch 8: best")


@pytest.mark.dali
def test_dali_and_triton_render_from_cached_images(place: Place, part: Part) -> None:
    run("kept", part, place)
    assert [side["name"] for side in left(part)["sides"]] == ["DALI", "Triton"]


def test_the_recipes_of_the_check_exist() -> None:
    from fastflower.recipes.presets import PRESETS

    assert {recipe for recipe, _ in gpu_training.RUNS.values()} <= PRESETS.keys()
    assert replace(PRESETS["finetune"](), seed=1).backbone == "resnet50"
