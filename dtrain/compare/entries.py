"""What a comparison runs: entries such as `ddp`, `replicate+fsdp` or `expert model.n_experts=8`."""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import dataclass, replace

from dtrain.config.override import parsed, setting
from dtrain.config.secret import masked_override

RANKS, ROWS = "launch.nproc", "global_batch_size"
OWN = ("strategy", "launch")  # settings that leave the model, the data and the steps as they are


@dataclass(frozen=True)
class Entry:
    """A strategy, or several joined by `+`, and its own settings.

    Args:
        strategy: names of `configs/strategy`.
        settings: overrides for this entry alone, as `key=value`.
    """

    strategy: str
    settings: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> Entry:
        """Read an entry from one line.

        Raises:
            ValueError: it does not begin with a strategy, or goes on with no `key=value`.
        """
        strategy, *settings = shlex.split(text) or [""]
        if not strategy or "=" in strategy:
            raise ValueError(f"strategies: {text!r} must begin with a strategy's name")
        for word in settings:
            if "=" not in word:
                raise ValueError(f"strategies: {word!r} of {text!r} must be key=value")
        settings = [word if parsed(word) else setting(*word.split("=", 1)) for word in settings]
        return cls(strategy, tuple(settings))

    @property
    def label(self) -> str:
        """Its name: the strategy, and the settings by the last part of their keys."""
        words = [self.strategy]
        for override in self.settings:
            if not override.startswith(f"{RANKS}="):
                key, _, value = masked_override(override).rpartition("=")
                words.append(f"{key.lstrip('+').rsplit('.', 1)[-1]}={value}")
        return " ".join(words)

    @property
    def overrides(self) -> list[str]:
        """Its settings for Hydra."""
        names = self.strategy.split("+")
        chosen = self.strategy if len(names) == 1 else f"[{','.join(names)}]"
        return [f"strategy={chosen}", *self.settings]

    @property
    def trained(self) -> tuple[str, ...]:
        """The settings that change what is trained; runs that share them have one loss curve."""
        return tuple(
            s for s in self.settings if s.lstrip("+").split("=")[0].split(".")[0] not in OWN
        )

    def number(self, key: str) -> int | None:
        """Return its own value of a setting such as its ranks, if it has one."""
        values = [word.split("=")[1] for word in self.settings if word.startswith(f"{key}=")]
        return int(values[-1]) if values else None


@dataclass(frozen=True)
class Case:
    """An entry on a number of ranks.

    Args:
        entry: what is run.
        ranks: how many.
        rows: of the global batch.
        label: a name that no other case of the comparison has.
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
        """Return a folder's name that no other label gets."""
        name = re.sub(r"[^\w.+=,@-]+", "_", label)[:80]
        if name == label.replace(" ", "_"):
            return name
        return f"{name}-{hashlib.sha1(label.encode()).hexdigest()[:8]}"

    @property
    def overrides(self) -> list[str]:
        return [*self.entry.overrides, f"{RANKS}={self.ranks}", f"{ROWS}={self.rows}"]

    def trains_the_same(self, other: Case) -> bool:
        """Return whether both should have one loss curve."""
        return (self.entry.trained, self.rows) == (other.entry.trained, other.rows)


def cases_of(
    strategies: list[str], baseline: str, world_sizes: list[int], rows: int, scaling: str
) -> list[Case]:
    """Return a case for every entry and world size, after a baseline of the same settings.

    Args:
        strategies, baseline: entries.
        world_sizes: of entries that have no `launch.nproc` of their own; `single` is always on one.
        rows: of the global batch.
        scaling: whether these are the rows in all (strong) or those of each rank (weak).
    """
    entries = [Entry.of(text) for text in strategies]
    first = Entry.of(baseline)
    kinds = list(dict.fromkeys(entry.trained for entry in entries)) or [()]
    baselines = [
        Entry(first.strategy, tuple(dict.fromkeys((*first.settings, *kind)))) for kind in kinds
    ]
    entries = list(dict.fromkeys([*baselines, *entries]))
    entries.sort(key=lambda entry: kinds.index(entry.trained) if entry.trained in kinds else -1)
    cases: dict[str, Case] = {}
    for entry in entries:
        own_ranks = _own_ranks(entry, world_sizes)
        for ranks in [own_ranks] if own_ranks else world_sizes:
            own_rows = entry.number(ROWS) or (rows * ranks if scaling == "weak" else rows)
            numbered = f"{entry.label} @{ranks}"
            case = Case(entry, ranks, own_rows, entry.label if own_ranks else numbered)
            whole = f"{entry.strategy} {' '.join(map(masked_override, entry.settings))} @{ranks}"
            for label in (numbered, whole, f"{whole} ({len(cases)})"):
                if case.label in cases and cases[case.label] != case:  # another case has the label
                    case = replace(case, label=label)
            cases[case.label] = case
    return list(cases.values())


def _own_ranks(entry: Entry, world_sizes: list[int]) -> int | None:
    """Return the one world size of an entry; None: it is run on all of them."""
    if entry.strategy == "single":
        return 1
    return entry.number(RANKS) or (world_sizes[0] if len(world_sizes) == 1 else None)
