"""Flags of a command, derived from its signature and docstring: parsing, help, and errors of one line."""

import ast
import inspect
import re
import shutil
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import pairwise
from math import inf
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Literal, Union, cast, get_args, get_origin

from fastflower.suggestions import did_you_mean, instead

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_RULES: dict[object, str] = {int: "an integer", float: "a number", bool: "True or False"}
_SENTENCE = re.compile(r'\.\s+(?=[A-Z"])(?!None\b)')  # between two sentences; what None means belongs to the first
_HELP = "help"


class UsageError(Exception):
    """A command line that cannot be parsed. The message says what to type."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """Type of a flag that may be given several times, each time with one value."""

    kind: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A flag, or a positional argument if it has no default."""

    name: str
    """As in Python, for example "batch_size" or "augment.crop"."""
    kind: object
    """Type of the value, for example int | None."""
    default: object = inspect.Parameter.empty
    text: str = ""
    metavar: str = ""
    group: str = "options"

    @property
    def required(self) -> bool:
        """Whether it is a positional argument."""
        return self.default is inspect.Parameter.empty

    @property
    def spelling(self) -> str:
        """As it is typed, for example --batch-size or SHARDS."""
        return self.name.upper() if self.required else f"--{self.name.replace('_', '-')}"

    @property
    def inverse(self) -> str:
        """What switches it off, for example --no-resume or --augment.no-fixed."""
        return re.sub(r"^--(.*\.)?", r"--\1no-", self.spelling)


def flags_of(call: Callable[..., object], types: Mapping[str, object]) -> list[Flag]:
    """Return the flags of a function's parameters.

    types  By parameter, where the command line takes another type than Python, or the whole flag. None leaves it out.
    """
    texts = _parameter_texts(call)
    flags: list[Flag] = []
    for name, parameter in inspect.signature(call).parameters.items():
        kind = types.get(name, parameter.annotation)
        if kind is None:
            continue
        made = Flag(name=name, kind=kind, default=parameter.default, text=texts.get(name, ""))
        flags.append(kind if isinstance(kind, Flag) else made)
    return flags


def fields_as_flags(instance: "DataclassInstance", prefix: str = "", group: str = "options") -> list[Flag]:
    """Return the flags of a dataclass's fields. The instance has the defaults."""
    source = cast("ast.ClassDef", ast.parse(textwrap.dedent(inspect.getsource(type(instance)))).body[0])
    texts = {
        first.target.id: inspect.cleandoc(ast.literal_eval(second.value))
        for first, second in pairwise(source.body)
        if isinstance(first, ast.AnnAssign) and isinstance(first.target, ast.Name) and isinstance(second, ast.Expr)
    }
    return [
        Flag(
            name=prefix + item.name,
            kind=item.type,
            default=getattr(instance, item.name),
            text=texts[item.name],
            group=group,
        )
        for item in fields(instance)
    ]


def _parameter_texts(call: Callable[..., object]) -> dict[str, str]:
    """Return the parameters' descriptions in a docstring's Args section."""
    _, _, section = inspect.cleandoc(call.__doc__ or "").partition("Args:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section.split("\n\n")[0], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def parse(command: str, flags: Sequence[Flag], args: Sequence[str]) -> dict[str, object]:
    """Return the values that a command line gives, by name; "help" has the flags that --help is asked about.

    Flags may be spelled with - or _, and be followed by = and the value. Everything after -- is positional.
    Raises UsageError if a flag is unknown, a value does not have its type, or a positional argument is missing.
    """
    usage = " ".join(flag.spelling for flag in flags if flag.required)
    known = {flag.spelling: flag for flag in flags if not flag.required}
    inverse = {flag.inverse: flag for flag in known.values() if flag.kind is bool}
    known |= inverse | dict.fromkeys(("-h", "--help"), Flag(name=_HELP, kind=tuple[str, ...], default=()))
    values: dict[str, object] = {}
    places: list[str] = []
    queue = deque(args)
    while queue:
        token = queue.popleft()
        if token == "--":
            places += queue
            break
        if not _is_flag(token):
            places.append(token)
            continue
        name, equals, attached = token.partition("=")
        spelling = name.replace("_", "-")
        if spelling not in known:
            raise UsageError(did_you_mean(command, name, known, usage))
        flag = known[spelling]
        if flag.kind is bool:
            if equals:
                raise UsageError(f"{name} takes no value; type {flag.spelling} or {flag.inverse}.")
            values[flag.name] = spelling not in inverse
        elif isinstance(flag.kind, Repeated):
            before = cast("tuple[object, ...]", values.get(flag.name, ()))
            values[flag.name] = (
                *before,
                _value(flag, flag.kind.kind, [attached] if equals else list(_taken(str, queue))),
            )
        else:
            values[flag.name] = _value(flag, flag.kind, [attached] if equals else list(_taken(flag.kind, queue)))
    return values if _HELP in values else _placed(command, usage, flags, places) | values


def _placed(command: str, usage: str, flags: Sequence[Flag], places: list[str]) -> dict[str, object]:
    """Return the positional arguments by name. The last may be a list, which takes all that remain."""
    values: dict[str, object] = {}
    rest = deque(places)
    for flag in (flag for flag in flags if flag.required):
        if get_origin(flag.kind) is list:
            (kind,) = get_args(flag.kind)
            values[flag.name] = [_value(flag, kind, [text]) for text in rest]
            rest.clear()
        elif rest:
            values[flag.name] = _value(flag, flag.kind, [rest.popleft()])
        else:
            what = _brief(flag.text).removesuffix(".")
            raise UsageError(f"{flag.spelling} is missing ({what}); type fastflower {command} {usage}.")
    if rest:
        known = {flag.spelling for flag in flags if not flag.required}
        raise UsageError(instead(command, rest[0], usage, known))
    return values


def _is_flag(token: str) -> bool:
    return bool(re.match(r"--?[A-Za-z]", token)) and not re.fullmatch(r"-(inf|nan|infinity)", token, re.IGNORECASE)


def _alternatives(kind: object) -> tuple[object, ...]:
    """Return the types of a union, None first, because any text would be a string."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(sorted(kinds, key=lambda one: one is not NoneType))


def _taken(kind: object, queue: deque[str]) -> Iterator[str]:
    """Take a flag's values off the command line: one, or as many numbers as its type takes."""
    lengths = [len(get_args(one)) if get_origin(one) is tuple else 1 for one in _alternatives(kind)]
    most = inf if ... in get_args(kind) else max(lengths)
    words = kind == tuple[str, ...]
    while queue and most > 0 and not _is_flag(queue[0]) and queue[0] != "--":
        yield queue.popleft()
        most -= 1
        if queue and not words and _value_or_none(float, [queue[0]]) is None:
            return


def _value(flag: Flag, kind: object, texts: list[str]) -> object:
    """Return a flag's value from its texts. Raises UsageError if they do not have its type."""
    if not texts and ... not in get_args(kind):
        raise UsageError(f"{flag.spelling} needs a value: {flag.spelling} {_metavar(flag)}.")
    if texts == ["None"] and NoneType in _alternatives(kind):
        return None
    value = _value_or_none(kind, texts)
    if value is None:
        choices = [choice for one in _alternatives(kind) if get_origin(one) is Literal for choice in get_args(one)]
        rule = f"one of {', '.join(choices)}" if choices else _RULES.get(_alternatives(kind)[-1])
        rule = rule or f"as in {flag.spelling} {_metavar(flag)}"
        near = "".join(f" Did you mean {near}?" for near in get_close_matches(" ".join(texts), choices, 1))
        raise UsageError(f"{flag.spelling} must be {rule}, got {' '.join(texts)!r}.{near}")
    return value


def _value_or_none(kind: object, texts: Sequence[str]) -> object:
    for one in _alternatives(kind):
        kinds = get_args(one)
        if get_origin(one) is tuple:
            kinds = kinds[:1] * len(texts) if kinds[-1] is ... else kinds
            values = [_value_or_none(item, [text]) for item, text in zip(kinds, texts, strict=False)]
            if len(kinds) == len(texts) and None not in values:
                return tuple(values)
        elif get_origin(one) is Literal:
            if len(texts) == 1 and texts[0] in kinds:
                return texts[0]
        elif one is bool:
            if texts in (["True"], ["False"]):
                return texts == ["True"]
        elif one is not NoneType and len(texts) == 1:
            try:
                return cast("Callable[[str], object]", one)(texts[0])
            except ValueError:
                continue
    return None


def _metavar(flag: Flag) -> str:
    if flag.metavar or flag.kind is bool:
        return flag.metavar
    kind = flag.kind.kind if isinstance(flag.kind, Repeated) else flag.kind
    names: list[str] = []
    for one in _alternatives(kind):
        kinds = get_args(one)
        if get_origin(one) is Literal:
            names.append("{" + ",".join(kinds) + "}")
        elif get_origin(one) is tuple:
            names.append(" ".join("..." if item is ... else _word(item) for item in kinds))
        elif one is not NoneType:
            names.append(_word(one))
    return " or ".join(names)


def _word(kind: object) -> str:
    return {int: "INT", float: "FLOAT", Path: "PATH", bool: "{True,False}"}.get(cast("type", kind), "TEXT")


def _brief(text: str) -> str:
    """Return the first sentence."""
    first = _SENTENCE.split(text, maxsplit=1)[0]
    return first if first.endswith(".") else f"{first}."


def help_text(command: str, call: Callable[..., object], flags: Sequence[Flag], about: object) -> str:
    """Return the text of `fastflower COMMAND --help`: a sentence for each flag, or all about the flags in `about`."""
    asked = {str(name).replace("_", "-").lstrip("-") for name in cast("Sequence[str]", about)}
    chosen = [flag for flag in flags if flag.spelling.lstrip("-") in asked]
    if chosen:
        return "\n".join(_described(flag, " ".join(flag.text.split())) for flag in chosen)
    places = [flag.spelling for flag in flags if flag.required]
    lines = [f"usage: fastflower {command} {' '.join(places)} [--FLAG VALUE ...]", ""]
    lines += _wrapped(inspect.cleandoc(call.__doc__ or "").split("\n\n")[0], "")
    groups = dict.fromkeys("" if flag.required else flag.group for flag in flags)
    for group in sorted(groups, key=lambda name: name != ""):
        lines += ["", f"{group}:"] if group else [""]
        members = [flag for flag in flags if ("" if flag.required else flag.group) == group]
        lines += [_described(flag, _brief(" ".join(flag.text.split()))) for flag in members]
    lines += ["", f"fastflower {command} --help FLAG says all about a flag."]
    return "\n".join(lines)


def _described(flag: Flag, text: str) -> str:
    left = flag.spelling
    if flag.kind is bool:
        left += f", {flag.inverse}" if flag.default else ""
    elif not flag.required:
        left += f" {_metavar(flag)}"
    default = flag.default
    if isinstance(default, tuple):
        default = " ".join(map(str, cast("tuple[object, ...]", default)))
    shown = not flag.required and flag.kind is not bool and default is not None and default != ""
    if isinstance(flag.kind, Repeated):
        text += " May be repeated."
    lines = _wrapped(f"{text} (default: {default})" if shown else text, " " * 28)
    if len(left) > 25:
        return "\n".join([f"  {left}", *lines])
    return "\n".join([f"  {left:<26}{lines[0].lstrip()}", *lines[1:]])


def _wrapped(text: str, indent: str) -> list[str]:
    width = min(120, max(80, shutil.get_terminal_size((100, 24)).columns))
    return textwrap.wrap(
        " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
