"""What a comparison found: a row for each case, kept as `results.json` (docs/comparison.md
tells its schema).
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from dtrain.files import json_files
from dtrain.parallel.messages import Message
from dtrain.report.terminal import without_control_characters

SCHEMA = 1
FILE = "results.json"
FIGURES = (
    "tokens_per_second",
    "step_seconds",
    "loss",
    "loss_difference",
    "peak_memory_bytes",
    "memory_bytes",
    "wire_bytes",
    "exposed_share",
    "ranks",
)  # of a row: numbers, or None


@dataclass
class Row:
    """One case's figures, or the reason why there are none.

    Args:
        strategy: its label; unlike every other row's.
        ranks, mesh: how many, and along which axes.
        overrides: what differs from the baseline's configuration.
        command: that runs it alone.
        about, cost, files: the idea, the formulas of each axis, and where it is written; relative
            to the project.
        synchronous: should its losses be the reference's?
        reference: the row with which its losses are compared; None: nothing trains the same.
        trained: settings of its own that change what is trained.
        reason: why there are no figures, or no more; `failed`: it began and broke off, else it is
            not possible here.
        losses, loss: of every step, and the last, in the first repeat.
        loss_difference: the greatest from the reference's, over all steps.
        repeats: for each: `step_seconds` of every undisturbed step; `usual`, their median, or their
            mean of what is not synchronous; `tokens_per_second` at that; and `seconds` in all.
        tokens_per_second, step_seconds: medians over the repeats.
        peak_memory_bytes: the process's, of the rank with most.
        memory: of each rank, by kind: `most`, `at_peak`, `predicted`, in bytes of tensors.
        memory_bytes: of tensors at the step's peak, on the rank with most.
        traffic, traffic_predicted: of each rank, a step's messages by axis and collective.
        wire_bytes: that leave the rank that sends most in a step, where ranks stand in a ring. Of
            what is not synchronous, traffic is rank 0's alone, and the mean over the steps.
        seconds: from the start to the end of every step, in the first repeat; of the first steps,
            which instruments disturb, as if they had taken the median of the others.
        time: of each rank, the shares of one step; exposed_share: of exposed communication, mean
            over the ranks.
        bubble: a pipeline's, measured and in theory.
        asynchronous: a parameter server's updates, staleness, and what each worker did.
    """

    strategy: str
    ranks: int
    mesh: dict[str, int] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    command: str = ""
    about: str = ""
    trained: list[str] = field(default_factory=list)
    cost: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    synchronous: bool = True
    reference: str | None = None
    reason: str = ""
    failed: bool = False
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: float | None = None
    loss_difference: float | None = None
    repeats: list[dict[str, Any]] = field(default_factory=list)
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    peak_memory_bytes: int | None = None
    memory: list[dict[str, Any]] = field(default_factory=list)
    memory_bytes: int | None = None
    traffic: list[list[dict[str, Any]]] = field(default_factory=list)
    traffic_predicted: list[list[dict[str, Any]] | None] = field(default_factory=list)
    wire_bytes: float | None = None
    time: list[dict[str, float]] = field(default_factory=list)
    exposed_share: float | None = None
    bubble: dict[str, float] | None = None
    asynchronous: dict[str, Any] | None = None

    @property
    def ran(self) -> bool:
        return bool(self.repeats)

    @property
    def fullest(self) -> dict[str, Any]:
        """The memory by kind of the rank that holds most; empty where it was not followed."""
        return max(
            self.memory,
            key=lambda kinds: sum(kind["most"] or 0 for kind in kinds.values()),
            default={},
        )

    @property
    def busiest(self) -> int:
        """The rank that sends most."""
        sums = [sum(message["wire_bytes"] for message in messages) for messages in self.traffic]
        return sums.index(max(sums))

    def add(
        self, summary: dict[str, Any], steps: list[dict[str, Any]], first: int, seconds: float
    ) -> None:
        """Take up one more repeat: its summary, its lines of `metrics.jsonl`, of which those
        from `first` are timed.
        """
        timed = [line["step_seconds"] for line in steps if line["step"] > first]
        # a median would leave out what is seldom
        usual = median(timed) if summary["synchronous"] else mean(timed)
        if not self.ran:
            self._take(summary, steps)
            self.seconds = list(
                accumulate(
                    line["step_seconds"] if line["step"] > first else usual for line in steps
                )
            )
        rate = summary["tokens"] / summary["steps"] / usual
        self.repeats.append(
            {"tokens_per_second": rate, "step_seconds": timed, "usual": usual, "seconds": seconds}
        )
        self.tokens_per_second = median(each["tokens_per_second"] for each in self.repeats)
        self.step_seconds = median(each["usual"] for each in self.repeats)

    def _take(self, summary: dict[str, Any], steps: list[dict[str, Any]]) -> None:
        """What one repeat tells as well as several."""
        self.losses, self.loss = [line["loss"] for line in steps], summary["loss"]
        self.synchronous = summary["synchronous"]
        self.ranks, self.mesh = summary["world_size"], summary["mesh"]
        self.peak_memory_bytes = summary["peak_memory_bytes"]
        profile = summary["profile"]
        self.bubble, ranks = profile["bubble"], profile["ranks"]
        self.memory = [rank["memory"]["kinds"] for rank in ranks if rank["memory"]]
        self.memory_bytes = max(
            (rank["memory"]["peak"] for rank in ranks if rank["memory"]), default=None
        )
        self.asynchronous = profile.get("asynchronous")
        self.traffic = [rank["traffic"] for rank in ranks]
        if not self.synchronous and not self.asynchronous:
            self.traffic = [_mean_traffic(steps, self.mesh)]
        self.traffic_predicted = [rank["traffic_predicted"] for rank in ranks][: len(self.traffic)]
        self.wire_bytes = sum(message["wire_bytes"] for message in self.traffic[self.busiest])
        self.time = [rank["time"] for rank in ranks if rank["time"]]
        if self.time and self.synchronous:  # of one step, which tells nothing where steps differ
            self.exposed_share = mean(rank["exposed"] / rank["step"] for rank in self.time)

    def compare(self, reference: Row | None) -> None:
        """Hold the losses against the reference's."""
        if reference and reference.ran and self.ran:
            self.reference = reference.strategy
            self.loss_difference = max(
                abs(a - b) for a, b in zip(self.losses, reference.losses, strict=True)
            )

    def spread(self) -> tuple[float, float]:
        """The least and the greatest throughput of the repeats."""
        found = [each["tokens_per_second"] for each in self.repeats]
        return min(found), max(found)


def _mean_traffic(steps: list[dict[str, Any]], mesh: dict[str, int]) -> list[dict[str, Any]]:
    """Messages a step, over all steps: of strategies that do not communicate in each."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for line in steps:
        for key, value in line.items():
            axis, _, rest = key.partition("_")
            operation, _, what = rest.rpartition("_")
            if axis in mesh and what in ("calls", "bytes"):
                each = found.setdefault((axis, operation), {"calls": 0.0, "bytes": 0.0})
                each[what] += value / len(steps)
    return [
        {
            "axis": axis,
            "operation": operation,
            "calls": sums["calls"],
            "bytes": round(sums["bytes"]),
            "wire_bytes": Message(axis, operation, 1, round(sums["bytes"])).wire_bytes(mesh[axis]),
        }
        for (axis, operation), sums in sorted(found.items())
    ]


@dataclass
class Results:
    """A whole comparison.

    Args:
        command: that repeats it.
        made: when, in UTC.
        baseline, scaling, world_size, steps, asked: as asked for; `asked` repeats.
        facts: of what is trained, for a person; environment: where.
        seconds: it took, and of these in steps.
        rows: in the order of the runs.
    """

    command: str
    made: str
    baseline: str
    scaling: str
    world_size: int
    steps: int
    asked: int
    facts: dict[str, Any]
    environment: dict[str, Any]
    rows: list[Row]
    seconds: float = 0.0
    schema: int = SCHEMA

    @property
    def ran(self) -> list[Row]:
        return [row for row in self.rows if row.ran]

    @property
    def base(self) -> Row | None:
        return next((row for row in self.ran if row.strategy == self.baseline), None)

    @property
    def comparable(self) -> list[Row]:
        """Rows that compute what the baseline computes, on as many ranks as were asked for, and
        the baseline.
        """
        wide = [row for row in self._alike if row.synchronous and row.ranks <= self.world_size]
        if self.scaling == "weak":
            wide = [row for row in wide if row.ranks == self.world_size]
        rows = [
            row
            for row in self._alike
            if row in wide or (row is self.base and self.scaling == "strong")
        ]
        followed = [row for row in rows if row.memory_bytes]
        return followed or rows  # where no tensors were followed, processes are compared

    @property
    def loose(self) -> list[Row]:
        """Rows that train what the baseline trains, and need not compute the same."""
        return [row for row in self._alike if not row.synchronous]

    @property
    def _alike(self) -> list[Row]:
        return [row for row in self.ran if row.trained == self.rows[0].trained]

    def row(self, strategy: str) -> Row:
        """
        Raises:
            ValueError: there is none, or it did not run.
        """
        for row in self.rows:
            if row.strategy == strategy:
                if not row.ran:
                    raise ValueError(
                        f"{strategy!r} has no figures: {row.reason or 'it was not run'}"
                    )
                return row
        raise ValueError(
            f"{strategy!r} is not in this comparison, of "
            f"{', '.join(row.strategy for row in self.rows)}"
        )

    def write(self, folder: Path) -> None:
        """`results.json`, all of it, and `results.csv`, a line a row."""
        (folder / FILE).write_text(json_files.dumps(asdict(self), indent=1) + "\n")
        with (folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["strategy", *FIGURES, "reference", "reason"])
            for row in self.rows:
                figures = (getattr(row, name) for name in FIGURES)
                table.writerow(
                    [
                        without_control_characters(row.strategy),
                        *figures,
                        without_control_characters(row.reference or ""),
                        without_control_characters(row.reason),
                    ]
                )


def read(folder: Path) -> Results:
    """A comparison's results.

    Raises:
        ValueError: there are none, or of another schema.
    """
    file = folder / FILE if folder.is_dir() else folder
    try:
        found = _shown(json_files.figures(file))
    except OSError:
        raise ValueError(
            f"{folder} has no {FILE}: give a folder that scripts/compare.py has written"
        ) from None
    if found.get("schema") != SCHEMA:
        raise ValueError(
            f"{file} has schema {found.get('schema')}, this version reads {SCHEMA}: make it again"
        )
    try:
        rows = [
            _made(Row, row, f"{file}: row {number}") for number, row in enumerate(found.pop("rows"))
        ]
        return _made(Results, {**found, "rows": rows}, str(file))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not as scripts/compare.py writes it: {type(error).__name__}: {error}"
        ) from None


def _made(kind: Any, given: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    for key, value in given.items():
        rates = (
            [each.get("tokens_per_second") for each in value]
            if key == "repeats" and _fits(value, list[dict])
            else []
        )
        if not _fits(value, hints.get(key, Any)) or not all(
            _fits(rate, float) and rate > 0 for rate in rates
        ):
            raise ValueError(
                f"{where}: {key}={str(value)[:40]} is not what scripts/compare.py writes there"
            )
    return kind(**{key: value for key, value in given.items() if key in hints})


def _fits(value: Any, hint: Any) -> bool:
    """Is it of a field's kind, and each part of a list too?

    Numbers are such as can be reckoned with.
    """
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(each, get_args(hint)[0]) for each in value)
    if type(value) is int and abs(value) >= 1 << 63:
        return False
    return hint is Any or type(value) in (get_origin(hint) or hint, int if hint is float else hint)


def _shown(value: Any) -> Any:
    """Somebody else's texts, fit to be shown."""
    if isinstance(value, dict):
        return {without_control_characters(key): _shown(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_shown(each) for each in value]
    return without_control_characters(value) if isinstance(value, str) else value
