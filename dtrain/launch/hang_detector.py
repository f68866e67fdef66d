"""Say who is missing when ranks wait for each other and nothing goes on.

torch's flight recorders, one for gloo and one for NCCL, note each collective of a rank as it
begins. When nothing new has begun for a while, or a collective has failed, every rank hands in its
notes over the store. The lowest rank that answers compares them and says which rank is missing,
from what, in which step. It does not end the run: the timeout of the collectives does, later. It
ends its own process only where the store does not answer. Where the run goes on after all (a first
compilation takes its time), watching goes on too: each inquiry has a number.

Source: torch's flight recorder tutorial. Its notes of gloo leave out messages from one rank to
another.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import chain
from queue import Empty, Queue
from typing import Any, TypeVar

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from dtrain.launch.flight_recorder import (
    LOST,
    Collective,
    RankReport,
    collective_failed,
    missing_from_collective,
    ranks_in_words,
    waiting_in_collective,
)

T = TypeVar("T")
# Parts of the collectives' timeout: how long nothing new may begin until ranks hand in their notes,
# and how long the first rank waits for the notes of others, ANSWER_S at most.
PATIENCE, ANSWER, ANSWER_S = 0.5, 0.25, 10.0
# Of gloo's collectives; of NCCL's, where torch has it.
RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
SILENT = (
    "the store of the ranks does not answer: its host is gone or stopped, or the network is cut"
)


def within(seconds: float, ask: Callable[[], T]) -> T | None:
    """Return what `ask` returns; None: nothing in time, or the connection is lost.

    Calls of the store wait for ever where the network is cut.
    """
    answers: Queue[T | None] = Queue()

    def put() -> None:
        try:
            answers.put(ask())
        except RuntimeError:
            answers.put(None)

    threading.Thread(target=put, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except Empty:
        return None


class Hang(RuntimeError):
    """A collective has failed: a rank did not take part, or took part in another one."""


class HangDetector:
    """Watch, in a thread of its own, while a rank trains. Every rank of the plan has one.

    Args:
        groups: of ranks, by name: the mesh's axis, and its ranks.
        timeout_s: of the collectives.
        messages: whether ranks also send to each other without collectives, which gloo's recorder
            does not note.
    """

    def __init__(
        self,
        groups: Mapping[str, tuple[str, Sequence[int]]],
        timeout_s: float,
        *,
        messages: bool = False,
    ) -> None:
        self.rank, self.size, self.timeout_s = dist.get_rank(), dist.get_world_size(), timeout_s
        self._store = dist.distributed_c10d._get_default_store()
        self._answer_s = min(ANSWER * timeout_s, ANSWER_S)
        world = dist.group.WORLD
        assert world is not None
        self.groups = {str(world.group_name): ("world", list(range(self.size))), **groups}
        self._messages = messages
        self._begun = [(0, time.time_ns())]  # the last steps, and when each began
        self._beat = time.monotonic()  # when something was new
        self._end, self._one_inquiry = threading.Event(), threading.Lock()
        self._round = 0  # inquiries that are over
        self._asked_at: tuple[int, int] | None = None  # how far this rank was in the last inquiry
        self.finding = ""  # of the last inquiry
        self._thread = threading.Thread(target=self._watch, name="hang", daemon=True)

    def __enter__(self) -> HangDetector:
        if self.size > 1:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()

    def step(self, number: int) -> None:
        """Note that the rank begins this step."""
        self._begun = [*self._begun[-3:], (number, time.time_ns())]
        self._beat = time.monotonic()

    def explain(self) -> str:
        """Hand in this rank's notes; return the finding where this rank is the one that prints it.

        It asks once, as long as this rank gets no further.
        """
        with self._one_inquiry:
            if self._asked_at != (at := self._place()):
                self._asked_at = at
                finding = within(self._answer_s + ANSWER_S, self._inquire)
                self.finding = SILENT if finding is None else finding
                self._round += 1
                if self.finding:
                    print(
                        f"dtrain: ranks wait for each other: {self.finding}",
                        file=sys.stderr,
                        flush=True,
                    )
            return self.finding

    def _place(self) -> tuple[int, int]:
        """Return how far this rank is: its step, and its newest note of a collective."""
        return self._begun[-1][0], _newest()

    def _inquire(self) -> str:
        """Hand in this rank's report; return a finding if this rank is the one that speaks."""
        key = f"hang/{self._round}"
        if self._store.check([f"{key}/over"]):
            return ""  # while this rank was busy; its notes are of another time
        self._store.set(f"{key}/{self.rank}", json.dumps(asdict(self._report())))
        self._store.set(f"{key}/asked", "")
        if finding := self._compare(key):
            self._store.set(f"{key}/over", "")
        return finding

    @contextmanager
    def stuck_in(self, step: int) -> Iterator[None]:
        """Inject a fault: wait for ever in this step, instead of entering a phase of it.

        If the rank went on, its next collective would meet another one of the other ranks, and
        gloo ends a process for that.
        """
        if self._begun[-1][0] == step:
            threading.Event().wait()  # until the launcher ends this process
        yield

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Raise a Hang with the reason, in place of torch's error of a failed collective."""
        try:
            yield
        except RuntimeError as error:
            if not collective_failed(error):
                raise
            reason = self.explain() or str(error).splitlines()[0]
            raise Hang(f"{LOST}: {reason}") from error

    def _watch(self) -> None:
        patience, newest = self.timeout_s * PATIENCE, -1
        while not self._end.wait(min(1.0, self.timeout_s / 20)):
            if time.monotonic() - self._beat > patience / 2 and newest != (newest := _newest()):
                # a long step, in which collectives begin
                self._beat = time.monotonic() - patience / 2
            # None: the store does not answer.
            asked = within(
                self.timeout_s, partial(self._store.check, [f"hang/{self._round}/asked"])
            )
            late = time.monotonic() - self._beat > patience and self._asked_at != self._place()
            if not late and asked is False:
                continue
            if self._asked_at == self._place():  # in an earlier inquiry: ask again
                self._asked_at = None
            if self.explain() == SILENT and not self._end.wait(self.timeout_s):
                os._exit(1)  # the rank waits for the store, and would for ever

    def _report(self) -> RankReport:
        groups: dict[str, list[Collective]] = defaultdict(list)
        for entry in chain.from_iterable(_recorded()):
            step = max(
                (number for number, since in self._begun if since <= entry["time_created_ns"]),
                default=0,
            )
            name = entry["process_group"][0]
            if name in self.groups and not entry["is_p2p"]:
                groups[name].append(
                    Collective(entry["collective_seq_id"], _what(entry), step, not entry["retired"])
                )
        return RankReport(
            self._begun[-1][0], {name: notes[-200:] for name, notes in groups.items()}
        )

    def _compare(self, key: str) -> str:
        """Return what all reports say together; empty: a lower rank speaks, or nobody waits."""
        reports: dict[int, RankReport] = {}
        deadline = time.monotonic() + self._answer_s
        while len(reports) < self.size and time.monotonic() < deadline:
            for rank in set(range(self.size)) - reports.keys():
                if self._store.check([f"{key}/{rank}"]):
                    reports[rank] = _read(self._store.get(f"{key}/{rank}"))
            if min(reports, default=self.rank) < self.rank:
                return ""  # that one speaks
            time.sleep(0.05)
        silent = sorted(set(range(self.size)) - reports.keys())
        gone = ranks_in_words(
            silent, "does not answer: its process is", "do not answer: their processes are"
        )
        gone = f"{gone} gone or stopped" if silent else ""
        steps = ", ".join(f"rank {rank} in step {reports[rank].step}" for rank in sorted(reports))
        missing = (
            missing_from_collective(reports, self.groups)
            or waiting_in_collective(reports, self.groups, silent)
            or (steps if silent else "")
        )
        if missing or gone:
            return "; ".join(filter(None, (missing, gone)))
        groups = chain.from_iterable(report.groups.values() for report in reports.values())
        waits = any(each.pending for each in chain.from_iterable(groups))
        if not (waits or self._messages):
            return ""  # nobody waits: a first compilation takes its time, or a large checkpoint
        return f"all ranks have begun the same collectives ({steps})"


def _recorded() -> list[list[dict[str, Any]]]:
    """Return the notes of each recorder that this build of torch has."""
    dumps = [getattr(c10d, name) for name in RECORDERS if hasattr(c10d, name)]
    return [json.loads(dump()).get("entries", []) for dump in dumps]


def _newest() -> int:
    """Return a number that grows with each collective that begins."""
    return sum(
        max((entry["record_id"] for entry in entries), default=-1) for entries in _recorded()
    )


def _what(entry: dict[str, Any]) -> str:
    """Return a collective's operation, shapes and types: `all_reduce of 3x4, 1 float`."""
    name = entry["profiling_name"].split(":")[-1]
    shapes = ", ".join("x".join(map(str, size)) or "1" for size in entry["input_sizes"])
    return f"{name} of {shapes} {'/'.join(sorted(set(map(str.lower, entry['input_dtypes']))))}"


def _read(text: bytes) -> RankReport:
    report = json.loads(text)
    return RankReport(
        report["step"],
        {name: [Collective(**note) for note in notes] for name, notes in report["groups"].items()},
    )
