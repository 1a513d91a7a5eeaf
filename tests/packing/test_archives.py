"""Zip and tar archives are packed like the folder that they contain. Nothing is written outside the workspace."""

import io
import os
import re
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kill_packer import checksums
from packs import drawn, exactly, touch

from fastflower import Manifest, pack
from fastflower.errors import FolderError
from fastflower.packing import archives, worker

TARS = {".tar": "w", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for every other program's files."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return touch(drawn(tmp_path_factory.mktemp("classes") / "data", a=4, b=5), "a/notes.txt", "b/.hidden.jpg")


@pytest.fixture(scope="module")
def expected(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    pack(classes, out, lists=True)
    return checksums(out)


def archived(folder: Path, path: Path, prefix: str = "") -> Path:
    """Archive a folder with Python's own writers."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, prefix + str(file.relative_to(folder)))
    else:
        with tarfile.open(path, TARS[path.name[path.name.index(".") :]]) as tar:  # pyright: ignore[reportCallIssue,reportArgumentType,reportUnknownVariableType]
            tar.add(folder, prefix or ".")
    return path


@pytest.mark.parametrize(
    ("ending", "prefix"),
    [(".zip", ""), (".zip", "some/data/"), (".tar", "data/"), (".tar.gz", ""), (".tar.bz2", ""), (".tar.xz", "")],
)
def test_an_archive_gives_the_bytes_of_its_folder(
    classes: Path, tmp_path: Path, expected: dict[str, str], ending: str, prefix: str
) -> None:
    archive = archived(classes, tmp_path / f"data{ending}", prefix)
    if ending == ".tar.bz2":  # the name does not matter
        archive = archive.rename(tmp_path / "no ending")
    pack(archive, tmp_path / "out", lists=True)
    assert checksums(tmp_path / "out") == expected
    assert not (tmp_path / "out/.packing").exists()


def test_splits_lists_and_options_work_in_an_archive(tmp_path: Path) -> None:
    root = drawn(tmp_path / "data/train", a=3, b=3).parent
    drawn(root / "val", a=1, b=1)
    shutil.copytree(root / "val", root / "raw")
    listed = drawn(tmp_path / "listed", a=3, b=3, c=3)
    (listed / "train.txt").write_text("a/000.jpg\nb/001.jpg\na/002.jpg\n")
    for number, (folder, ignore) in enumerate([(root, ["/raw"]), (listed, [])]):
        archive = archived(folder, tmp_path / f"{number}.tgz", "wrapper/")
        pack(archive, tmp_path / f"{number}", ignore=ignore)
        pack(folder, tmp_path / f"{number} folder", ignore=ignore)
        assert checksums(tmp_path / f"{number}") == checksums(tmp_path / f"{number} folder")


def test_an_archive_made_on_macos_or_windows_is_read(classes: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for file in sorted(path for path in classes.rglob("*") if path.is_file()):
            info = zipfile.ZipInfo("data/" + str(file.relative_to(classes)))
            info.filename = info.filename.replace("/", "\\")
            info.create_system = 0
            archive.writestr(info, file.read_bytes())
            archive.writestr(f"__MACOSX/data/{file.parent.name}/._{file.name}", b"\0\5\x16\7")
    pack(tmp_path / "data.zip", tmp_path / "out", lists=True)
    assert checksums(tmp_path / "out") == expected


def test_an_executors_workers_see_the_unpacked_folder(
    classes: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archived(classes, tmp_path / "data.zip")
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(2) as executor:
        pack("data.zip", "out", lists=True, executor=executor)
    assert checksums(tmp_path / "out") == expected


Content = Mapping[str, tuple[bytes, str] | bytes | str]  # bytes of a file, target of a link, or (tar type, link target)


def tar_of(path: Path, members: Content) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
                continue
            info.type, info.linkname = content if isinstance(content, tuple) else (tarfile.SYMTYPE, content)
            tar.addfile(info)
    return path


def zip_of(path: Path, members: Content) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            if isinstance(content, str):
                info.external_attr = 0o120777 << 16
            archive.writestr(info, content if isinstance(content, bytes | str) else b"")
    return path


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("make", [tar_of, zip_of])
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/{outside}/evil", "C:/evil", "a/..", "..", "//evil"])
def test_a_member_outside_is_refused(tmp_path: Path, make: Callable[[Path, Content], Path], name: str) -> None:
    (tmp_path / "outside").mkdir()
    name = name.format(outside=tmp_path / "outside")
    archive = make(tmp_path / f"data.{make.__name__[:3]}", {"a/1.jpg": b"", name: b"evil", "b/1.jpg": b""})
    before = everything(tmp_path)
    what = "would be outside the folder that it is unpacked to; unpack the archive with another program, then pack the folder."
    with pytest.raises(FolderError, match=exactly(f"{archive}: {name!r} {what}")):
        pack(archive, tmp_path / "out")
    assert everything(tmp_path) == before


OUTSIDE: dict[str, Content] = {
    "absolute": {"a/link": "/etc", "a/link/evil": b"evil"},
    "relative": {"a/link": "../../..", "a/link/evil": b"evil"},
    "through another": {"a/up": ".", "a/up/up": "..", "a/up/up/up": "..", "a/evil": "up/up/up/up"},
    "a chain": {"x": "a", "y": "x/../..", "z": "y/..", "z/evil": "/etc/passwd"},
    "in the middle": {"x": ".", "y": "x/..", "y/w/evil": "1"},
    "folders through a link": {"p": "{outside}", "p/q/evil": "1"},
    "itself": {"a/loop.jpg": "loop.jpg", "a/b.jpg": "c.jpg", "a/c.jpg": "b.jpg"},
}


@pytest.mark.parametrize("make", [tar_of, zip_of])
@pytest.mark.parametrize("name", OUTSIDE)
def test_links_never_lead_outside(tmp_path: Path, make: Callable[[Path, Content], Path], name: str) -> None:
    (tmp_path / "outside").mkdir()
    links = {
        path: to.format(outside=tmp_path / "outside") if isinstance(to, str) else to
        for path, to in OUTSIDE[name].items()
    }
    archive = make(tmp_path / f"data.{make.__name__[:3]}", {**links, "a/1.jpg": b"", "b/1.jpg": b""})
    before, work = everything(tmp_path), tmp_path / "work"
    work.mkdir()
    with archives.unpacked(archive, work) as content:
        assert content == work / "unpacked"
        for path in content.rglob("*"):
            assert Path(os.path.realpath(path)).is_relative_to(content)
    shutil.rmtree(work)
    assert everything(tmp_path) == before


def test_other_members_are_skipped_with_one_warning(
    classes: Path, tmp_path: Path, expected: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    members: Content = {
        str(path.relative_to(classes)): path.read_bytes() for path in classes.rglob("*") if path.is_file()
    }
    kinds = [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE]
    members |= {f"a/odd{number}.jpg": (kind, "") for number, kind in enumerate(kinds)}
    members |= {"a/hard.jpg": (tarfile.LNKTYPE, 300 * "a"), "a/far.jpg": "/etc/passwd"}
    archive = tar_of(tmp_path / "data.tar", members)
    pack(archive, tmp_path / "out", lists=True)
    assert checksums(tmp_path / "out") == expected
    named = "'a/odd0.jpg', 'a/odd1.jpg', 'a/odd2.jpg', 'a/hard.jpg', 'a/far.jpg'"
    what = f"skipped 5 of its members: devices, pipes, or links that do not stay inside ({named})"
    assert f"{archive}: {what}" in caplog.messages


@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_links_inside_are_followed(classes: Path, tmp_path: Path, ending: str) -> None:
    folder = shutil.copytree(classes, tmp_path / "data")
    (folder / "a/linked.jpg").symlink_to("../b/000.jpg")
    (folder / "c").symlink_to("b")
    (folder / "a/same.jpg").hardlink_to(folder / "a/000.jpg")
    if ending == "tar":
        subprocess.run(["tar", "-cf", tmp_path / "data.tar", "-C", folder, "."], check=True)
    else:
        links: Content = {"a/linked.jpg": "../b/000.jpg", "c": "b"}
        files: Content = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and str(path.relative_to(folder)) not in links
        }
        zip_of(tmp_path / "data.zip", {**links, **files})
    made = pack(tmp_path / f"data.{ending}", tmp_path / "out")
    assert made.classes == ("a", "b", "c")
    pack(folder, tmp_path / "folder")
    assert checksums(tmp_path / "out") == checksums(tmp_path / "folder")


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".zip"])
def test_an_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = touch(tmp_path / "data", "a/1.jpg", "b/1.jpg")
    (root / "a/2.jpg").write_bytes(bytes(300_000))
    archive = archived(root, tmp_path / f"bomb{ending}")
    monkeypatch.setattr(archives, "_ALWAYS_BYTES", 100_000)
    monkeypatch.setattr(archives, "_MOST_TIMES", 0)
    before = everything(tmp_path)
    what = "contains more than 100000 bytes, which is suspicious for an archive of its size; if it is right, unpack it first"
    with pytest.raises(FolderError, match=re.escape(f"{archive}: {what} (")):
        pack(archive, tmp_path / "out")
    monkeypatch.setattr(archives, "_ALWAYS_BYTES", 1 << 30)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 1000))  # pyright: ignore
    what = (
        f"needs more than the 1000 bytes that are free in {tmp_path / 'out'} to be unpacked; free up space, or choose"
    )
    with pytest.raises(FolderError, match=re.escape(f"{archive}: {what} another folder as out (--out).")):
        pack(archive, tmp_path / "out")
    assert everything(tmp_path) == before


def damaged(data: bytes, kind: str) -> bytes:
    middle = len(data) // 2
    if kind == "half":
        return data[:middle]
    if kind == "without its last kilobyte":
        return data[:-1024]
    if kind == "flipped":
        return data[:middle] + bytes(byte ^ 255 for byte in data[middle : middle + 40]) + data[middle + 40 :]
    return b"no \0archive" * 1000


@pytest.mark.parametrize("kind", ["half", "without its last kilobyte", "flipped", "other"])
@pytest.mark.parametrize("ending", [".zip", *TARS])
def test_a_damaged_archive_is_named_and_nothing_stays(classes: Path, tmp_path: Path, ending: str, kind: str) -> None:
    archive = archived(classes, tmp_path / f"data{ending}")
    data = archive.read_bytes()
    if ending == ".tar":
        data = data.rstrip(b"\0") + bytes(1024)  # else the end is padding
        if kind == "flipped":
            data = data.replace(b"b/002.jpg", b"b/XX2.jpg")  # of a header, as the content has no checksum
    archive.write_bytes(damaged(data, kind) if (ending, kind) != (".tar", "flipped") else data)
    before = everything(tmp_path)
    text = rf"^{re.escape(str(archive))}: (start|directory|end|member after '.*'|'.*') cannot be read \(.+\); it is"
    with pytest.raises(FolderError, match=text):
        pack(archive, tmp_path / "out")
    assert everything(tmp_path) == before


def test_an_encrypted_zip_says_how_to_unpack_it(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "my data.zip", {"a/1.jpg": b"x", "b/1.jpg": b"x"})
    data = bytearray(archive.read_bytes())
    for start in [found.start() for found in re.finditer(b"PK\1\2", data)]:
        struct.pack_into("<H", data, start + 8, 1)
    archive.write_bytes(data)
    command = f"unzip '{archive}' -d '{tmp_path}/my data'"
    with pytest.raises(FolderError, match=exactly(f"{archive}: 'a/1.jpg' is encrypted; unpack it first ({command}).")):
        pack(archive, tmp_path / "out")


@pytest.mark.parametrize("names", [("a", "a/1.jpg"), ("a/1.jpg", "a"), ("b" * 300,)])
def test_a_name_that_cannot_be_written_is_named(tmp_path: Path, names: tuple[str, ...]) -> None:
    archive = tar_of(tmp_path / "data.tar", dict.fromkeys(names, b"x"))
    with pytest.raises(FolderError, match=rf"{names[-1]}' cannot be unpacked \(.*\); rename it in the archive\.$"):
        pack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_later_of_two_members_of_one_name_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for content in (b"first, longer", b"second"):
            info = tarfile.TarInfo("a/1.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "work").mkdir()
    with archives.unpacked(tmp_path / "data.tar", tmp_path / "work") as content:
        assert (content / "1.jpg").read_bytes() == b"second"


def stop(*_: object, **__: object) -> None:
    raise MemoryError


def test_an_interrupted_pack_resumes_without_unpacking_again(
    classes: Path, tmp_path: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, out = archived(classes, tmp_path / "data.zip"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(worker, "prepare", stop)
        with pytest.raises(FolderError, match="to resume with fewer workers:"):
            pack(archive, out, lists=True)
    other = archived(classes, tmp_path / "other.zip")
    what = f"is not the archive ('data.zip'), or has been changed, since the pack into {out} was interrupted"
    remedy = f"pass the unchanged archive to resume, or remove {out / '.packing'} to start over."
    with pytest.raises(FolderError, match=exactly(f"{other}: {what}; {remedy}")):
        pack(other, out, lists=True)
    with monkeypatch.context() as patch:
        patch.setattr(archives, "_Unpacking", None)
        pack(archive, out, lists=True)
    assert checksums(out) == expected
    with pytest.raises(FolderError, match="already contains packed shards"):
        pack(archive, out, lists=True)
    assert checksums(out) == expected


def test_a_pack_killed_while_it_unpacks_starts_again(classes: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    archive, out = archived(classes, tmp_path / "data.tar.gz"), tmp_path / "out"
    work = out / ".packing"
    touch(work, "unpacked/a/left.jpg", "unpacked/c/left.jpg", "lock")
    (work / "unpacked/a/000.jpg").write_bytes(b"half")
    pack(archive, out, lists=True)
    assert checksums(out) == expected
    touch(work, "unpacked/a/left.jpg")  # killed while it removed the workspace
    assert pack(archive, out, lists=True) == Manifest.load(out)
    assert checksums(out) == expected


def test_errors_about_the_folder_say_to_unpack_it_and_what_then(tmp_path: Path) -> None:
    root = touch(tmp_path / "data", "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "images/1.jpg")
    archive = archived(root, tmp_path / "my set.tar.gz")
    with pytest.raises(FolderError) as of_folder:
        pack(root, tmp_path / "out")
    with pytest.raises(FolderError) as of_archive:
        pack(archive, tmp_path / "out")
    unpack, _, rest = str(of_archive.value).partition(", because:\n")
    named = f"{tmp_path}/my set"
    assert unpack == f"{archive}: unpack it first (mkdir '{named}' && tar -xf '{archive}' -C '{named}')"
    assert rest.replace(f"'{named}'", str(root)).replace(named, str(root)) == str(of_folder.value)
    assert "fastflower pack" in rest
    assert not (tmp_path / "out").exists()
    subprocess.run(["bash", "-c", unpack[unpack.index("(") :]], check=True)
    assert everything(tmp_path / "my set") == everything(root)


def test_a_damaged_image_in_an_archive_is_named(classes: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classes, tmp_path / "data")
    (folder / "a/000.jpg").write_text("no image")
    archive = archived(folder, tmp_path / "x.zip")
    with pytest.raises(
        FolderError, match=re.escape(f"because:\n{tmp_path / 'x/a/000.jpg'}: is plain text, named .jpg; remove or")
    ):
        pack(archive, tmp_path / "out", on_bad="fail")
    assert pack(archive, tmp_path / "out").skipped[0] == {"path": "a/000.jpg", "reason": "is plain text, named .jpg"}


@pytest.mark.parametrize("place", ["", "a/", "nested"])
def test_archives_in_place_of_images_are_named_with_the_command(classes: Path, tmp_path: Path, place: str) -> None:
    root = touch(tmp_path / "data", *(["a/", "b/1.jpg"] if place == "a/" else []))
    root.mkdir(exist_ok=True)
    folder = root / place if place == "a/" else root
    for name in ("train.zip", "test.zip"):
        archived(classes, folder / name)
    packed = archived(root, tmp_path / "all.tar") if place == "nested" else root
    with pytest.raises(FolderError) as caught:
        pack(packed, tmp_path / "out")
    if place == "nested":
        folder = tmp_path / "all"
    what = f"{folder}: has no images: 'test.zip' is a ZIP archive, as is 1 other file"
    loop = f'for f in {folder}/*.zip; do unzip "$f" -d "${{f%.zip}}"; done'
    rest = "and pass the folder that has one folder of images per class."
    assert str(caught.value).rpartition("\n")[2] == f"{what}; unpack all of them ({loop}), {rest}"
    if not place:
        subprocess.run(["bash", "-c", loop], check=True, stdout=subprocess.DEVNULL)
        assert everything(folder / "train") == everything(classes)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.dat").write_text("no archive")
    rule = "pass a folder that contains one folder of images per class, or a zip or tar archive of one"
    with pytest.raises(FolderError, match=exactly(f"{tmp_path / 'data.dat'}: is a file; {rule}.")):
        pack(tmp_path / "data.dat", tmp_path / "out")


def test_a_tar_that_ends_with_a_zip_is_a_tar(classes: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    folder = shutil.copytree(classes, tmp_path / "data")
    archived(tmp_path / "data/a", folder / "z.zip")
    archive = archived(folder, tmp_path / "data.tar")
    assert zipfile.is_zipfile(archive)
    pack(archive, tmp_path / "out", lists=True)
    assert checksums(tmp_path / "out") == expected
