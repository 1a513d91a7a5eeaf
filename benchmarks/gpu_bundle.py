"""Bundle the GPU check for a host without network: python benchmarks/gpu_bundle.py OUT --data FOLDER [--dali]

Writes OUT/part-00, ... with this checkout, images and the packages that the host lacks, and OUT/unpack.py. The host
needs torch, torchvision, OpenCV, matplotlib, jinja2, fsspec, tqdm and pytest. Run there:

    python3 OUT/unpack.py OUT FOLDER && sh FOLDER/lease.sh RESULTS --lease a
"""

import hashlib
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Annotated

import gpu_unpack
import torch
import tyro
from common import images, record

MIB = 1 << 20
_OURS = (gpu_unpack.SUMS, "unpack.py")
_FOLDERS = ("fastflower", "benchmarks", "tests", "tools")
_PACKAGES = ("tyro", "webdataset")
_DALI = "nvidia-dali-cuda130>=2.4"
_ON_THE_HOST = ("numpy", "torch", "packaging", "typing_extensions", "yaml", "_yaml")  # but pip installs them too
_PLATFORMS = (
    "any",
    "manylinux1_x86_64",
    "manylinux2014_x86_64",
    *(f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34, 35)),
)
_LEASE = """#!/bin/sh
# Run the GPU check from this unpacked folder: sh lease.sh RESULTS --lease a
here=$(cd "$(dirname "$0")" && pwd)
PYTHONPATH="$here/site:$here" exec python3 -X faulthandler "$here/benchmarks/gpu_check.py" "$@" \\
    --data "$here/data" --commit "$(cat "$here/commit")" {weights}
"""


def bundle(
    out: Annotated[Path, tyro.conf.Positional],
    data: Path | None = None,
    weights: Path | None = None,
    dali: bool = False,
    python: str = "3.12",
    images_mib: int = 40,
    part_mib: int = 60,
) -> None:
    """Bundle the GPU check.

    Args:
        out: Folder for the parts.
        data: Folder of class folders; by default, draws flowers.
        weights: A ResNet-50 state_dict, included in half precision if it fits into a single part.
        dali: Include DALI and its libraries, in as many parts as they need.
        python: The host's Python version.
        images_mib: Size limit of the images, which are spread evenly over the classes.
        part_mib: Size limit of a part.
    """
    start = time.perf_counter()
    others = [path.name for path in out.glob("*") if not path.name.startswith("part-") and path.name not in _OURS]
    if others:
        sys.exit(f"error: {out}: contains {others[0]}, which is not part of a bundle; choose another folder")
    with tempfile.TemporaryDirectory() as scratch:
        stage = Path(scratch, "stage")
        for name in _FOLDERS:
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(record.ROOT / name, stage / name, ignore=ignored)
        shutil.copy(record.ROOT / "pyproject.toml", stage)
        _install(stage / "site", [*_PACKAGES, *([_DALI] if dali else [])], python)
        if data is None:
            data = images.drawn(Path(scratch, "drawn"))
        _images(data, stage / "data", Path(scratch, "some"), images_mib * MIB)
        if weights:
            _weights(weights, stage / "weights.pth")
        room = part_mib * MIB
        parts = _parts(stage, out, room, weights=weights is not None)
        if len(parts) > 1 and weights and not dali:
            (stage / "weights.pth").unlink()
            print("skipped the weights: with them the bundle would need more than one part")
            parts = _parts(stage, out, room, weights=False)
    size = sum(part.stat().st_size for part in parts)
    print(f"wrote {len(parts)} parts, {size / MIB:.1f} MiB in total, to {out} in {time.perf_counter() - start:.0f} s")
    if len(parts) > 1 and not dali:
        sys.exit(
            f"error: the bundle needs more than one part of {part_mib} MiB; lower --images-mib or raise --part-mib"
        )


def _install(site: Path, packages: list[str], python: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        site,
        "--only-binary=:all:",
        "--no-compile",
    ]
    command += ["--python-version", python, "--implementation", "cp", "--disable-pip-version-check"]
    command += [f"--platform={name}" for name in _PLATFORMS]
    subprocess.run([*map(str, command), *packages], check=True)
    for path in site.iterdir():
        if path.name.partition("-")[0].partition(".")[0] in _ON_THE_HOST:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    other = [path for path in site.rglob("*.cpython-*.so") if f"cpython-{python.replace('.', '')}-" not in path.name]
    for path in [*other, *site.glob("nvidia/*/include")]:  # for other Pythons, and headers: never loaded
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _images(data: Path, into: Path, links: Path, limit: int) -> None:
    """Copy as many images as the limit allows, spread evenly over the classes."""
    count = found = sum(path.is_file() for path in data.glob("*/*"))
    while count:
        chosen = images.some(data, links / str(count), count)
        size = sum(path.stat().st_size for path in chosen.glob("*/*"))
        if size <= limit:
            shutil.copytree(chosen, into)
            print(f"{count} of {found} images")
            return
        count = min(count - 1, int(count * limit / size))
    sys.exit(
        f"error: {data}: has no CLASS/IMAGE of at most {limit / MIB:.0f} MiB; choose another folder or raise --images-mib"
    )


def _weights(path: Path, into: Path) -> None:
    loaded = torch.load(path, weights_only=True)
    torch.save({name: value.half() if value.is_floating_point() else value for name, value in loaded.items()}, into)


def _parts(stage: Path, out: Path, room: int, *, weights: bool) -> list[Path]:
    """Compress the staged files and cut the archive into parts."""
    given = '--weights "$here/weights.pth"' if weights else ""
    (stage / "commit").write_text(record.COMMIT)
    (stage / "lease.sh").write_text(_LEASE.format(weights=given))
    out.mkdir(parents=True, exist_ok=True)
    for part in out.glob("part-*"):
        part.unlink()
    with tempfile.TemporaryFile() as archive:
        with lzma.open(archive, "wb", preset=6) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
            tar.add(stage, arcname=".")
        archive.seek(0)
        parts: list[Path] = []
        while piece := archive.read(room):
            parts.append(out / f"part-{len(parts):02d}")
            parts[-1].write_bytes(piece)
    sums = {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts}
    (out / gpu_unpack.SUMS).write_text(json.dumps(sums))
    shutil.copy(gpu_unpack.__file__, out / "unpack.py")
    return parts


if __name__ == "__main__":
    tyro.cli(bundle)
