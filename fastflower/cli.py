"""The command line: one subcommand for each public function, with flags generated from its signature and docstring."""

import inspect
import logging
import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import field, make_dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm.contrib.logging import logging_redirect_tqdm

from fastflower.errors import ArgumentError, FastflowerError, ShardError, StoppedError

_MAX_LINES = 20  # of each kind; manifest.json lists all

_DASK = tyro.conf.arg(
    name="dask",
    metavar="ADDRESS",
    help="Address of a Dask scheduler. Its workers do the packing and must see FOLDER and OUT at the same paths.",
)
_FILES = Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]  # --labels A --labels B
_TYPES: dict[str, object] = {
    "folder": Path,
    "shards": str,
    "checkpoint": Path,
    "images": list[Path],
    "device": str | None,
    "executor": Annotated[str | None, _DASK],
    "ignore": Annotated[tuple[str, ...], tyro.conf.UseAppendAction],
}
"""Command-line types of parameters that accept more types from Python."""


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
    if args == ["--version"]:
        print("fastflower", version("fastflower"))
        return 0
    if not args or args[0] not in _COMMANDS:
        asked = bool(args) and args[0] in ("-h", "--help")
        lines = [f"  {name:10}{text}" for name, (_, text) in _COMMANDS.items()]
        usage = "usage: fastflower COMMAND ... (fastflower COMMAND --help lists its flags)"
        wrong = [f"unknown command {args[0]!r}"] if args and not asked else []
        print(*wrong, usage, *lines, sep="\n", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    if reconfigure := getattr(sys.stdout, "reconfigure", None):  # a replacement for stdout may lack it
        reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    warnings.filterwarnings("ignore", module="PIL")  # about damaged metadata or large images, without naming the file
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fastflower").setLevel(logging.INFO)
    run, _ = _COMMANDS[args[0]]
    try:
        with logging_redirect_tqdm():
            run(f"fastflower {args[0]}", args[1:])
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return 143  # 128 + SIGTERM, as shells report it
    except FastflowerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(
    prog: str, args: Sequence[str], call: Callable[..., object], note: str = "", preset: object = None, **types: object
) -> dict[str, Any]:
    """Parse the command line into keyword arguments for `call`.

    note  Text above the flags in the help. preset  Default of `recipe`. types  Types of parameters, as in _TYPES.
    """
    flags: list[tuple[str, object, object]] = []
    for name, parameter in inspect.signature(call).parameters.items():
        annotation = {**_TYPES, **types}.get(name, parameter.annotation)
        default: Any = preset if name == "recipe" else parameter.default
        if default is parameter.empty:
            flags.append((name, Annotated[annotation, tyro.conf.arg(metavar=name.upper())], field()))
        else:
            flags.append((name, annotation, field(default=Path(default) if annotation is Path else default)))
    text = inspect.cleandoc(call.__doc__ or "").replace("Args:", f"{note}\n\nArgs:", 1)
    arguments: type[object] = make_dataclass("Arguments", flags, kw_only=True, namespace={"__doc__": text})
    return vars(tyro.cli(arguments, prog=prog, args=args, config=(tyro.conf.PositionalRequiredArgs,)))


def _pack(prog: str, args: Sequence[str]) -> None:
    from fastflower.packing.packer import pack

    values = _parse(prog, args, pack, out=Path, labels=_FILES, split=_FILES)
    with _dask(values.pop("executor")) as executor:
        manifest = pack(**values, executor=executor)
    for name, split in manifest.splits.items():
        folds = f", {manifest.folds.count} folds" if manifest.folds and name == "train" else ""
        print(f"{name}: {split.samples} images in {len(split.shards)} shards{folds}")
    identical = [group for group in manifest.duplicates if group not in manifest.label_conflicts]
    _listed("warning", [f"{item['path']}: {item['warning']}" for item in manifest.warnings])
    _listed("the same image under two labels:", map(", ".join, manifest.label_conflicts))
    _listed("identical:", map(", ".join, identical))
    near = [f"{item['path']} in {item['split']}, {item['train_path']} in train" for item in manifest.near_duplicates]
    _listed("near-duplicate:", near)
    if near:
        print(f"near-duplicates of training images in other splits: {len(near)}; accuracy on them is optimistic")
    print(f"wrote {manifest.folder}")


def _listed(what: str, lines: Iterable[str]) -> None:
    from fastflower.packing.remarks import printable

    lines = list(lines)
    for line in lines[:_MAX_LINES]:
        print(what, printable(line))
    if len(lines) > _MAX_LINES:
        print(f"{what} {len(lines) - _MAX_LINES} more; see manifest.json")


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
    from fastflower.shards.verification import verify

    values = _parse(prog, args, verify)
    problems = verify(**values)
    for problem in problems:
        print(problem)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ShardError(f"{values['shards']}: {count}, listed above.")
    print(f"{values['shards']}: every image decodes; tars, indexes and manifest agree")


def _doctor(prog: str, args: Sequence[str]) -> None:
    from fastflower.training.diagnosis import diagnose

    print(diagnose(**_parse_recipe(prog, args, diagnose)))


def _preview(prog: str, args: Sequence[str]) -> None:
    from fastflower.reporting.preview import preview

    args = [text.replace("--photographs", "--images") for text in args]  # the flag's previous name
    print(f"wrote {preview(**_parse_recipe(prog, args, preview, out=Path, images=int))}")


def _train(prog: str, args: Sequence[str]) -> None:
    from fastflower.training.trainer import train

    first = os.environ.get("RANK", "0") == "0"  # set by torchrun; only rank 0 reports
    if not first:
        logging.getLogger("fastflower").setLevel(logging.WARNING)
    report = train(**_parse_recipe(prog, args, train, out=Path | None))
    best = report.history[report.best_epoch - 1]
    if not first:
        return
    if report.scores:
        print(f"best: epoch {report.best_epoch}, validation accuracy {best['val_accuracy']:.1%}")
    print(f"wrote {report.folder / 'report.html'}")


def _parse_recipe(prog: str, args: Sequence[str], call: Callable[..., object], **types: object) -> dict[str, Any]:
    """Parse the command line for a subcommand that takes a recipe. Each field of the recipe is a flag."""
    from fastflower.recipes.presets import PRESETS
    from fastflower.recipes.recipe import Recipe

    # --recipe NAME is parsed first, because the defaults of all other flags depend on it.
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?", default="default", const="")
    recipe_flag, rest = parser.parse_known_args(args)
    name: str = recipe_flag.recipe
    if name not in PRESETS:
        meant = "".join(f" Did you mean {near}?" for near in get_close_matches(name, PRESETS, 1))
        raise ArgumentError(f"--recipe must be one of {', '.join(PRESETS)}, got {name!r}.{meant}")
    note = f"--recipe NAME sets the defaults of the flags below. NAME is one of: {', '.join(PRESETS)}."
    recipe = Annotated[Recipe, tyro.conf.arg(name="")]
    return _parse(prog, rest, call, note, PRESETS[name](), recipe=recipe, **types)


def _evaluate(prog: str, args: Sequence[str]) -> None:
    from fastflower.models.evaluation import evaluate

    scores = evaluate(**_parse(prog, args, evaluate))
    print(
        f"{scores.num_samples} images: accuracy {scores.accuracy:.2%}, loss {scores.loss:.4f}, "
        f"macro-F1 {scores.macro_f1:.2%}, calibration error {scores.calibration_error:.2%}"
    )
    for name, precision, recall in zip(scores.classes, scores.precision, scores.recall, strict=True):
        print(f"  {name}: precision {precision:.1%}, recall {recall:.1%}".replace("nan%", "undefined"))


def _predict(prog: str, args: Sequence[str]) -> None:
    from fastflower.models.prediction import predict

    values = _parse(prog, args, predict)
    if not values["images"]:
        raise ArgumentError("IMAGES must name at least one image file or folder, got none.")
    for prediction in predict(**values):
        print(f"{prediction.path}: {prediction.class_name} ({prediction.probability:.1%})")


_COMMANDS: dict[str, tuple[Callable[[str, Sequence[str]], None], str]] = {
    "pack": (_pack, "convert a folder of class folders to shards"),
    "verify": (_verify, "check that every image decodes and that shards, indexes and manifest agree"),
    "doctor": (_doctor, "find what limits training speed: reading, decoding, augmentation or the neural network"),
    "preview": (_preview, "write a PNG of images augmented by a recipe"),
    "train": (_train, "train a classifier on shards"),
    "evaluate": (_evaluate, "score a checkpoint on a split of shards"),
    "predict": (_predict, "classify image files"),
}
