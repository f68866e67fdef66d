"""A machine that is to be taken away: all ranks stop together after a step, with a checkpoint.

Whoever is told by SIGTERM tells the others by a key in the store, and the first to see it there says after which step
they stop: the next one. A step's figures are summed over all ranks, so nobody is further than the others' next step,
and everybody sees the word in time. Under a parameter server, whose servers do not meet, one step more is given.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

import torch.distributed as dist

from dtrain.notes import collective_failed

TOLD, AFTER = "told", "after"


class Preemption:
    """While the context lasts SIGTERM does not end the process, but asks for the end of training.

    Args:
        margin: steps that one rank may be ahead of another, and one.
    """

    def __init__(self, margin: int = 1) -> None:
        self._margin, self._told = margin, False
        self._store = dist.PrefixStore("preempt", dist.distributed_c10d._get_default_store())

    def __enter__(self) -> Preemption:
        self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if self._told and isinstance(error[1], BaseException) and collective_failed(error[1]):
            sys.exit(128 + signal.SIGTERM)  # another rank has failed, and the launcher ends the others

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        self._store.set(TOLD, "")

    def stops_after(self, step: int) -> bool:
        """Every rank asks after each step, and all hear the same of it."""
        if not self._store.check([TOLD]):
            return False
        return step >= int(self._store.compare_set(AFTER, "", str(step + self._margin)))

    def stopped_before(self, steps: int) -> bool:
        """Has the run been stopped, with steps left to do? Also for ranks without steps of their own."""
        return self._store.check([AFTER]) and int(self._store.get(AFTER)) < steps
