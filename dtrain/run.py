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

from dtrain import checkpoint, launch, pictures, saved
from dtrain.asynchronous import Asynchronous
from dtrain.batch import Sums
from dtrain.checkpoint import Checkpoints
from dtrain.config import Config
from dtrain.cost import Cost, fold
from dtrain.figures import facts, meter_of, summary_of
from dtrain.hang import Watch
from dtrain.job import Job, assemble, optimizer_of
from dtrain.launch import World, agree
from dtrain.measure import memory
from dtrain.profile import RECORDED, Profile
from dtrain.report import ranklog
from dtrain.report.base import All, Run
from dtrain.straggler import slowed
from dtrain.trace import trace
from dtrain.train import FORWARD_BACKWARD, Phase, Settings, Trainer


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
    with ExitStack() as stack:
        connection = launch.connected(world, device, threads=config.launch.threads, timeout_s=config.launch.timeout_s)
        stack.enter_context(connection)
        folder = agree(lambda: _writable(folder))
        stack.enter_context(ranklog.writing(folder, world.rank))
        job = replace(job, plan=job.plan.connect(), logger=job.logger if world.rank == 0 else All())
        stack.callback(job.logger.close)
        watch = Watch(job.plan, config.launch.timeout_s)
        if not job.asynchronous:  # whose ranks may wait as long as they like
            stack.enter_context(watch)
        with watch.explaining():
            return _train(job, world, folder, strategy, stack, watch)


def _train(job: Job, world: World, folder: Path, strategy: str, stack: ExitStack, watch: Watch) -> dict[str, Any]:
    config, plan = job.config, job.plan
    meter, peak_source = meter_of(job, world)
    memory.reset_peak(plan.device)
    settings = Settings(
        config.steps, config.seed, config.global_batch_size, config.micro_batch_size,
        config.schedule.warmup_steps, config.schedule.final_ratio,
    )  # fmt: skip
    optimizer = partial(optimizer_of, config.optimizer)
    profile, phase = _instruments(job, optimizer, stack, watch)
    trainer = _trainer(job, world, optimizer, settings, phase)
    apart = trainer if isinstance(trainer, Asynchronous) else None
    _take_weights(trainer, job, folder)
    if profile and config.steps - trainer.next_step < RECORDED:
        raise ValueError(f"profile=true needs {RECORDED} steps, {config.steps - trainer.next_step} are left: use more")
    checkpoints = _checkpoints(config, folder, apart, stack)
    about = Run(strategy, plan.degrees, world.size, trainer.next_step, config.steps, folder,
                facts(job, meter, peak_source), asdict(config))  # fmt: skip
    job.logger.start(about)
    if world.rank == 0:
        job.data.leave(folder)
    figures: dict[str, Any] = {}
    watch.step(trainer.next_step + 1)
    for step in profile.steps(trainer) if profile else trainer.steps():
        if not (profile and profile.disturbed):
            meter.add(step.tokens_per_second * step.step_seconds, step.step_seconds)
        figures = step.figures() | (source.figures() if (source := profile or apart) else {})
        if _due(step.step, config.eval.every, config.steps) and (totals := trainer.totals()):
            figures |= _evaluated(job, totals, folder, step.step)
        job.logger.step(figures)
        if checkpoints and _due(step.step, config.checkpoint.every, config.steps):
            checkpoints.save(step.step, trainer.state(), _identity(job, trainer))
        watch.step(step.step + 1)
    if checkpoints:
        checkpoints.wait()  # what it could not write is an error of the run's
    if apart:
        figures = agree(lambda: figures)  # a worker has none
    summary = summary_of(job, world, strategy, figures, meter, peak_source)
    if apart:
        summary["profile"] = apart.report()
    if profile:
        summary["profile"], spans = profile.summary()
        job.logger.profile(summary["profile"], spans, f"{strategy} on {world.size} ranks: one step")
    job.logger.finish(summary)
    return summary


def _checkpoints(config: Config, folder: Path, apart: Asynchronous | None, stack: ExitStack) -> Checkpoints | None:
    """Where the run's go, if it has any. A collective."""
    if not config.checkpoint.every:
        return None
    options, ranks = config.checkpoint, apart.saving if apart else None
    made = Checkpoints(
        folder / "checkpoints", keep_last=options.keep_last, asynchronous=options.asynchronous, ranks=ranks
    )
    stack.callback(made.wait)
    return made


def _instruments(
    job: Job, optimizer: Callable[[nn.Module], Optimizer], stack: ExitStack, watch: Watch
) -> tuple[Profile | None, Phase]:
    """The profile that is asked for, and what the trainer tells its phases."""
    fault, profile = job.config.fault, None
    observed: Phase = nullcontext
    if job.config.profile and not job.asynchronous:
        profile = stack.enter_context(Profile(job.plan, _predicted(job, optimizer)))
        observed = profile.phase

    @contextmanager
    def faulty(name: str) -> Iterator[None]:
        with watch.skipping(fault.step, name), observed(name):
            yield

    @contextmanager
    def slow(name: str) -> Iterator[None]:
        with observed(name), slowed(job.config.straggler, dist.get_rank() if name == FORWARD_BACKWARD else -1):
            yield

    if job.config.straggler.rank == dist.get_rank():
        return profile, slow
    return profile, faulty if fault.rank == dist.get_rank() else observed


def _trainer(
    job: Job, world: World, optimizer: Callable[[nn.Module], Optimizer], settings: Settings, phase: Phase
) -> Trainer:
    """A collective."""
    if job.asynchronous:
        return Asynchronous(job.task, job.plan, optimizer, settings, job.config, world)
    return Trainer(job.task, job.plan, optimizer, settings, phase)


def _predicted(job: Job, optimizer: Callable[[nn.Module], Optimizer]) -> Cost | None:
    """What this rank should cost; None, with a note, where a model cannot be told from shapes."""
    sizes = {"global_batch_size": job.config.global_batch_size, "micro_batch_size": job.config.micro_batch_size}
    try:
        return fold(trace(job.task, job.plan, optimizer, **sizes), job.plan, dist.get_rank())  # type: ignore[arg-type]
    except ValueError as error:
        job.logger.note(f"nothing is predicted: {error}")
        return None


def _due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _writable(folder: Path) -> Path:
    """The run's folder, made, and seen to take a file."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.touch()
    probe.unlink()
    return folder.resolve()


def _evaluated(job: Job, totals: Sums, folder: Path, step: int) -> dict[str, float]:
    """An evaluation's figures; the first rank keeps its pictures."""
    if dist.get_rank() == 0:
        pictures.write(folder / "pictures", step, job.task.pictures(totals))
    return {f"val_{name}": value for name, value in job.task.describe(totals).items()}


def _take_weights(trainer: Trainer, job: Job, folder: Path) -> None:
    """From a checkpoint to go on with, or to begin with; and say where a model's own come from. A collective."""
    for model in trainer.models.values():
        for origin in {str(module.origin) for module in model.modules() if hasattr(module, "origin")}:
            job.logger.note(origin)
    if job.config.resume:
        _resume(trainer, job, job.config.resume, folder)
    elif job.config.init_from:
        _begin(trainer, job, job.config.init_from, folder)


def _begin(trainer: Trainer, job: Job, path: str, folder: Path) -> None:
    """Take what fits of another run's weights; say what does not."""
    note = job.logger.note
    found = agree(
        lambda: saved.find(path, folder, Path("outputs").resolve(), fallback=False, note=note, key="init_from")
    )
    taken: list[str] = []
    new: list[str] = []
    trainer.begin(partial(checkpoint.load_weights, found, taken=taken, new=new))
    note(f"begun from {found}: {len(taken)} tensors; new: {', '.join(new) or 'none'}")


def _resume(trainer: Trainer, job: Job, resume: str, folder: Path) -> None:
    config, note = job.config, job.logger.note
    outputs = Path("outputs").resolve()  # where Hydra puts runs by default
    found = agree(lambda: saved.find(resume, folder, outputs, fallback=config.checkpoint.fallback, note=note))
    theirs = saved.about(found)
    if theirs["step"] >= config.steps:
        raise ValueError(
            f"resume: {found} has done {theirs['step']} steps already, steps={config.steps}: ask for more steps"
        )
    trainer.load(partial(checkpoint.load, found))
    trainer.next_step, trainer.tokens = theirs["step"], theirs["tokens"]
    note(f"resumed from {found}, step {theirs['step']}")
    for key, ours in _curve(job).items():
        if theirs.get(key) != ours:
            note(f"the checkpoint's run had {key}={theirs.get(key)}, this one has {ours}: the curve may differ")


def _curve(job: Job) -> dict[str, Any]:
    """What decides the loss curve besides the weights: kept in a checkpoint to compare."""
    keys = ("seed", "steps", "dtype", "precision", "global_batch_size", "seq_len", "clip_norm", "optimizer", "schedule")
    config = asdict(job.config)
    return {"data": job.data.describe()} | {key: config[key] for key in keys}


def _identity(job: Job, trainer: Trainer) -> dict[str, Any]:
    return {"tokens": trainer.tokens, **_curve(job), "mesh": job.plan.degrees}
