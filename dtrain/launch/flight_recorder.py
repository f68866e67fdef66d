"""What ranks note of their collectives, compared: who is missing from which, and what the
others wait in.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

# how the words of a rank begin that has lost another: its launcher looks for them
LOST = "a collective failed"


def collective_failed(error: BaseException) -> bool:
    """Is it what torch and gloo say of a collective that failed, since other ranks are gone or
    late?
    """
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "gloo" in str(error).lower()
    )


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has begun: its number in its group, what it is, the rank's step,
    and is it under way?
    """

    number: int
    what: str
    step: int
    pending: bool = False


@dataclass(frozen=True)
class RankReport:
    """What a rank hands in: its step, and its collectives by group."""

    step: int
    groups: dict[str, list[Collective]]


def missing_from_collective(
    notes: Mapping[int, RankReport], groups: Mapping[str, tuple[str, Sequence[int]]]
) -> str:
    """The first collective in which the ranks of a group are not all together, in words; empty:
    there is none.

    Args:
        notes: of the ranks that have answered.
        groups: by name: the axis, and its ranks.
    """
    found = []
    for name, (axis, ranks) in groups.items():
        theirs = {rank: notes[rank].groups.get(name, []) for rank in ranks if rank in notes}
        told = {rank: {note.number: note for note in those} for rank, those in theirs.items()}
        numbers = sorted({number for those in told.values() for number in those})
        # earlier ones may be forgotten
        first = max((min(those) for those in told.values() if those), default=0)
        for number in (n for n in numbers if n >= first):
            here = {rank: those[number] for rank, those in told.items() if number in those}
            kinds = Counter(note.what for note in here.values())
            if len(here) == len(told) and len(kinds) == 1:
                continue
            found.append(
                (min(note.step for note in here.values()), _say(axis, number, told, here, kinds))
            )
            break
    return min(found)[1] if found else ""


def waiting_in_collective(
    notes: Mapping[int, RankReport],
    groups: Mapping[str, tuple[str, Sequence[int]]],
    silent: Sequence[int],
) -> str:
    """The first collective under way in a group of which ranks do not answer, in words; empty:
    there is none.
    """
    found: dict[tuple[int, int, str, str], list[int]] = defaultdict(list)
    for name, (axis, ranks) in groups.items():
        for rank in ranks if set(ranks) & set(silent) else ():
            for note in notes[rank].groups.get(name, []) if rank in notes else ():
                if note.pending:
                    found[note.step, note.number, axis, note.what].append(rank)
    if not found:
        return ""
    step, number, axis, what = min(found)
    together = min(found.items())[1]
    return (
        f"step {step}, axis {axis}, collective {number}, {what}: "
        f"{ranks_in_words(together, 'waits', 'wait')} in it"
    )


def ranks_in_words(numbers: Iterable[int], one_does: str, several_do: str) -> str:
    """With what they do."""
    each = sorted(numbers)
    return (
        f"rank {each[0]} {one_does}"
        if len(each) == 1
        else f"ranks {', '.join(map(str, each))} {several_do}"
    )


def _say(
    axis: str,
    number: int,
    told: dict[int, dict[int, Collective]],
    here: dict[int, Collective],
    kinds: Counter[str],
) -> str:
    best = max(kinds.values())
    usual = [kind for kind in kinds if kinds[kind] == best]
    # as many do one thing as another: right is who did it at this place of the step before, too
    if len(usual) > 1:
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
    return f"{where}: {ranks_in_words(together, 'waits', 'wait')} in it; {'; '.join(absent)}"


def _as_before(own: dict[int, Collective], note: Collective) -> bool:
    """Did the rank do the same at the same place of the step before?"""

    def sequence(step: int) -> list[int]:
        return sorted(n for n, each in own.items() if each.step == step)

    place, before = sequence(note.step).index(note.number), sequence(note.step - 1)
    return place < len(before) and own[before[place]].what == note.what
