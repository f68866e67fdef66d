"""A run that is told to end: all ranks stop together after a step, with a checkpoint.

Whoever is told by a signal (SIGTERM, SIGHUP, Ctrl-C's SIGINT) tells the others by a key in the
store, and the first to see it there says after which step they stop: the next one. A step's figures
are summed over all ranks, so nobody is further than the others' next step, and everybody sees the
word in time. Under a parameter server, whose servers do not meet, one step more is given.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

import torch.distributed as dist

from dtrain.launch.flight_recorder import collective_failed
from dtrain.launch.rank_processes import on_stop_signals

TOLD, AFTER = "told", "after"


class Preemption:
    """While the context lasts these signals do not end the process, but ask for the end of
    training.

    A second SIGINT is Python's own.

    Args:
        margin: steps that one rank may be ahead of another, and one.

    Attributes:
        interrupted: has this process been sent SIGINT?
    """

    def __init__(self, margin: int = 1) -> None:
        self._margin, self._told, self.interrupted = margin, False, False
        self._store = dist.PrefixStore("preempt", dist.distributed_c10d._get_default_store())

    def __enter__(self) -> Preemption:
        self._stops = on_stop_signals(self._tell)
        self._stops.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stops.__exit__(None, None, None)
        if self._told and isinstance(error[1], BaseException) and collective_failed(error[1]):
            # another rank has failed, and the launcher ends the others
            sys.exit(128 + signal.SIGTERM)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupted = True
            signal.signal(number, signal.default_int_handler)
        self._told = True
        self._store.set(TOLD, "")

    def stops_after(self, step: int) -> bool:
        """Every rank asks after each step, and all hear the same of it."""
        if not self._store.check([TOLD]):
            return False
        return step >= int(self._store.compare_set(AFTER, "", str(step + self._margin)))

    def stopped_before(self, steps: int) -> bool:
        """Has the run been stopped, with steps left to do?

        Also for ranks without steps of their own.
        """
        return self._store.check([AFTER]) and int(self._store.get(AFTER)) < steps
