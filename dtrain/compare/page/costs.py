"""The figures of what a strategy costs a rank: memory by kind and bytes by collective, beside
their predictions.
"""

from __future__ import annotations

from itertools import accumulate

import plotly.graph_objects as go

from dtrain.compare.page.style import FAMILIES, KINDS, POINT, TICK, Chart
from dtrain.compare.results import Results, Row
from dtrain.report.terminal import for_html

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send")


def memory(results: Results) -> Chart:
    rows, figure = [row for row in reversed(results.ran) if row.memory], go.Figure()
    fullest = [row.fullest for row in rows]
    for kind, colour in KINDS.items():
        _part(figure, rows, [m[kind]["most"] or 0 for m in fullest], kind, color=colour)
    ends: list[tuple[Row, float]] = []
    for row, kinds in zip(rows, fullest, strict=True):
        told = [kinds[kind]["predicted"] for kind in list(KINDS)[:4]]
        if all(each is not None for each in told):
            ends += ((row, end) for end in accumulate(told))
    _ticks(figure, rows, ends, "predicted up to", "MB of tensors on the fullest rank")
    return Chart(
        "memory",
        "Memory by kind",
        "The most of each kind in a step; ticks are where each of the first four "
        "kinds should end, from shapes alone.",
        POINT,
        figure,
    )


def messages(results: Results) -> Chart:
    rows, figure = [row for row in reversed(results.ran) if row.ranks > 1], go.Figure()
    busiest = [row.traffic[row.busiest] for row in rows]
    for axis, operation in sorted(
        {(m["axis"], m["operation"]) for messages in busiest for m in messages}
    ):
        sizes = [
            sum(
                m["wire_bytes"]
                for m in messages
                if (m["axis"], m["operation"]) == (axis, operation)
            )
            for messages in busiest
        ]
        pattern = {"shape": _pattern(operation)}
        colour = FAMILIES.get(axis, FAMILIES["+"])[1]  # some groups are along no axis, or several
        _part(figure, rows, sizes, f"{axis} {operation}", color=colour, pattern=pattern)
    told = [(row, row.traffic_predicted[row.busiest]) for row in rows]
    known = [
        (row, sum(m["wire_bytes"] for m in messages))
        for row, messages in told
        if messages is not None
    ]
    _ticks(figure, rows, known, "predicted", "MB that leave the busiest rank in a step")
    return Chart(
        "messages",
        "Bytes sent",
        "By axis and collective: what was handed to collectives in the last step, "
        "times what a ring sends of it; the tick is the sum that the formulas give. Without one, "
        "no formula "
        "is known.",
        POINT,
        figure,
    )


def _part(
    figure: go.Figure, rows: list[Row], sizes: list[float], name: str, **marker: object
) -> None:
    """One more part of every row's bar, in bytes."""
    names = [for_html(row.strategy) for row in rows]
    figure.add_bar(
        orientation="h",
        y=names,
        x=[size / 1e6 for size in sizes],
        name=name,
        marker=marker,
        customdata=[row.strategy for row in rows],
        hovertemplate="%{y}: %{x:.2f} MB",
    )


def _ticks(
    figure: go.Figure, rows: list[Row], ends: list[tuple[Row, float]], words: str, title: str
) -> None:
    """Where the bars' parts should end, in bytes; and how the bars are laid out."""
    names = [for_html(row.strategy) for row, _ in ends]
    figure.add_scatter(
        y=names,
        x=[end / 1e6 for _, end in ends],
        mode="markers",
        marker=TICK,
        customdata=[row.strategy for row, _ in ends],
        name="predicted",
        meta="ink",
        hovertemplate=f"%{{y}}: {words} %{{x:.2f}} MB",
    )
    layout = {
        "barmode": "stack",
        "xaxis_rangemode": "tozero",
        "xaxis_title": title,
        "meta": {"rows": len(rows)},
    }
    figure.update_layout(**layout)


def _pattern(operation: str) -> str:
    return ("", "/", "\\", "x", ".", "-")[
        OPERATIONS.index(operation) if operation in OPERATIONS else 0
    ]
