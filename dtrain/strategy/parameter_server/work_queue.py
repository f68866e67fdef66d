"""What a parameter server knows of its workers: who computes which gradient, and who has to wait.

No tensors and no sockets are here. The work of a run is a list of items: item i is part i mod W of
round i div W, and a round is one update of one global batch. A worker asks for an item, computes
its gradient on the weights of that moment, and hands it in.

    sync      an item is given out when all rounds before its own are finished
    bounded   ... when the worker is at most `bound` items ahead of the slowest
    async     ... at once

A worker that dies gives its item back; the next one that asks gets it. So each item is finished
once, whoever lives. Source: Ho et al. 2013, "More Effective Distributed ML via a Stale Synchronous
Parallel Parameter Server".
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
        total: items of the run; `begin`: the first one that is left to do.
        parts: items of a round, W.
        mode: one of MODES.
        bound: items that a worker may be ahead of the slowest, in `bounded`.
    """

    total: int
    parts: int
    mode: str = ASYNC
    bound: int = 0
    begin: int = 0
    finished: int = field(init=False)
    clocks: dict[int, int] = field(default_factory=dict)  # of the workers alive: items handed in
    given: dict[int, int] = field(default_factory=dict)  # which item each is at
    widest: int = 0  # the greatest distance between two clocks at which an item was given out
    _next: int = field(init=False)
    _back: list[int] = field(default_factory=list)  # items that were given back

    def __post_init__(self) -> None:
        self._next = self.finished = self.begin

    @property
    def done(self) -> bool:
        return self.finished >= self.total

    def join(self, worker: int) -> None:
        """A worker, new or come back: it begins with the slowest, so that nobody waits for what
        it has missed.
        """
        self.clocks[worker] = min(self.clocks.values(), default=0)

    def leave(self, worker: int) -> None:
        """It is gone, and its item is to be given out again."""
        self.clocks.pop(worker, None)
        if (item := self.given.pop(worker, None)) is not None:
            heapq.heappush(self._back, item)

    def take(self, worker: int) -> int | None:
        """An item for the worker; None: it has to wait, or (`done`) there is nothing more to do."""
        item = self._back[0] if self._back else self._next
        if item >= self.total:
            return None  # but one that is out may come back
        if self.mode == SYNC and item // self.parts > self.finished // self.parts:
            return None
        ahead = self.clocks[worker] - min(self.clocks.values())
        if self.mode == BOUNDED and ahead > self.bound:
            return None
        if self._back:
            heapq.heappop(self._back)
        else:
            self._next += 1
        self.given[worker] = item
        self.widest = max(self.widest, ahead)
        return item

    def hand_in(self, worker: int) -> None:
        """The worker's item is finished."""
        del self.given[worker]
        self.clocks[worker] += 1
        self.finished += 1


@dataclass
class SeenItems:
    """Which items a server has taken: one that a worker computed again, when another had died,
    comes twice.
    """

    begin: int = 0  # all before it are taken
    _beyond: set[int] = field(default_factory=set)

    def first(self, item: int) -> bool:
        """Take the item; False: it was taken before."""
        if item < self.begin or item in self._beyond:
            return False
        self._beyond.add(item)
        while self.begin in self._beyond:
            self._beyond.remove(self.begin)
            self.begin += 1
        return True
