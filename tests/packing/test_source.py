"""What is passed instead of shards is packed once, beside the runs, and found again."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kill_packer import checksums
from packs import draw_image, drawn, exactly

from fastflower import Manifest, pack
from fastflower.errors import ArgumentError, FolderError, ShardError
from fastflower.packing import source
from fastflower.packing.source import shards_of
from fastflower.shards.remote import Remote


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return drawn(tmp_path / "data", rose=4, tulip=5)


@pytest.fixture
def packs(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "packs"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "fastflower")
    return caplog


def packed(folder: Path) -> dict[str, str]:
    """Return the checksums of a pack without those of the list of what was packed."""
    return {name: value for name, value in checksums(folder).items() if name != "files.zz"}


def test_shards_and_addresses_are_returned_as_they_are(data: Path, tmp_path: Path, packs: Path) -> None:
    pack(data, tmp_path / "out")
    for shards in (tmp_path / "out", str(tmp_path / "out")):
        assert shards_of(shards, packs) == tmp_path / "out"
    address = Remote(url="s3://bucket/out", folder=tmp_path)
    assert shards_of(address, packs) is address
    assert shards_of("s3://bucket/out", packs) == "s3://bucket/out"
    assert not packs.exists()


def test_an_unfinished_pack_stays_for_the_loader_to_explain(tmp_path: Path, packs: Path) -> None:
    (tmp_path / "out" / ".packing").mkdir(parents=True)
    assert shards_of(tmp_path / "out", packs) == tmp_path / "out"


def in_class_folders(data: Path) -> Path:
    return data


def in_split_folders(data: Path) -> Path:
    drawn(data.with_name("divided") / "val", rose=1, tulip=1)
    shutil.copytree(data, data.with_name("divided") / "train")
    return data.with_name("divided")


def in_an_archive(data: Path) -> Path:
    return Path(shutil.make_archive(str(data), "zip", data))


def in_a_table(data: Path) -> Path:
    lines = [f"{path.relative_to(data)},{path.stem[-1]}\n" for path in sorted(data.glob("*/*.jpg"))]
    (data / "train.csv").write_text("".join(line for line in lines if line[-2] in "01"))
    return data / "train.csv"


def behind_a_link(data: Path) -> Path:
    (data.parent / "link").symlink_to(data)
    return data.parent / "link"


def with_another_programs_manifest(data: Path) -> Path:
    (data / "manifest.json").write_text("{}")
    return data


@pytest.mark.parametrize(
    "make",
    [
        *(in_class_folders, in_split_folders, in_an_archive),
        *(in_a_table, behind_a_link, with_another_programs_manifest),
    ],
)
def test_what_pack_takes_is_packed_once(
    make: Callable[[Path], Path], data: Path, tmp_path: Path, packs: Path, said: pytest.LogCaptureFixture
) -> None:
    passed = make(data)
    folder = shards_of(passed, packs)
    assert isinstance(folder, Path)
    pack(passed, tmp_path / "expected")
    assert packed(folder) == checksums(tmp_path / "expected")
    assert list(packs.iterdir()) == [folder]
    said.clear()
    assert shards_of(f"file://{passed}", packs) == folder
    assert said.messages == [f"{passed}: is packed already, in {folder}"]


def test_the_folder_is_the_same_from_any_working_directory(
    data: Path, packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shards_of(data, packs)
    for place, passed in ((data.parent, "data"), (data, "."), (data / "rose", ".."), (data.parent, "./data/")):
        monkeypatch.chdir(place)
        assert shards_of(passed, packs) == whole
    assert Path(str(whole)).name.startswith("data-")


@pytest.mark.parametrize(
    "name", ["with space", "ümläut 🌷", "a" * 255, "[x]*", "dot.", b"caf\xe9".decode("utf-8", "surrogateescape")]
)
def test_any_name_works(name: str, data: Path, packs: Path) -> None:
    data = data.rename(data.with_name(name))
    folder = shards_of(data, packs)
    assert shards_of(data, packs) == folder
    (data / "rose/000.jpg").unlink()
    assert shards_of(data, packs) != folder
    assert len(list(packs.iterdir())) == 2


def change_time(data: Path) -> None:
    os.utime(data / "rose/001.jpg", (1, 1))


def change_size(data: Path) -> None:
    status = (data / "rose/001.jpg").stat()
    with (data / "rose/001.jpg").open("ab") as file:
        file.write(b"\0")
    os.utime(data / "rose/001.jpg", ns=(status.st_mtime_ns, status.st_mtime_ns))


def rename(data: Path) -> None:
    (data / "rose/001.jpg").rename(data / "rose/009.jpg")


def move(data: Path) -> None:
    (data / "rose/001.jpg").rename(data / "tulip/x.jpg")


def add_a_table(data: Path) -> None:
    (data / "labels.csv").write_text("path,label\n")


def link_elsewhere(data: Path) -> None:
    """The same files by the same names, but those of another class."""
    (data / "rose/more").symlink_to(data / "tulip")


def remove_from_a_linked_class(data: Path) -> None:
    (data.parent / "elsewhere/000.jpg").unlink()


CHANGES: dict[Callable[[Path], None], str] = {
    change_time: "rose/001.jpg has been changed",
    change_size: "rose/001.jpg has been changed",
    rename: "rose/001.jpg is now rose/009.jpg",
    move: "rose/001.jpg is now tulip/x.jpg",
    add_a_table: "labels.csv has been added",
    link_elsewhere: "rose/more/ has been added",
    remove_from_a_linked_class: "lily/000.jpg has been removed",
}


@pytest.mark.parametrize(("change", "how"), CHANGES.items())
def test_changed_data_is_packed_anew_and_the_old_pack_named(
    change: Callable[[Path], None], how: str, data: Path, packs: Path, said: pytest.LogCaptureFixture
) -> None:
    drawn(data.parent, elsewhere=3)
    (data / "lily").symlink_to(data.parent / "elsewhere")
    folder = Path(str(shards_of(data, packs)))
    size = sum(path.stat().st_size for path in folder.iterdir())
    said.clear()
    change(data)
    new = shards_of(data, packs)
    assert new != folder
    what = "remove its old pack if no run on it is to resume"
    assert said.messages[0] == f"{data}: has changed ({how}); {what}: {folder} ({size / 1000:.1f} kB)"


def test_a_pack_without_the_list_of_what_was_packed_goes_on_working(
    data: Path, packs: Path, said: pytest.LogCaptureFixture
) -> None:
    """Older versions wrote none."""
    folder = Path(str(shards_of(data, packs)))
    whole = (folder / "files.zz").read_bytes()
    for rest in (b"", whole[:-9], None):
        (folder / "files.zz").write_bytes(rest) if rest is not None else (folder / "files.zz").unlink()
        assert shards_of(data, packs) == folder
    change_size(data)
    said.clear()
    assert shards_of(data, packs) != folder
    assert said.messages[0].startswith(
        f"{data}: has changed; remove its old pack if no run on it is to resume: {folder}"
    )


def test_hidden_files_and_cycles_of_links_do_not_matter(data: Path, packs: Path) -> None:
    folder = shards_of(data, packs)
    (data / "Thumbs.db").write_bytes(b"x")
    (data / ".git").mkdir()
    (data / ".git/index").write_bytes(b"x")
    assert shards_of(data, packs) == folder
    (data / "rose/again").symlink_to(data)
    assert shards_of(data, packs) == shards_of(data, packs) != folder


def test_another_folder_of_the_same_name_has_a_pack_of_its_own(
    data: Path, tmp_path: Path, packs: Path, said: pytest.LogCaptureFixture
) -> None:
    folder = shards_of(data, packs)
    said.clear()
    shutil.copytree(data, tmp_path / "other" / "data")
    assert shards_of(tmp_path / "other/data", packs) != folder
    assert "has changed" not in said.text


def test_one_process_packs_while_another_waits(
    data: Path, packs: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_POLL_SECONDS", 0.01)
    begun, calls, found = threading.Event(), [0], list[object]()

    def slow(*values: Any, **options: Any) -> Manifest:
        calls[0] += 1
        begun.set()
        while "waiting" not in said.text:
            time.sleep(0.01)
        return pack(*values, **options)

    monkeypatch.setattr(source, "pack", slow)
    threads = [threading.Thread(target=lambda: found.append(shards_of(data, packs))) for _ in range(2)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join()
    (folder,) = packs.iterdir()
    assert (calls, found) == ([1], [folder, folder])
    waits = [message for message in said.messages if "waiting" in message]
    host = os.uname().nodename
    assert len(waits) == 1
    assert waits[0].startswith(f"{data}: waiting for process {os.getpid()} on {host}, since ")
    assert waits[0].endswith(f", which packs it into {folder}")


def test_a_pack_that_was_killed_is_resumed(data: Path, packs: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from fastflower.packing import packer, source;"
        "made = packer.make_shard;"
        "packer.make_shard = lambda *a: made(*a) if a[2] == 0 else os.kill(os.getpid(), signal.SIGKILL);"
        "source.shards_of(sys.argv[1], Path(sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", program, data, packs], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    (begun,) = (path for path in packs.iterdir() if path.is_dir())
    assert not (begun / "manifest.json").exists()
    assert shards_of(data, packs) == begun
    pack(data, tmp_path / "expected")
    assert packed(begun) == checksums(tmp_path / "expected")
    assert list(packs.iterdir()) == [begun]


def test_a_test_set_is_packed_wholly_and_a_divided_folder_as_it_is(data: Path, packs: Path) -> None:
    whole = Path(str(shards_of(data, packs, as_split="test")))
    assert Manifest.load(whole).splits.keys() == {"test"}
    assert shards_of(data, packs, as_split="test") == whole
    assert shards_of(data, packs) != whole
    divided = in_split_folders(data)
    folder = Path(str(shards_of(divided, packs, as_split="test")))
    assert Manifest.load(folder).splits.keys() == {"train", "val"}
    assert shards_of(divided, packs) == shards_of(divided, packs, as_split="test") == folder
    assert len(list(packs.iterdir())) == 3


def test_a_run_finds_the_pack_that_it_began_with(data: Path, packs: Path, said: pytest.LogCaptureFixture) -> None:
    folder = Path(str(shards_of(data, packs)))
    identity = Manifest.load(folder).identity("train")["shards"]
    change_size(data)
    said.clear()
    assert shards_of(data, packs, trained=identity) == folder
    what = "has changed since this run began (rose/001.jpg has been changed), which resumes on the images that it began with"
    assert said.messages == [f"{data}: {what} ({folder})"]
    assert shards_of(data, packs, trained=identity, as_split="test") != folder


def nothing(data: Path) -> tuple[Path, type[Exception], str]:
    what = "does not exist; pass shards, a folder of images, an archive, or a table of labels."
    return data / "x", ShardError, f"{data / 'x'}: {what}"


def one_class(data: Path) -> tuple[Path, type[Exception], str]:
    shutil.rmtree(data / "rose")
    return data, FolderError, f"{data}: has one class, 'tulip'; a classifier needs at least two class folders."


def unlabeled(data: Path) -> tuple[Path, type[Exception], str]:
    for folder in ("rose", "tulip"):
        shutil.rmtree(data / folder)
    draw_image(0).save(data / "1.jpg")
    what = "has no class folders; put the images of each class into a folder of its own. Images without labels are for "
    more = "fastflower predict, or for Loader.from_files and a network of your own. To pass a table of labels"
    return data, FolderError, f"{data}: {what}{more}:\n  pack({str(data)!r}, "


@pytest.mark.parametrize("make", [nothing, one_class, unlabeled])
def test_errors_of_pack_pass_with_what_to_do_and_leave_nothing(
    make: Callable[[Path], tuple[Path, type[Exception], str]], data: Path, packs: Path
) -> None:
    passed, kind, message = make(data)
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        shards_of(passed, packs)
    assert not packs.parent.exists()


def test_an_unfinished_pack_is_finished_with_flags_where_it_lies(data: Path, packs: Path) -> None:
    for path in (data / "rose").iterdir():
        path.write_bytes(b"\xff\xd8\xff\xe0 no more")
    drawn(data, lily=2)
    with pytest.raises(FolderError, match="none of its 4 training images can be read") as failed:
        shards_of(data, packs)
    (begun,) = packs.iterdir()
    last = f"\n  pack({str(data)!r}, {str(begun)!r}, drop_empty_classes=True)"
    assert str(failed.value).endswith(last)
    pack(data, begun, drop_empty_classes=True)
    assert shards_of(data, packs) == begun


def test_a_folder_for_packs_inside_the_data_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    what = (
        "runs/packs: would hold the pack, but is inside the folder to pack (.); choose a run's folder outside (--out), "
    )
    with pytest.raises(FolderError, match=exactly(f"{what}or pack first:\n  pack('.', '../shards')")):
        shards_of(".")
    assert sorted(path.name for path in data.iterdir()) == ["rose", "tulip"]


def test_data_inside_the_folder_of_runs_is_packed(data: Path, packs: Path) -> None:
    packs.parent.mkdir()
    data = data.rename(packs.parent / "data")
    assert Path(str(shards_of(data, packs))).parent == packs


def test_a_folder_that_cannot_be_written_is_named(data: Path, packs: Path) -> None:
    packs.parent.write_text("a file")
    remedy = re.escape(f"pack first, to another folder:\n  pack({str(data)!r})")
    with pytest.raises(FolderError, match=rf"/runs/packs/data-\w+: cannot be written \(.*\); {remedy}$"):
        shards_of(data, packs)


def test_an_empty_name_is_not_the_working_directory() -> None:
    with pytest.raises(ArgumentError, match=exactly("shards must be a folder, an archive, a table or a URL, got ''.")):
        shards_of("")


def test_a_table_in_the_working_folder_is_packed_into_it_once(
    data: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    lines = [f"{path.relative_to(data)} {path.parent.name}" for path in sorted(data.rglob("*.jpg"))]
    (data / "train.txt").write_text("\n".join(lines))
    monkeypatch.chdir(data)
    first = Path(str(shards_of("train.txt")))
    assert first.parent == Path("runs/packs")
    assert sum(split.samples for split in Manifest.load(first).splits.values()) == len(lines)
    (data / "submission.csv").write_text("id,label\n1,rose\n")
    run = data / "runs" / "a"
    run.mkdir()
    (run / "run.json").write_text("{}")
    draw_image(0).save(run / "curves.png")
    assert shards_of("train.txt") == first
    assert not [record for record in said.records if "is not in" in record.message]
    draw_image(1).save(data / "rose" / "more.jpg")
    assert shards_of("train.txt") != first
