"""Draw a step: a trace for Perfetto (or chrome://tracing), and a Gantt chart of all ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.cost.timeline import COMMUNICATION, COMPUTE, Span
from dtrain.parallel.footprint import BACKWARD, FORWARD, WEIGHTS
from dtrain.parallel.spans import EXCHANGE, FIGURES, OPTIMIZER, PHASE, STAGE

ROWS = (PHASE, STAGE, COMPUTE, COMMUNICATION)  # of a rank, from top to bottom
# of a pipeline's passes, the loop's phases, and collectives; a phase that holds others has none
COLOURS = {
    FORWARD: "#4c78a8", BACKWARD: "#f58518", WEIGHTS: "#eeca3b",
    OPTIMIZER: "#54a24b", EXCHANGE: "#b279a2", FIGURES: "#9d9d9d",
    "all_reduce": "#e45756", "all_gather": "#d67195", "reduce_scatter": "#ff9da6",
    "send": "#c9b18f",
    "recv": "#9d755d", "all_to_all": "#bf5b17", "broadcast": "#7f3c8d",
}  # fmt: skip


def chrome_trace(ranks: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """Return all ranks in Chrome's trace format: a process a rank, a thread a kind of span.

    Source: the Trace Event Format. Spans of a kind that overlap go to further threads, as the
    format needs.
    """
    begin = min((span.start for spans in ranks for span in spans), default=0)
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(ranks):
        process = {"name": f"rank {rank}"}
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": process})
        in_lanes = _in_lanes(spans)
        for kind, lane in sorted({(kind, lane) for kind, lane, _ in in_lanes}):
            place = {"pid": rank, "tid": _thread(kind, lane)}
            thread = {"name": f"{kind} {lane + 1}" if lane else kind}
            events.append({"ph": "M", "name": "thread_name", **place, "args": thread})
        for kind, lane, span in in_lanes:
            events.append(
                {
                    "ph": "X",
                    "name": _label(span),
                    "cat": kind,
                    "pid": rank,
                    "tid": _thread(kind, lane),
                    "ts": (span.start - begin) / 1e3,
                    "dur": (span.end - span.start) / 1e3,
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _thread(kind: str, lane: int) -> int:
    return 100 * ROWS.index(kind) + lane


def _in_lanes(spans: Sequence[Span]) -> list[tuple[str, int, Span]]:
    """Return spans, each with its kind and the first lane of that kind where it fits or nests."""
    found = []
    ends: dict[str, list[int]] = {kind: [] for kind in ROWS}
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        lanes = ends[span.kind]
        lane = next(
            (i for i, end in enumerate(lanes) if end <= span.start or span.end <= end), len(lanes)
        )
        lanes[lane : lane + 1] = [max(span.end, lanes[lane] if lane < len(lanes) else 0)]
        found.append((span.kind, lane, span))
    return found


def _label(span: Span) -> str:
    if span.kind == STAGE:
        return f"{span.name} stage {span.stage} micro-batch {span.micro_batch}"
    return f"{span.name} ({span.axis})" if span.axis else span.name


@dataclass(frozen=True)
class Bar:
    """One span in the chart of a step. Times are milliseconds since the step's begin.

    Args:
        name: a key of COLOURS.
        label: the name in full.
        micro_batch: its number, if the bar is a stage's work.
        communication: whether the bar stands in the thin row below what the rank computes.
    """

    rank: int
    name: str
    label: str
    begin: float
    length: float
    micro_batch: str
    communication: bool

    @property
    def colour(self) -> str:
        return COLOURS[self.name]


def bars_of(events: Iterable[dict[str, Any]]) -> list[Bar]:
    """Return the bars of a chart, from the events of a Chrome trace."""
    bars = []
    for event in events:
        label = event["name"]
        name = label.split(" (")[0].split(" stage ")[0]
        if event["ph"] == "X" and event["cat"] != COMPUTE and name in COLOURS:
            micro_batch = label.rpartition(" micro-batch ")[2] if event["cat"] == STAGE else ""
            communication = event["cat"] == COMMUNICATION
            times = event["ts"] / 1e3, event["dur"] / 1e3
            bars.append(Bar(event["pid"], name, label, *times, micro_batch, communication))
    return bars


def draw(ranks: Sequence[Sequence[Span]], title: str, files: Sequence[Path]) -> None:
    """Draw a row of what each rank computes, and a thin row of its communication below it."""
    from matplotlib.figure import Figure  # takes half a second: only who draws pays
    from matplotlib.patches import Patch

    bars = bars_of(chrome_trace(ranks)["traceEvents"])
    begin = min(span.start for spans in ranks for span in spans)
    duration = max(span.end - begin for spans in ranks for span in spans) / 1e6
    figure = Figure(figsize=(12, 1.4 + 0.75 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    for bar in bars:
        row = (bar.rank + 0.47, 0.2) if bar.communication else (bar.rank, 0.44)
        span = [(bar.begin, bar.length)]
        axes.broken_barh(span, row, facecolors=bar.colour, edgecolor="white", linewidth=0.4)
        if bar.micro_batch and bar.length > 0.012 * duration:
            middle = bar.begin + bar.length / 2
            axes.text(middle, bar.rank + 0.22, bar.micro_batch, ha="center", va="center", size=7)
    axes.set_yticks(
        [rank + 0.33 for rank in range(len(ranks))], [f"rank {rank}" for rank in range(len(ranks))]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, duration)
    axes.set_xlabel("milliseconds")
    axes.set_title(title, loc="left", size=10, parse_math=False)
    used = {span.name for spans in ranks for span in spans}
    axes.legend(
        handles=[Patch(color=COLOURS[name], label=name) for name in COLOURS if name in used],
        loc="upper left",
        bbox_to_anchor=(1, 1),
        frameon=False,
        fontsize=8,
    )
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    for file in files:
        figure.savefig(file, dpi=110)


def write(
    folder: Path, ranks: Sequence[Sequence[Span]], title: str, *, pictures: bool = True
) -> None:
    """Write `trace.json` into the folder, and with `pictures` `gantt.svg` and `gantt.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trace.json").write_text(json.dumps(chrome_trace(ranks)))
    if pictures:
        draw(ranks, title, [folder / "gantt.svg", folder / "gantt.png"])
