"""A command line from a function's signature and docstring: argparse, with errors of one line that say what to type."""

import ast
import inspect
import re
import shlex
import sys
import textwrap
from argparse import SUPPRESS, Action, ArgumentError, ArgumentParser, ArgumentTypeError, HelpFormatter, Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from functools import cache, partial
from itertools import pairwise, takewhile
from math import inf
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Union, cast, get_args, get_origin

from fastflower.errors import MISFIT, fitted, limit_of
from fastflower.suggestions import did_you_mean, instead

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_METAVARS: dict[object, str] = {int: "INT", float: "FLOAT", Path: "PATH", bool: "{True,False}", ...: "..."}
_TRUTHS = ("true", "false", "none", "yes", "no")
_RULES = {"INT": "an integer", "FLOAT": "a number", "{True,False}": "True or False"}
EXAMPLES: dict[str, str] = {
    **{"device": "cpu", "fold": "0", "save_steps": "100", "seconds": "5", "images": "6", "draws": "6", "tta": "True"},
    **{"val_fraction": "0.2", "test_fraction": "0.1", "folds": "5", "max_side": "512", "quality": "90", "workers": "4"},
    **{"shard_bytes": "67108864", "split_by": "class", "as_split": "test", "ids": "stem"},
    **{"url_seconds": "10", "url_bytes": "67108864", "max_pixels": "40000000", "report": "a b"},
    **{"epochs": "15", "batch_size": "32", "accumulate": "2", "patience": "5", "freeze": "2", "sizes": "128 160 192"},
    **{"lr": "0.001", "weight_decay": "0.0001", "clip_norm": "1.0", "ema": "0.999", "warmup_epochs": "1"},
    **{
        "label_smoothing": "0.1",
        "layer_decay": "0.75",
        "head_lr": "0.01",
        "drop_path": "0.1",
        "precision": "float32",
        "weights": "DEFAULT",
    },
    **{"mean": "0.485 0.456 0.406", "std": "0.229 0.224 0.225"},
    **{"size": "224", "resize": "256", "crop": "0.25 1.0", "translate": "0.1 0.1", "scale": "0.9 1.1", "shear": "5 5"},
    **{
        "flip": "0.5",
        "flip_vertical": "0.5",
        "rotate": "15",
        "affine_rotate": "15",
        "grayscale": "0.1",
        "erase": "0.25",
    },
    **{"brightness": "0.2", "contrast": "0.2", "saturation": "0.2", "hue": "0.05", "mixup": "0.2", "cutmix": "1.0"},
}
"""By parameter: a value to type, where the default is none or says little."""
_SENTENCE = re.compile(r'\.\s+(?=[A-Z"])(?!None\b)')  # between two sentences; what None means belongs to the first


def inverse(flag: str) -> str:
    """Return the flag that switches another off, for example --no-resume or --augment.no-fixed."""
    return re.sub(r"^--(.*\.)?", r"--\1no-", flag)


class UsageError(Exception):
    """A command line that cannot be parsed. The message says what to type."""


class Parser(ArgumentParser):
    """The command line of a subcommand. A flag is spelled with - or _; its value follows after a space or =."""

    def __init__(self, prog: str, about: str = "") -> None:
        super().__init__(
            description=about,
            epilog=f"{prog} --help FLAG says all about a flag.",
            formatter_class=_Formatter,
            argument_default=SUPPRESS,
            add_help=False,
            allow_abbrev=False,
        )
        self.command = prog.removeprefix("fastflower ")
        self.required: dict[str, str] = {}  # what the positional arguments are, by name
        self.texts: dict[str, str] = {}  # of the flags
        self.metavars: dict[str, str] = {}  # of the flags, also of --no-resume and the like
        self.examples: dict[str, str] = {}  # by flag: a value that it takes
        self.choices: dict[str, Collection[str]] = {}  # by flag: values that are meant without it; "*" means any word
        self.optional: dict[str, str] = {}  # what flags such as --tta and --no-tta mean without a value

    @property
    def places(self) -> str:
        """The positional arguments, as usage shows them."""
        return " ".join(map(str.upper, self.required))

    def add(
        self,
        name: str,
        kind: object,
        text: str,
        *,
        metavar: str = "",
        default: object = None,
        to: Callable[..., Action] | None = None,
    ) -> None:
        """Add a flag to the parser, or to one of its groups by that group's add_argument.

        kind  Type of the value, for example int | None. A list has the values of a repeated flag.
        """
        flag, add, metavar = f"--{name.replace('_', '-')}", to or self.add_argument, metavar or _metavar(kind)
        self.texts[flag], self.metavars[flag] = f"{flag} {metavar}: {text}", "" if kind is bool else metavar
        if isinstance(default, tuple):
            default = " ".join(map(str, cast("tuple[object, ...]", default)))
        if values := _choices(metavar) if kind is not bool and " or " not in metavar else []:
            self.choices[flag] = values
        last = name.removeprefix("augment.")
        self.examples[flag] = EXAMPLES.get(last, "" if default is None or kind is bool else str(default))
        shown = kind is not bool and default is not None and default != ""
        repeated = get_origin(kind) is list
        brief = _brief(text) + " May be repeated." * repeated + f" (default: {default})" * shown
        brief = brief.replace("%", "%%")  # argparse formats it with %
        if kind is bool:
            self.metavars[inverse(flag)] = ""
            add(flag, inverse(flag), dest=name, action=_Switch, nargs=0, help=brief)
        elif kind == bool | None:  # as a switch, or with True, False or None
            self.metavars[inverse(flag)] = ""
            self.optional |= {flag: "True", inverse(flag): "False"}
            self.texts[flag] = f"{flag}, {inverse(flag)}: {text}"
            convert = partial(_value, flag, kind, metavar, self.examples[flag])
            add(
                flag,
                inverse(flag),
                dest=name,
                action=_OptionalSwitch,
                nargs="?",
                const="",
                type=convert,
                metavar="",
                help=brief,
            )
        else:  # without a value, which argparse allows, _value gets an empty text
            (kind,) = get_args(kind) if repeated else (kind,)
            action, convert = (
                "append" if repeated else "store",
                partial(_value, flag, kind, metavar, self.examples[flag]),
            )
            add(flag, dest=name, action=action, type=convert, nargs="?", const="", metavar=metavar, help=brief)

    def add_parameters(self, call: Callable[..., object], types: Mapping[str, object]) -> None:
        """Add a function's parameters, those without a default as positional arguments.

        types  By parameter, where the command line takes another type than Python. None leaves it out.
        """
        _, _, section = inspect.cleandoc(call.__doc__ or "").partition("Args:\n")
        found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section.split("\n\n")[0], re.MULTILINE)
        texts = {name: " ".join(text.split()) for name, text in found}
        for name, parameter in inspect.signature(call).parameters.items():
            kind, text = types.get(name, parameter.annotation), texts.get(name, "")
            if kind is None:
                continue
            if parameter.default is not parameter.empty:
                self.add(name, kind, text, default=parameter.default)
                continue
            self.required[name] = _brief(text)
            nargs, kind = ("*", str) if kind == list[str] else ("?", kind)
            convert = cast("Callable[[str], object]", kind)
            self.add_argument(
                name,
                nargs=nargs,
                default=None,
                type=convert,
                metavar=name.upper(),
                help=_brief(text).replace("%", "%%"),
            )

    def add_fields(self, instance: "DataclassInstance", group: str, prefix: str = "", *, but: str = "") -> None:
        """Add a dataclass's fields as flags. The instance has the defaults."""
        texts = _texts(type(instance))
        to = self.add_argument_group(group).add_argument
        for item in fields(instance):
            if item.name != but:
                self.add(prefix + item.name, item.type, texts[item.name], default=getattr(instance, item.name), to=to)

    def parse(self, args: Sequence[str]) -> dict[str, Any]:
        """Return the values that a command line gives, by name. --help prints and exits.

        Raises UsageError if a flag is unknown, a value does not have its type, or a positional argument is missing.
        """
        self.usage = f"fastflower {self.command} {self.places} [--FLAG VALUE ...]"
        self.add_argument("-h", "--help", action=_Help, nargs="*", help=SUPPRESS)
        namespace, rest = self.parse_known_intermixed_args(self.joined(args))
        if unknown := dict.fromkeys(word for word in rest if re.match("--?[A-Za-z]", word)):
            raise UsageError("\n".join(self._unknown(word, args) for word in unknown))
        if rest:
            raise UsageError(instead(self.command, rest, args, self.metavars, self.choices))
        values = vars(namespace)
        for name, what in self.required.items():
            if values[name] is None:
                usage = f"fastflower {self.command} {self.places}"
                raise UsageError(f"{name.upper()} is missing ({what.rstrip('.')}); type {usage}.")
        return values

    def _unknown(self, word: str, args: Sequence[str]) -> str:
        """Return the error for an unknown flag."""
        flag, _, value = word.partition("=")
        words = list(takewhile(_is_plain, args))
        if word in args:
            value = value or next(takewhile(_is_plain, args[args.index(word) + 1 :]), "")
        places = shlex.join(words) if len(words) == len(self.required) else self.places
        known = {flag: self.examples.get(flag, "") for flag in self.metavars}
        return did_you_mean(self.command, flag, value, known, places)

    def joined(self, args: Sequence[str]) -> list[str]:
        """Spell flags with -, and join to each the numbers or choices after it, as many as it takes.

        argparse cannot stop at a word of another kind, and takes -1e-3 for a flag.
        """
        words, more, choices = list[str](), 0.0, list[str]()
        end = args.index("--") if "--" in args else len(args)
        for word in args[:end]:
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            if more and (word in choices or isinstance(_plain(word), int | float)):
                words[-1] += f"{' ' if '=' in words[-1] else '='}{word}"
                more -= 1
            elif words and words[-1] in self.optional and word.lower() in _TRUTHS:
                words[-1] += f"={word}"
            else:
                words.append(f"{name}{equals}{value}" if name in self.metavars else word)
                metavar = "" if equals else self.metavars.get(name, "")
                counts = [len(re.findall("INT|FLOAT", form)) for form in metavar.split(" or ")]
                more, choices = inf if "..." in metavar else max(counts), _choices(metavar)
        words = [f"{word}={self.optional[word]}" if word in self.optional else word for word in words]
        return [*words, *args[end:]]

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, where argparse prints its usage and exits."""
        text = re.sub(r"^argument (\S+): ", r"\1 ", message).replace("ignored explicit argument", "takes no value, got")
        raise UsageError(text if text.endswith("?") else f"{text}.")


@cache
def _texts(kind: type) -> dict[str, str]:
    """Return the docstrings of a class's fields, by name."""
    source = cast("ast.ClassDef", ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0])
    return {
        first.target.id: inspect.cleandoc(ast.literal_eval(second.value))
        for first, second in pairwise(source.body)
        if isinstance(first, ast.AnnAssign) and isinstance(first.target, ast.Name) and isinstance(second, ast.Expr)
    }


class _Formatter(HelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # flags in it stay whole

    def _format_args(self, action: Action, default_metavar: str) -> str:
        return str(action.metavar or default_metavar)  # without [] around it

    def _format_action_invocation(self, action: Action) -> str:
        switch = isinstance(action, _OptionalSwitch)
        return ", ".join(action.option_strings) if switch else super()._format_action_invocation(action)


class _Switch(Action):
    def __call__(self, _: object, namespace: Namespace, __: object, spelling: str | None = None) -> None:
        setattr(namespace, self.dest, spelling == self.option_strings[0])


class _OptionalSwitch(Action):
    def __call__(self, _: object, namespace: Namespace, value: object, spelling: str | None = None) -> None:
        if spelling != self.option_strings[0] and value is not False:
            raise ArgumentError(self, f"takes no value, got {str(value)!r}")
        setattr(namespace, self.dest, value)


class _Help(Action):
    def __call__(self, parser: ArgumentParser, _: object, values: object, __: str | None = None) -> None:
        asked = [f"--{name.replace('_', '-').lstrip('-')}" for name in cast("Sequence[str]", values)]
        texts = [text for flag, text in cast("Parser", parser).texts.items() if flag in asked]
        sys.stdout.write("".join(f"{text}\n" for text in texts) or parser.format_help())
        parser.exit()


def _value(flag: str, kind: object, metavar: str, example: str, text: str) -> object:
    """Return a text as a value of a type. Raises ArgumentTypeError if it is none, or empty."""
    value = _read(kind, text)
    if value is not MISFIT and (text or value == ()):
        return value
    if not text:
        raise ArgumentTypeError(f"needs a value: {flag} {example or metavar}")
    choices = [] if " or " in metavar else _choices(metavar)
    rule = _RULES.get(metavar, f"one of {', '.join(choices)}" if choices else f"as in {flag} {metavar}")
    near = [*_corrected(kind, text), *get_close_matches(text.lower(), choices, 1)]
    remedy = f"did you mean {flag} {near[0]}?" if near else f"for example {flag} {example or metavar}"
    raise ArgumentTypeError(f"must be {rule}{limit_of(_plain(text))}, got {text!r}; {remedy}")


def _read(kind: object, text: str) -> object:
    """Return a text as a value of a type, or MISFIT."""
    candidates = (_plain(text), tuple(map(_plain, text.split())), text, Path(text))
    return next((value for one in candidates if (value := fitted(kind, one)) is not MISFIT), MISFIT)


def _corrected(kind: object, text: str) -> Iterator[str]:
    """Yield texts that have the type where this one has a decimal comma, a percent sign, or other signs around its numbers."""
    listed = get_args(kind)[-1:] == (...,)
    point = text if listed else re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", text.strip())
    percent = re.fullmatch(r"([\d.]+) ?%", text)
    numbers = re.findall(r"-?\d+(?:\.\d*)?(?:e-?\d+)?|-?\.\d+", text)
    several = " ".join(numbers) if re.fullmatch(r"[-\d.e,;:x*()\[\] ]+", text) else ""
    whole = re.sub(r"\.0*$", "", text)
    for one in (point, f"{float(percent[1]) / 100:g}" if percent else "", whole, several):
        ambiguous = one == several and point != text and "FLOAT" in _metavar(kind) and not listed  # 0,25 is no pair
        if one and one != text and not ambiguous and isinstance(_read(kind, one), int | float | tuple):
            yield one


def _is_plain(word: str) -> bool:
    return not word.startswith("-")


def _plain(word: str) -> object:
    """Return what a word means in Python: None, True, False, a number, or the word."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(word)
    return {"None": None, "True": True, "False": False}.get(word, word)


def _choices(metavar: str) -> list[str]:
    return re.findall(r"\w+(?=[,}])", metavar)


def _metavar(kind: object) -> str:
    kinds = get_args(kind)
    if kind == int | float:
        return "FLOAT"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_metavar(one) for one in kinds if one is not NoneType)
    if get_origin(kind) is Literal:
        return "{" + ",".join(kinds) + "}"
    return " ".join(map(_metavar, kinds)) if kinds else _METAVARS.get(kind, "TEXT")


def _brief(text: str) -> str:
    """Return the first sentence."""
    return _SENTENCE.split(" ".join(text.split()), maxsplit=1)[0].removesuffix(".") + "."
