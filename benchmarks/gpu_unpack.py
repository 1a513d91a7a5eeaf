"""Unpack a bundle of gpu_bundle.py on a GPU host: python3 unpack.py PARTS FOLDER. Needs only Python."""

import hashlib
import json
import lzma
import sys
import tarfile
import time
from pathlib import Path

SUMS = "sums.json"


def unpack(parts: Path, folder: Path) -> str:
    """Unpack the parts and return a summary with the transfer time. Raises ValueError if a part is missing or damaged."""
    start = time.perf_counter()
    sums: dict[str, str] = json.loads((parts / SUMS).read_text())
    arrived: list[float] = []
    archive = folder / "archive"
    folder.mkdir(parents=True, exist_ok=True)
    with archive.open("wb") as file:
        for name, expected in sums.items():
            data = (parts / name).read_bytes() if (parts / name).exists() else b""
            if hashlib.sha256(data).hexdigest() != expected:
                raise ValueError(f"{parts / name}: is {'damaged' if data else 'missing'}; copy it again.")
            arrived.append((parts / name).stat().st_mtime)
            file.write(data)
    with lzma.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    commit = (folder / "commit").read_text()
    arrival = f"{len(sums)} parts arrived within {max(arrived) - min(arrived):.0f} s"
    return f"commit {commit}: {arrival}; checked and unpacked in {time.perf_counter() - start:.1f} s"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(unpack(Path(sys.argv[1]), Path(sys.argv[2])))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
