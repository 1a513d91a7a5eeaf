"""The bundle of the GPU check for a host without network: it arrives as it was sent, or is reported as damaged."""

import json
import subprocess
import sys
from pathlib import Path

import gpu_bundle
import gpu_unpack
import pytest
import torch
from common import record
from places import ROOT


@pytest.fixture(scope="module")
def parts(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without packages, which pip would have to download."""
    out = tmp_path_factory.mktemp("bundle") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_bundle, "_install", lambda site, packages, _: (site / packages[0]).mkdir(parents=True))
        patch.setattr(gpu_bundle, "MIB", 1 << 18)
        gpu_bundle.bundle(out, flowers, dali=True, images_mib=2, part_mib=1)
    return out


def test_a_bundle_arrives_complete_and_unpacks_with_python_alone(parts: Path, flowers: Path, tmp_path: Path) -> None:
    assert len(list(parts.glob("part-*"))) > 1
    command = [sys.executable, "-I", "-S", parts / "unpack.py", parts, tmp_path / "host"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"commit {record.COMMIT}: ")
    assert "parts arrived within" in done.stdout
    host = tmp_path / "host"
    for name in (
        "fastflower/reporting/templates/report.html",
        "benchmarks/gpu_check.py",
        "tests/whole/test_gpu.py",
        "pyproject.toml",
    ):
        assert (host / name).read_bytes() == (ROOT / name).read_bytes()
    images = sorted(host.glob("data/*/*.jpg"))
    assert {path.parent.name for path in images} == {path.name for path in flowers.iterdir()}
    assert 0 < sum(path.stat().st_size for path in images) <= 2 << 18
    assert not any(path.is_symlink() for path in images)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the check would run")
def test_an_unpacked_bundle_runs_from_any_folder(parts: Path, tmp_path: Path) -> None:
    gpu_unpack.unpack(parts, tmp_path / "host")
    bare = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    command = ["sh", tmp_path / "host" / "lease.sh", tmp_path / "out", "--lease", "a"]
    done = subprocess.run(command, env=bare, cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:24]) == (2, "no CUDA on this machine "), done.stderr


@pytest.mark.parametrize("what", ["damaged", "missing"])
def test_a_damaged_or_missing_part_is_named(what: str, parts: Path, tmp_path: Path) -> None:
    carried = tmp_path / "carried"
    carried.mkdir()
    for path in parts.iterdir():
        (carried / path.name).write_bytes(path.read_bytes())
    if what == "missing":
        (carried / "part-01").unlink()
    else:
        (carried / "part-01").write_bytes(b"x" + (carried / "part-01").read_bytes()[1:])
    with pytest.raises(ValueError, match=rf"part-01: is {what}; copy it again\.$"):
        gpu_unpack.unpack(carried, tmp_path / "host")
    command = [sys.executable, carried / "unpack.py", carried, tmp_path / "host"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith("error: ")) == (1, True)


def test_a_folder_with_other_files_is_refused(flowers: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SystemExit, match=r"contains thesis\.tex, which is not part of a bundle; choose another folder"):
        gpu_bundle.bundle(tmp_path, flowers)


def test_a_bundle_without_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bundle, "_install", lambda *_: None)
    (tmp_path / "data" / "rose").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"data: has no CLASS/IMAGE of at most 40 MiB; choose another folder or raise"):
        gpu_bundle.bundle(tmp_path / "out", tmp_path / "data")


def test_every_part_has_a_checksum(parts: Path) -> None:
    assert list(json.loads((parts / gpu_unpack.SUMS).read_text())) == sorted(path.name for path in parts.glob("part-*"))
