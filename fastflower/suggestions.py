"""Near flags, commands and arguments, by spelling and by meaning."""

import re
import shlex
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import NamedTuple, ParamSpec, TypeVar

from fastflower.errors import MissingArgumentError, UnknownArgumentError, quoted
from fastflower.words import COMMAND_MEANINGS, MEANINGS, TORCHRUN, TRAINS

Params = ParamSpec("Params")
Result = TypeVar("Result")
Class = TypeVar("Class")

_EXAMPLES = {"checkpoint": "'runs/a'", "shards": "'data'", "folder": "'data'", "images": "'photo.jpg'"}

_OF_TRAINING: tuple[str, ...] = (
    "Recipe",
    "Augment",
    "Loader",
    "Loader.from_files",
)  # whose words are those of the command train

_COMMANDS = {**dict.fromkeys(_OF_TRAINING, "train"), "Predictor": "predict", "diagnose": "doctor"}

_homes: dict[str, str] = {}  # by field: the dataclass that has it


class Call(NamedTuple):
    """A call of one of our functions."""

    name: str
    names: Sequence[str]
    """Of the parameters that may be passed without their names."""
    given: Mapping[str, object]
    """The arguments."""


_typed: ContextVar[Sequence[str]] = ContextVar("typed", default=())
_calls: ContextVar[tuple[Call, ...]] = ContextVar("calls", default=())


def did_you_mean(command: str, flag: str, value: str, known: Mapping[str, str], places: str) -> str:
    """Return the error for an unknown flag: what it means here, or the flags that are spelled nearly so.

    value  What follows the flag, or "". known  The flags, each with a value that it takes. places  The positional arguments.
    """
    text, name = f"unknown flag {flag}; ", _plain(flag)
    if name == "augment" and (near := _flag(command, value.partition("=")[0], known)):
        return f"{text}did you mean {near} {known[near.split()[0]]}".rstrip() + "?"
    answer = _meaning(command, name)
    if answer == "--device cuda":
        answer = _on_gpus(command, name, value)
    if answer and not answer.startswith("--"):
        return text + answer.format(command=command, places=places, flag=flag, count=_count(name, value)) + "."
    if near := [answer] if answer else _near(name, known):
        return f"{text}did you mean {' or '.join(near)}?"
    return f"{text}fastflower {command} --help lists the flags."


def _meaning(command: str, name: str) -> str:
    """Return what stands for a word of another tool, or "". Lightning's flags have prefixes: trainer.max_epochs."""
    last = name.rpartition(".")[2]
    return next((answer for commands, answer, words in MEANINGS if command in commands and last in words.split()), "")


def _on_gpus(command: str, name: str, value: str) -> str:
    """Return the answer to a flag that chooses GPUs: by their number, or by a number each."""
    if name.endswith(("gpu", "-id")) and not name.startswith("n") and value.isdigit():
        return f"--device cuda:{value}"
    return TORCHRUN if command == "train" and _count(name, value) > 1 and value else "--device cuda"


def _count(name: str, value: str) -> int:
    """Return how many GPUs a value means, 2 if it is no number."""
    if re.fullmatch(r"\[?\d+(,\d+)+\]?", value):
        return value.count(",") + 1
    return int(value) if re.fullmatch(r"\d{1,4}", value) and (name[-1] == "s" or "n" in name[:1]) else 2


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-").lower()


def _flag(command: str, word: str, known: Collection[str]) -> str:
    """Return the flag that a word without dashes means, or ""."""
    name = _plain(word)
    answer = _meaning(command, name)
    exact = [flag for flag in (f"--{name}", f"--augment.{name}") if name and flag in known]
    return next(
        iter(exact or ([answer] if answer.startswith("--") else _near(name, known) if len(name) > 2 else [])), ""
    )


def _near(name: str, known: Collection[str]) -> list[str]:
    """Return flags that end in the name or are spelled nearly so; the last parts of --augment.crop and the like count too."""
    names = {flag.lstrip("-"): flag for flag in known}
    lasts: dict[str, str] = {flag.rpartition(".")[2]: flag for flag in known if "." in flag}
    if name.rpartition(".")[2] in {**names, **lasts}:
        return [{**lasts, **names}[name.rpartition(".")[2]]]
    close = get_close_matches(name, names, 2, 0.7) or get_close_matches(name, lasts, 2, 0.7)
    return [{**lasts, **names}[match] for match in close]


def instead(
    command: str,
    words: Sequence[str],
    args: Sequence[str],
    known: Collection[str],
    choices: Mapping[str, Collection[str]],
) -> str:
    """Return the error for arguments that are too many, with a command that has a flag for each, or only those before them.

    words  What is too many. args  The whole command line. known  The flags. choices  By flag: values that are known.
    """
    kept, meant, position = list[str](), False, 0
    own = {word: args.count(word) - words.count(word) for word in words}  # how often it is not too many
    while position < len(args):
        word, after, flags = args[position], args[position + 1 : position + 2], list[str]()
        position += 1
        if own.get(word, 1) > 0:
            own[word] = own.get(word, 1) - 1 if word in words else 1
            kept.append(word)
            continue
        key, equals, value = word.partition("=")
        flag = next(iter(_flag(command, key, known).split()), "")
        if flag and equals:
            flags = [flag, value]
        elif flag and after and after[0] in words:
            flags, position = [flag, after[0]], position + 1
        else:
            flags = _chosen(word, choices)
        kept, meant = [*kept, *flags], meant or bool(flags)
    switches = (
        "; a switch such as --resume takes no value" if words[0].lower() in ("true", "false", "yes", "no") else ""
    )
    line = shlex.join(["fastflower", command, *kept]) + " and then flags" * (not meant)
    return f"unexpected {', '.join(map(repr, words))}{switches}; type {line}."


def _chosen(word: str, choices: Mapping[str, Collection[str]]) -> list[str]:
    """Return the flag that takes a word, and its value: one of those that are known, or one spelled nearly so."""
    for flag, values in choices.items():
        if "*" in values and not re.fullmatch(r"[\d.]+|(?i:true|false|yes|no|none)", word):
            return [flag, word]
        if close := [value for value in values if value == word] or get_close_matches(word.lower(), values, 1, 0.75):
            return [flag, close[0]]
    return []


def near_command(word: str, commands: Collection[str]) -> str:
    """Return the command that a word means, or ""."""
    plain = word.lower()
    meant = [command for command, words in COMMAND_MEANINGS.items() if plain in words.split() or plain == command]
    return next(iter(meant or get_close_matches(plain, {*commands, *COMMAND_MEANINGS}, 1, 0.6)), "")


def refuse_unknown(function: str, names: Iterable[str], known: Collection[str], instead: Mapping[str, str]) -> None:
    """Raise UnknownArgumentError if a name is not known. A line for each says what is meant, or which known name is near.

    instead  What to say for some names.
    """
    lines: list[str] = []
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1)
            text = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}."
            text = f"it is a field of {_homes[name]}." if name in _homes else text
            text = f"{instead[name]}." if name in instead else _argument(function, name, known) or text
            lines.append(f"{name}: {function} has no such argument; {text}")
    if lines:
        raise UnknownArgumentError("\n".join(lines))


def _in_python(answer: str) -> str:
    """Return an answer with arguments in place of its flags: --weights None is weights=None. Commands stay."""
    if "fastflower " in answer:
        return answer
    text = answer.replace("--augment flags", "fields of Augment")
    return re.sub(
        r"--(?:augment\.)?([\w-]+)( (?=[A-Z\d]))?",
        lambda found: found[1].replace("-", "_") + "=" * bool(found[2]),
        text,
    )


def _argument(function: str, name: str, known: Collection[str]) -> str:
    """Return what the name of an argument means by the words of other tools, or ""."""
    command, word = _COMMANDS.get(function, function), _plain(name)
    for commands, answer, words in MEANINGS:
        if command not in commands or not (word in words.split() or answer in (f"--{word}", f"--augment.{word}")):
            continue
        if not answer.startswith("--"):
            if (found := re.match(r"the (\w+) comes? without a flag", answer)) and found[1] in known:
                return f"did you mean {found[1]}?"
            said = answer.partition("; ")[0] if "{" in answer else answer  # without the command
            return "" if "{" in said else f"{_in_python(said)}."
        field = answer.split()[0].lstrip("-").replace("-", "_")
        last = field.removeprefix("augment.")
        if last in known:
            return f"did you mean {last}?"
        if last != field and function.startswith("Loader"):
            return f"did you mean augment=Augment({last}=...)?"
        if not {*TRAINS} <= {*commands}:
            return f"did you mean {commands[0]}({field}=...)?"
        return f"did you mean Recipe({f'augment=Augment({last}=...)' if last != field else f'{last}=...'})?"
    return ""


@contextmanager
def typed(words: Sequence[str]) -> Generator[None]:
    """Make messages inside the block name commands, because the user typed one. words  The command and what follows it."""
    token = _typed.set(words)
    try:
        yield
    finally:
        _typed.reset(token)


def command_typed() -> str:
    """Return the command that the user typed, or "" if they called a function."""
    return next(iter(_typed.get()), "")


def words_typed() -> Sequence[str]:
    """Return the command that the user typed and the words after it, or () if they called a function."""
    return _typed.get()


def calls() -> tuple[Call, ...]:
    """Return the call by the user, or by the command line, and those of our other functions that it makes."""
    return _calls.get()


def called_directly(function: str) -> bool:
    """Return whether the user called a function: not a command, nor another function that calls it."""
    return not _typed.get() and all(call.name == function for call in _calls.get()[:1])


def flag_meant(command: str, name: str, known: Collection[str]) -> list[str]:
    """Return the flag that the name of an argument means, and its value where the name implies one; [] if it is unclear."""
    words = _flag(command, name, known).split()
    return words if len(words) < 3 else []


def _nothing(_: Sequence[object], __: Mapping[str, object]) -> str:
    return ""


def keywords(
    call: Callable[Params, Result],
    whole: Callable[[Sequence[object], Mapping[str, object]], str] = _nothing,
) -> Callable[Params, Result]:
    """Decorate a function: an unknown keyword argument is refused with the one that is meant, a missing one with an example.

    whole  Returns the whole call that is meant, from the arguments of one that is refused, or "".
    """
    parameters = signature(call).parameters
    path = getattr(call, "__qualname__", "").split(".")
    name = path[-2] if path[-1] == "__init__" else path[-1]
    known = [word for word in parameters if word != "self"]
    needed = [word for word in known if parameters[word].default is Parameter.empty]
    places = [word for word, each in parameters.items() if each.kind is not Parameter.KEYWORD_ONLY]
    method = "self" in parameters

    @wraps(call)
    def checked(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        try:
            refuse_unknown(name, kwargs, known, {})
        except UnknownArgumentError as error:
            raise UnknownArgumentError(f"{error}{whole(args, kwargs)}") from None
        if len(args) > len(places):
            taken, others = places[method:], ", ".join(word for word in known if word not in places)
            told = f"{name} takes only {' and '.join(taken)} without a name"
            raise UnknownArgumentError(f"{told}; pass {quoted(args[len(places)])} by its name, one of {others}.")
        given = {**dict(zip(known, args[method:], strict=False)), **kwargs}
        if missing := [word for word in needed if word not in given]:
            texts = [repr(given[word]) if isinstance(given.get(word), str) else _EXAMPLES[word] for word in needed]
            raise MissingArgumentError(f"{name} needs {' and '.join(missing)}, as in {name}({', '.join(texts)}).")
        token = _calls.set((*_calls.get(), Call(name, places[method:], given)))
        try:
            return call(*args, **kwargs)
        finally:
            _calls.reset(token)

    return checked


def fields_by_name(cls: type[Class]) -> type[Class]:
    """Decorate a dataclass with fields that are keywords: others are refused with the one that is meant."""
    make: Callable[..., None] = cls.__init__
    known = list(signature(cls).parameters)
    _homes.update(dict.fromkeys(known, cls.__name__) if cls.__name__ in _OF_TRAINING else {})

    @wraps(make)
    def checked(self: Class, *args: object, **kwargs: object) -> None:
        if args:
            load = f"; to load a file, call {cls.__name__}.load({quoted(args[0])})" if hasattr(cls, "load") else ""
            raise UnknownArgumentError(f"{cls.__name__} takes its fields by name, got {quoted(args[0])}{load}.")
        refuse_unknown(cls.__name__, kwargs, known, {})
        make(self, **kwargs)

    cls.__init__ = checked
    return cls
