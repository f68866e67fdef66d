"""Show a sweep: which of its jobs is which, and what came of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Column

from dtrain.report.files import SUMMARY, summary_in
from dtrain.report.tables import numbers, show_table
from dtrain.report.terminal import Terminal

FIGURES = {"loss": ".4f", "val_loss": ".4f", "tokens_per_second": ",.0f"}


@dataclass
class Told:
    """A job: its number, its overrides, its folder, and why it failed, if it did."""

    number: str
    overrides: tuple[str, ...]
    folder: Path
    reason: str = ""


def show_job(job: Told) -> None:
    """Print the job's number and overrides, as it begins."""
    Terminal().say(f"job {job.number}: {' '.join(job.overrides)}")


def show_sweep(jobs: Sequence[Told]) -> None:
    """Print a row for each job, with its own overrides and figures, and why a job has failed."""
    if not jobs:
        return
    units: set[str] = set()
    alike = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    rows = []
    for job in jobs:
        finished = (job.folder / SUMMARY).exists() and not job.reason  # else it is another run's
        summary = summary_in(job.folder) if finished else {}
        units |= {summary["unit"]} if "unit" in summary else set()
        own = " ".join(each for each in job.overrides if each not in alike)
        values = [
            "–" if (value := summary.get(key)) is None else format(value, form)
            for key, form in FIGURES.items()
        ]
        rows.append((job.number, own, *values, str(job.folder)))
    columns = [
        *(Column(name, overflow="fold") for name in ("job", "overrides")),
        *numbers("loss", "validation", f"{'/'.join(sorted(units)) or 'tokens'}/s", no_wrap=True),
        Column("folder", overflow="fold"),
    ]
    show_table(f"{len(jobs)} {'job' if len(jobs) == 1 else 'jobs'}", columns, rows)
    for job in jobs:
        if job.reason:
            Terminal().say(f"job {job.number} failed: {job.reason}")
