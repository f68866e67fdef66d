"""A comparison from its configuration to its report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dtrain.compare import runner
from dtrain.compare.description import PROJECT, row_of
from dtrain.compare.entries import Case, cases_of
from dtrain.compare.figures import NOT_MEASURED, show
from dtrain.compare.results import FILE, Results
from dtrain.config.schema import Comparison
from dtrain.config.secret import masked_override
from dtrain.cost import environment
from dtrain.cost.profile import RECORDED
from dtrain.files import json_files
from dtrain.files.disk import remove, write
from dtrain.files.lock import Lock

WRITTEN = (FILE, "results.csv", "report.md", "report.html", "runs")  # into a comparison's folder
GROUPS = ("model", "data", "task", "optimizer")  # whose choices are among the facts
TOO_FEW = f"memory, messages and time of a step: that takes {RECORDED + 1} steps or more"
FACTS = ("global_batch_size", "micro_batch_size", "seq_len", "steps", "seed", "dtype", "device")


class Failed(RuntimeError):
    """A comparison is not as it should be: a strategy broke off, or is slower than `fail_below`."""


def compare(
    settings: Comparison,
    overrides: list[str],
    choices: dict[str, str],
    folder: Path,
    configure: Callable[[list[str]], DictConfig],
    start: Callable[[DictConfig, Path, str], dict[str, Any]],
) -> None:
    """Run all strategies, write the results and the reports, and print the verdict.

    Args:
        overrides: of the command line.
        choices: of each group.
        configure: a case's overrides -> its configuration.
        start: (configuration, folder, label) -> summary.

    Raises:
        ValueError: a mistake that can be known before anything runs, or no strategy could run.
        Failed: a strategy broke off; after all have run.
    """
    sizes = _world_sizes(settings)
    cases = cases_of(
        settings.strategies, settings.baseline, sizes, settings.global_batch_size, settings.scaling
    )
    configs = {case.label: configure(case.overrides) for case in cases}
    untimed = _untimed_steps(configs)
    with _locked(folder, settings.overwrite):
        results = Results(
            command=shlex.join(["dtrain", "compare", *map(masked_override, overrides)]),
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            baseline=cases[0].label,
            scaling=settings.scaling,
            world_size=max(sizes),
            steps=settings.steps,
            asked=settings.repeats,
            facts={group: choices[group] for group in GROUPS if group in choices}
            | {name: getattr(settings, name) for name in FACTS}
            | ({} if is_profiled(settings) else {NOT_MEASURED: TOO_FEW}),
            environment=environment.describe(),
            rows=[row_of(case, configs[case.label], overrides, settings) for case in cases],
        )

        def run(case: Case, place: Path) -> dict[str, Any]:
            return start(configs[case.label], place, case.label)

        try:
            runner.run_all(cases, results, folder, untimed, run, lambda: results.write(folder))
        finally:  # an interrupted comparison has results too
            report(results, folder)
    show(results, folder)
    _judge(results)


def report(results: Results, folder: Path) -> None:
    """Write `results.json`, `results.csv`, `report.md` and `report.html`."""
    from dtrain.compare import markdown  # and with them Plotly, which no other command needs
    from dtrain.compare.page import page

    results.write(folder)
    write(folder / "report.md", markdown.document(results))
    write(folder / "report.html", page.document(results, _traces(results, folder), _link(folder)))


def _traces(results: Results, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return each strategy's events of one step, where its first run has left them."""
    traces = {}
    for row in results.ran:
        file = folder / "runs" / Case.folder_of(row.strategy) / "0" / "profile" / "trace.json"
        if file.exists():
            traces[row.strategy] = json_files.parse(file.read_bytes())["traceEvents"]
    return traces


def _link(folder: Path) -> Callable[[str], str]:
    """Return what makes a link from the folder's report to a file of the project."""
    if folder.is_relative_to(PROJECT):  # both may be moved together
        return lambda file: os.path.relpath(PROJECT / file, folder)
    return lambda file: (PROJECT / file).as_uri()


def _world_sizes(settings: Comparison) -> list[int]:
    sizes = settings.world_sizes or [settings.launch.nproc]
    if any(size < 1 for size in sizes):
        raise ValueError(f"world_sizes={sizes} must be at least 1 each")
    return sizes


def is_profiled(settings: Comparison) -> bool:
    """Return whether the runs have enough steps to be looked at, and some to be timed."""
    return settings.steps > RECORDED


def _untimed_steps(configs: dict[str, DictConfig]) -> int:
    """Return how many steps at the begin of each run are not timed."""
    skipped: list[int] = [config.measure.skip_steps for config in configs.values()]
    profiled = any(config.profile for config in configs.values())
    untimed = max(RECORDED if profiled else 0, *skipped)
    for label, config in configs.items():
        if config.steps <= untimed:
            raise ValueError(
                f"{label}: steps={config.steps}: the first {untimed} are not timed, use more"
            )
    return untimed


@contextmanager
def _locked(folder: Path, overwrite: bool) -> Iterator[None]:
    """Lock the folder; remove an earlier comparison from it if that is wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder)
    try:
        lock.leave()
        for name in WRITTEN:
            if os.path.lexists(folder / name) and not overwrite:
                raise ValueError(
                    f"{folder} has {name} of another comparison: set overwrite=true, or another "
                    f"hydra.run.dir"
                )
            remove(folder / name)
        yield
    finally:
        lock.close()


def _judge(results: Results) -> None:
    if broken := [row.strategy for row in results.rows if row.failed]:
        raise Failed(f"failed: {', '.join(broken)}")
    asked = results.rows[1:] or results.rows  # the baseline alone is no comparison
    if not any(row.ran for row in asked):
        raise ValueError(
            f"none of the strategies could run: {asked[0].strategy}: {asked[0].reason}"
        )
