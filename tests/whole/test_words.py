"""Docs, docstrings, comments, help and messages use the terms of the field, in sentences that are not too long."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *sorted(ROOT.glob("docs/*.md"))]
DOCS.remove(ROOT / "docs/log.md")  # history stays as it was written
PROGRAMS = sorted(path for name in ("fastflower", "tools", "benchmarks") for path in (ROOT / name).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TEMPLATES = sorted((ROOT / "fastflower").rglob("*.html"))

BRITISH = (
    r"\w*colour\w*|\w*grey\w*|\w*centr(e|ed|es|ing)\b|\w*neighbour\w*|\w*behaviour\w*|\w*favour\w*|\w+[^aeiou\W]is(e|es|ed|ing|ation)er"
    r"|(normal|initial|synchron|recogn|optim|summar|organ|serial|random|visual)is(e|es|ed|ing|ation)\w*"
    r"|\w*labell\w*|cancell(ed|ing)|learnt|spelt|whilst|amongst|licence|catalogue|judgement"
)
OLD = {
    "image": r"photographs?|(?<!fill=')photos?(?!\.jpg)|pictures?",
    "near-duplicate": r"look-?alikes?",
    "correct": r"hits",
    "load, data loading": r"feeding|feeds|fed",
    "horizontal flip, vertical flip": r"mirror(ed)? images?|upside[- ]down",
    "backend": r"executor=(?!executor)|the executor's",
    "decode scale": r"at reduced scale|reduced decoding|factor by which (it|the image) is reduced",
    "model soup": r"the soup|a soup",
    "prefetch": r"ahead of need|fetche[sd] ahead",
    "worker": r"makers?",
    "replaced by the next sample": r"stands? in for",
    "resume": r"goes on where|go on where|goes on after|go on with",
    "by default": r"unless said otherwise|unless told otherwise|without more said",
    "within noise": r"more than chance|told from noise|tell from noise",
    "optimistic": r"hopeful",
    "American spelling": BRITISH,
}
"""What to write, and the phrases it replaces."""

Text = tuple[str, int, str]
"""Where it stands, the line, and what it says."""


def of_markdown(path: Path) -> Iterator[Text]:
    """Prose: no blocks of code, and no `code`."""
    text = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), path.read_text(), flags=re.DOTALL)
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("    ") and not (
            path.name == "CONTRIBUTING.md" and line.startswith("| ")
        ):  # its list of words
            yield str(path), number, re.sub(r"`[^`]*`", "`", line)


def of_python(path: Path, *, strings: bool = True) -> Iterator[Text]:
    """Docstrings and comments, and of what a program says every string of several words."""
    name, source = str(path), path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield name, token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        statement = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for constant in [node.value] if statement else [node] if strings and isinstance(node, ast.Constant) else []:
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str) and " " in constant.value.strip():
                yield name, constant.lineno, re.sub(r"`[^`]*`|>>> .*", "`", constant.value)


def texts() -> Iterator[Text]:
    for path in DOCS:
        yield from of_markdown(path)
    for path in PROGRAMS:
        yield from of_python(path)
    for path in TESTS:
        if path.name != Path(__file__).name:
            yield from of_python(path, strings=False)
    for path in TEMPLATES:
        yield str(path), 1, re.sub(r"\{[{%].*?[}%]\}|<[^>]*>", " ", path.read_text())


def old_phrases(said: str) -> list[tuple[str, str]]:
    return [
        (match[0], better)
        for better, phrases in OLD.items()
        for match in re.finditer(rf"(?<![\w/.\-_])({phrases})(?![\w/_])", said, re.IGNORECASE)
    ]


def test_no_text_uses_the_old_vocabulary() -> None:
    found = [
        f"{where}:{line}: {phrase!r}: write {better}"
        for where, line, said in texts()
        for phrase, better in old_phrases(said)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("said", "better"),
    [
        ("A photograph of a flower", "image"),
        ("its colour", "American spelling"),
        ("normalised images", "American spelling"),
        ("losses and hits", "correct"),
        ("look-alikes across the split", "near-duplicate"),
        ("images and their mirror images", "horizontal flip, vertical flip"),
        ("another sample stands in for it", "replaced by the next sample"),
    ],
)
def test_an_old_phrase_is_found(said: str, better: str) -> None:
    assert [write for _, write in old_phrases(said)] == [better]


def test_code_and_names_on_disk_are_not_prose(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text('"""Reads `hits`."""\n\nvalues = {"hits": 3, "fill": "photo"}\n')
    assert [old_phrases(said) for _, _, said in of_python(program)] == [[]]
