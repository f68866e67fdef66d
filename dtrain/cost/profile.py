"""Measure what a trainer sends, what it holds and where its time goes, beside the predictions.

    with Profile(plan) as profile:
        trainer = Trainer(..., profile.phase)
        for step in profile.steps(trainer):
            profile.traffic

It counts the messages of every step, tracks memory in the third and records the timeline in the
fourth: those two steps take longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Self

import torch.distributed as dist

from dtrain.cost.memory_tracker import KINDS, MemoryTracker
from dtrain.cost.predict import Cost
from dtrain.cost.timeline import Span, Timeline, length
from dtrain.cost.traffic import CommunicationCounter
from dtrain.launch.collectives import all_gather_object
from dtrain.parallel.messages import Message
from dtrain.parallel.plan import Plan
from dtrain.parallel.spans import FIGURES, OPTIMIZER, PHASE, STAGE, mark
from dtrain.train import Step, Trainer

FOLLOWED, RECORDED = 3, 4  # steps of a run: after DDP's new buckets and Adam's first states


class Profile:
    """Count messages while the context lasts. Collective: every rank of the plan has one.

    Args:
        plan: connected.
        predicted: this rank's cost; None: not known.
    """

    def __init__(self, plan: Plan, predicted: Cost | None = None) -> None:
        self.plan, self.predicted = plan, predicted
        axes = [axis for axis, degree in plan.degrees.items() if degree > 1]
        groups = {
            tuple(dist.get_process_group_ranks(plan.mesh[axis].get_group())): axis for axis in axes
        }
        self._counter = CommunicationCounter(groups)
        self._tracking: tuple[MemoryTracker, Trainer] | None = None  # in the step FOLLOWED
        self.traffic: tuple[Message, ...] = ()  # of the last step
        self.disturbed = False  # whether an instrument slowed the last step down
        self.followed: MemoryTracker | None = None  # the memory of one step
        self.timeline = Timeline()

    def __enter__(self) -> Self:
        self._counter.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._counter.__exit__(*error)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Mark a phase of the trainer's. Sums for its figures do not count as traffic."""
        if name == OPTIMIZER and self._tracking:
            tracker, trainer = self._tracking
            tracker.label("gradients", trainer.local_tensors("gradients"))
        self._counter.counting = name != FIGURES
        try:
            with mark(PHASE, name):
                yield
        finally:
            self._counter.counting = False

    def steps(self, trainer: Trainer, steps: Iterator[Step] | None = None) -> Iterator[Step]:
        """Yield the steps, or else the trainer's own, with the instruments on."""
        steps, number = steps or trainer.steps(), 0
        while True:
            number += 1
            self.disturbed = number in (FOLLOWED, RECORDED)
            with self._instrument(number, trainer):
                step = next(steps, None)
            if step is None:
                return
            self.traffic = self._counter.take()
            yield step

    def _instrument(self, number: int, trainer: Trainer) -> AbstractContextManager[None]:
        """Return what looks on in this step of the run, besides the counter."""
        if number == FOLLOWED and not self.plan.compile:
            return self._following(trainer)
        if number == RECORDED:
            dist.barrier()  # so that the spans of all begin together
            return self.timeline.recording(self.plan.device)
        return nullcontext()

    @contextmanager
    def _following(self, trainer: Trainer) -> Iterator[None]:
        """Track the memory of the step within."""
        self.followed = tracker = MemoryTracker()
        for kind in ("parameters", "optimizer"):
            tracker.label(kind, trainer.local_tensors(kind))
        self._tracking = tracker, trainer
        try:
            with tracker:
                yield
        finally:
            self._tracking = None

    def figures(self) -> dict[str, int]:
        """Return the last step's messages, for `metrics.jsonl`."""
        flat = {}
        for message in self.traffic:
            flat[f"{message.axis}_{message.operation}_calls"] = message.calls
            flat[f"{message.axis}_{message.operation}_bytes"] = message.bytes
        return flat

    def summary(self) -> tuple[dict[str, Any], list[list[Span]]]:
        """Return measurements beside predictions, and spans, of every rank. Collective."""
        ranks = all_gather_object((self._own(), self.timeline.spans))
        spans = [each for _, each in ranks]
        return {"ranks": [own for own, _ in ranks], "bubble": self._bubble(spans)}, spans

    def _own(self) -> dict[str, Any]:
        degrees = self.plan.degrees
        return {
            "traffic": [_message(m, degrees) for m in self.traffic],
            "traffic_predicted": [_message(m, degrees) for m in self.predicted.messages]
            if self.predicted
            else None,
            "memory": self._memory() if self.followed else None,
            "time": asdict(self.timeline.shares()),
        }

    def _memory(self) -> dict[str, Any]:
        tracker = self.followed
        assert tracker is not None
        at_peak = tracker.at_peak()
        predicted = (
            {
                "parameters": self.predicted.parameter_bytes,
                "gradients": self.predicted.gradient_bytes,
                "optimizer": self.predicted.optimizer_bytes,
                "activations": self.predicted.activation_bytes,
            }
            if self.predicted
            else {}
        )
        kinds = {
            kind: {
                "at_peak": at_peak[kind],
                "most": tracker.labelled_bytes.get(kind) or tracker.peak(kind),
                "predicted": predicted.get(kind),
            }
            for kind in KINDS
        }
        return {"peak": sum(at_peak.values()), "kinds": kinds}

    def _bubble(self, ranks: list[list[Span]]) -> dict[str, float] | None:
        """Return the idle share of a pipeline's ranks, from first work to last, and in theory."""
        if (pipeline := self.plan.strategy_on("pp")) is None:
            return None
        # torch's pipelining takes a second to import: only its users wait
        from dtrain.strategy.pipeline.schedule import bubble
        from dtrain.strategy.pipeline.strategy import PipelineParallel

        stages = [[span for span in spans if span.kind == STAGE] for spans in ranks]
        if not isinstance(pipeline, PipelineParallel) or not all(stages):
            return None
        begin = min(s.start for spans in stages for s in spans)
        end = max(s.end for spans in stages for s in spans)
        busy = sum(length((s.start, s.end) for s in spans) for spans in stages)
        micro_batches = 1 + max(span.micro_batch for span in stages[0])
        return {
            "measured": 1 - busy / (len(stages) * (end - begin)),
            "theory": bubble(pipeline.schedule, micro_batches),
            "micro_batches": micro_batches,
        }


def _message(message: Message, degrees: dict[str, int]) -> dict[str, Any]:
    return asdict(message) | {"wire_bytes": message.wire_bytes(degrees.get(message.axis, 1))}
