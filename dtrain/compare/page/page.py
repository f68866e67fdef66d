"""`report.html`: one file that needs no network, with the figures, their numbers and the words
around them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from dtrain.compare.page.charts import charts
from dtrain.compare.page.step import gantt
from dtrain.compare.page.style import Chart, family
from dtrain.compare.results import Results, Row
from dtrain.compare.runner import row_in_words
from dtrain.compare.verdict import pareto_front, verdicts
from dtrain.cost.predict import coordinates
from dtrain.parallel.messages import Message
from dtrain.report.amounts import in_bytes
from dtrain.report.terminal import without_control_characters

HOLDS = {  # what the coordinate i of n on an axis says of a rank
    "dp": "rows {i} of {n}", "fsdp": "rows and shard {i} of {n}",
    "tp": "slice {i} of {n} of each matrix", "pp": "stage {i} of {n}", "cp": "tokens {i} of {n}",
    "ep": "experts {i} of {n}",
}  # fmt: skip
COLUMNS = {  # figure: its title, and what is to be known of it
    "ranks": ("ranks", "processes"),
    "loss": ("loss", "of the last step"),
    "loss_difference": (
        "Δloss",
        (
            "greatest difference from the reference, over all steps; not sync.: it need not be "
            "the same"
        ),
    ),
    "tokens_per_second": ("tokens/s", "median of the repeats"),
    "step_seconds": ("step ms", "median"),
    "memory_bytes": ("tensor memory", "of the fullest rank, at a step's peak"),
    "wire_bytes": ("sent a step", "by the busiest rank, as a ring sends it"),
    "exposed_share": ("exposed", "share of a step with communication and no computation"),
}


def document(
    results: Results, traces: dict[str, list[dict[str, Any]]], link: Callable[[str], str]
) -> str:
    """The page.

    Args:
        traces: of one step, by strategy: Chrome's trace events.
        link: a file of the project -> what to link to.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: without_control_characters(value) if type(value) is str else value,
    )
    drawn = charts(results) if results.ran else []
    best = pareto_front(results.comparable) if results.ran else []
    steps = sum(sum(each["step_seconds"]) for row in results.ran for each in row.repeats)
    return environment.get_template("page.html").render(
        results=results,
        verdicts=verdicts(results) if results.ran else [],
        charts=drawn,
        columns=COLUMNS,
        best=best,
        rows=[(row, dict(zip(COLUMNS, row_in_words(row), strict=True))) for row in results.ran],
        values=_values,
        missing=[row for row in results.rows if row.reason or not row.ran],
        data=_embedded,
        colour=lambda row: family(row)[1],
        cards=[_card(row, traces.get(row.strategy), link) for row in results.ran],
        plotly=get_plotlyjs(),
        steps=steps,
        facts={name: value for name, value in results.facts.items() if value is not None},
    )


def _values(row: Row, figure: str) -> str:
    return json.dumps(getattr(row, figure))


def _embedded(value: Any) -> str:
    """JSON that may stand within a script."""
    text = value.figure.to_json() if isinstance(value, Chart) else json.dumps(value)
    return str(text).replace("<", "\\u003c")


def _card(
    row: Row, events: list[dict[str, Any]] | None, link: Callable[[str], str]
) -> dict[str, Any]:
    """What is told of one strategy."""
    return {
        "row": row,
        "family": family(row),
        "mesh": _mesh(row),
        "messages": _messages(row),
        "memory": _memory(row),
        "files": [(file, link(file)) for file in row.files],
        "chart": gantt(events, row) if events else None,
    }


def _mesh(row: Row) -> list[tuple[str, str]]:
    """Each rank, and what it holds."""
    if row.asynchronous:
        servers = row.asynchronous["servers"]
        own = [f"the weights, share {i + 1} of {servers}" for i in range(servers)]
        own += [f"worker {i}: a part of each batch" for i in range(row.ranks - servers)]
        return [(f"rank {rank}", words) for rank, words in enumerate(own)]
    axes = {axis: degree for axis, degree in row.mesh.items() if degree > 1}
    found = []
    for rank in range(row.ranks):
        at = coordinates(row.mesh, rank)
        words = [HOLDS[axis].format(i=at[axis] + 1, n=degree) for axis, degree in axes.items()]
        words += ["and its share of what the engine divides"] * any(
            "deepspeed" in file for file in row.files
        )
        found.append((f"rank {rank}", "; ".join(words) or "everything"))
    return found


def _messages(row: Row) -> list[dict[str, Any]]:
    """The busiest rank's messages beside the formulas', with this run's numbers in them."""
    busiest = row.busiest
    told = {(m["axis"], m["operation"]): m for m in row.traffic_predicted[busiest] or []}
    seen = {(m["axis"], m["operation"]): m for m in row.traffic[busiest]}
    found = []
    for key in sorted(told.keys() | seen.keys()):
        n = row.mesh.get(key[0], 1)
        either = seen.get(key) or told[key]
        times = Message(*key, 1, 1).wire_bytes(n)
        found.append(
            {
                "axis": key[0],
                "operation": key[1],
                "measured": seen.get(key),
                "predicted": told.get(key),
                "known": row.traffic_predicted[busiest] is not None,
                "formula": (
                    f"{_factor(key[1], n)} × {in_bytes(either['bytes'])} = "
                    f"{in_bytes(times * either['bytes'])}"
                ),
            }
        )
    return found


def _factor(operation: str, n: int) -> str:
    return {"all_reduce": f"2·({n}−1)/{n}", "send": "1"}.get(operation, f"({n}−1)/{n}")


def _memory(row: Row) -> list[tuple[str, str, str]]:
    """Kind, the most that was measured on the fullest rank, what was predicted."""
    return [
        (
            name,
            in_bytes(kind["most"] or 0),
            "–" if kind["predicted"] is None else in_bytes(kind["predicted"]),
        )
        for name, kind in row.fullest.items()
    ]
