"""One run: from a configuration to a trained model and its figures.

`assemble` needs no other process and finds what a user has got wrong; `run` is what every rank does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dtrain import checkpoint, launch
from dtrain.batch import ModelFactory
from dtrain.checkpoint import Checkpoints, agree
from dtrain.config import Config, make
from dtrain.data.base import Data
from dtrain.data.sources import Source
from dtrain.data.tokenizer import Tokenizer
from dtrain.launch import World
from dtrain.measure import environment, flops, memory
from dtrain.measure.meter import Meter
from dtrain.optimizer import parameter_groups
from dtrain.plan import Plan
from dtrain.precision import Precision
from dtrain.report import ranklog
from dtrain.report.base import Logger, Run
from dtrain.report.console import preparing
from dtrain.strategy.base import Strategy
from dtrain.task.base import Sizes, Task
from dtrain.train import Settings, Trainer


@dataclass(frozen=True)
class Job:
    """Everything of a run that can be made, and found wrong, without other processes."""

    config: Config
    data: Data
    task: Task
    plan: Plan
    loggers: tuple[Logger, ...]


def assemble(config: Config, world: World) -> Job:
    """Build the parts and check them against each other and the world.

    Raises:
        ValueError: for every mistake of the configuration's that can be known here.
    """
    precision = Precision(compute=config.dtype, **config.precision)
    strategies = [make(node, Strategy, f"strategy.{axis}") for axis, node in config.strategy.items()]
    plan = Plan.of(
        strategies, world.size, precision=precision, device=launch.device_of(config.device, world),
        recompute=config.activation_checkpointing, compile=config.compile,
    )  # fmt: skip
    plan.micro_batches(config.global_batch_size, config.micro_batch_size)
    loggers = tuple(make(node, Logger, f"logger.{name}") for name, node in config.logger.items())
    data = make(config.data, Data, "data", parts=(Source, Tokenizer))
    with preparing(data.name, shown=world.rank == 0) as progress:
        data.prepare(progress)
    sizes = Sizes(config.seed, config.global_batch_size, config.seq_len, config.eval.batches)
    task = make(config.task, Task, "task", models=model_factories(config), data=data, sizes=sizes)
    return Job(config, data, task, plan, loggers)


def model_factories(config: Config) -> dict[str, ModelFactory]:
    """The task's models by name: one, called `model`, or as many as the configuration names."""
    if "_target_" in config.model:
        return {"model": partial(make, config.model, nn.Module, "model")}
    return {name: partial(make, node, nn.Module, f"model.{name}") for name, node in config.model.items()}


def run(config: Config, world: World, folder: Path, strategy: str) -> dict[str, Any]:
    """Train as configured; every rank of the job calls it. Returns the summary, on every rank.

    Args:
        folder: of the run; what rank 0 says counts.
        strategy: what the user called the plan.

    Raises:
        ValueError: a mistake of the user's.
        OSError: a file that cannot be written.
        NonFinite: training has diverged.
    """
    job = assemble(config, world)
    device = job.plan.device
    memory.reset_peak(device)
    with ExitStack() as stack:
        connection = launch.connected(world, device, threads=config.launch.threads, timeout_s=config.launch.timeout_s)
        stack.enter_context(connection)
        folder = agree(lambda: _writable(folder))
        stack.enter_context(ranklog.writing(folder, world.rank))
        job = Job(job.config, job.data, job.task, job.plan.connect(), job.loggers if world.rank == 0 else ())
        for logger in job.loggers:
            stack.callback(logger.close)
        return _train(job, world, folder, strategy)


def _train(job: Job, world: World, folder: Path, strategy: str) -> dict[str, Any]:
    config, plan = job.config, job.plan
    note = partial(_each, job.loggers, Logger.note)
    settings = Settings(
        config.steps, config.seed, config.global_batch_size, config.micro_batch_size, config.clip_norm,
        config.schedule.warmup_steps, config.schedule.final_ratio,
    )  # fmt: skip
    trainer = Trainer(job.task, plan, partial(_optimizer, config.optimizer), settings)
    if config.resume:
        _resume(trainer, config, folder, note)
    checkpoints = Checkpoints(
        folder / "checkpoints", keep_last=config.checkpoint.keep_last, asynchronous=config.checkpoint.asynchronous
    ) if config.checkpoint.every else None  # fmt: skip
    meter, peak_source = _meter(job, world)
    facts = _facts(job, trainer, world, meter, peak_source)
    about = Run(strategy, plan.degrees, world.size, trainer.next_step, config.steps, folder, facts, asdict(config))
    _each(job.loggers, Logger.start, about)

    figures: dict[str, Any] = {}
    for step in trainer.steps():
        meter.add(step.tokens_per_second * step.step_seconds, step.step_seconds)
        figures = step.figures()
        if _due(step.step, config.eval.every, config.steps):
            figures |= {f"val_{name}": value for name, value in trainer.evaluate().items()}
        _each(job.loggers, Logger.step, figures)
        if checkpoints and _due(step.step, config.checkpoint.every, config.steps):
            checkpoints.save(step.step, trainer.state(), _identity(job, trainer))
    if checkpoints:
        checkpoints.wait()
    summary = _summary(job, world, strategy, figures, meter, peak_source)
    _each(job.loggers, Logger.finish, summary)
    return summary


def _each(loggers: Iterable[Logger], method: Any, *arguments: Any) -> None:
    for logger in loggers:
        getattr(logger, method.__name__)(*arguments)


def _due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _writable(folder: Path) -> Path:
    """The run's folder, made, and seen to take a file."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.touch()
    probe.unlink()
    return folder.resolve()


def _optimizer(node: dict[str, Any], model: nn.Module) -> Optimizer:
    return make(node, Optimizer, "optimizer", params=parameter_groups(model))


def _resume(trainer: Trainer, config: Config, folder: Path, note: Any) -> None:
    assert config.resume
    outputs = folder.parent.parent  # outputs/<date>/<time>
    found = agree(
        lambda: checkpoint.find(config.resume or "", folder, outputs, fallback=config.checkpoint.fallback, note=note)
    )
    saved = checkpoint.about(found)
    if saved["step"] >= config.steps:
        raise ValueError(
            f"resume: {found} has done {saved['step']} steps already, steps={config.steps}: ask for more steps"
        )
    checkpoint.load(found, trainer.state())
    trainer.next_step, trainer.tokens = saved["step"], saved["tokens"]
    note(f"resumed from {found}, step {saved['step']}")
    for key, ours in _curve(config).items():
        if saved.get(key) != ours:
            note(f"the checkpoint's run had {key}={saved.get(key)}, this one has {ours}: the curve will differ")


def _curve(config: Config) -> dict[str, Any]:
    """What decides the loss curve besides the weights: kept in a checkpoint to compare."""
    return {"seed": config.seed, "global_batch_size": config.global_batch_size, "seq_len": config.seq_len}


def _identity(job: Job, trainer: Trainer) -> dict[str, Any]:
    return {
        "tokens": trainer.tokens,
        **_curve(job.config),
        "data": job.data.describe(),
        "mesh": job.plan.degrees,
    }


def _meter(job: Job, world: World) -> tuple[Meter, str]:
    """A meter that knows the model's operations a token and this rank's peak. A collective."""
    stated = job.config.measure.peak_flops
    dist.barrier()  # the ranks measure at the same time, as they will compute at the same time
    peak, source = (stated, "stated") if stated else flops.peak(job.plan.device, job.plan.precision.compute_dtype)
    total = torch.tensor(peak, dtype=torch.float64, device=job.plan.device)
    dist.all_reduce(total)
    return Meter(
        warmup_steps=job.config.measure.warmup_steps, world_size=world.size,
        flops_per_token=flops_per_token(job.task), peak_flops=total.item() / world.size,
    ), source  # fmt: skip


def flops_per_token(task: Task) -> float:
    """Operations of one step over the tokens (or samples) it trains on: counted on one row, on meta tensors."""
    row = {name: tensor[:1] for name, tensor in task.batch(0).items()}
    batch = {name: tensor.to("meta") for name, tensor in row.items()}
    with torch.device("meta"):
        models = {name: factory() for name, factory in task.models.items()}
    return sum(flops.count(partial(update.loss, models, batch)) for update in task.updates) / task.size(row)


def _facts(job: Job, trainer: Trainer, world: World, meter: Meter, peak_source: str) -> tuple[str, ...]:
    """Lines for a person."""
    parameters = sum(p.numel() for model in trainer.models.values() for p in model.parameters())
    precision, config = job.plan.precision, job.config
    weights = str(precision.weights_dtype).removeprefix("torch.")
    data = ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in job.data.describe().items()
    )
    return (
        f"model: {parameters:,} parameters; computes in {precision.compute}, weights in {weights}",
        f"data: {data}",
        f"batch: {config.global_batch_size} rows over {job.plan.row_parts} x "
        f"{job.plan.micro_batches(config.global_batch_size, config.micro_batch_size)} micro-batches",
        f"device: {job.plan.device.type}, {torch.get_num_threads()} threads a process; "
        f"peak {(meter.peak_flops or math.nan) / 1e9:,.0f} GFLOP/s a rank ({peak_source})",
    )


def _summary(
    job: Job, world: World, strategy: str, figures: dict[str, Any], meter: Meter, peak_source: str
) -> dict[str, Any]:
    """The whole of a run for `summary.json`. A collective."""
    peaks: list[int] = [0] * world.size
    dist.all_gather_object(peaks, memory.peak_bytes(job.plan.device))
    return {
        "strategy": strategy,
        "mesh": job.plan.degrees,
        "world_size": world.size,
        "steps": figures["step"],
        "loss": figures["loss"],
        "val_loss": figures.get("val_loss"),
        **meter.summary(),
        "peak_flops_source": peak_source,
        "peak_memory_bytes": max(peaks),
        "peak_memory_bytes_by_rank": peaks,
        "tokens": figures["tokens"],
        "data": job.data.describe(),
        "environment": environment.describe(),
        "config": asdict(job.config),
    }
