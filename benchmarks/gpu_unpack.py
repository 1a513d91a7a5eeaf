"""Unpacks on a GPU host what gpu_bundle.py made: python3 unpack.py PARTS FOLDER. Needs Python alone."""

import hashlib
import json
import lzma
import sys
import tarfile
import time
from pathlib import Path

SUMS = "sums.json"


def unpack(parts: Path, folder: Path) -> str:
    """Unpack, and say how many parts came in how many seconds. Raises ValueError for a part that is missing or damaged."""
    start = time.perf_counter()
    sums: dict[str, str] = json.loads((parts / SUMS).read_text())
    arrived: list[float] = []
    archive = folder / "archive"
    folder.mkdir(parents=True, exist_ok=True)
    with archive.open("wb") as file:
        for name, expected in sums.items():
            data = (parts / name).read_bytes() if (parts / name).exists() else b""
            if hashlib.sha256(data).hexdigest() != expected:
                raise ValueError(f"{parts / name}: is {'damaged' if data else 'missing'}; carry it again.")
            arrived.append((parts / name).stat().st_mtime)
            file.write(data)
    with lzma.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    commit = (folder / "commit").read_text()
    came = f"{len(sums)} parts came within {max(arrived) - min(arrived):.0f} s"
    return f"commit {commit}: {came}; checked and unpacked in {time.perf_counter() - start:.1f} s"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(unpack(Path(sys.argv[1]), Path(sys.argv[2])))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
