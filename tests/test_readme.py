"""Every command and every block of Python in README.md runs."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def test_the_python_of_the_readme_runs(flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [text for language, text in BLOCKS if language == "python"]
    assert blocks
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(flowers)
    Path("photo.jpg").symlink_to(next(flowers.glob("rose/*.jpg")))
    # The readme's run takes minutes; one epoch of small images takes the same path.
    small = "size=48, resize=54, "
    for text in blocks:
        shortened = text.replace("Augment(", f"Augment({small}").replace("epochs=10", "epochs=1")
        assert shortened != text or "Augment(" not in text
        exec(compile(shortened, "README.md", "exec"), {"__name__": "readme"})


def test_the_commands_of_the_readme_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines() if line.strip()]
    programs = {word for line in commands for word in line.split() if word.endswith(".py")}
    assert programs
    for program in programs:
        monkeypatch.setattr(sys, "argv", [program, "--help"])
        monkeypatch.syspath_prepend((ROOT / program).parent)  # where a program finds its neighbours
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        said = capsys.readouterr().out
        assert ended.value.code == 0, program
        for line in commands:
            if program in line:
                flags = re.findall(r"--[a-z.-]+", line.partition("#")[0])
                assert all(flag in said or flag == "--recipe" for flag in flags), line
