"""Run cases in turns, each in ranks of its own, and show how far they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dtrain.compare.entries import Case
from dtrain.compare.results import Results, Row
from dtrain.compare.verdict import verdicts
from dtrain.files import json_files
from dtrain.report.amounts import in_bytes
from dtrain.report.terminal import Terminal, on_one_line, without_control_characters

POLL_S = 0.2
WIDE = 106  # columns of a terminal that has room for all figures
# Starts one run: (case, folder) -> its summary. ValueError: not possible here; another error: it
# failed.
Start = Callable[[Case, Path], dict[str, Any]]


class Follower:
    """The runs' progress on the console: a bar for each case, and one for all with the time
    that is left.
    """

    def __init__(self, cases: list[Case], repeats: int, steps: int, console: Terminal) -> None:
        name, figures = (
            TextColumn(f"{{task.{what}}}", markup=False)
            for what in ("description", "fields[figures]")
        )
        columns = (name, BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), figures)
        width = max(len(on_one_line(case.label)) for case in cases)
        self.steps, self.console, self._plain = steps, console, not console.is_terminal
        self.bars = Progress(*columns, console=console)
        self._tasks = {
            case.label: self.bars.add_task(
                f"{on_one_line(case.label):<{width}}",
                total=steps * repeats,
                start=False,
                figures="",
            )
            for case in cases
        }
        left = (*columns[:2], TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.all = Progress(*left, console=console)
        self._whole = self.all.add_task(f"{'all':<{width}}", total=len(cases) * repeats)

    @contextmanager
    def shown(self) -> Iterator[None]:
        with Live(
            Group(self.bars, self.all),
            console=self.console,
            refresh_per_second=4,
            transient=self._plain,
        ):
            yield

    @contextmanager
    def case(self, case: Case, repeat: int, metrics: Path) -> Iterator[None]:
        """Follow one run's file of steps."""
        bar, done = self._tasks[case.label], threading.Event()
        self.bars.start_task(bar)
        self.say(bar, "starting")

        def follow() -> None:
            while not done.wait(POLL_S):
                if lines := list(json_files.lines(metrics)):
                    figures = (
                        f"loss {lines[-1]['loss']:.4f}  {lines[-1]['tokens_per_second']:,.0f} "
                        f"tokens/s"
                    )
                    self.bars.update(
                        bar, completed=repeat * self.steps + lines[-1]["step"], figures=figures
                    )

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.skip()

    def skip(self) -> None:
        """One run less is left."""
        self.all.advance(self._whole)

    def say(self, bar: TaskID, words: str) -> None:
        self.bars.update(bar, figures=words)

    def finish(self, row: Row, repeat: int) -> None:
        bar = self._tasks[row.strategy]
        if row.reason:
            words = "failed" if row.failed else "not possible here"
            words += f" in repeat {repeat + 1}" if row.ran else ""
        else:
            words = f"loss {row.loss:.4f}  {row.repeats[-1]['tokens_per_second']:,.0f} tokens/s"
            self.bars.update(bar, completed=(repeat + 1) * self.steps)
        self.bars.stop_task(bar)
        self.say(bar, words)
        if self._plain:
            self.console.print(f"{row.strategy}: {words}", soft_wrap=True)


def run_all(
    cases: list[Case],
    results: Results,
    folder: Path,
    first: int,
    start: Start,
    save: Callable[[], None],
) -> None:
    """Run every case as often as was asked for: all of them once, then all again. Fills the
    results' rows.

    Args:
        cases: in the order of the rows.
        folder: of the comparison.
        first: steps that instruments disturb or that warm up.
        start: of one run.
        save: called whenever there are new figures.
    """
    begun, rows = time.monotonic(), {row.strategy: row for row in results.rows}
    follower = Follower(cases, results.asked, results.steps, Terminal())
    with follower.shown():
        for repeat in range(results.asked):
            for case in cases:
                row = rows[case.label]
                if row.reason:
                    follower.skip()
                    continue
                place, before = folder / "runs" / case.folder / str(repeat), time.monotonic()
                try:
                    with follower.case(case, repeat, place / "metrics.jsonl"):
                        summary = start(case, place)
                    # two machines' default data differ with their Python
                    if digest := summary["data"].get("digest"):
                        results.facts["data digest"] = digest
                    row.add(
                        summary,
                        list(json_files.lines(place / "metrics.jsonl")),
                        first,
                        time.monotonic() - before,
                    )
                    row.compare(_reference(case, cases, rows))
                except Exception as error:  # a strategy that fails stops no other
                    row.reason, row.failed = (
                        str(error) or type(error).__name__,
                        not isinstance(error, ValueError),
                    )
                    # it may hold names of anybody's files and columns
                    row.reason = without_control_characters(" ".join(row.reason.split()))
                results.seconds = time.monotonic() - begun
                follower.finish(row, repeat)
                save()


def _reference(case: Case, cases: list[Case], rows: dict[str, Row]) -> Row | None:
    """The baseline, or what it is with the same settings of the model; None: it has another
    batch.
    """
    first = cases[0].entry.strategy
    return next(
        (rows[o.label] for o in cases if o.entry.strategy == first and case.trains_the_same(o)),
        None,
    )


def show(results: Results, folder: Path) -> None:
    """The verdict, the figures of what ran, and the reasons of what did not."""
    console = Terminal()
    if not console.is_terminal:
        console.width = WIDE
    console.print(table(results, wide=console.width >= WIDE))
    for verdict in verdicts(results):
        line = f"{verdict.title}: {verdict.strategy}, {verdict.figure} ({verdict.note})"
        console.print(line, soft_wrap=True)
    for row in results.rows:
        if row.reason:
            how = "failed" if row.failed else "not possible here"
            console.print(f"{row.strategy}: {how}: {row.reason}", soft_wrap=True)
    console.print(f"{results.seconds:.0f} s; report: {folder / 'report.html'}", soft_wrap=True)


def table(results: Results, *, wide: bool) -> Table:
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    titles = ("ranks", "loss", "Δloss", "tokens/s", "step ms", "tensor memory", "sent", "exposed")
    kept = [title for title in titles if wide or title not in ("loss", "step ms", "exposed")]
    made.add_column("strategy", no_wrap=True)
    for title in kept:
        made.add_column(title, justify="right", no_wrap=True)
    for row in results.ran:
        words = dict(zip(titles, row_in_words(row), strict=True))
        made.add_row(row.strategy, *(words[title] for title in kept))
    return made


def row_in_words(row: Row) -> list[str]:
    """A row's figures in words, in the order of the table."""
    difference = "–" if row.loss_difference is None else f"{row.loss_difference:.1e}"
    if not row.synchronous:
        difference = "not sync."
    return [
        str(row.ranks),
        f"{row.loss:.4f}",
        difference,
        f"{row.tokens_per_second:,.0f}",
        f"{(row.step_seconds or 0) * 1e3:,.0f}",
        in_bytes(row.memory_bytes) if row.memory_bytes else "–",
        in_bytes(row.wire_bytes or 0),
        "–" if row.exposed_share is None else f"{row.exposed_share:.0%}",
    ]
