"""The work of a parameter server's run: which worker computes which gradient, and who has to wait.

There are no tensors and no sockets here. A run is a list of items: item i is part i mod W of round
i div W, and a round is one update of one global batch. A worker asks for an item, computes its
gradient on the weights of that moment, and hands it in.

    sync      an item is given out when all rounds before its own are finished
    bounded   ... when the worker is at most `bound` items ahead of the slowest
    async     ... at once

When a worker dies, the next one that asks gets its item. So each item is finished once, whoever
lives. Source: Ho et al. 2013, "More Effective Distributed ML via a Stale Synchronous Parallel
Parameter Server".
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

SYNC, BOUNDED, ASYNC = "sync", "bounded", "async"
MODES = (ASYNC, BOUNDED, SYNC)


@dataclass
class WorkQueue:
    """The items of a run and the workers' clocks. Not safe for threads: its user holds a lock.

    Args:
        total: items of the run.
        parts: items of a round, W.
        mode: one of MODES.
        bound: in `bounded`: items that a worker may be ahead of the slowest.
        begin: the first item that is left to do.
    """

    total: int
    parts: int
    mode: str = ASYNC
    bound: int = 0
    begin: int = 0
    finished: int = field(init=False)
    clocks: dict[int, int] = field(default_factory=dict)  # items finished, by worker alive
    assigned: dict[int, int] = field(default_factory=dict)  # the item that each worker is at
    max_lead: int = 0  # the greatest distance between two clocks when an item was given out
    _next: int = field(init=False)
    _returned: list[int] = field(default_factory=list)  # items of workers that died

    def __post_init__(self) -> None:
        self._next = self.finished = self.begin

    @property
    def done(self) -> bool:
        return self.finished >= self.total

    def add_worker(self, worker: int) -> None:
        """Start the clock of a worker, new or come back, at the slowest worker's.

        So nobody waits until it has caught up.
        """
        self.clocks[worker] = min(self.clocks.values(), default=0)

    def remove_worker(self, worker: int) -> None:
        """Stop the clock of a worker that is gone, and take its item back."""
        self.clocks.pop(worker, None)
        if (item := self.assigned.pop(worker, None)) is not None:
            heapq.heappush(self._returned, item)

    def next_item(self, worker: int) -> int | None:
        """Return an item for the worker; None: it has to wait, or the work is `done`."""
        item = self._returned[0] if self._returned else self._next
        if item >= self.total:
            return None  # an item of another worker may still come back
        if self.mode == SYNC and item // self.parts > self.finished // self.parts:
            return None
        ahead = self.clocks[worker] - min(self.clocks.values())
        if self.mode == BOUNDED and ahead > self.bound:
            return None
        if self._returned:
            heapq.heappop(self._returned)
        else:
            self._next += 1
        self.assigned[worker] = item
        self.max_lead = max(self.max_lead, ahead)
        return item

    def complete(self, worker: int) -> None:
        """Count the worker's item as finished."""
        del self.assigned[worker]
        self.clocks[worker] += 1
        self.finished += 1


@dataclass
class SeenItems:
    """The items whose gradients a server has.

    One that was computed again, since its first worker had died, comes twice.
    """

    begin: int = 0  # it has all items before this one
    _beyond: set[int] = field(default_factory=set)

    def first(self, item: int) -> bool:
        """Note the item; return whether it has come for the first time."""
        if item < self.begin or item in self._beyond:
            return False
        self._beyond.add(item)
        while self.begin in self._beyond:
            self._beyond.remove(self.begin)
            self.begin += 1
        return True
