"""Compare what ranks have noted of their collectives: who is missing, and where others wait."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

# How the message of a rank begins that has lost another one: its launcher looks for it.
LOST = "a collective failed"


def collective_failed(error: BaseException) -> bool:
    """Return whether an error is torch's or gloo's for ranks that are gone or late."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "gloo" in str(error).lower()
    )


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has begun.

    Attributes:
        number: in its group.
        what: operation, shapes and types.
        step: of the rank, when it began.
        pending: whether it is not over yet.
    """

    number: int
    what: str
    step: int
    pending: bool = False


@dataclass(frozen=True)
class RankReport:
    """What a rank hands in when it is asked: its step, and its collectives by group."""

    step: int
    groups: dict[str, list[Collective]]


def missing_from_collective(
    reports: Mapping[int, RankReport], groups: Mapping[str, tuple[str, Sequence[int]]]
) -> str:
    """Return in words the first collective that not all ranks of a group are in; empty: none.

    Args:
        reports: of the ranks that have answered.
        groups: by name: the axis, and its ranks.
    """
    differences = []
    for name, (axis, ranks) in groups.items():
        begun = {
            rank: {each.number: each for each in reports[rank].groups.get(name, [])}
            for rank in ranks
            if rank in reports
        }
        numbers = sorted({number for own in begun.values() for number in own})
        # A recorder forgets its earliest notes.
        oldest = max((min(own) for own in begun.values() if own), default=0)
        for number in (n for n in numbers if n >= oldest):
            inside = {rank: own[number] for rank, own in begun.items() if number in own}
            kinds = Counter(each.what for each in inside.values())
            if len(inside) == len(begun) and len(kinds) == 1:
                continue
            step = min(each.step for each in inside.values())
            differences.append((step, _difference(axis, number, begun, inside, kinds)))
            break
    return min(differences)[1] if differences else ""


def waiting_in_collective(
    reports: Mapping[int, RankReport],
    groups: Mapping[str, tuple[str, Sequence[int]]],
    silent: Sequence[int],
) -> str:
    """Return in words the first pending collective of a group with silent ranks; empty: none.

    Args:
        silent: ranks that do not answer.
    """
    pending: dict[tuple[int, int, str, str], list[int]] = defaultdict(list)
    for name, (axis, ranks) in groups.items():
        if not set(ranks) & set(silent):
            continue
        for rank in (rank for rank in ranks if rank in reports):
            for each in reports[rank].groups.get(name, []):
                if each.pending:
                    pending[each.step, each.number, axis, each.what].append(rank)
    if not pending:
        return ""
    (step, number, axis, what), waiting = min(pending.items())
    return (
        f"step {step}, axis {axis}, collective {number}, {what}: "
        f"{ranks_in_words(waiting, 'waits', 'wait')} in it"
    )


def ranks_in_words(ranks: Iterable[int], one_does: str, several_do: str) -> str:
    """Return ranks with what they do: "rank 1 waits", "ranks 1, 2 wait"."""
    numbers = sorted(ranks)
    if len(numbers) == 1:
        return f"rank {numbers[0]} {one_does}"
    return f"ranks {', '.join(map(str, numbers))} {several_do}"


def _difference(
    axis: str,
    number: int,
    begun: dict[int, dict[int, Collective]],
    inside: dict[int, Collective],
    kinds: Counter[str],
) -> str:
    """Say which ranks wait in a collective, and which are missing from it.

    Args:
        begun: by rank, its collectives by number.
        inside: by rank, the collective of this number.
        kinds: how many ranks are in which kind of collective.
    """
    best = max(kinds.values())
    usual = [kind for kind in kinds if kinds[kind] == best]
    # In a draw those are right who did the same at this place of the step before.
    if len(usual) > 1:
        before = {each.what for rank, each in inside.items() if _as_before(begun[rank], each)}
        usual = [kind for kind in usual if kind in before] or usual
    expected = usual[0]
    waiting = [rank for rank, each in inside.items() if each.what == expected]
    step = min(inside[rank].step for rank in waiting)
    missing = []
    for rank in sorted(begun.keys() - set(waiting)):
        last = max(begun[rank].values(), key=lambda each: each.number, default=None)
        doing = f"has begun {last.what} last" if last else "has begun none"
        if rank in inside:
            doing = f"is in {inside[rank].what}"
        missing.append(f"rank {rank} is missing: it {doing}, in step {last.step if last else 0}")
    where = f"step {step}, axis {axis}, collective {number}, {expected}"
    return f"{where}: {ranks_in_words(waiting, 'waits', 'wait')} in it; {'; '.join(missing)}"


def _as_before(own: dict[int, Collective], collective: Collective) -> bool:
    """Return whether the rank did the same at the same place of the step before."""

    def numbers(step: int) -> list[int]:
        return sorted(number for number, each in own.items() if each.step == step)

    place, before = numbers(collective.step).index(collective.number), numbers(collective.step - 1)
    return place < len(before) and own[before[place]].what == collective.what
