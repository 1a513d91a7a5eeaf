"""The command line: one subcommand for each public function, with flags derived from its signature and docstring."""

import json
import logging
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from fastflower.errors import ArgumentError, FastflowerError, SampleError, ShardError, StoppedError
from fastflower.flags import EXAMPLES, Parser, UsageError, inverse
from fastflower.machine import speaks
from fastflower.no_command import answer, splits_together
from fastflower.outline import Outline
from fastflower.suggestions import typed

_TYPES: dict[str, object] = {
    "folder": Path,
    "out": Path | None,
    "shards": str,
    "checkpoint": str,
    "images": list[str],  # paths and URLs
    "columns": str | None,
    "sample": Path,
    "device": str | None,
    "labels": list[Path],
    **dict.fromkeys(("classes", "augment", "executor")),
    "ignore": list[str],
}
"""Command-line types of parameters that accept more types from Python. None: only Python has the parameter."""

_NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t")
_WORDS = {"--device": ("cpu", "cuda", "cuda:0"), "--split": ("train", "val", "test")}
"""By flag: words that are meant as its value if they stand without it."""


def main(args: Sequence[str] | None = None) -> int:
    """Run `fastflower COMMAND ...`. Returns the exit status: 0 for success, 1 for a FastflowerError, 2 for wrong usage."""
    try:
        status = _run(args)
        if sys.stdout:  # None if it was closed
            sys.stdout.flush()  # raises BrokenPipeError here, not at exit
    except BrokenPipeError:  # the reader of stdout is gone, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python complains again at exit
        return 141  # 128 + SIGPIPE
    return status


def _run(args: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]
    if args == ["--version"]:
        print("fastflower", version("fastflower"))
        return 0
    if not args or args[0] not in _COMMANDS:
        return _no_command(args)
    if reconfigure := getattr(sys.stdout, "reconfigure", None):  # a replacement for stdout may lack it
        reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    warnings.filterwarnings("ignore", module="PIL")  # about damaged metadata or large images, without naming the file
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fastflower").setLevel(logging.INFO)
    run, _ = _COMMANDS[args[0]]
    try:
        with logging_redirect_tqdm(), typed(args):
            run(f"fastflower {args[0]}", args[1:])
    except UsageError as error:
        _say(f"error: {splits_together(args) or error}")
        raise SystemExit(2) from None
    except StoppedError as stopped:
        if speaks():
            print(stopped, file=sys.stderr)
        return 143  # 128 + SIGTERM, as shells report it
    except FastflowerError as error:
        _say(f"error: {_by_flag(str(error), args)}")
        return 1
    except KeyboardInterrupt as stopped:
        if speaks() and not stopped.args:  # train has said what to type
            print(f"interrupted. To run it again:\n  {shlex.join(['fastflower', *args])}", file=sys.stderr)
        return 130
    return 0


def _say(error: str) -> None:
    """Print an error. torchrun repeats it below its own lines, which follow and are long."""
    print(error, file=sys.stderr)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": error, "timestamp": int(time.time())}), "utf-8")


def _by_flag(text: str, args: Sequence[str]) -> str:
    """Return the text of an error with the flag that was typed in place of the argument, and an example of it."""
    name = text.partition(" must be ")[0]
    flag = _flag("", name)
    if flag not in {word.partition("=")[0].replace("_", "-") for word in args}:
        return text
    text, example = f"{flag}{text.removeprefix(name)}", EXAMPLES.get(name, "")
    refused = re.fullmatch(r".* must be (?!used|None).*, got ([^;]*)\.", text)
    return f"{text[:-1]}; for example {flag} {example}." if refused and example not in ("", refused[1]) else text


def _no_command(args: Sequence[str]) -> int:
    """Print what can be typed if the command line does not start with a command."""
    asked = args[:1] in (["-h"], ["--help"])
    usage = (
        "usage: fastflower COMMAND ... (begin with fastflower train FOLDER; fastflower COMMAND --help lists its flags)"
    )
    lines = [f"  {name:10}{text}" for name, (_, text) in _COMMANDS.items()]
    print(usage, *lines, sep="\n", file=sys.stdout if asked else sys.stderr)
    if args and not asked:  # last, where it is seen
        print(f"error: {answer(args, _COMMANDS)}", file=sys.stderr)
    return 0 if asked else 2


def _parser(prog: str, function: str, **types: object) -> Parser:
    """Return the parser of a function's arguments. types  Types of parameters, as in _TYPES.

    The function, such as "training.trainer.train", is not imported: wrong flags are refused before torch is.
    """
    types, (module, _, name) = {**_TYPES, **types}, function.rpartition(".")
    call = Outline(f"fastflower.{module}", name, types)
    parser = Parser(prog, (call.__doc__ or "").split("\n\n")[0])
    parser.add_parameters(call, types)
    parser.choices |= {flag: words for flag, words in _WORDS.items() if flag in parser.texts}
    return parser


def _pack(prog: str, args: Sequence[str]) -> None:
    parser = _parser(prog, "packing.packer.pack", out=Path, split=list[Path])
    text = "Address of a Dask scheduler. Its workers do the packing and must see FOLDER and OUT at the same paths."
    parser.choices["--out"] = ["*"]  # as in pack(folder, out)
    parser.add("dask", str | None, text, metavar="ADDRESS")
    values = parser.parse(args)
    from fastflower.packing.packer import pack
    from fastflower.packing.remarks import summary

    with _dask(values.pop("dask", None)) as executor:
        manifest = pack(**values, executor=executor)
    print(*summary(manifest), sep="\n")


@contextmanager
def _dask(address: str | None) -> Generator[Executor | None]:
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise ArgumentError("--dask needs the package 'distributed'; run pip install 'fastflower[dask]'.") from None
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"--dask {address}: no scheduler answers ({error}); pass its address as tcp://HOST:PORT."
        ) from None
    with client:
        yield client.get_executor()  # pyright: ignore[reportUnknownMemberType]  (distributed is untyped)


def _verify(prog: str, args: Sequence[str]) -> None:
    values = _parser(prog, "shards.verification.verify").parse(args)
    from fastflower.shards.verification import verify

    problems = verify(**values)
    for problem in problems:
        print(problem)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ShardError(f"{values['shards']}: {count}, listed above.")
    print(f"{values['shards']}: every image decodes; tars, indexes and manifest agree")


def _doctor(prog: str, args: Sequence[str]) -> None:
    values = _parse_recipe(prog, args, "training.diagnosis.diagnose")
    from fastflower.training.diagnosis import diagnose

    print(diagnose(**values))


def _preview(prog: str, args: Sequence[str]) -> None:
    args = [text.replace("--photographs", "--images") for text in args]  # the flag's previous name
    values = _parse_recipe(prog, args, "reporting.preview.preview", out=Path, images=int)
    from fastflower.reporting.preview import preview

    print(f"wrote {preview(**values)}")


def _train(prog: str, args: Sequence[str]) -> None:
    if not speaks():
        logging.getLogger("fastflower").setLevel(logging.WARNING)
    try:
        values = _parse_recipe(prog, args, "training.trainer.train", out=Path | None)
    except UsageError as error:
        raise UsageError(f"{error}{_of_runs(args)}") from None
    from fastflower.training.trainer import train

    report = train(**values)
    if speaks():
        print(*report.last_lines(), sep="\n")


def _of_runs(args: Sequence[str]) -> str:
    """Return how to continue the runs among the arguments."""
    if not any(map(os.path.isdir, args)):
        return ""
    from fastflower.training.command import to_resume

    runs = {word: command for word in args if (command := to_resume(Path(word)))}
    return "".join(f" {run} is a run. To continue it:\n  {command}" for run, command in runs.items())


def _reports(prog: str, args: Sequence[str]) -> None:
    parsed = _parser(prog, "training.reports.reports", out=Path).parse(args)
    values: dict[str, Any] = {"out": Path("runs/reports"), **parsed}
    from fastflower.training.reports import reports

    try:
        text = reports(**values)
    except ArgumentError as error:
        raise ArgumentError(_with_flag(error, "")) from None
    print(text, end="")
    print(f"wrote {values['out'] / 'reports.md'}")


def _parse_recipe(prog: str, args: Sequence[str], function: str, **types: object) -> dict[str, Any]:
    """Parse the command line for a subcommand that takes a recipe. Each field of the recipe is a flag."""
    try:
        return {**_with_recipe(prog, args, function, **types)}
    except ArgumentError as error:
        flag = str(error).partition(" ")[0]
        name = flag.rpartition(".")[2].removeprefix("--").replace("-", "_")
        tries = [[flag, *text.split()] for text in (EXAMPLES.get(name), "0", "1", "constant") if text]
        works = (one for one in (*tries, [inverse(flag)]) if _is_accepted(prog, [*args, *one], function, **types))
        example = next(works, tries[0] if name in EXAMPLES else [])
        told = f"; for example {' '.join(example)}." if example and flag != "--recipe" else "."
        raise ArgumentError(str(error).removesuffix(".") + told) from None


def _is_accepted(prog: str, args: Sequence[str], function: str, **types: object) -> bool:
    with suppress(ArgumentError, UsageError):
        return bool(_with_recipe(prog, args, function, **types))
    return False


def _with_recipe(prog: str, args: Sequence[str], function: str, **types: object) -> dict[str, object]:
    """Return what `_parse_recipe` does. Raises ArgumentError for the first field with a wrong value."""
    from fastflower.recipes.presets import PRESETS, phrase

    text = "Recipe that sets the defaults of the flags below; --recipe list prints all."
    chosen = Parser(prog)
    chosen.add("recipe", str, text, metavar="NAME")
    name = str(vars(chosen.parse_known_args(args)[0]).get("recipe", "default"))
    if name == "list":
        print(*(f"{name:34}{phrase(name)}" for name in PRESETS), sep="\n")
        raise SystemExit(0)
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, 3)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ArgumentError(f"--recipe {name}: no recipe has this name; {meant}{prog} --recipe list prints all.")
    recipe = PRESETS[name]()
    parser = _parser(prog, function, recipe=None, **types)
    parser.add("recipe", str, text, metavar="NAME", default="default")
    parser.choices |= {"--recipe": PRESETS, "--backbone": _NETWORKS}
    parser.add_fields(recipe, f"recipe {name}", but="augment")
    parser.add_fields(recipe.augment, f"augmentation of recipe {name}", "augment.")
    values = parser.parse(args)
    typed = "recipe" in values
    values.pop("recipe", None)
    changed = {item.name: values.pop(item.name) for item in fields(recipe) if item.name in values}
    drawn = {key: values.pop(key) for key in list(values) if key.startswith("augment.")}
    if values.get("resume") and not (typed or changed or drawn):
        return values  # the run's own recipe
    try:
        augment = replace(recipe.augment, **{key.removeprefix("augment."): value for key, value in drawn.items()})
        return {**values, "recipe": replace(recipe, augment=augment, **changed)}
    except ArgumentError as error:
        raise ArgumentError(_with_flag(error)) from None


def _with_flag(error: ArgumentError, prefix: str = "augment.") -> str:
    """Return a message with the flag in place of the field of a recipe. prefix  That of flags for fields of Augment."""
    owners = {"Recipe": "", "Augment": prefix}
    return re.sub(r"^(Recipe|Augment)\.(\w+)", lambda found: _flag(owners[found[1]], found[2]), str(error))


def _flag(prefix: str, name: str) -> str:
    return f"--{prefix}{name.replace('_', '-')}"


def _backbones(prog: str, args: Sequence[str]) -> None:
    values = _parser(prog, "models.catalog.backbones").parse(args or ["*"])
    from fastflower.models.catalog import backbones

    for number, each in enumerate(backbones(**values)):
        if number == 0:
            print(f"{'name':32}{'parameters':>12}{'stages':>8}{'trained at':>12}  {'weights':12}image sizes")
        weights = "on disk" if each.at_hand else "to download"
        millions = f"{each.parameters / 1e6:.1f} M"
        print(f"{each.name:32}{millions:>12}{each.stages:>8}{each.native:>12}  {weights:12}{each.sizes}", flush=True)


def _evaluate(prog: str, args: Sequence[str]) -> None:
    values = _parser(prog, "models.evaluation.evaluate").parse(args)
    from fastflower.models.checkpoint import require_order
    from fastflower.models.evaluation import evaluate

    require_order(values["checkpoint"], values["shards"], partial(_reordered, prog, args))
    scores = evaluate(**values)
    print(
        f"{scores.split}: {scores.num_samples} images, accuracy {scores.accuracy:.2%}, loss {scores.loss:.4f}, "
        f"macro-F1 {scores.macro_f1:.2%}, calibration error {scores.calibration_error:.2%}"
    )
    rows = zip(scores.classes, scores.support, scores.precision, scores.recall, strict=True)
    for name, support, precision, recall in rows:
        figures = f"precision {precision:.1%}, recall {recall:.1%}".replace("nan%", "undefined")
        print(f"  {name}: {figures}, {support} images")


def _predict(prog: str, args: Sequence[str]) -> None:
    values = _parser(prog, "models.prediction.predict").parse(args)
    if not values["images"]:
        raise ArgumentError("IMAGES must name at least one image file or folder, got none.")
    from fastflower.models.checkpoint import require_order
    from fastflower.models.prediction import tabulated
    from fastflower.models.predictor import Predictor
    from fastflower.models.sources import sources
    from fastflower.models.submission import Table

    require_order(values["checkpoint"], values["images"], partial(_reordered, prog, args))
    images, on_bad, out = sources(values.pop("images")), values.pop("on_bad", "fail"), values.pop("out", None)
    if values.get("columns") is not None:
        values["columns"] = tuple(values["columns"].split(","))
    form = {name: values.pop(name) for name in ("columns", "ids", "sample") if name in values}
    predictor = Predictor(**values)
    lines, skipped = list[str](), 0
    for source, prediction in tabulated(predictor, on_bad, Table(out, predictor.classes, images, **form)):
        if prediction is None:
            skipped += 1
        else:
            lines.append(f"{source.name}: {prediction.class_name} ({prediction.probability:.1%})")
    if out is not None:
        print(f"wrote {out}")
    elif lines:
        print(*lines, sep="\n")
    if skipped and on_bad == "fail":
        what = f"{skipped} of {skipped + len(lines)} images are unusable and have no prediction"
        empty = f"; their cells in {out} are empty" if out is not None else ""
        if form:
            rows = f"{skipped} row{'s' * (skipped > 1)} with empty cells, which a competition may reject"
            empty = f"; {out} has {rows}: fill them, for example with the most frequent class"
        raise SampleError(f"{what}{empty}; the images are named above (to accept that, pass --on-bad skip).")


def _reordered(prog: str, args: Sequence[str], checkpoint: str, others: list[str]) -> str:
    """Return a command line with its positional arguments in this order, before its flags."""
    flags = [word for word in args if word not in ("--", checkpoint, *others)]
    return shlex.join([*prog.split(), checkpoint, *others, *flags])


def _export(prog: str, args: Sequence[str]) -> None:
    values = _parser(prog, "exporting.export.export", out=Path, batched=str | None).parse(args)
    from fastflower.exporting.export import export

    print(export(**values))


_COMMANDS: dict[str, tuple[Callable[[str, Sequence[str]], None], str]] = {
    "pack": (_pack, "convert a folder, archive or table of images to shards"),
    "verify": (_verify, "check that every image decodes and that shards, indexes and manifest agree"),
    "doctor": (_doctor, "find what limits training speed: reading, decoding, augmentation or the neural network"),
    "preview": (_preview, "write a PNG of images augmented by a recipe"),
    "train": (_train, "train a classifier on a folder of images, or on shards"),
    "reports": (_reports, "repeat the experiments of five student reports, and compare"),
    "evaluate": (_evaluate, "score a checkpoint on a folder of images, or on a split of shards"),
    "predict": (_predict, "classify image files"),
    "export": (
        _export,
        "write a trained network to a file for other programs, and prove that it answers as predict does",
    ),
    "backbones": (_backbones, "list networks to train, with their stages and image sizes"),
}
