"""Hidden files, what systems add, and what `ignore` names: never images, classes or a reason to fail."""

import fnmatch
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packs import drawn, exactly, touch

from fastflower import Manifest, pack
from fastflower.cli import main
from fastflower.errors import ArgumentError, FolderError
from fastflower.packing import hidden
from fastflower.packing.folder import Folder, images_in, scan
from fastflower.packing.listing import Tables
from fastflower.packing.plan import load_plan

FILES = ["._1.jpg", ".hidden.jpg", "Thumbs.db", "desktop.ini", ".DS_Store"]
FOLDERS = [
    *(".ipynb_checkpoints", ".git", ".Trash-1000", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "#recycle"),
    *("System Volume Information", "@Recycle"),
]
LAYOUTS = {
    "classes": ["a/1.jpg", "a/x/2.jpg", "b/1.jpg"],
    "splits": ["train/a/1.jpg", "train/b/2.jpg", "val/images/a/3.jpg", "val/images/b/4.jpg", "test/5.jpg"],
    "one class in each camera": [f"{name}/{side}/1.jpg" for name in "abc" for side in ("left", "right")],
}


def images(found: Folder) -> list[tuple[str, int, int]]:
    return [(found.path(number), *found.files[["label", "split"]][number]) for number in range(len(found))]


def clutter(root: Path) -> Path:
    """Add hidden and system files and folders, with images inside, to every folder."""
    for folder in [Path(found) for found, _, _ in os.walk(root)]:
        touch(folder, *FILES, *(f"{name}/{inside}" for name in FOLDERS for inside in ("train/9.jpg",)))
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_hidden_and_system_names_change_nothing_at_any_depth(tmp_path: Path, name: str) -> None:
    plain = scan(touch(tmp_path / "plain", *LAYOUTS[name]))
    found = scan(clutter(touch(tmp_path / "cluttered", *LAYOUTS[name])))
    assert (images(found), found.classes, found.splits) == (images(plain), plain.classes, plain.splits)
    new = set(found.ignored) - set(plain.ignored)
    assert {reason for _, reason in new} <= {"holds hidden images (1)"}  # .hidden.jpg; one line per folder


def test_system_folders_that_cannot_be_read_are_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = clutter(touch(tmp_path / "data", *LAYOUTS["classes"]))
    real = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name in FOLDERS:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert len(scan(root)) == 3


def test_hidden_images_are_counted_once_per_folder_and_those_of_macos_not_at_all(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg", "a/.2.jpg", "a/.jpg", "a/._1.jpg", "a/.notes.txt", "b/sub/.3.PNG", ".4.jpg")
    assert scan(tmp_path).ignored == (("a", "holds hidden images (2)"), ("b/sub", "holds hidden images (1)"))


def test_a_folder_that_only_holds_hidden_images_has_none(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=rf"^{re.escape(str(tmp_path / 'b'))}: has no images \("):
        scan(touch(tmp_path, "a/1.jpg", "c/1.jpg", "b/._1.jpg", "b/.ipynb_checkpoints/1.jpg"))


def test_a_list_may_name_hidden_images_but_not_ignored_ones(tmp_path: Path) -> None:
    touch(tmp_path, "a/.1.jpg", "a/2.jpg", "b/@eaDir/1.jpg", "b/2.jpg")
    (tmp_path / "train.txt").write_text("a/.1.jpg\na/2.jpg\nb/@eaDir/1.jpg\nb/2.jpg\n")
    assert [path for path, *_ in images(scan(tmp_path))] == ["a/.1.jpg", "a/2.jpg", "b/@eaDir/1.jpg", "b/2.jpg"]
    assert [path for path, *_ in images(scan(tmp_path, ignore=["2.jpg"]))] == ["a/.1.jpg", "b/@eaDir/1.jpg"]
    assert [path for path, *_ in images(scan(tmp_path, ignore=["@eaDir"]))] == ["a/.1.jpg", "a/2.jpg", "b/2.jpg"]
    by_folder = scan(tmp_path, ignore=["/train.txt"])  # the list itself
    assert [path for path, *_ in images(by_folder)] == ["a/2.jpg", "b/2.jpg"]


def test_the_class_of_ignored_images_of_a_table_is_no_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = touch(tmp_path / "data", "a1.jpg", "b1.jpg", "c1.jpg", "c2.jpg", "left.jpg")
    (tmp_path / "labels.csv").write_text("file,label\na1.jpg,a\nb1.jpg,b\nc1.jpg,c\nc2.jpg,c\n")
    found = scan(root, Tables([tmp_path / "labels.csv"]), ignore=["c*.jpg"])
    assert (found.classes, [path for path, *_ in images(found)]) == (("a", "b"), ["a1.jpg", "b1.jpg"])
    (said,) = caplog.messages
    assert said.startswith("1 images in ")


def test_predict_reads_no_hidden_images_of_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "._1.jpg", ".2.jpg", "x/3.jpg", ".cache/4.jpg")
    found = images_in(tmp_path)
    paths = [tmp_path / found.path(number) for number in range(len(found))]
    assert paths == [tmp_path / "1.jpg", tmp_path / "x/3.jpg"]
    assert found.ignored == ((".", "is hidden or added by a system"),) * 3  # a folder is one


# Without "!", "\" and "[", which git reads in its own way.
PART = st.sampled_from(["a", "b", "a*", "*", "?", "1.jpg", "*.jpg", "**"])
PATTERN = st.builds(
    lambda first, parts, last: first + "/".join(parts) + last,
    st.sampled_from(["", "/"]),
    st.lists(PART, min_size=1, max_size=3),
    st.sampled_from(["", "/"]),
)
TREE = ["a/1.jpg", "a/b/1.jpg", "a/b/a/2.jpg", "b/1.jpg", "b/ab/2.jpg", "ab/b/3.jpg", "1.jpg/1.jpg", "1.jpg/a"]


@settings(deadline=None, max_examples=50, derandomize=True)
@given(pattern=PATTERN)
@example(pattern="a/**/1.jpg")
def test_a_pattern_matches_what_a_regular_expression_for_gitignore_matches(pattern: str) -> None:
    parts = pattern.strip("/").split("/")
    regex = "" if "/" in pattern.rstrip("/") else "(?:.*/)?"
    for part in parts:
        regex += "(?:[^/]+/)*" if part == "**" else fnmatch.translate(part)[4:-3].replace(".*", "[^/]*") + "/"
    for path in TREE:
        folders = [path[: cut.start() + 1] for cut in re.finditer("/", path)]
        targets = folders if pattern.endswith("/") else [*folders, f"{path}/"]
        expected = any(re.fullmatch(regex, target) for target in targets)
        with hidden.ignoring(Path("/nowhere"), [pattern]):
            assert hidden.is_ignored(f"/nowhere/{path}") == expected, (pattern, path)


@pytest.mark.parametrize(
    "pattern",
    [
        *("[^a]", "[^]b]/1*", "[[^]a]", "[!a]b"),
        *("a", "a/", "/a", "b/1.jpg", "*.jpg", "a*/b", "/*/1.jpg", "**/b/*.jpg", "a/**/a", "[ab]/b", "1.jpg/", "./a"),
    ],
)
def test_a_pattern_matches_what_git_matches(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path, *TREE)
    (tmp_path / ".gitignore").write_text(f"{pattern.removeprefix('.')}\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    shown = subprocess.run(
        ["git", "ls-files", "-o", "--exclude-standard"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    with hidden.ignoring(tmp_path, [pattern]):
        kept = {path for path in TREE if not hidden.is_ignored(f"{tmp_path}/{path}")}
    assert kept == set(shown.stdout.split()) - {".gitignore"}


def test_ignored_folders_are_no_classes_and_make_nothing_ambiguous(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/2.jpg", "images/3.jpg", "train/b/x_mask.png")
    touch(root, "train/notes/readme.txt", "train/b/raw/4.jpg", "train/.cache/5.jpg")
    found = scan(root, ignore=["/images", "*_mask.*", "notes/", "train/**/raw"])
    assert [path for path, *_ in images(found)] == ["train/a/1.jpg", "train/b/1.jpg", "val/a/2.jpg"]
    assert (found.splits, found.ignored) == (("train", "val"), ())


def test_a_pattern_without_a_match_is_named_before_packing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = touch(tmp_path, "a/1.jpg", "b/1.jpg", "b/.DS_Store", "notes.txt")
    scan(root, ignore=[".DS_Store", "notes.txt"])
    assert caplog.messages == []
    scan(root, ignore=["Raw", "1.jpg/", "b/1.jpg", "a/2.jpg"][:2])
    rule = "write a name, or a path relative to this folder"
    assert caplog.messages == [f"{root}: nothing matches the pattern {name!r}; {rule}" for name in ("Raw", "1.jpg/")]
    caplog.clear()
    scan(root, ignore=["Notes.txt"])
    meant = "did you mean notes.txt?\n  pack(folder, 'shards-2', ignore=['notes.txt'])"
    assert caplog.messages == [f"{root}: nothing matches the pattern 'Notes.txt'; {rule}; {meant}"]


@pytest.mark.parametrize(
    ("ignore", "text"),
    [
        ("*.tmp", "ignore must be a list of patterns, got '*.tmp'."),
        ([1], "ignore must be a list of patterns, got [1]."),
        (["!a"], "ignore must be names or paths without a leading !, got '!a'."),
        (["a", ""], "ignore must be names or paths without a leading !, got ''."),
        (["./"], "ignore must be names or paths without a leading !, got './'."),
    ],
)
def test_invalid_patterns_are_refused(tmp_path: Path, ignore: Any, text: str) -> None:
    with pytest.raises(ArgumentError, match=exactly(text)):
        pack(touch(tmp_path / "data", "a/1.jpg", "b/1.jpg"), tmp_path / "out", ignore=ignore)
    assert not (tmp_path / "out").exists()


def test_the_manifest_records_the_patterns_and_they_belong_to_an_interrupted_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = drawn(tmp_path / "data", a=3, b=3, c=2), tmp_path / "out"

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("fastflower.packing.worker.prepare", full)
        with pytest.raises(FolderError, match="resume"):
            pack(root, out, ignore=["c", "000.*"])
    assert load_plan(out / ".packing", root).options.ignore == ("c", "000.*")
    with pytest.raises(FolderError, match=r"interrupted pack with ignore \('c', '000.\*'\), not \(\)"):
        pack(root, out)
    manifest = pack(root, out, ignore=["c", "000.*"])
    assert manifest == Manifest.load(out)
    assert manifest.options["ignore"] == ["c", "000.*"]
    assert (manifest.classes, sum(split.samples for split in manifest.splits.values())) == (("a", "b"), 4)
    assert manifest.skipped == ()


def test_the_command_line_takes_several_patterns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = drawn(tmp_path / "data", a=3, b=3, c=2), tmp_path / "out"
    assert main(["pack", "--ignore", "c", "--ignore", "/a/000.jpg", str(root), "--out", str(out)]) == 0
    assert Manifest.load(out).options["ignore"] == ["c", "/a/000.jpg"]
    assert "skipped" not in capsys.readouterr().out


def test_commands_in_messages_repeat_the_patterns(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "im[a]ges/1.jpg", "raw/1.jpg")
    with pytest.raises(FolderError) as caught:
        scan(root, ignore=["raw"])
    assert f"fastflower pack {root} --ignore raw --ignore '/im[[]a]ges'\n" in str(caught.value)
    assert str(caught.value).endswith(f"fastflower pack {root} --ignore raw --split-by class")
    assert scan(root, ignore=["raw", "/im[[]a]ges"]).splits == ("train", "val")


def test_the_list_that_a_message_makes_names_no_hidden_images(tmp_path: Path) -> None:
    names = ["train/1.jpg", "train/._1.jpg", "train/.cache/1.jpg", "train/@eaDir/1.jpg/small.jpg", "car/1.jpg"]
    root = touch(tmp_path, *names)
    with pytest.raises(FolderError) as caught:
        scan(root)
    command = str(caught.value).rpartition(": ")[2].partition(" && fastflower")[0]
    subprocess.run(["bash", "-c", command], check=True)
    assert set((root / "train.txt").read_text().split()) == {"train/1.jpg", "car/1.jpg"}
