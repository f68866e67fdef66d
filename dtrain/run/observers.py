"""Observers look on while a run trains: instruments that measure, and faults to learn from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist

from dtrain.config.schema import Straggler
from dtrain.cost.predict import Cost, fold
from dtrain.cost.profile import RECORDED, Profile
from dtrain.launch.fault_injection import slowed
from dtrain.launch.hang_detector import HangDetector
from dtrain.parallel.spans import FIGURES, FORWARD_BACKWARD
from dtrain.report.base import Logger
from dtrain.run.assemble import Parts, footprint_of
from dtrain.run.trainer import AnyTrainer
from dtrain.strategy.parameter_server.trainer import ParameterServerTrainer
from dtrain.train import Step, Trainer


class Observer:
    """Look on while a trainer trains. Every method has a default that does nothing."""

    disturbed = False  # whether it has slowed the last step down

    def start(self, trainer: AnyTrainer) -> None:
        """Look at a trainer that has its weights, before its first step."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context for one phase of a step; the trainer enters it."""
        return nullcontext()

    def steps(self, trainer: AnyTrainer, steps: Iterator[Step]) -> Iterator[Step]:
        """Wrap the trainer's steps, to do something before and after each."""
        return steps

    def figures(self) -> dict[str, Any]:
        """Return what a step adds to its line in `metrics.jsonl`."""
        return {}

    def finish(self, summary: dict[str, Any], logger: Logger) -> None:
        """Add to the summary of a run that has done all its steps. Collective."""


class MissedCollective(Observer):
    """Inject a fault: this rank never comes to the collective of one step's figures."""

    def __init__(self, watch: HangDetector, step: int) -> None:
        self._watch, self._step = watch, step

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self._watch.stuck_in(self._step) if name == FIGURES else nullcontext()


class SlowRank(Observer):
    """Slow this rank's forward and backward passes down."""

    def __init__(self, straggler: Straggler, rank: int) -> None:
        self._straggler, self._rank = straggler, rank

    def phase(self, name: str) -> AbstractContextManager[None]:
        slow = name == FORWARD_BACKWARD
        return slowed(self._straggler, self._rank) if slow else nullcontext()


class ProfileObserver(Profile, Observer):
    """Profile the run's first steps (`profile=true`)."""

    def start(self, trainer: AnyTrainer) -> None:
        if (left := trainer.settings.steps - trainer.next_step) < RECORDED:
            raise ValueError(f"profile=true needs {RECORDED} steps, {left} are left: use more")

    def steps(self, trainer: AnyTrainer, steps: Iterator[Step] | None = None) -> Iterator[Step]:
        assert isinstance(trainer, Trainer)  # the parameter server's is not profiled
        return super().steps(trainer, steps)

    def finish(self, summary: dict[str, Any], logger: Logger) -> None:
        summary["profile"], spans = self.summary()
        title = f"{summary['strategy']} on {summary['world_size']} ranks: one step"
        logger.profile(summary["profile"], spans, title)


class ParameterServerObserver(Observer):
    """Report what the servers count: updates, gradients and their staleness."""

    def start(self, trainer: AnyTrainer) -> None:
        assert isinstance(trainer, ParameterServerTrainer)
        self._trainer = trainer

    def figures(self) -> dict[str, Any]:
        return self._trainer.figures()

    def finish(self, summary: dict[str, Any], logger: Logger) -> None:
        summary["profile"] = self._trainer.report()


class Observers:
    """Several observers as one. The first one's phase is the outermost."""

    def __init__(self, observers: list[Observer]) -> None:
        self._observers = observers

    @property
    def disturbed(self) -> bool:
        return any(each.disturbed for each in self._observers)

    def start(self, trainer: AnyTrainer) -> None:
        for each in self._observers:
            each.start(trainer)

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self._all(name) if self._observers else nullcontext()  # most runs have none

    @contextmanager
    def _all(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            for each in self._observers:
                stack.enter_context(each.phase(name))
            yield

    def steps(self, trainer: AnyTrainer) -> Iterator[Step]:
        steps = trainer.steps()
        for each in self._observers:
            steps = each.steps(trainer, steps)
        return steps

    def figures(self) -> dict[str, Any]:
        return {key: value for each in self._observers for key, value in each.figures().items()}

    def finish(self, summary: dict[str, Any], logger: Logger) -> None:
        for each in self._observers:
            each.finish(summary, logger)


def observers_of(job: Parts, stack: ExitStack, watch: HangDetector) -> Observers:
    """Return the observers that the configuration asks for; the stack closes them."""
    inject, rank = job.config.inject, dist.get_rank()
    observers: list[Observer] = []
    if inject.missed_collective.rank == rank:
        observers.append(MissedCollective(watch, inject.missed_collective.step))
    if job.asynchronous:
        observers.append(ParameterServerObserver())
    elif job.config.profile:
        profile = ProfileObserver(job.plan, _predicted(job))
        observers.append(stack.enter_context(profile))
    if inject.straggler.rank == rank:
        observers.append(SlowRank(inject.straggler, rank))
    return Observers(observers)


def _predicted(job: Parts) -> Cost | None:
    """Return this rank's predicted cost; None, with a note, if shapes alone cannot tell it."""
    try:
        return fold(footprint_of(job), job.plan, dist.get_rank())
    except ValueError as error:
        job.logger.note(f"nothing is predicted: {error}")
        return None
