"""The shape of the library: what imports what, what importing costs, how long files are, what is documented."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import fastflower

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "fastflower").glob("*.py"))
PROGRAMS = [path for name in ("tools", "benchmarks", "tests") for path in sorted((ROOT / name).glob("**/*.py"))]

# A file imports files above it only. Augment.from_torchvision imports torchvision_compat when it is called.
ORDER = [*re.findall(r"^    (\w+)\.py ", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE), "__init__"]

PUBLIC = {
    "Augment", "Recipe", "pack", "train", "evaluate", "predict", "Loader", "Batch", "Manifest", "Checkpoint", "Report",
    "FastflowerError",
}  # fmt: skip


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, also inside functions; `from a import b` gives a.b, which may be a module."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def files_imported(path: Path) -> set[str]:
    """The files of fastflower that a file imports, without ending."""
    found: set[str] = set()
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "fastflower":
            first = rest.partition(".")[0]
            found.add(first if first in ORDER else "__init__")
    return found


def test_the_order_names_every_file_once() -> None:
    assert sorted(ORDER) == [path.stem for path in LIBRARY]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_a_file_imports_only_files_above_it(path: Path) -> None:
    above = set(ORDER[: ORDER.index(path.stem)])
    assert files_imported(path) - above == set()


def test_only_the_dali_executor_imports_dali() -> None:
    assert [path.stem for path in LIBRARY if "nvidia" in tops(path)] == ["dali_executor"]
    assert [path.stem for path in LIBRARY if "dali_executor" in files_imported(path)] == ["executors"]


def test_only_the_kernels_import_triton() -> None:
    assert [path.stem for path in LIBRARY if "triton" in tops(path)] == ["triton_kernels"]
    assert [path.stem for path in LIBRARY if "triton_kernels" in files_imported(path)] == ["triton_executor"]


def test_the_library_imports_no_program() -> None:
    programs = {"benchmarks", "tools", "tests", *(path.stem for path in PROGRAMS)} - {"__init__"}
    assert [path.name for path in LIBRARY if tops(path) & programs] == []


def test_the_baseline_imports_nothing_of_the_library() -> None:
    path = ROOT / "benchmarks" / "baseline.py"
    names = tops(path)
    assert "torchvision" in names
    assert not names & {"fastflower", *(other.stem for other in PROGRAMS)}


IMPORT = """
import sys
sockets = []
sys.addaudithook(lambda event, args: sockets.append(event) if event.startswith(("socket.", "urllib.")) else None)
import fastflower
heavy = {"torch", "torchvision", "nvidia", "cv2", "numpy", "PIL", "matplotlib", "webdataset"} & set(sys.modules)
assert not heavy, heavy
assert not sockets, sockets
import fastflower.packing
heavy = {"torch", "torchvision", "nvidia", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
assert not sockets, sockets
"""


def test_importing_is_light_silent_and_opens_no_socket() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_public_surface_is_the_documented_one() -> None:
    assert len(fastflower.__all__) == len(PUBLIC)
    assert set(fastflower.__all__) == PUBLIC
    assert dir(fastflower) == sorted(fastflower.__all__)
    for name in fastflower.__all__:
        assert getattr(fastflower, name).__name__ == name


def test_type_checkers_see_the_same_surface() -> None:
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
        fastflower.load  # noqa: B018  (looking the name up is what raises)


def test_public_callables_have_at_most_16_parameters() -> None:
    counts = {
        name: len(inspect.signature(getattr(fastflower, name)).parameters)
        for name in fastflower.__all__
        if not is_dataclass(getattr(fastflower, name)) and name != "FastflowerError"
    }
    assert {"pack", "train", "evaluate", "predict", "Loader"} <= set(counts)
    assert {name: count for name, count in counts.items() if count > 16} == {}


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in [*LIBRARY, *PROGRAMS]}
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}


def test_only_the_command_line_prints() -> None:
    def prints(path: Path) -> bool:
        calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        return any(isinstance(function, ast.Name) and function.id == "print" for function in calls)

    assert [path.stem for path in LIBRARY if prints(path)] == ["cli"]


def public(nodes: list[ast.stmt]) -> list[ast.FunctionDef | ast.ClassDef]:
    """Public classes and functions; a property's name may say all."""
    found = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    properties = [node for node in found for mark in node.decorator_list if ast.unparse(mark) == "property"]
    return [node for node in found if not node.name.startswith("_") and node not in properties]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_public_functions_classes_and_methods_are_documented(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module)
    found = public(module.body)
    found += [node for owner in found if isinstance(owner, ast.ClassDef) for node in public(owner.body)]
    assert [node.name for node in found if not ast.get_docstring(node)] == []
