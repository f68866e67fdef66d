"""What the figures say: the best strategy of each kind, trade-offs, and what is mere noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles

from dtrain.compare.results import Results, Row
from dtrain.report.amounts import in_bytes

EQUAL = 1.01  # bytes that differ by less than a hundredth count as equal
NAMED = 3  # strategies at most in a headline


@dataclass(frozen=True)
class Verdict:
    """The best of a kind, or those among which noise does not tell the best.

    Args:
        title: of what it is the best.
        rows: the best; after it those that are about equal to it.
        figure, note: the best figures, and how far the others are from them, in words.
    """

    title: str
    rows: tuple[Row, ...]
    figure: str
    note: str

    @property
    def strategy(self) -> str:
        """The winner's label, or those of the first that are about equal."""
        first = ", ".join(row.strategy for row in self.rows[:NAMED])
        more = f" and {len(self.rows) - NAMED} more" if len(self.rows) > NAMED else ""
        return f"{first}{more}, about equal" if len(self.rows) > 1 else first


def verdicts(results: Results) -> list[Verdict]:
    """Name the fastest, the leanest and the quietest of the comparable rows."""
    rows = [row for row in results.comparable if row.ranks > 1] or results.comparable
    if not rows:
        return []
    memory = f"leanest in {kind_of_memory(rows[0])}"
    found = [_fastest(rows, results.unit), _least(memory, rows, memory_of, "a rank")]
    if all(row.wire_bytes is not None for row in rows):
        found.append(_least("fewest bytes sent", rows, _sent_by, "a step"))
    return found


def _fastest(rows: Sequence[Row], unit: str) -> Verdict:
    """Name those whose throughput reaches the interval of the greatest."""
    best = max(rows, key=rate_of)
    reach = interval(best)[0]
    others = sorted((row for row in rows if row is not best), key=rate_of, reverse=True)
    tied = (best, *(row for row in others if interval(row)[1] >= reach))
    low, high = f"{min(map(rate_of, tied)):,.0f}", f"{rate_of(best):,.0f}"
    figure = f"{high if low == high else f'{low} to {high}'} {unit}/s"
    return Verdict("fastest", tied, figure, _lead(tied, others))


def _lead(tied: Sequence[Row], others: Sequence[Row]) -> str:
    """Say how far the next row is, or why the first do not differ, and by what that is judged."""
    if not others:
        return "alone"
    judged = [*tied, others[0]]
    once = min(len(row.repeats) for row in judged) < 2
    if len(tied) > 1:
        also = ", ".join(row.strategy for row in tied[NAMED:])
        spread = (
            "one run each, and the spread of its steps" if once else "the spread of the repeats"
        )
        return f"{f'also {also}; ' if also else ''}{spread} is wider than the distance: a tie"
    ahead = rate_of(tied[0]) / (rate_of(others[0]) or 1) - 1
    words = f"{ahead:.0%} before {others[0].strategy}"
    if once and min(len(_steps_of(row)) for row in judged) < 2:
        return f"{words}; one step of one run each, so noise is not known (repeats=3)"
    if once:
        return f"{words}; one run each: more than its steps spread (repeats=3 tells more)"
    return f"{words}; more than the repeats differ"


def _least(title: str, rows: Sequence[Row], figure: Callable[[Row], float], per: str) -> Verdict:
    """Name those with the fewest bytes."""
    least = min(map(figure, rows))
    tied = tuple(row for row in sorted(rows, key=figure) if figure(row) <= EQUAL * least)
    worst = max(rows, key=figure)
    also = ", ".join(row.strategy for row in tied[NAMED:])
    note = "alone" if len(rows) == 1 else f"most: {worst.strategy}, {in_bytes(figure(worst))}"
    if len(tied) == len(rows) > 1:
        note = "nobody differs by more than 1%"
    return Verdict(
        title, tied, f"{in_bytes(least)} {per}", f"also {also}; {note}" if also else note
    )


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


def interval(row: Row) -> tuple[float, float]:
    """Return between which rates a row's throughput lies.

    Of several repeats these are the least and the greatest. Of one they are those of its quick and
    its slow steps: the quartiles, which of fewer than four steps are the extremes.
    """
    low, high = row.spread()
    steps = _steps_of(row)
    if len(row.repeats) > 1 or len(steps) < 2:
        return low, high
    quick, _, slow = quantiles(steps, n=4)
    scale = rate_of(row) * (row.step_seconds or 0)
    quick, slow = max(quick, min(steps)), min(slow, max(steps))
    return min(low, scale / slow), max(high, scale / quick)


def _steps_of(row: Row) -> list[float]:
    return [each for repeat in row.repeats for each in repeat["step_seconds"]]


def equal_time(rows: Sequence[Row]) -> float:
    """Return the seconds that the quickest row took for all steps of its first repeat."""
    return min(row.seconds[-1] for row in rows)


def loss_at(row: Row, seconds: float) -> float:
    """Return the loss of the last step that had ended by then, or of the first step."""
    return row.losses[max(0, sum(end <= seconds for end in row.seconds) - 1)]
