"""Progress bars, and log lines in IPython: when they appear, and that logging stays the user's."""

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import notebooks
import pytest

from fastflower import progress

LOG = logging.getLogger("fastflower")


class Root(logging.RootLogger):
    def addHandler(self, hdlr: logging.Handler) -> None:
        if not type(hdlr).__module__.startswith("_pytest"):
            super().addHandler(hdlr)


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging as Python starts with it."""
    root = Root(logging.WARNING)
    monkeypatch.setattr(logging, "root", root)
    monkeypatch.setattr(LOG, "parent", root)
    yield
    assert LOG.handlers == []


@pytest.fixture
def ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: object()))


@progress.shown()
def work() -> None:
    LOG.info("a line")
    LOG.warning("a warning")


def configured(level: int) -> io.StringIO:
    text = io.StringIO()
    logging.basicConfig(level=level, stream=text, format="mine: %(message)s", force=True)
    return text


@pytest.mark.usefixtures("ipython")
class TestLinesInIPython:
    def test_they_appear_without_any_configuration(self, capsys: pytest.CaptureFixture[str]) -> None:
        work()
        assert capsys.readouterr() == ("a line\n", "a warning\n")

    def test_calls_inside_a_call_do_not_double_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        progress.shown()(work)()
        assert capsys.readouterr() == ("a line\n", "a warning\n")

    @pytest.mark.parametrize("level", [logging.INFO, logging.WARNING, logging.ERROR])
    def test_logging_that_is_configured_before_decides_alone(
        self, level: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = configured(level)
        work()
        lines = ["mine: a line\n"] * (level <= logging.INFO) + ["mine: a warning\n"] * (level <= logging.WARNING)
        assert text.getvalue() == "".join(lines)
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
    def test_logging_that_is_configured_after_a_call_decides_alone(
        self, level: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        work()
        capsys.readouterr()
        self.test_logging_that_is_configured_before_decides_alone(level, capsys)

    def test_a_handler_of_the_logger_itself_decides_alone(self, capsys: pytest.CaptureFixture[str]) -> None:
        handler = logging.StreamHandler(text := io.StringIO())
        LOG.addHandler(handler)
        work()
        LOG.removeHandler(handler)
        assert (text.getvalue(), capsys.readouterr()) == ("a warning\n", ("", ""))

    @pytest.mark.parametrize("name", ["fastflower", None])
    def test_a_level_that_was_set_stays(self, name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
        logging.getLogger(name).setLevel(logging.ERROR)
        work()
        assert capsys.readouterr() == ("", "")
        assert logging.getLogger(name).level == logging.ERROR

    def test_an_error_leaves_logging_as_it_was(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(ZeroDivisionError), progress.shown():
            _ = 1 / 0
        LOG.info("later")
        assert (LOG.level, capsys.readouterr()) == (logging.NOTSET, ("", ""))


def test_outside_ipython_logging_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    work()
    assert capsys.readouterr() == ("", "a warning\n")  # as Python prints without handlers


def test_a_bar_shows_nothing_where_stderr_is_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.bar(range(3), desc="read", unit="file")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("hidden", [False, True])
def test_a_terminal_shows_bars_unless_they_are_hidden(hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    list(progress.bar(range(3), desc="read", unit="file", hidden=hidden))
    assert ("read: 100%" in terminal.getvalue()) != hidden


@pytest.mark.usefixtures("ipython")
def test_a_line_does_not_break_the_bar_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Terminal()  # stdout and stderr are one terminal
    monkeypatch.setattr(sys, "stderr", both)
    monkeypatch.setattr(sys, "stdout", both)
    with progress.shown(), progress.bar(total=2, desc="read", unit="file"):
        LOG.info("a line")
    assert "a line" in both.getvalue().replace("\r", "\n").splitlines()


CELLS = [
    """
import logging, sys
from threading import Thread
from fastflower import progress
assert not {"torch", "ipywidgets", "tqdm.notebook"} & set(sys.modules)
@progress.shown()
def work(epochs=3):
    for epoch in range(epochs):
        with progress.bar(total=200, desc=f"epoch {epoch + 1}", unit="image", initial=50) as bar:
            for _ in range(150):
                bar.update()
        logging.getLogger("fastflower").info("epoch %d is done", epoch + 1)
""",
    "work()",
    """
with progress.shown(), progress.bar(total=50, desc="pack", unit="image") as bar:
    threads = [Thread(target=bar.update, args=[10]) for _ in range(5)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
for _ in progress.bar(range(3), desc="predict", unit="batch", hidden=True): pass
""",
    'logging.basicConfig(level=logging.INFO, format="mine: %(message)s"); work(2)',
]


def test_a_saved_notebook_holds_each_line_once_and_one_bar_for_each_call(tmp_path: Path) -> None:
    """Without ipywidgets, and without warnings. Bars that are updated from threads belong to their cell."""
    first, work, pack, mine = outputs = notebooks.run(CELLS, tmp_path)
    assert first == []
    (bar,) = notebooks.shown(work)
    assert bar.startswith("epoch 3: 100%|██████████| 200/200 [")
    assert notebooks.printed(work) == "".join(f"epoch {epoch} is done\n" for epoch in (1, 2, 3))
    assert notebooks.printed([*work, *pack], "stderr") == ""
    (bar,) = notebooks.shown(pack)
    assert bar.startswith("pack: 100%|██████████| 50/50 [")
    assert notebooks.printed(mine, "stderr") == "mine: epoch 1 is done\nmine: epoch 2 is done\n"
    assert notebooks.printed(mine) == ""
    assert len(notebooks.shown(mine)) == 1
    assert "tqdm" not in str(outputs)


class TestLinesInPlaceOfABar:
    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """The time, in seconds, which the test sets."""
        now = [0.0]
        monkeypatch.setattr(progress, "perf_counter", lambda: now[0])
        monkeypatch.setattr(progress._LoggedBar, "last", -60.0)  # pyright: ignore[reportPrivateUsage]
        return now

    def lines(self, clock: list[float], *, step: float, hidden: bool = False) -> list[str]:
        text = configured(logging.INFO)
        with progress.bar(desc="epoch 1/5", unit="image", total=300 * 32, hidden=hidden) as bar:
            for _ in range(300):
                clock[0] += step
                bar.update(32)
        return text.getvalue().splitlines()

    def test_the_first_comes_after_half_a_minute_and_the_others_every_minute(self, clock: list[float]) -> None:
        """Steps of a second, 300 of 32 images: the first is at second 30, the last at second 270."""
        lines = self.lines(clock, step=1)
        assert lines[0] == "mine: epoch 1/5: 960 of 9600 images, 32 images/s, about 4 minutes left"
        assert [line.split()[3] for line in lines] == [str(32 * second) for second in range(30, 300, 60)]
        assert lines[-1].endswith("about 30 seconds left")

    def test_slow_steps_have_one_line_each(self, clock: list[float]) -> None:
        lines = self.lines(clock, step=64)
        assert lines[0] == "mine: epoch 1/5: 64 of 9600 images, 0.5 images/s, about 5.3 hours left"
        assert len(lines) == 299  # the first step, which takes longer, is not measured

    def test_a_short_epoch_has_none_and_bars_share_the_minute(self, clock: list[float]) -> None:
        assert self.lines(clock, step=0.09) == []
        clock[0] = 0
        short = [self.lines(clock, step=0.11) for _ in range(4)]  # 33 s each
        assert [len(lines) for lines in short] == [1, 0, 1, 0]

    def test_other_ranks_and_terminals_have_none(self, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.lines(clock, step=1, hidden=True) == []
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        assert self.lines(clock, step=1) == []

    def test_a_bar_of_something_to_iterate_over_has_them_too(self, clock: list[float]) -> None:
        text = configured(logging.INFO)
        for _ in progress.bar(range(40), desc="evaluate", unit="batch"):
            clock[0] += 1
        assert text.getvalue() == "mine: evaluate: 30 of 40 batches, 1 batches/s, about 10 seconds left\n"
