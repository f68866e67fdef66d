"""Run several strategies, one after the other, on the same model, data and seed, and set them side by side."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

POLL_S = 0.2
# Starts one run: (strategy, folder) -> its summary. ValueError: not possible here; RuntimeError: it failed.
Start = Callable[[str, Path], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A strategy's figures, or the reason why there are none."""

    strategy: str
    reason: str = ""
    failed: bool = False  # it broke off; False beside a reason: it is not possible here
    world_size: int = 0
    loss: float = 0.0
    loss_difference: float | None = None  # the greatest over all steps, against the baseline
    tokens_per_second: float = 0.0
    step_seconds_median: float = 0.0
    peak_memory_bytes: int = 0


def compare(strategies: list[str], steps: int, folder: Path, start: Start) -> list[Row]:
    """Run each strategy once, with progress on the console; write `results.json` and return the rows.

    The first strategy is the baseline: losses are held against its own.
    """
    baseline = strategies[0]
    console = Console(highlight=False)
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("{task.fields[figures]}"))  # fmt: skip
    rows: list[Row] = []
    curves: dict[str, list[float]] = {}
    with Progress(*columns, console=console) as progress:
        for name in strategies:
            bar = progress.add_task(name, total=steps, figures="starting")
            place = folder / name
            try:
                with _following(place / "metrics.jsonl", progress, bar):
                    summary = start(name, place)
            except (ValueError, RuntimeError) as error:
                rows.append(Row(name, reason=str(error), failed=isinstance(error, RuntimeError)))
                progress.update(bar, figures="not possible here" if isinstance(error, ValueError) else "failed")
                continue
            curves[name] = [json.loads(line)["loss"] for line in _lines(place / "metrics.jsonl")]
            rows.append(_row(name, summary, curves[name], curves.get(baseline)))
            progress.update(bar, completed=steps, figures=f"loss {summary['loss']:.4f}")
    (folder / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    console.print(table(rows, baseline))
    for row in rows:
        if row.reason:
            console.print(f"{row.strategy}: not run: {row.reason}", soft_wrap=True, markup=False)
    console.print(f"folder: {folder}", soft_wrap=True, markup=False)
    return rows


def table(rows: list[Row], baseline: str) -> Table:
    """The figures of the strategies that ran."""
    made = Table(title=None)
    made.add_column("strategy")
    for title in ("ranks", "loss", f"Δloss to {baseline}", "tokens/s", "step ms", "peak MiB a rank"):
        made.add_column(title, justify="right")
    for row in rows:
        if row.reason:
            made.add_row(row.strategy, *["–"] * 6)
            continue
        difference = "–" if row.loss_difference is None else f"{row.loss_difference:.1e}"
        made.add_row(row.strategy, str(row.world_size), f"{row.loss:.4f}", difference, f"{row.tokens_per_second:,.0f}",
                     f"{row.step_seconds_median * 1e3:.0f}", f"{row.peak_memory_bytes / 2**20:,.0f}")  # fmt: skip
    return made


def _row(name: str, summary: dict[str, Any], curve: list[float], reference: list[float] | None) -> Row:
    difference = max(abs(a - b) for a, b in zip(curve, reference, strict=True)) if reference else None
    kept = ("world_size", "loss", "tokens_per_second", "step_seconds_median", "peak_memory_bytes")
    return Row(name, loss_difference=difference, **{key: summary[key] for key in kept})


def _lines(metrics: Path) -> list[str]:
    """The whole lines of a file that may still grow, or not be there yet."""
    if not metrics.exists():
        return []
    return [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


@contextmanager
def _following(metrics: Path, progress: Progress, bar: TaskID) -> Iterator[None]:
    """Move the bar as the run writes its steps."""
    done = threading.Event()

    def follow() -> None:
        while not done.wait(POLL_S):
            if lines := _lines(metrics):
                last = json.loads(lines[-1])
                figures = f"loss {last['loss']:.4f}  {last['tokens_per_second']:,.0f} tokens/s"
                progress.update(bar, completed=last["step"], figures=figures)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
