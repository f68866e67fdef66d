"""The figures of what a strategy costs a rank: memory by kind and bytes by collective, beside their predictions."""

from __future__ import annotations

from collections import defaultdict

import plotly.graph_objects as go

from dtrain.compare.results import Results
from dtrain.compare.style import FAMILIES, KINDS, POINT, TICK, Chart

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send")


def memory(results: Results) -> Chart:
    rows, figure = [row for row in reversed(results.ran) if row.memory], go.Figure()
    fullest = [row.fullest for row in rows]
    for kind, colour in KINDS.items():
        figure.add_bar(orientation="h", y=[r.strategy for r in rows], x=[(m[kind]["most"] or 0) / 1e6 for m in fullest],
                       customdata=[r.strategy for r in rows], name=kind, marker={"color": colour},
                       hovertemplate="%{y}: %{x:.2f} MB")  # fmt: skip
    ends = defaultdict(list)
    for row, kinds in zip(rows, fullest, strict=True):
        told = [kinds[kind]["predicted"] for kind in list(KINDS)[:4]]
        if all(each is not None for each in told):
            for index in range(4):
                ends["y"].append(row.strategy)
                ends["x"].append(sum(told[: index + 1]) / 1e6)
    figure.add_scatter(**ends, customdata=ends["y"], mode="markers", marker=TICK, name="predicted", meta="ink",
                       hovertemplate="%{y}: predicted up to %{x:.2f} MB")  # fmt: skip
    figure.update_layout(
        barmode="stack",
        xaxis_rangemode="tozero",
        xaxis_title="MB of tensors on the fullest rank",
        meta={"rows": len(rows)},
    )
    return Chart(
        "memory",
        "Memory by kind",
        "The most of each kind in a step; ticks are where each of the first four kinds should end, from shapes alone.",
        POINT,
        figure,
    )


def messages(results: Results) -> Chart:
    rows, figure = [row for row in reversed(results.ran) if row.ranks > 1], go.Figure()
    busiest = [row.traffic[row.busiest] for row in rows]
    kinds = sorted({(m["axis"], m["operation"]) for messages in busiest for m in messages})
    for axis, operation in kinds:
        sizes = [sum(m["wire_bytes"] for m in messages if (m["axis"], m["operation"]) == (axis, operation)) / 1e6
                 for messages in busiest]  # fmt: skip
        figure.add_bar(
            orientation="h",
            y=[r.strategy for r in rows],
            x=sizes,
            customdata=[r.strategy for r in rows],
            name=f"{axis} {operation}",
            marker={"color": FAMILIES[axis][1], "pattern": {"shape": _pattern(operation)}},
            hovertemplate="%{y}: %{x:.2f} MB",
        )
    told = [(row, row.traffic_predicted[row.busiest]) for row in rows]
    known = [(row, sum(m["wire_bytes"] for m in messages) / 1e6) for row, messages in told if messages is not None]
    figure.add_scatter(
        y=[row.strategy for row, _ in known],
        x=[sent for _, sent in known],
        customdata=[row.strategy for row, _ in known],
        mode="markers",
        marker=TICK,
        name="predicted",
        meta="ink",
        hovertemplate="%{y}: predicted %{x:.2f} MB",
    )
    figure.update_layout(
        barmode="stack",
        xaxis_rangemode="tozero",
        xaxis_title="MB that leave the busiest rank in a step",
        meta={"rows": len(rows)},
    )
    return Chart(
        "messages",
        "Bytes sent",
        "By axis and collective: what was handed to collectives in the last step, times "
        "what a ring sends of it; the tick is the sum that the formulas give. Without one, no formula is known.",
        POINT,
        figure,
    )


def _pattern(operation: str) -> str:
    return ("", "/", "\\", "x", ".", "-")[OPERATIONS.index(operation) if operation in OPERATIONS else 0]
