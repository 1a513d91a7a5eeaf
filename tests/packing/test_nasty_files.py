"""A folder of nasty files: each is treated as docs/format.md says, without hanging, crashing or exhausting memory."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from nasty_files import Expectation, make
from numpy.typing import NDArray
from packs import read_by_dali
from PIL import Image, ImageOps
from webdataset.compat import WebDataset

from fastflower import Manifest, pack
from fastflower.errors import FolderError
from fastflower.shards.image import decode
from fastflower.shards.reader import ShardReader
from fastflower.shards.verification import verify

SPLITS = ["train", "val"]
# Damage for which libjpeg, and so every decoder here, only warns: meaningless bytes before a valid end.
ONLY_WARNED_OF = {
    "broken/zeros in the middle.jpg",
    "broken/cut at a restart and ended.jpg",
}
TOLERANCE = 3.0  # mean difference in gray levels, as in test_image
SECONDS, BYTES = 60, 1 << 30

PROGRAM = """
import sys
from fastflower.cli import main
status = main(["pack", sys.argv[1], "--out", sys.argv[2], "--workers", "2", "--shard-bytes", "1000000"])
print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""


class Packed(NamedTuple):
    folder: Path
    out: Path
    expected: dict[str, Expectation]
    printed: str
    errors: str


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The nasty folder, packed by the command line in its own process."""
    folder, out = (tmp_path_factory.mktemp("nasty") / name for name in ("folder", "out"))
    expected = make(folder)
    command = [sys.executable, "-c", PROGRAM, folder, out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return Packed(folder, out, expected, done.stdout, done.stderr)


class Sample(NamedTuple):
    path: str
    label: int
    encoded: bytes
    size: tuple[int, int]


@pytest.fixture(scope="module")
def samples(packed: Packed) -> dict[str, list[Sample]]:
    """All samples in the shards, by split, in order."""
    found: dict[str, list[Sample]] = {}
    for split in SPLITS:
        reader = ShardReader(Manifest.load(packed.out), split)
        found[split] = [
            Sample(reader.path(number), int(row["label"]), bytes(reader.encoded(number)), (row["height"], row["width"]))
            for number, row in enumerate(reader.index)
        ]
    return found


def source(packed: Packed, sample: Sample) -> bytes:
    return (packed.folder / sample.path).read_bytes()


def test_each_file_is_kept_transcoded_or_skipped_as_documented(
    packed: Packed, samples: dict[str, list[Sample]]
) -> None:
    skipped = [item["path"] for item in Manifest.load(packed.out).skipped]
    every = [sample for split in SPLITS for sample in samples[split]]
    kept = {sample.path for sample in every if sample.encoded == source(packed, sample)}
    found: dict[str, str] = dict.fromkeys(skipped, "skipped")
    found |= {sample.path: "kept" if sample.path in kept else "transcoded" for sample in every}
    assert len(found) == len(skipped) + len(every)
    expected = packed.expected | dict.fromkeys(ONLY_WARNED_OF, "kept")
    wrong = {path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)}
    assert {ascii(path): (expected.get(path), found.get(path)) for path in wrong} == {}


def test_reasons_are_readable(packed: Packed) -> None:
    reasons = {item["reason"] for item in Manifest.load(packed.out).skipped}
    assert len(reasons) >= 10
    for reason in reasons:
        assert re.fullmatch(r"\w[^\n]{5,150}", reason)
        assert reason.isprintable()
        assert not re.search(r"0x[0-9a-f]{6}|<|Traceback|Error|Exception", reason)


def by_pillow(data: bytes) -> NDArray[Any]:
    """Decode an image with Pillow, upright. 16-bit grays are scaled, because Pillow would clip them."""
    with Image.open(io.BytesIO(data)) as image:
        wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
        upright = ImageOps.exif_transpose(image)
    if wide:
        return np.repeat(np.asarray(upright)[..., None] / 257, 3, axis=2)
    if upright.mode == "P":  # converting to RGBA first avoids Pillow's warning about palettes with alpha
        upright = upright.convert("RGBA")
    return np.asarray(upright.convert("RGB")).astype(float)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # damaged EXIF
def test_images_match_pillow(packed: Packed, samples: dict[str, list[Sample]]) -> None:
    """Pixels are equal if the bytes are kept, and close if the image is transcoded."""
    for sample in (sample for split in SPLITS for sample in samples[split] if sample.path not in ONLY_WARNED_OF):
        expected = by_pillow(source(packed, sample))
        found = decode(sample.encoded)
        assert found.shape == expected.shape == (*sample.size, 3), sample.path
        distance = np.abs(found - expected).mean()
        assert distance <= (TOLERANCE if packed.expected[sample.path] == "transcoded" else 0), sample.path


def test_packing_uses_little_memory(packed: Packed) -> None:
    found = re.search(r"VmHWM:\s+(\d+) kB", packed.printed)
    assert found is not None
    assert int(found[1]) * 1024 < BYTES


def test_only_warnings_and_the_space_are_written_to_stderr(packed: Packed) -> None:
    _space, odd, *rest = packed.errors.splitlines()
    manifest = Manifest.load(packed.out)
    warned = {item["path"] for item in manifest.warnings}
    assert warned >= ONLY_WARNED_OF
    assert odd == f"{packed.out}: decoded {len(warned)} images with warnings; see `warnings` in manifest.json"
    told, *groups = [line for line in rest if line.startswith("  ") or "skipped" in line]
    assert told == f"{packed.out}: skipped {len(manifest.skipped)} files; `skipped` in manifest.json lists all:"
    assert [line for line in groups if not line.isprintable()] == []
    assert groups[0].startswith("  image file is truncated")
    *similar, classes = [line for line in rest if line not in (told, *groups)]
    assert classes.startswith(f"{packed.out}: the val split has no images of ")
    assert ["differ only in case, spaces, punctuation or Unicode form" in line for line in similar] == [True, True]


def test_every_printed_line_is_readable(packed: Packed) -> None:
    *lines, last, _ = packed.printed.partition("VmHWM")[0].split("\n")
    assert last == f"wrote {packed.out}"
    known = re.compile(
        r"(train|val|warning|identical|near-duplicate):? .*|near-duplicates of training images in other splits: .*"
    )
    assert [line for line in lines if not line.isprintable() or not known.fullmatch(line)] == []


def test_verify_finds_nothing_wrong_with_the_nasty_pack(packed: Packed) -> None:
    assert verify(packed.out) == []


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset does not close its tars
@pytest.mark.parametrize("split", SPLITS)
def test_webdataset_reads_every_nasty_sample(packed: Packed, samples: dict[str, list[Sample]], split: str) -> None:
    names = [str(packed.out / shard.name) for shard in Manifest.load(packed.out).split(split).shards]
    found = list(WebDataset(names, shardshuffle=False))
    assert [sample["jpg"] for sample in found] == [sample.encoded for sample in samples[split]]
    assert [int(sample["cls"]) for sample in found] == [sample.label for sample in samples[split]]
    assert [json.loads(sample["json"])["filename"] for sample in found] == [sample.path for sample in samples[split]]


@pytest.mark.dali
@pytest.mark.parametrize("split", SPLITS)
def test_dali_reads_every_nasty_sample(packed: Packed, samples: dict[str, list[Sample]], split: str) -> None:
    found = read_by_dali(packed.out, split, len(samples[split]))
    assert found == [(sample.encoded, sample.label) for sample in samples[split]]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_on_bad_fail_reports_one_of_the_bad_files(packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"; remove or replace it, or skip damaged images:\n  pack\(") as caught:
        pack(packed.folder, tmp_path / "out", on_bad="fail")
    named = {f"{packed.folder / item['path']}: {item['reason']}" for item in Manifest.load(packed.out).skipped}
    assert str(caught.value).rpartition("; remove")[0] in named
    assert not (tmp_path / "out").exists()
