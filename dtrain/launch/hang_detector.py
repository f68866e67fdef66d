"""Who is missing, when ranks wait for each other and nothing goes on.

torch's flight recorders note each collective of a rank as it begins: gloo's one, NCCL's another.
When nothing new has begun for a while, or a collective has failed, every rank hands in its notes;
the first one compares them and says which rank is missing, from what, in which step. What ends the
run is the collectives' own timeout: this only speaks, before it. Where it goes on after all (a
first compilation takes its time), so does the watch: each inquiry has a number.

Source: torch's flight recorder tutorial; its notes of gloo leave out messages from one rank to
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
PATIENCE = 0.5  # of the collectives' timeout: without anything new, until ranks hand in their notes
# of it, at most this and ANSWER_S: how long the first rank waits for the notes of others
ANSWER = 0.25
ANSWER_S = 10.0
# of gloo's collectives, and of NCCL's where there is one
RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
SILENT = (
    "the store of the ranks does not answer: its host is gone or stopped, or the network is cut"
)


def within(seconds: float, ask: Callable[[], T]) -> T | None:
    """What the store answers; None: nothing in time.

    Its calls wait for ever where the network is cut.
    """
    answers: Queue[T | None] = Queue()

    def put() -> None:
        try:
            answers.put(ask())
        except RuntimeError:  # the connection is lost
            answers.put(None)

    threading.Thread(target=put, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except Empty:
        return None


class Hang(RuntimeError):
    """A collective has failed: some rank did not take part, or took part in another one."""


class HangDetector:
    """Looks on, in a thread of its own, while a rank trains. Every rank of the plan has one.

    Args:
        groups: of ranks, by name: the mesh's axis, and its ranks.
        timeout_s: of the collectives.
        messages: do ranks send to each other without collectives? Of those gloo's notes tell
            nothing.
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
        self._begun = [(0, time.time_ns())]  # steps, and when
        self._beat = time.monotonic()
        self._end, self._said = threading.Event(), threading.Lock()
        self._round = 0  # inquiries that are over
        self._asked_at: tuple[int, int] | None = None  # how far this rank was in the last one
        self.finding = ""  # of that one
        self._thread = threading.Thread(target=self._look, name="hang", daemon=True)

    def __enter__(self) -> HangDetector:
        if self.size > 1:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()

    def step(self, number: int) -> None:
        """The rank begins this step."""
        self._begun = [*self._begun[-3:], (number, time.time_ns())]
        self._beat = time.monotonic()

    def explain(self) -> str:
        """Hand in this rank's notes; the first rank that answers compares all and says what it
        finds.

        Once, as long as this rank gets no further.
        """
        with self._said:
            if self._asked_at != (at := self._place()):
                self._asked_at = at
                found = within(self._answer_s + ANSWER_S, self._ask)
                self.finding = SILENT if found is None else found
                self._round += 1
                if self.finding:
                    print(
                        f"dtrain: ranks wait for each other: {self.finding}",
                        file=sys.stderr,
                        flush=True,
                    )
            return self.finding

    def _place(self) -> tuple[int, int]:
        """How far this rank is: its step, and the newest note of its collectives."""
        return self._begun[-1][0], _newest()

    def _ask(self) -> str:
        key = f"hang/{self._round}"
        if self._store.check([f"{key}/over"]):
            return ""  # while this rank was busy; its notes are of another time
        self._store.set(f"{key}/{self.rank}", json.dumps(asdict(self._notes())))
        self._store.set(f"{key}/asked", "")
        if found := self._compare(key):  # this rank speaks for all
            self._store.set(f"{key}/over", "")
        return found

    @contextmanager
    def skipping(self, step: int) -> Iterator[None]:
        """A fault to learn from: from this step on the rank stays away from the phase in which this
        is entered.

        Were it to go on, its next collective would meet another one of the others', and gloo ends a
        process in that.
        """
        if self._begun[-1][0] == step:
            threading.Event().wait()  # until the launcher ends this process
        yield

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Give the error of a failed collective its reason.

        Raises:
            Hang: in place of what torch and gloo say.
        """
        try:
            yield
        except RuntimeError as error:
            if not collective_failed(error):
                raise
            said = self.explain() or str(error).splitlines()[0]
            raise Hang(f"{LOST}: {said}") from error

    def _look(self) -> None:
        last = -1
        while not self._end.wait(min(1.0, self.timeout_s / 20)):
            if time.monotonic() - self._beat > self.timeout_s * PATIENCE / 2 and last != (
                last := _newest()
            ):
                # a long step, in which much happens
                self._beat = time.monotonic() - self.timeout_s * PATIENCE / 2
            asked = within(
                self.timeout_s, partial(self._store.check, [f"hang/{self._round}/asked"])
            )
            late = (
                time.monotonic() - self._beat > self.timeout_s * PATIENCE
                and self._asked_at != self._place()
            )
            if (
                (late or asked is not False)
                and self._answered() == SILENT
                and not self._end.wait(self.timeout_s)
            ):
                os._exit(1)  # the rank waits for the store, and would for ever

    def _answered(self) -> str:
        """The finding of an inquiry that this rank or another one has begun."""
        if self._asked_at == self._place():  # it was asked before, and has got no further
            self._asked_at = None
        return self.explain()

    def _notes(self) -> RankReport:
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
        told: dict[int, RankReport] = {}
        deadline = time.monotonic() + self._answer_s
        while len(told) < self.size and time.monotonic() < deadline:
            for rank in set(range(self.size)) - told.keys():
                if self._store.check([f"{key}/{rank}"]):
                    told[rank] = _read(self._store.get(f"{key}/{rank}"))
            if min(told, default=self.rank) < self.rank:
                return ""  # that one speaks
            time.sleep(0.05)
        silent = sorted(set(range(self.size)) - told.keys())
        gone = ranks_in_words(
            silent, "does not answer: its process is", "do not answer: their processes are"
        )
        gone = f"{gone} gone or stopped" if silent else ""
        steps = ", ".join(
            f"rank {rank} in step {notes.step}" for rank, notes in sorted(told.items())
        )
        found = (
            missing_from_collective(told, self.groups)
            or waiting_in_collective(told, self.groups, silent)
            or (steps if silent else "")
        )
        if found or gone:
            return "; ".join(filter(None, (found, gone)))
        waits = any(
            note.pending
            for notes in told.values()
            for those in notes.groups.values()
            for note in those
        )
        if not (waits or self._messages):
            return ""  # nobody waits: a first compilation takes its time, or a large checkpoint
        return f"all ranks have begun the same collectives ({steps})"


def _recorded() -> list[list[dict[str, Any]]]:
    """The notes of each recorder that this build of torch has."""
    dumps = [getattr(c10d, name) for name in RECORDERS if hasattr(c10d, name)]
    return [json.loads(dump()).get("entries", []) for dump in dumps]


def _newest() -> int:
    """A number that grows with each collective that begins."""
    return sum(
        max((entry["record_id"] for entry in entries), default=-1) for entries in _recorded()
    )


def _what(entry: dict[str, Any]) -> str:
    name = entry["profiling_name"].split(":")[-1]
    shapes = ", ".join("x".join(map(str, size)) or "1" for size in entry["input_sizes"])
    return f"{name} of {shapes} {'/'.join(sorted(set(map(str.lower, entry['input_dtypes']))))}"


def _read(text: bytes) -> RankReport:
    told = json.loads(text)
    return RankReport(
        told["step"],
        {name: [Collective(**note) for note in notes] for name, notes in told["groups"].items()},
    )
