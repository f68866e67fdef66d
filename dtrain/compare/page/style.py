"""What the page's charts share: words, colours, and what a reader may leave out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from dtrain.compare.results import Row

# A chart by trace has one trace for each strategy; one by point has all strategies in each trace,
# as its `customdata`. So the page can leave out the strategies that a reader does not want to see.
TRACE, POINT = "trace", "point"
FAMILIES = {  # by the axis of a mesh; what is on several is composed
    "": ("one process", "#7a7a7a"), "dp": ("data parallel", "#2f6fb5"),
    "fsdp": ("sharded data", "#1b9a8a"),
    "tp": ("tensor", "#d9822b"), "pp": ("pipeline", "#8e5ab8"), "cp": ("context", "#c2447a"),
    "ep": ("experts", "#8a6d3b"), "+": ("composed", "#b8443c"),
}  # fmt: skip
LOOSE = ("not synchronous", "#5c9e31")  # whatever its axes: its losses are its own
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
KINDS = {
    "parameters": "#2f6fb5",
    "gradients": "#d9822b",
    "optimizer": "#8e5ab8",
    "activations": "#1b9a8a",
    "communication": "#c2447a",
    "other": "#9a9a9a",
}
TICK = {"symbol": "line-ns-open", "size": 16, "color": "#111111", "line": {"width": 2}}


@dataclass(frozen=True)
class Chart:
    """A figure with its words.

    Args:
        name: its id on the page.
        title: what it shows.
        caption: how to read it.
        by: TRACE or POINT.
        figure: of Plotly.
    """

    name: str
    title: str
    caption: str
    by: str
    figure: go.Figure


def family(row: Row) -> tuple[str, str]:
    """Return a row's kind of parallelism, and its colour."""
    if not row.synchronous:
        return LOOSE
    axes = [axis for axis, degree in row.mesh.items() if degree > 1]
    return FAMILIES["+" if len(axes) > 1 else axes[0] if axes else ""]


def lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return each row's group of the legend and line: a colour a family, other dashes within it."""
    seen: Counter[str] = Counter()
    styles = []
    for row in rows:
        name, colour = family(row)
        times, dash = divmod(seen[name], len(DASHES))
        line = {"color": colour, "dash": DASHES[dash], "width": 2 + 2 * times}
        styles.append({"legendgroup": name, "line": line})
        seen[name] += 1
    return styles
