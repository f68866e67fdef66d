"""Run cases in turns, each in ranks of its own, and show their progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from dtrain.compare.entries import Case
from dtrain.compare.results import Results, Row
from dtrain.files import json_files
from dtrain.report.terminal import Terminal, on_one_line, without_control_characters

POLL_S = 0.2
WIDE = 100  # columns of a terminal that has room for long bars
# (case, folder) -> the run's summary. A ValueError means not possible here, another error failed.
Start = Callable[[Case, Path], dict[str, Any]]


class Follower:
    """The progress on the console: a bar for each case, and one for all with the time left."""

    def __init__(self, cases: list[Case], results: Results, console: Terminal) -> None:
        self.results, self.console, self._plain = results, console, not console.is_terminal
        repeats, self.steps = results.asked, results.steps
        name = TextColumn("{task.description}", markup=False)
        figures = TextColumn("{task.fields[figures]}", markup=False)
        bar = BarColumn(30 if console.width >= WIDE else 8)
        columns = (name, bar, MofNCompleteColumn(), TimeElapsedColumn())
        left = TextColumn("{task.fields[left]}", markup=False)
        self.bars = Progress(*columns, figures, console=console)
        self.all = Progress(name, bar, TimeElapsedColumn(), left, console=console)
        width = max(len(on_one_line(case.label)) for case in cases)
        self._tasks = {
            case.label: self.bars.add_task(
                f"{on_one_line(case.label):<{width}}",
                total=self.steps * repeats,
                start=False,
                figures="",
            )
            for case in cases
        }
        self._whole = self.all.add_task(f"{'all':<{width}}", total=len(cases) * repeats, left="")
        self._waiting = [case.label for case in cases] * repeats
        self._seconds: dict[str, float] = {}  # that each case's last run took

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
        bar, done, begun = self._tasks[case.label], threading.Event(), time.monotonic()
        self.bars.start_task(bar)
        self._say(bar, "starting")

        def follow() -> None:
            while not done.wait(POLL_S):
                if lines := list(json_files.lines(metrics)):
                    last = lines[-1]
                    self._say(bar, self._figures(last["loss"], last["tokens_per_second"]))
                    self.bars.update(bar, completed=repeat * self.steps + last["step"])

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._seconds[case.label] = time.monotonic() - begun
            self.skip(case)

    def skip(self, case: Case) -> None:
        """Count one run of a case as done."""
        self._waiting.remove(case.label)
        self.all.update(self._whole, advance=1, left=self.left())

    def left(self) -> str:
        """Return which run this was, and how long the others may take."""
        total = int(self.all.tasks[0].total or 0)
        usual = median(self._seconds.values()) if self._seconds else 0.0
        seconds = sum(self._seconds.get(label, usual) for label in self._waiting)
        rest = f", {_roughly(seconds)} left" if self._waiting and seconds else ""
        return f"{total - len(self._waiting)} of {total}{rest}"

    def finish(self, row: Row, repeat: int) -> None:
        """Show what a run has ended with."""
        bar = self._tasks[row.strategy]
        if row.reason:
            words = "failed" if row.failed else "not possible here"
            words += f" in repeat {repeat + 1}" if row.ran else ""
        else:
            words = self._figures(row.loss, row.repeats[-1]["tokens_per_second"])
            self.bars.update(bar, completed=(repeat + 1) * self.steps)
        self.bars.stop_task(bar)
        self._say(bar, words)
        if self._plain:
            self.console.say(f"{row.strategy}: {words} ({self.left()})")

    def _figures(self, loss: float | None, rate: float) -> str:
        return f"loss {loss:.4f}  {rate:,.0f} {self.results.unit}/s"

    def _say(self, bar: TaskID, words: str) -> None:
        self.bars.update(bar, figures=words)


def _roughly(seconds: float) -> str:
    """Return a duration as one says it."""
    if seconds < 50:
        return f"about {max(10, round(seconds, -1)):.0f} seconds"
    minutes = round(seconds / 60)
    return "about a minute" if minutes == 1 else f"about {minutes} minutes"


def run_all(
    cases: list[Case],
    results: Results,
    folder: Path,
    untimed: int,
    start: Start,
    save: Callable[[], None],
) -> None:
    """Run all cases once, then all again, as often as was asked for; fill the results' rows.

    Args:
        cases: in the order of the rows.
        folder: of the comparison.
        untimed: how many steps at the begin of each run do not count in the times.
        start: starts one run.
        save: called whenever there are new figures.
    """
    begun, rows = time.monotonic(), {row.strategy: row for row in results.rows}
    follower = Follower(cases, results, Terminal())
    with follower.shown():
        for repeat, case in product(range(results.asked), cases):
            row = rows[case.label]
            if row.reason:
                follower.skip(case)
                continue
            place, before = folder / "runs" / case.folder / str(repeat), time.monotonic()
            metrics = place / "metrics.jsonl"
            try:
                with follower.case(case, repeat, metrics):
                    summary = start(case, place)
                # two machines' default data differ with their Python
                if digest := summary["data"].get("digest"):
                    results.facts["data digest"] = digest
                results.unit = summary["unit"]
                seconds = time.monotonic() - before
                row.add(summary, list(json_files.lines(metrics)), untimed, seconds)
                row.compare(_reference(case, cases, rows))
            except Exception as error:  # a strategy that fails stops no other
                row.failed = not isinstance(error, ValueError)
                reason = str(error) or type(error).__name__
                # it may hold names of anybody's files and columns
                row.reason = without_control_characters(" ".join(reason.split()))
            results.seconds = time.monotonic() - begun
            follower.finish(row, repeat)
            save()


def _reference(case: Case, cases: list[Case], rows: dict[str, Row]) -> Row | None:
    """Return the baseline's row with the same model and batch; None: there is none."""
    for other in cases:
        if other.entry.strategy == cases[0].entry.strategy and case.trains_the_same(other):
            return rows[other.label]
    return None
