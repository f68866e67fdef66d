"""Who is missing, when ranks wait for each other and nothing goes on.

torch's flight recorder notes each collective of a rank as it begins. When nothing new has begun for a while, or a
collective has failed, every rank hands in its notes; the first one compares them and says which rank is missing, from
what, in which step. What ends the run is the collectives' own timeout: this only speaks, before it.

Source: torch's flight recorder tutorial; its notes of gloo leave out messages from one rank to another.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

from dtrain.plan import Plan
from dtrain.train import FIGURES

PATIENCE = 0.5  # of the collectives' timeout: without anything new, until ranks hand in their notes
ANSWER = 0.25  # of it, at most this and ANSWER_S: how long the first rank waits for the notes of others
ANSWER_S = 10.0


@dataclass(frozen=True)
class Note:
    """A collective that a rank has begun: its number in its group, what it is, the rank's step, and is it under way?"""

    number: int
    what: str
    step: int
    pending: bool = False


@dataclass(frozen=True)
class Notes:
    """What a rank hands in: its step, and its collectives by group."""

    step: int
    groups: dict[str, list[Note]]


def missing(notes: Mapping[int, Notes], groups: Mapping[str, tuple[str, Sequence[int]]]) -> str:
    """The first collective in which the ranks of a group are not all together, in words; empty: there is none.

    Args:
        notes: of the ranks that have answered.
        groups: by name: the axis, and its ranks.
    """
    found = []
    for name, (axis, ranks) in groups.items():
        theirs = {rank: notes[rank].groups.get(name, []) for rank in ranks if rank in notes}
        told = {rank: {note.number: note for note in those} for rank, those in theirs.items()}
        numbers = sorted({number for those in told.values() for number in those})
        first = max((min(those) for those in told.values() if those), default=0)  # earlier ones may be forgotten
        for number in (n for n in numbers if n >= first):
            here = {rank: those[number] for rank, those in told.items() if number in those}
            kinds = Counter(note.what for note in here.values())
            if len(here) == len(told) and len(kinds) == 1:
                continue
            found.append((min(note.step for note in here.values()), _say(axis, number, told, here, kinds)))
            break
    return min(found)[1] if found else ""


def waiting(notes: Mapping[int, Notes], groups: Mapping[str, tuple[str, Sequence[int]]], silent: Sequence[int]) -> str:
    """The first collective under way in a group of which ranks do not answer, in words; empty: there is none."""
    found: dict[tuple[int, int, str, str], list[int]] = defaultdict(list)
    for name, (axis, ranks) in groups.items():
        for rank in ranks if set(ranks) & set(silent) else ():
            for note in notes[rank].groups.get(name, []) if rank in notes else ():
                if note.pending:
                    found[note.step, note.number, axis, note.what].append(rank)
    if not found:
        return ""
    step, number, axis, what = min(found)
    return f"step {step}, axis {axis}, collective {number}, {what}: {_ranks(min(found.items())[1])} waits in it"


def _ranks(numbers: Iterable[int]) -> str:
    each = sorted(numbers)
    return f"rank{'s' if len(each) > 1 else ''} {', '.join(map(str, each))}"


def _say(axis: str, number: int, told: dict[int, dict[int, Note]], here: dict[int, Note], kinds: Counter[str]) -> str:
    best = max(kinds.values())
    usual = [kind for kind in kinds if kinds[kind] == best]
    if len(usual) > 1:  # as many do one thing as another: right is who did it at this place of the step before, too
        before = {note.what for rank, note in here.items() if _as_before(told[rank], note)}
        usual = [kind for kind in usual if kind in before] or usual
    expected = usual[0]
    together = [rank for rank, note in here.items() if note.what == expected]
    step = min(here[rank].step for rank in together)
    absent = []
    for rank in sorted(told.keys() - set(together)):
        last = max(told[rank].values(), key=lambda note: note.number, default=None)
        begun = f"has begun {last.what} last" if last else "has begun none"
        doing = f"is in {here[rank].what}" if rank in here else begun
        absent.append(f"rank {rank} is missing: it {doing}, in step {last.step if last else 0}")
    where = f"step {step}, axis {axis}, collective {number}, {expected}"
    return f"{where}: {_ranks(together)} waits in it; {'; '.join(absent)}"


def _as_before(own: dict[int, Note], note: Note) -> bool:
    """Did the rank do the same at the same place of the step before?"""

    def sequence(step: int) -> list[int]:
        return sorted(n for n, each in own.items() if each.step == step)

    place, before = sequence(note.step).index(note.number), sequence(note.step - 1)
    return place < len(before) and own[before[place]].what == note.what


class Hang(RuntimeError):
    """A collective has failed: some rank did not take part, or took part in another one."""


class Watch:
    """Looks on, in a thread of its own, while a rank trains. Every rank of the plan has one.

    Args:
        plan: connected.
        timeout_s: of the collectives.
    """

    def __init__(self, plan: Plan, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = dist.get_rank(), dist.get_world_size(), timeout_s
        self._store = dist.distributed_c10d._get_default_store()
        world = dist.group.WORLD
        assert world is not None
        self.groups: dict[str, tuple[str, Sequence[int]]] = {str(world.group_name): ("world", list(range(self.size)))}
        for axis, degree in plan.degrees.items():
            group = plan.mesh[axis].get_group()
            if degree > 1:
                self.groups[str(group.group_name)] = axis, dist.get_process_group_ranks(group)
        self._begun = [(0, time.time_ns())]  # steps, and when
        self._beat = time.monotonic()
        self._end, self._said = threading.Event(), threading.Lock()
        self.finding: str | None = None
        self._thread = threading.Thread(target=self._look, name="hang", daemon=True)

    def __enter__(self) -> Watch:
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
        """Hand in this rank's notes; the first rank that answers compares all and says what it finds, once."""
        with self._said:
            if self.finding is not None:
                return self.finding
            self._store.set(f"hang/{self.rank}", json.dumps(asdict(self._notes())))
            self._store.set("hang/asked", "")
            self.finding = self._compare()
            if self.finding:
                print(f"dtrain: ranks wait for each other: {self.finding}", file=sys.stderr, flush=True)
            return self.finding

    @contextmanager
    def skipping(self, step: int, name: str) -> Iterator[None]:
        """A fault to learn from: in this step the rank stays away from the collectives for figures, and all later ones.

        Were it to go on, its next collective would meet another one of the others', and gloo ends a process in that.
        """
        if name == FIGURES and self._begun[-1][0] == step:
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
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            said = self.explain() or str(error).splitlines()[0]
            raise Hang(f"a collective failed: {said}") from error

    def _look(self) -> None:
        last = -1
        while not self._end.wait(min(1.0, self.timeout_s / 20)):
            if time.monotonic() - self._beat > self.timeout_s * PATIENCE / 2 and last != (last := _newest()):
                self._beat = time.monotonic() - self.timeout_s * PATIENCE / 2  # a long step, in which much happens
            if time.monotonic() - self._beat > self.timeout_s * PATIENCE or self._store.check(["hang/asked"]):
                self.explain()
                return

    def _notes(self) -> Notes:
        groups: dict[str, list[Note]] = defaultdict(list)
        for entry in _entries():
            step = max((number for number, since in self._begun if since <= entry["time_created_ns"]), default=0)
            name = entry["process_group"][0]
            if name in self.groups and not entry["is_p2p"]:
                groups[name].append(Note(entry["collective_seq_id"], _what(entry), step, not entry["retired"]))
        return Notes(self._begun[-1][0], {name: notes[-200:] for name, notes in groups.items()})

    def _compare(self) -> str:
        told: dict[int, Notes] = {}
        deadline = time.monotonic() + min(ANSWER * self.timeout_s, ANSWER_S)
        while len(told) < self.size and time.monotonic() < deadline:
            for rank in set(range(self.size)) - told.keys():
                if self._store.check([f"hang/{rank}"]):
                    told[rank] = _read(self._store.get(f"hang/{rank}"))
            if min(told, default=self.rank) < self.rank:
                return ""  # that one speaks
            time.sleep(0.05)
        silent = sorted(set(range(self.size)) - told.keys())
        gone = f"{_ranks(silent)} does not answer: its process is gone or stopped" if silent else ""
        steps = ", ".join(f"rank {rank} in step {notes.step}" for rank, notes in sorted(told.items()))
        found = missing(told, self.groups) or waiting(told, self.groups, silent) or (steps if silent else "")
        return "; ".join(filter(None, (found, gone))) or f"all ranks have begun the same collectives ({steps})"


def _entries() -> list[dict[str, Any]]:
    return json.loads(_dump_fr_trace_json()).get("entries", [])


def _newest() -> int:
    return max((entry["record_id"] for entry in _entries()), default=-1)


def _what(entry: dict[str, Any]) -> str:
    name = entry["profiling_name"].split(":")[-1]
    shapes = ", ".join("x".join(map(str, size)) or "1" for size in entry["input_sizes"])
    return f"{name} of {shapes} {'/'.join(sorted(set(map(str.lower, entry['input_dtypes']))))}"


def _read(text: bytes) -> Notes:
    told = json.loads(text)
    return Notes(told["step"], {name: [Note(**note) for note in notes] for name, notes in told["groups"].items()})
