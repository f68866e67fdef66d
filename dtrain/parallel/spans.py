"""Marks around what a rank does, which a profiler's timeline finds again
(`dtrain.cost.timeline`).
"""

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
    """A context that the timeline finds again; costs microseconds, and nothing is kept without
    a profiler.
    """
    return record_function(":".join((MARK, kind, *map(str, words))))
