"""A sweep: which of its jobs is which, and what came of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from dtrain.report.files import SUMMARY, summary_in
from dtrain.report.terminal import Terminal


@dataclass
class Told:
    """A job: its number, its overrides, its folder, and why it failed, if it did."""

    number: str
    overrides: tuple[str, ...]
    folder: Path
    reason: str = ""


def show_job(job: Told) -> None:
    """Say that it begins."""
    Terminal().print(f"job {job.number}: {' '.join(job.overrides)}", soft_wrap=True)


def show_sweep(jobs: Sequence[Told]) -> None:
    """A line for each job, with what is its own and the losses that it has left, or why not;
    nothing without any.
    """
    if not jobs:
        return
    alike = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    made = Table(title=f"{len(jobs)} {'job' if len(jobs) == 1 else 'jobs'}")
    for title in ("job", "overrides"):
        made.add_column(title, overflow="fold")
    for title in ("loss", "validation", "tokens/s"):
        made.add_column(title, justify="right", no_wrap=True)
    made.add_column("folder", overflow="fold")
    for job in jobs:
        left = (job.folder / SUMMARY).exists() and not job.reason  # else it is another run's
        summary = summary_in(job.folder) if left else {}
        loss, held_out, rate = (
            summary.get(key) for key in ("loss", "val_loss", "tokens_per_second")
        )
        figures = [_figure(loss, ".4f"), _figure(held_out, ".4f"), _figure(rate, ",.0f")]
        own = " ".join(each for each in job.overrides if each not in alike)
        made.add_row(job.number, own, *figures, str(job.folder))
    console = Terminal()
    console.print(made)
    for job in jobs:
        if job.reason:
            console.print(f"job {job.number} failed: {job.reason}", soft_wrap=True)


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
