"""What the instruments saw, as tables for a person: measured beside predicted."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from dtrain.report.amounts import MB
from dtrain.report.terminal import Terminal


def show_profile(found: dict[str, Any]) -> None:
    """A profile's summary: the first rank's messages and memory, every rank's time, the
    pipeline's bubble.
    """
    first, terminal = found["ranks"][0], Terminal()
    terminal.print(_traffic(first["traffic"], first["traffic_predicted"]))
    if first["memory"]:
        terminal.print(_memory(first["memory"]))
    terminal.print(_time([rank["time"] for rank in found["ranks"]]))
    if found["bubble"]:
        terminal.print(
            "pipeline bubble: {measured:.1%} measured, {theory:.1%} in theory".format(
                **found["bubble"]
            )
        )


def _table(title: str, *columns: str) -> Table:
    made = Table(title=title)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if not index else "right")
    return made


def _traffic(measured: list[dict[str, Any]], predicted: list[dict[str, Any]] | None) -> Table:
    made = _table(
        "messages of a step, rank 0",
        "axis, collective",
        "calls",
        "predicted",
        "payload bytes",
        "predicted",
        "bytes on the wire (ring)",
    )
    told = {(m["axis"], m["operation"]): m for m in predicted or []}
    seen = {(m["axis"], m["operation"]): m for m in measured}
    for key in sorted(told.keys() | seen.keys()):
        ours, theirs = seen.get(key), told.get(key)
        cells = [
            f"{m[what]:,}" if m else "-" for what in ("calls", "bytes") for m in (ours, theirs)
        ]
        made.add_row(" ".join(key), *cells, f"{ours['wire_bytes']:,.0f}" if ours else "-")
    return made


def _memory(memory: dict[str, Any]) -> Table:
    made = _table(
        "tensor memory of a step in MB, rank 0", "kind", "most", "predicted", "at the peak"
    )
    for kind, sizes in memory["kinds"].items():
        made.add_row(kind, *(_mb(sizes[what]) for what in ("most", "predicted", "at_peak")))
    made.add_row("together", "", "", _mb(memory["peak"]))
    return made


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / MB:,.2f}"


def _time(ranks: list[dict[str, float]]) -> Table:
    made = _table("time of a step in ms", "rank", *ranks[0])
    for rank, times in enumerate(ranks):
        made.add_row(str(rank), *(f"{seconds * 1e3:,.1f}" for seconds in times.values()))
    return made
