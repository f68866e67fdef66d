"""The page's charts of throughput, losses and scaling, by Plotly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from dtrain.compare.page.costs import memory, messages
from dtrain.compare.page.outliers import End, cut
from dtrain.compare.page.style import POINT, TRACE, Chart, family, lines
from dtrain.compare.results import Results, Row
from dtrain.compare.verdict import (
    efficiency,
    equal_time,
    interval,
    kind_of_memory,
    loss_at,
    memory_of,
    pareto_front,
    rate_of,
)
from dtrain.report.amounts import MIB, in_bytes
from dtrain.report.terminal import for_html

DOTTED = {"dash": "dot", "color": "#888888"}


def charts(results: Results) -> list[Chart]:
    """Return all charts but those of single strategies."""
    makers = [tradeoff, losses, pace, throughput, steps, scaling, memory, messages]
    if len({row.ranks for row in results.ran if "@" in row.strategy}) < 2:
        makers.remove(scaling)
    return [make(results) for make in makers]


def tradeoff(results: Results) -> Chart:
    """Throughput against memory, with the Pareto front."""
    rows, figure = results.comparable, go.Figure()
    best = pareto_front(rows)
    figure.add_scatter(
        x=[memory_of(r) / MIB for r in best],
        y=[r.tokens_per_second for r in best],
        mode="lines",
        line=DOTTED | {"width": 2},
        name="Pareto front",
        hoverinfo="skip",
    )
    groups = defaultdict(list)
    for row in rows:
        groups[family(row)].append(row)
    for (name, colour), group in groups.items():
        figure.add_scatter(
            x=[memory_of(r) / MIB for r in group],
            y=[r.tokens_per_second for r in group],
            customdata=[r.strategy for r in group],
            text=[for_html(r.strategy) if r in best else "" for r in group],
            hovertext=[_tip(r, results.unit) for r in group],
            hoverinfo="text",
            mode="markers+text",
            textposition=["bottom center" if r in best[::2] else "top center" for r in group],
            name=name,
            marker={
                "color": colour,
                "size": 13,
                "symbol": ["circle" if r in best else "circle-open" for r in group],
                "line": {"width": 2.5, "color": colour},
            },
        )
    figure.update_layout(
        xaxis_title=f"{kind_of_memory(rows[0])} of the fullest rank in MiB (left is better)",
        yaxis_title=f"{results.unit}/s (up is better)",
        xaxis_rangemode="tozero",
        yaxis_rangemode="tozero",
    )
    wide = [End(r.strategy, memory_of(r) / MIB, in_bytes(memory_of(r)), rate_of(r)) for r in rows]
    high = [End(r.strategy, rate_of(r), f"{rate_of(r):,.0f}", memory_of(r) / MIB) for r in rows]
    cuts = cut(figure, "x", wide), cut(figure, "y", high)
    return Chart(
        "tradeoff",
        "Throughput against memory",
        "Full circles are the Pareto front: nothing else is both faster and leaner. Left out "
        "here: what trains another model, is not synchronous, or uses more ranks than were asked "
        f"for.{cuts[0] or cuts[1]}",
        POINT,
        figure,
    )


def losses(results: Results) -> Chart:
    """Losses over steps."""
    figure, words = _curves(results, lambda row: list(range(1, len(row.losses) + 1)))
    figure.update_layout(xaxis_title="step")
    words = f"What trains the same, synchronously, draws one line.{words}"
    compared = [row for row in results.ran if row.synchronous and row.loss_difference is not None]
    if compared:
        worst = max(compared, key=lambda row: row.loss_difference or 0)
        words += (
            f" The greatest difference of a synchronous strategy from its reference is "
            f"{worst.loss_difference:.1e} ({worst.strategy})."
        )
    return Chart("losses", "Loss curves", words, TRACE, figure)


def pace(results: Results) -> Chart:
    """Losses over time."""
    figure, words = _curves(results, lambda row: row.seconds)
    until = equal_time(results.comparable or results.ran)
    figure.add_vline(x=until, line=DOTTED | {"width": 1})
    figure.update_layout(xaxis_title="seconds in steps", xaxis_rangemode="tozero")
    ends = [
        End(row.strategy, row.seconds[-1], f"{row.seconds[-1]:.1f} s", row.losses[-1])
        for row in results.ran
    ]
    far = cut(figure, "x", ends)
    words = f"The same curves, over the time that the steps took.{far or words}"
    if results.loose:
        rows = [*results.comparable[:1], *results.loose]
        at_that_time = "; ".join(f"{row.strategy} {loss_at(row, until):.4f}" for row in rows)
        words += (
            f" What is not synchronous is to be judged here: after {until:.1f} s (dotted) the "
            f"loss is {at_that_time}."
        )
    return Chart("pace", "Loss against time", words, TRACE, figure)


def _curves(results: Results, along: Callable[[Row], Sequence[float]]) -> tuple[go.Figure, str]:
    """Return every row's losses over what `along` returns of its steps, and what is cut off."""
    figure, ends = go.Figure(), []
    for row, style in zip(results.ran, lines(results.ran), strict=True):
        figure.add_scatter(
            x=along(row),
            y=row.losses,
            name=for_html(row.strategy),
            mode="lines",
            customdata=[row.strategy],
            **style,
        )
        worst = max(row.losses)
        place = along(row)[row.losses.index(worst)]
        ends.append(End(row.strategy, worst, f"{worst:,.4g}", place))
    figure.update_layout(yaxis_title="loss", hovermode="closest")
    return figure, cut(figure, "y", ends, min(min(row.losses) for row in results.ran))


def throughput(results: Results) -> Chart:
    """A bar for each row, with whiskers for its repeats, or for its steps if there is one."""
    rows, figure = sorted(results.ran, key=rate_of), go.Figure()
    spreads = [interval(row) for row in rows]
    figure.add_bar(
        orientation="h",
        y=[for_html(r.strategy) for r in rows],
        x=[r.tokens_per_second for r in rows],
        customdata=[r.strategy for r in rows],
        marker={"color": [family(r)[1] for r in rows]},
        hovertext=[_tip(r, results.unit) for r in rows],
        hoverinfo="text",
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [m - rate_of(r) for r, (_, m) in zip(rows, spreads, strict=True)],
            "arrayminus": [rate_of(r) - m for r, (m, _) in zip(rows, spreads, strict=True)],
        },
        showlegend=False,
    )
    figure.update_layout(xaxis_title=f"{results.unit}/s", meta={"rows": len(rows)})
    words = (
        "Median over the repeats; whiskers go to the least and the greatest of the repeats."
        if results.asked > 1
        else "One run each; whiskers go to the rates of its quick and its slow steps (quartiles)."
    )
    ends = [
        End(r.strategy, most, f"{rate_of(r):,.0f}", for_html(r.strategy))
        for r, (_, most) in zip(rows, spreads, strict=True)
    ]
    return Chart("throughput", "Throughput", words + cut(figure, "x", ends), POINT, figure)


def steps(results: Results) -> Chart:
    """A box of step times for each row."""
    rows = sorted(results.ran, key=lambda row: -(row.step_seconds or 0))
    figure, ends = go.Figure(), []
    for row in rows:
        seconds = [1e3 * each for repeat in row.repeats for each in repeat["step_seconds"]]
        figure.add_box(
            x=seconds,
            name=for_html(row.strategy),
            marker={"color": family(row)[1]},
            showlegend=False,
            boxpoints=False,
            customdata=[row.strategy],
            hoverinfo="x",
        )
        least, most = f"{min(seconds):,.0f}", f"{max(seconds):,.0f}"
        span = least if least == most else f"{least} to {most}"
        ends.append(End(row.strategy, max(seconds), f"{span} ms", for_html(row.strategy)))
    figure.update_layout(
        xaxis_title="milliseconds a step", xaxis_rangemode="tozero", meta={"rows": len(rows)}
    )
    return Chart(
        "steps",
        "Step time",
        "Every step of every repeat but the first steps, which instruments and warming up "
        "disturb: median, quartiles, and whiskers to 1.5 times their distance."
        f"{cut(figure, 'x', ends)}",
        TRACE,
        figure,
    )


def scaling(results: Results) -> Chart:
    """Efficiency over world sizes."""
    figure, groups = go.Figure(), defaultdict(list)
    for row in results.ran:
        groups[row.strategy.split(" @")[0]].append(row)
    several = {
        name: sorted(rows, key=lambda row: row.ranks)
        for name, rows in groups.items()
        if len(rows) > 1
    }
    styles = lines([rows[-1] for rows in several.values()])
    for (name, rows), style in zip(several.items(), styles, strict=True):
        figure.add_scatter(
            x=[r.ranks for r in rows],
            y=[100 * efficiency(r, rows[0]) for r in rows],
            name=for_html(name),
            mode="lines+markers",
            customdata=[r.strategy for r in rows],
            **style,
        )
    sizes = sorted({row.ranks for rows in several.values() for row in rows})
    figure.add_scatter(
        x=sizes,
        y=[100] * len(sizes),
        name="ideal",
        legendgroup="for comparison",
        mode="lines",
        line=DOTTED,
    )
    figure.update_layout(
        xaxis_title="ranks",
        yaxis_title="efficiency in %",
        yaxis_rangemode="tozero",
        xaxis_tickvals=sizes,
    )
    kind = (
        "the same global batch on every world size"
        if results.scaling == "strong"
        else "the same batch for each rank"
    )
    return Chart(
        "scaling",
        f"Scaling, {results.scaling}",
        f"Throughput a rank over that of the smallest world size: {kind}.",
        POINT,
        figure,
    )


def _tip(row: Row, unit: str) -> str:
    return (
        f"<b>{for_html(row.strategy)}</b> on {row.ranks}<br>{row.tokens_per_second:,.0f} "
        f"{unit}/s<br>"
        f"{in_bytes(memory_of(row))} of {kind_of_memory(row)} a rank<br>"
        f"{in_bytes(row.wire_bytes or 0)} sent a step"
    )
