"""What the user typed or called, to type again: with other data, or with other arguments of `pack`."""

import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

from fastflower.files import unused
from fastflower.suggestions import Call, calls, words_typed

_DATA = ("folder", "shards")  # arguments that are packed
_SEVERAL = ("labels", "split", "ignore")  # arguments that are added to those of the same name
_PLAIN = (str, int, float, type(None))


def with_data(place: object) -> str:
    """Return what the user typed or called, with another folder of images or shards."""
    outer, _, data = _context()
    return _again(outer, data, place)


def once_more() -> str:
    """Return what the user typed or called."""
    outer, _, data = _context()
    return _again(outer, data, data)


def packing(
    changes: Mapping[str, object] | None = None, *, source: object = None, shell: bool = False, goes_on: bool = False
) -> str:
    """Return what the user typed or called, with other arguments of `pack`, and with the pack in an unused folder if need be.

    If the user called another function, such as `train`, this packs first, and then calls that one on the pack.

    changes  Arguments of `pack`. None leaves one out; values of those that take several are added. source  Another folder to
    pack. shell  Whether to return a command in any case. goes_on  Whether this pack will be finished.
    """
    changes = changes or {}
    outer, given, data = _context()
    own, typed = outer is None or outer.name == "pack", bool(words_typed())
    if typed and not own and not any(changes.values()):
        return _again(outer, data, source)
    out = _out(given, changes.get("out"), own, goes_on)
    folder = data if source is None else source
    added = {
        name: [*dict.fromkeys([*_listed(given.get(name)), *_listed(changes[name])])]
        for name in _SEVERAL
        if name in changes
    }
    values = {**given, **changes, **added, "folder": folder, "out": out}
    if own and out == Path("shards") and "out" not in given:
        del values["out"]
    values = {name: values[name] for name in dict.fromkeys(("folder", *given, *changes, *values)) if name in values}
    values = {name: value for name, value in values.items() if value not in (None, (), [])}
    line = _command(values) if shell or typed else _call("pack", ("folder", "out"), values)
    if own or outer is None:
        return line
    then = _again(outer, data if data is not None else source, out, goes_on=goes_on)
    return f"{line}{' && ' if typed else '  # then ' if shell else '; '}{then}"


def quoted(path: Path | str) -> str:
    """Quote a path for the shell. Unprintable names (not UTF-8, line breaks) use bash's $'...' syntax."""
    if str(path).isprintable():
        return shlex.quote(str(path))
    shown = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\{byte:03o}" for byte in os.fsencode(path))
    return f"$'{''.join(shown)}'"


def _context() -> tuple[Call | None, Mapping[str, object], object]:
    """Return the user's call, the arguments of the call of `pack` if there is one, and the data that it packs."""
    made, words = calls(), words_typed()
    given = next((call.given for call in reversed(made) if call.name == "pack"), dict[str, object]())
    outer = Call(words[0], (), {}) if words else made[0] if made else None
    data = given.get("folder")
    if data is None and made:
        data = next((made[0].given[name] for name in _DATA if name in made[0].given), None)
    return outer, given, data


def _out(given: Mapping[str, object], asked: object, own: bool, goes_on: bool) -> Path:
    """Return the folder for the pack. asked  The folder to choose if it is not in use."""
    from fastflower.shards.manifest import FILE, PLAN, WORK  # importing this file must be fast

    if asked is not None:
        return _free(Path(str(asked)))
    out = Path(str(given.get("out", "shards")))
    if own:
        return unused(out) if goes_on or (out / FILE).exists() else out
    return out if (out / WORK / PLAN).exists() and not goes_on else _free(Path("shards"))


def _free(folder: Path) -> Path:
    return unused(folder) if os.path.lexists(folder) else folder


def _again(outer: Call | None, data: object, place: object, *, goes_on: bool = False) -> str:
    """Return what the user typed or called with `place` in place of the data. goes_on  Whether the run will use its folder."""
    if words := words_typed():
        found = next((at for at, word in enumerate(words) if at and data is not None and _same(word, data)), 0)
        line = [*words[:found], str(place), *words[found + 1 :]] if found else [words[0], str(place)]
        if goes_on and words[0] == "train":
            line = [str(unused(Path(word))) if before == "--out" else word for before, word in pairwise(["", *line])]
        return " ".join(["fastflower", *map(quoted, line)])
    if outer is None:
        return f"pack({_text('', place)})"
    name = next((name for name in _DATA if name in outer.names), "folder")
    given = {**outer.given, name: place}
    if goes_on and "out" in given:
        given["out"] = unused(Path(str(given["out"])))
    return _call(outer.name, outer.names, given)


def _same(word: str, data: object) -> bool:
    return Path(word.removeprefix("file://")) == Path(str(data).removeprefix("file://"))


def _command(values: Mapping[str, object]) -> str:
    """Return the command that packs with these arguments."""
    words = [str(values.get("folder", "FOLDER"))]
    for name, value in values.items():
        for one in _listed(value) if name not in ("folder", "executor") else ():
            flag = f"--{name.replace('_', '-')}"
            words += [] if one is False else [flag] if one is True else [flag, str(one)]
    typed = words_typed()
    words += [word for before, word in pairwise(["", *typed]) if "--dask" in (before, word.partition("=")[0])]
    return " ".join(["fastflower pack", *map(quoted, words)])


def _call(name: str, names: Sequence[str], values: Mapping[str, object]) -> str:
    """Return a call, its first two arguments without their names. names  As in Call."""
    texts = {key: _text(key, values[key]) if key in values else key for key in (names[0], *values)}
    bare = [key for key in names[:2] if key in texts]
    words = [texts[key] for key in bare] + [f"{key}={text}" for key, text in texts.items() if key not in bare]
    return f"{name}({', '.join(words)})"


def _text(name: str, value: object) -> str:
    """Return a value as Python has it, or its argument's name if that is too long."""
    if isinstance(value, (list, tuple)):
        each = [_text("", one) for one in cast("Sequence[object]", value)]
        return f"[{', '.join(each)}]" if all(each) else name
    if isinstance(value, Path):
        return repr(str(value))
    return repr(value) if isinstance(value, _PLAIN) else name


def _listed(value: object) -> Sequence[object]:
    if value is None:
        return ()
    return list(cast("Collection[object]", value)) if isinstance(value, (list, tuple)) else [value]
