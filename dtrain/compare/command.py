"""A comparison from its configuration to its report; and two earlier ones side by side."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from dtrain.compare import runner
from dtrain.compare.condition import Condition
from dtrain.compare.entries import Case, cases_of
from dtrain.compare.results import FILE, Results, Row, read
from dtrain.compare.verdict import differences
from dtrain.config.build import imported
from dtrain.config.groups import CONFIGS, strategy_comment
from dtrain.config.schema import Comparison
from dtrain.config.secret import masked_override
from dtrain.cost import environment
from dtrain.cost.profile import RECORDED
from dtrain.files import json_files
from dtrain.files.disk import remove, write
from dtrain.files.lock import Lock
from dtrain.report.terminal import Terminal

PROJECT = CONFIGS.parent
LEFT = (FILE, "results.csv", "report.md", "report.html", "runs")  # in a comparison's folder
KEYS = (
    "strategies",
    "baseline",
    "world_sizes",
    "scaling",
    "repeats",
    "overwrite",
    "fail_if",
    "strategy",
    "hydra",
)


class Failed(RuntimeError):
    """A comparison that is not as it should be: a strategy broke off, or `fail_if` holds."""


def compare(
    settings: Comparison,
    own: list[str],
    choices: dict[str, str],
    folder: Path,
    configure: Callable[[list[str]], DictConfig],
    start: Callable[[DictConfig, Path, str], dict[str, Any]],
) -> None:
    """Run all, write `results.json`, `results.csv`, `report.md` and `report.html`, and show the
    verdict.

    Args:
        own: the overrides of the command line; choices: of groups.
        configure: a case's overrides -> its configuration.
        start: (configuration, folder, label) -> summary.

    Raises:
        ValueError: a mistake that can be known before anything runs.
        Failed: after all have run.
    """
    condition = Condition(settings.fail_if) if settings.fail_if else None
    sizes = _world_sizes(settings)
    cases = cases_of(
        settings.strategies, settings.baseline, sizes, settings.global_batch_size, settings.scaling
    )
    configs = {case.label: configure(case.overrides) for case in cases}
    first = _checked(cases, configs, condition)
    with _held(folder, settings.overwrite):
        results = Results(
            command=shlex.join(["python", "scripts/compare.py", *map(masked_override, own)]),
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            baseline=cases[0].label,
            scaling=settings.scaling,
            world_size=max(sizes),
            steps=settings.steps,
            asked=settings.repeats,
            facts=_facts(settings, choices),
            environment=environment.describe(),
            rows=[_row(case, configs[case.label], own, settings) for case in cases],
        )

        def run(case: Case, place: Path) -> dict[str, Any]:
            return start(configs[case.label], place, case.label)

        try:
            runner.run_all(cases, results, folder, first, run, lambda: results.write(folder))
        finally:  # an interrupted comparison has results too
            report(results, folder)
    runner.show(results, folder)
    _judge(results, condition)


def report(results: Results, folder: Path) -> None:
    """Everything that a person reads."""
    from dtrain.compare import markdown  # and with them Plotly, which no other command needs
    from dtrain.compare.page import page

    results.write(folder)
    write(folder / "report.md", markdown.document(results))
    write(folder / "report.html", page.document(results, traces(results, folder), _link(folder)))


def traces(results: Results, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each row's ranks did in one step, as its run has left it."""
    found = {}
    for row in results.ran:
        file = folder / "runs" / Case.folder_of(row.strategy) / "0" / "profile" / "trace.json"
        if file.exists():
            found[row.strategy] = json_files.parse(file.read_bytes())["traceEvents"]
    return found


def show_difference(arguments: list[str]) -> None:
    """`scripts/compare.py --from DIR1 DIR2 [fail_if=…]`: throughputs of the second over those of
    the first.

    Raises:
        ValueError: not two folders with results.
        Failed: `fail_if` holds.
    """
    folders = [argument for argument in arguments if "=" not in argument]
    others = [argument for argument in arguments if "=" in argument]
    if len(folders) != 2 or any(not argument.startswith("fail_if=") for argument in others):
        raise ValueError(
            f"--from {' '.join(arguments)}: give two folders, and no other setting than fail_if=…"
        )
    first, second = (read(Path(folder)) for folder in folders)
    condition = Condition(others[-1].removeprefix("fail_if=")) if others else None
    console, made = Terminal(), Table(title=f"{folders[1]} over {folders[0]}")
    made.add_column("strategy", no_wrap=True)
    for title in ("tokens/s", "spread", "", "tensor memory", "bytes sent"):
        made.add_column(title, justify="right")
    for each in differences(first, second):
        words = {
            True: "within noise",
            False: "faster" if each.ratio > 1 else "slower",
            None: "noise unknown",
        }
        sent = "–" if each.bytes_ratio is None else f"{each.bytes_ratio:.3f}"
        spread = f"{each.least:.3f} – {each.most:.3f}"
        made.add_row(
            each.strategy,
            f"{each.ratio:.3f}",
            spread,
            words[each.noise],
            f"{each.memory_ratio:.3f}",
            sent,
        )
    console.print(made)
    console.print(
        "spread: of any repeat over any other; within noise: 1 lies in it; unknown: one "
        "repeat each",
        soft_wrap=True,
    )
    for name in (
        key for key in first.facts | second.facts if first.facts.get(key) != second.facts.get(key)
    ):
        console.print(
            f"not alike: {name} {first.facts.get(name)}, then {second.facts.get(name)}",
            soft_wrap=True,
        )
    for name in ("commit", "cpu", "cores"):
        then, now = (each.environment.get(name, "not told") for each in (first, second))
        if then != now:
            console.print(f"{name}: {then}, then {now}", soft_wrap=True)
    if condition and condition.holds(second, first):
        raise Failed(f"fail_if: {condition.text}")


def _checked(cases: list[Case], configs: dict[str, DictConfig], condition: Condition | None) -> int:
    """How many steps of each run come before those that are timed."""
    first = max(RECORDED, *(config.measure.skip_steps for config in configs.values()))
    for label, config in configs.items():
        if config.steps <= first:
            raise ValueError(
                f"{label}: steps={config.steps}: the first {first} are not timed, use more"
            )
    for label in condition.strategies if condition else ():
        if label not in configs:
            raise ValueError(
                f"fail_if: {label!r} is none of {', '.join(case.label for case in cases)}"
            )
    return first


def _world_sizes(settings: Comparison) -> list[int]:
    sizes = settings.world_sizes or [settings.launch.nproc]
    if any(size < 1 for size in sizes):
        raise ValueError(f"world_sizes={sizes} must be at least 1 each")
    return sizes


@contextmanager
def _held(folder: Path, overwrite: bool) -> Iterator[None]:
    """Hold the folder, and remove an earlier comparison from it if that is wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder)
    try:
        lock.leave()
        for name in LEFT:
            if os.path.lexists(folder / name) and not overwrite:
                raise ValueError(
                    f"{folder} has {name} of another comparison: set overwrite=true, or another "
                    f"hydra.run.dir"
                )
            remove(folder / name)
        yield
    finally:
        lock.close()


def _facts(settings: Comparison, choices: dict[str, str]) -> dict[str, Any]:
    groups = {
        name: choices[name] for name in ("model", "data", "task", "optimizer") if name in choices
    }
    sizes = ("global_batch_size", "micro_batch_size", "seq_len", "steps", "seed", "dtype", "device")
    return groups | {name: getattr(settings, name) for name in sizes}


def _row(case: Case, config: DictConfig, own: list[str], settings: Comparison) -> Row:
    """Everything of a row that is known before it runs."""
    kept = [
        o
        for o in own
        if o.lstrip("+~").split("=")[0].split(".")[0] not in KEYS
        and not o.startswith("launch.nproc")
    ]
    said = [
        f"steps={settings.steps}",
        f"eval.every={settings.eval.every}",
        "profile=true",
        *kept,
        *case.entry.overrides,
    ]
    last = {each.split("=")[0]: each for each in said if not each.startswith("launch.nproc=")}
    said = [masked_override(each) for each in last.values()]
    if case.rows != settings.global_batch_size:
        said.append(f"global_batch_size={case.rows}")
    begin = f"torchrun --nproc-per-node {case.ranks}" if case.ranks > 1 else "python"
    classes = [
        found for node in (config.strategy or {}).values() if (found := _class_of(node["_target_"]))
    ]
    return Row(
        case.label,
        case.ranks,
        overrides=[masked_override(each) for each in case.overrides],
        command=f"{begin} scripts/train.py {shlex.join(said)}",
        about=" ".join(strategy_comment(name) for name in case.entry.strategy.split("+")),
        cost=[text for each in classes if (text := _cost(each))],
        files=[_shown(Path(inspect.getfile(each))) for each in classes],
        trained=[*map(masked_override, case.entry.trained)],
    )


def _class_of(target: str) -> Any:
    """The class, or None: it is said where it is made."""
    try:
        return imported(target, "strategy")
    except ValueError:
        return None


def _shown(file: Path) -> str:
    return str(file.relative_to(PROJECT)) if file.is_relative_to(PROJECT) else str(file)


def _cost(strategy: type) -> str:
    """What the strategy's file says of its cost."""
    tree = ast.parse(Path(inspect.getfile(strategy)).read_text())
    found = re.search(
        r"^(Costs? .*?)(?=\s*\bSources?:|\Z)", ast.get_docstring(tree) or "", re.S | re.M
    )
    return " ".join(found[1].split()) if found else ""


def _link(folder: Path) -> Callable[[str], str]:
    """From a file of the project to where the report finds it."""
    return lambda file: (
        (PROJECT / file).as_uri()
        if not folder.is_relative_to(PROJECT)
        else ("/".join([".."] * len(folder.relative_to(PROJECT).parts)) + "/" + file)
    )


def _judge(results: Results, condition: Condition | None) -> None:
    if broken := [row.strategy for row in results.rows if row.failed]:
        raise Failed(f"failed: {', '.join(broken)}")
    asked = results.rows[1:] or results.rows  # the baseline alone is no comparison
    if not any(row.ran for row in asked):
        raise ValueError(
            f"none of the strategies could run: {asked[0].strategy}: {asked[0].reason}"
        )
    if condition and condition.holds(results):
        raise Failed(f"fail_if: {condition.text}")
