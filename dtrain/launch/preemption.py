"""Stop all ranks together after a step, with a checkpoint, when a signal asks for the end.

A rank that gets SIGTERM, SIGHUP or SIGINT (Ctrl-C) sets a key in the store. The first rank that
sees it there names the next step as the last. A step's figures are summed over all ranks, so no
rank is more than one step ahead, and all see the key in time. The servers of a parameter server do
not meet in each step: they get one step more.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from dtrain.launch.flight_recorder import collective_failed
from dtrain.launch.rank_processes import on_stop_signals

# Keys of the store: somebody asks for the end; the last step.
ASKED, LAST_STEP = "told", "after"


class Preemption:
    """Take these signals for a request to end training, while the context lasts.

    A second SIGINT raises KeyboardInterrupt.

    Args:
        margin: one more than the steps that one rank may be ahead of another.

    Attributes:
        interrupted: whether this process has got SIGINT.
    """

    def __init__(self, margin: int = 1) -> None:
        self._margin, self._asked, self.interrupted = margin, False, False
        self._store = PrefixStore("preempt", dist.distributed_c10d._get_default_store())

    def __enter__(self) -> Preemption:
        self._stops = on_stop_signals(self._ask)
        self._stops.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stops.__exit__(None, None, None)
        if self._asked and isinstance(error[1], BaseException) and collective_failed(error[1]):
            # another rank has failed, and the launcher ends the others
            sys.exit(128 + signal.SIGTERM)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupted = True
            signal.signal(number, signal.default_int_handler)
        self._asked = True
        self._store.set(ASKED, "")

    def stops_after(self, step: int) -> bool:
        """Return whether this step is the last. Every rank asks after each step, and all agree."""
        if not self._store.check([ASKED]):
            return False
        return step >= int(self._store.compare_set(LAST_STEP, "", str(step + self._margin)))

    def stopped_before(self, steps: int) -> bool:
        """Return whether the run was stopped with steps left; also for ranks without steps."""
        return self._store.check([LAST_STEP]) and int(self._store.get(LAST_STEP)) < steps
