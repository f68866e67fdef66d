"""Two earlier comparisons side by side: `dtrain compare --from DIR1 DIR2 [fail_below=0.9]`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dtrain.compare.command import Failed
from dtrain.compare.figures import show_figures, wide_terminal
from dtrain.compare.results import Results, Row, read

OPTION = "fail_below=0.9"
LEGEND = (
    "spread: of any repeat over any other; within noise: 1 lies in it; unknown: one repeat each"
)


@dataclass(frozen=True)
class Difference:
    """A row's figures in a second comparison over those in a first one.

    Args:
        ratio: of the median throughputs; `least` and `most`: of any two repeats.
        noise: whether 1 lies between these; None: one run each cannot tell.
    """

    strategy: str
    ratio: float
    least: float
    most: float
    noise: bool | None
    memory_ratio: float
    bytes_ratio: float | None

    @property
    def in_words(self) -> tuple[str, ...]:
        """Its row of the table."""
        change = "faster" if self.ratio > 1 else "slower"
        return (
            self.strategy,
            f"{self.ratio:.3f}",
            f"{self.least:.3f} – {self.most:.3f}",
            {True: "within noise", False: change, None: "noise unknown"}[self.noise],
            f"{self.memory_ratio:.3f}",
            "–" if self.bytes_ratio is None else f"{self.bytes_ratio:.3f}",
        )


def refuse_misplaced(arguments: list[str]) -> None:
    """Refuse the earlier option `fail_if`, and `fail_below` where nothing is compared with it.

    Raises:
        ValueError: one of them is among the arguments of `dtrain compare`.
    """
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        if key == "fail_if" or (key == "fail_below" and arguments[0] != "--from"):
            raise ValueError(f"{key}: here it is --from DIR1 DIR2 {OPTION}")


def show_difference(arguments: list[str]) -> None:
    """Print the figures of a second comparison over those of a first one.

    Args:
        arguments: two folders, and `fail_below=…` if a throughput below that is to fail.

    Raises:
        ValueError: these are no two folders with results, or no number.
        Failed: a strategy's throughput falls below the bound, or it ran in the
            first and could not in the second.
    """
    folders = [argument for argument in arguments if "=" not in argument]
    options = [argument for argument in arguments if "=" in argument]
    if len(folders) != 2 or any(not option.startswith("fail_below=") for option in options):
        raise ValueError(
            f"--from {' '.join(arguments)}: give two folders, and no other setting than {OPTION}"
        )
    bound = _bound_of(options[-1]) if options else 0.0
    first, second = (read(Path(folder)) for folder in folders)
    rows, console = differences(first, second), wide_terminal()
    columns = ("strategy", f"{second.unit}/s", "spread", "", "tensor memory", "bytes sent")
    title = f"{folders[1]} over {folders[0]}"
    show_figures(console, columns, [row.in_words for row in rows], title)
    lines = [LEGEND]
    for name in first.facts | second.facts:
        before, after = first.facts.get(name), second.facts.get(name)
        if before != after:
            lines.append(f"not alike: {name} {before}, then {after}")
    for name in ("commit", "cpu", "cores"):
        before, after = (each.environment.get(name, "unknown") for each in (first, second))
        if before != after:
            lines.append(f"{name}: {before}, then {after}")
    for line in lines:
        console.say(line)
    if bound:
        _check(rows, first, second, bound)


def differences(first: Results, second: Results) -> list[Difference]:
    """Compare every strategy that ran in both.

    Raises:
        ValueError: none did.
    """
    before = {row.strategy: row for row in first.ran}
    both = [(before[row.strategy], row) for row in second.ran if row.strategy in before]
    if not both:
        raise ValueError(
            f"no strategy ran in both: {', '.join(before)} and "
            f"{', '.join(row.strategy for row in second.ran)}"
        )
    return [_difference(old, new) for old, new in both]


def _difference(old: Row, new: Row) -> Difference:
    (old_least, old_most), (new_least, new_most) = old.spread(), new.spread()
    least, most = new_least / old_most, new_most / old_least
    repeated = len(old.repeats) > 1 and len(new.repeats) > 1
    if new.memory_bytes and old.memory_bytes:
        memory_ratio = new.memory_bytes / old.memory_bytes
    else:  # tensors are not compared with processes
        memory_ratio = (new.peak_memory_bytes or 0) / (old.peak_memory_bytes or 1)
    return Difference(
        new.strategy,
        (new.tokens_per_second or 0) / (old.tokens_per_second or 1),
        least,
        most,
        least <= 1 <= most if repeated else None,
        memory_ratio,
        new.wire_bytes / old.wire_bytes if new.wire_bytes and old.wire_bytes else None,
    )


def _bound_of(option: str) -> float:
    try:
        bound = float(option.removeprefix("fail_below="))
    except ValueError:
        bound = math.nan
    if not 0 < bound < math.inf:
        raise ValueError(f"{option}: give a number above 0, such as {OPTION}")
    return bound


def _check(rows: list[Difference], first: Results, second: Results, bound: float) -> None:
    """Refuse throughputs below the bound, and strategies that run no more."""
    problems = [f"{row.strategy} {row.ratio:.3f}" for row in rows if row.ratio < bound]
    before = {row.strategy for row in first.ran}
    problems += [
        f"{row.strategy} did not run"
        for row in second.rows
        if row.strategy in before and not row.ran
    ]
    if problems:
        raise Failed(f"throughput falls below fail_below={bound:g}: {', '.join(problems)}")
