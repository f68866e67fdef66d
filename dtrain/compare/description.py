"""A case's row before it runs: its idea, its formulas, and the command that repeats it alone."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path

from omegaconf import DictConfig

import dtrain
from dtrain.compare.entries import RANKS, Case
from dtrain.compare.results import Row
from dtrain.config.build import imported
from dtrain.config.groups import strategy_comment
from dtrain.config.schema import Comparison
from dtrain.config.secret import masked_override

PROJECT = Path(dtrain.__file__).parents[1]
OF_ALL = (  # settings that are no setting of a single run, or that each entry has itself
    "strategies",
    "baseline",
    "world_sizes",
    "scaling",
    "repeats",
    "overwrite",
    "strategy",
    "hydra",
)


def row_of(case: Case, config: DictConfig, overrides: list[str], settings: Comparison) -> Row:
    """Return the row of a case, with no figures.

    Args:
        config: the case's own.
        overrides: of the whole comparison, as they were typed.
    """
    targets = [node["_target_"] for node in (config.strategy or {}).values()]
    classes = [strategy for target in targets if (strategy := _class_of(target))]
    names = case.entry.strategy.split("+")
    return Row(
        case.label,
        case.ranks,
        overrides=[masked_override(override) for override in case.overrides],
        command=_command(case, overrides, settings),
        about=" ".join(strategy_comment(name) for name in names),
        cost=[text for strategy in classes if (text := _cost(strategy))],
        files=[_relative(Path(inspect.getfile(strategy))) for strategy in classes],
        trained=[*map(masked_override, case.entry.trained)],
    )


def _command(case: Case, overrides: list[str], settings: Comparison) -> str:
    """Return the command that runs a case alone; of a key's several values the last one holds."""
    words = [
        f"steps={settings.steps}",
        f"eval.every={settings.eval.every}",
        "profile=true",
        *(word for word in overrides if re.split("[.=]", word.lstrip("+~"))[0] not in OF_ALL),
        *case.entry.overrides,
    ]
    last = {word.split("=")[0]: word for word in words if not word.startswith(RANKS)}
    shown = [masked_override(word) for word in last.values()]
    if case.rows != settings.global_batch_size:
        shown.append(f"global_batch_size={case.rows}")
    ranks = [f"launch.nproc={case.ranks}"] if case.ranks > 1 else []
    return f"dtrain train {shlex.join([*ranks, *shown])}"


def _class_of(target: str) -> type | None:
    """Return the class, or None for what the run itself will refuse."""
    try:
        strategy = imported(target, "strategy")
    except ValueError:
        return None
    return strategy if isinstance(strategy, type) else None


def _relative(file: Path) -> str:
    return str(file.relative_to(PROJECT)) if file.is_relative_to(PROJECT) else str(file)


def _cost(strategy: type) -> str:
    """Return the paragraph on the cost in the docstring of the strategy's file."""
    docstring = ast.get_docstring(ast.parse(Path(inspect.getfile(strategy)).read_text())) or ""
    match = re.search(r"(?:^|(?<=[.:]\s))(Costs? .*?)(?=\s*\bSources?:|\Z)", docstring, re.S | re.M)
    return " ".join(match[1].split()) if match else ""
