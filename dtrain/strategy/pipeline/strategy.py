"""Pipeline parallel: each rank holds consecutive blocks, and micro-batches flow through the ranks.

    1F1B on two stages, four micro-batches (1' is the backward of 1, . is idle):
    stage 0: embedding, blocks 0-3 |  1  2  .  1' 3  2' 4  3' .  4'
    stage 1: blocks 4-7, head      |  .  1  1' 2  2' 3  3' 4  4' .

With p ranks of v stages and m micro-batches the bubble, the idle share, is (p-1)/(v m + p-1).
gpipe runs all forward passes first; 1f1b has its bubble, but keeps the activations of p
micro-batches instead of m. Zero-bubble schedules (interleaved_zero_bubble, zbv, dualpipev) fill the
bubble with the gradients of weights, for which nobody waits. V schedules (zbv, dualpipev) hold
stages r and 2p-1-r on rank r. Beside fsdp gathered weights stay until a step's last backward pass.
Cost a micro-batch and boundary between stages: one activation (B, T, C) sent forward, its gradient
sent back; a step: the gradient of what first and last stage share, sent both ways.
Memory: 1/p of the weights and their states.
Sources: Narayanan et al. 2020, PipeDream-Flush, 1F1B (2006.09503); Huang et al. 2018, GPipe
(1811.06965); Narayanan et al. 2021, interleaved 1F1B (2104.04473); Lamy-Poirier 2022, looped BFS
(2211.05953); Qi et al. 2023, zero bubble (2401.10241); DeepSeek-AI 2024, DualPipe (2412.19437).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Size, Tensor, nn
from torch.optim import Optimizer

from dtrain.model.layout import Absent, layout_of, shared_names
from dtrain.parallel.checks.optimizer import APART, REGROUPED
from dtrain.parallel.checks.rehearsal import Rehearsal, refuse_foreign, shared_copy
from dtrain.parallel.footprint import Activation, Footprint
from dtrain.parallel.mesh import REST
from dtrain.parallel.messages import Message, message
from dtrain.parallel.strategy import Executor, ParallelContext, Strategy
from dtrain.strategy.pipeline.executor import PipelineExecutor
from dtrain.strategy.pipeline.schedule import (
    ONE_STAGE,
    SCHEDULES,
    SPLIT_BACKWARD,
    V_SHAPED,
    Schedule,
    passes_of_stages,
)
from dtrain.strategy.pipeline.stages import keep_stage, split_evenly, sum_ends
from dtrain.task.batch import Models, pieces

if TYPE_CHECKING:
    from dtrain.task.base import Task

BETWEEN = (
    "what `forward` does between the modules of its Layout is lost, or done by every stage: put it "
    "into the Layout's first module, blocks or last module, or use a strategy on dp or fsdp"
)
ON_META = (
    "a pipeline learns the shapes of activations there: compute with tensors alone, or use a "
    "strategy on dp or fsdp"
)


@dataclass(frozen=True)
class WholeModel:
    """What every rank knows of a model that was split into stages.

    Args:
        outline: the model on the meta device: tells the shapes of activations.
        tied: parameters that its first and last stage share, by their names in the first.
    """

    outline: nn.Module
    tied: tuple[str, ...]


class PipelineParallel(Strategy):
    """Cut the model's blocks over `pp`; the first stage has the embedding, the last one the head.

    Args:
        degree: ranks along `pp`; -1: the rest of the world.
        schedule: a name of SCHEDULES.
        micro_batches: into how many a rank's rows are divided; None: as `micro_batch_size` says;
            if neither is set, the smallest number of at least two a rank of `pp` that divides the
            rows, or else the largest that does.
        stages_per_rank: None: 1 for gpipe and 1f1b, 2 for the others.
        split: blocks of each stage; None: so that the largest stage costs least.
    """

    name = "pipeline"
    axis = "pp"
    stepped = (APART, REGROUPED)
    divides = ""

    def __init__(
        self,
        degree: int = REST,
        *,
        schedule: str = "1f1b",
        micro_batches: int | None = None,
        stages_per_rank: int | None = None,
        split: list[int] | None = None,
    ) -> None:
        super().__init__(degree)
        if schedule not in SCHEDULES:
            raise ValueError(
                f"strategy.pp.schedule={schedule} is unknown: use {', '.join(SCHEDULES)}"
            )
        expected = 1 if schedule in ONE_STAGE else 2
        self.stages_per_rank = expected if stages_per_rank is None else stages_per_rank
        if self.stages_per_rank < 1 or (
            schedule in ONE_STAGE + V_SHAPED and self.stages_per_rank != expected
        ):
            raise ValueError(
                f"strategy.pp.stages_per_rank={stages_per_rank}: schedule {schedule} holds "
                f"{expected}{'' if schedule in ONE_STAGE + V_SHAPED else ' or more'} a rank"
            )
        if split is not None and not (
            isinstance(split, list) and all(type(number) is int for number in split)
        ):
            raise ValueError(
                f"strategy.pp.split={split} must be a list of numbers of blocks, such as [5,3]"
            )
        if micro_batches is not None and micro_batches < 1:
            raise ValueError(f"strategy.pp.micro_batches={micro_batches} must be at least 1")
        self.kind, self.split = schedule, split
        self.micro_batches_asked = micro_batches
        self.splits_backward = schedule in SPLIT_BACKWARD
        self.whole: WholeModel  # of the model that split_into_stages was given

    @property
    def schedule(self) -> Schedule:
        """Which stages the ranks hold, and in which order they run micro-batches."""
        return Schedule(self.kind, self.degree, self.stages_per_rank)

    def check(self, plan: ParallelContext) -> None:
        if plan.compile and self.splits_backward:
            raise ValueError(
                f"schedule {self.kind} divides the backward pass, which compile=true makes one: "
                f"use compile=false or interleaved_1f1b"
            )

    def check_model(self, model: nn.Module, plan: ParallelContext) -> None:
        name, layout = type(model).__name__, layout_of(model)
        stages = self.schedule.stages
        if not (layout.first and layout.blocks and layout.last):
            raise ValueError(
                f"{name} has no pipeline split: its Layout names no first, blocks and last; use a "
                f"strategy on dp or fsdp"
            )
        blocks = len(model.get_submodule(layout.blocks))  # type: ignore[arg-type]
        if stages > blocks:
            most = blocks // self.stages_per_rank
            remedy = f"at most pp={most}" if most else "schedule gpipe or 1f1b"
            raise ValueError(
                f"pp={self.degree} x {self.stages_per_rank} stages a rank are {stages} stages, the "
                f"model has {blocks} blocks: use {remedy}, or more blocks"
            )
        split = self.split or [1] * (stages - 1) + [blocks - stages + 1]
        if len(split) != stages or sum(split) != blocks or min(split) < 1:
            raise ValueError(
                f"strategy.pp.split={self.split} must be {stages} numbers of at least 1 that sum "
                f"to the model's {blocks} blocks"
            )
        for one, other in shared_names(model).items():
            if not (one.startswith(f"{layout.last}.") and other.startswith(f"{layout.first}.")):
                raise ValueError(
                    f"{name} shares {other} with {one}: only first and last module may share in a "
                    f"pipeline"
                )

    def check_task(self, task: Task, plan: ParallelContext) -> None:
        if len(task.models) > 1 or not all(hasattr(update, "criterion") for update in task.updates):
            raise ValueError(
                f"task {type(task).__name__} has no pipeline split: that takes one model, and a "
                f"loss of its outputs (Supervised); use a strategy on dp or fsdp"
            )

    def micro_batches(self, rows: int, micro_batch_size: int | None) -> int:
        fitting, asked = self.schedule.micro_batches(rows), self.micro_batches_asked
        number = asked or (rows // micro_batch_size if micro_batch_size else 0)
        if asked and micro_batch_size and rows != asked * micro_batch_size:
            raise ValueError(
                f"strategy.pp.micro_batches={asked} x micro_batch_size={micro_batch_size} is "
                f"not the {rows} rows of a rank: set one of them"
            )
        if not fitting:
            raise ValueError(
                f"schedule {self.kind} on pp={self.degree} needs at least "
                f"{self.schedule.least_micro_batches} micro-batches, and a rank has {rows} rows: "
                f"use more rows (global_batch_size) or gpipe"
            )
        if number and number not in fitting:
            raise ValueError(
                f"schedule {self.kind} on pp={self.degree} cannot run {rows} rows in {number} "
                f"micro-batches: use strategy.pp.micro_batches={' or '.join(map(str, fitting))}"
            )
        return number or next((m for m in fitting if m >= 2 * self.degree), fitting[-1])

    def rehearsals(
        self, model: nn.Module, inputs: Sequence[Tensor], plan: ParallelContext
    ) -> Iterator[Rehearsal]:
        counts = self._blocks_of_stages(model)
        names = list(inspect.signature(model.forward).parameters)[1:]
        stages = [keep_stage(shared_copy(model), stage, counts) for stage in range(len(counts))]

        def staged(x: Tensor, *others: Tensor) -> Tensor:
            for stage in stages:
                given = x
                with torch.enable_grad():
                    x = stage(x, **dict(zip(names, others, strict=False)))
                refuse_foreign(stage, given, x, model)
            return x

        def outlined(*inputs: Tensor) -> Tensor:
            outline = copy.deepcopy(model).to("meta")
            return torch.zeros(outline(*(x.to("meta") for x in inputs)).shape)

        def shaped(*inputs: Tensor) -> Tensor:
            return torch.zeros(model(*inputs).shape)

        yield Rehearsal(f"in {len(stages)} stages", model, staged, BETWEEN)
        yield Rehearsal("on the meta device", shaped, outlined, ON_META)

    def _blocks_of_stages(self, model: nn.Module) -> list[int]:
        return self.split or split_evenly(model, self.schedule.stages)

    def split_into_stages(self, model: nn.Module, plan: ParallelContext) -> list[nn.Module]:
        counts = self._blocks_of_stages(model)
        tied = shared_names(model).values() if len(counts) > 1 else ()
        self.whole = WholeModel(copy.deepcopy(model).to("meta"), tuple(tied))
        return [keep_stage(copy.deepcopy(model), stage, counts) for stage in self._held(plan)]

    def _held(self, plan: ParallelContext) -> list[int]:
        return self.schedule.held_by(plan.mesh[self.axis].get_local_rank())

    def executor(
        self,
        models: Models,
        optimizers: Mapping[str, Optimizer],
        plan: ParallelContext,
        micro_batches: int,
    ) -> Executor:
        (model,) = models.values()
        stages, outline = self._by_stage(model, plan), self.whole.outline
        return PipelineExecutor(self.schedule, stages, outline, plan, micro_batches)

    def _by_stage(self, model: nn.Module, plan: ParallelContext) -> dict[int, nn.Module]:
        return dict(zip(self._held(plan), pieces(model), strict=True))

    def reduce_gradients(self, model: nn.Module, plan: ParallelContext) -> None:
        stages, group = self._by_stage(model, plan), plan.mesh[self.axis].get_group()
        for name in self.whole.tied:
            sum_ends(name, stages, self.schedule, group)

    def duplicated_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the last stage's copies of what the first stage has, if the last stage is here."""
        piece = pieces(model)[-1]
        has_end = not isinstance(piece.get_submodule(layout_of(piece).last), Absent)
        return [piece.get_parameter(name) for name in self.whole.tied] if has_end else []

    def sum_over_axis(self, value: Tensor, plan: ParallelContext) -> Tensor:
        """Return the sum over the stages: the last one alone has losses, the others add zero."""
        dist.all_reduce(value, group=plan.mesh[self.axis].get_group())
        return value

    def footprint(self, footprint: Footprint, plan: ParallelContext) -> Footprint:
        here, schedule = footprint.place[self.axis], self.schedule
        (whole,) = footprint.pieces
        counts, end = self._blocks_of_stages(whole.outline), schedule.stages - 1
        (output, *_), last = self._outputs(footprint, plan), layout_of(whole.outline).last
        stages = []
        for stage, of_step in passes_of_stages(schedule, here, footprint.micro_batches).items():
            piece = whole.keep(keep_stage(copy.deepcopy(whole.outline), stage, counts), *of_step)
            # what a stage gives is kept until its backward pass: of the last one, the logits
            if stage == end:
                died = max((kept.died for kept in piece.kept), default=0)
                outputs = [call.output for call in piece.calls_at((last,)) if call.graded]
                logits = (
                    Activation(None, x, prod(x) * footprint.activation_bytes, 0, died, frozenset())
                    for x in filter(None, outputs)
                )
                piece = replace(piece, kept=(*piece.kept, *logits))
            elif schedule.kind not in ONE_STAGE and schedule.owner(stage + 1) != here:
                # torch waits for them all at the end
                piece = replace(piece, sent=output * footprint.activation_bytes)
            stages.append(piece)
        return replace(footprint, pieces=tuple(stages))

    def _outputs(self, footprint: Footprint, plan: ParallelContext) -> list[int]:
        """Return the elements of what each call of a block gives, as it travels."""
        calls = footprint.calls_at(lambda layout: (f"{layout.blocks}.*",))
        return [prod(plan.activation(Size(call.output))) for call in calls if call.output]

    def cost(self, footprint: Footprint, plan: ParallelContext) -> list[Message]:
        here, schedule = footprint.place[self.axis], self.schedule
        held, end = schedule.held_by(here), schedule.stages - 1
        neighbours = [other for stage in held for other in (stage - 1, stage + 1)]
        elsewhere = [s for s in neighbours if 0 <= s <= end and schedule.owner(s) != here]
        has_one_end = len({0, end} & {*held}) == 1
        tied = shared_names(footprint.pieces[0].outline).values() if has_one_end else ()
        shared = [w for piece in footprint.pieces for w in piece.weights if w.name in tied]
        # an activation to the next stage, its gradient to the one before
        sends = self._outputs(footprint, plan)[:1] * len(elsewhere)
        ends = [prod(weight.held) for weight in shared]
        return [
            message(self.axis, "send", sends, footprint.activation_bytes, footprint.micro_batches),
            message(self.axis, "send", ends, footprint.weight_bytes),
        ]
