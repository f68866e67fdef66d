"""What a comparison is asked to run: entries such as `ddp`, `replicate+fsdp` or `pipeline
strategy.pp.schedule=zbv`.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dtrain.config.override import parsed, setting
from dtrain.config.secret import masked_override

RANKS, ROWS = "launch.nproc", "global_batch_size"
OWN = ("strategy", "launch")  # settings that leave the model, the data and the steps as they are


@dataclass(frozen=True)
class Entry:
    """A strategy, or several joined by `+`, with settings of its own.

    Args:
        strategy: names of `configs/strategy`.
        settings: overrides of this entry alone, as `key=value`.
    """

    strategy: str
    settings: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> Entry:
        """From one line.

        Raises:
            ValueError: something after the strategy that is no `key=value`.
        """
        strategy, *settings = shlex.split(text) or [""]
        if not strategy or "=" in strategy:
            raise ValueError(f"strategies: {text!r} must begin with a strategy's name")
        for each in settings:
            if "=" not in each:
                raise ValueError(f"strategies: {each!r} of {text!r} must be key=value")
        return cls(
            strategy,
            tuple(each if parsed(each) else setting(*each.split("=", 1)) for each in settings),
        )

    @property
    def label(self) -> str:
        """What it is called: the strategy, and the settings by the last part of their keys."""
        shown = [
            masked_override(each).rpartition("=")
            for each in self.settings
            if not each.startswith(f"{RANKS}=")
        ]
        return " ".join(
            [
                self.strategy,
                *(f"{key.lstrip('+').rsplit('.', 1)[-1]}={value}" for key, _, value in shown),
            ]
        )

    @property
    def overrides(self) -> list[str]:
        """For Hydra."""
        names = self.strategy.split("+")
        return [
            f"strategy={self.strategy if len(names) == 1 else '[' + ','.join(names) + ']'}",
            *self.settings,
        ]

    @property
    def trained(self) -> tuple[str, ...]:
        """The settings that change what is trained: only runs that share them have one loss
        curve.
        """
        return tuple(
            s for s in self.settings if s.lstrip("+").split("=")[0].split(".")[0] not in OWN
        )

    def number(self, key: str) -> int | None:
        """What it says itself of a setting such as its ranks, whatever the others have."""
        asked = [
            setting.split("=")[1] for setting in self.settings if setting.startswith(f"{key}=")
        ]
        return int(asked[-1]) if asked else None


@dataclass(frozen=True)
class Case:
    """An entry on a number of ranks.

    Args:
        entry: what is run.
        ranks: on how many.
        rows: of the global batch.
        label: unlike every other case's of the comparison.
    """

    entry: Entry
    ranks: int
    rows: int
    label: str

    @property
    def folder(self) -> str:
        return self.folder_of(self.label)

    @staticmethod
    def folder_of(label: str) -> str:
        """A folder's name, unlike that of any other label."""
        name = re.sub(r"[^\w.+=,@-]+", "_", label)[:80]
        return (
            name
            if name == label.replace(" ", "_")
            else f"{name}-{hashlib.sha1(label.encode()).hexdigest()[:8]}"
        )

    @property
    def overrides(self) -> list[str]:
        return [*self.entry.overrides, f"{RANKS}={self.ranks}", f"{ROWS}={self.rows}"]

    def trains_the_same(self, other: Case) -> bool:
        """Should both have one loss curve?"""
        return (self.entry.trained, self.rows) == (other.entry.trained, other.rows)


def cases_of(
    strategies: list[str], baseline: str, world_sizes: list[int], rows: int, scaling: str
) -> list[Case]:
    """Every entry on every world size (or on the one it asks for), each kind of training begun by
    its baseline.

    Args:
        strategies, baseline: entries.
        world_sizes: for entries that do not say themselves; `single` is always on one.
        rows: of the global batch.
        scaling: strong: so many rows in all; weak: for each rank.
    """
    first = Entry.of(baseline)
    asked = [Entry.of(text) for text in strategies]
    kinds = dict.fromkeys(entry.trained for entry in asked) or {(): None}
    entries = list(
        dict.fromkeys(
            [
                *(
                    Entry(first.strategy, tuple(dict.fromkeys((*first.settings, *kind))))
                    for kind in kinds
                ),
                *asked,
            ]
        )
    )
    entries.sort(
        key=lambda entry: list(kinds).index(entry.trained) if entry.trained in kinds else -1
    )
    found: dict[str, Case] = {}
    for entry, ranks in _placed(entries, world_sizes):
        own = entry.number(ROWS) or (rows * ranks if scaling == "weak" else rows)
        case = Case(
            entry,
            ranks,
            own,
            entry.label if ranks == _only(entry, world_sizes) else f"{entry.label} @{ranks}",
        )
        whole = f"{entry.strategy} {' '.join(map(masked_override, entry.settings))} @{ranks}"
        for label in (f"{entry.label} @{ranks}", whole, f"{whole} ({len(found)})"):
            if case.label in found and found[case.label] != case:  # unlike every other
                case = replace(case, label=label)
        found[case.label] = case
    return list(found.values())


def _placed(entries: Iterable[Entry], world_sizes: list[int]) -> Iterator[tuple[Entry, int]]:
    for entry in entries:
        only = _only(entry, world_sizes)
        yield from ((entry, ranks) for ranks in ([only] if only else world_sizes))


def _only(entry: Entry, world_sizes: list[int]) -> int | None:
    """The one world size that an entry is run on, if there is one."""
    if entry.strategy == "single":
        return 1
    return entry.number(RANKS) or (world_sizes[0] if len(world_sizes) == 1 else None)
