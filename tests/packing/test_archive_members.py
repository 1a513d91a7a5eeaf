"""Members of archives whose name or content is easily lost: UTF-8 names, hard links, duplicates, what follows the end."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from packs import drawn, exactly

from fastflower import pack
from fastflower.errors import FolderError
from fastflower.packing import archives


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for every other program's files."""
    monkeypatch.setattr(os, "sync", lambda: None)


def content_of(archive: Path) -> dict[str, bytes]:
    """Unpack an archive and return its files."""
    work = archive.parent / "work"
    work.mkdir()
    with archives.unpacked(archive, work):
        top = work / "unpacked"
        files = {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}
    shutil.rmtree(work)
    return files


def tar_of(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


class Unmarked(zipfile.ZipInfo):
    """A member with a name in UTF-8, which is not marked as such, as in the zips of Info-ZIP and macOS."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode(), self.flag_bits & ~0x800


@pytest.mark.parametrize("name", ["äpfel/日本 1.jpg", "a/plain.jpg"])
def test_utf8_names_that_are_not_marked_are_read(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(Unmarked(name), b"1")
        archive.writestr("ä/marked.jpg", b"2")
    assert zipfile.ZipFile(tmp_path / "x.zip").namelist()[0] == name.encode().decode("cp437")
    assert content_of(tmp_path / "x.zip") == {name: b"1", "ä/marked.jpg": b"2"}


class Dos(zipfile.ZipInfo):
    """A member with a name in code page 437."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode("cp437"), self.flag_bits & ~0x800


@pytest.mark.parametrize("fits", [True, False])
def test_the_unicode_path_counts_if_its_checksum_fits(tmp_path: Path, fits: bool) -> None:
    info, real = Dos("a/né_.jpg"), "a/né☃.jpg"
    checksum = zlib.crc32(info.filename.encode("cp437")) ^ (not fits)
    extra = struct.pack("<BI", 1, checksum) + real.encode()
    info.extra = struct.pack("<HHI", 1234, 4, 0) + struct.pack("<HH", 0x7075, len(extra)) + extra
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, b"1")
    assert content_of(tmp_path / "x.zip") == {real if fits else "a/né_.jpg": b"1"}


def test_a_file_that_gnu_tar_stores_twice_keeps_its_content(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(name.encode())
    (tmp_path / "a/3.jpg").hardlink_to(tmp_path / "a/1.jpg")
    subprocess.run(["tar", "-cf", "x.tar", "a/1.jpg", "a/1.jpg", "a"], cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert any(member.islnk() and member.name == member.linkname for member in tar)
    assert content_of(tmp_path / "x.tar") == {"a/1.jpg": b"1.jpg", "a/2.jpg": b"2.jpg", "a/3.jpg": b"1.jpg"}


@pytest.mark.parametrize("ending", ["tar", "zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_one_name_are_named_unless_they_are_identical(
    tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    members = [("a/1.jpg", b"first"), ("a/2.jpg", b"same"), ("a/1.jpg", b"last"), ("a/2.jpg", b"same")]
    archive = tmp_path / f"x.{ending}"
    if ending == "tar":
        tar_of(archive, *members)
    else:
        with zipfile.ZipFile(archive, "w") as opened:
            for name, content in members:
                opened.writestr(name, content)
    assert content_of(archive) == {"a/1.jpg": b"last", "a/2.jpg": b"same"}
    what = "1 of its members replaced another one of the same name with different content"
    assert caplog.messages == [f"{archive}: {what} ('a/1.jpg')"]


COMPRESSED = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}


@pytest.mark.parametrize("ending", COMPRESSED)
def test_what_follows_the_end_of_a_tar_is_not_lost_in_silence(tmp_path: Path, ending: str) -> None:
    compress = COMPRESSED[ending]
    one, two = (tar_of(tmp_path / name, (f"{name}/1.jpg", b"x")).read_bytes() for name in "ab")
    archive, target = tmp_path / f"x.{ending}", tmp_path / "x"
    what = "has data after its end marker, as when tar archives are joined with cat"
    command = f"mkdir {target} && tar --ignore-zeros -xf {archive} -C {target}"
    for joined in (compress(one + two), compress(one) + compress(two)):
        archive.write_bytes(joined)
        with pytest.raises(
            FolderError, match=exactly(f"{archive}: {what}; unpack it ({command}), then pack the folder.")
        ):
            content_of(archive)
        shutil.rmtree(tmp_path / "work")
    subprocess.run(command, shell=True, check=True)
    assert {path.name for path in target.iterdir()} == {"a", "b"}
    for padded in (compress(one + bytes(5000)), compress(one) + bytes(1024)):
        archive.write_bytes(padded)
        assert content_of(archive) == {"a/1.jpg": b"x"}


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("classes") / "data", a=2, b=2)


def zipped(folder: Path, path: Path, prefix: str, *others: str) -> Path:
    """Return a zip of a folder below a prefix, and of other files with some text."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, prefix + str(file.relative_to(folder)))
        for name in others:
            archive.writestr(name, "text")
    return path


def start_of(archive: Path, **options: Any) -> str:
    """Return the folder of an archive that would be packed."""
    work = archive.parent / "work"
    work.mkdir()
    with archives.unpacked(archive, work, **options) as content:
        start = str(content.relative_to(work / "unpacked"))
    shutil.rmtree(work)
    return start


@pytest.mark.parametrize(
    ("prefix", "others", "start"),
    [
        ("w/", ["README.md"], "w"),
        ("w/", ["README.md", "docs/x.txt"], "w"),
        ("v/w/", ["v/README.md", "LICENSE"], "v/w"),
        ("w/", ["docs/logo.png"], "."),  # both may be classes
        ("w/", ["1.jpg"], "."),
        ("w/", ["train.txt"], "."),
        ("w/train/", ["w/val/x.txt", "README.md"], "w"),
        ("", ["README.md"], "."),
    ],
)
def test_the_only_folder_with_class_folders_is_packed(
    classes: Path, tmp_path: Path, prefix: str, others: list[str], start: str, caplog: pytest.LogCaptureFixture
) -> None:
    archive = zipped(classes, tmp_path / "x.zip", prefix, *others)
    assert start_of(archive) == start
    named = ", ".join(map(repr, sorted({name if "docs" not in name else "docs" for name in others})))
    told = [f"{archive}: packs {start!r}, the only folder with images; not {named}"] if start != "." else []
    if prefix.startswith("v"):
        told = [f"{archive}: packs 'v/w', the only folder with images; not 'LICENSE', 'v/README.md'"]
    if prefix.endswith("train/"):
        told = [f"{archive}: packs 'w', the only folder with images; not 'README.md'"]
    assert caplog.messages == told
    if start == "w":
        assert start_of(archive, tables=True) == "."


def test_patterns_count_from_the_archive_and_from_the_folder_that_is_packed(
    classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = zipped(classes, tmp_path / "x.zip", "w/", "w/raw/1.jpg", "docs/1.png", "w/old/1.jpg", "w/a/9.txt")
    for patterns in (["docs", "w/raw", "/old"], ["docs/", "w/raw/", "w/old", "*.txt"], ["/docs", "raw", "old"]):
        made = pack(archive, tmp_path / "out", ignore=patterns)
        shutil.rmtree(tmp_path / "out")
        assert made.classes == ("a", "b")
        assert all("9.txt" in skipped["path"] for skipped in made.skipped)
    caplog.clear()
    pack(archive, tmp_path / "out", ignore=["docs", "w/raw", "/old", "w/none"])
    what = f"{archive}: nothing matches the pattern 'w/none'; write a name, or a path relative to this folder"
    assert caplog.messages.count(what) == 1
    assert not any("nothing matches" in message for message in set(caplog.messages) - {what})


@pytest.mark.parametrize("name", ["train.csv", "w/train.csv"])
def test_a_table_in_an_archive_is_found_by_both_paths(classes: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(classes, tmp_path / "data")
    (folder / "train.csv").write_text("path,label\na/000.jpg,x\nb/000.jpg,y\na/001.jpg,y\n")
    archive = zipped(folder, tmp_path / "x.zip", "w/")
    assert pack(archive, tmp_path / "out", labels=name).classes == ("x", "y")
