"""A comparison's figures in words: for the terminal, the document and the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Column

from dtrain.compare.results import Results, Row
from dtrain.compare.verdict import verdicts
from dtrain.report.amounts import in_bytes
from dtrain.report.tables import PLAIN, numbers, show_table
from dtrain.report.terminal import Terminal

WIDE = 106  # columns of a terminal that has room for all figures
COLUMNS = {  # figure: its title, and a note on it
    "ranks": ("ranks", "processes"),
    "loss": ("loss", "of the last step"),
    "loss_difference": (
        "Δloss",
        "greatest difference from the reference, over all steps; not sync.: it need not be the "
        "same",
    ),
    "tokens_per_second": ("tokens/s", "median of the repeats"),
    "step_seconds": ("step ms", "median"),
    "memory_bytes": ("tensor memory", "of the fullest rank, at a step's peak"),
    "wire_bytes": ("sent a step", "by the busiest rank, as a ring sends it"),
    "exposed_share": ("exposed", "share of a step with communication and no computation"),
}
NOT_MEASURED = "not measured"  # a fact of a comparison
LEFT_OUT = ("loss", "step_seconds", "exposed_share")  # where the terminal is narrow


def columns_of(results: Results) -> dict[str, tuple[str, str]]:
    """Return `COLUMNS`, with what the throughput counts."""
    rate = f"{results.unit}/s", COLUMNS["tokens_per_second"][1]
    return COLUMNS | {"tokens_per_second": rate}


def in_words(row: Row) -> dict[str, str]:
    """Return the figures of a row that ran, in the order of `COLUMNS`."""
    difference = "–" if row.loss_difference is None else f"{row.loss_difference:.1e}"
    return {
        "ranks": str(row.ranks),
        "loss": f"{row.loss:.4f}",
        "loss_difference": difference if row.synchronous else "not sync.",
        "tokens_per_second": f"{row.tokens_per_second:,.0f}",
        "step_seconds": f"{(row.step_seconds or 0) * 1e3:,.0f}",
        "memory_bytes": in_bytes(row.memory_bytes) if row.memory_bytes else "–",
        "wire_bytes": "–" if row.wire_bytes is None else in_bytes(row.wire_bytes),
        "exposed_share": "–" if row.exposed_share is None else f"{row.exposed_share:.0%}",
    }


def wide_terminal() -> Terminal:
    """Return the console; where it is a file or a pipe it has room for all figures."""
    console = Terminal()
    if not console.is_terminal:
        console.width = WIDE
    return console


def show_figures(
    terminal: Terminal,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
) -> None:
    """Print a table of strategies: their names to the left, figures to the right."""
    first, *others = columns
    named = [Column(first, no_wrap=True), *numbers(*others)]
    show_table(title, named, rows, terminal=terminal, **PLAIN)


def reasons(results: Results) -> list[tuple[str, str, str]]:
    """Return strategy, kind and text of each reason why a row has no figures, or no more."""
    return [
        (row.strategy, "failed" if row.failed else "not possible here", row.reason)
        for row in results.rows
        if row.reason
    ]


def show(results: Results, folder: Path) -> None:
    """Print the figures of what ran, the verdict, and the reasons of what did not run."""
    console = wide_terminal()
    shown = [name for name in COLUMNS if console.width >= WIDE or name not in LEFT_OUT]
    rows = [(row.strategy, *(in_words(row)[name] for name in shown)) for row in results.ran]
    titles = columns_of(results)
    show_figures(console, ("strategy", *(titles[name][0] for name in shown)), rows)
    lines = [f"{v.title}: {v.strategy}, {v.figure} ({v.note})" for v in verdicts(results)]
    lines += [": ".join(reason) for reason in reasons(results)]
    if NOT_MEASURED in results.facts:
        lines.append(f"{NOT_MEASURED}: {results.facts[NOT_MEASURED]}")
    lines.append(f"{results.seconds:.0f} s; report: {folder / 'report.html'}")
    for line in lines:
        console.say(line)
