"""Where a run's weights come from: an earlier attempt, a checkpoint that was asked for, or
nothing.
"""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

from dtrain.config.aliases import RENAMED
from dtrain.files import records
from dtrain.launch.collectives import on_rank_zero
from dtrain.launch.world import World
from dtrain.report.files import SUMMARY, summary_in
from dtrain.run import checkpoint, checkpoint_files
from dtrain.run.assemble import Parts
from dtrain.run.claim import OUTPUTS, RESUMABLE
from dtrain.run.trainer import AnyTrainer


def finished(job: Parts, folder: Path, world: World) -> dict[str, Any] | None:
    """The summary that the run has left, if it is begun again and there is nothing left to do.

    A collective.
    """

    def look() -> dict[str, Any] | None:
        newest = _newest(job, folder, world)
        if (
            newest
            and checkpoint_files.steps_of(newest) >= job.config.steps
            and (folder / SUMMARY).exists()
        ):
            job.logger.note(
                f"{newest} has done all {job.config.steps} steps: nothing is left to do"
            )
            # it was not stopped
            return {key: value for key, value in summary_in(folder).items() if key != RESUMABLE}
        return None

    return on_rank_zero(look)


def _newest(job: Parts, folder: Path, world: World, steps: float = math.inf) -> Path | None:
    """The run's newest checkpoint, of fewer steps if there is one, if it was restarted or goes
    on by itself.
    """
    if job.config.resume != checkpoint_files.AUTO and not checkpoint_files.run_of(
        (folder,), world.agents
    ):
        return None
    every = checkpoint_files.published(folder / "checkpoints")
    return next(
        (path for path in reversed(every) if checkpoint_files.steps_of(path) < steps),
        every[-1] if every else None,
    )


def take_weights(trainer: AnyTrainer, job: Parts, folder: Path, world: World) -> None:
    """From a checkpoint to go on with, or to begin with; and say where a model's own come from.

    A collective.
    """
    for model in trainer.models.values():
        for origin in {
            str(module.origin) for module in model.modules() if hasattr(module, "origin")
        }:
            job.logger.note(origin)
    own = on_rank_zero(lambda: _newest(job, folder, world, job.config.steps))
    asked = None if job.config.resume == checkpoint_files.AUTO else job.config.resume
    if own or asked:
        _resume(trainer, job, str(own or asked), folder)
    elif job.config.init_from:
        _begin(trainer, job, job.config.init_from, folder)
    elif int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        job.logger.note(
            f"restarted; no checkpoint of an earlier attempt in {folder} or {OUTPUTS.resolve()}: "
            f"begun anew"
        )


def _begin(trainer: AnyTrainer, job: Parts, path: str, folder: Path) -> None:
    """Take what fits of another run's weights; say what does not."""
    note = job.logger.note
    newest_first = on_rank_zero(
        lambda: checkpoint_files.resume_candidates(path, folder, OUTPUTS.resolve(), key="init_from")
    )
    found = checkpoint_files.first_undamaged(
        newest_first, checkpoint.verified, fallback=False, note=note
    )
    taken: list[str] = []
    new: list[str] = []
    trainer.begin(partial(checkpoint.load_weights, found, taken=taken, new=new))
    note(f"begun from {found}: {len(taken)} tensors; new: {', '.join(new) or 'none'}")


def _resume(trainer: AnyTrainer, job: Parts, resume: str, folder: Path) -> None:
    config, note = job.config, job.logger.note
    newest_first = on_rank_zero(
        lambda: checkpoint_files.resume_candidates(resume, folder, OUTPUTS.resolve())
    )
    fallback = config.checkpoint.fallback
    found = checkpoint_files.first_undamaged(
        newest_first, checkpoint.verified, fallback=fallback, note=note
    )
    theirs = checkpoint_files.read_manifest(found)
    if isinstance(schedule := theirs.get("schedule"), dict):  # of an earlier version
        now = {f"schedule.{key}": value for key, value in schedule.items()}
        theirs["lr_schedule"] = {
            RENAMED.get(key, key).split(".")[1]: value for key, value in now.items()
        }
    if theirs["step"] >= config.steps:
        raise ValueError(
            f"resume: {found} has done {theirs['step']} steps already, steps={config.steps}: ask "
            f"for more steps"
        )
    trainer.load(partial(checkpoint.load, found, late=job.plan.without_late_states is None))
    trainer.next_step, trainer.tokens = theirs["step"], theirs["tokens"]
    note(f"resumed from {found}, step {theirs['step']}")
    ours = {key: value for key, value in _curve(job).items() if key in theirs}
    before, now = records.flat({key: theirs[key] for key in ours}), records.flat(ours)
    for key in before | now:
        if (had := before.get(key)) != (has := now.get(key)):
            note(f"the checkpoint's run had {key}={had}, this one has {has}: the curve may differ")


def _curve(job: Parts) -> dict[str, Any]:
    """What decides the loss curve besides the weights: kept in a checkpoint to compare."""
    keys = (
        "seed",
        "steps",
        "dtype",
        "precision",
        "global_batch_size",
        "seq_len",
        "clip_norm",
        "optimizer",
        "lr_schedule",
        "model",
        "task",
    )
    return {"data": job.data.describe()} | {key: job.written[key] for key in keys}


def manifest_fields(job: Parts, trainer: AnyTrainer, world: World) -> dict[str, Any]:
    """What a checkpoint says of its run, besides the step."""
    agents = {"agents": sorted(world.agents)}
    return {"tokens": trainer.tokens, **_curve(job), "mesh": job.plan.degrees, **agents}
