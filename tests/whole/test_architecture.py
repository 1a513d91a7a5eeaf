"""The structure of the library: import order, cost of imports, length of files, documentation."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from statistics import median

import pytest
from places import ROOT

import fastflower

PACKAGE = ROOT / "fastflower"
FOLDERS = sorted(path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)
LIBRARY = sorted(path for path in PACKAGE.rglob("*.py") if path not in FOLDERS)
PROGRAMS = [path for name in ("tools", "benchmarks", "tests") for path in sorted((ROOT / name).glob("**/*.py"))]

# A file imports only files above it. Augment.from_torchvision imports torchvision_compat when called.
LISTED = re.findall(r"^    ([\w/]+)\.py ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
ORDER = [*(path.replace("/", ".") for path in LISTED), "__init__"]

PUBLIC = {
    "Augment", "Recipe", "pack", "train", "evaluate", "predict", "Loader", "Batch", "Manifest", "Checkpoint", "Report",
    "FastflowerError", "Predictor", "export",
}  # fmt: skip


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, also inside functions; `from a import b` gives a.b, which may be a module."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def dotted(path: Path) -> str:
    """Return the module name of a library file without "fastflower."."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@cache
def files_imported(path: Path) -> set[str]:
    """Return the dotted names of the fastflower files that a file imports; an imported package gives its own name."""
    found: set[str] = set()
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "fastflower":
            parts = rest.split(".")
            starts = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
            folder = "__init__" if len(parts) < 2 else starts[-2]
            found.add(next((start for start in starts if start in ORDER), folder))
    return found


def test_the_import_order_lists_every_file_once() -> None:
    assert sorted(ORDER) == sorted(dotted(path) for path in LIBRARY)


def test_files_outside_folders_come_first_or_last() -> None:
    places = [bool(name.count(".")) for name in ORDER]
    first, last = places.index(True), len(places) - places[::-1].index(True)
    assert all(places[first:last])


@pytest.mark.parametrize("depth", [1, 2])
def test_the_files_of_a_folder_are_listed_together(depth: int) -> None:
    folders = [name for name, _ in groupby(".".join(name.split(".")[:-1][:depth]) for name in ORDER) if name]
    inside = [name for name in folders if name.count(".") == depth - 1]
    assert len(inside) == len(set(inside))


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.parent.name)
def test_a_folders_init_file_has_only_a_docstring_of_three_lines_or_more(path: Path) -> None:
    (only,) = tree(path).body
    assert isinstance(only, ast.Expr)
    assert len((ast.get_docstring(tree(path)) or "").splitlines()) >= 3


def test_every_folder_of_the_library_is_a_package() -> None:
    """Python also imports a folder without __init__.py, but its files would escape the import order."""
    folders = {path.parent for path in LIBRARY} - {PACKAGE}
    assert folders == {path.parent for path in FOLDERS}


@pytest.mark.parametrize("path", LIBRARY, ids=dotted)
def test_a_file_imports_only_files_above_it(path: Path) -> None:
    above = set(ORDER[: ORDER.index(dotted(path))])
    assert files_imported(path) - above == set()


def importers(name: str, found: Callable[[Path], set[str]]) -> list[str]:
    return [dotted(path) for path in LIBRARY if name in found(path)]


def test_only_one_file_imports_dali() -> None:
    (dali,) = importers("nvidia", tops)
    assert importers(dali, files_imported) == ["loading.backends.selection"]
    assert dali == "loading.backends.dali"


def test_only_one_file_imports_triton() -> None:
    (kernels,) = importers("triton", tops)
    assert importers(kernels, files_imported) == ["loading.backends.triton"]
    assert kernels == "loading.backends.triton_kernels"


def test_the_library_imports_no_program() -> None:
    programs = {"benchmarks", "common", "tools", "tests", *(path.stem for path in PROGRAMS)} - {"__init__"}
    assert [path.name for path in LIBRARY if tops(path) & programs] == []


def test_the_baseline_imports_nothing_of_the_library() -> None:
    path = ROOT / "benchmarks" / "common" / "baseline.py"
    names = tops(path)
    assert "torchvision" in names
    assert not names & {"fastflower", "common", *(other.stem for other in PROGRAMS)}


IMPORT = """
import sys
sockets = []
sys.addaudithook(lambda event, args: sockets.append(event) if event.startswith(("socket.", "urllib.")) else None)
import fastflower
heavy = {"torch", "torchvision", "nvidia", "cv2", "numpy", "PIL", "matplotlib", "webdataset"} & set(sys.modules)
assert not heavy, heavy
assert not sockets, sockets
import fastflower.cli
heavy = {"torch", "torchvision", "nvidia", "cv2", "numpy", "PIL", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
import fastflower.packing.packer
heavy = {"torch", "torchvision", "nvidia", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
assert not sockets, sockets
"""


def test_importing_is_light_silent_and_opens_no_socket() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_public_names_are_the_documented_ones() -> None:
    assert len(fastflower.__all__) == len(PUBLIC)
    assert set(fastflower.__all__) == PUBLIC
    assert dir(fastflower) == sorted(fastflower.__all__)
    for name in fastflower.__all__:
        assert getattr(fastflower, name).__name__ == name


def test_type_checkers_see_the_same_names() -> None:
    (block,) = [node for node in tree(ROOT / "fastflower" / "__init__.py").body if isinstance(node, ast.If)]
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    home = {name: f"{getattr(fastflower, name).__module__}.{name}" for name in fastflower.__all__}
    assert seen == home


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'fastflower' has no attribute 'load'$"):
        fastflower.load  # noqa: B018  (the lookup raises)


def definitions(nodes: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Yield (dotted name, node) of all functions and classes, including nested ones."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield f"{prefix}.{node.name}", node
            yield from definitions(node.body, f"{prefix}.{node.name}")
        elif isinstance(node, ast.If | ast.With | ast.Try | ast.For | ast.While):
            inner = [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]
            yield from definitions(inner, prefix)


DEFINITIONS = [found for path in LIBRARY for found in definitions(tree(path).body, dotted(path))]


def parameters(node: ast.FunctionDef | ast.ClassDef) -> int:
    """Return the number of a function's parameters without self, or of a class's fields, which its constructor takes."""
    if isinstance(node, ast.ClassDef):
        value = any("dataclass" in ast.unparse(mark) for mark in node.decorator_list)
        value |= any(ast.unparse(base) == "NamedTuple" for base in node.bases)
        return sum(isinstance(each, ast.AnnAssign) for each in node.body) if value else 0
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([argument for argument in arguments if argument.arg not in ("self", "cls")])


def by_keyword(name: str, node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Return whether callers must pass all but a few arguments by keyword, and the docstring describes each of those."""
    if isinstance(node, ast.ClassDef):
        keyword_only = any("kw_only=True" in ast.unparse(mark) for mark in node.decorator_list)
        last = [one for one, after in pairwise(node.body) if isinstance(one, ast.AnnAssign) and not is_field(after)]
        return keyword_only and all(is_text(node.body[node.body.index(one) + 1]) for one in last)
    owner = next((other for path, other in DEFINITIONS if path == name.removesuffix(".__init__")), node)
    told = re.findall(r"^ +([a-z_]+(?:, [a-z_]+)*): [A-Z\"]", ast.get_docstring(owner) or "", re.MULTILINE)
    names = {name for line in told for name in line.split(", ")}
    few = len(node.args.posonlyargs) + len(node.args.args) <= 3
    return few and {argument.arg for argument in node.args.kwonlyargs} <= names


def is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign)


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def branching() -> dict[str, int]:
    """Return the McCabe complexity of each function, as counted by ruff."""
    command = ["ruff", "check", "--isolated", "--select", "C901", "--config", "lint.mccabe.max-complexity=0"]
    command += ["--output-format", "json", str(PACKAGE)]
    found = json.loads(
        subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False).stdout
    )
    counts = [re.fullmatch(r"`(\w+)` is too complex \((\d+) > 0\)", item["message"]) for item in found]
    return {
        f"{dotted(Path(item['filename']))}.{count[1]}:{item['location']['row']}": int(count[2])
        for item, count in zip(found, counts, strict=True)
        if count
    }


def test_functions_signatures_and_branching_keep_their_limits() -> None:
    """At most 60 lines without docstring and a complexity of 15; at most 12 parameters, unless keyword-only and documented.

    `pytest -s -k limits` prints the library's statistics.
    """
    lengths = {
        name: (node.end_lineno or 0) - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
        for name, node in DEFINITIONS
        if isinstance(node, ast.FunctionDef)
    }
    counts = {name: parameters(node) for name, node in DEFINITIONS}
    complexity = branching()
    assert len(complexity) == sum(isinstance(node, ast.FunctionDef) for _, node in DEFINITIONS)
    lines = sum(len(path.read_text().splitlines()) for path in LIBRARY)
    ordered = sorted(lengths.values())
    print(f"\n{len(LIBRARY)} files in {len(FOLDERS)} folders, {lines} lines, {len(lengths)} functions")
    print(f"lines per function: median {median(ordered):.0f}, 95th percentile {ordered[int(0.95 * len(ordered))]}")
    for what, found in (("longest", lengths), ("most parameters", counts), ("most branches", complexity)):
        worst = sorted(found.items(), key=itemgetter(1), reverse=True)[:5]
        print(f"{what}: {', '.join(f'{name} {value}' for name, value in worst)}")
    assert {name: length for name, length in lengths.items() if length > 60} == {}
    nodes = dict(DEFINITIONS)
    assert {name: n for name, n in counts.items() if n > 12 and not by_keyword(name, nodes[name])} == {}
    assert {name: count for name, count in complexity.items() if count > 15} == {}


def test_types_are_precise_except_for_untyped_libraries() -> None:
    """Uses Any at most 40 times, and relaxes strict type checking only in files that use an untyped library."""
    names = [node.id for path in LIBRARY for node in ast.walk(tree(path)) if isinstance(node, ast.Name)]
    assert names.count("Any") <= 40
    lenient = [dotted(path) for path in LIBRARY if "\n# pyright: " in path.read_text()]
    assert lenient == [
        "loading.backends.dali",
        "loading.backends.triton_kernels",
        "loading.picture",
        "progress",
        "reporting.figures",
    ]


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in [*LIBRARY, *PROGRAMS]}
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}


def test_only_the_command_line_prints() -> None:
    def prints(path: Path) -> bool:
        calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        return any(isinstance(function, ast.Name) and function.id == "print" for function in calls)

    assert [dotted(path) for path in LIBRARY if prints(path)] == ["cli"]


def public(nodes: list[ast.stmt]) -> list[ast.FunctionDef | ast.ClassDef]:
    """Return public classes and functions, except properties, whose names may say enough."""
    found = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    properties = [node for node in found for mark in node.decorator_list if ast.unparse(mark) == "property"]
    return [node for node in found if not node.name.startswith("_") and node not in properties]


def inherited(owner: type, name: str) -> bool:
    """Return whether a base class documents a method."""
    return any(getattr(vars(base).get(name), "__doc__", None) for base in owner.__mro__[1:])


@pytest.mark.parametrize("path", LIBRARY, ids=dotted)
def test_public_functions_classes_and_methods_are_documented(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module)
    found = public(module.body)
    assert [node.name for node in found if not ast.get_docstring(node)] == []
    methods = [(owner, node) for owner in found if isinstance(owner, ast.ClassDef) for node in public(owner.body)]
    bare = [(owner.name, node.name) for owner, node in methods if not ast.get_docstring(node)]
    library = import_module(f"fastflower.{dotted(path)}") if bare else None
    assert [names for names in bare if not inherited(getattr(library, names[0]), names[1])] == []
