"""The comparison as a document: the verdict and the table."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

from dtrain.compare.figures import columns_of, in_words, reasons
from dtrain.compare.results import Results, Row
from dtrain.compare.verdict import verdicts
from dtrain.report.tables import Sheet
from dtrain.report.terminal import for_markdown, on_one_line, without_control_characters

LEGEND = (
    "Δloss: the greatest difference from the loss of the baseline over all steps; not sync.: it "
    "need not be the same. Tensor memory: at a step's peak, on the fullest rank. Sent: by the "
    "busiest rank, as a ring sends it. Exposed: the share of a step in which ranks communicate "
    "and do not compute."
)


def document(results: Results) -> str:
    """Return `report.md`."""
    facts = ", ".join(
        f"{for_markdown(name)} {for_markdown(str(value))}"
        for name, value in results.facts.items()
        if value is not None
    )
    machine = results.environment
    lines = [
        "# Strategies side by side",
        "",
        f"`{on_one_line(results.command)}`",
        "",
        f"{facts}.",
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['packages']['torch']}; "
        f"{results.made}.",
        "",
        *(
            f"* **{v.title}**: {for_markdown(v.strategy)}, {v.figure} ({for_markdown(v.note)})"
            for v in verdicts(results)
        ),
        "",
        _sheet(results, results.ran, for_markdown).markdown(),
        LEGEND,
        "",
        *(
            f"* {for_markdown(strategy)}: {kind}: {for_markdown(reason)}"
            for strategy, kind, reason in reasons(results)
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def block(results: Results, strategies: Container[str] | None = None) -> str:
    """Return a block of a page: the table, and where it was measured.

    Args:
        strategies: the rows; None: all of them, and what the columns mean.
    """
    rows = [row for row in results.ran if strategies is None or row.strategy in strategies]
    machine, digest = results.environment, results.facts.get("data digest")
    data = f"; data digest {digest}" if digest else ""
    return "\n".join(
        [
            _sheet(results, rows, without_control_characters).markdown().partition("\n\n")[2],
            f"(`{results.command}`, {results.made[:10]}, {machine['cores']} cores of a shared "
            f"{machine['cpu']}; {results.steps} steps, medians of {results.asked} runs in "
            f"turns{data}.)",
            "",
            *((LEGEND, "") if strategies is None else ()),
        ]
    )


def _sheet(results: Results, rows: Iterable[Row], label: Callable[[str], str]) -> Sheet:
    lines = [(label(row.strategy), *in_words(row).values()) for row in rows]
    titles = (title for title, _ in columns_of(results).values())
    return Sheet("Strategies", ("strategy", *titles), lines)
