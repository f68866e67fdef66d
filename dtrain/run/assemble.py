"""Build and check the parts of a run in one process: most of a user's mistakes end here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dtrain.config.build import build
from dtrain.config.schema import Config
from dtrain.config.secret import masked
from dtrain.cost.profile import RECORDED
from dtrain.cost.recorder import record_footprint
from dtrain.data.augment import ImageChange, Mixup, TextChange
from dtrain.data.base import Data
from dtrain.data.sources import Source
from dtrain.data.tokenizer import Tokenizer
from dtrain.launch.world import World, device_of
from dtrain.model import own
from dtrain.model.layout import ModelFactory
from dtrain.parallel.checks.probe import probe
from dtrain.parallel.footprint import Footprint
from dtrain.parallel.optimizer import parameter_groups
from dtrain.parallel.plan import Plan
from dtrain.parallel.precision import Precision
from dtrain.parallel.strategy import Strategy
from dtrain.report.base import All, Logger
from dtrain.report.console import preparation_progress
from dtrain.strategy.accelerate.environment import refuse_contradictions
from dtrain.strategy.parameter_server.strategy import ParameterServer
from dtrain.task.base import Sizes, Task

AUGMENT = (TextChange, ImageChange, Mixup)
# what torch.compile uses on a CPU
COMPILERS = tuple(filter(None, (os.environ.get("CXX"), "g++", "clang++")))


@dataclass(frozen=True)
class Parts:
    """What one process can build and check of a run."""

    config: Config
    data: Data
    task: Task
    plan: Plan
    logger: Logger
    tried: tuple[str, ...] = ()  # lines of the probe, for a person
    written: dict[str, Any] = field(default_factory=dict)  # the configuration without secrets

    @property
    def asynchronous(self) -> bool:
        """Whether ranks train without meeting in every step."""
        return any(strategy.asynchronous for strategy in self.plan.strategies)


def assemble(config: Config, world: World) -> Parts:
    """Build the parts and check them against each other and the world.

    Raises:
        ValueError: a mistake in the configuration.
    """
    plan = plan_of(config, world)
    if config.compile and plan.device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise ValueError(
            f"compile=true needs a C++ compiler, and there is none of {', '.join(COMPILERS)}"
        )
    micro_batches = plan.micro_batches(config.global_batch_size, config.micro_batch_size)
    refuse_contradictions(plan, micro_batches)
    if config.profile and config.steps < RECORDED:
        raise ValueError(
            f"profile=true looks at a run's first {RECORDED} steps, steps={config.steps} are "
            f"too few"
        )
    _check_injected(config, plan.strategies, world)
    logger = All([build(node, Logger, f"logger.{name}") for name, node in config.logger.items()])
    data, task = task_of(config, shown=world.rank == 0)
    plan.check_task(task)
    plan.check_optimizer(partial(optimizer_of, config.optimizer), micro_batches)
    tried = probe(task, plan, micro_batches=micro_batches, seed=config.seed) if config.probe else ()
    return Parts(config, data, task, plan, logger, tried, masked(asdict(config)))


def plan_of(config: Config, world: World) -> Plan:
    """Build the strategies, and check them against each other and the world.

    Raises:
        ValueError: a plan that cannot be right.
    """
    return Plan.of(
        strategies_of(config),
        world.size,
        precision=Precision.of(config.dtype, config.precision),
        device=device_of(config.device, world),
        recompute=config.activation_checkpointing,
        compile=config.compile,
        clip_norm=config.clip_norm,
    )


def _check_injected(config: Config, strategies: Sequence[Strategy], world: World) -> None:
    for name in ("missed_collective", "straggler"):
        if (rank := getattr(config.inject, name).rank) is None:
            continue
        if rank >= world.size:
            raise ValueError(
                f"inject.{name}.rank={rank} is none of the {world.size} ranks of this run"
            )
        for server in (s for s in strategies if isinstance(s, ParameterServer)):
            if name == "missed_collective" or rank < server.servers:
                raise ValueError(
                    f"inject.{name}.rank={rank} does nothing under strategy parameter_server: its "
                    f"ranks meet in no collective; inject.straggler.rank={server.servers} or above "
                    f"slows a worker"
                )


def footprint_of(job: Parts) -> Footprint:
    """Return what one rank of a run holds and computes in a step, from shapes alone.

    Raises:
        ValueError: shapes alone cannot tell it.
    """
    return record_footprint(
        job.task,
        job.plan,
        partial(optimizer_of, job.config.optimizer),
        global_batch_size=job.config.global_batch_size,
        micro_batch_size=job.config.micro_batch_size,
    )


def strategies_of(config: Config) -> list[Strategy]:
    """Build the configured strategies, in the order of their axes."""
    return [build(node, Strategy, f"strategy.{axis}") for axis, node in config.strategy.items()]


def task_and_plan(config: Config, world: World) -> tuple[Task, Plan]:
    """Build task and plan for one more process of a run whose configuration was checked."""
    job = assemble(config, world)
    return job.task, job.plan


def task_of(config: Config, *, shown: bool = True) -> tuple[Data, Task]:
    """Build the data and the task on them; prepare the data, and show it if `shown`."""
    data = build(config.data, Data, "data", parts=(Source, Tokenizer))
    with preparation_progress(data, shown=shown) as progress:
        data.prepare(progress)
    sizes = Sizes(config.seed, config.global_batch_size, config.seq_len, config.eval.batches)
    return data, build(
        config.task,
        Task,
        "task",
        parts=AUGMENT,
        models=model_factories(config),
        data=data,
        sizes=sizes,
    )


def model_factories(config: Config) -> dict[str, ModelFactory]:
    """Return the task's models by name: one, called `model`, or those of the configuration."""
    vocab_size = (config.data.get("tokenizer") or {}).get("vocab_size")
    if "_target_" in config.model:
        return {"model": partial(own.build_model, config.model, "model", vocab_size)}
    return {
        name: partial(own.build_model, node, f"model.{name}", vocab_size)
        for name, node in config.model.items()
    }


def optimizer_of(node: dict[str, Any], model: nn.Module) -> Optimizer:
    """Build the configured optimizer of a model's parameters."""
    if node.get("fused") and any(p.is_complex() for p in model.parameters()):
        raise ValueError(
            "optimizer.fused=true takes no complex weights, of which the model has some: set "
            "optimizer.fused=false"
        )
    return build(node, Optimizer, "optimizer", params=parameter_groups(model))
