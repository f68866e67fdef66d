"""What the figures say: the best of each kind, the trade-off between two of them, and what is
mere noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtrain.compare.results import Results, Row
from dtrain.report.amounts import in_bytes


@dataclass(frozen=True)
class Verdict:
    """The best of a kind: `title`, the strategy's label, its figure in words, and what else is
    to be known.
    """

    title: str
    strategy: str
    figure: str
    note: str


def verdicts(results: Results) -> list[Verdict]:
    """Fastest, leanest and quietest of the rows that train the same on as many ranks as were
    asked for.
    """
    rows = [row for row in results.comparable if row.ranks > 1] or results.comparable
    if not rows:
        return []
    fastest = max(rows, key=lambda row: row.tokens_per_second or 0)
    leanest = min(rows, key=memory_of)
    quietest = min(rows, key=lambda row: row.wire_bytes or 0)
    return [
        Verdict(
            "fastest",
            fastest.strategy,
            f"{fastest.tokens_per_second:,.0f} tokens/s",
            _lead(rows, fastest),
        ),
        Verdict(
            f"leanest in {kind_of_memory(leanest)}",
            leanest.strategy,
            f"{in_bytes(memory_of(leanest))} a rank",
            _most(rows, memory_of),
        ),
        Verdict(
            "fewest bytes sent",
            quietest.strategy,
            f"{in_bytes(quietest.wire_bytes or 0)} a step",
            _most(rows, lambda row: row.wire_bytes or 0),
        ),
    ]


def _most(rows: Sequence[Row], figure: Callable[[Row], float]) -> str:
    worst = max(rows, key=figure)
    if len(rows) == 1:
        return "alone"
    return f"most: {worst.strategy}, {in_bytes(figure(worst))}"


def _lead(rows: Sequence[Row], first: Row) -> str:
    """How far the next one is, and whether that can be told."""
    others = sorted(
        (row for row in rows if row is not first), key=lambda row: -(row.tokens_per_second or 0)
    )
    if not others:
        return "alone"
    following = others[0]
    ahead = (first.tokens_per_second or 0) / (following.tokens_per_second or 1) - 1
    words = f"{ahead:.0%} before {following.strategy}"
    if min(len(first.repeats), len(following.repeats)) < 2:
        return f"{words}; one run each, so noise is not known (repeats=3)"
    told = distinct(first, following)
    return (
        f"{words}; "
        f"{'more than the repeats differ' if told else 'within the spread of the repeats: a tie'}"
    )


def memory_of(row: Row) -> float:
    """Bytes of a rank: of its tensors; where these were not followed, of the process."""
    return float(row.memory_bytes or row.peak_memory_bytes or 0)


def kind_of_memory(row: Row) -> str:
    """What `memory_of` tells of a row, in words."""
    return "tensor memory" if row.memory_bytes else "process memory"


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """The Pareto front of throughput against memory: no other row is better in one and as good
    in the other.
    """

    def beaten(row: Row) -> bool:
        mine = (row.tokens_per_second or 0, -memory_of(row))
        return any(
            theirs != mine and theirs[0] >= mine[0] and theirs[1] >= mine[1]
            for theirs in ((other.tokens_per_second or 0, -memory_of(other)) for other in rows)
        )

    return sorted((row for row in rows if not beaten(row)), key=memory_of)


def efficiency(row: Row, alone: Row) -> float:
    """Throughput over that of one rank, a rank: 1 is ideal."""
    return (row.tokens_per_second or 0) / (alone.tokens_per_second or 1) / row.ranks * alone.ranks


def distinct(one: Row, other: Row) -> bool:
    """Do all repeats of one differ from all of the other in the same direction?"""
    (low, high), (least, most) = one.spread(), other.spread()
    return high < least or most < low


def equal_time(rows: Sequence[Row]) -> float:
    """Seconds in which the quickest of them made all its steps, in its first repeat."""
    return min(row.seconds[-1] for row in rows)


def loss_at(row: Row, seconds: float) -> float:
    """Of the last step that had ended then; of the first one, if none had."""
    return row.losses[max(0, sum(end <= seconds for end in row.seconds) - 1)]


def _memory_ratio(row: Row, old: Row) -> float:
    """Of tensors where both were followed, else of processes: the two are not to be compared."""
    if row.memory_bytes and old.memory_bytes:
        return row.memory_bytes / old.memory_bytes
    return (row.peak_memory_bytes or 0) / (old.peak_memory_bytes or 1)


@dataclass(frozen=True)
class Difference:
    """A row's throughput in a second comparison over that in a first one.

    Args:
        ratio: of the medians; `least` and `most`: of any two repeats.
        noise: is 1 among those? None: one run each, so it cannot be told.
    """

    strategy: str
    ratio: float
    least: float
    most: float
    noise: bool | None
    memory_ratio: float
    bytes_ratio: float | None


def differences(first: Results, second: Results) -> list[Difference]:
    """Every strategy that ran in both.

    Raises:
        ValueError: none did.
    """
    before, found = {row.strategy: row for row in first.ran}, []
    for row in second.ran:
        if old := before.get(row.strategy):
            (low, high), (least, most) = old.spread(), row.spread()
            known = len(old.repeats) > 1 and len(row.repeats) > 1
            found.append(
                Difference(
                    row.strategy,
                    (row.tokens_per_second or 0) / (old.tokens_per_second or 1),
                    least / high,
                    most / low,
                    (least / high <= 1 <= most / low) if known else None,
                    _memory_ratio(row, old),
                    row.wire_bytes / old.wire_bytes if row.wire_bytes and old.wire_bytes else None,
                )
            )
    if not found:
        raise ValueError(
            f"no strategy ran in both: {', '.join(before)} and "
            f"{', '.join(r.strategy for r in second.ran)}"
        )
    return found
