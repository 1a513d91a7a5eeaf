"""What users of other tools type, and what it is here: near flags and commands, by spelling and by meaning."""

import shlex
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

from fastflower.errors import MissingArgumentError, UnknownArgumentError

Params = ParamSpec("Params")
Result = TypeVar("Result")
Class = TypeVar("Class")

_EXAMPLES = {"checkpoint": "'runs/a'", "shards": "'data'", "folder": "'data'", "images": "'photo.jpg'"}

_typed = ContextVar("typed", default="")
_called = ContextVar("called", default="")  # the function that the user called, not those that it calls

_TRAINS = ("train", "doctor", "preview")
_TAKE_SHARDS = (*_TRAINS, "evaluate", "verify")
_THREADS = (
    "all cores that the process may use are used; to use fewer, type taskset -c 0-3 fastflower {command} {places}"
)

# (commands, what to type instead, what users of timm, torchvision, ultralytics, fastai, Lightning, Keras and others type)
_MEANINGS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        _TRAINS,
        "--batch-size",
        "b bs batch train-batch-size per-device-train-batch-size per-gpu-train-batch-size batchsize imgs-per-gpu train-bs",
    ),
    (_TRAINS, "--backbone", "a m arch architecture model model-name model-arch net network encoder cnn base-model"),
    (_TRAINS, "--weight-decay", "wd decay l2 l2-reg weight-decay-rate"),
    (_TRAINS, "--lr", "learning-rate learningrate lr0 base-lr lr-max max-lr init-lr initial-lr lr-base blr"),
    (_TRAINS, "--epochs", "e ep n-epochs num-epochs nb-epochs max-epochs num-train-epochs epoch n-epoch"),
    (_TRAINS, "--optimizer", "opt optim optimizer-name"),
    (
        _TRAINS,
        "--schedule",
        "sched scheduler lr-scheduler lr-schedule lr-scheduler-type lr-policy lr-decay cos-lr cosine lr-strategy",
    ),
    (_TRAINS, "--warmup-epochs", "warmup warm-up lr-warmup-epochs warmup-steps warmup-ratio num-warmup-steps wu"),
    (_TRAINS, "--step-epochs", "lr-step-size step-size decay-epochs lr-decay-epochs lr-steps milestones"),
    (_TRAINS, "--gamma", "lr-gamma decay-rate lr-decay-rate"),
    (_TRAINS, "--clip-norm", "clip-grad clip-grad-norm max-grad-norm gradient-clip-val grad-clip clip max-norm"),
    (
        _TRAINS,
        "--accumulate",
        "grad-accum grad-accum-steps gradient-accumulation-steps accumulate-grad-batches nbs accum-iter",
    ),
    (_TRAINS, "--ema", "model-ema ema-decay model-ema-decay use-ema"),
    (_TRAINS, "--label-smoothing", "smoothing label-smoothing-factor ls"),
    (
        _TRAINS,
        "--precision",
        "amp fp16 bf16 half mixed-precision dtype amp-dtype use-amp no-amp fp32 native-amp apex-amp",
    ),
    (_TRAINS, "--compile", "torchcompile torch-compile"),
    (_TRAINS, "--balanced", "class-weights weighted-sampler balance oversample cls-weights class-weight weighted"),
    (_TRAINS, "--patience", "early-stopping early-stop early-stopping-patience es-patience"),
    (_TRAINS, "--freeze", "freeze-backbone freeze-layers frozen freeze-epochs freeze-stages freeze-base unfreeze"),
    (_TRAINS, "--sync-batchnorm", "sync-bn syncbn dist-bn"),
    (_TRAINS, "--seed", "random-seed manual-seed random-state"),
    (
        _TRAINS,
        "--augment.size",
        "img-size imgsz image-size input-size size resolution train-crop-size val-crop-size crop-size img-dim im-size"
        " input-shape target-size image-shape",
    ),
    (_TRAINS, "--augment.resize", "val-resize-size resize-size test-size"),
    (_TRAINS, "--augment.crop", "crop-pct rrc random-resized-crop random-crop crop-scale scale-range"),
    (_TRAINS, "--augment.scale", "zoom zoom-range random-zoom"),
    (_TRAINS, "--augment.crop-ratio", "ratio"),
    (_TRAINS, "--augment.flip", "hflip fliplr horizontal-flip flip-prob random-flip do-flip mirror no-hflip"),
    (_TRAINS, "--augment.flip-vertical", "vflip flipud vertical-flip flip-vert"),
    (_TRAINS, "--augment.rotate", "degrees rotation rotation-range max-rotate random-rotation"),
    (_TRAINS, "--augment.brightness", "color-jitter jitter hsv-v brightness-range max-lighting"),
    (_TRAINS, "--augment.saturation", "hsv-s"),
    (_TRAINS, "--augment.hue", "hsv-h"),
    (_TRAINS, "--augment.erase", "reprob random-erase random-erasing erasing cutout re-prob"),
    (_TRAINS, "--augment.mixup", "mixup-alpha mixup-prob"),
    (_TRAINS, "--augment.cutmix", "cutmix-alpha cutmix-prob"),
    (
        _TRAINS,
        "there is no policy of that kind; --augment.rotate, --augment.brightness and the other --augment flags stand for it",
        "aa auto-augment autoaugment randaugment rand-augment trivial-augment augmix ra-magnitude aug-splits augmix-severity",
    ),
    (
        _TRAINS,
        "weights are pretrained by default; --weights None starts from random ones, --weights FILE from a file",
        "pretrained no-pretrained use-pretrained pre-trained pretrain from-scratch imagenet",
    ),
    (
        _TRAINS,
        "--weights",
        "initial-checkpoint init-weights finetune-from pretrained-weights weight pretrained-path load-from ckpt checkpoint",
    ),
    (_TRAINS, "--recipe", "cfg config preset c config-file yaml config-path"),
    (
        ("train",),
        "--out",
        "output output-dir save-dir o outdir out-dir name project experiment save-path log-dir logdir",
    ),
    (
        ("train",),
        "--out",
        "exp run-name default-root-dir checkpoint-dir ckpt-dir model-dir work-dir save results-dir save-folder out-path",
    ),
    (
        ("train",),
        "--save-steps",
        "save-freq checkpoint-freq save-period save-interval checkpoint-hist every-n-train-steps",
    ),
    (("train",), "--resume", "continue resume-from resume-from-checkpoint restart ckpt-path start-epoch auto-resume"),
    (("train",), "--fold", "k-fold kfold cv"),
    (
        ("train",),
        "train always validates; to score a checkpoint, type fastflower evaluate CHECKPOINT SHARDS",
        "evaluate eval test test-only validate only-test val evaluate-only do-eval",
    ),
    (("preview",), "--out", "output o save-path output-dir save outfile"),
    (("preview",), "--images", "n num-images count num n-images"),
    (("doctor",), "--seconds", "time duration timeout"),
    (
        _TRAINS,
        "pack divides the images: fastflower pack FOLDER --val-fraction 0.2",
        "val-split valid-pct test-split validation-split val-fraction val-size val-ratio train-split valid-split"
        " split-ratio val-percent valid-size validation-fraction test-fraction",
    ),
    (
        _TAKE_SHARDS,
        "the shards come without a flag: fastflower {command} {places}",
        "d data data-dir data-path dataset dataset-dir root shards train-dir input data-root train-data path dataset-path i",
    ),
    (
        _TRAINS,
        "the classes are those of the shards",
        "num-classes n-classes nc classes nb-classes class-names num-labels n-class",
    ),
    (
        ("train", "doctor", "evaluate", "predict"),
        "--device cuda",
        "gpu gpus gpu-id gpu-ids cuda no-cuda use-cuda use-gpu accelerator devices device-id cpu no-gpu ngpus num-gpus ngpu",
    ),
    (
        (*_TRAINS, "evaluate", "predict"),
        _THREADS,
        "j workers num-workers nworkers n-workers threads num-threads nthreads n-cpu cores",
    ),
    (
        ("train",),
        "start one process per GPU with torchrun --nproc-per-node=2 -m fastflower train {places}",
        "local-rank world-size dist-url dist-backend multiprocessing-distributed distributed nodes num-nodes strategy rank",
    ),
    (("evaluate",), "--tta", "test-time-augmentation augment ttas"),
    (("predict",), "--tta", "test-time-augmentation ttas"),
    (("evaluate",), "--split", "subset mode set val train test dataset-split task"),
    (("evaluate", "predict"), "the batch size does not change the result and cannot be set", "b bs batch batch-size"),
    (
        ("evaluate", "predict"),
        "the checkpoint comes without a flag: fastflower {command} {places}",
        "checkpoint ckpt weights model resume model-path c m w ckpt-path weight load arch backbone model-weights model-file",
    ),
    (
        ("predict",),
        "the images come without a flag: fastflower {command} {places}",
        "source image images input data data-dir img i path file folder img-path image-path input-dir dir input-path img-dir",
    ),
    (("predict",), "--out", "output o save save-txt csv output-dir save-dir results-file results outfile out-file"),
    (
        ("predict",),
        "the probabilities of all classes are written by --out FILE.csv",
        "topk top-k k conf threshold probs save-conf include-probs top5 prob",
    ),
    (
        ("pack",),
        "--val-fraction",
        "val-split valid-pct validation-split val-size val-ratio val valid-split split-ratio valid-size",
    ),
    (("pack",), "--val-fraction", "train-ratio train-size train-fraction val-percent ratio train-split"),
    (("pack",), "--test-fraction", "test-size test-split test-ratio test"),
    (("pack",), "--max-side", "size img-size resize image-size imgsz max-size max-resolution max-dim"),
    (("pack",), "--quality", "jpeg-quality q jpg-quality"),
    (("pack",), "--shard-bytes", "shard-size maxsize maxcount shard-mb max-shard-size"),
    (("pack",), "--workers", "j num-workers threads nworkers n-workers processes num-threads jobs n-jobs num-proc"),
    (("pack",), "--out", "output o output-dir out-dir dest dst save-dir output-folder shards target"),
    (("pack",), "--folds", "k kfold k-folds n-splits n-folds num-folds cv"),
    (("pack",), "--labels", "csv annotations label ann-file labels-csv metadata annotation train-csv ann"),
    (("pack",), "--ignore", "exclude skip excludes filter"),
    (("pack",), "--seed", "random-seed random-state"),
    (("pack",), "--split-by", "stratify stratified group"),
    (
        ("pack",),
        "the folder comes without a flag: fastflower pack {places}",
        "data data-dir input folder d root dataset data-path src source i input-dir path images dataset-dir",
    ),
    (
        (*_TRAINS, "evaluate"),
        "it is a flag of pack: pack first (fastflower pack FOLDER {flag} ... --out shards), then pass shards",
        "labels ignore folds split-by path-column label-column split-column max-side on-bad on-conflict drop-empty-classes"
        " as-split",
    ),
    (("verify",), "--repair", "fix rebuild"),
)

_COMMAND_MEANINGS = {
    "pack": "convert prepare create build make split import shard prep dataset",
    "verify": "check validate-data checksum integrity fsck repair fix",
    "doctor": "diagnose profile benchmark bench bottleneck speed",
    "preview": "show view visualize augment plot display",
    "train": "fit finetune fine-tune run learn training fit-one-cycle tune",
    "evaluate": "eval test val validate score metrics validation evaluation",
    "predict": "infer inference classify detect prediction label predictions",
    "--help": "help usage commands",
    "--version": "version -V -v",
}


def did_you_mean(command: str, flag: str, known: Collection[str], places: str) -> str:
    """Return the error for an unknown flag: what it means here, or the flags that are spelled nearly so.

    known  The flags. places  The positional arguments.
    """
    text = f"unknown flag {flag}; "
    for commands, answer, words in _MEANINGS:
        if command in commands and _plain(flag).removeprefix("augment.") in words.split():
            meant = (
                f"did you mean {answer}?"
                if answer.startswith("--")
                else answer.format(command=command, places=places, flag=flag)
            )
            return text + meant + ("" if meant.endswith("?") else ".")
    if near := _near(_plain(flag), known):
        return f"{text}did you mean {' or '.join(near)}?"
    return f"{text}fastflower {command} --help lists the flags."


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-").lower()


def _near(name: str, known: Collection[str]) -> list[str]:
    """Return flags that end in the name or are spelled nearly so; the last parts of --augment.crop and the like count too."""
    names = {flag.lstrip("-"): flag for flag in known}
    lasts: dict[str, str] = {flag.rpartition(".")[2]: flag for flag in known if "." in flag}
    if name.rpartition(".")[2] in {**names, **lasts}:
        return [{**lasts, **names}[name.rpartition(".")[2]]]
    close = get_close_matches(name, names, 2, 0.7) or get_close_matches(name, lasts, 2, 0.7)
    return [{**lasts, **names}[match] for match in close]


def instead(command: str, word: str, places: str, known: Collection[str]) -> str:
    """Return the error for an argument that is too many."""
    key, equals, value = word.partition("=")
    if equals and (near := _near(_plain(key), known)):
        return f"unexpected {word!r}; flags are written {near[0]} {value}."
    switches = "; a switch such as --resume takes no value" if word.lower() in ("true", "false", "yes", "no") else ""
    return f"unexpected {word!r}{switches}; type fastflower {command} {places} and then flags."


def near_command(word: str, commands: Collection[str]) -> str:
    """Return the command that a word means, or ""."""
    plain = word.lower()
    meant = [command for command, words in _COMMAND_MEANINGS.items() if plain in words.split() or plain == command]
    return next(iter(meant or get_close_matches(plain, {*commands, *_COMMAND_MEANINGS}, 1, 0.6)), "")


def refuse_unknown(function: str, names: Iterable[str], known: Collection[str], instead: Mapping[str, str]) -> None:
    """Raise UnknownArgumentError if a name is not known. A line for each says what is meant, or which known name is near.

    instead  What to say for some names.
    """
    lines: list[str] = []
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1)
            text = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}."
            text = f"{instead[name]}." if name in instead else _argument(function, name, known) or text
            lines.append(f"{name}: {function} has no such argument; {text}")
    if lines:
        raise UnknownArgumentError("\n".join(lines))


def _argument(function: str, name: str, known: Collection[str]) -> str:
    """Return what the name of an argument means by the words of other tools, or ""."""
    command, word = {"Recipe": "train", "Augment": "train"}.get(function, function), _plain(name)
    for commands, answer, words in _MEANINGS:
        if command not in commands or not (word in words.split() or answer in (f"--{word}", f"--augment.{word}")):
            continue
        if not answer.startswith("--"):
            text = answer.replace("--weights ", "weights=").replace("--augment.", "").replace("--augment", "Augment's")
            return "" if "{" in text else f"{text}."
        field = answer.split()[0].lstrip("-").replace("-", "_")
        last = field.removeprefix("augment.")
        if last in known:
            return f"did you mean {last}?"
        if commands != _TRAINS:
            return f"did you mean {commands[0]}({field}=...)?"
        return f"did you mean Recipe({f'augment=Augment({last}=...)' if last != field else f'{last}=...'})?"
    return ""


@contextmanager
def typed(command: str) -> Generator[None]:
    """Make messages inside the block name commands, because the user typed this one."""
    token = _typed.set(command)
    try:
        yield
    finally:
        _typed.reset(token)


def command_typed() -> str:
    """Return the command that the user typed, or "" if they called a function."""
    return _typed.get()


def with_data(place: object) -> str:
    """Return what the user typed or called, with another folder of images or shards."""
    if command := _typed.get():
        return shlex.join(["fastflower", command, *(["CHECKPOINT"] if command == "evaluate" else []), str(place)])
    function = _called.get() or "pack"
    return f"{function}({'checkpoint, ' if function == 'evaluate' else ''}{str(place)!r})"


def keywords(call: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorate a function: an unknown keyword argument is refused with the one that is meant, a missing one with an example."""
    known, name = list(signature(call).parameters), getattr(call, "__name__", "")
    needed = [word for word, each in signature(call).parameters.items() if each.default is each.empty]

    @wraps(call)
    def checked(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        refuse_unknown(name, kwargs, known, {})
        given = {**dict(zip(needed, args, strict=False)), **kwargs}
        if missing := [word for word in needed if word not in given]:
            texts = [repr(given[word]) if isinstance(given.get(word), str) else _EXAMPLES[word] for word in needed]
            raise MissingArgumentError(f"{name} needs {' and '.join(missing)}, as in {name}({', '.join(texts)}).")
        token = _called.set(_called.get() or name)
        try:
            return call(*args, **kwargs)
        finally:
            _called.reset(token)

    return checked


def fields_by_name(cls: type[Class]) -> type[Class]:
    """Decorate a dataclass with fields that are keywords: others are refused with the one that is meant."""
    make: Callable[..., None] = cls.__init__
    known = list(signature(cls).parameters)

    @wraps(make)
    def checked(self: Class, *args: object, **kwargs: object) -> None:
        if args:
            load = f"; to load a file, call {cls.__name__}.load({args[0]!r})" if hasattr(cls, "load") else ""
            raise UnknownArgumentError(f"{cls.__name__} takes its fields by name, got {args[0]!r}{load}.")
        refuse_unknown(cls.__name__, kwargs, known, {})
        make(self, **kwargs)

    cls.__init__ = checked
    return cls
