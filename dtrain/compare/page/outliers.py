"""What is far beyond the others on an axis: it is cut off at the edge, and its value written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import plotly.graph_objects as go

from dtrain.report.terminal import for_html

TIMES = 4  # the median: what is greater is beyond
ROOM = 1.25  # times the greatest of the others: where the axis ends
LINE, HEIGHT = 16, 200  # pixels of a line of words, and of the lowest chart


@dataclass(frozen=True)
class End:
    """Where a strategy ends on an axis.

    Args:
        strategy: its label.
        value: its greatest on that axis.
        words: that value for a reader.
        across: where it stands on the other axis: its value there, or a bar's name.
    """

    strategy: str
    value: float
    words: str
    across: float | str


def beyond(ends: Sequence[End]) -> list[End]:
    """Return the ends of more than `TIMES` the median, or none if that is no positive number."""
    values = [end.value for end in ends if math.isfinite(end.value)]
    usual = median(values) if values else 0.0
    return [end for end in ends if end.value > TIMES * usual > 0]


def cut(figure: go.Figure, axis: str, ends: Sequence[End], least: float = 0.0) -> str:
    """End an axis soon after what is not beyond, and mark there what is.

    The page leaves both out where a reader has chosen so few strategies that most are beyond.

    Args:
        axis: x or y.
        least: where the axis begins.

    Returns:
        Words for the caption, if something is cut off.
    """
    far = beyond(ends)
    if not far:
        return ""
    edge = max(end.value for end in ends if end not in far)
    edge = least + ROOM * (edge - least)
    meta = figure.layout.meta or {}
    strategies = [end.strategy for end in ends]
    figure.update_layout(
        meta=meta
        | {"cut": meta.get("cut", {}) | {axis: {"range": [least, edge], "of": strategies}}}
    )
    shifts = _shifts(far, ends) if axis == "x" else [0.0] * len(far)
    for end, shift in zip(far, shifts, strict=True):
        bar = end.across == for_html(end.strategy)
        words = end.words if bar else f"{for_html(end.strategy)} {end.words}"
        place = (
            {"xref": "paper", "x": 1, "y": end.across, "xanchor": "right", "yshift": shift}
            if axis == "x"
            else {"yref": "paper", "y": 1, "x": end.across, "yanchor": "top"}
        )
        mark = f"{words} ▸" if axis == "x" else f"▴ {words}"
        figure.add_annotation(text=mark, name=end.strategy, showarrow=False, **place)
    return f" What is beyond {TIMES} times the median is cut off; its value stands at the edge."


def _shifts(far: Sequence[End], ends: Sequence[End]) -> list[float]:
    """Return by how many pixels words must move upwards, so that no two stand on each other."""
    places = {end.strategy: end.across for end in ends if not isinstance(end.across, str)}
    if not places:  # bars, which have a line each
        return [0.0] * len(far)
    scale = HEIGHT / (max(map(abs, places.values())) or 1)
    shifts, top = {}, -math.inf
    for end in sorted(far, key=lambda end: places[end.strategy]):
        at = scale * places[end.strategy]
        top = max(at, top + LINE)
        shifts[end.strategy] = top - at
    return [shifts[end.strategy] for end in far]
