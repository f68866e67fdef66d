"""Decide what a run starts from.

    Fresh      initial weights
    InitFrom   weights of the same name and shape in another run's checkpoint (`init_from`)
    Resume     a checkpoint of its own, or the one that was asked for (`resume`)
    Finished   nothing: the run has done all its steps

Rank 0 decides (`starting_point`), and every rank acts on it (`begin_from`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dtrain.config.aliases import RENAMED
from dtrain.files import json_files
from dtrain.launch.collectives import on_rank_zero
from dtrain.launch.world import World
from dtrain.report.files import SUMMARY, summary_in
from dtrain.run import checkpoint, checkpoint_files
from dtrain.run.assemble import Parts
from dtrain.run.claim import OUTPUTS, RESUMABLE
from dtrain.run.trainer import AnyTrainer

# of a configuration: what decides the loss curve besides weights and data
CURVE = (
    "seed", "steps", "dtype", "precision", "global_batch_size", "seq_len", "clip_norm",
    "optimizer", "lr_schedule", "model", "task",
)  # fmt: skip


@dataclass(frozen=True)
class Fresh:
    """Begin with initial weights; `note` says why, if the run was restarted."""

    note: str = ""


@dataclass(frozen=True)
class InitFrom:
    """Begin with weights of the first of these checkpoints, which are sorted from the newest."""

    checkpoints: list[Path]


@dataclass(frozen=True)
class Resume:
    """Go on from the first of these, or with `checkpoint.fallback` the first undamaged one."""

    checkpoints: list[Path]


@dataclass(frozen=True)
class Finished:
    """Nothing is left to do; the run has left this summary."""

    summary: dict[str, Any]


StartingPoint = Fresh | InitFrom | Resume | Finished


def starting_point(job: Parts, folder: Path, world: World) -> StartingPoint:
    """Decide where the run's weights come from. Collective: rank 0 decides for all.

    Raises:
        ValueError: there is no checkpoint where one was asked for.
    """
    return on_rank_zero(lambda: _decide(job, folder, world))


def _decide(job: Parts, folder: Path, world: World) -> StartingPoint:
    config, own = job.config, _own_checkpoints(job, folder, world)
    if own and checkpoint_files.steps_of(own[-1]) >= config.steps and (folder / SUMMARY).exists():
        job.logger.note(f"{own[-1]} has done all {config.steps} steps: nothing is left to do")
        summary = summary_in(folder)
        summary.pop(RESUMABLE, None)  # it was not stopped
        return Finished(summary)
    candidates = partial(
        checkpoint_files.resume_candidates, run_folder=folder, outputs=OUTPUTS.resolve()
    )
    if own:
        unfinished = (p for p in reversed(own) if checkpoint_files.steps_of(p) < config.steps)
        return Resume(candidates(str(next(unfinished, own[-1]))))
    if config.resume and config.resume != checkpoint_files.AUTO:
        return Resume(candidates(config.resume))
    if config.init_from:
        return InitFrom(candidates(config.init_from, key="init_from"))
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return Fresh(
        f"restarted; no checkpoint of an earlier attempt in {folder} or {OUTPUTS.resolve()}: "
        f"begun anew"
        if restarted
        else ""
    )


def _own_checkpoints(job: Parts, folder: Path, world: World) -> list[Path]:
    """Return the checkpoints in the run's folder, if it goes on by itself or was restarted."""
    goes_on = job.config.resume == checkpoint_files.AUTO
    if not (goes_on or checkpoint_files.run_of((folder,), world.agents)):
        return []
    return checkpoint_files.published(folder / checkpoint_files.CHECKPOINTS)


def begin_from(trainer: AnyTrainer, job: Parts, start: Fresh | InitFrom | Resume) -> None:
    """Give the trainer the weights, states and step to start with; note the origin. Collective.

    Raises:
        ValueError: the checkpoint is damaged, of another model, or has done all steps.
    """
    config, note = job.config, job.logger.note
    for model in trainer.models.values():
        for origin in {str(m.origin) for m in model.modules() if hasattr(m, "origin")}:
            note(origin)
    if isinstance(start, Fresh):
        if start.note:
            note(start.note)
        return
    fallback = isinstance(start, Resume) and config.checkpoint.fallback
    path = checkpoint_files.first_undamaged(
        start.checkpoints, checkpoint.verified, fallback=fallback, note=note
    )
    if isinstance(start, InitFrom):
        taken: list[str] = []
        new: list[str] = []
        trainer.begin(partial(checkpoint.load_weights, path, taken=taken, new=new))
        note(f"begun from {path}: {len(taken)} tensors; new: {', '.join(new) or 'none'}")
        return
    manifest = checkpoint_files.read_manifest(path)
    if manifest["step"] >= config.steps:
        raise ValueError(
            f"resume: {path} has done {manifest['step']} steps already, steps={config.steps}: ask "
            f"for more steps"
        )
    trainer.load(partial(checkpoint.load, path, late=job.plan.without_late_states is None))
    trainer.next_step, trainer.tokens = manifest["step"], manifest["tokens"]
    note(f"resumed from {path}, step {manifest['step']}")
    _note_differences(manifest, job)


def _note_differences(manifest: dict[str, Any], job: Parts) -> None:
    """Note each setting that the checkpoint's run had otherwise, and that changes the curve."""
    if isinstance(schedule := manifest.get("schedule"), dict):  # of an earlier version
        renamed = {
            RENAMED.get(f"schedule.{key}", f"schedule.{key}"): v for key, v in schedule.items()
        }
        manifest["lr_schedule"] = {key.split(".")[1]: value for key, value in renamed.items()}
    settings = {key: value for key, value in _curve(job).items() if key in manifest}
    before = json_files.flat({key: manifest[key] for key in settings})
    now = json_files.flat(settings)
    for key in before | now:
        if (had := before.get(key)) != (has := now.get(key)):
            job.logger.note(
                f"the checkpoint's run had {key}={had}, this one has {has}: the curve may differ"
            )


def _curve(job: Parts) -> dict[str, Any]:
    return {"data": job.data.describe()} | {key: job.written[key] for key in CURVE}


def manifest_fields(job: Parts, trainer: AnyTrainer, world: World) -> dict[str, Any]:
    """Return what a checkpoint tells of its run, besides the step."""
    agents = {"agents": sorted(world.agents)}
    return {"tokens": trainer.tokens, **_curve(job), "mesh": job.plan.degrees, **agents}
