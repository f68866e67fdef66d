"""Try every strategy of `configs/strategy`, alone and in pairs, with every task.

Each is tried as a run tries it before it starts, with the default settings and two ranks on each
axis; no other process is needed. What does not go together raises a ValueError, whose message is
the reason. No strategy is named here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dtrain.config.build import build
from dtrain.config.groups import CONFIGS, options
from dtrain.config.schema import Config, validated
from dtrain.model.initialize import on_meta
from dtrain.parallel.mesh import MESH_ORDER
from dtrain.parallel.plan import Plan
from dtrain.parallel.strategy import Strategy
from dtrain.run.assemble import task_of
from dtrain.task.base import Task

RANKS = 2  # along each axis
EXPERTS = 8  # of the model that is tried beside the task's own
WORKS, PARTLY, REFUSED, SAME_AXIS, ITSELF = "yes", "some", "–", "=", ""
# a task's name -> the task, with each model that is tried
Jobs = dict[str, list[tuple[Config, Task]]]


@dataclass(frozen=True)
class Combination:
    """Strategies that were tried together.

    Args:
        refusals: for each task the reason why they cannot train it; empty if they can.
        parts: each of the strategies alone, where that has been tried.
    """

    name: str
    strategies: list[Strategy]
    refusals: dict[str, str]
    parts: tuple[Combination, ...] = ()

    @property
    def axes(self) -> list[str]:
        return sorted((strategy.axis for strategy in self.strategies), key=MESH_ORDER.index)

    @property
    def tasks(self) -> str:
        """The tasks that they can train, in words."""
        able = [task for task, reason in self.refusals.items() if not reason]
        unable = [task for task, reason in self.refusals.items() if reason]
        if not able or not unable:
            return "all" if able else "none"
        return f"all but {', '.join(unable)}" if len(unable) < len(able) else ", ".join(able)

    @property
    def asked(self) -> dict[str, str]:
        """`refusals` for the tasks that each part can train alone."""
        return {
            t: reason
            for t, reason in self.refusals.items()
            if not any(part.refusals[t] for part in self.parts)
        }

    @property
    def mark(self) -> str:
        """How the parts go together: one of the marks above."""
        if len(set(self.axes)) < len(self.axes):
            return SAME_AXIS
        works = [not reason for reason in self.asked.values()]
        return REFUSED if not any(works) else WORKS if all(works) else PARTLY


def survey() -> list[Combination]:
    """Try each strategy and composition that has a YAML, and each pair of single strategies.

    Raises:
        ValueError: a task cannot be built from its own configuration.
    """
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        run = compose("train")
        OmegaConf.set_struct(run, False)
        named = {
            name: _strategies(run, compose(f"strategy/{name}")) for name in options("strategy")
        }
        configs = {
            name: validated(compose("train", overrides=[f"task={name}"]))
            for name in options("task")
        }
    jobs = {
        name: [(each, task_of(each)[1]) for each in _with_models(config)]
        for name, config in configs.items()
    }
    # shapes alone suffice, and one model serves all trials
    for _, task in chain.from_iterable(jobs.values()):
        task.models = {
            name: partial(_same, on_meta(factory) or factory())
            for name, factory in task.models.items()
        }
    tried = [_try(name, strategies, jobs) for name, strategies in named.items()]
    tried.sort(key=lambda each: (len(each.axes), [*map(MESH_ORDER.index, each.axes)], each.name))
    pairs = [
        _try(f"{one.name} + {other.name}", one.strategies + other.strategies, jobs, one, other)
        for one, other in combinations([each for each in tried if len(each.axes) == 1], 2)
    ]
    return tried + pairs


def _same(model: nn.Module) -> nn.Module:
    return model


def _strategies(run: DictConfig, chosen: DictConfig) -> list[Strategy]:
    """Build the strategies of one YAML, whose values may refer to the run's."""
    nodes: Any = OmegaConf.to_container(OmegaConf.merge(run, chosen).strategy, resolve=True)
    return [
        build({**node, "degree": RANKS}, Strategy, f"strategy.{axis}")
        for axis, node in nodes.items()
    ]


def _with_models(config: Config) -> list[Config]:
    """Return the configuration, and the same with experts where the model can have some."""
    if "n_experts" not in config.model:
        return [config]
    return [config, replace(config, model={**config.model, "n_experts": EXPERTS})]


def _try(name: str, strategies: list[Strategy], jobs: Jobs, *parts: Combination) -> Combination:
    refusals = {}
    for task, models in jobs.items():
        reasons = [_refusal(strategies, *model) for model in models]
        refusals[task] = "" if "" in reasons else reasons[-1]
    return Combination(name, strategies, refusals, parts)


def _refusal(strategies: list[Strategy], config: Config, task: Task) -> str:
    """Return why the strategies cannot train the task, or nothing."""
    try:
        plan = Plan.of(strategies, RANKS ** len(strategies))
        plan.micro_batches(config.global_batch_size, config.micro_batch_size)
        plan.check_task(task)
    except ValueError as error:
        return str(error)
    return ""
