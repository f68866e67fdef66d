"""The page's charts of a rank's memory and messages, beside what was predicted."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import plotly.graph_objects as go

from dtrain.compare.page.outliers import End, cut
from dtrain.compare.page.style import FAMILIES, KINDS, POINT, TICK, Chart
from dtrain.compare.results import Results, Row
from dtrain.report.amounts import MIB, in_bytes
from dtrain.report.terminal import for_html

PATTERNS = {
    "all_reduce": "",
    "all_gather": "/",
    "reduce_scatter": "\\",
    "broadcast": "x",
    "all_to_all": ".",
    "send": "-",
}


def memory(results: Results) -> Chart:
    """The fullest rank's memory by kind."""
    rows, figure = [row for row in reversed(results.ran) if row.memory], go.Figure()
    fullest = [row.fullest for row in rows]
    for kind, colour in KINDS.items():
        _part(figure, rows, [m[kind]["most"] or 0 for m in fullest], kind, color=colour)
    ends: list[tuple[Row, float]] = []
    for row, kinds in zip(rows, fullest, strict=True):
        predictions = [kinds[kind]["predicted"] for kind in list(KINDS)[:4]]
        if None not in predictions:
            ends += ((row, end) for end in accumulate(predictions))
    _ticks(figure, rows, ends, "predicted up to", "MiB of tensors on the fullest rank")
    words = _cut(figure, rows, [[m[kind]["most"] or 0 for kind in KINDS] for m in fullest])
    return Chart(
        "memory",
        "Memory by kind",
        "The most of each kind in a step; ticks are where each of the first four kinds should "
        "end, from shapes alone."
        f"{words}",
        POINT,
        figure,
    )


def messages(results: Results) -> Chart:
    """The busiest rank's bytes by axis and collective."""
    rows, figure = [row for row in reversed(results.ran) if row.ranks > 1], go.Figure()
    busiest = [row.traffic[row.busiest] for row in rows]
    for kind in sorted({_kind(m) for messages in busiest for m in messages}):
        axis, operation = kind
        sizes = [sum(m["wire_bytes"] for m in messages if _kind(m) == kind) for messages in busiest]
        pattern = {"shape": PATTERNS.get(operation, "")}
        colour = FAMILIES.get(axis, FAMILIES["+"])[1]  # some groups are along no axis, or several
        _part(figure, rows, sizes, f"{axis} {operation}", color=colour, pattern=pattern)
    ends = [
        (row, sum(m["wire_bytes"] for m in predictions))
        for row in rows
        if (predictions := row.traffic_predicted[row.busiest]) is not None
    ]
    _ticks(figure, rows, ends, "predicted", "MiB that leave the busiest rank in a step")
    words = _cut(figure, rows, [[m["wire_bytes"] for m in messages] for messages in busiest])
    return Chart(
        "messages",
        "Bytes sent",
        "By axis and collective: what was handed to collectives in the last step, times what a "
        "ring sends of it; the tick is the sum that the formulas give. Without one, no formula "
        f"is known.{words}",
        POINT,
        figure,
    )


def _part(
    figure: go.Figure, rows: list[Row], sizes: list[float], name: str, **marker: object
) -> None:
    """Add a part of that many bytes to every row's bar."""
    figure.add_bar(
        orientation="h",
        y=[for_html(row.strategy) for row in rows],
        x=[size / MIB for size in sizes],
        name=name,
        marker=marker,
        customdata=[row.strategy for row in rows],
        hovertemplate="%{y}: %{x:.2f} MiB",
    )


def _ticks(
    figure: go.Figure, rows: list[Row], ends: list[tuple[Row, float]], words: str, title: str
) -> None:
    """Add a tick at each row's predicted number of bytes, and lay the bars out."""
    figure.add_scatter(
        y=[for_html(row.strategy) for row, _ in ends],
        x=[end / MIB for _, end in ends],
        mode="markers",
        marker=TICK,
        customdata=[row.strategy for row, _ in ends],
        name="predicted",
        meta="ink",
        hovertemplate=f"%{{y}}: {words} %{{x:.2f}} MiB",
    )
    figure.update_layout(
        barmode="stack", xaxis_rangemode="tozero", xaxis_title=title, meta={"rows": len(rows)}
    )


def _cut(figure: go.Figure, rows: list[Row], parts: list[list[float]]) -> str:
    """Cut off bars that are far longer than others."""
    sums = [sum(sizes) for sizes in parts]
    ends = [
        End(row.strategy, size / MIB, in_bytes(size), for_html(row.strategy))
        for row, size in zip(rows, sums, strict=True)
    ]
    return cut(figure, "x", ends)


def _kind(message: dict[str, Any]) -> tuple[str, str]:
    return message["axis"], message["operation"]
