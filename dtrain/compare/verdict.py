"""What the figures say: the best strategy of each kind, trade-offs, and what is mere noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtrain.compare.results import Results, Row
from dtrain.report.amounts import in_bytes


@dataclass(frozen=True)
class Verdict:
    """The best of a kind.

    Args:
        title: of what it is the best.
        strategy: its label.
        figure, note: its figure, and how far the others are from it, in words.
    """

    title: str
    strategy: str
    figure: str
    note: str


def verdicts(results: Results) -> list[Verdict]:
    """Name the fastest, the leanest and the quietest of the comparable rows."""
    rows = [row for row in results.comparable if row.ranks > 1] or results.comparable
    if not rows:
        return []
    fastest = max(rows, key=rate_of)
    leanest = min(rows, key=memory_of)
    quietest = min(rows, key=_sent_by)
    memory, sent = in_bytes(memory_of(leanest)), in_bytes(_sent_by(quietest))
    title = f"leanest in {kind_of_memory(leanest)}"
    return [
        Verdict(
            "fastest", fastest.strategy, f"{rate_of(fastest):,.0f} tokens/s", _lead(rows, fastest)
        ),
        Verdict(title, leanest.strategy, f"{memory} a rank", _most(rows, memory_of)),
        Verdict("fewest bytes sent", quietest.strategy, f"{sent} a step", _most(rows, _sent_by)),
    ]


def _most(rows: Sequence[Row], figure: Callable[[Row], float]) -> str:
    worst = max(rows, key=figure)
    return f"most: {worst.strategy}, {in_bytes(figure(worst))}" if len(rows) > 1 else "alone"


def _lead(rows: Sequence[Row], first: Row) -> str:
    """Say how far the next row is, and whether that is more than noise."""
    if len(rows) == 1:
        return "alone"
    second = max((row for row in rows if row is not first), key=rate_of)
    words = f"{rate_of(first) / (rate_of(second) or 1) - 1:.0%} before {second.strategy}"
    if min(len(first.repeats), len(second.repeats)) < 2:
        return f"{words}; one run each, so noise is not known (repeats=3)"
    if distinct(first, second):
        return f"{words}; more than the repeats differ"
    return f"{words}; within the spread of the repeats: a tie"


def rate_of(row: Row) -> float:
    """Tokens per second."""
    return row.tokens_per_second or 0


def _sent_by(row: Row) -> float:
    return row.wire_bytes or 0


def memory_of(row: Row) -> float:
    """Bytes of the fullest rank's tensors; of its process where tensors were not followed."""
    return float(row.memory_bytes or row.peak_memory_bytes or 0)


def kind_of_memory(row: Row) -> str:
    """Say which memory `memory_of` returns for a row."""
    return "tensor memory" if row.memory_bytes else "process memory"


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that no other beats in throughput or in memory and equals in the other."""

    def beaten(row: Row) -> bool:
        rate, memory = rate_of(row), memory_of(row)
        return any(
            rate_of(other) >= rate
            and memory_of(other) <= memory
            and (rate_of(other), memory_of(other)) != (rate, memory)
            for other in rows
        )

    return sorted((row for row in rows if not beaten(row)), key=memory_of)


def efficiency(row: Row, alone: Row) -> float:
    """Return a rank's throughput over that of a rank of `alone`: 1 is ideal."""
    return rate_of(row) / (rate_of(alone) or 1) / row.ranks * alone.ranks


def distinct(one: Row, other: Row) -> bool:
    """Return whether all repeats of one row are faster than all of the other."""
    (low, high), (least, most) = one.spread(), other.spread()
    return high < least or most < low


def equal_time(rows: Sequence[Row]) -> float:
    """Return the seconds that the quickest row took for all steps of its first repeat."""
    return min(row.seconds[-1] for row in rows)


def loss_at(row: Row, seconds: float) -> float:
    """Return the loss of the last step that had ended by then, or of the first step."""
    return row.losses[max(0, sum(end <= seconds for end in row.seconds) - 1)]
