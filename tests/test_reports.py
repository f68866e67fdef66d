"""What loggers, logs of ranks and tables tell, read back by something else than what has
written it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dtrain.cli import exits
from dtrain.compare import runner
from dtrain.compare.entries import Case, Entry
from dtrain.compare.figures import show
from dtrain.compare.results import Results, Row
from dtrain.config import errors
from dtrain.cost.model_size import ModelSize
from dtrain.report import rank_log
from dtrain.report.base import Run
from dtrain.report.console import Console, preparation_progress, show_model_size
from dtrain.report.sweep import Told, show_job, show_sweep
from dtrain.report.tables import Sheet, put_between, show_table
from dtrain.report.tensorboard import TensorBoard
from dtrain.report.terminal import HIDDEN, Terminal
from dtrain.report.tracker import Tracker

STEPS = [
    {"step": 7, "loss": 2.5, "tokens": 64},
    {"step": 8, "loss": 0.0, "tokens": 128, "val_loss": 1.5},
    {"step": 30, "loss": 1.25, "tokens": 192, "val_loss": None},
]
TOLD = {
    "loss": [(7, 2.5), (8, 0.0), (30, 1.25)],
    "tokens": [(7, 64), (8, 128), (30, 192)],
    "val_loss": [(8, 1.5)],
}


def a_run(folder: Path, **config: Any) -> Run:
    return Run("ddp", {"dp": 2}, 2, 6, 30, folder, (), config)


# Loggers


def test_tensorboard_has_every_figure_at_its_step(tmp_path: Path) -> None:
    """As TensorBoard's own reader finds them; a nought is a figure, and nothing is none."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    board = TensorBoard()
    board.start(a_run(tmp_path))
    for figures in STEPS:
        board.step(figures)
    board.close()
    found: dict[str, list[tuple[int, float]]] = {}
    (file,) = (tmp_path / "tensorboard").glob("events*")
    for event in loader.LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert found == TOLD


class Recorded:
    """A tracker as Accelerate has them."""

    requires_logging_directory = True
    made: list[Recorded]

    def __init__(self, name: str, **options: Any) -> None:
        self.name, self.options, self.told, self.ended = name, options, {}, False  # type: ignore[var-annotated]
        type(self).made = [self]

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            self.told.setdefault(name, []).append((step, value))

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of two trackers, of which one's package is there."""
    library: Any = ModuleType("accelerate")
    tracking: Any = ModuleType("accelerate.tracking")
    library.PartialState = type(
        "PartialState", (), {"__init__": lambda self, cpu: None, "_reset_state": staticmethod(int)}
    )
    tracking.LOGGER_TYPE_TO_CLASS = {"ours": Recorded, "theirs": Recorded}
    tracking.get_available_trackers = lambda: ["ours"]
    monkeypatch.setitem(sys.modules, "accelerate", library)
    monkeypatch.setitem(sys.modules, "accelerate.tracking", tracking)


def test_a_tracker_is_told_every_figure_at_its_step_and_the_configuration(
    accelerate: None, tmp_path: Path
) -> None:
    """Settings by dotted names, since some trackers take no mappings; what is no plain value in
    words.
    """
    logger = Tracker("ours", project="p", options={"mode": "offline"})
    logger.start(
        a_run(
            tmp_path,
            steps=30,
            clip_norm=None,
            eval={"every": 0, "to": {"a": True}},
            optimizer={"betas": [0.9]},
        )
    )
    for figures in STEPS:
        logger.step(figures)
    (tracker,) = Recorded.made
    assert tracker.told == TOLD and not tracker.ended
    logger.close()
    assert tracker.ended and (tracker.name, tracker.options) == (
        "p",
        {"mode": "offline", "logging_dir": str(tmp_path)},
    )
    assert tracker.configuration == {
        "steps": 30,
        "clip_norm": "None",
        "eval.every": 0,
        "eval.to.a": True,
        "optimizer.betas": "[0.9]",
    }


def test_a_tracker_that_is_not_there_is_refused(accelerate: None) -> None:
    for name, said in (
        ("mine", "is unknown: use ours, theirs"),
        ("theirs", "not installed: pip install theirs"),
    ):
        with pytest.raises(ValueError, match=f"logger.tracker.name={name}.*{said}"):
            Tracker(name)


# Logs of ranks


def _speak() -> None:
    print("from Python")
    os.write(1, b"from a library\n")
    print("an error", file=sys.stderr)


def _heard(capfd: pytest.CaptureFixture[str]) -> Any:
    sys.stdout.flush()
    sys.stderr.flush()
    return capfd.readouterr()


def test_the_first_rank_speaks_here_and_the_others_in_their_logs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries' words too; afterwards a process speaks where it did before."""
    for name, number in (("stdout", 1), ("stderr", 2)):  # as they are where pytest catches nothing
        monkeypatch.setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115  until the test ends
    said = {"from Python", "from a library", "an error"}
    for rank in range(3):
        with rank_log.writing(tmp_path, rank) as file:
            _speak()
        log, out = file.read_text(), _heard(capfd)
        assert (
            file == tmp_path / "logs" / f"rank{rank}.log"
            and f"rank {rank}, process {os.getpid()}" in log
        )
        here = set(f"{out.out}{out.err}".splitlines())
        there = said & set(log.splitlines())
        assert (here, there) == ((said, set()) if rank == 0 else (set(), said))
        _speak()
        out = _heard(capfd)
        assert (
            set(out.out.splitlines()) == {"from Python", "from a library"}
            and out.err == "an error\n"
        )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_ranks_log_has_its_records_warnings_and_error(rank: int, tmp_path: Path) -> None:
    """And nothing of what comes after it; what others have set stays."""
    root = logging.getLogger()
    before = (root.level, list(root.handlers), warnings.showwarning)
    with (
        pytest.raises(ZeroDivisionError),
        rank_log.writing(tmp_path, rank),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("always")
        logging.getLogger("any").info("a record")
        logging.getLogger("any").debug("too small")
        warnings.warn("a warning", stacklevel=1)
        _ = 1 / 0
    logging.getLogger("any").error("afterwards")
    assert (root.level, list(root.handlers), warnings.showwarning) == before
    log = (tmp_path / "logs" / f"rank{rank}.log").read_text()
    assert all(
        words in log
        for words in ("INFO any: a record", "UserWarning: a warning", "ZeroDivisionError")
    )
    assert "too small" not in log and "afterwards" not in log


# Tables


SHEET = Sheet("What goes", ("strategy", "a|b"), [("ddp", "yes"), ("fsdp", "no | never")])


def test_a_sheet_is_a_table_of_markdown_with_a_cell_for_each_word() -> None:
    """Whatever marks a word has: cells are split where no backslash is."""
    title, empty, *lines = SHEET.markdown().splitlines()
    cells = [
        [word.strip() for word in line.replace(r"\|", "\0").strip("|").split("|")] for line in lines
    ]
    assert (title, empty) == ("What goes:", "") and cells[1] == ["---", "---"]
    assert [[word.replace("\0", "|") for word in row] for row in (cells[0], *cells[2:])] == [
        list(SHEET.columns),
        *map(list, SHEET.rows),
    ]


def test_a_sheet_that_is_too_wide_is_a_list(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    Sheet("t", ("name", "why"), [("a_strategy_of_a_name", "x" * 40)]).show()
    out = capsys.readouterr().out
    assert out == f"t\n  a_strategy_of_a_name\n    why {'x' * 40}\n"


def test_text_between_two_marks_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    """As often as one likes; without the marks nothing is written."""
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- a -->\nold\n<!-- b -->\nafter\n")
    for text in ("new\n", "longer\ntext\n", ""):
        put_between(document, "<!-- a -->\n", "<!-- b -->", text)
        assert document.read_text() == f"before\n<!-- a -->\n{text}<!-- b -->\nafter\n"
    for broken in ("<!-- a -->\nno end\n", "no begin <!-- b -->\n", "<!-- b -->\n<!-- a -->\n"):
        document.write_text(broken)
        with pytest.raises(ValueError, match="has no <!-- a --> and <!-- b --> to write between"):
            put_between(document, "<!-- a -->\n", "<!-- b -->", "new")
        assert document.read_text() == broken


# A narrow terminal, and none


class Narrow(Terminal):
    """A terminal of 60 columns, whose output is kept."""

    def __init__(self) -> None:
        super().__init__(
            width=60, height=50, force_terminal=True, file=io.StringIO(), legacy_windows=False
        )

    def lines(self) -> list[str]:
        said = self.file.getvalue()  # type: ignore[attr-defined]
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said).splitlines()


WORDS = ["reduce_scatter", "100,000,000,000", "predicted", "1,234,567.89", "deepspeed_pipeline"]


@pytest.mark.parametrize("columns", [2, 4, 8])
def test_a_narrow_terminal_cuts_no_word(columns: int) -> None:
    """A table that does not fit becomes a list; a long line is broken between words."""
    terminal, names = Narrow(), [f"column{number}" for number in range(columns)]
    rows = [[WORDS[(row + at) % len(WORDS)] for at in range(columns)] for row in range(3)]
    show_table("a title", names, [*rows, ()], terminal=terminal)
    terminal.say(f"  {' '.join(WORDS)}, and a report in outputs/2026-12-01/12-34-56-abcdef")
    lines = terminal.lines()
    said = Counter(re.findall(r"[\w,./-]+", " ".join(lines)))
    for word in {*sum(rows, []), *names[1:], "outputs/2026-12-01/12-34-56-abcdef"}:
        assert said[word], (word, lines)
    assert max(map(len, lines)) <= 60 and "…" not in "".join(lines)


def test_without_a_terminal_a_line_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(width=20).say("a line of more than twenty characters")
    assert capsys.readouterr().out == "a line of more than twenty characters\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_losses_of_a_run_stay_in_the_scrollback(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some ten lines, whether or not a bar moves below them; no colour where none is wanted."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    console = Console()
    console._terminal = shown = Narrow() if terminal else Terminal()
    console.start(dataclasses.replace(a_run(Path("here")), first_step=0, steps=40, unit="samples"))
    for step in range(1, 41):
        console.step({"step": step, "loss": 1 / step, "tokens_per_second": 7})
    console.close()
    raw = shown.file.getvalue() if terminal else capsys.readouterr().out  # type: ignore[attr-defined]
    said = [line for line in raw.splitlines() if "step " in line]
    assert [int(re.findall(r"step +(\d+)", line)[0]) for line in said] == [1, *range(4, 41, 4)]
    assert "loss 0.0250  7 samples/s" in said[-1]
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", raw)


def test_a_comparison_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs that are waited for, those that have run before count as they took, the others as
    is usual.
    """
    cases = [Case(Entry(name), 2, 4, name) for name in "abcd"]
    found = Results("c", "m", "a", "strong", 2, 4, 2, {}, {}, [Row(name, 2) for name in "abcd"])
    clock = iter([0.0, 100.0, 100.0, 120.0, 120.0, 150.0])  # a: 100 s, b: 20 s, c: 30 s
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock))
    follower = runner.Follower(cases, found, Terminal())
    monkeypatch.setattr(runner, "POLL_S", 0)
    said = []
    for case in cases[:3]:
        with follower.case(case, 0, Path("none.jsonl")):
            pass
        said.append(follower.left())
    follower.skip(cases[3])
    # seconds: 7 x 100; then 100 + 20 + 4 x 60, the median; then 100 + 20 + 30 + 2 x 30
    assert said == [
        "1 of 8, about 12 minutes left",
        "2 of 8, about 6 minutes left",
        "3 of 8, about 4 minutes left",
    ]
    assert follower.left() == "4 of 8, about 3 minutes left"
    for case in cases:
        follower.skip(case)
    assert follower.left() == "8 of 8"


# Names that others chose


HOSTILE = "a\x1b[2J[red]b[/x]:smile:\u202e\nforged\udcff"
TOLD_AS = r"a\x1b[2J[red]b[/x]:smile:\u202e\nforged\udcff"


def _sizes(folder: Path) -> None:
    show_model_size(HOSTILE, ModelSize({HOSTILE: 1}, 1, 1, 1, 1, 1))


def _begin_and_end(folder: Path) -> None:
    console = Console()
    run = a_run(Path(HOSTILE))
    console.start(dataclasses.replace(run, strategy=HOSTILE, facts=(HOSTILE,)))
    console.note(HOSTILE)
    console.finish(
        {
            "loss": 1.0,
            "tokens_per_second": 1.0,
            "step_seconds_median": 1.0,
            "peak_memory_bytes": 1,
            "unit": "tokens",
            "checkpoint": HOSTILE,
        }
    )


def _prepare(folder: Path) -> None:
    data: Any = SimpleNamespace(name=HOSTILE, cache_folder=Path(HOSTILE))
    with preparation_progress(data, shown=True) as progress:
        progress(HOSTILE, 20)


def _sweep(folder: Path) -> None:
    job = Told(HOSTILE, (f"data.source.path={HOSTILE}",), Path(HOSTILE), HOSTILE)
    show_job(job)
    show_sweep([job])


def _compare(folder: Path) -> None:
    rows = [Row(HOSTILE, 2, reason=HOSTILE), Row(f"{HOSTILE}2", 2, reason=HOSTILE, failed=True)]
    found = Results("c", "m", HOSTILE, "strong", 2, 4, 1, {}, {}, rows)
    follower = runner.Follower([Case(Entry(HOSTILE), 2, 4, HOSTILE)], found, Terminal())
    follower.finish(rows[0], 0)
    show(found, Path(HOSTILE))


def _mistake(folder: Path) -> None:
    with contextlib.redirect_stderr(sys.stdout), pytest.raises(SystemExit):
        exits.end(errors.explain(FileNotFoundError(2, "No such file", HOSTILE), "train"), 2)


@pytest.mark.parametrize("say", [
    _begin_and_end, _prepare, _sizes, _sweep, _compare, _mistake,
    lambda _: Sheet(HOSTILE, (HOSTILE, "b"), [(HOSTILE, HOSTILE)]).show(),
], ids=["a run", "data", "sizes", "a sweep", "a comparison", "a mistake", "a sheet"])  # fmt: skip
def test_names_steer_no_terminal(
    say: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Escape sequences, markup, directions and line ends in whatever is shown are text: each in
    a line of its own.
    """
    monkeypatch.setenv("COLUMNS", "1000")
    say(tmp_path)
    said = capsys.readouterr().out
    assert not [c for c in said if c != "\n" and unicodedata.category(c) in HIDDEN], said
    assert TOLD_AS in said and not [
        line for line in said.splitlines() if line.startswith("forged")
    ], said


def test_a_traceback_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        try:
            raise RuntimeError(HOSTILE)
        except RuntimeError as error:
            exits.crash(error)
    said = capsys.readouterr().err
    assert r"a\x1b[2J" in said and "\x1b" not in said


def test_a_ranks_log_steers_no_terminal(tmp_path: Path) -> None:
    with rank_log.writing(tmp_path, 0) as file:
        # pytest sends it on, and takes UTF-8 alone
        logging.getLogger("dtrain").warning("%s", HOSTILE[:-1])
    assert r"a\x1b[2J" in file.read_text() and "\x1b" not in file.read_text()
