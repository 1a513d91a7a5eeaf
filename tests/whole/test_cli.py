"""The command line: flags from signatures, errors on stderr with an exit status, no tracebacks."""

import inspect
import math
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT
from torchvision.models import resnet18

from fastflower import Augment, Checkpoint, Manifest, Recipe, evaluate, export, pack, predict, train
from fastflower.cli import main
from fastflower.models.catalog import backbones
from fastflower.recipes.presets import PRESETS
from fastflower.reporting.preview import preview
from fastflower.shards.verification import verify
from fastflower.training.diagnosis import diagnose
from fastflower.training.reports import reports

COMMANDS: dict[str, Callable[..., Any]] = {
    "pack": pack, "verify": verify, "doctor": diagnose, "preview": preview, "train": train, "reports": reports,
    "evaluate": evaluate, "predict": predict, "export": export,
    "backbones": backbones,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("narrow")
CLASSES = ("daisy", "dandelion", "rose", "sunflower", "tulip")


@pytest.fixture(scope="module", autouse=True)
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A pack that waits ten seconds for a missing scheduler while the other tests run."""
    out = tmp_path_factory.mktemp("waiting") / "out"
    scheduler = [sys.executable, "-m", "fastflower", "pack", out, "--out", out, "--dask", "tcp://127.0.0.1:9"]
    with subprocess.Popen(scheduler, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def checkpoint(narrow: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001  (is set up first)
    """An untrained network for small images."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "checkpoint-best.pt"
    Checkpoint(
        recipe=Recipe(weights=None, augment=Augment(size=32, resize=36)),
        classes=CLASSES,
        model=resnet18(weights=None, num_classes=5).state_dict(),
        epoch=1,
    ).save(path)
    return path


def command(*args: object) -> subprocess.CompletedProcess[str]:
    return python("-m", "fastflower", *args)


def python(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, check=False)


def error(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Return the error line of a run that fails and prints nothing else."""
    assert main([*map(str, args)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two classes of ten images, two of them identical in each class, and two files that are no images."""
    for label, name in enumerate(("a", "b")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            levels = np.random.default_rng(10 * label + number % 9).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(levels).save(tmp_path / f"data/{name}/{number}.jpg")
    (tmp_path / "data/a/text.jpg").write_text("no picture")
    (tmp_path / "data/b/notes.txt").write_text("no picture's name")
    return tmp_path / "data"


def test_pack_prints_counts(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["pack", str(mixed), "--out", str(out), "--val-fraction", "0.3", "--seed", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: 14 images in 1 shards",
        "val: 6 images in 1 shards",
        "identical: a/0.jpg, a/9.jpg",
        "identical: b/0.jpg, b/9.jpg",
        f"wrote {out}",
    ]
    assert Manifest.load(out).options["seed"] == 3


def test_the_command_packs_the_same_bytes_as_the_function(mixed: Path, tmp_path: Path) -> None:
    (mixed / "b/0.jpg").write_bytes((mixed / "a/0.jpg").read_bytes())
    done = command("pack", mixed, "--out", tmp_path / "by tool", "--on-conflict", "keep", "--max-side", "8")
    pack(mixed, tmp_path / "by function", on_conflict="keep", max_side=8)
    assert (done.returncode, done.stderr.count("\n")) == (0, 4), (
        done.stderr
    )  # the space, and that two files are left out
    assert "\nthe same image under two labels: a/0.jpg, a/9.jpg, b/0.jpg\nwrote " in done.stdout
    for path in (tmp_path / "by function").iterdir():
        assert (tmp_path / "by tool" / path.name).read_bytes() == path.read_bytes()


def test_unprintable_file_names_are_escaped(mixed: Path, tmp_path: Path) -> None:
    (mixed / "a/text.jpg").unlink()
    for name in (b"caf\xe9 \xc3\xb6.jpg", b"new\nline.jpg", b"\x1b[2J.jpg"):
        (mixed / "a" / name.decode("utf-8", "surrogateescape")).write_text("no picture")
    done = command("pack", mixed, "--out", tmp_path / "out")
    assert done.returncode == 0
    for name in ("caf\\udce9 ö", "new\\nline", "\\x1b[2J"):
        assert name in done.stderr
    assert all(line.isprintable() for line in done.stderr.splitlines())
    assert "skipped" not in done.stdout  # the log says it


def test_long_lists_are_cut(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(22):
        for name in ("a", "b"):
            pixels = np.random.default_rng(99 + number).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(mixed / f"{name}/same {number:02d}.jpg")
    assert main(["pack", str(mixed), "--out", str(tmp_path / "out"), "--val-fraction", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["train: 64 images in 1 shards", "val: 0 images in 0 shards"]
    what = "the same image under two labels:"
    listed = [f"{what} a/same {number:02d}.jpg, b/same {number:02d}.jpg" for number in range(20)]
    assert lines[2:24] == [*listed, f"{what} 2 more; see manifest.json", "identical: a/0.jpg, a/9.jpg"]


def test_near_duplicates_across_the_split_are_listed(
    flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for split in ("train", "val"):
        for name in ("rose", "tulip"):
            (data / split / name).mkdir(parents=True)
            shutil.copy(flowers / name / f"000{(split, name) == ('val', 'tulip'):d}.jpg", data / split / name)
    with Image.open(flowers / "rose/0000.jpg") as image:
        image.save(data / "val/rose/0000.jpg", quality=60)
    assert main(["pack", str(data), "--out", str(out), "--split-by", "folder", "--lists"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: 2 images in 1 shards",
        "val: 2 images in 1 shards",
        "near-duplicate: val/rose/0000.jpg in val, train/rose/0000.jpg in train",
        "near-duplicates of training images in other splits: 1; accuracy on them is optimistic",
        f"wrote {out}",
    ]
    assert (out / "meta/train.txt").read_text() == "train/rose/0000.jpg 0\ntrain/tulip/0000.jpg 1\n"
    assert main(["pack", str(data), "--out", str(tmp_path / "random"), "--split-by", "random"]) == 0
    assert Manifest.load(tmp_path / "random").options["split_by"] == "random"


def test_verify_reports_success(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(shards)]) == 0
    assert capsys.readouterr() == (f"{shards}: every image decodes; tars, indexes and manifest agree\n", "")
    text = f"{tmp_path}: has no shards; pass a folder that pack wrote (fastflower pack FOLDER)."
    assert error(capsys, "verify", tmp_path) == text


def test_verify_names_each_problem_and_repairs_it(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    names: list[str] = []
    for name, count in (("train.index.npy", "1 problem"), ("_info.json", "2 problems")):
        (copy / name).unlink()
        names.append(name)
        done = command("verify", copy)
        assert (done.returncode, done.stderr) == (1, f"error: {copy}: {count}, listed above.\n")
        assert done.stdout == "".join(
            f"{copy / name}: is missing; rebuild it with fastflower verify {copy} --repair.\n" for name in names
        )
    done = command("verify", copy, "--repair")
    assert (done.returncode, done.stderr) == (0, "".join(f"rebuilt {copy / name}\n" for name in names))
    assert done.stdout == f"{copy}: every image decodes; tars, indexes and manifest agree\n"


ON_DASK = """
import sys
from distributed import LocalCluster
from fastflower.cli import main
with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster:
    status = main([*sys.argv[1:], "--dask", cluster.scheduler_address])
    sys.exit(status or "make_shard_elsewhere" not in cluster.scheduler.task_prefixes)
"""


def test_a_pack_on_dask_has_the_same_bytes(flowers: Path, shards: Path, tmp_path: Path) -> None:
    done = python("-c", ON_DASK, "pack", flowers, "--out", tmp_path / "out", "--shard-bytes", 1 << 20)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr  # the space
    assert done.stdout.splitlines()[0] == "train: 120 images in 6 shards"
    for path in shards.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_missing_dask_is_explained(mixed: Path, tmp_path: Path) -> None:
    program = "import sys; sys.modules['distributed'] = None; from fastflower.cli import main; sys.exit(main())"
    done = python("-c", program, "pack", mixed, "--out", tmp_path / "out", "--dask", "tcp://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --dask needs the package 'distributed'; run pip install 'fastflower[dask]'.\n"


def test_errors_of_pack_are_explained(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = "--val-fraction must be a number, at least 0 and less than 1, got 1.5; for example --val-fraction 0.2."
    assert error(capsys, "pack", mixed, "--out", tmp_path / "out", "--val-fraction", "1.5") == rule
    missing = (
        "does not exist; pass a folder that contains one folder of images per class, or a zip or tar archive of one."
    )
    assert error(capsys, "pack", tmp_path / "no", "--out", tmp_path / "out") == f"{tmp_path / 'no'}: {missing}"
    bad = f"{mixed / 'a/text.jpg'}: is plain text, named .jpg; remove or replace it, or skip damaged images:"
    assert error(capsys, "pack", mixed, "--out", tmp_path / "out", "--on-bad", "fail") == bad
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_without_a_verb_lists_the_verbs(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    out, err = capsys.readouterr()
    assert (err, [line.split()[0] for line in out.splitlines()[1:]]) == ("", list(COMMANDS))


def flags_of(subcommand: str) -> tuple[set[str], set[str]]:
    """Return (flags, positional arguments) that the signature requires."""
    flags: set[str] = set()
    required: set[str] = set()
    for name, parameter in inspect.signature(COMMANDS[subcommand]).parameters.items():
        if parameter.default is parameter.empty:
            required.add(name.upper())
        elif name == "recipe":
            flags |= {field.name for field in fields(Recipe)} - {"augment"}
            flags |= {f"augment.{field.name}" for field in fields(Augment)}
        else:
            flags.add(name)
    if subcommand == "pack":  # an executor is an object, which a command line cannot pass
        flags = flags - {"executor"} | {"dask"}
    if subcommand == "predict":  # of a network of one's own, another object
        flags -= {"classes", "augment"}
    return {f"--{name.replace('_', '-')}" for name in flags}, required


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_each_parameter_of_the_signature(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, required = flags_of(name)
    with pytest.raises(SystemExit, match=r"^0$"):
        main([name, "--help"])
    text = capsys.readouterr().out
    shown = set(re.findall(r"--[a-z][\w.-]*", text))
    assert flags <= shown
    # --no-resume and the like; --recipe, which chooses a preset; --help itself.
    pairs = {re.sub(r"^--(.*\.)?", r"--\1no-", flag) for flag in flags}
    assert shown - flags - pairs - {"--help"} == ({"--recipe"} if name in ("doctor", "preview", "train") else set())
    assert all(re.search(rf"^\W*{name}\b", text, re.MULTILINE) for name in required)


@pytest.mark.parametrize("name", ["pack", "reports"])
def test_a_tool_is_the_subcommand(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: fastflower {name} ")


@pytest.mark.parametrize("name", ["pack", "verify"])
def test_help_of_a_verb_that_needs_no_torch_does_not_import_it(name: str) -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['fastflower', {name!r}, '--help']\n"
        "try:\n    runpy.run_module('fastflower', run_name='__main__')\n"
        "except SystemExit as end:\n    status = end.code\n"
        "print('status', status, 'heavy', sorted({'torch', 'torchvision', 'nvidia', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = python("-c", program)
    assert done.stdout.splitlines()[-1] == "status 0 heavy []"


@pytest.mark.parametrize(("name", "style"), [*((name, "{} {}") for name in PRESETS), ("finetune", "{}={}")])
def test_a_recipe_sets_the_defaults_that_help_shows(name: str, style: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["train", *style.format("--recipe", name).split(), "--help"])
    text = re.sub(r"[^\w.:()-]+", " ", capsys.readouterr().out)  # without frames and line breaks
    recipe = PRESETS[name]()
    for flag in ("epochs", "lr", "batch_size", "schedule", "label_smoothing"):
        found = re.search(rf"--{flag.replace('_', '-')} .*?\(default: (.*?)\)", text)
        assert found is not None
        assert found[1] == str(getattr(recipe, flag))


def test_training_on_a_folder_without_images_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    out = tmp_path / "run"
    text = error(capsys, "train", tmp_path / "data", "--weights", "None", "--device", "cpu", "--out", out)
    assert text.startswith(f"{tmp_path / 'data'}: has no class folders; put the images of each class")
    assert not out.exists()


def test_evaluate_scores_every_image_of_the_split(
    checkpoint: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(checkpoint), str(shards), "--device", "cpu"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    scores = evaluate(checkpoint, shards, device="cpu")
    assert first.startswith(f"val: 30 images, accuracy {scores.accuracy:.2%}, loss {scores.loss:.4f}, macro-F1 ")
    precisions = ["undefined" if math.isnan(value) else f"{value:.1%}" for value in scores.precision]
    assert "undefined" in precisions  # of a class that it never predicts
    rows = zip(CLASSES, precisions, scores.recall, strict=True)
    assert rest == [f"  {name}: precision {one}, recall {other:.1%}, 6 images" for name, one, other in rows]


def test_evaluate_refuses_files_that_are_no_checkpoint_and_unknown_splits(
    checkpoint: Path, flowers: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "not a checkpoint; pass the checkpoint first, then the shards or images."
    image = next(flowers.glob("rose/*.jpg"))
    assert error(capsys, "evaluate", image, shards) == f"{image}: is an image, {text}"
    assert error(capsys, "evaluate", shards, shards) == f"{shards}: is a folder of shards, {text}"
    text = error(capsys, "evaluate", checkpoint, checkpoint)
    assert (
        text
        == f"{checkpoint}: is a file, not a folder of shards; pass a folder that pack wrote (fastflower pack FOLDER)."
    )
    missing = tmp_path / "no.pt"
    assert error(capsys, "evaluate", missing, shards) == f"{missing}: does not exist; check the path."
    torch.save({"weight": torch.zeros(1)}, tmp_path / "state.pt")
    text = f"{tmp_path / 'state.pt'}: is not a fastflower checkpoint; pass a checkpoint-best.pt from train."
    assert error(capsys, "evaluate", tmp_path / "state.pt", shards) == text
    text = f"{shards}: has no samples in split 'test'; choose from train, val."
    assert error(capsys, "evaluate", checkpoint, shards, "--split", "test") == text


def test_predict_prints_a_line_per_image(checkpoint: Path, flowers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [flowers / "tulip" / "0003.jpg", flowers / "rose" / "0001.jpg"]
    assert main(["predict", str(checkpoint.parent), *map(str, images), "--device", "cpu"]) == 0  # a run's folder
    lines = capsys.readouterr().out.splitlines()
    found = predict(checkpoint, images, device="cpu")
    assert lines == [f"{item.path}: {item.class_name} ({item.probability:.1%})" for item in found]
    assert [item.path for item in found] == images
    assert {item.class_name for item in found} <= set(CLASSES)


def test_predict_names_a_missing_file_or_one_that_is_no_image(
    checkpoint: Path, flowers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, text, gone, empty = flowers / "rose/0001.jpg", tmp_path / "text.jpg", tmp_path / "no.jpg", tmp_path / "empty"
    text.write_text("no picture")
    empty.mkdir()
    reason, remedy = "is plain text, named .jpg", "pass image files or folders"
    assert error(capsys, "predict", checkpoint, good, text).startswith(f"{text}: {reason}; {remedy}, or on_bad=")
    assert error(capsys, "predict", checkpoint, gone).startswith(f"{gone}: No such file or directory; {remedy}")
    assert error(capsys, "predict", checkpoint, empty).startswith(f"{empty}: holds no images (")
    assert error(capsys, "predict", checkpoint) == "IMAGES must name at least one image file or folder, got none."


def test_an_unreachable_scheduler_is_explained(waiting: subprocess.Popen[str], mixed: Path) -> None:
    printed = {"tcp://127.0.0.1:9": waiting.communicate(timeout=15)}
    done = command("pack", mixed, "--dask", "scheduler")
    assert (waiting.returncode, done.returncode) == (1, 1)
    for address, (out, err) in {**printed, "scheduler": (done.stdout, done.stderr)}.items():
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"error: --dask {address}: no scheduler answers (")
        assert err.endswith("); pass its address as tcp://HOST:PORT.\n")
