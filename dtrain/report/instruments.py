"""What the instruments saw, as tables for a person: measured beside predicted."""

from __future__ import annotations

from typing import Any

from dtrain.report.amounts import MIB
from dtrain.report.tables import numbers, show_table
from dtrain.report.terminal import Terminal


def show_profile(profile: dict[str, Any]) -> None:
    """Print messages and memory of rank 0, the time of every rank, and a pipeline's bubble."""
    first = profile["ranks"][0]
    _show_traffic(first["traffic"], first["traffic_predicted"])
    if first["memory"]:
        _show_memory(first["memory"])
    _show_time([rank["time"] for rank in profile["ranks"]])
    if profile["bubble"]:
        words = "pipeline bubble: {measured:.1%} measured, {theory:.1%} in theory"
        Terminal().print(words.format(**profile["bubble"]))


def _show_traffic(measured: list[dict[str, Any]], predicted: list[dict[str, Any]] | None) -> None:
    columns = numbers(
        "calls", "predicted", "payload bytes", "predicted", "bytes on the wire (ring)"
    )
    expected = {(m["axis"], m["operation"]): m for m in predicted or []}
    sent = {(m["axis"], m["operation"]): m for m in measured}
    rows = []
    for key in sorted(expected.keys() | sent.keys()):
        own = sent.get(key)
        cells = [
            f"{m[amount]:,}" if m else "-"
            for amount in ("calls", "bytes")
            for m in (own, expected.get(key))
        ]
        rows.append((" ".join(key), *cells, f"{own['wire_bytes']:,.0f}" if own else "-"))
    show_table("messages of a step, rank 0", ["axis, collective", *columns], rows)


def _show_memory(memory: dict[str, Any]) -> None:
    rows = [
        (kind, *(_mib(sizes[amount]) for amount in ("most", "predicted", "at_peak")))
        for kind, sizes in memory["kinds"].items()
    ]
    rows.append(("together", "", "", _mib(memory["peak"])))
    columns = numbers("most", "predicted", "at the peak")
    show_table("tensor memory of a step in MiB, rank 0", ["kind", *columns], rows)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:,.2f}"


def _show_time(ranks: list[dict[str, float]]) -> None:
    rows = [
        (str(rank), *(f"{seconds * 1e3:,.1f}" for seconds in times.values()))
        for rank, times in enumerate(ranks)
    ]
    show_table("time of a step in ms", ["rank", *numbers(*ranks[0])], rows)
