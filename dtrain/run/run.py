"""One run, as every rank does it: from a configuration to a trained model and its figures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dtrain.config.override import for_a_shell
from dtrain.config.schema import Config
from dtrain.config.secret import Asked
from dtrain.cost import peak_memory
from dtrain.files.disk import write
from dtrain.launch.collectives import on_rank_zero
from dtrain.launch.consistency import refuse_differences
from dtrain.launch.flight_recorder import LOST, collective_failed
from dtrain.launch.hang_detector import Hang, HangDetector
from dtrain.launch.preemption import Preemption
from dtrain.launch.rendezvous import elastic_agents, process_group
from dtrain.launch.world import World
from dtrain.report import rank_log
from dtrain.report.base import All, Run
from dtrain.run.assemble import Parts, assemble, optimizer_of, task_and_plan
from dtrain.run.checkpoint import Checkpoints
from dtrain.run.checkpoint_files import CHECKPOINTS
from dtrain.run.claim import RESUMABLE, claimed
from dtrain.run.observers import observers_of
from dtrain.run.resume import (
    Finished,
    Fresh,
    InitFrom,
    Resume,
    begin_from,
    manifest_fields,
    starting_point,
)
from dtrain.run.summary import facts, summary_of, throughput_meter
from dtrain.run.trainer import AnyTrainer
from dtrain.strategy.parameter_server.trainer import ParameterServerTrainer
from dtrain.task.pictures import save_figures
from dtrain.train import Phase, Settings, Trainer


def run(
    config: Config, world: World, folder: Path, strategy: str, asked: Asked | None = None
) -> dict[str, Any]:
    """Train as configured and return the summary, on every rank. Collective: every rank calls it.

    A run that is stopped (SIGTERM, SIGHUP, SIGINT) returns two entries instead: `resumable`, how to
    go on with it, and `interrupted`, whether this rank was sent SIGINT. A run that has done all its
    steps before returns the summary that it has left.

    Args:
        folder: of the run; rank 0's counts.
        strategy: the user's name of the plan.
        asked: the user's configuration without its secrets, to write down; None: this one.

    Raises:
        ValueError: a mistake of the user's.
        OSError: a file that cannot be written.
        NonFinite: training has diverged.
        Hang: ranks are gone, or have not come.
    """
    try:
        return _run(config, world, folder, strategy, asked)
    except RuntimeError as error:
        if isinstance(error, Hang) or not collective_failed(error):
            raise
        raise Hang(f"{LOST}: {str(error).splitlines()[0]}") from error


def _run(
    config: Config, world: World, folder: Path, strategy: str, asked: Asked | None
) -> dict[str, Any]:
    job = assemble(config, world)
    asked = asked or Asked(job.written)
    job = replace(job, written=asked.config)
    device = job.plan.device
    with ExitStack() as stack:
        connection = process_group(
            world, device, threads=config.launch.threads, timeout_s=config.launch.timeout_s
        )
        stack.enter_context(connection)
        refuse_differences(asdict(config), job.data.describe(), job.written)
        world = replace(world, agents=elastic_agents())
        folder = stack.enter_context(claimed(folder, world, config, asked.files))
        stack.enter_context(rank_log.writing(folder, world.rank))
        job = replace(job, plan=job.plan.connect(), logger=job.logger if world.rank == 0 else All())
        stack.callback(job.logger.close)
        start = starting_point(job, folder, world)
        if isinstance(start, Finished):
            return start.summary
        watch = HangDetector(
            job.plan.groups, config.launch.timeout_s, messages=job.plan.degrees.get("pp", 1) > 1
        )
        if not job.asynchronous:  # ranks of an asynchronous run may wait as long as they like
            stack.enter_context(watch)
        with watch.explaining():
            return _train(job, world, folder, strategy, start, watch, stack)


def _train(
    job: Parts,
    world: World,
    folder: Path,
    strategy: str,
    start: Fresh | InitFrom | Resume,
    watch: HangDetector,
    stack: ExitStack,
) -> dict[str, Any]:
    config = job.config
    meter, peak_source = throughput_meter(job, world)
    peak_memory.reset_peak(job.plan.device)
    optimizer = partial(optimizer_of, config.optimizer)
    observers = observers_of(job, stack, watch)
    trainer = _trainer(job, world, optimizer, observers.phase)
    begin_from(trainer, job, start)
    observers.start(trainer)
    checkpoints = _checkpoints(config, folder, trainer, stack)
    lines = facts(job, meter, peak_source)
    first, mesh = trainer.next_step, job.plan.degrees
    job.logger.start(
        Run(
            strategy,
            mesh,
            world.size,
            first,
            config.steps,
            folder,
            lines,
            job.written,
            job.task.unit,
        )
    )
    if world.rank == 0:
        job.data.save_for_inference(folder)
    figures: dict[str, Any] = {}
    watch.step(first + 1)
    # until now a signal ends the process at once
    with Preemption(2 if job.asynchronous else 1) as preemption:
        for step in observers.steps(trainer):
            if not observers.disturbed:
                meter.add(step.tokens_per_second * step.step_seconds, step.step_seconds)
            figures = step.figures() | observers.figures()
            if _due(step.step, config.eval.every, config.steps):
                figures |= _evaluated(job, trainer, folder, step.step)
            job.logger.step(figures)
            stops = step.step < config.steps and preemption.stops_after(step.step)
            if stops or _saves(config, step.step):
                checkpoints.save(step.step, trainer.state(), manifest_fields(job, trainer, world))
            if stops:
                break
            watch.step(step.step + 1)
        checkpoints.wait()  # what it could not write is an error of the run's
    if preemption.stopped_before(config.steps):
        told = on_rank_zero(lambda: _resumable(job, folder, figures["step"]))
        return {RESUMABLE: told, "interrupted": preemption.interrupted}
    if job.asynchronous:
        figures = on_rank_zero(lambda: figures)  # a worker has none
    summary = summary_of(job, world, strategy, figures, meter, peak_source)
    summary["checkpoint"] = checkpoints.newest
    observers.finish(summary, job.logger)
    job.logger.finish(summary)
    return summary


def _trainer(
    job: Parts, world: World, optimizer: Callable[[nn.Module], Optimizer], phase: Phase
) -> AnyTrainer:
    """Return the loop, or a parameter server's. Collective."""
    config = job.config
    settings = Settings(
        config.steps,
        config.seed,
        config.global_batch_size,
        config.micro_batch_size,
        config.lr_schedule.warmup_steps,
        config.lr_schedule.min_lr_ratio,
    )
    if job.asynchronous:
        parts = partial(task_and_plan, config, world)
        return ParameterServerTrainer(job.task, job.plan, optimizer, settings, config, world, parts)
    return Trainer(job.task, job.plan, optimizer, settings, phase)


def _checkpoints(
    config: Config, folder: Path, trainer: AnyTrainer, stack: ExitStack
) -> Checkpoints:
    """Return the run's checkpoints, also if none is due: somebody may stop the run. Collective."""
    checkpoints = Checkpoints(
        folder / CHECKPOINTS,
        keep_last=config.checkpoint.keep_last,
        asynchronous=config.checkpoint.asynchronous,
        ranks=trainer.saving if isinstance(trainer, ParameterServerTrainer) else None,
    )
    stack.callback(checkpoints.wait)
    return checkpoints


def _due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _saves(config: Config, step: int) -> bool:
    """Return whether a checkpoint is due after this step."""
    every = config.checkpoint.every
    return (every > 0 and step % every == 0) or (config.checkpoint.last and step == config.steps)


def _evaluated(job: Parts, trainer: AnyTrainer, folder: Path, step: int) -> dict[str, float]:
    """Return an evaluation's figures; rank 0 keeps its pictures. Collective."""
    totals = trainer.totals()
    if totals and dist.get_rank() == 0:
        save_figures(folder / "pictures", step, job.task.pictures(totals))
    described = job.task.describe(totals) if totals else {}
    return {f"val_{name}": value for name, value in described.items()}


def _resumable(job: Parts, folder: Path, step: int) -> str:
    """Note how to go on with a run that was stopped; write it to a file for whoever started it."""
    text = (
        f"stopped after step {step} of {job.config.steps}, as it was told; resumable: "
        f"{for_a_shell('resume', str(folder))}"
    )
    write(folder / RESUMABLE, f"{text}\n")
    job.logger.note(text)
    return text
