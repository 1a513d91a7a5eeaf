"""Command lines that are wrong: one line that says what to type, and status 2. What users of other tools type is understood."""

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflower import Augment, Recipe, evaluate, pack, predict, train
from fastflower.cli import main
from fastflower.flags import Parser, UsageError
from fastflower.recipes.presets import PRESETS
from fastflower.reporting.preview import preview
from fastflower.shards.verification import verify
from fastflower.training.diagnosis import diagnose
from fastflower.words import MEANINGS

COMMANDS: dict[str, Callable[..., Any]] = {
    "pack": pack, "verify": verify, "doctor": diagnose, "preview": preview, "train": train, "evaluate": evaluate,
    "predict": predict,
}  # fmt: skip


def usage_error(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """Return the one line that a wrong command line prints."""
    with pytest.raises(SystemExit, match=r"^2$"):
        main(line.split())
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("error: ").rstrip()


@pytest.mark.parametrize("args", [*(f"{name} x y --no-such-flag 1" for name in COMMANDS), "pack x --seed many"])
def test_an_unknown_flag_or_value_is_a_usage_error_that_names_it(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert args.split()[-2] in usage_error(capsys, args)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_missing_argument_is_a_usage_error_that_names_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = next(iter(inspect.signature(COMMANDS[name]).parameters)).upper()
    text = usage_error(capsys, name)
    assert text.startswith(f"{first} is missing (")
    assert re.search(rf"; type fastflower {name} {first}[A-Z ]*\.$", text)


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("train s --bs 32", "--batch-size"), ("train s -b 32", "--batch-size"), ("train s --batch 32", "--batch-size"),
        ("train s --per_device_train_batch_size 32", "--batch-size"), ("train s --model resnet50", "--backbone"),
        ("train s -a resnet50", "--backbone"), ("train s --net=resnet50", "--backbone"), ("train s --wd 1", "--weight-decay"),
        ("train s --learning_rate 0.1", "--lr"), ("train s --lr0 0.1", "--lr"), ("train s --num-epochs 3", "--epochs"),
        ("train s --opt sgd", "--optimizer"), ("train s --sched cosine", "--schedule"), ("train s --lr-policy x", "--schedule"),
        ("train s --amp", "--precision bfloat16"), ("train s --output o", "--out"), ("train s --name o", "--out"),
        ("train s --gpus 0", "--device cuda"), ("train s --imgsz 64", "--augment.size"), ("train s --size 64", "--augment.size"),
        ("train s --rotate 10", "--augment.rotate"), ("train s --degrees 10", "--augment.rotate"),
        ("train s --augment.rotation 10", "--augment.rotate"), ("train s --mixup-alpha 1", "--augment.mixup"),
        ("train s --batch-sise 3", "--batch-size"), ("train s --epoch 3", "--epochs"), ("train s --Epochs 3", "--epochs"),
        ("train s --model-ema", "--ema"), ("doctor s --contrats 1", "--augment.contrast"),
        ("pack d --test-size 0.1", "--test-fraction"), ("pack d --valid_pct 0.1", "--val-fraction"),
        ("pack d --num-workers 3", "--workers"), ("pack d -o out", "--out"), ("evaluate c s --cuda", "--device cuda"),
        ("verify s --fix", "--repair"), ("doctor s --second 3", "--seconds"), ("predict c i --output f.csv", "--out"),
    ],
)  # fmt: skip
def test_an_unknown_flag_suggests_the_near_one(line: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    typed = line.split()[[word.startswith("-") for word in line.split()].index(True)].partition("=")[0]
    assert usage_error(capsys, line) == f"unknown flag {typed}; did you mean {flag}?"


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (
            "train s -j 4",
            "all cores that the process may use are used; to use fewer, type taskset -c 0-3 fastflower train s.",
        ),
        ("train --data shards", "the shards come without a flag: fastflower train SHARDS."),
        (
            "train s --pretrained",
            "weights are pretrained by default; --weights None starts from random ones, --weights FILE",
        ),
        ("train s --val-split 0.2", "pack divides the images: fastflower pack FOLDER --val-fraction 0.2."),
        ("train s --num-classes 5", "the classes are those of the shards."),
        (
            "train s --local_rank 0",
            "one process trains on each GPU: torchrun --nproc-per-node 2 -m fastflower train s.",
        ),
        (
            "train s --aa rand-m9",
            "there is no policy of that kind; --augment.rotate, --augment.brightness and the other",
        ),
        ("predict --source i.jpg", "the images come without a flag: fastflower predict CHECKPOINT IMAGES."),
        ("predict --model c i.jpg", "the checkpoint comes without a flag: fastflower predict CHECKPOINT IMAGES."),
        ("evaluate c s --batch-size 8", "the batch size does not change the result and cannot be set."),
        ("pack --data-dir d", "the folder comes without a flag: fastflower pack FOLDER."),
        ("train s --zzz 3", "fastflower train --help lists the flags."),
    ],
)
def test_a_flag_that_does_not_exist_here_says_what_stands_for_it(
    line: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert usage_error(capsys, line).partition("; ")[2].startswith(answer)


@pytest.mark.parametrize(
    "words", ["scratch", "finetuen --epochs 3", "resnet34 adamw cpu", "lr0=0.1 epochs=10", "wd 0.1"]
)
def test_the_command_for_arguments_that_are_too_many_is_understood(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = usage_error(capsys, f"train no-such-folder {words}").rpartition("; type fastflower ")[2].removesuffix(".")
    assert main(line.split()) == 1
    assert (
        capsys.readouterr().err.rpartition("error: ")[2].startswith("no-such-folder: does not exist")
    )  # all flags are accepted


def test_all_unknown_flags_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["train", "s", "--bs", "3", "--zzz", "4", "--lr", "1", "--amp", "--bs", "3", "--num_classes=5"])
    assert capsys.readouterr().err.splitlines() == [
        "error: unknown flag --bs; did you mean --batch-size?",
        "unknown flag --zzz; fastflower train --help lists the flags.",
        "unknown flag --amp; did you mean --precision bfloat16?",
        "unknown flag --num_classes; the classes are those of the shards.",
    ]


def parser(command: str, *, recipes: bool = False) -> Parser:
    made = Parser(f"fastflower {command}")
    images = {"images": list[str]} if command == "predict" else {}
    made.add_parameters(COMMANDS[command], {"folder": str, "shards": str, "checkpoint": str, **images})
    if recipes:
        made.add_fields(Recipe(), "recipe", but="augment")
        made.add_fields(Augment(), "augmentation", "augment.")
    return made


@cache
def all_flags(command: str) -> set[str]:
    return set(parser(command, recipes=command in ("train", "doctor", "preview")).texts)


def test_what_is_suggested_exists_and_no_suggested_word_is_a_flag() -> None:
    for commands, answer, words in MEANINGS:
        for command in commands:
            known = all_flags(command)
            assert not {f"--{word}" for word in words.split()} & known, command
            assert not answer.startswith("--") or answer.split()[0] in known, (command, answer)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("train s --epochs ten", "--epochs must be an integer, got 'ten'; for example --epochs 15."),
        ("train s --epochs 2.0", "--epochs must be an integer, got '2.0'; did you mean --epochs 2?"),
        ("train s --seed 18446744073709551616", "--seed must be an integer and within 64 bits, got '18446744073709551616'; "
         "for example --seed 0."),
        ("train s --optimizer AdamW",
         "--optimizer must be one of sgd, adam, adamw, got 'AdamW'; did you mean --optimizer adamw?"),
        ("train s --lr 1e-3,", "--lr must be a number, got '1e-3,'; did you mean --lr 1e-3?"),
        ("train s --schedule cosin", "--schedule must be one of constant, step, cosine, one_cycle, exponential_cosine, "
         "three_phase, got 'cosin'; did you mean --schedule cosine?"),
        ("train s --augment.crop 0.5", "--augment.crop must be as in --augment.crop FLOAT FLOAT, got '0.5'; "
         "for example --augment.crop 0.25 1.0."),
        ("train s --epochs", "--epochs needs a value: --epochs 15."),
        ("train s --epochs --lr 1", "--epochs needs a value: --epochs 15."),
        ("train s --recipe", "--recipe needs a value: --recipe NAME."),
        ("train s --resume=True", "--resume/--no-resume takes no value, got 'True'."),
        ("train s --resume True", "unexpected 'True'; a switch such as --resume takes no value; "
         "type fastflower train s --resume and then flags."),
        ("train s epochs=10", "unexpected 'epochs=10'; type fastflower train s --epochs 10."),
        ("train s 30", "unexpected '30'; type fastflower train s and then flags."),
        ("train s s", "unexpected 's'; type fastflower train s and then flags."),
        ("train s scratch", "unexpected 'scratch'; type fastflower train s --recipe scratch."),
        ("train s --lr 1 finetuen --epochs 3",
         "unexpected 'finetuen'; type fastflower train s --lr 1 --recipe finetune --epochs 3."),
        ("train s model=resnet34 lr0=0.1", "unexpected 'model=resnet34', 'lr0=0.1'; "
         "type fastflower train s --backbone resnet34 --lr 0.1."),
        ("train s epochs 10", "unexpected 'epochs', '10'; type fastflower train s --epochs 10."),
        ("train s resnet50 adamw cpu", "unexpected 'resnet50', 'adamw', 'cpu'; "
         "type fastflower train s --backbone resnet50 --optimizer adamw --device cpu."),
        ("evaluate c s test", "unexpected 'test'; type fastflower evaluate c s --split test."),
        ("pack d out", "unexpected 'out'; type fastflower pack d --out out."),
        ("evaluate c", "SHARDS is missing (A folder of images, an archive or a table of labels, as `pack` takes them; "
         "or the shards that `pack` wrote, or their URL); "
         "type fastflower evaluate CHECKPOINT SHARDS."),
        ("evaluate c s --tta no", "--tta/--no-tta must be True or False, got 'no'; for example --tta True."),
        ("predict c i --no-tta=True", "--tta/--no-tta takes no value, got 'True'."),
        ("pack d --val-fraction 20%", "--val-fraction must be a number, got '20%'; did you mean --val-fraction 0.2?"),
        ("pack d --split-by classes", "--split-by must be one of class, random, folder, got 'classes'; "
         "did you mean --split-by class?"),
    ],
)  # fmt: skip
def test_a_wrong_value_or_argument_is_explained(line: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error(capsys, line) == text


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--epochs 0", "--epochs must be an integer, at least 1, got 0; for example --epochs 15."),
        ("--lr -1e-3", "--lr must be a number above 0, got -0.001; for example --lr 0.001."),
        ("--augment.flip 2", "--augment.flip must be a probability in [0, 1], got 2.0; for example --augment.flip 0.5."),
        ("--epochs 3 --soup 2", "--soup must be a divisor of epochs, got 2; for example --soup 1."),
        ("--soup 3 --patience 3", "--soup must be 1 if ema or patience is set, got 3; for example --soup 1."),
        ("--recipe scratch --warmup-epochs 3",
         "--warmup-epochs must be 0 if schedule is one_cycle, got 3.0; for example --warmup-epochs 0."),
        ("--augment.random-crop", "--augment.random-crop must be False if crop is set, got True; "
         "for example --augment.no-random-crop."),
        ("--device gpu0", "--device must be cpu, cuda or cuda:NUMBER, got 'gpu0'; omit it to use CUDA if available."),
        ("--save-steps 0", "--save-steps must be an integer, at least 1, got 0; for example --save-steps 100."),
        ("--recipe fine-tune", "--recipe fine-tune: no recipe has this name; did you mean finetune or finetune-long or "
         "finetune-small? fastflower train --recipe list prints all."),
        ("--recipe xyz", "--recipe xyz: no recipe has this name; fastflower train --recipe list prints all."),
    ],
)  # fmt: skip
def test_a_value_outside_its_rule_names_the_flag(line: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "shards", *line.split()]) == 1
    assert capsys.readouterr().err == f"error: {text}\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr 0,01", "--lr 0.01"), ("--lr 1e-3;", "--lr 1e-3"), ("--augment.rotate 7,5", "--augment.rotate 7.5"),
        ("--augment.flip 50%", "--augment.flip 0.5"), ("--epochs 10.0", "--epochs 10"), ("--sizes 128,160", "--sizes 128 160"),
        ("--augment.crop 0.25,1.0", "--augment.crop 0.25 1.0"), ("--augment.crop=(0.25,1)", "--augment.crop 0.25 1"),
        ("--augment.size 64x96", "--augment.size 64 96"), ("--augment.mean [0.5,0.5,0.5]", "--augment.mean 0.5 0.5 0.5"),
    ],
)  # fmt: skip
def test_a_value_in_another_notation_is_told_in_ours(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert usage_error(capsys, f"train s {typed}").endswith(f"; did you mean {meant}?")
    assert parser("train", recipes=True).parse(["s", *meant.split()])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_each_flag_works(command: str) -> None:
    """Of each flag that refuses values: the others take any text, or none."""
    made = parser(command, recipes=command in ("train", "doctor", "preview"))
    for flag, metavar in made.metavars.items():
        if not re.search(r"INT|FLOAT|\{", metavar) or flag in made.optional:
            continue
        with pytest.raises(UsageError) as error:
            parser(command, recipes=command in ("train", "doctor", "preview")).parse(["a", flag, "?!"])
        example = str(error.value).rpartition("; for example ")[2].removesuffix(".")
        assert example.split()[0] == flag
        again = parser(command, recipes=command in ("train", "doctor", "preview"))
        values = again.parse([*("a" for _ in made.required), *example.split()])
        name = flag.removeprefix("--").replace("-", "_")
        if name in {field.name for field in fields(Recipe)}:
            Recipe(**{name: values[name]})
        elif name.startswith("augment."):
            Augment(**{name.removeprefix("augment."): values[name]})


@pytest.mark.parametrize("line", ["train --recipe list", "doctor x --recipe=list"])
def test_recipe_list_prints_a_phrase_for_each(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(line.split())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert len({line.split(maxsplit=1)[1] for line in lines}) == len(PRESETS)
    assert (
        lines[-4].split(maxsplit=1)[1] == "our fine-tuning recipe: ResNet-50, 5 epochs of one-cycle SGD, growing sizes"
    )


@pytest.mark.parametrize(
    ("word", "meant"),
    [("trian", "train"), ("Pack", "pack"), ("fit", "train"), ("val", "evaluate"), ("infer", "predict"), ("benchmark", "doctor"),
     ("--versions", "--version"), ("usage", "--help"), ("convert", "pack"), ("fly", "")],
)  # fmt: skip
def test_an_unknown_command_suggests_one_and_lists_all(
    word: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word, "my data", "--lr", "1"]) == 2
    out, err = capsys.readouterr()
    listed, _, told = err.partition("error: ")
    command = f"; did you mean:\n  fastflower {meant} 'my data' --lr 1\n"
    assert (out, told) == ("", f"unknown command {word!r}" + (command if meant else ".\n"))
    usage, *rest = listed.splitlines()
    assert usage.startswith("usage: fastflower COMMAND")
    assert {line.split()[0] for line in rest} >= set(COMMANDS)


def test_help_says_a_sentence_about_each_flag_and_all_about_one(capsys: pytest.CaptureFixture[str]) -> None:
    for line, first in (("train --help", "usage: fastflower train SHARDS [--FLAG VALUE ...]"), ("train -h", "usage: ")):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(line.split())
        assert capsys.readouterr().out.startswith(first)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["train", "--help", "sizes"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("--sizes FLOAT ...: Progressive resizing: ")
    assert text.endswith("Empty: `augment.size` in all epochs.")


def test_help_shows_percent_signs() -> None:
    def call(shards: str, fraction: float = 0.1) -> None:
        """Take 5%.

        Args:
            shards: All 100%.
            fraction: Of 20% (s).
        """

    made = Parser("fastflower call", "Take 5%.")
    made.add_parameters(call, {})
    assert re.findall(r"\S*%.*", made.format_help()) == ["5%.", "100%.", "20% (s). (default: 0.1)"]


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("s --batch_size 3 --lr=1e-3", {"batch_size": 3, "lr": 1e-3}),
        ("--augment.size 64 s", {"augment.size": 64}),
        ("--augment.size 64 96 s", {"augment.size": (64, 96)}),
        (
            "s --augment.crop None --patience None --weights None",
            {"augment.crop": None, "patience": None, "weights": None},
        ),
        ("s --augment.erase-value -1e-1 -.5 0", {"augment.erase_value": (-0.1, -0.5, 0.0)}),
        ("--sizes 64 96 s", {"sizes": (64, 96)}),
        ("s --sizes", {"sizes": ()}),
        ("--augment.resize off s --augment.mean 0 0 0", {"augment.resize": "off", "augment.mean": (0.0, 0.0, 0.0)}),
        ("s --no-graph --augment.no-fixed --resume", {"graph": False, "augment.fixed": False, "resume": True}),
        ("s --epochs 2 --epochs 3", {"epochs": 3}),
        ("--epochs 2 -- s", {"epochs": 2}),
    ],
)
def test_what_a_command_line_means(line: str, values: dict[str, object]) -> None:
    assert parser("train", recipes=True).parse(line.split()) == {"shards": "s", **values}


@given(
    st.lists(
        st.text(max_size=4)
        | st.sampled_from(["--lr", "--sizes", "-1", "1e-3", "--", "-h", "=", "--augment.size", "None"])
    )
)
def test_any_command_line_is_parsed_or_explained(args: list[str]) -> None:
    try:
        values = parser("train", recipes=True).parse(args)
    except UsageError as error:
        assert str(error)  # noqa: PT017  (an error is one of three outcomes)
    except SystemExit as end:
        assert end.code == 0  # noqa: PT017  (help, another)
    else:
        assert "shards" in values


def test_a_flag_takes_several_choices() -> None:
    def parsed(line: str) -> dict[str, Any]:
        made = Parser("fastflower reports")
        made.add("report", tuple[Literal["a", "b", "c"], ...], "Reports.")
        made.add_parameters(verify, {"shards": str})
        return made.parse(line.split())

    assert parsed("--report a c s") == {"report": ("a", "c"), "shards": "s"}
    with pytest.raises(UsageError, match=r"^--report must be one of a, b, c, got 'f'; for example --report a b\.$"):
        parsed("s --report f")


@pytest.mark.parametrize(
    ("text", "value"),
    [("--tta True", True), ("--tta=False", False), ("--tta None", None), ("--tta", True), ("--no-tta", False)],
)
def test_a_switch_that_may_be_none_may_have_a_value(text: str, value: bool | None) -> None:
    for command in ("evaluate", "predict"):
        for line in (f"{text} c s", f"c {text} s", f"c s {text}", f"c s {text} --device cpu"):
            values = parser(command).parse(line.split())
            assert (values["tta"], values["checkpoint"]) == (value, "c")
            assert "tta" not in parser(command).parse(["c", "s"])
