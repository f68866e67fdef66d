"""The page's chart of one step: what every rank did, and where it waited."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

from dtrain.compare.page.style import TRACE, Chart
from dtrain.compare.results import Row
from dtrain.cost.timeline import COMMUNICATION, COMPUTE, Interval, difference, length, union
from dtrain.report.step_chart import bars_of

EXPOSED = "#d62f2f"


def gantt(events: Iterable[dict[str, Any]], row: Row) -> Chart:
    """Draw each rank's work, below it its communication, and in red what nothing covers."""
    spans = [event for event in events if event["ph"] == "X"]
    bars: dict[tuple[str, str], list[tuple[float, float, float, float, str]]] = defaultdict(list)
    ranks = sorted({event["pid"] for event in spans})
    for rank in ranks:
        own = [event for event in spans if event["pid"] == rank]
        for bar in bars_of(own):
            lane = (rank + 0.34, 0.18) if bar.communication else (rank, 0.44)
            bars[bar.name, bar.colour].append((bar.begin, bar.length, *lane, bar.label))
        for start, end in _exposed(own):
            bars["exposed communication", EXPOSED].append(
                (start / 1e3, (end - start) / 1e3, rank + 0.5, 0.08, "exposed")
            )
    figure = go.Figure()
    begin = min((bar[0] for group in bars.values() for bar in group), default=0.0)
    for (name, colour), group in bars.items():
        starts, lengths, places, heights, words = (list(each) for each in zip(*group, strict=True))
        starts = [start - begin for start in starts]
        figure.add_bar(
            orientation="h",
            base=starts,
            x=lengths,
            y=places,
            width=heights,
            name=name,
            marker={"color": colour},
            text=None,
            hovertext=[f"{w}<br>{n:.2f} ms" for w, n in zip(words, lengths, strict=True)],
            hoverinfo="text",
        )
    figure.update_layout(
        barmode="overlay",
        xaxis_title="milliseconds",
        meta={"rows": 1.6 * len(ranks)},
        yaxis={
            "tickvals": ranks,
            "ticktext": [f"rank {rank}" for rank in ranks],
            "autorange": "reversed",
        },
    )
    return Chart(
        f"gantt-{row.strategy}", f"One step of {row.strategy}", _caption(row), TRACE, figure
    )


def _caption(row: Row) -> str:
    if row.ranks == 1:
        return "One process."
    words = "Communication that nothing covers is red."
    if row.exposed_share is not None:
        words = f"Exposed communication, in red, is {row.exposed_share:.0%} of the step."
    if row.bubble:
        idle = f"{row.bubble['measured']:.1%}, {row.bubble['theory']:.1%} in theory"
        words += f" The pipeline's bubble is {idle}: the gaps between micro-batches."
    return words


def _exposed(events: list[dict[str, Any]]) -> list[Interval]:
    """Return the microseconds in which a rank communicates and computes nothing.

    Less than a thousandth of the step is left out.
    """

    def covered(kind: str) -> list[Interval]:
        return union(
            (int(e["ts"]), int(e["ts"] + e["dur"]))
            for e in events
            if e["cat"] == kind and not e["name"].startswith("send")
        )

    exposed = difference(covered(COMMUNICATION), covered(COMPUTE))
    least = length(union((int(e["ts"]), int(e["ts"] + e["dur"])) for e in events)) / 1000
    return [(start, end) for start, end in exposed if end - start > least]
