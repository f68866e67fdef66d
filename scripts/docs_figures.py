"""The measured tables of docs/axes, from runs of today: make docs-figures

`python scripts/docs_figures.py tensor` runs those of a page; `--again` runs none and writes anew.

Each run trains the model `tiny` for six steps with instruments on. A table is written only if every
payload is what its formula says, and what the strategy predicts from shapes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from dtrain.report.tables import put_between

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "outputs" / "docs"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"
COMMON = ("model=tiny", "steps=6", "profile=true")
QUIET = ("eval.every=0", "checkpoint.last=false", "overwrite=true")
KINDS = ("parameters", "gradients", "optimizer", "activations")
# what `model=tiny` trains on: rows of a batch, tokens of a row, width, words, bytes of a number
B, T, C, V, FP32 = 16, 64, 64, 256, 4
KIB = 2**10
COUNTS = "LEHn"  # symbols that are numbers, not bytes


@dataclass(frozen=True)
class Run:
    """A run of a page.

    Args:
        strategy: as it is typed, with its settings.
        ranks: processes.
        payloads: formulas by axis and operation.
        together: the messages of all ranks are shown, and not those of rank 0.
    """

    strategy: str
    ranks: int = 2
    payloads: dict[str, str] = field(default_factory=dict)
    together: bool = False


@dataclass(frozen=True)
class Page:
    """The runs of a page, all of one model.

    Args:
        model: settings of the model.
        sizes: what its formulas name, in bytes or as numbers.
    """

    runs: tuple[Run, ...]
    model: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)


PAGES: dict[str, Page] = {
    "data": Page(
        (
            Run("single", 1),
            Run("allreduce", payloads={"dp all_reduce": "N"}),
            Run("ddp", payloads={"dp all_reduce": "N"}),
        )
    ),
    "sharded": Page(
        (
            Run("ddp", payloads={"dp all_reduce": "N"}),
            Run("zero1", payloads={"dp all_reduce": "N", "dp broadcast": "N"}),
            Run("zero2", payloads={"fsdp all_gather": "N", "fsdp reduce_scatter": "N"}),
            Run("fsdp", payloads={"fsdp all_gather": "2 N", "fsdp reduce_scatter": "N"}),
            Run(
                "hsdp strategy.fsdp.degree=2",
                4,
                {
                    "dp all_reduce": "N / 2",
                    "fsdp all_gather": "2 N",
                    "fsdp reduce_scatter": "N",
                },
            ),
        )
    ),
    "tensor": Page(
        (
            Run("single", 1),
            Run("tensor", payloads={"tp all_reduce": "(4 L + 2) A + 3 S"}),
            Run(
                "tensor_sequence",
                payloads={
                    "tp all_gather": "(4 L + 2) A",
                    "tp all_reduce": "A + 3 S + D",
                    "tp reduce_scatter": "(4 L + 1) A",
                },
            ),
        ),
        sizes={"A": B * T * C * FP32, "S": B * T * FP32, "D": 5 * 2 * C * FP32, "L": 2},
    ),
    "pipeline": Page(
        (
            Run("single", 1),
            *(
                Run(
                    f"pipeline strategy.pp.schedule={kind}",
                    payloads={"pp send": sent},
                )
                for kind, sent in (("gpipe", "A + W"), ("1f1b", "A + W"), ("zbv", "2 A"))
            ),
        ),
        ("model.n_layers=4", "micro_batch_size=4"),
        {"A": B * T * C * FP32, "W": V * C * FP32},
    ),
    "context": Page(
        (
            Run("single", 1),
            Run("context", payloads={"cp all_reduce": "N", "cp send": "L (6 n - 4) Q"}),
            Run(
                "context strategy.cp.method=ulysses",
                payloads={"cp all_reduce": "N", "cp all_to_all": "8 L Q"},
            ),
        ),
        sizes={"Q": B * T // 2 * C * FP32, "L": 2},
    ),
    "experts": Page(
        (
            Run("single", 1),
            Run(
                "expert",
                payloads={"ep all_reduce": "n (N - X)", "ep all_to_all": "4 L R + 8 L E n"},
                together=True,
            ),
        ),
        ("model.n_experts=4",),
        {"R": 2 * B * T * C * FP32, "X": 2 * 4 * 8 * C * C * FP32, "L": 2, "E": 4},
    ),
    "asynchronous": Page(
        (
            Run("ddp", payloads={"dp all_reduce": "N"}),
            Run("local_sgd strategy.dp.sync_every=3", payloads={"dp all_reduce": "N"}),
            Run("diloco strategy.dp.sync_every=3", payloads={"dp all_reduce": "N"}),
        )
    ),
}


@dataclass(frozen=True)
class Line:
    """A line of a table of messages."""

    axis: str
    operation: str
    calls: int
    bytes: int
    wire_bytes: float

    @property
    def key(self) -> str:
        return f"{self.axis} {self.operation}"


def document(name: str) -> Path:
    """Return where a page is."""
    folder = ROOT / "docs" if name == "asynchronous" else ROOT / "docs" / "axes"
    return folder / f"{name}.md"


def evaluate(formula: str, sizes: dict[str, int]) -> float:
    """Return what a formula says: 2 N is 2*N."""
    product = re.sub(r"(?<=[\w)])\s+(?=[\w(])", "*", formula)
    return float(eval(product, {"__builtins__": {}}, sizes))


def words(run: Run, page: Page) -> list[str]:
    """Return what is typed for a run, after `dtrain train`."""
    ranks = [f"launch.nproc={run.ranks}"] if run.ranks > 1 else []
    return [*ranks, *COMMON, *page.model, *f"strategy={run.strategy}".split()]


def label(run: Run) -> str:
    """Return a run's strategy in short: without the axis of its settings."""
    return re.sub(r"strategy\.\w+\.", "", run.strategy)


def lines(run: Run, ranks: Sequence[Sequence[dict[str, Any]]]) -> list[Line]:
    """Return the messages of rank 0, or of all ranks together."""
    totals: dict[tuple[str, str], tuple[int, int, float]] = {}
    for message in (m for messages in ranks[: None if run.together else 1] for m in messages):
        key = message["axis"], message["operation"]
        calls, size, sent = totals.get(key, (0, 0, 0.0))
        totals[key] = (
            calls + message["calls"],
            size + message["bytes"],
            sent + message["wire_bytes"],
        )
    return [Line(*key, *total) for key, total in totals.items()]


def message_table(page: Page, found: Sequence[Sequence[Line]], weights: int) -> Iterator[str]:
    """Yield the lines of a table of each run's messages, beside their formulas.

    Args:
        weights: bytes of the model's weights, N in the formulas.

    Raises:
        ValueError: a payload is not what its formula says.
    """
    yield "| strategy | message | calls | payload | = KiB | measured | sent |"
    yield "|---|---|---:|---|---:|---:|---:|"
    for run, messages in zip(page.runs, found, strict=True):
        sizes = {**page.sizes, "N": weights, "n": run.ranks}
        if {each.key for each in messages} != run.payloads.keys():
            raise ValueError(f"{run.strategy} has formulas for {[*run.payloads]}: {messages}")
        for each in messages:
            formula = run.payloads[each.key]
            if (value := evaluate(formula, sizes)) != each.bytes:
                raise ValueError(f"{run.strategy}: {formula} is {value}, measured: {each}")
            yield (
                f"| `{label(run)}` | {each.key.replace('_', '-')} | {each.calls} | {formula} | "
                f"{value / KIB:,.1f} | {each.bytes / KIB:,.1f} | {each.wire_bytes / KIB:,.1f} |"
            )


def memory_table(page: Page, found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of each run's memory by kind, beside the predictions."""
    yield "| KiB on rank 0, measured (predicted) | weights | gradients | states | activations |"
    yield "|---|---:|---:|---:|---:|"
    for run, memory in zip(page.runs, found, strict=True):
        kinds = [memory["kinds"][kind] for kind in KINDS]
        cells = [_amount(kind["most"], kind["predicted"]) for kind in kinds]
        yield f"| `{label(run)}` | {' | '.join(cells)} |"


def _amount(measured: int, predicted: int | None) -> str:
    told = f"{measured / KIB:,.1f}"
    return told if predicted is None else f"{told} ({predicted / KIB:,.1f})"


def bubbles(page: Page, told: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line that tells the idle shares of pipelines, if the page has any."""
    shares = [summary["profile"]["bubble"] for summary in told]
    shown = [
        f"`{label(run)}` {share['measured']:.0%} ({share['theory']:.0%})"
        for run, share in zip(page.runs, shares, strict=True)
        if share
    ]
    if shown:
        yield f"Idle share of a step, measured (by the schedule): {', '.join(shown)}.\n"


def summary_of(name: str, number: int, again: bool) -> dict[str, Any]:
    """Return what a run tells of itself, after it has run.

    Raises:
        ValueError: its messages are not those that it predicted.
    """
    page = PAGES[name]
    folder = FOLDER / f"{name}-{number}"
    if not again:
        typed = [*words(page.runs[number], page), *QUIET, f"hydra.run.dir={folder}"]
        command = [sys.executable, "scripts/train.py", *typed]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    told: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    ranks = told["profile"]["ranks"]
    measured, predicted = (
        lines(page.runs[number], [rank[key] for rank in ranks])
        for key in ("traffic", "traffic_predicted" if told["synchronous"] else "traffic")
    )
    if measured != predicted:
        raise ValueError(f"{page.runs[number].strategy}: {measured} is not {predicted}")
    return told


def symbols(page: Page, weights: int) -> str:
    """Return what the letters of the formulas stand for here."""
    used = set(re.findall(r"[A-Z]", "".join(f for run in page.runs for f in run.payloads.values())))
    sizes = {"N": weights, **page.sizes}
    told = (
        f"{name} = {size}" if name in COUNTS else f"{name} = {size / KIB:,.1f} KiB"
        for name, size in sizes.items()
        if name in used
    )
    return f"Here {', '.join(told)}."


def figures(page: Page, told: Sequence[dict[str, Any]], made_on: date) -> str:
    """Return the measured part of a page. Its first run holds all weights on a rank."""
    ranks = [summary["profile"]["ranks"] for summary in told]
    found = [
        lines(run, [rank["traffic"] for rank in each])
        for run, each in zip(page.runs, ranks, strict=True)
    ]
    memory = [each[0]["memory"] for each in ranks]
    weights = memory[0]["kinds"]["parameters"]["most"]
    made = f"{made_on}, torch {torch.__version__.split('+')[0]} on CPUs"
    of_all = " (both ranks together)" if page.runs[-1].together else " (rank 0)"
    return "\n".join(
        [
            "```sh",
            *(f"dtrain train {' '.join(words(run, page))}" for run in page.runs),
            "```\n",
            f"Messages of the last step{of_all}. {symbols(page, weights)}\n",
            *message_table(page, found, weights),
            "",
            *memory_table(page, memory),
            "",
            *bubbles(page, told),
            f"(`make docs-figures`, {made})",
            "",
        ]
    )


if __name__ == "__main__":
    again, chosen = "--again" in sys.argv, [name for name in PAGES if name in sys.argv]
    for name in chosen or PAGES:
        page = PAGES[name]
        told = [summary_of(name, number, again) for number in range(len(page.runs))]
        last = (FOLDER / f"{name}-{len(told) - 1}" / "summary.json").stat().st_mtime
        text = figures(page, told, date.fromtimestamp(last))
        put_between(document(name), BEGIN, END, text)
