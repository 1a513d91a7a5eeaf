"""The GPU check itself, without a GPU: parts end in time, and a failure affects no other part."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import pytest
import torch
from common import gpu_part, gpu_smoke, images, record
from common.gpu_part import Part, Place
from gpu_trial import CPU, MARKS, make_part, make_place, row_of

pytestmark = MARKS


@pytest.fixture(scope="module")
def place(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(flowers, tmp_path_factory.mktemp("check"))


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return make_part(tmp_path)


def test_a_failing_piece_does_not_affect_the_others(part: Part) -> None:
    def fail() -> None:
        raise ValueError("as a test")

    def last() -> None:
        part.found.update(figure=1)
        part.ends = 0

    part.each({"first": fail, "second": last, "third": lambda: part.found.update(figure=2)})
    found = gpu_part.parts(part.out)["tried"]
    assert (found["failed"], found["left_out"], found["figure"], found["finished"]) == (["first"], ["third"], 1, False)
    assert found["rows"] == {"first": "FAILED, see failures.log", "third": "SKIPPED, out of time"}
    assert "ValueError: as a test" in (part.out / "failures.log").read_text()


def test_each_piece_gets_an_equal_share_of_the_remaining_time(part: Part) -> None:
    part.ends = time.perf_counter() + 300
    given: list[float] = []
    part.each(dict.fromkeys("abc", lambda: given.append(part.until - time.perf_counter())))
    assert given == pytest.approx([100, 150, 300], abs=1)


def test_rows_are_saved_after_each_round(part: Part) -> None:
    """A process that is killed in the third round has saved two."""
    sides = [record.Side("a", lambda: 1), record.Side("b", lambda: 1)]
    seen: list[str] = []

    def tell(left: list[record.Side]) -> None:
        part.row("b", f"n = {len(left[1].seconds)}")
        seen.append(gpu_part.parts(part.out)["tried"]["rows"]["b"])

    part.interleave("two", sides, 3, tell)
    assert seen == ["n = 1", "n = 2", "n = 3", "n = 3"]


def test_images_are_repeated_if_there_are_too_few(flowers: Path, tmp_path: Path) -> None:
    few = images.some(flowers, tmp_path / "few", 20)
    found = sorted(gpu_part.repeated(few, tmp_path / "more", 50).glob("*/*"))
    assert len(found) == 50
    assert len({path.resolve() for path in found}) == 20
    assert len(list(gpu_part.repeated(few, tmp_path / "fewer", 10).glob("*/*"))) == 10


def test_no_round_starts_after_the_deadline() -> None:
    sides = [record.Side("a", lambda: 1), record.Side("b", lambda: 1)]
    assert record.interleave(sides, 5, CPU, ends=0) == sides
    assert [len(side.seconds) for side in sides] == [1, 1]


PART = """
import json, os, pathlib, sys, time
name, out = sys.argv[1:]
path = pathlib.Path(out, "gpu_a.json")
parts = json.loads(path.read_text())["parts"] if path.exists() else {}
parts[name] = {"rows": {name: "a figure"}, "finished": name == "profile"}
path.write_text(json.dumps({"parts": parts}))
if name == "kernels":
    print("about to crash", file=sys.stderr, flush=True)
    os.kill(os.getpid(), 11)
if name == "overlap":
    time.sleep(60)
sys.exit(name in ("profile", "smoke"))
"""


def test_a_process_that_crashes_or_hangs_does_not_affect_the_others(tmp_path: Path) -> None:
    def command(name: str, _seconds: float) -> list[str]:
        return [sys.executable, "-c", PART, name, str(tmp_path)]

    slots = {
        "tests": 60.0,
        "kernels": 1.0,
        "overlap": -56.0,
        "profile": 60.0,
    }  # 5 s for overlap: unused time goes to the next part
    rows, failed = gpu_check.in_turn(tmp_path, slots, command, time.perf_counter())
    assert failed == ["kernels", "overlap", "profile"]  # a piece of the last one failed, which the part recorded itself
    values = {name: [value for row, value in rows if row == name] for name in slots}
    assert values["tests"] == values["profile"] == ["a figure"]
    assert values["kernels"] == ["a figure", "FAILED with status -11, see failures.log"]
    assert values["overlap"][0] == "a figure"
    assert "timed out after" in values["overlap"][1]
    log = (tmp_path / "failures.log").read_text()
    assert "kernels: ended with status -11\nabout to crash" in log
    assert "overlap: ended with status none: timed out after" in log
    assert "profile" not in log
    assert gpu_part.parts(tmp_path).keys() == set(slots)


def test_a_parts_children_end_with_it() -> None:
    """Also if the part succeeds: their work would disturb the next part's timings."""
    child = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, file=sys.stderr)"
    status, said = gpu_check._run_limited([sys.executable, "-c", child], 60)
    assert status == 0
    for _ in range(100):
        if not Path(f"/proc/{said.strip()}").exists():
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{said.strip()}").exists()


def test_stderr_of_a_successful_part_is_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('a step could not be recorded', file=sys.stderr)"]
    assert gpu_check.in_turn(tmp_path, {"kernels": 60.0}, lambda *_: command, time.perf_counter()) == ([], [])
    assert (tmp_path / "failures.log").read_text() == "kernels: wrote to stderr\na step could not be recorded\n\n"


def test_a_smoke_test_that_times_out_does_not_stop_the_check(tmp_path: Path) -> None:
    def command(name: str, _ends: float) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(60)" if name == "smoke" else ""]

    slots = {"smoke": 1.0, "kernels": 60.0}
    rows, failed = gpu_check.in_turn(tmp_path, slots, command, time.perf_counter() + 0.5)
    assert failed == ["smoke"]
    assert [name for name, _ in rows] == ["smoke"]


def test_no_round_starts_that_would_miss_the_deadline() -> None:
    side = record.Side("slow", lambda: time.sleep(0.2) or 1)
    record.interleave([side], 50, CPU, ends=time.perf_counter() + 1.1)
    assert 1 <= len(side.seconds) <= 4


def test_a_failing_baseline_loses_only_the_ratios(part: Part) -> None:
    def fail() -> int:
        raise RuntimeError("no room in /dev/shm")

    first, other = record.Side("baseline", fail), record.Side("other", lambda: 1)
    left = part.interleave(
        "two", [first, other], 2, lambda left: [part.row(side.name, record.rate(side, first)) for side in left]
    )
    assert left == [other]
    assert part.failed == ["two: baseline"]
    assert row_of(part, "other").endswith("nan times the baseline")
    assert gpu_part.verdict(record.ratio(other, first), 10) == "not compared"
    assert (gpu_part.verdict(10, 10), gpu_part.verdict(9, 10)) == ("met", "MISSED")


def test_a_run_that_should_have_recorded_a_cuda_graph_but_did_not_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = SimpleNamespace(recipe=None, device=CPU, precision=torch.float32, stepper=SimpleNamespace(replays=False))
    for wanted in (None, lambda function: function):
        monkeypatch.setattr(gpu_part, "graphs_of", lambda *_, wanted=wanted: wanted)
        with (
            nullcontext()
            if wanted is None
            else pytest.raises(RuntimeError, match="no step was recorded as a CUDA graph")
        ):
            gpu_part.check_recorded(run)
    run.stepper.replays = True
    gpu_part.check_recorded(run)


def test_a_failing_smoke_test_stops_the_check(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def command(name: str, _seconds: float) -> list[str]:
        return [sys.executable, "-c", PART, name, str(tmp_path)]

    rows, failed = gpu_check.in_turn(tmp_path, {"smoke": 60.0, "kernels": 60.0}, command, time.perf_counter())
    assert failed == ["smoke"]
    assert rows[-1] == ("remaining parts", "SKIPPED, because smoke failed")
    assert "smoke: ended with status 1" in capfd.readouterr().out


def test_parts_that_would_start_too_late_are_skipped(tmp_path: Path) -> None:
    rows, failed = gpu_check.in_turn(tmp_path, {"tests": -1.0}, lambda *_: ["false"], time.perf_counter())
    assert (rows, failed) == ([("tests", "SKIPPED, out of time")], [])


def test_a_lease_fits_its_time_and_starts_with_the_headline_parts() -> None:
    first = gpu_check.LEASES["a"]
    assert gpu_check.PREPARING + sum(first.values()) <= 480
    headlines = ["facts", "smoke", "kernels", "loading", "overlap", "runs"]
    assert list(first)[:6] == headlines
    assert gpu_check.PREPARING + sum(first[name] for name in headlines) <= 300
    assert gpu_check.PREPARING + sum(gpu_check.LEASES["b"].values()) <= 360
    assert {*first, *gpu_check.LEASES["b"], "accuracy"} == gpu_check.PARTS.keys() == gpu_check.AT_LEISURE.keys()


@pytest.mark.parametrize("name", gpu_check.PARTS)
def test_a_part_runs_by_name(name: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = gpu_check.PARTS[name].__doc__
    assert clock

    def done(part: Part, _: Place, **sizes: Any) -> None:
        assert sizes == gpu_check.TINY.get(name, {})
        part.row(part.name, "done")

    done.__doc__ = clock
    monkeypatch.setitem(gpu_check.PARTS, name, done)
    assert gpu_check.do(name, tmp_path, CPU, place, file="gpu_a", ends=time.perf_counter() + 60) == 0
    found = gpu_part.parts(tmp_path)[name]
    assert found["finished"]
    assert found["clock"] == " ".join(clock.partition("\n\n")[0].split())


def test_failing_tests_are_reported_and_a_broken_file_affects_no_other(
    part: Part, place: Place, tmp_path: Path
) -> None:
    tests = {"one": "import pytest\n@pytest.mark.gpu\ndef test_it():\n    assert 1 == 2\n"}
    tests["two"] = "import pytest\n@pytest.mark.gpu\n@pytest.mark.parametrize('a', ['a b'])\ndef test_it(a): pass\n"
    tests["broken"] = "# pytest.mark.gpu\nimport no_such_module\n"
    tests["other"] = "import not_even_looked_at\n"
    for name, text in tests.items():
        folder = tmp_path / ("loading/backends" if name == "two" else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"test_{name}.py").write_text(text)
    part.ends = time.perf_counter() + 60
    with pytest.raises(RuntimeError, match="assert 1 == 2"):
        gpu_smoke.run_tests(part, place, folder=tmp_path)
    assert row_of(part, "tests marked gpu") == "1 failed, 1 passed; status 1"
    said = (part.out / "pytest.txt").read_text()
    assert "no_such_module" in said
    assert "not_even_looked_at" not in said


def test_without_cuda_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(tmp_path / "out") == 2
    assert capsys.readouterr().out.startswith("no CUDA on this machine")
    assert not (tmp_path / "out").exists()
