"""The console: lines of facts, some ten lines of a run's steps, a progress bar, the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from dtrain.cost.model_size import ModelSize
from dtrain.cost.plan_cost import PlanCost
from dtrain.cost.timeline import Span
from dtrain.data.base import Data
from dtrain.report import instruments
from dtrain.report.amounts import GIB, in_bytes, with_si_prefix
from dtrain.report.base import Logger, Run
from dtrain.report.tables import numbers, show_table
from dtrain.report.terminal import Terminal, on_one_line

LINES = 10  # of a run's steps
CARDS = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192, 288)  # GiB of memory that GPUs have


class Console(Logger):
    """Show progress to a person: some ten lines of steps; on a terminal a bar below them."""

    def __init__(self) -> None:
        self._terminal = Terminal()
        self._progress: Progress | None = None
        self._every = 1

    def start(self, run: Run) -> None:
        rest = f" on {_ranks(run.world_size)} ({_mesh(run.mesh)})"
        self._terminal.say(Text.assemble((on_one_line(run.strategy), "bold"), rest))
        for fact in (*run.facts, f"folder: {run.folder}"):
            self._terminal.say(f"  {fact}")
        self._first, self._last, self._unit = run.first_step + 1, run.steps, run.unit
        self._every = max(1, (run.steps - run.first_step) // LINES)
        if self._terminal.is_terminal:
            columns = (
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._terminal)
            self._task = self._progress.add_task(
                "steps", total=run.steps, completed=run.first_step, figures=""
            )
            self._progress.start()

    def step(self, figures: dict[str, Any]) -> None:
        line = f"loss {figures['loss']:.4f}  {figures['tokens_per_second']:,.0f} {self._unit}/s"
        measures = [
            f"{name.removeprefix('val_')} {value:.4f}"
            for name, value in figures.items()
            if name.startswith("val_")
        ]
        held_out = f"  validation {', '.join(measures)}" if measures else ""
        if self._progress:
            self._progress.update(self._task, completed=figures["step"], figures=line)
        due = figures["step"] in (self._first, self._last) or figures["step"] % self._every == 0
        if held_out or due:
            self._print(f"step {figures['step']:>6}  {line}{held_out}")

    def note(self, text: str) -> None:
        self._print(text)

    def profile(self, report: dict[str, Any], ranks: Sequence[Sequence[Span]], title: str) -> None:
        self._stop()
        instruments.show_profile(report)

    def finish(self, summary: dict[str, Any]) -> None:
        self._stop()
        mfu = f", MFU {summary['mfu']:.1%}" if summary.get("mfu") else ""
        self._print(
            f"loss {summary['loss']:.4f}, {summary['tokens_per_second']:,.0f} {summary['unit']}/s, "
            f"{summary['step_seconds_median'] * 1e3:.0f} ms a step{mfu}, "
            f"process memory at most {in_bytes(summary['peak_memory_bytes'])} a rank"
        )
        if summary.get("checkpoint"):
            self._print(f"weights: {summary['checkpoint']}")

    def close(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _print(self, text: str) -> None:
        self._terminal.say(text)  # above the bar


@contextmanager
def preparation_progress(data: Data, *, shown: bool) -> Iterator[Callable[[str, int], None]]:
    """Yield what shows the progress of preparing data; it prints nothing unless `shown`."""
    terminal = Terminal(quiet=not shown)
    status = terminal.status("")
    begun = False

    def progress(phase: str, documents: int) -> None:
        nonlocal begun
        if not begun:
            begun = True
            if terminal.is_terminal:
                status.start()
            else:
                terminal.say(f"preparing the data {data.name}")
        if documents % 20 == 0:
            line = f"preparing the data {data.name}: {phase}, {documents:,} documents"
            status.update(Text(on_one_line(line)))

    try:
        yield progress
        if begun and data.cache_folder:
            terminal.say(f"the data {data.name} are kept in {data.cache_folder}")
    finally:
        status.stop()


def _mesh(degrees: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={degree}" for axis, degree in degrees.items()) or "one process"


def _ranks(number: int) -> str:
    return f"{number:,} {'rank' if number == 1 else 'ranks'}"


def show_plan_cost(found: PlanCost) -> None:
    """Print what a plan costs: the memory of the fullest rank, and a step's messages by axis."""
    plan, cost, terminal = found.plan, found.cost, Terminal()
    terminal.say(
        f"{_mesh(plan.degrees)} ({_ranks(plan.world_size)}), {found.rows:,} rows a step, "
        f"on each rank {found.micro_batches:,} x {found.rows_at_once:,} at once; "
        f"rank {found.rank:,} holds most"
    )
    kinds = {
        "weights": cost.parameter_bytes,
        "gradients": cost.gradient_bytes,
        "optimizer states": cost.optimizer_bytes,
        "activations": cost.activation_bytes,
        "largest messages": found.buffers,
    }
    rows: list[tuple[str, ...]] = [
        *((kind, "not predicted" if n is None else in_bytes(n)) for kind, n in kinds.items()),
        (),
        ("together", in_bytes(found.total)),
        (),
        *((f"sent a step, {axis}", in_bytes(size)) for axis, size in found.sent.items()),
    ]
    show_table(None, ["of a rank", *numbers("")], rows)
    terminal.say(_fits(found))


def _fits(found: PlanCost) -> str:
    """Say in which memory sizes of GPUs a plan fits."""
    too_small = [size for size in CARDS if size * GIB < found.total]
    enough = [size for size in CARDS if size * GIB >= found.total]
    words = [f"fits in {enough[0]} GiB a rank"] if enough else []
    words += [f"not in {too_small[-1]} GiB"] if too_small else []
    unknown = "activations, " if found.cost.activation_bytes is None else ""
    return (
        f"{', '.join(words)}; beside it come {unknown}temporaries of products, the allocator's "
        "reserve and libraries, which are not predicted"
    )


def show_model_size(name: str, size: ModelSize) -> None:
    """Print a model's sizes as a table."""
    memory = {
        "weights": size.weight_bytes,
        "gradients": size.gradient_bytes,
        "Adam states": size.optimizer_bytes,
    }
    rows: list[tuple[str, ...]] = [
        *((f"parameters, {part}", f"{count:,}") for part, count in size.parameters.items()),
        ("parameters", f"{size.total:,}"),
        (),
        ("forward and backward a token", with_si_prefix(size.flops_per_token, "FLOP")),
        (),
        *((f"tensor memory, {kind}", in_bytes(number)) for kind, number in memory.items()),
        ("tensor memory, together", in_bytes(sum(memory.values()))),
    ]
    show_table(f"{name}, sequences of {size.seq_len:,} tokens", ["", *numbers("")], rows)
