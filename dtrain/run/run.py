"""One run, as every rank does it: from a configuration to a trained model and its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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
from dtrain.cost.predict import Cost, fold
from dtrain.cost.profile import RECORDED, Profile
from dtrain.cost.trace import trace
from dtrain.files.durable import write
from dtrain.launch.collectives import on_rank_zero
from dtrain.launch.consistency import refuse_differences
from dtrain.launch.fault_injection import slowed
from dtrain.launch.flight_recorder import LOST, collective_failed
from dtrain.launch.hang_detector import Hang, HangDetector
from dtrain.launch.preemption import Preemption
from dtrain.launch.rendezvous import elastic_agents, process_group
from dtrain.launch.world import World
from dtrain.parallel.spans import FIGURES, FORWARD_BACKWARD
from dtrain.report import rank_log
from dtrain.report.base import All, Run
from dtrain.run.assemble import Parts, assemble, optimizer_of, task_and_plan
from dtrain.run.checkpoint import Checkpoints
from dtrain.run.claim import RESUMABLE, claimed
from dtrain.run.resume import finished, manifest_fields, take_weights
from dtrain.run.summary import facts, summary_of, throughput_meter
from dtrain.run.trainer import AnyTrainer
from dtrain.strategy.parameter_server.trainer import ParameterServerTrainer
from dtrain.task import pictures
from dtrain.task.batch import Sums
from dtrain.train import Phase, Settings, Trainer


def run(
    config: Config, world: World, folder: Path, strategy: str, asked: Asked | None = None
) -> dict[str, Any]:
    """Train as configured; every rank of the job calls it. Returns the summary, on every rank.

    A run that is told to stop (SIGTERM, SIGHUP, SIGINT) returns how to go on with it, under
    `resumable`, and whether this rank was sent SIGINT, under `interrupted`; nothing else.

    Args:
        folder: of the run; what rank 0 says counts.
        strategy: what the user called the plan.
        asked: what may be written down of what was asked for; None: this configuration.

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
        if summary := finished(job, folder, world):
            return summary
        watch = HangDetector(
            job.plan.groups, config.launch.timeout_s, messages=job.plan.degrees.get("pp", 1) > 1
        )
        if not job.asynchronous:  # whose ranks may wait as long as they like
            stack.enter_context(watch)
        with watch.explaining():
            return _train(job, world, folder, strategy, stack, watch)


def _train(
    job: Parts, world: World, folder: Path, strategy: str, stack: ExitStack, watch: HangDetector
) -> dict[str, Any]:
    config, plan = job.config, job.plan
    meter, peak_source = throughput_meter(job, world)
    peak_memory.reset_peak(plan.device)
    settings = Settings(
        config.steps,
        config.seed,
        config.global_batch_size,
        config.micro_batch_size,
        config.lr_schedule.warmup_steps,
        config.lr_schedule.min_lr_ratio,
    )
    optimizer = partial(optimizer_of, config.optimizer)
    profile, phase = _instruments(job, optimizer, stack, watch)
    trainer = _trainer(job, world, optimizer, settings, phase)
    apart = trainer if isinstance(trainer, ParameterServerTrainer) else None
    take_weights(trainer, job, folder, world)
    if profile and config.steps - trainer.next_step < RECORDED:
        raise ValueError(
            f"profile=true needs {RECORDED} steps, {config.steps - trainer.next_step} are left: "
            f"use more"
        )
    checkpoints = _checkpoints(config, folder, apart, stack)
    about = Run(
        strategy,
        plan.degrees,
        world.size,
        trainer.next_step,
        config.steps,
        folder,
        facts(job, meter, peak_source),
        job.written,
    )
    job.logger.start(about)
    if world.rank == 0:
        job.data.leave(folder)
    figures: dict[str, Any] = {}
    watch.step(trainer.next_step + 1)
    with Preemption(2 if apart else 1) as preemption:  # until now a signal ends the process at once
        for step in (
            profile.steps(trainer) if profile and isinstance(trainer, Trainer) else trainer.steps()
        ):
            if not (profile and profile.disturbed):
                meter.add(step.tokens_per_second * step.step_seconds, step.step_seconds)
            figures = step.figures() | (source.figures() if (source := profile or apart) else {})
            if _due(step.step, config.eval.every, config.steps) and (totals := trainer.totals()):
                figures |= _evaluated(job, totals, folder, step.step)
            job.logger.step(figures)
            stops = step.step < config.steps and preemption.stops_after(step.step)
            if stops or _saves(config, step.step):
                checkpoints.save(step.step, trainer.state(), manifest_fields(job, trainer, world))
            if stops:
                break
            watch.step(step.step + 1)
        checkpoints.wait()  # what it could not write is an error of the run's
    if preemption.stopped_before(config.steps):
        said = on_rank_zero(lambda: _resumable(job, folder, figures["step"]))
        return {RESUMABLE: said, "interrupted": preemption.interrupted}
    figures = on_rank_zero(lambda: figures) if apart else figures  # a worker has none
    summary = summary_of(job, world, strategy, figures, meter, peak_source) | {
        "checkpoint": checkpoints.newest
    }
    return _told(job, summary, apart, profile)


def _told(
    job: Parts,
    summary: dict[str, Any],
    apart: ParameterServerTrainer | None,
    profile: Profile | None,
) -> dict[str, Any]:
    """The summary with what the instruments have found, once the loggers have it. A collective."""
    if apart:
        summary["profile"] = apart.report()
    if profile:
        summary["profile"], spans = profile.summary()
        title = f"{summary['strategy']} on {summary['world_size']} ranks: one step"
        job.logger.profile(summary["profile"], spans, title)
    job.logger.finish(summary)
    return summary


def _checkpoints(
    config: Config, folder: Path, apart: ParameterServerTrainer | None, stack: ExitStack
) -> Checkpoints:
    """Where the run's go; also where none is asked for, since somebody may stop it.

    A collective.
    """
    options, ranks = config.checkpoint, apart.saving if apart else None
    made = Checkpoints(
        folder / "checkpoints",
        keep_last=options.keep_last,
        asynchronous=options.asynchronous,
        ranks=ranks,
    )
    stack.callback(made.wait)
    return made


def _instruments(
    job: Parts, optimizer: Callable[[nn.Module], Optimizer], stack: ExitStack, watch: HangDetector
) -> tuple[Profile | None, Phase]:
    """The profile that is asked for, and what the trainer tells its phases."""
    inject, rank, profile = job.config.inject, dist.get_rank(), None
    fault, straggler = inject.missed_collective, inject.straggler
    observed: Phase = nullcontext
    if job.config.profile and not job.asynchronous:
        profile = stack.enter_context(Profile(job.plan, _predicted(job, optimizer)))
        observed = profile.phase

    @contextmanager
    def disturbed(name: str) -> Iterator[None]:
        with ExitStack() as within:
            if fault.rank == rank and name == FIGURES:
                within.enter_context(watch.skipping(fault.step))
            within.enter_context(observed(name))
            if name == FORWARD_BACKWARD:
                within.enter_context(slowed(straggler, rank))
            yield

    return profile, disturbed if rank in (fault.rank, straggler.rank) else observed


def _trainer(
    job: Parts,
    world: World,
    optimizer: Callable[[nn.Module], Optimizer],
    settings: Settings,
    phase: Phase,
) -> AnyTrainer:
    """A collective."""
    if job.asynchronous:
        parts = partial(task_and_plan, job.config, world)
        return ParameterServerTrainer(
            job.task, job.plan, optimizer, settings, job.config, world, parts
        )
    return Trainer(job.task, job.plan, optimizer, settings, phase)


def _predicted(job: Parts, optimizer: Callable[[nn.Module], Optimizer]) -> Cost | None:
    """What this rank should cost; None, with a note, where a model cannot be told from shapes."""
    sizes = {
        "global_batch_size": job.config.global_batch_size,
        "micro_batch_size": job.config.micro_batch_size,
    }
    try:
        return fold(trace(job.task, job.plan, optimizer, **sizes), job.plan, dist.get_rank())  # type: ignore[arg-type]
    except ValueError as error:
        job.logger.note(f"nothing is predicted: {error}")
        return None


def _due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _saves(config: Config, step: int) -> bool:
    """Is a checkpoint due after this step?"""
    every = config.checkpoint.every
    return (every > 0 and step % every == 0) or (config.checkpoint.last and step == config.steps)


def _resumable(job: Parts, folder: Path, step: int) -> str:
    """Say how to go on with a run that was told to stop, here and in a file for whoever started
    it.
    """
    said = (
        f"stopped after step {step} of {job.config.steps}, as it was told; resumable: "
        f"{for_a_shell('resume', str(folder))}"
    )
    write(folder / RESUMABLE, f"{said}\n")
    job.logger.note(said)
    return said


def _evaluated(job: Parts, totals: Sums, folder: Path, step: int) -> dict[str, float]:
    """An evaluation's figures; the first rank keeps its pictures."""
    if dist.get_rank() == 0:
        pictures.write(folder / "pictures", step, job.task.pictures(totals))
    return {f"val_{name}": value for name, value in job.task.describe(totals).items()}
