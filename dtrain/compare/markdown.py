"""The comparison as a document: the verdict and the table."""

from __future__ import annotations

from collections.abc import Callable

from dtrain.compare.results import Results
from dtrain.compare.runner import row_in_words
from dtrain.compare.verdict import verdicts
from dtrain.report.tables import Sheet
from dtrain.report.terminal import for_markdown, on_one_line, without_control_characters

COLUMNS = (
    "strategy",
    "ranks",
    "loss",
    "Δloss",
    "tokens/s",
    "step ms",
    "tensor memory a rank",
    "sent a step",
    "exposed",
)


def sheet(results: Results, label: Callable[[str], str] = without_control_characters) -> Sheet:
    """Every row that ran."""
    return Sheet(
        "Strategies", COLUMNS, [(label(row.strategy), *row_in_words(row)) for row in results.ran]
    )


def document(results: Results) -> str:
    """`report.md`."""
    facts = ", ".join(
        f"{for_markdown(name)} {for_markdown(str(value))}"
        for name, value in results.facts.items()
        if value is not None
    )
    at = results.environment
    where = f"{at['cpu']}, {at['cores']} cores, torch {at['packages']['torch']}"
    lines = [
        "# Strategies side by side",
        "",
        f"`{on_one_line(results.command)}`",
        "",
        f"{facts}.",
        f"{where}; {results.made}.",
        "",
        *(
            f"* **{v.title}**: {for_markdown(v.strategy)}, {v.figure} ({for_markdown(v.note)})"
            for v in verdicts(results)
        ),
        "",
        sheet(results, for_markdown).markdown(),
        LEGEND,
        "",
    ]
    for row in results.rows:
        if row.reason:
            said = "failed" if row.failed else "not possible here"
            lines.append(f"* {for_markdown(row.strategy)}: {said}: {for_markdown(row.reason)}")
    return "\n".join(lines).rstrip() + "\n"


def readme(results: Results) -> str:
    """The README's block: the table, and where it was read."""
    at, digest = results.environment, results.facts.get("data digest")
    data = f"; data digest {digest}" if digest else ""
    return "\n".join(
        [
            sheet(results).markdown().partition("\n\n")[2],
            f"(`{results.command}`, {results.made[:10]}, {at['cores']} cores of a shared "
            f"{at['cpu']}; "
            f"{results.steps} steps, medians of {results.asked} runs in turns{data}.)",
            "",
            LEGEND,
            "",
        ]
    )


LEGEND = (
    "Δloss: the greatest difference from the loss of the baseline over all steps; not sync.: it "
    "need not be "
    "the same. Tensor memory: at a step's peak, on the fullest rank. Sent: by the busiest rank, "
    "as a ring "
    "sends it. Exposed: the share of a step in which ranks communicate and do not compute."
)
