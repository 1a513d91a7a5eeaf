"""The Python in README.md runs, and its commands exist with their flags."""

import re
from pathlib import Path

import pytest
from places import ROOT

from fastflower.cli import main

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


@pytest.mark.usefixtures("narrow")
def test_the_python_of_the_readme_runs(flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [text for language, text in BLOCKS if language == "python"]
    assert blocks
    monkeypatch.chdir(tmp_path)
    for path in flowers.glob("*/000*.jpg"):  # 50: one step of training
        Path("data", path.parent.name).mkdir(parents=True, exist_ok=True)
        Path("data", path.parent.name, path.name).symlink_to(path)
    Path("photo.jpg").symlink_to(next(flowers.glob("rose/*.jpg")))
    # The readme's run takes minutes; one epoch of few and small images takes the same path.
    small = "size=48, resize=54, "
    for text in blocks:
        shortened = text.replace("Augment(", f"Augment({small}").replace("epochs=10", "epochs=1")
        assert shortened != text or "Augment(" not in text
        exec(compile(shortened, "README.md", "exec"), {"__name__": "readme"})


COMMANDS = [
    line.partition("#")[0]
    for language, text in BLOCKS
    if language == "sh"
    for line in text.splitlines()
    if line.strip()
]


def assert_flags_exist(line: str, said: str) -> None:
    flags = re.findall(r"--[a-z][a-z.-]*", line)
    assert all(flag in said or flag == "--recipe" for flag in flags), line


VERBS = [line for line in COMMANDS if "fastflower " in line]
assert VERBS


@pytest.mark.parametrize("line", VERBS)
def test_verbs_in_the_readme_have_the_flags_it_uses(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([line.partition("fastflower ")[2].split()[0], "--help"])
    assert_flags_exist(line, capsys.readouterr().out)
