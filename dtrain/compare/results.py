"""A comparison's figures, a row for each case, kept as `results.json` (docs/comparison.md)."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from dtrain.files import json_files
from dtrain.parallel.messages import Message
from dtrain.report.terminal import without_control_characters

SCHEMA = 1
FILE = "results.json"
T = TypeVar("T")
FIGURES = (  # of a row: numbers, or None
    "tokens_per_second",
    "step_seconds",
    "loss",
    "loss_difference",
    "peak_memory_bytes",
    "memory_bytes",
    "wire_bytes",
    "exposed_share",
    "ranks",
)


@dataclass
class Row:
    """One case's figures, or the reason why there are none.

    Args:
        strategy: its label, which no other row has.
        ranks: how many.
        mesh: ranks along each axis.
        overrides: the settings in which it differs from the baseline.
        command: the command that runs it alone.
        about: the idea.
        cost: the formulas of each axis.
        files: where it is written, relative to the project.
        synchronous: whether its losses should be the reference's.
        reference: the row with which its losses are compared; None: nothing trains the same.
        trained: its own settings that change what is trained.
        reason: why there are no figures, or no more.
        failed: it began and broke off; else it is not possible here.
        losses: of every step of the first repeat.
        loss: of the last step of the first repeat.
        loss_difference: the greatest from the reference's, over all steps.
        repeats: for each: `step_seconds` of every undisturbed step; `usual`, their median (their
            mean if not synchronous); `tokens_per_second` at that; and `seconds` in all.
        tokens_per_second, step_seconds: medians over the repeats.
        peak_memory_bytes: of the process with most, in the first repeat.
        memory: of each rank, by kind: `most`, `at_peak`, `predicted`, in bytes of tensors.
        memory_bytes: of tensors at the step's peak, on the rank with most.
        traffic, traffic_predicted: of each rank, a step's messages by axis and collective. If not
            synchronous, traffic is rank 0's alone, and the mean over the steps.
        wire_bytes: those that the busiest rank sends in a step, in a ring.
        seconds: from the start to the end of every step, in the first repeat. The first steps,
            which instruments disturb, count as the median of the others.
        time: of each rank, the shares of one step.
        exposed_share: of exposed communication in that step, the mean over the ranks.
        bubble: a pipeline's, measured and in theory.
        asynchronous: a parameter server's updates, its staleness, and each worker's times.
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
        """The memory by kind of the rank that holds most; empty if it was not followed."""
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
        self, summary: dict[str, Any], steps: list[dict[str, Any]], untimed: int, seconds: float
    ) -> None:
        """Add one more repeat.

        Args:
            steps: its lines of `metrics.jsonl`.
            untimed: how many of these, at the begin, do not count in the times.
            seconds: that it took in all.
        """
        timed = [line["step_seconds"] for line in steps if line["step"] > untimed]
        # a median would leave out what is seldom
        usual = median(timed) if summary["synchronous"] else mean(timed)
        if not self.ran:
            self._add_first(summary, steps)
            self.seconds = [*accumulate([usual] * (len(steps) - len(timed)) + timed)]
        rate = summary["tokens"] / summary["steps"] / usual
        self.repeats.append(
            {"tokens_per_second": rate, "step_seconds": timed, "usual": usual, "seconds": seconds}
        )
        self.tokens_per_second = median(each["tokens_per_second"] for each in self.repeats)
        self.step_seconds = median(each["usual"] for each in self.repeats)

    def _add_first(self, summary: dict[str, Any], steps: list[dict[str, Any]]) -> None:
        """Add what is the same in every repeat."""
        self.losses = [line["loss"] for line in steps]
        self.loss = summary["loss"]
        self.synchronous = summary["synchronous"]
        self.ranks = summary["world_size"]
        self.mesh = summary["mesh"]
        self.peak_memory_bytes = summary["peak_memory_bytes"]
        if "profile" not in summary:  # too few steps for that
            self.traffic = [[] for _ in range(self.ranks)]
            self.traffic_predicted = [None for _ in range(self.ranks)]
            return
        profile = summary["profile"]
        ranks = profile["ranks"]
        self.bubble = profile["bubble"]
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
        if self.time and self.synchronous:  # of one step, which is not as the others are else
            self.exposed_share = mean(rank["exposed"] / rank["step"] for rank in self.time)

    def compare(self, reference: Row | None) -> None:
        """Compare the losses with the reference's."""
        if reference and reference.ran and self.ran:
            self.reference = reference.strategy
            self.loss_difference = max(
                abs(a - b) for a, b in zip(self.losses, reference.losses, strict=True)
            )

    def spread(self) -> tuple[float, float]:
        """Return the least and the greatest throughput of the repeats."""
        rates = [repeat["tokens_per_second"] for repeat in self.repeats]
        return min(rates), max(rates)


def _mean_traffic(steps: list[dict[str, Any]], mesh: dict[str, int]) -> list[dict[str, Any]]:
    """Return a step's messages as the mean over all steps, not each of which has some."""
    means: dict[tuple[str, str], dict[str, float]] = {}
    for line in steps:
        for key, value in line.items():
            axis, _, rest = key.partition("_")
            operation, _, unit = rest.rpartition("_")
            if axis in mesh and unit in ("calls", "bytes"):
                message = means.setdefault((axis, operation), {"calls": 0.0, "bytes": 0.0})
                message[unit] += value / len(steps)
    return [
        {
            "axis": axis,
            "operation": operation,
            "calls": message["calls"],
            "bytes": (size := round(message["bytes"])),
            "wire_bytes": Message(axis, operation, 1, size).wire_bytes(mesh[axis]),
        }
        for (axis, operation), message in sorted(means.items())
    ]


@dataclass
class Results:
    """A whole comparison.

    Args:
        command: the command that repeats it.
        made: when, in UTC.
        baseline: the label of its row.
        scaling: strong or weak.
        world_size: the largest.
        steps: of each run.
        asked: repeats that were asked for.
        facts: what is trained, for a person.
        environment: the machine and the versions.
        rows: in the order of the runs.
        seconds: that all of it took.
        unit: what throughputs count.
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
    unit: str = "tokens"
    schema: int = SCHEMA

    @property
    def ran(self) -> list[Row]:
        return [row for row in self.rows if row.ran]

    @property
    def comparable(self) -> list[Row]:
        """The baseline, and rows that compute the same on as many ranks as were asked for."""
        fewest = self.world_size if self.scaling == "weak" else 1
        rows = [
            row
            for row in self._alike
            if (row.synchronous and row.ranks in range(fewest, self.world_size + 1))
            or (row.strategy == self.baseline and self.scaling == "strong")
        ]
        followed = [row for row in rows if row.memory_bytes]
        return followed or rows  # where no tensors were followed, processes are compared

    @property
    def loose(self) -> list[Row]:
        """Rows that train what the baseline trains, and need not have the same losses."""
        return [row for row in self._alike if not row.synchronous]

    @property
    def _alike(self) -> list[Row]:
        return [row for row in self.ran if row.trained == self.rows[0].trained]

    def write(self, folder: Path) -> None:
        """Write all of it as `results.json`, and a line for each row as `results.csv`."""
        (folder / FILE).write_text(json_files.dumps(asdict(self), indent=1) + "\n")
        with (folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["strategy", *FIGURES, "reference", "reason"])
            for row in self.rows:
                strategy, reference, reason = map(
                    without_control_characters, (row.strategy, row.reference or "", row.reason)
                )
                figures = (getattr(row, name) for name in FIGURES)
                table.writerow([strategy, *figures, reference, reason])


def read(folder: Path) -> Results:
    """Read the results of a comparison.

    Raises:
        ValueError: there are none, they have another schema, or a field has another type.
    """
    file = folder / FILE if folder.is_dir() else folder
    try:
        content = _fit_to_be_shown(json_files.figures(file))
    except OSError:
        raise ValueError(
            f"{folder} has no {FILE}: give a folder that dtrain compare has written"
        ) from None
    if content.get("schema") != SCHEMA:
        raise ValueError(
            f"{file} has schema {content.get('schema')}, this version reads {SCHEMA}: make it again"
        )
    try:
        rows = [
            _build(Row, row, f"{file}: row {number}")
            for number, row in enumerate(content.pop("rows"))
        ]
        return _build(Results, {**content, "rows": rows}, str(file))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not as dtrain compare writes it: {type(error).__name__}: {error}"
        ) from None


def _build(kind: type[T], fields: dict[str, Any], where: str) -> T:
    """Return a row or results from a file's fields; names that are not known are left out."""
    hints = get_type_hints(kind)
    for name, value in fields.items():
        if not _has_type(value, hints.get(name, Any)) or (
            kind is Row and name == "repeats" and not all(map(_has_rate, value))
        ):
            raise ValueError(
                f"{where}: {name}={str(value)[:40]} is not what dtrain compare writes there"
            )
    return kind(**{name: value for name, value in fields.items() if name in hints})


def _has_type(value: Any, hint: Any) -> bool:
    """Return whether a value has a field's type, and each item of a list too.

    Integers of more than 64 bits have none: nothing can be computed with them.
    """
    if get_origin(hint) is UnionType:
        return any(_has_type(value, each) for each in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_has_type(each, *get_args(hint)) for each in value)
    if type(value) is int and abs(value) >= 1 << 63:
        return False
    return hint is Any or type(value) in (get_origin(hint) or hint, int if hint is float else hint)


def _has_rate(repeat: dict[str, Any]) -> bool:
    rate: Any = repeat.get("tokens_per_second")
    return _has_type(rate, float) and rate > 0


def _fit_to_be_shown(value: Any) -> Any:
    """Return JSON whose texts, which anybody may have written, steer no terminal."""
    if isinstance(value, dict):
        return {
            without_control_characters(key): _fit_to_be_shown(each) for key, each in value.items()
        }
    if isinstance(value, list):
        return [_fit_to_be_shown(each) for each in value]
    return without_control_characters(value) if isinstance(value, str) else value
