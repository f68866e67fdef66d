"""Mark what a rank does in a profiler's timeline, where `cost.timeline` reads the marks."""

from __future__ import annotations

from torch.profiler import record_function

MARK = "dtrain"
PHASE, STAGE, MESSAGE = "phase", "stage", "message"  # kinds of marks
FORWARD_BACKWARD, EXCHANGE, FIGURES, OPTIMIZER = (  # phases of the loop
    "forward and backward",
    "exchange gradients",
    "figures",
    "optimizer",
)


def mark(kind: str, *words: object) -> record_function:
    """Return a context that a profiler records; without one it costs microseconds."""
    return record_function(":".join((MARK, kind, *map(str, words))))
