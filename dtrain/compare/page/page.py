"""`report.html`: one file with the figures and their numbers, which needs no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from dtrain.compare.figures import columns_of, in_words
from dtrain.compare.page.charts import charts
from dtrain.compare.page.step import gantt
from dtrain.compare.page.style import Chart, family
from dtrain.compare.results import Results, Row
from dtrain.compare.verdict import Verdict, pareto_front, verdicts
from dtrain.cost.predict import coordinates
from dtrain.parallel.messages import Message
from dtrain.report.amounts import in_bytes
from dtrain.report.terminal import without_control_characters

HOLDS = {  # by axis: what the rank at coordinate i of n holds
    "dp": "rows {i} of {n}", "fsdp": "rows and shard {i} of {n}",
    "tp": "slice {i} of {n} of each matrix", "pp": "stage {i} of {n}", "cp": "tokens {i} of {n}",
    "ep": "experts {i} of {n}",
}  # fmt: skip


def document(
    results: Results, traces: dict[str, list[dict[str, Any]]], link: Callable[[str], str]
) -> str:
    """Return the page.

    Args:
        traces: Chrome's trace events of one step, by strategy.
        link: a file of the project -> its link.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: without_control_characters(value) if type(value) is str else value,
    )
    told = verdicts(results)
    cards = [_card(row, traces.get(row.strategy), link, told) for row in results.ran]
    steps = sum(sum(each["step_seconds"]) for row in results.ran for each in row.repeats)
    return environment.get_template("page.html").render(
        results=results,
        verdicts=told,
        charts=charts(results) if results.ran else [],
        columns=columns_of(results),
        best=pareto_front(results.comparable),
        rows=[(row, in_words(row)) for row in results.ran],
        values=lambda row, figure: json.dumps(getattr(row, figure)),
        missing=[row for row in results.rows if row.reason or not row.ran],
        data=_embedded,
        colour=lambda row: family(row)[1],
        cards=cards,
        first=sorted((card for card in cards if card["best"]), key=lambda card: card["best"][0]),
        plotly=get_plotlyjs(),
        steps=steps,
        facts={name: value for name, value in results.facts.items() if value is not None},
    )


def _embedded(value: Any) -> str:
    """Return JSON that may stand within a script."""
    text = value.figure.to_json() if isinstance(value, Chart) else json.dumps(value)
    return str(text).replace("<", "\\u003c")


def _card(
    row: Row,
    events: list[dict[str, Any]] | None,
    link: Callable[[str], str],
    told: Sequence[Verdict],
) -> dict[str, Any]:
    """Return what the page's card of one strategy shows, and of which verdicts it is the first."""
    best = [i for i, each in enumerate(told) if each.rows[0] is row and row.ranks > 1]
    return {
        "best": best,
        "row": row,
        "family": family(row),
        "mesh": _mesh(row),
        "messages": _messages(row),
        "memory": _memory(row),
        "files": [(file, link(file)) for file in row.files],
        "chart": gantt(events, row) if events else None,
    }


def _mesh(row: Row) -> list[tuple[str, str]]:
    """Return each rank, and what it holds."""
    if row.asynchronous:
        servers = row.asynchronous["servers"]
        parts = [f"the weights, share {i + 1} of {servers}" for i in range(servers)]
        parts += [f"worker {i}: a part of each batch" for i in range(row.ranks - servers)]
    else:
        parts = [_part_of(row, rank) for rank in range(row.ranks)]
    return [(f"rank {rank}", part) for rank, part in enumerate(parts)]


def _part_of(row: Row, rank: int) -> str:
    place = coordinates(row.mesh, rank)
    parts = [
        HOLDS[axis].format(i=place[axis] + 1, n=degree)
        for axis, degree in row.mesh.items()
        if degree > 1
    ]
    if any("deepspeed" in file for file in row.files):
        parts.append("and its share of what the engine divides")
    return "; ".join(parts) or "everything"


def _messages(row: Row) -> list[dict[str, Any]]:
    """Return the busiest rank's messages beside the predicted ones, and their formulas."""
    predictions = row.traffic_predicted[row.busiest]
    predicted = {(m["axis"], m["operation"]): m for m in predictions or []}
    measured = {(m["axis"], m["operation"]): m for m in row.traffic[row.busiest]}
    messages = []
    for axis, operation in sorted(predicted.keys() | measured.keys()):
        key, n = (axis, operation), row.mesh.get(axis, 1)
        size = (measured.get(key) or predicted[key])["bytes"]
        sent = Message(axis, operation, 1, 1).wire_bytes(n) * size
        messages.append(
            {
                "axis": axis,
                "operation": operation,
                "measured": measured.get(key),
                "predicted": predicted.get(key),
                "known": predictions is not None,
                "formula": f"{_factor(operation, n)} × {in_bytes(size)} = {in_bytes(sent)}",
            }
        )
    return messages


def _factor(operation: str, n: int) -> str:
    return {"all_reduce": f"2·({n}−1)/{n}", "send": "1"}.get(operation, f"({n}−1)/{n}")


def _memory(row: Row) -> list[tuple[str, str, str]]:
    """Return kind, maximum and prediction of the fullest rank's memory."""
    return [
        (
            name,
            in_bytes(kind["most"] or 0),
            "–" if kind["predicted"] is None else in_bytes(kind["predicted"]),
        )
        for name, kind in row.fullest.items()
    ]
