"""A step as pictures: a Gantt chart of every rank, and a trace for Perfetto (or
chrome://tracing).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    """All ranks in Chrome's trace format: a process for each rank, a thread for each kind of span.

    Source: the Trace Event Format. Spans of a kind that overlap go to further threads, as the
    format needs.
    """
    begin = min((span.start for spans in ranks for span in spans), default=0)
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(ranks):
        events.append(
            {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        )
        placed = _in_lanes(spans)
        for kind, lane in sorted({(kind, lane) for kind, lane, _ in placed}):
            name = {"name": f"{kind} {lane + 1}" if lane else kind}
            events.append(
                {
                    "ph": "M",
                    "name": "thread_name",
                    "pid": rank,
                    "tid": _thread(kind, lane),
                    "args": name,
                }
            )
        for kind, lane, span in placed:
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
    """Each span with its kind and the first lane of that kind in which it overlaps no other,
    unless nested.
    """
    found, ends = [], {kind: [] for kind in ROWS}  # type: ignore[var-annotated]
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


def draw(ranks: Sequence[Sequence[Span]], title: str, files: Sequence[Path]) -> None:
    """A row of what each rank computes, and below it a thin one of its communication."""
    from matplotlib.figure import Figure  # takes half a second: only who draws pays
    from matplotlib.patches import Patch

    begin = min(s.start for spans in ranks for s in spans)
    end = max(s.end for spans in ranks for s in spans)
    figure = Figure(figsize=(12, 1.4 + 0.75 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    for rank, spans in enumerate(ranks):
        for span in spans:
            work = span.kind in (STAGE, PHASE)
            if (work or span.kind == COMMUNICATION) and span.name in COLOURS:
                place = (rank, 0.44) if work else (rank + 0.47, 0.2)
                left, width = (span.start - begin) / 1e6, (span.end - span.start) / 1e6
                axes.broken_barh(
                    [(left, width)],
                    place,
                    facecolors=COLOURS[span.name],
                    edgecolor="white",
                    linewidth=0.4,
                )
                if span.kind == STAGE and width > 0.012 * (end - begin) / 1e6:
                    axes.text(
                        left + width / 2,
                        rank + 0.22,
                        str(span.micro_batch),
                        ha="center",
                        va="center",
                        size=7,
                    )
    axes.set_yticks(
        [rank + 0.33 for rank in range(len(ranks))], [f"rank {rank}" for rank in range(len(ranks))]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, (end - begin) / 1e6)
    axes.set_xlabel("milliseconds")
    axes.set_title(title, loc="left", size=10, parse_math=False)
    used = {span.name for spans in ranks for span in spans} & COLOURS.keys()
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
    """`trace.json`, and the `pictures` `gantt.svg` and `gantt.png`, in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trace.json").write_text(json.dumps(chrome_trace(ranks)))
    if pictures:
        draw(ranks, title, [folder / "gantt.svg", folder / "gantt.png"])
